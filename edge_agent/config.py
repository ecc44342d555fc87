"""The configuration file: YAML -> frozen types, strictly.

An unknown key, a wrong type or a number out of its range stops the start with one line that names file, key, what was
expected and what was found. Nothing here opens a camera, a socket or a model.

    >>> load_text("bundle: /b\\ncamera: {source: clip.mp4}", "<test>").camera.loop
    True
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

import msgspec
import yaml
from msgspec import Meta

Positive = Annotated[int, Meta(ge=1)]
AdapterName = Annotated[str, Meta(pattern="^[A-Za-z0-9_-]{1,32}$")]


class ConfigError(Exception):
    """One line: file, key, expected, found, and what to do."""


class CameraConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    source: str  # /dev/videoN, a video file, a folder of images, gst:PIPELINE or zmq:ENDPOINT
    name: Annotated[str, Meta(min_length=1, max_length=32)] = "front"
    width: Annotated[int, Meta(ge=1, le=7680)] | None = None  # asked of V4L2 and GStreamer
    height: Annotated[int, Meta(ge=1, le=4320)] | None = None
    fps: Annotated[float, Meta(gt=0, le=1000)] | None = None
    realtime: bool = True  # files only: at their own pace, or as fast as the model takes them
    loop: bool = True  # files only: start again at the end, or stop


class VisionConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    backend: Literal["onnxruntime", "mtmd"] = "onnxruntime"
    max_tokens: Annotated[int, Meta(ge=8, le=1024)] = 256  # 28x28 pixels each; llama.cpp's encoder takes 8 to 1024
    threads: Annotated[int, Meta(ge=0)] = 0  # 0: as many as there are cores
    tensorrt: bool = False  # onnxruntime builds an engine for the GPU: minutes the first time, kept in $STATE_DIRECTORY
    overlap: bool | None = None  # the next frame is encoded while one is answered; null: on a GPU, not on a CPU


class LanguageConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    context: Annotated[int, Meta(ge=256, le=262144)] = 1024  # tokens, twice: of the frame's answer, and of words
    threads: Annotated[int, Meta(ge=0)] = 0
    gpu_layers: Annotated[int, Meta(ge=-1)] = -1  # -1: all that a GPU build can take; without a GPU this means nothing
    repack: bool = True  # on a CPU: weights in the order its kernels like best
    mmap: bool | None = None  # weights stay mapped in their file; null: unless repacked, or they would be held twice
    mlock: bool = False  # weights are never swapped out; the unit's LimitMEMLOCK must allow it
    kv: Literal["f16", "q8_0"] = "f16"  # the cache; q8_0 is half as large, and needs flash attention
    flash_attention: bool | None = None  # null: on a GPU if it can, on a CPU not: there answers would depend on drafts
    exact: bool = True  # on a CPU: the same frame gives the same answer, whatever the draft was; see language.py
    draft: bool = True  # the answer before is evaluated with the frame and taken as far as it is right: only faster
    describe: str = ""  # what the language lane is asked of every frame it gets to; empty: it only answers questions
    max_words_tokens: Positive = 96  # the longest description or answer
    max_thought_tokens: Annotated[int, Meta(ge=0, le=8192)] = 0  # a reasoning model thinks so long before words; 0: not
    words: bool = True  # also stream the action's own text on the words stream
    adapters: dict[AdapterName, str] = {}  # name -> path of a GGUF adapter (edge-quantize lora); all are loaded
    adapter: str = ""  # which of them to begin with; empty: none

    def __post_init__(self) -> None:
        if self.adapter and self.adapter not in self.adapters:
            names = ", ".join(self.adapters) or "none there"
            raise ValueError(f"adapter: expected one of the adapters ({names}) or empty, found {self.adapter!r}")
        if self.kv != "f16" and self.flash_attention is False:
            raise ValueError(f"kv: expected f16 where flash_attention is false, found {self.kv!r}")


class TaskConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    space: str = "velocity_body"  # a ready action space, or the path of a YAML file
    instruction: Annotated[str, Meta(max_length=2000)] = "Hold position."
    deadline_ms: Positive = 2000  # an answer older than this, from capture, is refused as late


class WatchConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    model_stall_s: Annotated[float, Meta(gt=0, le=3600)] = (
        10.0  # no progress for so long: the model process is killed, restarted
    )
    model_load_s: Annotated[float, Meta(gt=0, le=3600)] = 120.0  # the same while it loads
    camera_stall_s: Annotated[float, Meta(gt=0, le=3600)] = (
        3.0  # no frame for so long: the camera process is killed, restarted
    )


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    bundle: str
    trust: tuple[str, ...] = ()  # public keys (edge-agent keygen); with any, the bundle has to be signed by one of them
    camera: CameraConfig
    vision: VisionConfig = VisionConfig()
    language: LanguageConfig = LanguageConfig()
    task: TaskConfig = TaskConfig()
    watch: WatchConfig = WatchConfig()
    trace: str = ""  # a file for a timeline of what was done when (Chrome trace format); empty: none
    runtime_dir: str = ""  # where the sockets are; empty: $RUNTIME_DIRECTORY, else /run/edge-agent, else below /tmp


def load(path: str | Path) -> Config:
    """Read and check a configuration file. Raises ConfigError."""
    return load_text(read_text(path), str(path))


def read_text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def load_text(text: str, name: str) -> Config:
    return checked(parse_yaml(text, name), Config, name)


class _Strict(yaml.SafeLoader):
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
        return _Strict(text).get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{where}: not YAML: {problem}") from None
    except (ValueError, RecursionError) as error:  # a date of the 13th month; a thousand brackets
        raise ConfigError(f"{name}: not YAML that can be read: {error}") from None


def checked(value: object, kind: type, name: str):
    """Plain values -> `kind`, with msgspec's message turned into ours: file, key, expected, found, next step."""
    if value is None:
        raise ConfigError(f"{name}: empty; expected keys {_keys(kind)}")
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
        near = difflib.get_close_matches(unknown[1], _names(at), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"{shown}: unknown key {unknown[1]!r}; expected one of {_keys(at)}{hint}"
    if missing := re.search(r"missing required field `(.*)`", said):
        return f"{shown}: {missing[1]}: missing; expected keys {_keys(at)}"
    found = _value_at(value, path)
    found = "a mapping" if isinstance(found, dict) else repr(found)
    if said.startswith("Invalid enum") and get_args(at):
        return f"{shown}: expected one of {', '.join(map(str, get_args(at)))}, found {found}"
    return f"{shown}: {said[0].lower() + said[1:]}, found {found}"


def _names(kind: object) -> list[str]:
    return [field.name for field in msgspec.structs.fields(kind)] if hasattr(kind, "__struct_fields__") else []


def _keys(kind: object) -> str:
    return ", ".join(_names(kind)) or "none"


def _steps(path: str) -> list[str]:
    return re.findall(r"[^.\[\]]+", path)


def _type_at(kind: object, path: str) -> object:
    for step in _steps(path):
        fields = {f.name: f.type for f in msgspec.structs.fields(kind)} if hasattr(kind, "__struct_fields__") else {}
        kind = fields.get(step, object)
        while get_origin(kind) is Annotated:
            kind = get_args(kind)[0]
    return kind


def _value_at(value: object, path: str) -> object:
    for step in _steps(path):
        try:
            value = value[int(step) if isinstance(value, list) else step]  # type: ignore[index]
        except (KeyError, IndexError, TypeError, ValueError):
            return "nothing"
    return value


def runtime_dir(configured: str = "") -> Path:
    """The folder of the sockets, the same for the daemon and for a client on the same machine.

    systemd sets $RUNTIME_DIRECTORY for the unit; a client finds the unit's folder if it exists, else the one that a
    daemon started by hand by the same user makes.
    """
    if configured:
        return Path(configured)
    if os.environ.get("RUNTIME_DIRECTORY"):
        return Path(os.environ["RUNTIME_DIRECTORY"].split(":")[0])
    unit = Path("/run/edge-agent")
    if unit.is_dir() and os.access(unit, os.R_OK | os.X_OK):
        return unit
    return Path(os.environ.get("XDG_RUNTIME_DIR", "/tmp")) / f"edge-agent-{os.getuid()}"


def state_dir() -> Path:
    """Where what was made on this machine is kept between starts: the unit's folder, else below ~/.cache."""
    given = os.environ.get("STATE_DIRECTORY")
    return Path(given.split(":")[0]) if given else Path.home() / ".cache" / "edge-agent"


def endpoint(folder: Path, stream: str) -> str:
    return f"ipc://{folder}/{stream}"
