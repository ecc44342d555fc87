"""Errors of one line have one base class, so that a command can catch them without a list of names."""

from __future__ import annotations

import os
import re

from edge_agent.errors import BundleError, ConfigError, UserError
from tests.harness import ROOT

# Exceptions that are not one line for the user of a command, and why.
OTHERS = {
    "UserError": "the base class itself",
    "Shutdown": "a signal, carried through the supervisor's loop",
    "RequestRefused": "the client's: a controller catches it, and the client imports only the wire",
    "ProtocolError": "of one peer: its connection ends, and nobody sees a line",
    "_Stopped": "a signal within one answer, which becomes the reason why it ended early",
    "PathError": "the publisher and the camera make their own error of it",
    "LinkLost": "the bridge goes on without the link, and opens it again",
    "Refused": "a played daemon's: it becomes a reply",
    "ScriptEnded": "ends one script of a rehearsal, whose violations say why",
}
FILES = sorted([*(ROOT / "edge_agent").rglob("*.py"), *(ROOT / "quantize").rglob("*.py")])


def test_no_error_class_stands_apart_from_user_error():
    text = "".join(path.read_text(encoding="utf-8") for path in FILES)
    classes = re.findall(r"^ *class (\w+)\(([^)]*)\):", text, flags=re.MULTILINE)
    apart = {name for name, bases in classes if "Exception" in re.split(r"\W+", bases)}
    assert OTHERS.keys() >= apart >= {"UserError"}


def test_the_exceptions_to_the_rule_still_exist():
    text = "".join(path.read_text(encoding="utf-8") for path in FILES)
    assert [name for name in OTHERS if f"class {name}(Exception)" not in text] == []


def test_a_wrong_configuration_or_bundle_ends_with_78():
    for error, status in ((UserError, 1), (ConfigError, os.EX_CONFIG), (BundleError, os.EX_CONFIG)):
        assert error("line").exit_status == status
