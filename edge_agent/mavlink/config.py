"""The configuration of the MAVLink bridge, and its check. systemd/edge-agent-mavlink.yaml describes every key.

>>> parse_connection("serial:/dev/ttyTHS1:921600").kind
'serial'
"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta

from edge_agent.errors import ConfigError
from edge_agent.strict_yaml import convert, parse_yaml, read_text

FORMS = "udpout:ADDRESS:PORT, udpin:ADDRESS:PORT, tcp:ADDRESS:PORT or serial:DEVICE:BAUD"
MAX_PORT = 65535

SystemId = Annotated[int, Meta(ge=1, le=255)]
Speed = Annotated[float, Meta(gt=0, le=20)]
Distance = Annotated[float, Meta(gt=0, le=10_000)]


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A setpoint outside these is reduced to them."""

    speed_m_s: Speed = 2.0  # horizontal
    up_m_s: Speed = 1.0
    down_m_s: Speed = 1.0
    yaw_rate_rad_s: Annotated[float, Meta(gt=0, le=6.0)] = 0.8
    acceleration_m_s2: Annotated[float, Meta(gt=0, le=50)] = 5.0


class Fence(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A setpoint that leads out of this is replaced by hold. Relative to the home position of the autopilot."""

    min_altitude_m: Annotated[float, Meta(ge=-1000, le=10_000)] = 1.0
    max_altitude_m: Annotated[float, Meta(ge=-1000, le=10_000)] = 30.0
    radius_m: Distance = 50.0


class BridgeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    connection: str = ""  # see FORMS
    runtime_dir: str = ""  # the daemon's folder of sockets; "": the default one
    target_system: SystemId = 1  # of the autopilot
    target_component: SystemId = 1
    autopilot: Literal["auto", "px4", "ardupilot"] = "auto"
    home: Literal["autopilot", "origin"] = "autopilot"  # what the fence is measured from
    # How long hold is sent after the last action that was followed arrived. The action stands for up to 0.9 s of it.
    hold_s: Annotated[float, Meta(ge=1.0, le=10.0)] = 2.0
    land: bool = False  # the action `land` becomes MAV_CMD_NAV_LAND
    search_m_s: Annotated[float, Meta(ge=0, le=5)] = 0.0  # the action `search` flies a spiral; 0: it is hold
    search_radius_m: Distance = 20.0  # of the spiral around home; never more than 0.8 of fence.radius_m
    max_image_age_ms: Annotated[int, Meta(ge=50, le=10_000)] = 1000  # of the image behind an action
    limits: Limits = Limits()
    fence: Fence = Fence()


class Connection(NamedTuple):
    kind: Literal["udpout", "udpin", "tcp", "serial"]
    address: str  # an IP address, or the path of a serial device
    number: int  # a port, or a baud rate


def load_config(path: str | Path) -> BridgeConfig:
    """Raises ConfigError."""
    value = parse_yaml(read_text(path), str(path))
    config = convert({} if value is None else value, BridgeConfig, str(path))
    check(config, str(path))
    return config


def check(config: BridgeConfig, file: str) -> None:
    """What the types do not say; their ranges refuse NaN. Raises ConfigError."""
    fence = config.fence
    if fence.min_altitude_m >= fence.max_altitude_m:
        raise ConfigError(
            f"{file}: fence: expected min_altitude_m below max_altitude_m; found {fence.min_altitude_m:g} and "
            f"{fence.max_altitude_m:g}"
        )
    if config.search_m_s > config.limits.speed_m_s:
        raise ConfigError(
            f"{file}: search_m_s: expected at most limits.speed_m_s, {config.limits.speed_m_s:g}; found "
            f"{config.search_m_s:g}"
        )
    if config.connection:
        parse_connection(config.connection, f"{file}: connection")


def parse_connection(text: str, place: str = "--connection") -> Connection:
    """Raises ConfigError."""
    kind, _, rest = text.partition(":")
    address, _, number = rest.rpartition(":")
    if kind not in ("udpout", "udpin", "tcp", "serial") or not address:
        raise ConfigError(f"{place}: expected {FORMS}; found {text!r}")
    if not (number.isascii() and number.isdigit() and int(number) > 0):
        raise ConfigError(f"{place}: expected {FORMS}; found {number!r} after the last colon, which is not a number")
    if kind == "serial":
        return Connection("serial", address, int(number))
    if int(number) > MAX_PORT:
        raise ConfigError(f"{place}: expected a port up to {MAX_PORT}; found {number}")
    try:
        ipaddress.IPv4Address("127.0.0.1" if address == "localhost" else address)
    except ValueError:
        raise ConfigError(f"{place}: expected an IPv4 address or localhost; found {address!r}") from None
    address = "127.0.0.1" if address == "localhost" else address
    return Connection(kind, address, int(number))  # type: ignore[arg-type]
