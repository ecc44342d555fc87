"""Configuration: every wrong key, type and number is one line that says where, what was expected and what was found."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from edge_agent.config import CameraConfig, Config, load_config, load_config_text
from edge_agent.errors import ConfigError
from edge_agent.wire.endpoints import endpoint, runtime_dir
from tests.harness import ROOT

TUNED = {
    "date": "2026-11-27",
    "board": "Orin",
    "bundle": "0123456789abcdef",
    "frames": "640x480",
    "deadline_ms": 700,
    "mean_age_ms": 41.5,
}
GOOD = "bundle: /b\ncamera: {source: clip.mp4}\n"
SECTIONS = ("camera", "vision", "language", "task", "watchdog", "governor", "advanced")


def error_of(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config_text(text, "agent.yaml")
    line = str(caught.value)
    assert line.startswith("agent.yaml:") and "\n" not in line, line
    return line


def test_what_is_written_is_what_is_loaded():
    loaded = load_config_text(
        "bundle: /bundles/3b\ntrusted_keys: [/etc/ours.pub, theirs.pub]\n"
        "camera: {source: /dev/video2, name: nose, width: 1280, height: 720, fps: 29.97, realtime: false, loop: no,\n"
        "         fourcc: MJPG, max_megapixels: 1, identical_frames_s: 0}\n"
        "profile: small\ncpu_threads: 3\ngovernor: {enabled: false, max_temperature_c: 80, max_power_w: 12.5}\n"
        "vision: {backend: mtmd, max_image_tokens: 64, tensorrt: true}\n"
        "language: {context: 4096, gpu_layers: 0, describe_prompt: 'What?', max_text_tokens: 5,\n"
        "           stream_action_text: false, max_reasoning_tokens: 99, adapter: night,\n"
        "           adapters: {night: /n.gguf, rain-2: r.gguf}}\n"
        "task: {action_space: waypoint, instruction: 'Land.', deadline_ms: 700}\n"
        "watchdog: {model_stall_s: 1, model_load_s: 2.5, camera_stall_s: 0.5}\n"
        "advanced: {repack: false, flash_attention: true, reproducible: false, speculative: false, overlap: true,\n"
        "           mmap: true, mlock: true, kv_cache_type: q8_0}\n"
        f"tuned: {TUNED}\nruntime_dir: /run/x\n", "agent.yaml",
    )  # fmt: skip
    assert msgspec.to_builtins(loaded) == {
        "bundle": "/bundles/3b",
        "trusted_keys": ("/etc/ours.pub", "theirs.pub"),
        "camera": {
            "source": "/dev/video2",
            "name": "nose",
            "width": 1280,
            "height": 720,
            "fps": 29.97,
            "fourcc": "MJPG",
            "max_megapixels": 1.0,
            "identical_frames_s": 0.0,
            "realtime": False,
            "loop": False,
        },
        "profile": "small",
        "cpu_threads": 3,
        "vision": {"backend": "mtmd", "max_image_tokens": 64, "tensorrt": True},
        "language": {
            "context": 4096,
            "gpu_layers": 0,
            "describe_prompt": "What?",
            "max_text_tokens": 5,
            "max_reasoning_tokens": 99,
            "stream_action_text": False,
            "adapters": {"night": "/n.gguf", "rain-2": "r.gguf"},
            "adapter": "night",
        },
        "task": {"action_space": "waypoint", "instruction": "Land.", "deadline_ms": 700},
        "watchdog": {"model_stall_s": 1.0, "model_load_s": 2.5, "camera_stall_s": 0.5},
        "governor": {"enabled": False, "max_temperature_c": 80.0, "max_power_w": 12.5},
        "advanced": {
            "reproducible": False,
            "speculative": False,
            "overlap": True,
            "repack": False,
            "mmap": True,
            "mlock": True,
            "kv_cache_type": "q8_0",
            "flash_attention": True,
        },
        "tuned": TUNED,
        "runtime_dir": "/run/x",
    }


def test_defaults():
    assert msgspec.to_builtins(load_config_text(GOOD, "agent.yaml")) == {
        "bundle": "/b",
        "trusted_keys": (),
        "camera": {
            "source": "clip.mp4",
            "name": "front",
            "width": None,
            "height": None,
            "fps": None,
            "fourcc": None,
            "max_megapixels": 13.0,
            "identical_frames_s": None,
            "realtime": True,
            "loop": True,
        },
        "profile": None,
        "cpu_threads": 0,
        "vision": {"backend": None, "max_image_tokens": 256, "tensorrt": False},
        "language": {
            "context": 1024,
            "gpu_layers": -1,
            "describe_prompt": "",
            "max_text_tokens": 96,
            "max_reasoning_tokens": 0,
            "stream_action_text": True,
            "adapters": {},
            "adapter": "",
        },
        "task": {"action_space": "velocity_body", "instruction": "Hold position.", "deadline_ms": 2000},
        "watchdog": {"model_stall_s": 10.0, "model_load_s": 120.0, "camera_stall_s": 3.0},
        "governor": {"enabled": True, "max_temperature_c": None, "max_power_w": None},
        "advanced": dict.fromkeys(
            ("reproducible", "speculative", "overlap", "repack", "mmap", "mlock", "kv_cache_type", "flash_attention")
        ),
        "tuned": {"date": "", "board": "", "bundle": "", "frames": "", "deadline_ms": 0, "mean_age_ms": 0.0},
        "runtime_dir": "",
    }


# -- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "where", "near"),
    [
        (GOOD + "vison: {}", "top level: unknown key 'vison'", "vision"),
        (GOOD + "runtime-dir: /x", "top level: unknown key 'runtime-dir'", "runtime_dir"),
        ("bundle: /b\ncamera: {source: x, widht: 3}", "camera: unknown key 'widht'", "width"),
        (GOOD + "vision: {max_image_token: 3}", "vision: unknown key 'max_image_token'", "max_image_tokens"),
        (GOOD + "language: {contex: 512}", "language: unknown key 'contex'", "context"),
        (GOOD + "task: {instructions: Go}", "task: unknown key 'instructions'", "instruction"),
        (GOOD + "watchdog: {camera_stal_s: 3}", "watchdog: unknown key 'camera_stal_s'", "camera_stall_s"),
    ],
)
def test_an_unknown_key_is_named_with_its_path_and_the_nearest_known(text, where, near):
    line = error_of(text)
    assert where in line and line.endswith(f"did you mean {near!r}?")


def test_an_unknown_key_like_no_other_lists_the_known_ones():
    line = error_of(GOOD + "task: {zzz: 1}")
    assert line == "agent.yaml: task: unknown key 'zzz'; expected one of action_space, instruction, deadline_ms"


@pytest.mark.parametrize(
    ("text", "path", "key"),
    [
        ("camera: {source: x}", "top level", "bundle"),
        ("bundle: /b", "top level", "camera"),
        ("bundle: /b\ncamera: {name: nose}", "camera", "source"),
    ],
)
def test_a_missing_key_is_named_with_its_path(text, path, key):
    assert error_of(text).startswith(f"agent.yaml: {path}: {key}: missing; expected keys ")


# -- values -----------------------------------------------------------------------------------------------------------

WRONG_TYPES = [
    ("bundle", "3", "`str`", "3"),
    ("camera", "clip.mp4", "a mapping", "'clip.mp4'"),
    ("camera.source", "7", "`str`", "7"),
    ("camera.name", "2020-01-01", "`str`", "datetime.date(2020, 1, 1)"),
    ("camera.width", "wide", "`int", "'wide'"),
    ("camera.fps", "[30]", "`float", "[30]"),
    ("camera.realtime", "1", "`bool`", "1"),
    ("camera.loop", "'yes'", "`bool`", "'yes'"),
    ("vision", "", "a mapping", "an empty value"),
    ("vision.max_image_tokens", "'256'", "`int`", "'256'"),
    ("vision.max_image_tokens", "3.5", "`int`", "3.5"),
    ("cpu_threads", "two", "`int`", "'two'"),
    ("advanced.overlap", "1", "`bool", "1"),
    ("advanced.kv_cache_type", "8", "`str", "8"),
    ("profile", "1", "`str", "1"),
    ("language.context", "2k", "`int`", "'2k'"),
    ("language.gpu_layers", "all", "`int`", "'all'"),
    ("language.stream_action_text", "0", "`bool`", "0"),
    ("language.describe_prompt", "false", "`str`", "False"),
    ("task.instruction", "null", "`str`", "an empty value"),
    ("task.deadline_ms", "2.5", "`int`", "2.5"),
    ("watchdog.model_stall_s", "10s", "`float`", "'10s'"),
    ("runtime_dir", "[]", "`str`", "[]"),
]
OUT_OF_RANGE = [
    ("camera.name", "''", ">= 1", "''"),
    ("camera.name", "a" * 33, "<= 32", repr("a" * 33)),
    ("camera.width", "0", ">= 1", "0"),
    ("camera.width", "7681", "<= 7680", "7681"),
    ("camera.height", "0", ">= 1", "0"),
    ("camera.height", "4321", "<= 4320", "4321"),
    ("camera.fps", "0", "> 0", "0"),
    ("camera.fps", "1001", "<= 1000", "1001"),
    ("camera.fps", ".nan", "> 0", "nan"),
    ("camera.fourcc", "MJP", "regex", "'MJP'"),
    ("camera.fourcc", "MJPEG", "regex", "'MJPEG'"),
    ("camera.max_megapixels", "0", "> 0", "0"),
    ("camera.max_megapixels", "33.2", "<= 33.1776", "33.2"),
    ("camera.max_megapixels", ".nan", "> 0", "nan"),
    ("camera.identical_frames_s", "-1", ">= 0", "-1"),
    ("camera.identical_frames_s", ".inf", "expected", "inf"),
    ("vision.backend", "tensorrt", "onnxruntime", "'tensorrt'"),
    ("vision.max_image_tokens", "3", ">= 8", "3"),
    ("vision.max_image_tokens", "1025", "<= 1024", "1025"),
    ("cpu_threads", "-1", ">= 0", "-1"),
    ("profile", "tiny", "reproducible", "'tiny'"),
    ("advanced.kv_cache_type", "q4_0", "q8_0", "'q4_0'"),
    ("language.context", "255", ">= 256", "255"),
    ("language.context", "262145", "<= 262144", "262145"),
    ("language.gpu_layers", "-2", ">= -1", "-2"),
    ("language.max_text_tokens", "0", ">= 1", "0"),
    ("task.instruction", "a" * 2001, "<= 2000", repr("a" * 2001)),
    ("task.deadline_ms", "0", ">= 1", "0"),
    ("watchdog.model_stall_s", "0", ">= 0.1", "0"),
    ("watchdog.model_load_s", "-1", ">= 0.1", "-1"),
    ("watchdog.camera_stall_s", ".nan", ">= 0.1", "nan"),
    ("governor.max_temperature_c", "20", ">= 30", "20"),
    ("governor.max_temperature_c", ".nan", ">= 30", "nan"),
    ("governor.max_power_w", "0", "> 0", "0"),
    ("governor.enabled", "maybe", "`bool`", "'maybe'"),
    ("watchdog.model_stall_s", ".inf", "expected", "inf"),
    ("watchdog.model_load_s", ".inf", "expected", "inf"),
    ("watchdog.camera_stall_s", ".inf", "expected", "inf"),
]


@pytest.mark.parametrize(("path", "value", "expected", "found"), WRONG_TYPES + OUT_OF_RANGE)
def test_a_wrong_value_is_named_with_its_path_what_was_expected_and_what_was_found(path, value, expected, found):
    keys = {"bundle": "/b", "camera.source": "clip.mp4"} | {path: value}
    if path == "camera":
        del keys["camera.source"]
    lines = [f"{name}: {text}" for name, text in keys.items() if "." not in name]
    for name in SECTIONS:
        inside = [f"{full.split('.')[1]}: {text}" for full, text in keys.items() if full.startswith(f"{name}.")]
        if inside:
            lines.append(f"{name}: {{{', '.join(inside)}}}")
    line = error_of("\n".join(lines))
    assert line.startswith(f"agent.yaml: {path}: "), line
    assert expected in line and line.endswith(f"found {found}"), line


def test_an_invalid_choice_is_refused_with_the_list_of_choices():
    line = error_of(GOOD + "vision: {backend: cuda}")
    assert "vision.backend" in line and "'cuda'" in line and "onnxruntime" in line and "mtmd" in line


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("camera: {source: x, width: %s}", ("1", "7680", "null")),
        ("camera: {source: x, height: %s}", ("1", "4320", "null")),
        ("camera: {source: x, fps: %s}", ("0.01", "30", "1000", "null")),
        ("camera: {source: x}\nvision: {max_image_tokens: %s}", ("8", "1024")),
        ("camera: {source: x}\nlanguage: {context: %s}", ("256", "262144")),
        ("camera: {source: x}\nlanguage: {gpu_layers: %s}", ("-1", "0", "99")),
    ],
)
def test_the_ends_of_a_range_belong_to_it(key, values):
    for value in values:
        load_config_text("bundle: /b\n" + key % value, "agent.yaml")


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("bundle: /b\ncamera: {source: x\ntask: {}\n", "agent.yaml:3:5:"),
        ("bundle: /b\n\tcamera: x\n", "agent.yaml:2:1:"),
        ("bundle: [1, 2\n", "agent.yaml:2:1:"),
        ("a: 'open\n", "agent.yaml:2:1:"),
        ("bundle: /b\n---\nbundle: /c\n", "agent.yaml:2:1:"),
        ("!!python/object/apply:os.system ['echo']", "agent.yaml:1:1:"),
    ],
)
def test_a_syntax_error_is_named_with_line_and_column(text, where):
    line = error_of(text)
    assert line.startswith(where) and "not YAML" in line


@pytest.mark.parametrize(
    "text",
    [
        "bundle: /b\x00",
        "bundle: 2020-13-45\ncamera: {source: x}",  # YAML takes it for a date, and there is no thirteenth month
        "bundle: " + "[" * 500,
        "- bundle: /b",
        "text",
        "3",
        "? [1]\n: 2",
        "3: 4",
    ],
)
def test_anything_else_is_one_line_too(text):
    error_of(text)


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing but a comment\n", "---\n"])
def test_the_error_for_an_empty_file_names_the_expected_keys(text):
    line = error_of(text)
    assert "empty" in line and "bundle" in line and "camera" in line


def test_a_file_is_read_and_named(tmp_path):
    path = tmp_path / "agent.yaml"
    path.write_text(GOOD, encoding="utf-8")
    assert load_config(path) == load_config_text(GOOD, "agent.yaml")
    path.write_text("bundle: /b\ncamera: {}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=str(path)):
        load_config(path)


def test_the_example_loads_and_is_the_default_but_for_bundle_and_camera():
    """What it says in comments is compared with the code in test_systemd.py."""
    example = load_config(ROOT / "systemd" / "edge-agent.yaml")
    source = CameraConfig(source=example.camera.source)
    assert example == Config(bundle=example.bundle, camera=source)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "latin1.yaml").write_bytes("bundle: /Bündel\n".encode("latin-1"))
    for path, message in [
        (tmp_path / "none.yaml", "No such file"),
        (tmp_path, "directory"),
        (tmp_path / "latin1.yaml", "utf-8"),
    ]:
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        line = str(caught.value)
        assert line.startswith(f"{path}: cannot be read: ") and message in line and "\n" not in line


# -- where the sockets are --------------------------------------------------------------------------------------------


def test_runtime_dir_prefers_what_is_configured_then_systemd_then_the_user(monkeypatch):
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/run/one:/run/two")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert runtime_dir("/here") == Path("/here")
    assert runtime_dir() == Path("/run/one")
    monkeypatch.delenv("RUNTIME_DIRECTORY")
    if not Path("/run/edge-agent").exists():
        assert runtime_dir() == Path(f"/run/user/7/edge-agent-{os.getuid()}")
        monkeypatch.delenv("XDG_RUNTIME_DIR")
        assert runtime_dir() == Path(f"/tmp/edge-agent-{os.getuid()}")
    assert endpoint(Path("/run/one"), "actions") == "ipc:///run/one/actions"


def test_the_configuration_survives_the_way_to_the_workers():
    loaded = load_config_text(GOOD + "vision: {max_image_tokens: 64}\n", "agent.yaml")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(loaded), type=Config) == loaded


# -- texts and numbers that end a start -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (r'"a\0b"', "KEY: expected text without NUL and lone surrogates, found "),
        (r'"a\ud800"', "not YAML: half a character"),
        (r'"\udcfc.jpg"', "not YAML: half a character"),
    ],
)
@pytest.mark.parametrize(
    "key",
    ["bundle", "runtime_dir", "trusted_keys[0]", "camera.source", "camera.name", "language.describe_prompt",
     "language.adapters.night", "task.instruction", "task.action_space"],
)  # fmt: skip
def test_a_text_that_cannot_be_a_path_or_a_message_is_named(key: str, bad: str, expected: str):
    texts = {"bundle": f"bundle: {bad}\ncamera: {{source: x}}", "runtime_dir": GOOD + f"runtime_dir: {bad}",
             "trusted_keys[0]": GOOD + f"trusted_keys: [{bad}]"}  # fmt: skip
    section, _, name = key.partition(".")
    if section == "camera":
        texts[key] = f"bundle: /b\ncamera: {{source: x, {name}: {bad}}}".replace("source: x, source", "source")
    elif name == "adapters.night":
        texts[key] = GOOD + f"language: {{adapters: {{night: {bad}}}}}"
    elif name:
        texts[key] = GOOD + f"{section}: {{{name}: {bad}}}"
    assert expected.replace("KEY", key) in error_of(texts[key])


@pytest.mark.parametrize("number", [2**31, 2**63, 2**64, 10**30])
@pytest.mark.parametrize("key", ["cpu_threads", "language.gpu_layers", "language.max_text_tokens", "language.context",
                                 "task.deadline_ms", "vision.max_image_tokens", "camera.width"])  # fmt: skip
def test_a_number_that_no_message_holds_is_out_of_range(key: str, number: int):
    section, _, name = key.rpartition(".")
    text = f"{section}: {{{name}: {number}}}" if section not in ("", "camera") else f"{name}: {number}"
    base = GOOD if section != "camera" else f"bundle: /b\ncamera: {{source: x, {name}: {number}}}\n"
    assert name in error_of(base + (text if section != "camera" else ""))


@pytest.mark.parametrize("key", ["model_stall_s", "model_load_s", "camera_stall_s"])
def test_a_limit_that_restarts_for_ever_is_out_of_range(key: str):
    assert ">= 0.1" in error_of(GOOD + f"watchdog: {{{key}: 0.000000001}}")
