"""The start of the model process in this process: which errors become one line, and which end it with a traceback."""

from __future__ import annotations

import msgspec
import pytest

from edge_agent.bundle.memory_plan import MemoryPlan, NotEnoughMemoryError
from edge_agent.config import TaskConfig
from edge_agent.errors import BundleError, ConfigError, UserError
from edge_agent.ipc.events import StartupFailed, decode_model_event
from edge_agent.model import __main__ as entry
from edge_agent.model.llama import LlamaError
from edge_agent.model.prompt import InstructionRefused
from edge_agent.model.vision_encoder import VisionError
from tests.harness.rig import config_of, model_start


class Events:
    """The socket to the supervisor."""

    def __init__(self) -> None:
        self.sent: list = []

    def send(self, payload: bytes) -> None:
        self.sent.append(decode_model_event(payload))


@pytest.fixture
def events(monkeypatch, toy_bundle):
    """What main() sends when it is started on the toy bundle."""
    events, config = Events(), config_of(toy_bundle)
    monkeypatch.setattr(entry, "attach_to_supervisor", lambda: (None, events, model_start(config), False))
    return events


def fail_with(monkeypatch, error: Exception) -> None:
    def load(*_arguments: object, **_keywords: object) -> None:
        raise error

    monkeypatch.setattr(entry, "decode_action_space", load)


@pytest.mark.parametrize("error", [ValueError("array is too big"), TypeError("no"), RuntimeError("native")])
def test_an_unexpected_error_keeps_its_traceback(monkeypatch, events, error):
    """A defect in one line says nothing: numpy's ValueError was once taken for an error of the user's."""
    fail_with(monkeypatch, error)
    with pytest.raises(type(error), match=str(error)):
        entry.main()
    assert not any(isinstance(event, StartupFailed) for event in events.sent)


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (ConfigError("key: wrong"), "configuration"),
        (BundleError("bundle.json: wrong"), "bundle"),
        (BundleError("language.gguf: too many open files", "machine"), "machine"),
        (InstructionRefused("too long"), "instruction"),
        (NotEnoughMemoryError("no memory"), "memory"),
        (LlamaError("no GPU memory"), "native"),
        (VisionError("no CUDA"), "native"),
        (UserError("something"), "native"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_an_error_for_the_user_is_one_line(monkeypatch, events, error, fault):
    fail_with(monkeypatch, error)
    assert entry.main() == 1
    assert events.sent == [StartupFailed(reason=str(error), fault=fault)]


def test_an_instruction_that_does_not_fit_a_reduced_context_may_fit_later(monkeypatch, events):
    """The memory plan reduced the context: with more free memory, another start succeeds."""
    planned = MemoryPlan(config_of("none"), {}, {"language.context": 640})
    monkeypatch.setattr(entry, "plan_memory", lambda *_arguments: planned)
    fail_with(monkeypatch, InstructionRefused("too long"))
    assert entry.main() == 1
    assert events.sent[-1] == StartupFailed(reason="too long", fault="instruction-reduced")


def test_an_action_space_without_a_grammar_is_an_error_of_the_configuration(monkeypatch, toy_bundle, tmp_path):
    space = tmp_path / "space.yaml"
    space.write_text("name: s\nvalid_for_ms: 100\nactions: {go: {fields: {v: {min: -9, max: 9, step: 1}}}}\n")
    monkeypatch.setattr(
        "edge_agent.model.load.json_schema", lambda space: {"type": "number", "minimum": 2, "maximum": 1}
    )
    events, config = (
        Events(),
        msgspec.structs.replace(config_of(toy_bundle), task=TaskConfig(action_space=str(space), deadline_ms=1000)),
    )
    monkeypatch.setattr(entry, "attach_to_supervisor", lambda: (None, events, model_start(config), False))
    assert entry.main() == 1
    assert isinstance(events.sent[-1], StartupFailed) and events.sent[-1].fault == "configuration"
    assert events.sent[-1].reason.startswith("cannot compile a grammar for this action space: ")
