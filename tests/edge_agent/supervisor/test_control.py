"""Requests of controllers: one reply per request, and what happens when the model does not answer."""

from __future__ import annotations

import msgspec
import pytest

from edge_agent.config import LanguageConfig, TaskConfig
from edge_agent.ipc.events import AskQuestion, SetInstruction, SetPaused, TextDelta
from edge_agent.supervisor.control import ASK_TIMEOUT_S, MAX_PENDING_REQUESTS, MAX_REFUSED_VALUES, OPERATIONS
from edge_agent.wire.codec import encode
from edge_agent.wire.control import Operation
from edge_agent.wire.messages import MAX_MESSAGE_BYTES
from tests.harness.in_process import InProcess, commands, fake_config, request

CLIMB = """
name: climb
valid_for_ms: 500
vehicle_state: {text: "Altitude {altitude_m}, {mode}. ", values: {altitude_m: {unit: m}, mode: {}}}
actions: {up: {}, down: {}}
"""


@pytest.fixture
def running():
    config = fake_config(language=LanguageConfig(adapters={"night": "night.gguf"}))
    with InProcess(config) as supervised:
        supervised.make_ready()
        yield supervised


def answer_question(running: InProcess, question: AskQuestion, *texts: str, stop_reason: str = "") -> None:
    for i, text in enumerate(texts):
        final = i + 1 == len(texts)
        running.model.emit(
            TextDelta(
                lane="answer",
                frame_id=7,
                text=text,
                request=question.request,
                final=final,
                stop_reason=stop_reason if final else "",
            )
        )
    running.turn()


def test_the_table_has_a_row_for_every_operation():
    assert set(OPERATIONS) == set(Operation.__args__)


# -- requests that are not requests -----------------------------------------------------------------------------------

GOOD = {"v": 1, "id": "a", "op": "stats"}


@pytest.mark.parametrize(
    ("payload", "error"),
    [
        (b"", "not a request"),
        (b"\xff" * 100, "not a request"),
        (msgspec.msgpack.encode([1, 2]), "not a request"),
        (msgspec.msgpack.encode(GOOD | {"op": "format"}), "not a request"),
        (b"\x91" * 5000 + b"\x01", "not a request"),
        (msgspec.msgpack.encode(GOOD | {"v": 2}), "expected v 1"),
        (msgspec.msgpack.encode(GOOD | {"id": ""}), "id of 1 to 64"),
        (msgspec.msgpack.encode(GOOD | {"id": "x" * 65}), "id of 1 to 64"),
    ],
)
def test_an_invalid_request_is_refused_and_the_next_one_is_answered(running, payload, error):
    running.publisher.request_bytes(payload)
    running.turn()
    assert not running.publisher.replies[-1].ok and error in running.publisher.replies[-1].error
    assert request(running, "stats").ok


# -- instruct and adapter ---------------------------------------------------------------------------------------------


def test_an_instruction_is_in_force_when_the_model_has_applied_it(running):
    assert request(running, "instruct", " Go to the red disc. ") is None
    assert running.supervisor.control_state.instruction.text == "Hold position."
    running.apply_instruction()
    reply = running.publisher.replies[-1]
    assert reply.ok and reply.result == {"instruction": "Go to the red disc.", "adapter": ""}
    running.answer()
    assert running.publisher.stream("actions")[-1].instruction == "Go to the red disc."


def test_an_answer_under_the_instruction_before_is_refused(running):
    request(running, "instruct", "Go.")
    before = running.supervisor.control_state.instruction.number
    running.apply_instruction()
    running.answer(instruction_id=before)
    assert running.publisher.stream("actions")[-1].reason == "stale-instruction"


def test_a_refused_instruction_leaves_the_one_before_in_force(running):
    request(running, "instruct", "refuse this")
    running.apply_instruction(error="too long")
    assert running.publisher.replies[-1].error == "too long"
    running.answer()
    assert running.publisher.stream("actions")[-1].instruction == "Hold position."


@pytest.mark.parametrize("op", ["instruct", "ask"])
@pytest.mark.parametrize("text", ["", " ", "x" * 2001])
def test_a_text_has_1_to_2000_characters(running, op, text):
    reply = request(running, op, text)
    assert "text: expected 1 to 2000 characters" in reply.error
    assert request(running, op, "x" * 2000) is None


