"""YAML to types. Every error is one line, and the forms of msgspec's messages are as strict_yaml.py expects them."""

from __future__ import annotations

import itertools
import os
from typing import Annotated, Literal

import msgspec
import pytest
import yaml
from msgspec import Meta

from edge_agent.errors import ConfigError, one_line
from edge_agent.strict_yaml import convert, parse_yaml, read_text


class Inner(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    count: Annotated[int, Meta(ge=1, le=9)] = 1
    width: Annotated[int, Meta(ge=1)] | None = None
    rate: Annotated[float, Meta(gt=0)] = 1.0
    word: Annotated[str, Meta(pattern="^[a-z]+$", max_length=3)] = "a"
    mode: Literal["fast", "slow"] = "fast"
    gear: Literal["low", "high"] | None = None
    either: int | bool = 1
    names: list[Annotated[str, Meta(min_length=1)]] = []
    files: dict[Annotated[str, Meta(pattern="^[a-z]+$")], Annotated[str, Meta(min_length=1)]] = {}

    def __post_init__(self) -> None:
        if self.count == 8 and self.width == 7:
            raise ValueError("width: expected 8 or ~, found 7")


class Outer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    path: str
    inner: Inner = Inner()
    optional: Inner | None = None
    table: Annotated[dict[Annotated[str, Meta(pattern="^[a-z]+$")], Inner], Meta(max_length=3)] = {}


KEYS_OF_INNER = "count, width, rate, word, mode, gear, either, names, files"
# (the YAML without `path`, msgspec's message, our line)
FORMS = {
    "wrong type": ("inner: {count: x}", "Expected `int`, got `str` - at `$.inner.count`",
        "inner.count: expected `int`, found 'x'"),
    "too small": ("inner: {count: 0}", "Expected `int` >= 1 - at `$.inner.count`",
        "inner.count: expected `int` >= 1, found 0"),
    "too large": ("inner: {count: 10}", "Expected `int` <= 9 - at `$.inner.count`",
        "inner.count: expected `int` <= 9, found 10"),
    "not above": ("inner: {rate: 0}", "Expected `float` > 0.0 - at `$.inner.rate`",
        "inner.rate: expected `float` > 0.0, found 0"),
    "optional type": ("inner: {width: x}", "Expected `int | null`, got `str` - at `$.inner.width`",
        "inner.width: expected `int` or ~, found 'x'"),
    "too long": ("inner: {word: abcd}", "Expected `str` of length <= 3 - at `$.inner.word`",
        "inner.word: expected `str` of length <= 3, found 'abcd'"),
    "pattern": ("inner: {word: A}", "Expected `str` matching regex '^[a-z]+$' - at `$.inner.word`",
        "inner.word: expected `str` matching regex '^[a-z]+$', found 'A'"),
    "not in the list": ("inner: {mode: wide}", "Invalid enum value 'wide' - at `$.inner.mode`",
        "inner.mode: expected one of fast, slow, found 'wide'"),
    "not in the optional list": ("inner: {gear: 'a - at b'}", "Invalid enum value 'a - at b' - at `$.inner.gear`",
        "inner.gear: expected one of low, high, found 'a - at b'"),
    "union": ("inner: {either: x}", "Expected `bool | int`, got `str` - at `$.inner.either`",
        "inner.either: expected `bool | int`, found 'x'"),
    "item of a list": ("inner: {names: [a, '']}", "Expected `str` of length >= 1 - at `$.inner.names[1]`",
        "inner.names[1]: expected `str` of length >= 1, found ''"),
    "unknown key": ("inner: {cuont: 1}", "Object contains unknown field `cuont` - at `$.inner`",
        f"inner: unknown key 'cuont'; expected one of {KEYS_OF_INNER}; did you mean 'count'?"),
    "unknown key at the top": ("zzz: 1", "Object contains unknown field `zzz`",
        "top level: unknown key 'zzz'; expected one of path, inner, optional, table"),
    "unknown key of an optional": ("optional: {zzz: 1}", "Object contains unknown field `zzz` - at `$.optional`",
        f"optional: unknown key 'zzz'; expected one of {KEYS_OF_INNER}"),
    "missing key": ("path: ...", "Object missing required field `path`",
        "top level: path: missing; expected keys path, inner, optional, table"),
    "not a mapping": ("inner: 3", "Expected `object`, got `int` - at `$.inner`",
        "inner: expected a mapping, found 3"),
    "mapping in the wrong place": ("inner: {word: {a: 1}}", "Expected `str`, got `object` - at `$.inner.word`",
        "inner.word: expected `str`, found a mapping"),
    "value of a mapping": ("table: {a: {}, b: {count: 0}}", "Expected `int` >= 1 - at `$.table[...].count`",
        "table.b.count: expected `int` >= 1, found 0"),
    "value of an inner mapping": ("table: {a: {files: {x: ''}}}",
        "Expected `str` of length >= 1 - at `$.table[...].files[...]`",
        "table.a.files.x: expected `str` of length >= 1, found ''"),
    "unknown key in a mapping": ("table: {a: {zzz: 1}}", "Object contains unknown field `zzz` - at `$.table[...]`",
        f"table.a: unknown key 'zzz'; expected one of {KEYS_OF_INNER}"),
    "key of a mapping": ("table: {a: {}, B: {}}",
        "Expected `str` matching regex '^[a-z]+$' - at `key` in `$.table`",
        "table: key: expected `str` matching regex '^[a-z]+$', found 'B'"),
    "key of an inner mapping": ("table: {a: {files: {B: x}}}",
        "Expected `str` matching regex '^[a-z]+$' - at `key` in `$.table[...].files`",
        "table.a.files: key: expected `str` matching regex '^[a-z]+$', found 'B'"),
    "key that is not text": ("3: 4", "Expected `str` - at `key` in `$`", "top level: key: expected `str`, found 3"),
    "mapping too long": ("table: {a: {}, b: {}, c: {}, d: {}}", "Expected `object` of length <= 3 - at `$.table`",
        "table: expected a mapping of length <= 3, found a mapping of 4 keys"),
    "not a list": ("inner: {names: 3}", "Expected `array`, got `int` - at `$.inner.names`",
        "inner.names: expected a list, found 3"),
    "keys that contradict": ("inner: {count: 8, width: 7}", "width: expected 8 or ~, found 7 - at `$.inner`",
        "inner: width: expected 8 or ~, found 7"),
}  # fmt: skip


def values_of(text: str) -> dict:
    values = {"path": "/b"} | yaml.safe_load(text)
    return {key: value for key, value in values.items() if value != "..."}


@pytest.mark.parametrize("form", FORMS)
def test_msgspec_still_writes_this_form_of_message(form):
    """If this fails after an update of msgspec, adapt strict_yaml.py and the range of msgspec in setup.cfg."""
    text, message, _ = FORMS[form]
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.convert(values_of(text), Outer)
    assert str(caught.value) == message


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_message_becomes_one_plain_line(form):
    text, _, line = FORMS[form]
    with pytest.raises(ConfigError) as caught:
        convert(values_of(text), Outer, "agent.yaml")
    assert str(caught.value) == f"agent.yaml: {line}"


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("The value is wrong", "top level: the value is wrong, found a mapping"),
        ("Wrong - at `$.table[...]`", "table[...]: wrong, found a mapping"),
        ("Wrong - at `$.table[...].count`", "table[...].count: wrong, found 'nothing'"),
        ("Wrong - at `$.path[...].a`", "path[...].a: wrong, found 'nothing'"),
        ("Wrong - at `$.zzz[...]`", "zzz[...]: wrong, found 'nothing'"),
        ("Wrong - at `key` in `$.table`", "table: key: wrong, found a mapping"),
        ("Wrong - at `key` in `$.path`", "path: key: wrong, found '/b'"),
    ],
)
def test_an_unexpected_message_still_gives_one_line(monkeypatch, message, line):
    """msgspec refuses the whole value, and no part of it when that part is converted alone."""
    plain_convert = msgspec.convert

    def convert_of_a_later_msgspec(value: object, kind: type) -> object:
        if kind is Outer:
            raise msgspec.ValidationError(message)
        return plain_convert(value, kind)

    monkeypatch.setattr(msgspec, "convert", convert_of_a_later_msgspec)
    with pytest.raises(ConfigError) as caught:
        convert({"path": "/b", "table": {"b": {}}}, Outer, "agent.yaml")
    assert str(caught.value) == f"agent.yaml: {line}"


