"""The configuration of the bridge: one clear line for each mistake."""

from __future__ import annotations

import pytest

from edge_agent.errors import ConfigError
from edge_agent.mavlink.config import FORMS, BridgeConfig, Connection, load_config, parse_connection


def test_an_empty_file_is_the_default(tmp_path):
    path = tmp_path / "bridge.yaml"
    path.write_text("# nothing\n")
    assert load_config(path) == BridgeConfig()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hold: 2", "unknown key 'hold'"),
        ("hold_s: 0.5", "hold_s: expected `float` >= 1.0, found 0.5"),
        ("hold_s: 60", "hold_s: expected `float` <= 10.0, found 60"),
        ("limits: {speed_m_s: 0}", "limits.speed_m_s: expected `float` > 0"),
        ("limits: {speed_m_s: .nan}", "limits.speed_m_s: expected "),
        ("search_m_s: .nan", "search_m_s: expected "),
        ("limits: {speed: 1}", "limits: unknown key 'speed'"),
        ("fence: {radius_m: -1}", "fence.radius_m: expected `float` > 0"),
        ("fence: {min_altitude_m: .nan}", "fence.min_altitude_m: expected `float` >= -1000.0, found nan"),
        ("fence: {min_altitude_m: 30}", "expected min_altitude_m below max_altitude_m; found 30 and 30"),
        ("search_m_s: 3", "search_m_s: expected at most limits.speed_m_s, 2; found 3"),
        ("target_system: 0", "target_system: expected `int` >= 1, found 0"),
        ("autopilot: inav", "autopilot: expected one of auto, px4, ardupilot, found 'inav'"),
        ("land: 1", "land: expected `bool`, found 1"),
        ("connection: udp:127.0.0.1:14540", FORMS),
    ],
)
def test_a_mistake_is_one_line(tmp_path, text, words):
    path = tmp_path / "bridge.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert words in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.exit_status == 78


@pytest.mark.parametrize(
    ("text", "connection"),
    [
        ("udpout:127.0.0.1:14540", Connection("udpout", "127.0.0.1", 14540)),
        ("udpin:0.0.0.0:14550", Connection("udpin", "0.0.0.0", 14550)),
        ("tcp:localhost:5760", Connection("tcp", "127.0.0.1", 5760)),
        ("serial:/dev/serial/by-id/usb-3D:x:57600", Connection("serial", "/dev/serial/by-id/usb-3D:x", 57600)),
    ],
)
def test_connections(text, connection):
    assert parse_connection(text) == connection


@pytest.mark.parametrize(
    "text",
    [
        "", "udpout", "udpout:127.0.0.1", "udpout:127.0.0.1:", "udpout:127.0.0.1:0", "udpout:127.0.0.1:65536",
        "udpout:drone.local:14540", "udpout:::1:14540", "tcp:127.0.0.1:x", "tcp:127.0.0.1:١", "serial:/dev/ttyTHS1",
        "serial::57600", "/dev/ttyTHS1", "ws:127.0.0.1:1",
    ],
)  # fmt: skip
def test_what_is_no_connection(text):
    with pytest.raises(ConfigError, match="--connection: expected "):
        parse_connection(text)