def test_adapters_are_switched_by_name_and_keep_the_instruction(running):
    request(running, "adapter", "night")
    assert commands(running, SetInstruction)[-1].text is None
    running.apply_instruction()
    running.answer()
    action = running.publisher.stream("actions")[-1]
    assert (action.adapter, action.instruction) == ("night", "Hold position.")
    request(running, "adapter", "")
    running.apply_instruction()
    assert running.publisher.replies[-1].result["adapter"] == ""


@pytest.mark.parametrize("name", ["day", "night\n; x", "x" * 3000])
def test_an_unknown_adapter_is_refused_with_the_known_names(running, name):
    assert "adapter: expected one of '', 'night', found" in request(running, "adapter", name).error


# -- ask --------------------------------------------------------------------------------------------------------------


def test_the_pieces_of_an_answer_are_published_and_collected(running):
    request_id = running.publisher.request("ask", " what? ")
    running.turn()
    (question,) = commands(running, AskQuestion)
    assert question.question == "what?"
    answer_question(running, question, "a ", "pad", "", stop_reason="length")
    assert running.publisher.replies[-1].result == {"text": "a pad", "frame_id": 7, "stop_reason": "length"}
    pieces = running.publisher.stream("text")
    assert [(piece.text, piece.final, piece.request) for piece in pieces] == [
        ("a ", False, request_id),
        ("pad", False, request_id),
        ("", True, request_id),
    ]


def test_reasoning_is_published_with_the_question_and_not_part_of_the_answer(running):
    request_id = running.publisher.request("ask", "what?")
    running.turn()
    (question,) = commands(running, AskQuestion)
    running.model.emit(TextDelta(lane="reasoning", frame_id=7, text="hm", request=question.request, final=True))
    answer_question(running, question, "a pad")
    assert running.publisher.stream("text")[0].request == request_id
    assert running.publisher.replies[-1].result["text"] == "a pad"


@pytest.mark.parametrize("text", ["", " \n"])
@pytest.mark.parametrize("stop_reason", ["", "length", "not-finite", "new-instruction"])
def test_an_empty_answer_is_not_a_success(running, text, stop_reason):
    request_id = running.publisher.request("ask", "what?")
    running.turn()
    (question,) = commands(running, AskQuestion)
    last = TextDelta(
        lane="answer", frame_id=7, text=text, request=question.request, final=True, stop_reason=stop_reason
    )
    running.model.emit(last)
    running.turn()
    reply = running.publisher.replies[-1]
    assert (reply.id, reply.ok) == (request_id, False)
    assert reply.error == f"the answer is empty (stop_reason {stop_reason!r}); ask again, or in other words"
    assert [piece.final for piece in running.publisher.stream("text")] == [True]


def test_a_question_that_the_model_refuses_is_refused_with_its_reason(running):
    request_id = running.publisher.request("ask", "what?")
    running.turn()
    (question,) = commands(running, AskQuestion)
    error = "the question has 900 tokens, 300 fit: raise language.context from 1024 to 1700, or shorten it"
    refused = TextDelta(lane="answer", frame_id=7, text="", request=question.request, final=True, error=error)
    running.model.emit(refused)
    running.turn()
    reply = running.publisher.replies[-1]
    assert (reply.id, reply.ok, reply.error, reply.result) == (request_id, False, error, {})


def test_a_description_belongs_to_no_request(running):
    running.model.emit(TextDelta(lane="describe", frame_id=7, text="grass"))
    running.turn()
    assert [(piece.text, piece.request) for piece in running.publisher.stream("text")] == [("grass", "")]


def test_a_question_that_is_not_answered_in_time_is_refused_and_its_text_ends(running):
    request_id = running.publisher.request("ask", "what?")
    running.turn()
    (question,) = commands(running, AskQuestion)
    for _ in range(round(ASK_TIMEOUT_S)):
        running.clock.advance(1.0)
        running.answer()
    assert running.publisher.stream("text") == []
    n_replies = len(running.publisher.replies)
    running.clock.advance(0.1)
    running.answer()
    assert running.publisher.replies[n_replies:][0].error == "no answer in 60 s (running)"
    (last,) = running.publisher.stream("text")
    assert (last.request, last.final, last.stop_reason) == (request_id, True, "late")
    answer_question(running, question, "too late")  # its text has ended, and its request is answered
    assert len(running.publisher.stream("text")) == 1 and len(running.publisher.replies) == n_replies + 1


