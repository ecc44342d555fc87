"""The configuration file: YAML -> frozen types, strictly.

An unknown key, a wrong type or a number out of its range stops the start with one line that names file, key, what was
expected and what was found. Nothing here opens a camera, a socket or a model.

    >>> load_text("bundle: /b\\ncamera: {source: clip.mp4}", "<test>").camera.loop
    True
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from edge_agent.strict_yaml import convert, parse_yaml, read_text

Positive = Annotated[int, Meta(ge=1)]
AdapterName = Annotated[str, Meta(pattern="^[A-Za-z0-9_-]{1,32}$")]


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
    max_image_tokens: Annotated[int, Meta(ge=8, le=1024)] = (
        256  # 28x28 pixels each; llama.cpp's encoder takes 8 to 1024
    )
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
    kv_cache_type: Literal["f16", "q8_0"] = "f16"  # the cache; q8_0 is half as large, and needs flash attention
    flash_attention: bool | None = None  # null: on a GPU if it can, on a CPU not: there answers would depend on drafts
    reproducible: bool = True  # on a CPU: the same frame gives the same answer, whatever the draft was; see language.py
    speculative: bool = (
        True  # the answer before is evaluated with the frame and taken as far as it is right: only faster
    )
    describe_prompt: str = (
        ""  # what the language lane is asked of every frame it gets to; empty: it only answers questions
    )
    max_text_tokens: Positive = 96  # the longest description or answer
    max_reasoning_tokens: Annotated[int, Meta(ge=0, le=8192)] = (
        0  # a reasoning model thinks so long before words; 0: not
    )
    stream_action_text: bool = True  # also stream the action's own text on the words stream
    adapters: dict[AdapterName, str] = {}  # name -> path of a GGUF adapter (edge-quantize lora); all are loaded
    adapter: str = ""  # which of them to begin with; empty: none

    def __post_init__(self) -> None:
        if self.adapter and self.adapter not in self.adapters:
            names = ", ".join(self.adapters) or "none there"
            raise ValueError(f"adapter: expected one of the adapters ({names}) or empty, found {self.adapter!r}")
        if self.kv_cache_type != "f16" and self.flash_attention is False:
            raise ValueError(
                f"kv_cache_type: expected f16 where flash_attention is false, found {self.kv_cache_type!r}"
            )


class TaskConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    action_space: str = "velocity_body"  # a ready action space, or the path of a YAML file
    instruction: Annotated[str, Meta(max_length=2000)] = "Hold position."
    deadline_ms: Positive = 2000  # an answer older than this, from capture, is refused as late


class WatchdogConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    model_stall_s: Annotated[float, Meta(gt=0, le=3600)] = (
        10.0  # no progress for so long: the model process is killed, restarted
    )
    model_load_s: Annotated[float, Meta(gt=0, le=3600)] = 120.0  # the same while it loads
    camera_stall_s: Annotated[float, Meta(gt=0, le=3600)] = (
        3.0  # no frame for so long: the camera process is killed, restarted
    )


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    bundle: str
    trusted_keys: tuple[
        str, ...
    ] = ()  # public keys (edge-agent keygen); with any, the bundle has to be signed by one of them
    camera: CameraConfig
    vision: VisionConfig = VisionConfig()
    language: LanguageConfig = LanguageConfig()
    task: TaskConfig = TaskConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    runtime_dir: str = ""  # where the sockets are; empty: $RUNTIME_DIRECTORY, else /run/edge-agent, else below /tmp


def load_config(path: str | Path) -> Config:
    """Read and check a configuration file. Raises ConfigError."""
    return load_config_text(read_text(path), str(path))


def load_config_text(text: str, name: str) -> Config:
    return convert(parse_yaml(text, name), Config, name)


def state_dir() -> Path:
    """Where what was made on this machine is kept between starts: the unit's folder, else below ~/.cache."""
    given = os.environ.get("STATE_DIRECTORY")
    return Path(given.split(":")[0]) if given else Path.home() / ".cache" / "edge-agent"
