"""Keys are set in the text of a YAML file; every other character stays."""

from __future__ import annotations

import difflib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.errors import ConfigError
from edge_agent.strict_yaml import parse_yaml
from edge_agent.yaml_edit import set_keys
from tests.harness import ROOT

VALUES = {"vision.backend": "mtmd", "cpu_threads": 3}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("bundle: b\n", "bundle: b\ncpu_threads: 3  # tune X\n\nvision:\n  backend: mtmd  # tune X\n"),
        ("bundle: b", "bundle: b\ncpu_threads: 3  # tune X\n\nvision:\n  backend: mtmd  # tune X\n"),
        ("vision:\ncpu_threads: 1\n", "vision:\n  backend: mtmd  # tune X\ncpu_threads: 3  # tune X\n"),
        (
            "cpu_threads: 1 # two are for the camera\nvision: ~ # eyes\n",
            "cpu_threads: 3 # two are for the camera\nvision:  # eyes\n  backend: mtmd  # tune X\n",
        ),
        (
            "cpu_threads: 1  # tune OLD\nvision:\n    # slow\n    tensorrt: true\n",
            "cpu_threads: 3  # tune X\nvision:\n    backend: mtmd  # tune X\n    # slow\n    tensorrt: true\n",
        ),
        (
            "cpu_threads:\r\nvision:\r\n  backend: 'onnxruntime'\r\n  tensorrt: true # mine\r\n",
            "cpu_threads: 3  # tune X\r\nvision:\r\n  backend: mtmd  # tune X\r\n  tensorrt: true # mine\r\n",
        ),
        (
            '{cpu_threads: 2, vision: {backend: "onnxruntime", tensorrt: true}}',
            "{cpu_threads: 3, vision: {backend: mtmd, tensorrt: true}}",
        ),
        ("{cpu_threads: 2}\n", "{vision: {backend: mtmd}, cpu_threads: 3}\n"),
        ("vision: {}\ncpu_threads: 2\n", "vision: {backend: mtmd}\ncpu_threads: 3  # tune X\n"),
    ],
)
def test_a_key_is_set_and_the_rest_stays(before: str, after: str) -> None:
    assert set_keys(before, VALUES, "tune X", "a.yaml") == after


def test_the_example_gets_only_new_lines() -> None:
    text = (ROOT / "systemd/edge-agent.yaml").read_text()
    after = set_keys(text, VALUES | {"advanced.overlap": False, "advanced.kv_cache_type": None}, "tune X", "a.yaml")
    removed = [line for line in difflib.ndiff(text.splitlines(), after.splitlines()) if line.startswith("- ")]
    assert not removed
    again = set_keys(after, VALUES | {"advanced.overlap": True}, "tune Y", "a.yaml")
    assert again.count("tune Y") == 3 and again.count("tune X") == 1


@pytest.mark.parametrize(
    "text",
    [
        "a: &x {b: 1}\nvision: *x\n",
        "a: &x\n  b: 1\nvision:\n  <<: *x\n  tensorrt: true\n",
        "vision: [1]\n",
        "vision: onnxruntime\n",
        "bundle: b\n...\n",
        "'vision':\n  'backend': &y mtmd\n",
    ],
)
def test_what_cannot_be_edited_is_right_or_refused(text: str) -> None:
    try:
        after = set_keys(text, VALUES, "tune X", "a.yaml")
    except ConfigError as error:
        assert "set by hand: vision.backend: mtmd, cpu_threads: 3" in str(error)
    else:
        expected = parse_yaml(text, "")
        assert isinstance(expected, dict)
        vision = (expected.get("vision") or {}) | {"backend": "mtmd"}
        assert parse_yaml(after, "") == expected | {"vision": vision, "cpu_threads": 3}


@pytest.mark.parametrize("text", ["", "- a\n", "word\n"])
def test_a_file_without_keys_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a mapping of keys"):
        set_keys(text, VALUES, "", "a.yaml")


@given(st.text(max_size=20), st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=20)))
def test_any_value_comes_back_as_it_was(old: str, new: bool | int | str | None) -> None:
    text = f"a: {json.dumps(old)} # mine\nb:\n  c: 1\n"
    try:
        parse_yaml(text, "")
    except ConfigError:
        return
    try:
        after = set_keys(text, {"a": new, "b.c": new}, "tune", "a.yaml")
    except ConfigError:
        return
    assert parse_yaml(after, "") == {"a": new, "b": {"c": new}}
    assert "# mine" in after
