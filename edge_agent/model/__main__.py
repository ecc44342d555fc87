"""Entry of the model process: memory plan, load, warm-up, then the loop.

python -m edge_agent.model --slot FD --wake FD --events FD

With --check it says instead what it would refuse at its start: the first message comes on standard input, and one line
goes to standard output. `edge-agent check` runs it, so that native code stays in a process of its own.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
import time

import msgspec

from edge_agent.actions.space import decode_action_space
from edge_agent.board import health
from edge_agent.board.nvml import Nvml
from edge_agent.bundle.manifest import Manifest
from edge_agent.bundle.memory_plan import MemoryPlan, adapters_mib, plan_memory
from edge_agent.bundle.model_start import decode_model_start
from edge_agent.bundle.verified_files import VerifiedFiles
from edge_agent.config import Config
from edge_agent.errors import UserError
from edge_agent.ipc.events import Heartbeat, LogLine, ModelReady, StartupFailed
from edge_agent.ipc.worker import attach_to_supervisor
from edge_agent.model.fallbacks import find_fallbacks
from edge_agent.model.frame_encoder import FrameEncoder
from edge_agent.model.gpu import gpu_in_use
from edge_agent.model.gpu_sensor import start_gpu_sensor
from edge_agent.model.load import check_start, load_model, warm_up
from edge_agent.model.loop import ModelLoop
from edge_agent.model.supervisor_channel import SupervisorChannel

_libc = ctypes.CDLL(None)


def _plan_memory(config: Config, manifest: Manifest) -> MemoryPlan:
    """For the memory that is free now. Raises NotEnoughMemoryError."""
    gpu = gpu_in_use(config.language.gpu_layers)
    return plan_memory(config, manifest, health.mem_available_mib(), adapters_mib(config), gpu)


def check() -> int:
    """Print one line about the context, or the line with which the daemon would end. Nothing is loaded but the
    vocabulary."""
    start = decode_model_start(sys.stdin.buffer.read())
    try:
        planned = _plan_memory(start.config, start.manifest)
        print(check_start(planned.config, start.bundle, decode_action_space(start.space)))
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    return 0


def main() -> int:
    slot, socket, first_message, trace = attach_to_supervisor()
    start = decode_model_start(first_message)
    config = start.config
    supervisor = SupervisorChannel(socket, trace=trace)
    start_s, is_reduced = time.monotonic(), False
    with VerifiedFiles(start.files, lambda path, n: supervisor.send(Heartbeat(f"verify {path.name} {n}"))) as files:
        try:
            planned = _plan_memory(config, start.manifest)
            config, is_reduced = planned.config, bool(planned.reductions)
            for key, value in planned.reductions.items():
                supervisor.send(LogLine(f"low memory: {key} is {value} instead of the configured value"))
            model = load_model(config, start.bundle, decode_action_space(start.space), supervisor.events, files.open)
            files.check_unchanged()
            supervisor.send(Heartbeat("warm-up"))
            warmup_ms = warm_up(model, config.camera)
        except UserError as error:  # any other exception is a defect: it ends the process with its traceback
            fault = "instruction-reduced" if is_reduced and error.fault == "instruction" else error.fault
            supervisor.send(StartupFailed(reason=files.with_names(str(error)), fault=fault or "native"))
            return 1
    encoder = model.images.encoder
    facts = model.engine.llama.facts
    switches = msgspec.structs.replace(model.switches, reproducible=model.engine.llama.reproducible)  # as measured
    for line in find_fallbacks(config, switches, facts, encoder.asked, encoder.runs):
        supervisor.send(LogLine(line))
    gc.collect()
    _libc.malloc_trim(0)  # memory that loading no longer needs, 10 MB with a full vocabulary
    # Before the supervisor hears that the model is ready: it asks the camera process for images of the right size.
    frames = FrameEncoder(slot, model.images, config.task.deadline_ms, overlap=model.switches.overlap)
    supervisor.send(
        ModelReady(
            vision=model.images.backend,
            load_s=time.monotonic() - start_s,
            warmup_ms=warmup_ms,
            memory_reduced=is_reduced,
            language=facts.backend,
        )
    )
    loop = ModelLoop(model.engine, frames, slot, supervisor, config.language.describe_prompt)
    start_gpu_sensor(supervisor.events, Nvml(), threading.Event())
    while True:
        loop.step()


if __name__ == "__main__":
    try:
        sys.exit(check() if sys.argv[1:] == ["--check"] else main())
    except (BrokenPipeError, ConnectionResetError):
        os._exit(0)  # the supervisor is gone
