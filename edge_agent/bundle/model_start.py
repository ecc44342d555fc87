"""The first message to the model process: the configuration, and what the supervisor has verified.

The model process takes the manifest, the hashes and the action space from here and never reads them again from the
disk: a restart in flight loads what was verified at the start of the daemon, or nothing.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from edge_agent.bundle.files import BundleFile
from edge_agent.bundle.manifest import VISION, Bundle, Manifest
from edge_agent.config import Config
from edge_agent.errors import ConfigError

MAX_BYTES = 96 * 1024  # one datagram of the socket to the model process holds 128 KiB


class ModelStart(msgspec.Struct, frozen=True, kw_only=True):
    config: Config
    space: bytes  # of actions.space.encode_action_space
    folder: str  # of the bundle
    manifest: Manifest
    id: str
    adapters: dict[str, BundleFile]  # by name; the paths are in the configuration

    @property
    def bundle(self) -> Bundle:
        return Bundle(folder=Path(self.folder), manifest=self.manifest, id=self.id, adapters=self.adapters)

    @property
    def files(self) -> dict[Path, BundleFile]:
        """Every file that the model process may load."""
        adapters = {Path(self.config.language.adapters[name]): file for name, file in self.adapters.items()}
        return {self.bundle.path(name): file for name, file in self.manifest.files.items()} | adapters


def fit_to_bundle(config: Config, manifest: Manifest) -> Config:
    """The configuration with the only vision backend that a bundle without vision.onnx has. Raises ConfigError."""
    if VISION in manifest.files:
        return config
    if config.vision.backend == "onnxruntime":
        raise ConfigError("vision.backend: expected mtmd or null for a bundle without vision.onnx, found 'onnxruntime'")
    vision = msgspec.structs.replace(config.vision, backend="mtmd", tensorrt=False)
    return msgspec.structs.replace(config, vision=vision)


def encode_model_start(config: Config, bundle: Bundle, space: bytes) -> bytes:
    """Raises ConfigError if the message would be too long, or if the configuration does not fit the bundle."""
    config = fit_to_bundle(config, bundle.manifest)
    start = ModelStart(
        config=config,
        space=space,
        folder=str(bundle.folder),
        manifest=msgspec.structs.replace(bundle.manifest, source_sha256={}),  # long, and the model does not need it
        id=bundle.id,
        adapters=bundle.adapters,
    )
    message = msgspec.msgpack.encode(start)
    if len(message) > MAX_BYTES:
        parts = {"task.action_space": len(space), "the other keys": len(msgspec.msgpack.encode(config))}
        found = ", ".join(f"{name} {n_bytes}" for name, n_bytes in parts.items())
        raise ConfigError(f"configuration: expected at most {MAX_BYTES} bytes in all; found {found}; shorten the texts")
    return message


def decode_model_start(message: bytes) -> ModelStart:
    return msgspec.msgpack.decode(message, type=ModelStart)
