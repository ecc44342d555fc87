"""The loop of the model process, turn by turn in this process with a real engine: each turn is one step() of the
test."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_agent.actions.envelope import CheckedAction, parse_answer
from edge_agent.actions.space import load_action_space
from edge_agent.config import AdvancedConfig, LanguageConfig
from edge_agent.ipc.events import (
    AskQuestion,
    CancelQuestion,
    Heartbeat,
    InstructionApplied,
    Proposal,
    SetInstruction,
    SetPaused,
    TextDelta,
    TraceSpan,
)
from edge_agent.model.loop import HEARTBEAT_NS
from edge_agent.model.token_budget import TokenBudget
from edge_agent.suspend import SuspendDetector
from edge_agent.wire.codec import encode
from tests.harness.clock import FakeClock
from tests.harness.loop_rig import MS, LoopRig
from tests.harness.rig import TASK, numbers_only


@pytest.fixture
def make(toy_bundle: Path) -> Iterator[Callable[..., LoopRig]]:
    """make(space, changes of the configuration) -> LoopRig, closed afterwards."""
    rigs: list[LoopRig] = []

    def make(*arguments: str, **options: object) -> LoopRig:
        rigs.append(LoopRig(toy_bundle, *arguments, **options))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


@pytest.fixture(scope="module")
def shared_loop(toy_bundle: Path) -> Iterator[LoopRig]:
    rig = LoopRig(toy_bundle)
    yield rig
    rig.close()


@pytest.fixture
def rig(shared_loop: LoopRig) -> LoopRig:
    """The shared loop with an instruction, no text, no frame and no events."""
    shared_loop.send(SetPaused(False))
    shared_loop.instruct()
    shared_loop.step()
    shared_loop.events.clear()
    shared_loop.waits = 0
    return shared_loop


# -- frames -----------------------------------------------------------------------------------------------------------


def test_without_an_instruction_no_frame_is_answered(make):
    rig = make()
    rig.publish(1)
    assert rig.step(3) == [] and rig.waits == 3
    assert rig.instruct(7) == InstructionApplied(instruction_id=7, text=TASK, adapter="")
    assert [event.instruction_id for event in rig.events if isinstance(event, Proposal)] == [7]


def test_a_proposal_has_the_number_and_the_time_of_its_frame(rig):
    space = load_action_space("velocity_body")
    for n, clock in enumerate(("driver", "arrival", "sender")):
        rig.events.clear()
        captured_ns = rig.publish(1000 + 7 * n, age_ms=30, seed=n, clock=clock)
        rig.step()
        (proposal,) = rig.proposals()
        assert (proposal.frame_id, proposal.t_capture_ns, proposal.capture_clock) == (1000 + 7 * n, captured_ns, clock)
        assert (proposal.frame_seq, proposal.instruction_id, proposal.stop_reason) == (rig.slot.latest_seq, 0, "")
        assert isinstance(parse_answer(proposal.text, space), CheckedAction)
        assert proposal.stages_ms.queue == 30 and proposal.stages_ms.check == 0
        deltas = [event for event in rig.events if isinstance(event, TextDelta)]
        assert "".join(delta.text for delta in deltas) == proposal.text and deltas[-1].final


def test_the_newest_frame_is_answered_once(rig):
    for frame_id in range(1, 100):
        rig.publish(frame_id, seed=frame_id % 3)
        if frame_id % 10 == 0:
            rig.step()
    rig.step(3)
    assert [proposal.frame_id for proposal in rig.proposals()] == [*range(10, 100, 10), 99]
    assert rig.waits == 2, "nothing was left to do"


def test_a_frame_after_its_deadline_is_a_late_proposal_without_text(rig):
    proposal = rig.propose(3, age_ms=60_001)
    assert (proposal.frame_id, proposal.stop_reason, proposal.text) == (3, "late", "")
    assert proposal.stages_ms.prefill == proposal.stages_ms.decode == 0
    assert rig.propose(4).stop_reason == ""


def test_embeddings_that_are_ready_after_the_deadline_are_not_evaluated(rig, monkeypatch):
    n_calls, real = rig.model.engine.llama.n_calls, rig.model.images.encode
    monkeypatch.setattr(rig.model.images, "encode", lambda image: (rig.clock.advance_ms(60_001), real(image))[1])
    assert rig.propose(1).stop_reason == "late"
    assert rig.model.engine.llama.n_calls == n_calls


def test_measured_times_of_answers_reduce_the_image_tokens(rig, monkeypatch):
    """The proposal's times reach the token budget."""
    recorded, real = [], rig.frames.record
    monkeypatch.setattr(
        rig.frames, "record", lambda encoded, *ms: (recorded.append((encoded.n_tokens, *ms)), real(encoded, *ms))[1]
    )
    proposal = rig.propose(1)
    assert recorded == [(recorded[0][0], proposal.stages_ms.prefill, proposal.stages_ms.decode)]


