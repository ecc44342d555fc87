"""PROTOCOL.md against the structs: each table has every field, with its type, its unit and whether it is required."""

from __future__ import annotations

import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
import pytest

from edge_agent.actions.space import MAX_VALID_FOR_MS
from edge_agent.actions.vehicle_state import MAX_STATE_NUMBER
from edge_agent.client.received import MAX_AHEAD_NS, MAX_VALID_NS
from edge_agent.ipc.frame_slot import MAX_IMAGE_BYTES
from edge_agent.supervisor import control as control_of_supervisor
from edge_agent.supervisor.control import MAX_PENDING_REQUESTS, MAX_TEXT_CHARS, OPERATIONS
from edge_agent.supervisor.process import MAX_DETAIL_CHARS
from edge_agent.supervisor.publisher import PUBLISH_HWM
from edge_agent.supervisor.status import MAX_REASON_CHARS, STATUS_INTERVAL_NS
from edge_agent.time_units import NS_PER_MS
from edge_agent.wire import control, messages, pushed_frame, streams
from edge_agent.wire.messages import (
    MAX_MESSAGE_BYTES,
    PROTOCOL_VERSION,
    Action,
    BoardStatus,
    GovernorStatus,
    Header,
    Refusal,
    StageTimes,
    Status,
    TextMessage,
    WorkerStatus,
)
from tests.harness import ROOT

TEXT = (ROOT / "PROTOCOL.md").read_text(encoding="utf-8")

TABLES: dict[str, type[msgspec.Struct]] = {
    "Header": Header,
    "Action": Action,
    "Stage times": StageTimes,
    "Refusal": Refusal,
    "Text": TextMessage,
    "Status": Status,
    "Worker": WorkerStatus,
    "Board": BoardStatus,
    "Governor": GovernorStatus,
    "Request": control.Request,
    "Reply": control.Reply,
    "Pushed frame": pushed_frame.PushedFrame,
}
LISTS = {
    "Refusal reasons": messages.RefusalReason,
    "Lanes": messages.Lane,
    "Stop reasons": messages.TextStopReason,
    "States": messages.DaemonState,
    "Operations": control.Operation,
}
TYPES: list[tuple[Any, str]] = [
    (int, "int"),
    (float, "float"),
    (bool, "bool"),
    (str, "str"),
    (bytes, "bin"),
    (memoryview, "bin"),
    (StageTimes, "Stage times"),
    (WorkerStatus, "Worker"),
    (BoardStatus, "Board"),
    (GovernorStatus, "Governor"),
    (list[str], "list of str"),
    (dict[str, Any], "map"),
    (dict[str, int], "map of int"),
    (dict[str, float], "map of float"),
    (dict[str, messages.ActionValue], "map of float or str"),
    (dict[str, control.StateValue | None], "map of bool, int, float, str or null"),
    (list[dict[str, messages.ActionValue]], "list of map of float or str"),
]
UNITS = {"_ns": "ns", "_ms": "ms", "_s": "s", "_mib": "MiB", "_c": "°C", "_w": "W", "_mhz": "MHz", "_hz": "Hz"}


def read_sections() -> dict[str, list[list[str]]]:
    """Heading -> the rows of the table below it, without its head. The rows above the first heading have the key ""."""
    sections: dict[str, list[list[str]]] = {}
    heading = ""
    for line in TEXT.splitlines():
        if line.startswith("#") and not line.startswith("# "):
            heading = line.lstrip("#").strip()
        elif line.startswith("|"):
            sections.setdefault(heading, []).append([cell.strip() for cell in line.strip("|").split("|")])
    return {name: rows[2:] for name, rows in sections.items()}


SECTIONS = read_sections()


def own_fields(struct: type[msgspec.Struct]) -> list[msgspec.structs.FieldInfo]:
    inherited = set(Header.__struct_fields__) if struct is not Header and issubclass(struct, Header) else set()
    return [field for field in msgspec.structs.fields(struct) if field.name not in inherited]


