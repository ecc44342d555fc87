"""YAML text to frozen types, strictly: unknown keys and wrong types are errors with file, key, expected and found."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, get_args, get_origin

import msgspec
import yaml

from edge_agent.errors import ConfigError


def read_text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe subset, without the licence to write a key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key.value, str)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(problem=f"key {key.value!r} twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, name: str) -> object:
    """YAML text -> plain values; a syntax error names file, line and column."""
    try:
        return _StrictLoader(text).get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{where}: not YAML: {problem}") from None
    except (ValueError, RecursionError) as error:  # a date of the 13th month; a thousand brackets
        raise ConfigError(f"{name}: not YAML that can be read: {error}") from None


def convert(value: object, kind: type, name: str):
    """Plain values -> `kind`, with msgspec's message turned into ours: file, key, expected, found, next step."""
    if value is None:
        raise ConfigError(f"{name}: empty; expected keys {_key_list(kind)}")
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{name}: {_explain(str(error), value, kind)}") from None


def _explain(message: str, value: object, kind: object, above: str = "") -> str:
    said, _, where = message.partition(" - at ")
    found_path = re.search(r"\$\.?([^`]*)", where)
    path = found_path[1] if found_path else ""
    table, inside, _ = path.partition("[...]")
    at = _type_at(kind, table)
    if inside:  # msgspec does not say which entry of a table it means; the first that cannot be converted alone
        for key, item in _value_at(value, table).items():
            try:
                msgspec.convert(item, get_args(at)[-1])
            except msgspec.ValidationError as error:
                return _explain(str(error), item, get_args(at)[-1], f"{above}{table}.{key}.")
    shown = (above + path).rstrip(".") or "top level"
    if unknown := re.search(r"unknown field `(.*)`", said):
        near = difflib.get_close_matches(unknown[1], _field_names(at), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"{shown}: unknown key {unknown[1]!r}; expected one of {_key_list(at)}{hint}"
    if missing := re.search(r"missing required field `(.*)`", said):
        return f"{shown}: {missing[1]}: missing; expected keys {_key_list(at)}"
    found = _value_at(value, path)
    found = "a mapping" if isinstance(found, dict) else repr(found)
    if said.startswith("Invalid enum") and get_args(at):
        return f"{shown}: expected one of {', '.join(map(str, get_args(at)))}, found {found}"
    return f"{shown}: {said[0].lower() + said[1:]}, found {found}"


def _field_names(kind: object) -> list[str]:
    return [field.name for field in msgspec.structs.fields(kind)] if hasattr(kind, "__struct_fields__") else []


def _key_list(kind: object) -> str:
    return ", ".join(_field_names(kind)) or "none"


def _path_steps(path: str) -> list[str]:
    return re.findall(r"[^.\[\]]+", path)


def _type_at(kind: object, path: str) -> object:
    for step in _path_steps(path):
        fields = {f.name: f.type for f in msgspec.structs.fields(kind)} if hasattr(kind, "__struct_fields__") else {}
        kind = fields.get(step, object)
        while get_origin(kind) is Annotated:
            kind = get_args(kind)[0]
    return kind


def _value_at(value: object, path: str) -> object:
    for step in _path_steps(path):
        try:
            value = value[int(step) if isinstance(value, list) else step]  # type: ignore[index]
        except (KeyError, IndexError, TypeError, ValueError):
            return "nothing"
    return value
