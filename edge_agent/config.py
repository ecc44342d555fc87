"""The configuration file: YAML -> frozen types, strictly.

An unknown key, a wrong type or a number out of its range stops the start with one line that names file, key, the
expected and the found value. Nothing here opens a camera, a socket or a model. What each key does, its default and when
to change it: systemd/edge-agent.yaml.

    >>> load_config_text("bundle: /b\\ncamera: {source: clip.mp4}", "<test>").camera.loop
    True
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from edge_agent.errors import ConfigError
from edge_agent.strict_yaml import convert, parse_yaml, read_text

Positive = Annotated[int, Meta(ge=1, le=600_000)]
Seconds = Annotated[float, Meta(ge=0.1, le=3600)]
AdapterName = Annotated[str, Meta(pattern="^[A-Za-z0-9_-]{1,32}$")]
Profile = Literal["reproducible", "fast", "small"]


class CameraConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    source: str  # /dev/videoN, a video file, a folder of images, gst:PIPELINE or zmq:ENDPOINT
    name: Annotated[str, Meta(min_length=1, max_length=32)] = "front"
    width: Annotated[int, Meta(ge=1, le=7680)] | None = None  # pixels; requested from V4L2 and GStreamer
    height: Annotated[int, Meta(ge=1, le=4320)] | None = None
    fps: Annotated[float, Meta(gt=0, le=1000)] | None = None
    fourcc: Annotated[str, Meta(pattern="^[A-Za-z0-9 ]{4}$")] | None = None  # V4L2: pixel format, for example MJPG
    max_megapixels: Annotated[float, Meta(gt=0, le=33.1776)] = 13.0  # larger frames are refused; bounds the memory
    identical_frames_s: Annotated[float, Meta(ge=0, le=86400)] | None = None  # V4L2, GStreamer; 0: for ever
    realtime: bool = True  # files only: at the recorded rate, or as fast as the model answers
    loop: bool = True  # files only: start again at the end, or stop

    @property
    def max_pixels(self) -> int:
        """Pixels of the largest frame that is taken."""
        return round(self.max_megapixels * 1e6)


class VisionConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    backend: Literal["onnxruntime", "mtmd"] | None = None  # None: as the profile says
    max_image_tokens: Annotated[int, Meta(ge=8, le=1024)] = (
        256  # 28x28 pixels each; llama.cpp's encoder takes 8 to 1024
    )
    tensorrt: bool = False  # onnxruntime builds an engine for the GPU: minutes the first time, kept in $STATE_DIRECTORY


class LanguageConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    context: Annotated[int, Meta(ge=256, le=262144)] = 1024  # tokens of each lane: actions and text have a cache each
    gpu_layers: Annotated[int, Meta(ge=-1, le=10_000)] = -1  # -1: all that fit; without a GPU build it has no effect
    # Question for the text lane about every frame it has time for; empty: no descriptions.
    describe_prompt: Annotated[str, Meta(max_length=2000)] = ""
    max_text_tokens: Annotated[int, Meta(ge=1, le=8192)] = 96  # the longest description or answer
    max_reasoning_tokens: Annotated[int, Meta(ge=0, le=8192)] = 0  # before a text, for a reasoning model; 0: none
    stream_action_text: bool = True  # also publish the text of the actions on the text stream
    adapters: dict[AdapterName, str] = {}  # name -> path of a GGUF adapter (edge-quantize lora); all are loaded
    adapter: str = ""  # the adapter that is active at the start; empty: none

    def __post_init__(self) -> None:
        if self.adapter and self.adapter not in self.adapters:
            names = ", ".join(self.adapters) or "none configured"
            raise ValueError(f"adapter: expected one of the adapters ({names}) or empty, found {self.adapter!r}")


class TaskConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    action_space: str = "velocity_body"  # a ready action space, or the path of a YAML file
    instruction: Annotated[str, Meta(max_length=2000)] = "Hold position."
    deadline_ms: Positive = 2000  # an answer older than this, from capture, is refused as late


class WatchdogConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    model_stall_s: Seconds = 10.0  # without progress: the model process is restarted
    model_load_s: Seconds = 120.0  # the same while the model loads
    camera_stall_s: Seconds = 3.0  # without a frame: the status is no-frames


class GovernorConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    enabled: bool = True  # lower image tokens, then the rate, before the board throttles
    max_temperature_c: Annotated[float, Meta(ge=30, le=130)] | None = None  # None: where the board itself throttles
    max_power_w: Annotated[float, Meta(gt=0, le=10_000)] | None = None  # None: where the board itself throttles


class AdvancedConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Single switches of a profile, for benchmarks. None: as the profile says (edge_agent/profile.py)."""

    reproducible: bool | None = None
    speculative: bool | None = None
    overlap: bool | None = None
    repack: bool | None = None
    mmap: bool | None = None
    mlock: bool | None = None
    kv_cache_type: Literal["f16", "q8_0"] | None = None
    flash_attention: bool | None = None

    def __post_init__(self) -> None:
        if self.kv_cache_type == "q8_0" and self.flash_attention is False:
            raise ValueError("kv_cache_type: expected f16 or ~ where flash_attention is false, found 'q8_0'")
        if self.reproducible and (self.kv_cache_type == "q8_0" or self.flash_attention):
            raise ValueError(
                "reproducible: expected false or ~ where kv_cache_type is q8_0 or flash_attention is true, found True"
            )


class TunedConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Written by `edge-agent tune --write`: what the values were measured on. It changes nothing; where the camera or
    the bundle is another, the daemon and `edge-agent check` say so."""

    date: str = ""  # "" everywhere: not tuned
    board: str = ""
    bundle: str = ""  # first 16 hex digits of the SHA-256 of bundle.json
    frames: str = ""  # "1280x720"
    deadline_ms: int = 0
    mean_age_ms: float = 0.0

    def difference(self, frames: str = "", bundle: str = "") -> str:
        """What is another now, in one line; "" if nothing is, or nothing was tuned. "": not known now."""
        now = {"frames": frames, "bundle": bundle}
        differs = [
            f"{key} of {then}, found {now[key]}"
            for key, then in (("frames", self.frames), ("bundle", self.bundle))
            if then and now[key] not in ("", then)
        ]
        what = " and ".join(differs)
        return f"tuned on {self.date} for {what}: run `edge-agent tune` again" if differs else ""


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    bundle: str
    trusted_keys: tuple[str, ...] = ()  # paths of public keys (edge-agent keygen); with any, one must fit the bundle
    profile: Profile | None = None  # None: fast
    cpu_threads: Annotated[int, Meta(ge=0, le=1024)] = 0  # of the model process; 0: one per core it may use
    camera: CameraConfig
    vision: VisionConfig = VisionConfig()
    language: LanguageConfig = LanguageConfig()
    task: TaskConfig = TaskConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    governor: GovernorConfig = GovernorConfig()
    advanced: AdvancedConfig = AdvancedConfig()
    tuned: TunedConfig = TunedConfig()
    runtime_dir: str = ""  # folder of the sockets; empty: $RUNTIME_DIRECTORY, else /run/edge-agent, else below /tmp


def load_config(path: str | Path) -> Config:
    """Read and check a configuration file. Raises ConfigError."""
    return load_config_text(read_text(path), str(path))


def load_config_text(text: str, name: str) -> Config:
    """text: YAML; name: of the file, for errors. Raises ConfigError."""
    config = convert(parse_yaml(text, name), Config, name)
    check_texts(config, name)
    return config


def check_texts(config: Config, where: str) -> None:
    """Every text must be UTF-8 without a NUL: it becomes a path, a message or a prompt. Raises ConfigError."""
    for key, text in _texts(msgspec.to_builtins(config), ""):
        if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ConfigError(f"{where}: {key}: expected text without NUL and lone surrogates, found {text[:80]!a}")


def _texts(value: object, path: str) -> Iterator[tuple[str, str]]:
    """(key, text) of every text in a value."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(inner, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _texts(inner, f"{path}[{i}]")


def state_dir() -> Path:
    """The folder for files that are made on this machine and kept between starts: the unit's, else below ~/.cache."""
    configured = os.environ.get("STATE_DIRECTORY")
    return Path(configured.split(":")[0]) if configured else Path.home() / ".cache" / "edge-agent"
