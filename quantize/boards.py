"""Which board can serve a model, by the daemon's own memory plan (edge_agent/bundle/memory_plan.py)."""

from __future__ import annotations

import msgspec

from edge_agent.bundle.manifest import LANGUAGE, Manifest
from edge_agent.bundle.memory_plan import MIB, needed_mib
from edge_agent.config import CameraConfig, Config

# Estimates of the memory that a program can have on a board with a headless JetPack, GiB. Not measured on boards.
BOARDS = {
    "Orin Nano 4GB": 2.7,
    "Orin Nano 8GB": 6.4,
    "Orin NX 16GB": 14.3,
    "AGX Orin 32GB": 29.0,
    "AGX Orin 64GB": 60.0,
    "Thor 128GB": 120.0,
}
DEFAULT_CONFIG = Config(bundle="", camera=CameraConfig(source=""))


def serving_mib(manifest: Manifest, config: Config = DEFAULT_CONFIG) -> float:
    """Memory that the daemon plans for a bundle under a configuration, MiB, with nothing reduced."""
    return sum(needed_mib(config, manifest).values())


def boards_that_fit(manifest: Manifest, config: Config = DEFAULT_CONFIG) -> list[str]:
    return [board for board, gib in BOARDS.items() if serving_mib(manifest, config) <= gib * 1024]


def language_budget_bytes(manifest: Manifest, board: str, config: Config = DEFAULT_CONFIG) -> int:
    """Largest language.gguf with which the bundle of this manifest fits on a board, bytes. It can be negative."""
    without = msgspec.structs.replace(manifest.files[LANGUAGE], bytes=0)
    others_mib = serving_mib(msgspec.structs.replace(manifest, files=manifest.files | {LANGUAGE: without}), config)
    return round((BOARDS[board] * 1024 - others_mib) * MIB)
