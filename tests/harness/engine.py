"""A loaded model on a toy bundle, in the process of the test, and what it emits."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np

from edge_agent.actions.space import load_action_space
from edge_agent.bundle.manifest import LANGUAGE, MMPROJ, VISION, EmbeddingInfo, read_manifest, write_manifest
from edge_agent.ipc.events import TextDelta
from edge_agent.model.action_lane import Decision, never
from edge_agent.model.events import Events
from edge_agent.model.load import NO_DEADLINE_NS, load_model
from tests.harness import toy
from tests.harness.gguf_reading import reader
from tests.harness.rig import TASK, config_of


class EngineRig:
    """A loaded model with an instruction. `events` lists what was emitted."""

    def __init__(self, folder: Path, space: str, **changes: object) -> None:
        """changes: of the configuration, see config_of."""
        config = config_of(folder, **changes)
        self.model = load_model(config, read_manifest(folder), load_action_space(space))
        self.engine, self.images, self.llama = self.model.engine, self.model.images, self.model.engine.llama
        self.events: list = []
        self.sink = Events(self.events.append)

    def image(self, seed: int, height: int = 160, width: int = 200) -> np.ndarray:
        """A toy picture on the grid."""
        return np.array(self.images.resize(toy.toy_image(height, width, seed=seed)))

    def rows(self, image: np.ndarray) -> np.ndarray:
        """The embeddings of an image: a copy."""
        return np.array(self.images.encode(image).image_rows)

    def decide(
        self,
        image: np.ndarray,
        frame_id: int = 1,
        deadline_ns: int = NO_DEADLINE_NS,
        vehicle_state: str = "",
        should_cancel: Callable[[], bool] = never,
        events: Events | None = None,
    ) -> Decision:
        embeddings = self.images.encode(image)
        sink = self.sink if events is None else events
        return self.engine.actions.decide(embeddings, frame_id, deadline_ns, vehicle_state, should_cancel, sink)

    def answer(self, image: np.ndarray, frame_id: int = 1) -> str:
        """The text of a complete answer."""
        decision = self.decide(image, frame_id)
        assert decision.stop_reason == ""
        return decision.text

    def measure(self) -> None:
        """As at the end of warm-up: drafts in the shapes of this machine."""
        frame = self.images.encode(self.image(1))
        self.engine.actions.decide(frame, 1, NO_DEADLINE_NS)
        self.engine.measure_batch_shapes(frame)

    def start_text(self, question: str = "What?", lane: str = "answer", request: str = "r1") -> None:
        self.engine.text.start(lane, request, question, self.sink)

    def finish_text(self) -> int:
        """Decode the text to its end -> number of steps."""
        n_steps = 0
        while not self.engine.text.idle:
            self.engine.text.step()
            n_steps += 1
        return n_steps

    def ask(self, question: str) -> int:
        """A whole text -> number of steps."""
        self.start_text(question)
        return self.finish_text()

    def text(self) -> str:
        """Everything that the text lane emitted."""
        return "".join(delta.text for delta in self.events if isinstance(delta, TextDelta) and delta.lane != "action")


@contextlib.contextmanager
def engine_of(folder: Path, space: str, **changes: object) -> Iterator[EngineRig]:
    rig = EngineRig(folder, space, **changes)
    try:
        rig.engine.instruct(TASK)
        yield rig
    finally:
        rig.model.close()


def full_precision_bundle(toy_bundle: Path, convert: Callable[..., Path], folder: Path) -> Path:
    """A float32 bundle of a toy whose answers differ. 4-bit kernels round differently when rows are divided into other
    batches; in float32 only the method can make a difference."""
    checkpoint = toy.write_checkpoint(folder / "checkpoint", seed=2)
    bundle = folder / "bundle"
    shutil.copytree(toy_bundle, bundle)
    for name in (LANGUAGE, VISION, MMPROJ):
        shutil.copy(convert(checkpoint, "f32") / name, bundle / name)
    table = next(t for t in reader(bundle / LANGUAGE).tensors if t.name == "token_embd.weight")
    manifest = read_manifest(bundle).manifest
    row_bytes = table.n_bytes // manifest.model.vocab
    embedding = EmbeddingInfo(offset=table.data_offset, ggml_type=table.tensor_type.name, row_bytes=row_bytes)
    write_manifest(
        bundle, msgspec.structs.replace(manifest, model=msgspec.structs.replace(manifest.model, embedding=embedding))
    )
    return bundle
