"""The loop with a text-only model: a frame says when to answer, and the vehicle's state is all that the model knows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.bundle.wrap import wrap
from edge_agent.camera.source import wanted_image
from edge_agent.config import LanguageConfig
from edge_agent.ipc.events import AskQuestion, SetPaused
from edge_agent.wire.codec import encode
from tests.harness import gguf_toys as toys
from tests.harness.loop_rig import LoopRig

SPACE = (
    "name: climb\nvalid_for_ms: 500\nactions: {up: {}, down: {}}\n"
    "vehicle_state:\n  text: 'At {altitude_m}, {mode}. '\n"
    "  values: {altitude_m: {unit: m, max_age_ms: 200}, mode: {max_age_ms: 1000}}\n"
)
LANGUAGE = LanguageConfig(context=3072, gpu_layers=0, max_text_tokens=6)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text-only")
    wrap(toys.write_language(folder / "language.gguf"), None, folder / "bundle")
    (folder / "climb.yaml").write_text(SPACE)
    return folder / "bundle"


@pytest.fixture
def rig(bundle: Path) -> Iterator[LoopRig]:
    rig = LoopRig(bundle, str(bundle.parent / "climb.yaml"), language=LANGUAGE)
    rig.instruct()
    yield rig
    rig.close()


def push(rig: LoopRig, **values: object) -> None:
    rig.slot.write_vehicle_state(encode({key: (value, rig.clock.now_ns) for key, value in values.items()}))


def test_a_fresh_state_gives_an_action_and_no_state_gives_its_reason(rig: LoopRig):
    refused = rig.propose(1)
    assert (refused.stop_reason, refused.text) == ("no-state", "no fresh value of altitude_m, mode")
    push(rig, altitude_m=3.0)
    assert rig.propose(2).text == "no fresh value of mode"
    push(rig, altitude_m=3.0, mode="guided")
    answered = rig.propose(3)
    assert answered.stop_reason == "" and answered.text in ('{"action":"up"}', '{"action":"down"}')
    rig.clock.advance_ms(201)
    assert (rig.propose(4).stop_reason, rig.proposals()[-1].text) == ("no-state", "no fresh value of altitude_m")


def test_the_camera_process_is_asked_for_one_pixel(rig: LoopRig):
    assert wanted_image(rig.slot).size(1080, 1920) == (1, 1)


def test_an_action_space_without_state_gives_no_action(bundle: Path):
    rig = LoopRig(bundle, "velocity_body", language=LANGUAGE)
    try:
        rig.instruct()
        refused = rig.propose(1)
        assert (refused.stop_reason, refused.text) == ("no-state", "the action space has no vehicle_state")
    finally:
        rig.close()


def test_words_need_no_state(rig: LoopRig):
    rig.propose(1)
    rig.send(AskQuestion("q1", "What?"))
    deltas = rig.deltas_of("q1")
    assert deltas[-1].stop_reason in ("", "length") and deltas[-1].frame_id == 1


@pytest.mark.parametrize("can_batch_text", [True, False])
def test_a_question_goes_on_while_frames_are_refused_or_the_daemon_is_paused(rig: LoopRig, can_batch_text: bool):
    """No token of the text shares a batch with a frame that has no rows."""
    rig.model.engine.llama.can_batch_text = can_batch_text
    rig.propose(1)
    rig.send(AskQuestion("q1", "What?"))
    for frame_id in range(2, 20):
        rig.publish(frame_id)
        rig.step()
    assert [delta for delta in rig.events if getattr(delta, "request", "") == "q1"][-1].final
    rig.send(SetPaused(paused=True))
    rig.send(AskQuestion("q2", "What?"))
    for frame_id in range(20, 40):
        rig.publish(frame_id)
        rig.step()
    assert [delta for delta in rig.events if getattr(delta, "request", "") == "q2"][-1].final


def test_a_late_frame_is_late_and_not_without_state(rig: LoopRig):
    assert rig.propose(1, age_ms=70_000).stop_reason == "late"