# -- commands ---------------------------------------------------------------------------------------------------------


def test_a_new_instruction_counts_from_the_next_frame_and_a_refused_one_changes_nothing(rig):
    assert rig.instruct(1, "Land on the blue square.") == InstructionApplied(
        instruction_id=1, text="Land on the blue square.", adapter=""
    )
    assert rig.propose(1).instruction_id == 1
    refused = rig.instruct(2, "Look. " * 1000)
    assert refused.instruction_id == 2 and "language.context" in refused.error
    assert refused.text == "Land on the blue square."
    assert rig.propose(2).instruction_id == 1


def test_an_adapter_changes_the_answer_and_back(make, switchable):
    """The same frame before, under and after the adapter; the instruction stays."""
    language = LanguageConfig(context=1024, gpu_layers=0, adapters={"night": str(switchable)})
    rig, answers = make(language=language), []
    rig.instruct()
    for n, name in enumerate(("", "night", "")):
        applied = rig.instruct(n + 1, text=None, adapter=name)
        assert applied == InstructionApplied(instruction_id=n + 1, text=TASK, adapter=name)
        proposal = rig.propose(n + 1, seed=4)
        assert (proposal.instruction_id, proposal.stop_reason) == (n + 1, "")
        answers.append(proposal.text)
    assert answers[0] == answers[2] != answers[1]


def test_while_paused_there_is_no_proposal(rig):
    assert rig.propose(1).frame_id == 1
    rig.send(SetPaused(True))
    for frame_id in range(2, 8):
        rig.publish(frame_id)
        rig.step()
    assert [proposal.frame_id for proposal in rig.proposals()] == [1]
    rig.send(SetPaused(False))
    rig.publish(8)
    rig.step()
    assert [proposal.frame_id for proposal in rig.proposals()] == [1, 8]


@pytest.mark.parametrize("command", [SetPaused(True), SetInstruction(instruction_id=1, text="Land.")])
def test_an_answer_is_abandoned_for_an_urgent_command_and_not_for_a_question(make, tmp_path, monkeypatch, command):
    """The commands arrive between two steps of the answer."""
    rig = make(numbers_only(tmp_path), advanced=AdvancedConfig(speculative=False))
    rig.instruct()
    replies, real = [], rig.channel.has_urgent

    def has_urgent() -> bool:
        replies.append(real())
        if len(replies) == 1:
            rig.send(AskQuestion("q", "What?"))
        if len(replies) == 2:
            rig.send(command)
        return replies[-1]

    monkeypatch.setattr(rig.channel, "has_urgent", has_urgent)
    assert rig.propose(1).stop_reason == "cancelled"
    assert replies == [False, False, True]
    rig.step()
    assert rig.loop.paused or rig.loop.instruction_id == 1, "the command was applied"
    started = [event for event in rig.events if isinstance(event, TextDelta) and event.request == "q"]
    assert started or rig.channel.pending_questions, "the question was not lost"


def test_the_end_of_the_socket_ends_the_loop(make):
    rig = make()
    rig.supervisor.shutdown(socket.SHUT_RDWR)
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        rig.step()


# -- vehicle state ----------------------------------------------------------------------------------------------------


