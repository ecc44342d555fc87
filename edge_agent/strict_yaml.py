"""YAML text -> frozen msgspec types, strictly. Every error is one line: file, key, expected, found, next step.

msgspec checks the types. This file rewrites the text of msgspec's ValidationError. The tests hold each form of that
text, so that a release of msgspec with other texts fails there.

    >>> class Camera(msgspec.Struct, forbid_unknown_fields=True):
    ...     width: int = 640
    >>> convert(parse_yaml("width: wide", "agent.yaml"), Camera, "agent.yaml")
    Traceback (most recent call last):
    edge_agent.errors.ConfigError: agent.yaml: width: expected `int`, found 'wide'
"""

from __future__ import annotations

import difflib
import re
import reprlib
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, NamedTuple, TypeVar, Union, get_args, get_origin

import msgspec
import yaml

from edge_agent.errors import ConfigError, encodable, fault_of
from edge_agent.small_file import read_small_file

T = TypeVar("T")
_WORDS = (("`object`", "a mapping"), ("`array`", "a list"), (" | null`", "` or ~"))  # msgspec's words -> YAML's
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxstring, _SHORT.maxother = 2, 6, 4096, 4096
# "PROBLEM - at `$.PATH`", or "PROBLEM - at `key` in `$.PATH`" for a key of a mapping. "[...]" in a path is any value of
# a mapping; "[0]" is an item of a list.
_MESSAGE = re.compile(r"(?P<problem>.*) - at (?P<in_key>`key` in )?`\$\.?(?P<path>[^`]*)`", re.DOTALL)


class _Message(NamedTuple):
    """The parts of msgspec's text."""

    problem: str
    path: str
    in_key: bool


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file. Raises ConfigError."""
    try:
        return read_small_file(path).decode()
    except OSError as error:
        fault = fault_of(error, "configuration")
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}", fault) from None
    except ValueError as error:  # UnicodeDecodeError; a NUL character in the path
        raise ConfigError(f"{path}: cannot be read: {error}") from None


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe subset. A key that appears twice in one mapping is an error, and so is half a character."""

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        text = node.value if isinstance(node.value, str) else ""
        if text != encodable(text):  # the escape \ud800, for example; it could not be sent or printed
            problem = f"half a character: {encodable(text)}; write the character itself"
            raise yaml.constructor.ConstructorError(problem=problem, problem_mark=node.start_mark)
        return super().construct_scalar(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node.value, str):
                continue
            if key_node.value in keys:
                raise yaml.constructor.ConstructorError(
                    problem=f"duplicate key {key_node.value!r}", problem_mark=key_node.start_mark
                )
            keys.add(key_node.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, file: str) -> object:
    """YAML text -> plain Python values. Raises ConfigError with file, line and column of a syntax error."""
    try:
        return _StrictLoader(text).get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else file
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{place}: not YAML: {problem}") from None
    except (ValueError, RecursionError) as error:  # a date with month 13; a thousand nested brackets
        raise ConfigError(f"{file}: YAML that cannot be read: {error}") from None


def convert(value: object, kind: type[T], file: str, path: str = "") -> T:
    """Plain values -> `kind`. Raises ConfigError. `path`: place of the value in the file; "" is the top level."""
    if value is None:
        raise ConfigError(f"{file}: {path or 'top level'}: empty; expected keys {_key_list(kind)}")
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{file}: {_explain(str(error), value, kind, path)}") from None


def _parse(message: str) -> _Message:
    match = _MESSAGE.fullmatch(message)
    return _Message(match["problem"], match["path"], bool(match["in_key"])) if match else _Message(message, "", False)


