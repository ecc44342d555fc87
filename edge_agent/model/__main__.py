"""Entry of the model process: memory plan, load, warm-up, then the loop."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import time

import msgspec

from edge_agent.actions.space import load_action_space
from edge_agent.board import health
from edge_agent.bundle.manifest import read_manifest
from edge_agent.bundle.memory_plan import NotEnoughMemoryError, adapters_mib, plan_memory
from edge_agent.config import Config
from edge_agent.errors import BundleError, ConfigError
from edge_agent.ipc.events import (
    Heartbeat,
    LogLine,
    ModelReady,
    StartupFailed,
)
from edge_agent.ipc.worker import attach_to_supervisor
from edge_agent.model.engine import Engine, InstructionRefused
from edge_agent.model.llama import LlamaError
from edge_agent.model.loop import ModelLoop, warm_up
from edge_agent.model.vision_encoder import VisionError
from edge_agent.wire.codec import encode

_libc = ctypes.CDLL(None)


def main() -> int:
    slot, events, first, trace = attach_to_supervisor()
    config = msgspec.msgpack.decode(first, type=Config)

    def emit(event: object) -> None:
        events.send(encode(event))

    start = time.monotonic()
    try:
        model_bundle = read_manifest(config.bundle)  # the supervisor has verified the files
        planned = plan_memory(config, model_bundle.manifest, health.mem_available_mib(), adapters_mib(config))
        for key, value in planned.given_up.items():
            emit(LogLine(f"memory is short: {key} is {value} instead of what was configured"))
        config = planned.config
        engine = Engine(config, model_bundle, load_action_space(config.task.action_space), emit)
        engine.trace = trace
        emit(Heartbeat("warm-up"))
        warmup_ms = warm_up(engine)
        gc.collect()
        _libc.malloc_trim(0)  # what loading took and left, 10 MB of a full vocabulary
    except (LlamaError, VisionError, BundleError, NotEnoughMemoryError, ValueError) as error:
        emit(StartupFailed(reason=str(error), configured=False))
        return 1
    except (InstructionRefused, ConfigError) as error:
        emit(StartupFailed(reason=str(error), configured=True))
        return 1
    emit(ModelReady(vision=engine.encoder.provider, load_s=time.monotonic() - start, warmup_ms=warmup_ms))
    loop = ModelLoop(engine, slot, events)
    while True:
        loop.turn()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (BrokenPipeError, ConnectionResetError):
        os._exit(0)  # the supervisor is gone