def test_the_vehicle_state_is_read_when_the_frame_is_answered(make, tmp_path, monkeypatch):
    (tmp_path / "climb.yaml").write_text(
        "name: climb\nvalid_for_ms: 500\nactions: {up: {}, down: {}}\n"
        "vehicle_state: {text: 'At {altitude_m}. ', values: {altitude_m: {unit: m, max_age_ms: 200}}}\n"
    )
    rig, states = make(str(tmp_path / "climb.yaml")), []
    real = rig.model.engine.prompt.closing_embeddings
    monkeypatch.setattr(
        rig.model.engine.prompt, "closing_embeddings", lambda state="": (states.append(state), real(state))[1]
    )
    rig.instruct()
    rig.propose(1)
    rig.slot.write_vehicle_state(encode({"altitude_m": (3.25, rig.clock.now_ns)}))
    rig.propose(2)
    rig.clock.advance_ms(201)
    rig.propose(3)
    assert states == ["At unknown. ", "At 3.2 m. ", "At unknown. "]
    boottime = FakeClock()
    rig.loop.suspend = SuspendDetector(rig.clock, boottime)
    rig.slot.write_vehicle_state(encode({"altitude_m": (3.25, rig.clock.now_ns)}))
    boottime.advance_ms(5_000)  # the machine sleeps
    rig.clock.advance_ms(1)
    rig.propose(4)
    rig.slot.write_vehicle_state(encode({"altitude_m": (1.25, rig.clock.now_ns)}))
    rig.propose(5)
    assert states[3:] == ["At unknown. ", "At 1.2 m. "], "a value from before a suspend is not known any more"


# -- texts ------------------------------------------------------------------------------------------------------------


def test_a_question_is_answered_about_the_newest_frame(rig):
    rig.propose(5)
    rig.send(AskQuestion("q1", "What do you see?"))
    deltas = rig.deltas_of("q1")
    assert {delta.lane for delta in deltas} == {"answer"} and {delta.frame_id for delta in deltas} == {5}
    assert "".join(delta.text for delta in deltas) and deltas[-1].stop_reason == "length"
    for request in ("q2", "q3"):
        rig.send(AskQuestion(request, "And now?"))
    assert rig.deltas_of("q2") and rig.deltas_of("q3")


def test_a_question_while_paused_is_answered_about_the_newest_frame_without_a_proposal(rig):
    rig.propose(1)
    rig.send(SetPaused(True))
    rig.publish(2, seed=2)
    rig.send(AskQuestion("q", "What do you see?"))
    assert {delta.frame_id for delta in rig.deltas_of("q")} == {2}
    assert [proposal.frame_id for proposal in rig.proposals()] == [1]


def test_a_question_that_does_not_fit_costs_only_its_answer(rig):
    """The supervisor accepts 2000 characters."""
    rig.propose(1)
    rig.send(AskQuestion("long", "What? " * 333))
    (refused,) = rig.deltas_of("long")
    assert refused.final and refused.error.startswith("the question has ")
    assert rig.propose(2).stop_reason == ""
    rig.send(AskQuestion("short", "What?"))
    assert "".join(delta.text for delta in rig.deltas_of("short"))


def test_between_two_frames_at_most_one_token_of_text_is_decoded(rig):
    rig.propose(1)
    rig.send(AskQuestion("q", "What do you see?"))
    rig.step()
    generation = rig.model.engine.text.generation
    for frame_id in (2, 3, 4):
        n_tokens = generation.n_tokens
        assert rig.propose(frame_id).stop_reason == ""
        assert generation.n_tokens == n_tokens + 1
    assert {delta.frame_id for delta in rig.deltas_of("q")} == {1}


def test_a_question_that_nobody_waits_for_ends_and_the_next_one_begins(rig):
    rig.propose(1)
    for request in ("first", "second", "third"):
        rig.send(AskQuestion(request, "What do you see?"))
    rig.step(2)
    assert rig.model.engine.text.request == "first"
    for request in ("first", "second", "never asked"):
        rig.send(CancelQuestion(request))
    rig.step()
    ends = {
        delta.request: delta.stop_reason
        for delta in rig.events
        if isinstance(delta, TextDelta) and delta.final and delta.request
    }
    assert ends == {"first": "cancelled"}
    assert rig.model.engine.text.request == "third"


