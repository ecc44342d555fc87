"""The vision encoders that a bundle and this machine have: one row of `edge-agent tune`'s table for each, tried or not.

A bundle has at most one file for each backend: vision.onnx for onnxruntime, mmproj.gguf for mtmd. Each file stores its
weights in one type, so a choice of the backend is also a choice of the precision.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from edge_agent.bundle.file_check import check_gguf
from edge_agent.bundle.manifest import MMPROJ, VISION, Bundle
from edge_agent.bundle.model_facts import bytes_by_type
from edge_agent.bundle.onnx_check import weight_type
from edge_agent.model.vision_encoder import PROVIDERS, TENSORRT

BACKEND, TENSORRT_KEY = "vision.backend", "vision.tensorrt"


class Encoder(NamedTuple):
    name: str
    values: dict[str, Any]  # of the configuration
    skip: str = ""  # why it is not tried
    provider: str = ""  # onnxruntime's, which has to run it


def weight_types(bundle: Bundle) -> dict[str, str]:
    """File of an encoder -> the type of its weights."""
    found = {}
    if VISION in bundle.manifest.files:
        found[VISION] = weight_type(bundle.path(VISION))
    if MMPROJ in bundle.manifest.files:
        by_type = bytes_by_type(check_gguf(bundle.path(MMPROJ), ("clip",)))
        found[MMPROJ] = max(by_type, key=by_type.__getitem__).lower()
    return found


def encoder_choices(types: dict[str, str], providers: dict[str, str], *, tensorrt: bool) -> tuple[Encoder, ...]:
    """types: of weight_types(). providers: execution provider of the installed onnxruntime -> "": it ran a graph;
    otherwise why it did not. tensorrt: whether TensorRT is tried where it runs."""
    found: list[Encoder] = []
    if VISION not in types:
        found.append(Encoder("onnxruntime", {}, "the bundle has no vision.onnx"))
    else:
        found += _onnxruntime(types[VISION], providers, tensorrt)
    if MMPROJ in types:
        found.append(Encoder(f"mtmd ({types[MMPROJ]})", {BACKEND: "mtmd", TENSORRT_KEY: False}))
    return tuple(found)


def _onnxruntime(weights: str, providers: dict[str, str], tensorrt: bool) -> list[Encoder]:
    """The daemon takes the first provider of PROVIDERS that starts, and TensorRT where vision.tensorrt says so."""
    found: list[Encoder] = []
    in_use = next((name for name in PROVIDERS if providers.get(name) == ""), "")
    if tensorrt and TENSORRT not in providers:
        providers = providers | {TENSORRT: "onnxruntime here has no TensorRT"}
    for provider in (*PROVIDERS, TENSORRT):
        if provider not in providers:
            continue
        why = providers[provider]
        if not why and provider == TENSORRT and not tensorrt:
            why = "not tried: it makes an engine first, which takes minutes; tune --tensorrt tries it"
        elif not why and provider not in (in_use, TENSORRT):
            why = f"not tried: the daemon uses {_short(in_use)} where it runs"
        values = {BACKEND: "onnxruntime", TENSORRT_KEY: provider == TENSORRT}
        found.append(Encoder(f"onnxruntime {_short(provider)} ({weights})", {} if why else values, why, provider))
    return found


def _short(provider: str) -> str:
    return provider.removesuffix("ExecutionProvider").replace("Tensorrt", "TensorRT")