def type_in_words(kind: Any) -> str:
    if get_origin(kind) is Annotated:
        return type_in_words(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return type(get_args(kind)[0]).__name__
    if get_origin(kind) in (Union, types.UnionType) and type(None) in get_args(kind):
        (member,) = (member for member in get_args(kind) if member is not type(None))
        return f"{type_in_words(member)} or null"
    return next(words for python_type, words in TYPES if python_type == kind)


def default_of(field: msgspec.structs.FieldInfo) -> str:
    """The cell `required`: "yes", or "no" and the default as JSON."""
    if field.required:
        return "yes"
    default = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()  # type: ignore[misc]
    return f"no: `{msgspec.json.encode(default).decode()}`"


def test_every_table_of_the_document_is_compared():
    with_fields = {name for name, rows in SECTIONS.items() if len(rows[0]) == 5}
    assert with_fields == set(TABLES)
    assert set(SECTIONS) == {"", "Action spaces", *TABLES, *LISTS}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_has_the_fields_of_its_struct_in_their_order(name):
    assert [row[0] for row in SECTIONS[name]] == [f"`{field.name}`" for field in own_fields(TABLES[name])]


@pytest.mark.parametrize("name", TABLES)
def test_a_table_has_the_types_units_and_defaults_of_its_struct(name):
    hints = get_type_hints(TABLES[name], include_extras=True)
    for field, (cell, kind, unit, required, meaning) in zip(own_fields(TABLES[name]), SECTIONS[name], strict=True):
        assert kind == type_in_words(hints[field.name]), cell
        assert required == default_of(field), cell
        suffix = next((suffix for suffix in UNITS if field.name.endswith(suffix)), None)
        if suffix:
            assert unit == UNITS[suffix], cell
        elif kind in ("str", "bool", "bin"):
            assert unit == "–", cell
        assert unit and meaning, cell


@pytest.mark.parametrize("name", LISTS)
def test_a_list_has_the_values_of_its_type(name):
    values = [row[0] for row in SECTIONS[name]]
    assert values == [f"`{value}`" if value else '`""`' for value in get_args(LISTS[name])]


@pytest.mark.parametrize("name", TABLES)
def test_a_field_with_a_list_of_values_names_the_list_or_the_values(name):
    hints = get_type_hints(TABLES[name], include_extras=True)
    for field, row in zip(own_fields(TABLES[name]), SECTIONS[name], strict=True):
        if get_origin(hints[field.name]) is not Literal:
            continue
        values = get_args(hints[field.name])
        heading = next((heading for heading, listed in LISTS.items() if get_args(listed) == values), None)
        if heading is not None:
            assert f"one of {heading}" in row[4], row
        else:
            assert all(f"`{value}`" in row[4] or row[4] == str(value) for value in values), row


def test_the_kinds_are_those_of_the_structs():
    for name in ("Action", "Refusal", "Text", "Status"):
        section = TEXT.split(f"\n### {name}\n")[1].split("\n### ")[0]
        assert f'`kind` is `"{TABLES[name].__struct_config__.tag}"`' in section


def test_the_table_of_endpoints_is_that_of_the_streams():
    rows = {row[0].strip("`").removeprefix("FOLDER/"): row for row in SECTIONS[""]}
    for stream, expected in streams.STREAMS.items():
        _, binds, connects, topic, _, rate = rows.pop(stream)
        assert binds == expected.socket and connects.split()[0] == expected.reader
        assert topic == (f"`{expected.topic.decode()}`" if expected.topic else "none")
        assert rate.split()[0] == expected.rate.split()[0]
    ((_, binds, connects, topic, *_),) = rows.values()
    assert (binds, connects, topic) == ("PULL", "PUSH", f"`{pushed_frame.TOPIC.decode()}`")


def test_the_operations_are_those_of_the_supervisor():
    for name, text, _, _, comes, late in SECTIONS["Operations"]:
        rule = OPERATIONS[name.strip("`")]
        assert (f"1 to {MAX_TEXT_CHARS} characters" in text) == rule.needs_text
        assert comes.startswith("when " if rule.answered_later else "at once")
        assert late == ("carried out" if rule.never_expires else "refused")
    limited = ", ".join(f"`{name}`" for name, rule in OPERATIONS.items() if rule.answered_later)
    limited = " and ".join(limited.rsplit(", ", 1))
    assert f"At most {MAX_PENDING_REQUESTS} requests {limited} can be in progress" in TEXT


def test_the_limits_are_those_of_the_code():
    for part in [
        f"A message has at most {65_536:_} bytes".replace("_", " "),
        f"| {PROTOCOL_VERSION} |",
        f"| 1 to {MAX_VALID_FOR_MS} |",
        "number within ±10⁹",
        f"`id` | str | – | yes | 1 to {control.MAX_ID_CHARS} characters",
        f"at most {control_of_supervisor.MAX_ANSWER_CHARS:_} characters".replace("_", " "),
        f"one line of at most {control_of_supervisor.MAX_ERROR_CHARS} characters",
        f"an error after {control_of_supervisor.ASK_TIMEOUT_S:g} s",
        f"for people; at most {MAX_DETAIL_CHARS} characters",
        f"is not `running`; at most {MAX_REASON_CHARS} characters",
        f"(8 messages; {PUBLISH_HWM['text']} on text)",
        f"more than\n   {MAX_AHEAD_NS // NS_PER_MS} ms in the future",
        f"`t_pub_ns` > {MAX_VALID_NS // 10**9} s",
        f"{MAX_IMAGE_BYTES // 3:_} (7680 × 4320)".replace("_", " "),
    ]:
        assert part in TEXT, part
    assert MAX_MESSAGE_BYTES == 65_536 and MAX_STATE_NUMBER == 1e9 and STATUS_INTERVAL_NS == 10**9 // 5
    assert PUBLISH_HWM["actions"] == PUBLISH_HWM["status"] == 8
    assert TEXT.startswith(f"# The wire protocol, version {PROTOCOL_VERSION}\n")