def test_a_cancelled_question_does_not_end_the_answer_to_a_frame(rig):
    rig.send(CancelQuestion("q"))
    assert not rig.channel.has_urgent()
    assert rig.propose(1).stop_reason == ""


def test_a_description_is_written_once_per_frame_and_gives_way_to_a_question(make):
    language = LanguageConfig(context=1024, gpu_layers=0, max_text_tokens=30, describe_prompt="Describe it.")
    rig = make(language=language)
    rig.instruct()
    rig.propose(1)
    rig.step(40)
    assert rig.model.engine.text.idle, "one frame, one description"
    rig.propose(2)
    rig.step(2)
    rig.send(AskQuestion("q", "What is it?"))
    rig.step()
    described = [event for event in rig.events if isinstance(event, TextDelta) and event.lane == "describe"]
    ends = [(delta.frame_id, delta.stop_reason) for delta in described if delta.final]
    assert ends == [(1, "length"), (2, "new-question")]
    rig.send(SetInstruction(instruction_id=1, text="Land."))
    rig.step()
    assert rig.deltas_of("q")[-1].stop_reason == "new-instruction"


# -- without work -----------------------------------------------------------------------------------------------------


def test_without_frames_a_real_decode_step_is_the_heartbeat(make, monkeypatch):
    rig = make()
    rig.instruct()
    del rig.loop._wait  # the real one
    monkeypatch.setattr("edge_agent.model.loop.HEARTBEAT_NS", 10 * MS)  # how long the real poll() waits
    n_calls = rig.model.engine.llama.n_calls
    assert rig.step() == [Heartbeat("idle")]
    assert rig.model.engine.llama.n_calls == n_calls + 1


def test_a_command_ends_the_wait_and_a_heartbeat_comes_only_when_it_is_due(make):
    rig = make()
    rig.instruct()
    del rig.loop._wait
    rig.send(SetPaused(True))
    rig.loop._wait()
    assert rig.received() == []
    rig.clock.advance_ms(HEARTBEAT_NS / MS + 1)
    rig.loop._wait()
    assert rig.received() == [Heartbeat("idle")]


# -- timeline ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trace", [False, True])
def test_spans_are_sent_only_for_a_timeline(make, trace):
    rig = make(trace=trace)
    rig.instruct()
    rig.propose(1)
    spans = [event for event in rig.events if isinstance(event, TraceSpan)]
    expected = {"frame 1 waits", "resize", "encode", "prefill", "decode"} if trace else set()
    assert {span.name for span in spans} == expected
    assert all(span.start_ns <= span.stop_ns for span in spans)


# -- late frames, no instruction --------------------------------------------------------------------------------------


def test_a_frame_whose_encoding_alone_is_late_counts_for_the_token_budget(rig, monkeypatch):
    """Otherwise every frame would be late for ever, although a smaller one would be in time."""
    real = rig.model.images.encode

    def slow(image):
        rig.clock.advance_ms(1000 * rig.model.images.n_tokens(image))
        return real(image)

    monkeypatch.setattr(rig.model.images, "encode", slow)
    monkeypatch.setattr(rig.frames, "_deadline_ms", 20_000.0)  # the frame has 30 tokens, and takes 30 s
    rig.frames.budget = TokenBudget.of(64)  # nothing was measured yet
    assert rig.propose(1).stop_reason == "late"
    assert rig.frames.budget.per_token_ms > 0


def test_without_an_instruction_a_frame_does_not_wake_the_loop(make):
    """Nobody would take the frame, and the loop would turn without a pause."""
    waiting = make()
    waiting.publish(1)
    assert not waiting.loop._needs_frame
    waiting.instruct()
    assert waiting.loop._needs_frame


def test_text_continues_beside_frames_that_are_late(rig):
    rig.propose(1)
    rig.send(AskQuestion("q", "What is there?"))
    rig.step()
    before = len(rig.events)
    for frame_id in range(2, 8):
        rig.publish(frame_id, age_ms=60_001)
        rig.step()
    assert any(isinstance(event, TextDelta) and event.request == "q" for event in rig.events[before:])
