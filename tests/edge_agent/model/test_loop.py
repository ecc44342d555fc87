"""The model process: a real child, told and heard as the supervisor does it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from edge_agent.actions.envelope import CheckedAction, parse_answer
from edge_agent.actions.space import load_action_space
from edge_agent.bundle.manifest import read_manifest
from edge_agent.config import LanguageConfig, TaskConfig, VisionConfig
from edge_agent.ipc.events import (
    AskQuestion,
    Heartbeat,
    InstructionApplied,
    ModelReady,
    Proposal,
    SetInstruction,
    SetPaused,
    TextDelta,
    decode_model_event,
)
from edge_agent.ipc.frame_slot import Slot
from edge_agent.ipc.worker import Worker
from edge_agent.model.engine import Engine
from edge_agent.model.loop import ModelLoop
from edge_agent.wire.codec import encode
from edge_agent.wire.messages import StageTimes
from tests.harness import ROOT, toy
from tests.harness.rig import TASK, config_of, numbers_only

pytestmark = pytest.mark.filterwarnings("ignore:llama_token_get_attr")  # llguidance, once per token


class Rig:
    """The supervisor's side of a real model process."""

    def __init__(self, folder: Path, **changes) -> None:
        self.slot = Slot.create()
        self.worker = Worker("edge_agent.model", self.slot, encode(config_of(folder, **changes)))
        self.events: list = []
        self.taken = 0

    def close(self) -> None:
        if self.worker.exit_status is None:
            self.worker.kill()
            self.worker.process.wait()
        self.slot.close()

    def send(self, command: object) -> None:
        assert self.worker.send(encode(command))

    def publish(self, frame_id: int, age_ms: float = 0.0, seed: int = 0, clock: str = "driver") -> int:
        """A frame into the slot; returns its stamp."""
        t_ns = time.monotonic_ns() - round(age_ms * 1e6)
        self.slot.write(120, 160)[:] = toy.toy_image(120, 160, seed=seed)
        self.slot.publish(frame_id, t_ns, clock)
        return t_ns

    def listen(self, seconds: float) -> list:
        """Everything that comes within so long."""
        until_s, found = time.monotonic() + seconds, []
        while time.monotonic() < until_s:
            found += [decode_model_event(payload) for payload in self.worker.receive()]
            time.sleep(0.005)
        self.events += found
        return found

    def wait(self, kind: type, seconds: float = 20.0, **fields):
        """The next event of this kind with these fields."""
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            for payload in self.worker.receive():
                self.events.append(decode_model_event(payload))
            while self.taken < len(self.events):
                event = self.events[self.taken]
                self.taken += 1
                if isinstance(event, kind) and all(getattr(event, key) == value for key, value in fields.items()):
                    return event
            assert self.worker.exit_status is None, f"the model process ended: {self.events}"
            time.sleep(0.005)
        raise AssertionError(f"no {kind.__name__} {fields} in {seconds} s but {self.events}")


@pytest.fixture(scope="module")
def shared(toy_bundle):
    """One process for all tests that need nothing special of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        started = Rig(toy_bundle)
        started.wait(ModelReady)
    yield started
    started.close()


@pytest.fixture
def process(shared):
    shared.send(SetPaused(False))
    shared.send(SetInstruction(instruction_id=0, text=TASK))
    assert shared.wait(InstructionApplied, instruction_id=0).error == ""
    shared.listen(0.1)
    shared.events.clear()
    shared.taken = 0
    return shared


@pytest.fixture
def start(toy_bundle, monkeypatch):
    """A process of the test's own: start(config changes) -> Rig."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    made: list[Rig] = []

    def start(instruct: bool = True, **changes) -> Rig:
        made.append(Rig(toy_bundle, **changes))
        if instruct:
            made[0].wait(ModelReady)
            made[0].send(SetInstruction(instruction_id=0, text=TASK))
            assert made[0].wait(InstructionApplied, instruction_id=0).error == ""
        return made[0]

    yield start
    for started in made:
        started.close()


def test_it_says_that_it_loads_then_that_it_is_ready_and_answers_nothing_before_it_is_told_to(start):
    process = start(instruct=False)
    ready = process.wait(ModelReady)
    assert any(isinstance(event, Heartbeat) and event.what.startswith("weights") for event in process.events)
    assert ready.vision == "onnxruntime CPUExecutionProvider" and ready.load_s > 0 and ready.warmup_ms > 0
    process.publish(1)
    assert not any(isinstance(event, Proposal) for event in process.listen(0.5))
    process.send(SetInstruction(instruction_id=7, text=TASK))
    assert process.wait(InstructionApplied) == InstructionApplied(instruction_id=7, text=TASK, adapter="")
    assert process.wait(Proposal).instruction_id == 7