def test_the_path_of_a_part_of_a_file_stands_before_the_key():
    for value, line in [
        ({"count": 0}, "a.b.count: expected `int` >= 1, found 0"),
        (3, "a.b: expected a mapping, found 3"),
        (None, f"a.b: empty; expected keys {KEYS_OF_INNER}"),
        ({"names": [3]}, "a.b.names[0]: expected `str`, found 3"),
    ]:
        with pytest.raises(ConfigError) as caught:
            convert(value, Inner, "space.yaml", "a.b")
        assert str(caught.value) == f"space.yaml: {line}"
    with pytest.raises(ConfigError, match="top level: empty; expected keys path, inner, optional, table"):
        convert(None, Outer, "agent.yaml")
    assert convert({"path": "x"}, Outer, "agent.yaml") == Outer("x")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\nb: 2\na: 3\n", "f.yaml:3:1: not YAML: duplicate key 'a'"),
        ("a: {b: 1, b: 2}", "f.yaml:1:11: not YAML: duplicate key 'b'"),
        ('a: "x\\ud800"', "f.yaml:1:4: not YAML: half a character: x\\ud800; write the character itself"),
        ('a: "\\udcfc.mp4"', "f.yaml:1:4: not YAML: half a character: \\udcfc.mp4; write the character itself"),
        ('a: {"\\udfff": 1}', "f.yaml:1:5: not YAML: half a character: \\udfff; write the character itself"),
        ("a: [1", "f.yaml:1:6: not YAML: expected ',' or ']', but got '<stream end>'"),
        ("a: \x00", "f.yaml: not YAML: "),
        ("a: 2020-13-45", "f.yaml: YAML that cannot be read: month must be in 1..12"),
        ("a: " + "[" * 500, "f.yaml: YAML that cannot be read: maximum recursion depth exceeded"),
        ("? [1]\n: 2", "f.yaml:1:3: not YAML: found unhashable key"),
        ("!!python/object/apply:os.system ['echo']", "f.yaml:1:1: not YAML: could not determine a constructor"),
    ],
)
def test_text_that_is_not_yaml_is_one_line(text, line):
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "f.yaml")
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "good.yaml").write_text("a: ü", encoding="utf-8")
    assert read_text(tmp_path / "good.yaml") == "a: ü"
    (tmp_path / "latin1.yaml").write_bytes("a: ü".encode("latin-1"))
    for path, reason in [
        (tmp_path / "none.yaml", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (tmp_path / "latin1.yaml", "'utf-8' codec can't decode byte 0xfc in position 3: unexpected end of data"),
        (f"{tmp_path}/\0", "embedded null byte"),
        ("/dev/zero", "more than 1 MiB; expected a small text file"),
    ]:
        with pytest.raises(ConfigError) as caught:
            read_text(path)
        assert str(caught.value).startswith(f"{one_line(str(path))}: cannot be read: ")
        if path != tmp_path / "latin1.yaml":
            assert str(caught.value) == f"{one_line(str(path))}: cannot be read: {reason}"


def test_a_pipe_is_read_and_one_without_a_writer_is_empty(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert read_text(tmp_path / "pipe") == ""
    reading, writing = os.pipe()  # as a shell makes one for <(command)
    os.write(writing, b"a: 1")
    os.close(writing)
    assert read_text(f"/dev/fd/{reading}") == "a: 1"
    os.close(reading)


def test_ten_lines_that_stand_for_a_list_of_billions_are_one_short_line():
    names = "abcdefghi"
    text = "count:\n  - &a [" + ", ".join(["x"] * 10) + "]\n"
    text += "".join(f"  - &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in itertools.pairwise(names))
    with pytest.raises(ConfigError) as caught:
        convert(parse_yaml(text, "f.yaml"), Inner, "f.yaml")
    assert str(caught.value).startswith("f.yaml: count: expected `int`, found [[") and len(str(caught.value)) < 1000
