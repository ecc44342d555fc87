"""The unit of the MAVLink bridge keeps its contract, and its commented configuration stays true."""

from __future__ import annotations

import re

import msgspec
import yaml

from edge_agent.mavlink.config import BridgeConfig, load_config
from edge_agent.strict_yaml import convert
from tests.harness import ROOT

UNIT = ROOT / "systemd" / "edge-agent-mavlink.service"
EXAMPLE = ROOT / "systemd" / "edge-agent-mavlink.yaml"


def test_contract():
    text = UNIT.read_text()
    for line in (
        "Type=notify",
        "WatchdogSec=2",  # shorter than any hold: a bridge that hangs is replaced soon
        "RestartPreventExitStatus=2 78",
        "IPAddressDeny=any",
        "IPAddressAllow=localhost",
        "DevicePolicy=closed",
        "Group=edge-agent",  # who may open the daemon's sockets
        "User=edge-agent-mavlink",
    ):
        assert f"\n{line}\n" in text
    assert "\nRequires=" not in text and "\nBindsTo=" not in text  # the bridge holds without a daemon
    assert set(re.findall(r"^DeviceAllow=(\S+) rw$", text, re.MULTILINE)) == {
        "char-ttyTHS", "char-ttyUSB", "char-ttyACM", "char-ttyAMA",
    }  # fmt: skip


def test_the_example_names_every_key_with_its_default():
    """Uncommented, the example is the default configuration; a key that is not in it, or not in the code, fails."""
    assert load_config(EXAMPLE).connection
    lines = [re.sub(r"^( *)# ([a-z]\w*: \S.*)$", r"\1\2", line) for line in EXAMPLE.read_text().splitlines()]
    values = yaml.safe_load("\n".join(line for line in lines if not line.lstrip().startswith("#")))
    config = convert(values, BridgeConfig, "example")
    assert msgspec.structs.replace(config, connection="") == BridgeConfig()
    for part, kind in ((values, BridgeConfig), (values["limits"], type(config.limits))):
        assert set(part) == set(kind.__struct_fields__)
    assert set(values["fence"]) == set(type(config.fence).__struct_fields__)