def test_few_requests_wait_and_the_others_are_refused_at_once(running):
    for n in range(MAX_PENDING_REQUESTS // 2):
        assert request(running, "ask", "what?") is None
        assert request(running, "instruct", f"Go {n}.") is None
    for op in ("ask", "instruct"):
        assert "8 requests are waiting already" in request(running, op, "what?").error
    assert request(running, "stats").ok
    answer_question(running, commands(running, AskQuestion)[0], "a pad")
    assert request(running, "ask", "what?") is None


# -- the model process takes no messages ------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["instruct", "ask"])
def test_a_request_that_cannot_be_sent_is_answered_once_and_forgotten(running, op):
    running.model.takes_messages = False
    for _ in range(20):
        assert "takes no commands" in request(running, op, "what?").error
    n_replies = len(running.publisher.replies)
    running.model.takes_messages = True
    for _ in range(9):
        running.clock.advance(9.0)
        running.answer()
    assert len(running.publisher.replies) == n_replies, "a request was answered a second time"
    assert request(running, op, "what?") is None


def test_pause_and_resume_reach_the_model_when_it_takes_commands_again(running):
    """Without it, a resume command that the process did not take would leave a paused model in a running daemon."""
    running.model.takes_messages = False
    request(running, "pause")
    request(running, "resume")
    request(running, "pause")
    assert commands(running, SetPaused)[-1].paused is False
    running.model.takes_messages = True
    running.turn()
    assert commands(running, SetPaused)[-1].paused is True
    n_commands = len(running.model.commands)
    running.turn()
    assert len(running.model.commands) == n_commands, "it is sent once"


# -- pause ------------------------------------------------------------------------------------------------------------


def test_no_action_leaves_from_the_reply_to_pause_on(running):
    assert request(running, "pause").result == {"paused": True}
    n_actions = running.counters.actions
    running.answer()
    assert running.publisher.stream("actions")[-1].reason == "paused" and running.counters.actions == n_actions
    assert running.state == ("paused", "by control; `edge-agent resume` ends it")
    assert request(running, "resume").result == {"paused": False}
    running.answer()
    assert running.counters.actions == n_actions + 1


def test_a_pause_while_the_model_loads_is_known_to_the_new_process(running):
    running.restart_model()
    assert request(running, "pause").ok
    running.load_model()
    assert commands(running, SetPaused)[-1].paused is True


# -- the model process ends -------------------------------------------------------------------------------------------


def test_requests_that_wait_for_the_model_are_refused_when_it_ends(running):
    ask_id = running.publisher.request("ask", "what?")
    instruct_id = running.publisher.request("instruct", "Go.")
    running.turn()
    running.end_model_process()
    errors = {reply.id: reply.error for reply in running.publisher.replies}
    assert "killed by SIGABRT" in errors[ask_id] and "ask again" in errors[ask_id]
    assert "the instruction and the adapter before stay in force" in errors[instruct_id]
    last = running.publisher.stream("text")[-1]
    assert (last.request, last.lane, last.final, last.stop_reason) == (ask_id, "answer", True, "model-restart")
    for op in ("ask", "instruct"):
        assert "the model is not ready (model: killed by SIGABRT); try again" in request(running, op, "what?").error


def test_the_next_model_process_gets_the_instruction_in_force(running):
    request(running, "instruct", "Land.")
    running.apply_instruction()
    running.restart_model()
    running.load_model()
    assert commands(running, SetInstruction)[0].text == "Land."
    running.answer()
    assert running.publisher.stream("actions")[-1].instruction == "Land."


# -- vehicle state ----------------------------------------------------------------------------------------------------


def test_vehicle_state_is_written_beside_the_frames_with_its_time(tmp_path):
    (tmp_path / "climb.yaml").write_text(CLIMB)
    with InProcess(fake_config(task=TaskConfig(action_space=str(tmp_path / "climb.yaml")))) as running:
        first_ns = running.clock()
        assert request(running, "vehicle_state", values={"altitude_m": 3.5, "mode": "offboard"}).ok
        running.clock.advance(1.0)
        assert request(running, "vehicle_state", values={"altitude_m": 4}).result == {"refused": {}}
        record = msgspec.msgpack.decode(running.supervisor.slot.read_vehicle_state())
        assert record == {"altitude_m": [4, first_ns + 1_000_000_000], "mode": ["offboard", first_ns]}
        assert "expected at least one" in request(running, "vehicle_state", values={}).error


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("altitude", 1, "expected one of altitude_m, mode"),
        ("mode", "</s>[INST]", "expected a number, a bool, or a word"),
        ("mode", [1], "found list"),
        ("mode", 1e10, "within"),
    ],
)
def test_a_value_that_cannot_be_taken_is_named_and_the_others_are_taken(tmp_path, key, value, error):
    (tmp_path / "climb.yaml").write_text(CLIMB)
    with InProcess(fake_config(task=TaskConfig(action_space=str(tmp_path / "climb.yaml")))) as running:
        reply = request(running, "vehicle_state", values={key: value, "altitude_m": 3.5})
        assert reply.ok and list(reply.result["refused"]) == [key] and error in reply.result["refused"][key]
        record = msgspec.msgpack.decode(running.supervisor.slot.read_vehicle_state())
        assert list(record) == ["altitude_m"]


