"""The model process as a real child: it starts, answers, and ends with its supervisor."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from edge_agent.config import AdvancedConfig
from edge_agent.ipc.events import (
    Heartbeat,
    InstructionApplied,
    LogLine,
    ModelReady,
    Proposal,
    SetInstruction,
    SetPaused,
    decode_model_event,
)
from edge_agent.ipc.frame_slot import Slot
from edge_agent.ipc.image_grid import ImageRequest
from edge_agent.ipc.worker import Worker
from edge_agent.wire.codec import encode
from tests.harness import ROOT, toy
from tests.harness.rig import TASK, alive, config_of, model_start

HANG_S = 120.0  # bounds a hang; nothing is measured


class ProcessRig:
    """The supervisor's side of a real model process."""

    def __init__(self, folder: Path, **changes: object) -> None:
        self.slot = Slot.create()
        self.worker = Worker("edge_agent.model", self.slot, model_start(config_of(folder, **changes)))
        self.events: list = []
        self._n_taken = 0

    def close(self) -> None:
        self.worker.kill()
        self.worker.process.wait(HANG_S)
        self.slot.close()

    def send(self, command: object) -> None:
        assert self.worker.send(encode(command))

    def publish(self, frame_id: int) -> None:
        self.slot.write(120, 160)[:] = toy.toy_image(120, 160)
        self.slot.publish(frame_id, time.monotonic_ns(), "driver")

    def wait(self, kind: type):
        """The next event of this kind."""
        until_s = time.monotonic() + HANG_S
        while time.monotonic() < until_s:
            self.events += [decode_model_event(payload) for payload in self.worker.receive()]
            while self._n_taken < len(self.events):
                event = self.events[self._n_taken]
                self._n_taken += 1
                if isinstance(event, kind):
                    return event
            assert self.worker.exit_status is None, f"the model process ended: {self.events}"
            time.sleep(0.005)
        raise AssertionError(f"no {kind.__name__} but {self.events}")


@pytest.fixture
def start(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ProcessRig]]:
    """start(changes of the configuration) -> ProcessRig, killed afterwards."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    rigs: list[ProcessRig] = []

    def start(**changes: object) -> ProcessRig:
        rigs.append(ProcessRig(toy_bundle, **changes))
        return rigs[-1]

    yield start
    for rig in rigs:
        rig.close()


@pytest.mark.parametrize("overlap", [False, True])
def test_it_reports_loading_then_ready_and_answers_after_an_instruction(start, overlap):
    process = start(advanced=AdvancedConfig(overlap=overlap))
    ready = process.wait(ModelReady)
    stages = [event.what for event in process.events if isinstance(event, Heartbeat)]
    verified = [stage.split()[1] for stage in stages if stage.startswith("verify ")]
    assert verified == ["language.gguf", "vision.onnx"]
    stages = [stage for stage in stages if not stage.startswith("verify ")]
    assert stages[0].startswith("weights") and stages[-3:] == ["grammar", "vision", "warm-up"]
    assert (ready.vision, ready.language) == ("onnxruntime CPUExecutionProvider", "llama.cpp CPU")
    assert ready.load_s > 0 and ready.warmup_ms > 0
    wanted = msgspec.msgpack.decode(process.slot.read_image_request()[1], type=ImageRequest)
    assert (wanted.unit, wanted.max_tokens) == (28, 64), "what the camera process shall resize frames to"
    process.publish(1)
    process.wait(Heartbeat)  # a turn without work: the frame was not answered
    assert not any(isinstance(event, Proposal) for event in process.events)
    process.send(SetInstruction(instruction_id=7, text=TASK))
    assert process.wait(InstructionApplied) == InstructionApplied(instruction_id=7, text=TASK, adapter="")
    proposal = process.wait(Proposal)
    assert (proposal.frame_id, proposal.instruction_id) == (1, 7)
    process.publish(2)
    assert process.wait(Proposal).frame_id == 2


def test_a_profile_that_cannot_be_kept_is_logged(start):
    process = start(profile="reproducible", advanced=AdvancedConfig(flash_attention=True))
    process.wait(ModelReady)
    lines = [event.line for event in process.events if isinstance(event, LogLine)]
    assert lines == [
        "profile: reproducible is not possible with flash attention; ties between tokens may depend on the draft"
    ]


def test_a_kill_is_noticed(start):
    process = start()
    process.wait(Heartbeat)
    os.kill(process.worker.process.pid, signal.SIGKILL)
    assert process.worker.process.wait(HANG_S) == process.worker.exit_status == -signal.SIGKILL
    process.worker.receive()
    assert not process.worker.send(encode(SetPaused(True)))


def test_it_ends_when_the_supervisor_closes_the_socket(start):
    process = start()
    process.wait(ModelReady)
    process.worker.socket.close()
    assert process.worker.process.wait(HANG_S) == 0


@pytest.mark.parametrize("when", ["Heartbeat", "ModelReady"])
def test_it_dies_with_its_parent(toy_bundle, when):
    parent = textwrap.dedent(f"""
        import sys, time
        from edge_agent.ipc import events
        from edge_agent.ipc.frame_slot import Slot
        from edge_agent.ipc.worker import Worker
        worker = Worker("edge_agent.model", Slot.create(), sys.stdin.buffer.read())
        while not any(isinstance(events.decode_model_event(p), events.{when}) for p in worker.receive()):
            time.sleep(0.01)
        print(worker.process.pid, flush=True)
        time.sleep(600)
    """)
    with subprocess.Popen(
        [sys.executable, "-c", parent],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as process:
        process.stdin.write(model_start(config_of(toy_bundle)))
        process.stdin.close()
        pid = int(process.stdout.readline())
        assert Path(f"/proc/{pid}/cmdline").read_bytes().count(b"edge_agent.model")
        process.kill()
        process.wait()
        until_s = time.monotonic() + HANG_S
        while alive(pid) and time.monotonic() < until_s:
            time.sleep(0.01)
    assert not alive(pid)