def test_a_frame_comes_back_as_a_proposal_with_its_own_number_and_stamp(process):
    space = load_action_space("velocity_body")
    for n, clock in enumerate(("driver", "arrival", "sender")):
        t_ns = process.publish(1000 + 7 * n, age_ms=30, seed=n, clock=clock)
        proposal = process.wait(Proposal)
        assert (proposal.frame_id, proposal.t_capture_ns, proposal.capture_clock) == (1000 + 7 * n, t_ns, clock)
        assert (proposal.frame_seq, proposal.instruction_id, proposal.stop_reason) == (process.slot.latest_seq, 0, "")
        assert isinstance(parse_answer(proposal.text, space), CheckedAction)
        assert proposal.stages_ms.queue >= 30 and proposal.stages_ms.encode > 0 and proposal.stages_ms.check == 0
        pieces = [e for e in process.events if isinstance(e, TextDelta) and e.frame_id == proposal.frame_id]
        assert "".join(piece.text for piece in pieces) == proposal.text and pieces[-1].final


def test_the_newest_frame_wins_and_none_is_answered_twice(process):
    before = process.slot.latest_seq
    for frame_id in range(1, 100):
        process.publish(frame_id, seed=frame_id % 3)
        time.sleep(0.002)
    process.wait(Proposal, frame_id=99)
    process.listen(0.3)
    answered = [event for event in process.events if isinstance(event, Proposal)]
    ids = [proposal.frame_id for proposal in answered]
    assert ids == sorted(set(ids)) and ids[-1] == 99 and len(ids) < 99
    assert all(proposal.frame_seq == before + proposal.frame_id for proposal in answered)


def test_a_frame_that_is_too_old_is_not_looked_at(start):
    process = start(task=TaskConfig(deadline_ms=500))
    process.publish(3, age_ms=600)
    proposal = process.wait(Proposal)
    assert (proposal.frame_id, proposal.stop_reason, proposal.text) == (3, "late", "")
    assert proposal.stages_ms.prefill == proposal.stages_ms.decode == 0
    process.publish(4)
    assert process.wait(Proposal).stop_reason == ""


def test_frames_get_fewer_tokens_when_answers_would_be_late(start):
    """Frames that were captured so long ago that six tenths of what a whole one takes are left to them."""
    process = start(vision=VisionConfig(max_image_tokens=256, threads=1))

    def shown(frame_id: int, age_ms: float) -> StageTimes:
        process.slot.write(480, 640)[:] = toy.toy_image(480, 640, seed=1)
        process.slot.publish(frame_id, time.monotonic_ns() - round(age_ms * 1e6), "driver")
        return process.wait(Proposal, frame_id=frame_id).stages_ms

    whole = [shown(n, 0.0) for n in range(1, 8)]
    took_ms = float(np.median([one.encode + one.prefill + one.decode for one in whole[1:]]))
    hurried = [shown(n, 60_000 - 0.6 * took_ms) for n in range(8, 20)]
    looked_at = [one.prefill for one in hurried if one.prefill]  # the others came too late to be looked at
    assert looked_at and min(looked_at) < 0.75 * float(np.median([one.prefill for one in whole[1:]]))
    again = [shown(n, 0.0).prefill for n in range(20, 24)]
    assert max(again) > 1.3 * min(looked_at)  # with time again, all tokens again


def test_a_new_task_counts_from_the_next_frame_and_one_too_long_leaves_the_old(process):
    process.send(SetInstruction(instruction_id=1, text="Land on the blue square."))
    assert process.wait(InstructionApplied) == InstructionApplied(
        instruction_id=1, text="Land on the blue square.", adapter=""
    )
    process.publish(1)
    assert process.wait(Proposal).instruction_id == 1
    process.send(SetInstruction(instruction_id=2, text="Look. " * 1000))
    refused = process.wait(InstructionApplied)
    assert refused.instruction_id == 2 and "language.context" in refused.error
    process.publish(2)
    assert process.wait(Proposal).instruction_id == 1


def test_an_adapter_changes_the_answer_and_back(start, switchable):
    """The same frame before, under and after it; the instruction stays."""
    process = start(language=LanguageConfig(adapters={"night": str(switchable)}))
    answers = []
    for n, name in enumerate(("", "night", "")):
        process.send(SetInstruction(instruction_id=n + 1, adapter=name))
        assert process.wait(InstructionApplied) == InstructionApplied(instruction_id=n + 1, text=TASK, adapter=name)
        process.publish(n + 1, seed=4)
        proposal = process.wait(Proposal)
        assert (proposal.instruction_id, proposal.stop_reason) == (n + 1, "")
        answers.append(proposal.text)
    assert answers[0] == answers[2] != answers[1]