def _explain(text: str, value: object, kind: object, base: str) -> str:
    """msgspec's text -> "key: expected ..., found ...". `base`: path of `value` in the file."""
    message = _parse(text)
    mapping_path, inside, _ = message.path.partition("[...]")
    if inside and (explanation := _explain_mapping_value(value, kind, base, mapping_path)):
        return explanation
    place = _join(base, message.path) or "top level"
    expected_type, found = _type_at(kind, message.path), _value_at(value, message.path)
    if match := re.fullmatch(r"Object contains unknown field `(.*)`", message.problem, re.DOTALL):
        near = difflib.get_close_matches(match[1], _field_names(expected_type), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"{place}: unknown key {match[1]!r}; expected one of {_key_list(expected_type)}{hint}"
    if match := re.fullmatch(r"Object missing required field `(.*)`", message.problem):
        return f"{place}: {match[1]}: missing; expected keys {_key_list(expected_type)}"
    if message.in_key:
        found = next(iter(_wrong_keys(found, expected_type)), found)
        place = f"{place}: key"
    shown = _shown(found, "length" in message.problem)
    if message.problem.startswith("Invalid enum value"):
        return f"{place}: expected one of {', '.join(map(str, get_args(expected_type)))}, found {shown}"
    problem = re.sub(r", got `.*`$", "", message.problem, flags=re.DOTALL)  # the value itself follows
    for theirs, ours in _WORDS:
        problem = problem.replace(theirs, ours)
    problem = problem[0].lower() + problem[1:]
    if ", found " in problem:  # of a __post_init__ that compares keys: it has named the value
        return f"{place}: {problem}"
    return f"{place}: {problem}, found {shown}"


def _shown(found: object, with_length: bool) -> str:
    if found is None:
        return "an empty value"
    if isinstance(found, dict):
        return f"a mapping of {len(found)} keys" if with_length else "a mapping"
    return _SHORT.repr(found)  # ten lines of YAML with aliases can stand for a list of 10,000,000,000 values


def _explain_mapping_value(value: object, kind: object, base: str, path: str) -> str:
    """msgspec does not name the key whose value is wrong: explain the first value that cannot be converted alone."""
    mapping, types = _value_at(value, path), get_args(_type_at(kind, path))
    if not isinstance(mapping, dict) or len(types) != 2:
        return ""
    for key, item in mapping.items():
        try:
            msgspec.convert(item, types[1])
        except msgspec.ValidationError as error:
            return _explain(str(error), item, types[1], _join(_join(base, path), str(key)))
    return ""


def _wrong_keys(mapping: object, mapping_type: object) -> list[object]:
    key_type = next(iter(get_args(mapping_type)), str)  # the keys of a struct are str
    wrong = []
    for key in mapping if isinstance(mapping, dict) else ():
        try:
            msgspec.convert(key, key_type)
        except msgspec.ValidationError:
            wrong.append(key)
    return wrong


def _join(base: str, path: str) -> str:
    return base + path if not base or not path or path.startswith("[") else f"{base}.{path}"


def _field_names(kind: object) -> list[str]:
    return list(getattr(kind, "__struct_fields__", ()))


def _key_list(kind: object) -> str:
    return ", ".join(_field_names(kind)) or "none"


def _path_steps(path: str) -> list[str]:
    return re.findall(r"[^.\[\]]+", path)


def _type_at(kind: Any, path: str) -> Any:
    """The type at a path of struct fields, without Annotated and without None."""
    for step in _path_steps(path):
        fields = {field.name: field.type for field in msgspec.structs.fields(kind)} if _field_names(kind) else {}
        kind = _plain_type(fields.get(step, object))
    return kind


def _plain_type(kind: Any) -> Any:
    if get_origin(kind) is Annotated:
        return _plain_type(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        members = [member for member in get_args(kind) if member is not NoneType]
        return _plain_type(members[0]) if len(members) == 1 else kind
    return kind


def _value_at(value: Any, path: str) -> object:
    for step in _path_steps(path):
        try:
            value = value[int(step) if isinstance(value, list) else step]
        except (KeyError, IndexError, TypeError, ValueError):
            return "nothing"
    return value
