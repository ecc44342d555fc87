"""A flood of instructions does not end every answer, and no action leaves under an instruction that is not in force."""

from __future__ import annotations

import pytest

from edge_agent.config import LanguageConfig
from edge_agent.ipc.events import InstructionApplied, SetInstruction
from edge_agent.supervisor.control import REPLACED
from edge_agent.supervisor.waiting_changes import MAX_CHANGES, MAX_WAIT_NS
from edge_agent.wire.messages import Action
from tests.harness.in_process import InProcess, commands, fake_config, request


@pytest.fixture
def running():
    with InProcess(fake_config(language=LanguageConfig(adapters={"night": "night.gguf"}))) as supervised:
        supervised.make_ready()
        yield supervised


def texts_sent(running: InProcess) -> list[str | None]:
    return [command.text for command in commands(running, SetInstruction)][1:]  # without the one at the start


def apply_all(running: InProcess, n_applied: int) -> int:
    """The model process takes the changes that it got, each of which cancels the answer in progress. How many."""
    sent = commands(running, SetInstruction)
    in_force = running.supervisor.control_state.instruction
    for command in sent[1 + n_applied :]:
        text = in_force.text if command.text is None else command.text
        adapter = in_force.adapter if command.adapter is None else command.adapter
        running.model.emit(InstructionApplied(instruction_id=command.instruction_id, text=text, adapter=adapter))
        running.turn()
        in_force = running.supervisor.control_state.instruction
    return len(sent) - 1


def replies(running: InProcess) -> dict[str, str]:
    return {reply.id: reply.error for reply in running.publisher.replies}


def test_a_controller_that_corrects_itself_is_not_delayed(running):
    for n in range(MAX_CHANGES):
        request(running, "instruct", f"Go {n}.")
    assert texts_sent(running) == [f"Go {n}." for n in range(MAX_CHANGES)]


def flood(running: InProcess, n: int) -> list[str]:
    """So many different instructions, one a turn. Their ids."""
    ids = []
    for number in range(n):
        ids.append(running.publisher.request("instruct", f"Go {number}."))
        running.turn()
    return ids


def test_a_flood_waits_for_an_answer_and_the_newest_one_wins(running):
    ids = flood(running, 100)
    assert len(texts_sent(running)) == MAX_CHANGES
    refused = replies(running)
    assert set(refused) == set(ids[MAX_CHANGES:-1]) and set(refused.values()) == {REPLACED}
    applied = apply_all(running, 0)
    assert len(texts_sent(running)) == MAX_CHANGES, "no frame was answered yet"
    running.answer()
    assert isinstance(running.publisher.stream("actions")[-1], Action)
    running.turn()
    assert texts_sent(running)[MAX_CHANGES:] == ["Go 99."]
    apply_all(running, applied)
    assert replies(running)[ids[-1]] == ""
    assert running.supervisor.control_state.instruction.text == "Go 99."


def test_actions_go_on_under_a_flood_that_does_not_end(running):
    """A model that drops its answer for each change, and needs three turns of the loop for one."""
    applied = n_cancelled = turns_at_work = 0
    n_before = len(running.publisher.stream("actions"))
    for n in range(400):
        running.publisher.request("instruct", f"Fly to {n} m.")
        running.turn(0.01)
        now_applied = apply_all(running, applied)
        turns_at_work = 0 if now_applied > applied else turns_at_work + 1
        n_cancelled += now_applied - applied
        applied = now_applied
        if turns_at_work == 3:
            turns_at_work = 0
            running.answer()
            published = running.publisher.stream("actions")[-1]
            assert isinstance(published, Action)
            assert published.instruction == running.supervisor.control_state.instruction.text
    assert len(running.publisher.stream("actions")) - n_before >= 50 and n_cancelled >= 50


