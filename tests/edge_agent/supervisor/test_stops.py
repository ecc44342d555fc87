"""What a reply to a request proves, for controllers that repeat, restart, reconnect, give up and share ids.

An acknowledged stop has stopped: after the reply to pause, no action is published before a resume.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from edge_agent.ipc.events import AskQuestion, CancelQuestion, SetInstruction, TextDelta
from edge_agent.supervisor.control import ASK_TIMEOUT_S, MAX_PENDING_REQUESTS, NOT_KEPT
from edge_agent.supervisor.pause_file import keep_pause, was_paused
from edge_agent.supervisor.shutdown import Shutdown
from edge_agent.wire.control import Operation
from edge_agent.wire.messages import Action
from tests.harness.in_process import InProcess, commands, request


@pytest.fixture
def running():
    with InProcess() as supervised:
        supervised.make_ready()
        yield supervised


def n_actions(running: InProcess) -> int:
    return sum(isinstance(message, Action) for message in running.publisher.stream("actions"))


# -- the same id again ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", ["resume", "stats", "pause", "instruct"])
def test_a_pause_pauses_whatever_its_id_was_used_for_before(running, before):
    """A controller that is restarted counts its ids from 1 again."""
    request(running, before, "Hold position.", request_id="1")
    request(running, "resume", request_id="2")
    assert request(running, "pause", request_id="1").result == {"paused": True}
    running.answer()
    assert running.publisher.stream("actions")[-1].reason == "paused"
    assert request(running, "resume", request_id="1").result == {"paused": False}


def test_a_repeated_instruction_is_in_force_after_another_one(running):
    """Its reply is not the old one: that would be wrong now."""
    for text in ("Land.", "Search.", "Land."):
        assert request(running, "instruct", text, request_id="1") is None
        running.apply_instruction()
        assert running.publisher.replies[-1].result["instruction"] == text
        assert running.supervisor.control_state.instruction.text == text


@pytest.mark.parametrize("between", [0, 1, 300])
def test_an_instruction_that_is_in_force_is_not_given_again(running, between):
    """A controller that sends its instruction at every turn does not stop the answers to frames."""
    request(running, "instruct", "Land.")
    running.apply_instruction()
    n_commands, number = len(commands(running, SetInstruction)), running.supervisor.control_state.instruction.number
    for _ in range(between):
        assert request(running, "stats").ok
    assert request(running, "instruct", "Land.").result == {"instruction": "Land.", "adapter": ""}
    assert request(running, "adapter", "").result == {"instruction": "Land.", "adapter": ""}
    assert len(commands(running, SetInstruction)) == n_commands
    running.answer(instruction_id=number)
    assert isinstance(running.publisher.stream("actions")[-1], Action)


def test_two_controllers_may_use_the_same_id(running):
    running.publisher.request("ask", "one?", request_id="same", sender=b"a")
    running.publisher.request("ask", "two?", request_id="same", sender=b"b")
    running.turn()
    one, two = commands(running, AskQuestion)
    answer(running, two, "second")
    answer(running, one, "first")
    assert [reply.result["text"] for reply in running.publisher.replies[-2:]] == ["second", "first"]
    assert running.publisher.reply_senders[-2:] == [b"b", b"a"]


def test_a_question_that_is_repeated_while_it_waits_is_asked_once(running):
    assert request(running, "ask", "what?", request_id="q") is None
    assert request(running, "ask", "what?", request_id="q") is None
    (question,) = commands(running, AskQuestion)
    n_replies = len(running.publisher.replies)
    answer(running, question, "a pad")
    assert len(running.publisher.replies) == n_replies + 1
    assert request(running, "ask", "what?", request_id="q") is None, "after its answer it is a new question"
    assert len(commands(running, AskQuestion)) == 2


def test_a_question_is_known_by_its_connection_too(running):
    """A restarted controller with the same routing id asks its own first question."""
    request(running, "ask", "what?", request_id="1", sender=b"old")
    assert request(running, "ask", "who?", request_id="1", sender=b"new") is None
    assert request(running, "cancel", "1", sender=b"another").result == {"cancelled": False}
    assert [asked.question for asked in commands(running, AskQuestion)] == ["what?", "who?"]


def test_a_repeated_question_needs_no_other_place(running):
    """All places are taken, and the repeated question has one of them."""
    for n in range(MAX_PENDING_REQUESTS):
        request(running, "ask", "what?", request_id=str(n))
    assert request(running, "ask", "what?", request_id="3") is None
    question = commands(running, AskQuestion)[3]
    answer(running, question, "a pad")
    assert (running.publisher.replies[-1].id, running.publisher.replies[-1].ok) == ("3", True)


def test_another_question_with_the_id_of_one_in_progress_is_refused_by_name(running):
    request(running, "ask", "what?", request_id="q")
    assert (
        "id 'q': another question with this id is in progress" in request(running, "ask", "who?", request_id="q").error
    )
    assert len(commands(running, AskQuestion)) == 1


# -- requests that nobody waits for any more --------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["resume", "instruct", "ask", "adapter", "stats", "vehicle_state"])
def test_a_request_whose_sender_has_given_up_is_not_carried_out(running, op):
    """It lay in a socket while the supervisor was stopped. A resume from before must not undo the pause after it."""
    request(running, "pause")
    now_ns = running.clock()
    n_commands = len(running.model.commands)
    reply = request(running, op, "x", expires_ns=now_ns - 2_000_000)
    assert "expired 2 ms ago" in reply.error
    assert running.supervisor.control_state.paused and len(running.model.commands) == n_commands


def test_a_request_in_time_is_carried_out(running):
    request(running, "pause")
    assert request(running, "resume", expires_ns=running.clock()).ok


def answer(running: InProcess, question: AskQuestion, text: str, stop_reason: str = "") -> None:
    fields = {"lane": "answer", "frame_id": 7, "request": question.request, "final": True}
    running.model.emit(TextDelta(text=text, stop_reason=stop_reason, **fields))
    running.turn()


def test_a_cancelled_question_ends_in_the_model_and_for_its_sender(running):
    request(running, "ask", "what?", request_id="q")
    (question,) = commands(running, AskQuestion)
    running.publisher.request("cancel", "q", request_id="c")
    running.turn()
    refused, done = running.publisher.replies[-2:]
    assert (refused.id, refused.ok, refused.error) == ("q", False, "cancelled by its sender")
    assert (done.id, done.result) == ("c", {"cancelled": True})
    assert commands(running, CancelQuestion) == [CancelQuestion(question.request)]
    last = running.publisher.stream("text")[-1]
    assert (last.request, last.final, last.stop_reason) == ("q", True, "cancelled")
    n_pieces, n_replies = len(running.publisher.stream("text")), len(running.publisher.replies)
    answer(running, question, "", "cancelled")  # the model's own last piece
    assert (len(running.publisher.stream("text")), len(running.publisher.replies)) == (n_pieces, n_replies)


@pytest.mark.parametrize("sender", [b"controller", b"another"])
def test_only_the_own_question_is_cancelled(running, sender):
    request(running, "ask", "what?", request_id="q")
    assert request(running, "cancel", "q" if sender == b"another" else "r", sender=sender).result == {
        "cancelled": False
    }
    assert commands(running, CancelQuestion) == []


def test_a_question_of_a_sender_that_is_gone_is_cancelled(running):
    request(running, "ask", "what?")
    running.publisher.gone.add(b"controller")
    running.turn()
    assert len(commands(running, CancelQuestion)) == 1


def test_a_question_that_is_not_answered_in_time_ends_in_the_model_too(running):
    request(running, "ask", "what?")
    for _ in range(round(ASK_TIMEOUT_S) + 1):
        running.clock.advance(1.0)
        running.answer()
    assert len(commands(running, CancelQuestion)) == 1


def test_the_end_of_questions_is_sent_when_the_model_takes_commands_again(running):
    for n in range(3):
        request(running, "ask", "what?", request_id=str(n))
    running.model.takes_messages = False
    for n in range(3):
        running.publisher.request("cancel", str(n))
    running.turn()
    assert commands(running, CancelQuestion) == []
    running.model.takes_messages = True
    running.turn()
    assert len(commands(running, CancelQuestion)) == 3
    running.turn()
    assert len(commands(running, CancelQuestion)) == 3


def test_a_cancelled_question_gives_its_place_to_another(running):
    for n in range(MAX_PENDING_REQUESTS):
        request(running, "ask", "what?", request_id=str(n))
    assert "waiting already" in request(running, "ask", "more?").error
    request_id = "3"
    running.publisher.request("cancel", request_id)
    running.turn()
    assert request(running, "ask", "more?") is None


# -- a restart --------------------------------------------------------------------------------------------------------


def test_a_pause_outlives_the_daemon_and_a_resume_too(tmp_path):
    for op, paused in (("pause", True), ("resume", False), ("pause", True), ("resume", False)):
        with InProcess(folder=tmp_path) as running:
            running.make_ready() if paused else None
            assert request(running, op).result == {"paused": paused}
        with InProcess(folder=tmp_path) as restarted:
            restarted.open_camera()
            restarted.load_model()
            restarted.answer()
            assert n_actions(restarted) == (0 if paused else 1)


def test_a_pause_file_that_cannot_be_written_or_read_is_on_the_safe_side(tmp_path, capfd):
    file = tmp_path / "file"
    file.touch()
    assert was_paused(file), "ENOTDIR: what cannot be read counts as a pause"
    assert not keep_pause(file, True) and not was_paused(tmp_path)
    assert "a restarted daemon will not know of this" in capfd.readouterr().err
    with InProcess(folder=file) as running:
        assert request(running, "resume").result == {"paused": False}, "a restart that is paused is on the safe side"
        running.make_ready()
        refused = request(running, "pause")
        assert (refused.ok, refused.error) == (False, NOT_KEPT)
        running.answer()
        assert running.publisher.stream("actions")[-1].reason == "paused"


def test_a_pause_that_could_not_be_kept_is_kept_when_it_is_repeated(tmp_path):
    """Its reply promises that the daemon stays paused over a restart: full disk, no folder, a folder made read-only."""
    folder = tmp_path / "removed"
    with InProcess(folder=folder) as running:
        assert not request(running, "pause").ok
        folder.mkdir()
        assert request(running, "pause").result == {"paused": True}
        assert was_paused(folder)


@pytest.mark.parametrize("end", [lambda running: running.end_model_process(), lambda running: None])
def test_status_says_paused_in_whatever_state(running, end):
    request(running, "pause")
    end(running)
    running.turn(seconds=1.0)
    assert running.publisher.stream("status")[-1].paused
    request(running, "resume")
    running.turn(seconds=1.0)
    assert not running.publisher.stream("status")[-1].paused


# -- everything together ----------------------------------------------------------------------------------------------

IDS = st.sampled_from(["1", "2", "3"])
SENDERS = st.sampled_from([b"a", b"b"])


class Stops(RuleBasedStateMachine):
    """Any order of requests, crashes and restarts. After an acknowledged pause, no action leaves before a resume.

    A resume counts from the moment it was sent: its effect may come before its reply.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.stopped = False
        self.n_actions = 0
        self.start()

    def start(self, is_loaded: bool = True) -> None:
        self.running = InProcess(folder=Path(self.folder.name))
        self.n_actions = 0
        if is_loaded:
            self.running.open_camera()
            self.running.load_model()
            self.running.answer()

    def teardown(self) -> None:
        self.running.close()
        self.folder.cleanup()

    def do(self, step: Callable[[], None]) -> None:
        try:
            step()
        except Shutdown:  # a source that never delivers, a model that never loads: systemd starts the daemon again
            self.daemon_ends(killed=False)

    def handle(self) -> None:
        self.do(self._handle)

    def _handle(self) -> None:
        n_replies = len(self.running.publisher.replies)
        self.running.turn()
        for reply in self.running.publisher.replies[n_replies:]:
            if reply.ok and reply.result.get("paused") is True:
                self.stopped = True
        if self.running.model is not None and self.running.supervisor.model.is_loaded:
            n_before = n_actions(self.running)
            self.running.answer()
            assert not self.stopped or n_actions(self.running) == n_before, "an action after an acknowledged stop"

    @rule(op=st.sampled_from(Operation.__args__), text=st.sampled_from(["", "Land.", "1", "2"]), request_id=IDS)
    def request(self, op: str, text: str, request_id: str) -> None:
        self._request(op, text, request_id, b"a")

    @rule(op=st.sampled_from(["pause", "resume"]), request_id=IDS, sender=SENDERS)
    def stop_or_go(self, op: str, request_id: str, sender: bytes) -> None:
        self._request(op, "", request_id, sender)

    @rule(op=st.sampled_from(["pause", "resume"]), request_id=IDS)
    def request_that_came_late(self, op: str, request_id: str) -> None:
        now_ns = self.running.clock()
        self.running.publisher.request(op, request_id=request_id, expires_ns=now_ns - 1)
        self.handle()

    def _request(self, op: str, text: str, request_id: str, sender: bytes) -> None:
        if op == "resume":
            self.stopped = False
        self.running.publisher.request(op, text, request_id=request_id, sender=sender)
        self.handle()

    @rule(first=st.sampled_from(["pause", "resume"]), second=st.sampled_from(["pause", "resume"]))
    def two_requests_in_one_turn(self, first: str, second: str) -> None:
        self.stopped &= "resume" not in (first, second)
        self.running.publisher.request(first, request_id="1", sender=b"a")
        self.running.publisher.request(second, request_id="1", sender=b"a")
        self.running.turn()
        self.stopped = second == "pause"

    @rule()
    def model_loads(self) -> None:
        if self.running.model is not None and not self.running.supervisor.model.is_loaded:
            self.do(self.running.load_model)

    @precondition(lambda self: self.running.model is not None and self.running.supervisor.model.is_loaded)
    @rule(takes_messages=st.booleans())
    def model_answers(self, takes_messages: bool) -> None:
        self.running.model.takes_messages = takes_messages
        self.do(self.running.answer)

    @precondition(lambda self: self.running.model is not None and self.running.supervisor.model.is_loaded)
    @rule()
    def model_applies_an_instruction(self) -> None:
        if any(isinstance(command, SetInstruction) for command in self.running.model.commands):
            self.do(self.running.apply_instruction)

    @precondition(lambda self: self.running.model is not None and self.running.supervisor.status.is_ready)
    @rule()
    def model_is_killed(self) -> None:
        self.do(self.running.end_model_process)

    @rule(seconds=st.sampled_from([0.01, 0.5, 6.0, 61.0]))
    def time_passes(self, seconds: float) -> None:
        self.running.push_frame()
        self.running.clock.advance(seconds)
        self.handle()

    @rule()
    def camera_opens(self) -> None:
        if self.running.camera is not None:
            self.running.open_camera()
            self.handle()

    @rule(killed=st.booleans(), is_loaded=st.booleans())
    def daemon_ends(self, killed: bool, is_loaded: bool = True) -> None:
        if not killed:
            self.running.supervisor.control.refuse_pending("the daemon was stopped")
        self.running.close()
        self.start(is_loaded)

    @rule()
    def controller_reconnects(self) -> None:
        self.running.publisher.gone ^= {b"a"}
        self.handle()

    @invariant()
    def no_action_after_a_stop(self) -> None:
        count = n_actions(self.running)
        assert not self.stopped or count == self.n_actions, "an action after an acknowledged stop"
        self.n_actions = count


TestStops = Stops.TestCase
TestStops.settings = settings(
    max_examples=15, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.soak
def test_an_acknowledged_stop_is_never_followed_by_an_action_in_100_000_steps():
    from hypothesis.stateful import run_state_machine_as_test

    many = settings(max_examples=1000, stateful_step_count=100, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(Stops, settings=many)