def test_while_paused_there_is_no_proposal_and_after_it_there_is(process):
    process.publish(1)
    process.wait(Proposal)
    process.send(SetPaused(True))
    time.sleep(0.2)
    for frame_id in range(2, 8):
        process.publish(frame_id)
        time.sleep(0.03)
    assert not any(isinstance(event, Proposal) for event in process.listen(0.3))
    process.send(SetPaused(False))
    process.publish(8)
    process.wait(Proposal, frame_id=8)
    assert [e.frame_id for e in process.events if isinstance(e, Proposal)] in ([1, 8], [1, 7, 8])


def answer_to(process: Rig, request: str) -> list[TextDelta]:
    process.wait(TextDelta, request=request, final=True)
    return [event for event in process.events if isinstance(event, TextDelta) and event.request == request]


@pytest.mark.parametrize("command", [SetPaused(True), SetInstruction(instruction_id=1, text="Land.")])
def test_an_answer_under_way_is_given_up_for_what_came_since(command, toy_bundle, tmp_path):
    """In this process, so that the command comes between two steps and not before or after."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    said: list = []
    config = config_of(toy_bundle, language=LanguageConfig(context=1024, threads=1, speculative=False))
    engine = Engine(config, read_manifest(toy_bundle), load_action_space(numbers_only(tmp_path)), said.append)
    slot = Slot.create()
    loop = ModelLoop(engine, slot, ours)
    try:
        theirs.send(encode(SetInstruction(instruction_id=0, text=TASK)))
        loop.turn()
        slot.write(120, 160)[:] = 5
        slot.publish(1, time.monotonic_ns(), "driver")
        asked = []

        def cancelled(real=engine.cancelled) -> bool:
            asked.append(real())
            if len(asked) == 1:
                theirs.send(encode(AskQuestion("q", "What?")))  # no reason to give up
            if len(asked) == 2:
                theirs.send(encode(command))
            return asked[-1]

        engine.cancelled = cancelled
        loop.turn()
        assert asked == [False, False, True]
        assert next(event for event in said if isinstance(event, Proposal)).stop_reason == "cancelled"
        loop.turn()  # now it is carried out
        assert loop.paused or loop.instruction_id == 1
        heard = [event for event in said if isinstance(event, TextDelta) and event.request == "q"]
        assert heard or loop.questions, "the question was not lost"
    finally:
        loop.eyes.close()
        engine.close()
        slot.close()


def test_state_is_read_from_the_slot_when_the_frame_is_answered(toy_bundle, tmp_path):
    (tmp_path / "climb.yaml").write_text(
        "name: climb\nvalid_for_ms: 500\nactions: {up: {}, down: {}}\n"
        "vehicle_state: {text: 'At {altitude_m}. ', values: {altitude_m: {unit: m, max_age_ms: 200}}}\n"
    )
    ours, _theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    space = load_action_space(str(tmp_path / "climb.yaml"))
    engine = Engine(config_of(toy_bundle), read_manifest(toy_bundle), space, lambda event: None)
    slot, states, respond = Slot.create(), [], engine.respond
    engine.respond = lambda rows, frame_id, deadline_ns, state: (
        states.append(state) or respond(rows, frame_id, deadline_ns, state)
    )
    loop = ModelLoop(engine, slot, ours)
    try:
        engine.instruct(TASK)
        loop.instruction_id = 0
        for n, altitude in enumerate((None, 3.25, None)):
            if altitude is not None:
                slot.write_vehicle_state(encode({"altitude_m": (altitude, time.monotonic_ns())}))
            else:
                time.sleep(0.25)
            slot.write(120, 160)[:] = 5
            slot.publish(n + 1, time.monotonic_ns(), "driver")
            loop.turn()
        assert states == ["At unknown. ", "At 3.2 m. ", "At unknown. "]
    finally:
        loop.eyes.close()
        engine.close()
        slot.close()


def test_a_question_is_answered_about_the_newest_frame(process):
    process.publish(5)
    process.wait(Proposal)
    process.send(AskQuestion("q1", "What do you see?"))
    pieces = answer_to(process, "q1")
    assert {piece.lane for piece in pieces} == {"answer"} and {piece.frame_id for piece in pieces} == {5}
    assert "".join(piece.text for piece in pieces) and pieces[-1].stop_reason == "length"
    for request in ("q2", "q3"):
        process.send(AskQuestion(request, "And now?"))
    assert answer_to(process, "q2") and answer_to(process, "q3")


def test_a_question_while_paused_is_answered_about_the_newest_frame_and_not_acted_on(process):
    process.publish(1)
    process.wait(Proposal)
    process.send(SetPaused(True))
    time.sleep(0.2)
    process.publish(2, seed=2)
    process.send(AskQuestion("q", "What do you see?"))
    assert {piece.frame_id for piece in answer_to(process, "q")} == {2}
    process.listen(0.2)
    assert [e.frame_id for e in process.events if isinstance(e, Proposal)] == [1]


def test_a_question_too_long_for_the_context_costs_no_more_than_its_answer(start):
    """Control lets 2000 characters through."""
    process = start()
    process.publish(1)
    process.wait(Proposal)
    process.send(AskQuestion("long", "What? " * 333))
    assert answer_to(process, "long")[-1].final
    process.publish(2)
    process.wait(Proposal, frame_id=2)
    process.send(AskQuestion("short", "What?"))
    assert "".join(piece.text for piece in answer_to(process, "short"))


def test_frames_are_answered_while_a_sentence_is_spoken(start):
    process = start(language=LanguageConfig(context=1024, threads=1, gpu_layers=0, max_text_tokens=200))
    process.publish(1)
    process.wait(Proposal)
    process.send(AskQuestion("q", "What do you see?"))
    process.wait(TextDelta, request="q")
    process.publish(2)
    process.wait(Proposal, frame_id=2)
    assert not any(isinstance(e, TextDelta) and e.request == "q" and e.final for e in process.events)
    assert {piece.frame_id for piece in answer_to(process, "q")} == {1}


def test_a_description_gives_way_to_a_question(start):
    language = LanguageConfig(
        context=2048, threads=1, gpu_layers=0, max_text_tokens=300, describe_prompt="Describe it."
    )
    process = start(language=language)
    process.publish(1)
    process.wait(TextDelta, lane="describe")
    process.send(AskQuestion("q", "What is it?"))
    assert process.wait(TextDelta, lane="describe", final=True).stop_reason == "new-question"
    process.wait(TextDelta, request="q")
    process.send(SetInstruction(instruction_id=1, text="Land."))
    assert process.wait(TextDelta, request="q", final=True).stop_reason == "new-instruction"
    process.wait(InstructionApplied, instruction_id=1)


def test_without_frames_it_shows_that_it_could(process):
    process.listen(0.2)
    idle = [event for event in process.listen(1.6) if event == Heartbeat("idle")]
    assert 1 <= len(idle) <= 2


def test_a_kill_is_noticed(start):
    process = start(instruct=False)
    process.wait(Heartbeat)
    os.kill(process.worker.process.pid, signal.SIGKILL)
    until_s = time.monotonic() + 2
    while process.worker.exit_status is None and time.monotonic() < until_s:
        time.sleep(0.01)
    assert process.worker.exit_status == -signal.SIGKILL
    process.worker.receive()
    assert not process.worker.send(encode(SetPaused(True)))


def test_it_leaves_when_the_supervisor_closes_its_end(start):
    process = start()
    process.worker.socket.close()
    assert process.worker.process.wait(3) == 0


@pytest.mark.parametrize("when", ["loading", "ready"])
def test_it_dies_with_its_parent(toy_bundle, when):
    parent = textwrap.dedent(f"""
        import sys, time
        from edge_agent.ipc import events
        from edge_agent.ipc.frame_slot import Slot
        from edge_agent.ipc.worker import Worker
        worker = Worker("edge_agent.model", Slot.create(), sys.stdin.buffer.read())
        kind = {"events.Heartbeat" if when == "loading" else "events.ModelReady"}
        while not any(isinstance(events.decode_model_event(p), kind) for p in worker.receive()):
            time.sleep(0.01)
        print(worker.process.pid, flush=True)
        time.sleep(60)
    """)
    with subprocess.Popen(
        [sys.executable, "-c", parent],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as process:
        process.stdin.write(encode(config_of(toy_bundle)))
        process.stdin.close()
        pid = int(process.stdout.readline())
        assert Path(f"/proc/{pid}/cmdline").read_bytes().count(b"edge_agent.model")
        process.kill()
        process.wait()
        until_s = time.monotonic() + 3
        while running(pid) and time.monotonic() < until_s:
            time.sleep(0.01)
    assert not running(pid)


def running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