@pytest.mark.parametrize("stop_reason", ["cancelled", ""])
def test_an_answer_under_an_older_instruction_releases_nothing_and_is_no_action(running, stop_reason):
    before = running.supervisor.control_state.instruction.number
    flood(running, MAX_CHANGES + 1)
    apply_all(running, 0)
    running.answer(instruction_id=before, stop_reason=stop_reason)
    running.turn()
    assert running.publisher.stream("actions")[-1].reason == "stale-instruction"
    assert len(texts_sent(running)) == MAX_CHANGES


@pytest.mark.parametrize("what", ["late", "invalid"])
def test_a_refusal_of_the_answer_itself_is_an_answer(running, what):
    flood(running, MAX_CHANGES + 1)
    apply_all(running, 0)
    running.answer(stop_reason="late") if what == "late" else running.answer(text="no")
    running.turn()
    assert len(texts_sent(running)) == MAX_CHANGES + 1


def test_no_change_waits_for_ever(running):
    for _ in range(3):  # each newer one takes the place and the time of the one before
        flood(running, MAX_CHANGES + 1)
        running.turn(MAX_WAIT_NS / 4e9)
        running.push_frame()
        assert len(texts_sent(running)) == MAX_CHANGES
    running.turn(MAX_WAIT_NS / 2e9)
    running.turn()
    assert len(texts_sent(running)) == MAX_CHANGES + 1


def pause(running: InProcess) -> None:
    request(running, "pause")


def lose_the_camera(running: InProcess) -> None:
    running.turn(10.0)


@pytest.mark.parametrize("end", [pause, lose_the_camera])
def test_without_answers_to_lose_nothing_waits(running, end):
    flood(running, MAX_CHANGES + 1)
    end(running)
    running.turn()
    assert len(texts_sent(running)) == MAX_CHANGES + 1
    request(running, "instruct", "At once.")
    assert texts_sent(running)[-1] == "At once."


def test_instructions_and_adapters_do_not_replace_each_other(running):
    flood(running, MAX_CHANGES)
    running.publisher.request("instruct", "Land.", "land")
    running.publisher.request("adapter", "night", "night")
    running.publisher.request("adapter", "", "none")
    running.turn()
    assert replies(running) == {"night": REPLACED}
    apply_all(running, 0)
    running.answer()
    running.turn()
    last = commands(running, SetInstruction)[-2:]
    assert [(command.text, command.adapter) for command in last] == [("Land.", None), (None, "")]


def test_the_instruction_in_force_given_again_ends_the_one_that_waits(running):
    """The newest wins, also if it is the oldest."""
    flood(running, MAX_CHANGES)
    apply_all(running, 0)
    running.publisher.request("instruct", "Land.", "land")
    in_force = running.supervisor.control_state.instruction.text
    running.publisher.request("instruct", in_force, "stay")
    running.turn()
    assert replies(running)["land"] == REPLACED and "stay" not in replies(running)
    running.answer()
    running.turn()
    assert replies(running)["stay"] == "" and texts_sent(running)[MAX_CHANGES:] == []


def test_a_change_whose_sender_has_given_up_is_not_carried_out(running):
    flood(running, MAX_CHANGES)
    running.publisher.request("instruct", "Take off.", "late", expires_ns=running.clock.now_ns + 10**9)
    running.turn()
    apply_all(running, 0)
    running.clock.advance(1.5)
    running.answer()
    running.turn()
    assert replies(running)["late"].startswith("expired 500 ms ago")
    assert "Take off." not in texts_sent(running)


def test_a_lost_model_process_ends_the_changes_that_wait(running):
    flood(running, MAX_CHANGES)
    running.publisher.request("instruct", "Land.", "land")
    running.turn()
    running.end_model_process()
    assert "the model process was lost" in replies(running)["land"]
    running.turn(6.0)
    running.push_frame()
    running.load_model()
    assert [command.text for command in commands(running, SetInstruction)] == ["Hold position."]
    flood(running, MAX_CHANGES)
    assert len(texts_sent(running)) == MAX_CHANGES, "the new process has a count of its own"
