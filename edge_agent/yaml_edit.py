"""Sets keys in the text of a YAML file and leaves everything else as it is: comments, order, blank lines, quotes.

PyYAML says where each value stands; the text between is never written anew. The result is parsed and compared with what
was wanted, so a file in a form that this cannot edit (aliases, for example) is refused and never damaged.

    >>> set_keys("vision:\\n  backend: mtmd  # ours\\n", {"vision.backend": "onnxruntime"}, "", "agent.yaml")
    'vision:\\n  backend: onnxruntime  # ours\\n'
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import yaml

from edge_agent.errors import ConfigError
from edge_agent.strict_yaml import parse_yaml

Scalar = str | int | float | bool | None
_NULL_TAG = "tag:yaml.org,2002:null"


def set_keys(text: str, values: Mapping[str, Scalar], comment: str, file: str) -> str:
    """values: "key" or "section.key" -> value. comment: behind each key that is set, where the line has room for one; a
    comment with the same first word is replaced. file: for errors. Raises ConfigError."""
    before = parse_yaml(text, file)
    if not isinstance(before, dict):
        raise ConfigError(f"{file}: expected a mapping of keys, found {type(before).__name__}")
    wanted = _without_empty(before)
    newline = "\r\n" if "\r\n" in text else "\n"
    try:
        for key, value in sorted(values.items(), key=lambda pair: "." in pair[0]):  # sections are added at the end
            section, _, name = key.rpartition(".")
            text = _set_key(text, section, name, _scalar(value), comment, newline)
            (wanted.setdefault(section, {}) if section else wanted)[name] = value
        wanted = _without_empty(wanted)
        is_right = _without_empty(parse_yaml(text, file)) == wanted
    except (ConfigError, yaml.YAMLError, TypeError):
        is_right = False
    if not is_right:
        lines = ", ".join(f"{key}: {_scalar(value)}" for key, value in values.items())
        raise ConfigError(f"{file}: this form of YAML cannot be edited here; set by hand: {lines}")
    return text


def _without_empty(mapping: Any) -> dict[Any, Any]:
    """A copy without the keys that have no value: an empty section may get keys."""
    return {key: dict(part) if isinstance(part, dict) else part for key, part in mapping.items() if part is not None}


def _scalar(value: Scalar) -> str:
    """As JSON, which is YAML; a plain word without quotes."""
    if isinstance(value, str) and re.fullmatch(r"[a-z][a-z0-9_-]*", value) and parse_yaml(value, "") == value:
        return value
    return "~" if value is None else json.dumps(value, ensure_ascii=False)


def _set_key(text: str, section: str, name: str, value: str, comment: str, newline: str) -> str:
    root: Any = yaml.compose(text, Loader=yaml.SafeLoader)
    key: Any
    key, node = _find(root, section) if section else (None, root)  # the root has no key
    if key is None and section and root.flow_style:
        return _insert_flow(text, root, f"{section}: {{{name}: {value}}}")
    if node is None:
        return f"{_ended(text, newline)}{newline}{section}:{newline}  {name}: {value}{_behind(comment)}{newline}"
    if node.tag == _NULL_TAG:  # "vision:" with nothing or only comments below, or "vision: ~"
        text = _replace(text, node, "")
        return _insert_below(text, key, f"  {name}: {value}{_behind(comment)}", newline)
    if not isinstance(node, yaml.MappingNode):
        raise TypeError(section)
    _, old = _find(node, name)
    if old is not None:
        is_glued = old.start_mark.index == old.end_mark.index and not text[: old.start_mark.index].endswith(" ")
        text = _replace(text, old, f" {value}" if is_glued else value)
        return text if node.flow_style else _with_comment(text, old.start_mark.index, comment)
    if node.flow_style:
        return _insert_flow(text, node, f"{name}: {value}")
    if key is None:
        return f"{_ended(text, newline)}{name}: {value}{_behind(comment)}{newline}"
    indent = " " * node.value[0][0].start_mark.column
    return _insert_below(text, key, f"{indent}{name}: {value}{_behind(comment)}", newline)


def _insert_flow(text: str, mapping: yaml.Node, pair: str) -> str:
    start = mapping.start_mark.index + 1
    return f"{text[:start]}{pair}{', ' if mapping.value else ''}{text[start:]}"


def _insert_below(text: str, key: yaml.Node, line: str, newline: str) -> str:
    end = _line_end(text, key.end_mark.index)
    return f"{text[:end]}{newline}{line}{text[end:]}"


def _ended(text: str, newline: str) -> str:
    return text if not text or text.endswith(newline) else text + newline


def _find(mapping: yaml.Node, name: str) -> tuple[Any, Any]:
    """The nodes of a key and of its value; (None, None) without it."""
    pairs = mapping.value if isinstance(mapping, yaml.MappingNode) else []
    return next(((key, value) for key, value in pairs if key.value == name), (None, None))


def _replace(text: str, node: yaml.Node, value: str) -> str:
    return text[: node.start_mark.index] + value + text[node.end_mark.index :]


def _line_end(text: str, start: int) -> int:
    found = re.compile(r"\r?\n|\Z").search(text, start)
    return found.start() if found else len(text)


def _behind(comment: str) -> str:
    return f"  # {comment}" if comment else ""


def _with_comment(text: str, start: int, comment: str) -> str:
    """The line of `start` with the comment at its end, unless another comment is there."""
    end = _line_end(text, start)
    line, mark, old = text[start:end].partition(" #")
    if not comment or (mark and old.split()[:1] != comment.split()[:1]):
        return text
    return f"{text[:start]}{line.rstrip()}{_behind(comment)}{text[end:]}"