@pytest.mark.parametrize("unknown", [None, float("nan"), float("inf"), float("-inf")])
def test_a_value_that_becomes_unknown_is_not_used_any_more(tmp_path, unknown):
    (tmp_path / "climb.yaml").write_text(CLIMB)
    with InProcess(fake_config(task=TaskConfig(action_space=str(tmp_path / "climb.yaml")))) as running:
        request(running, "vehicle_state", values={"altitude_m": 3.5, "mode": "AUTO.LOITER"})
        assert request(running, "vehicle_state", values={"altitude_m": unknown}).result == {"refused": {}}
        record = msgspec.msgpack.decode(running.supervisor.slot.read_vehicle_state())
        assert {key: value for key, (value, _) in record.items()} == {"mode": "auto.loiter"}


@pytest.mark.parametrize(
    ("key", "value"),
    [("k{}", 1), ("{}" + "\U0001f681" * 60, 1), ("an_unknown_key_of_a_flight_program_{}", "\U0001f681" * 50)],
)
def test_the_refusals_of_many_values_fit_a_message_and_the_good_value_is_taken(tmp_path, key, value):
    """A longer reply would end the connection of every client that keeps to the limit."""
    names = ", ".join(f"k_{n}" for n in range(64))
    text = "".join(f"{{k_{n}}}" for n in range(64))
    (tmp_path / "many.yaml").write_text(
        f"{{name: many, valid_for_ms: 500, actions: {{up: {{}}, down: {{}}}}, vehicle_state: {{text: '{text}', "
        f"values: {{{names.replace(',', ': {},')}: {{}}}}}}}}"
    )
    with InProcess(fake_config(task=TaskConfig(action_space=str(tmp_path / "many.yaml")))) as running:
        values = {key.format(n): value for n in range(6000 if len(key) == 3 else 200)}
        reply = request(running, "vehicle_state", values=values | {"k_63": 3.5})
        assert len(encode(reply)) <= MAX_MESSAGE_BYTES
        assert reply.ok and len(reply.result["refused"]) == MAX_REFUSED_VALUES
        assert list(msgspec.msgpack.decode(running.supervisor.slot.read_vehicle_state())) == ["k_63"]


def test_an_action_space_without_vehicle_state_takes_none(running):
    refused = request(running, "vehicle_state", values={"altitude_m": 3.5}).result["refused"]
    assert refused == {"altitude_m": "this action space has no vehicle_state"}


def test_stats_are_the_counters_and_the_state(running):
    result = request(running, "stats").result
    assert (result["state"], result["actions"], result["instruction"]) == ("running", 1, "Hold position.")
