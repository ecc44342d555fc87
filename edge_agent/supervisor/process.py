"""The parent process: starts camera and model, checks and publishes what the model proposes, restarts what fails.

It loads no native model code and holds no frame, and must not die. Whatever fails, the action stream falls silent and
the status stream says why. Nothing is published twice. shutdown.py lists the exit statuses.

`Supervisor.poll_once` is one turn of the loop. The other files of this room are its parts:

    camera_worker, model_worker   one child process over its restarts (managed_worker)
    gate                          proposal -> action or refusal
    control                       requests of controllers
    status                        state, reason and counters
    publisher, systemd, trace     what leaves: sockets, service manager, timeline
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import select
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import msgspec

from edge_agent.actions.envelope import CheckedAction, Rejection
from edge_agent.actions.space import ActionSpace, encode_action_space, load_action_space
from edge_agent.bundle.manifest import Bundle
from edge_agent.bundle.model_start import encode_model_start
from edge_agent.config import Config
from edge_agent.errors import FAULTS, FaultName, UserError, fault_of
from edge_agent.ipc.events import (
    GpuReading,
    Heartbeat,
    InstructionApplied,
    LogLine,
    ModelEvent,
    ModelReady,
    Proposal,
    StartupFailed,
    TextDelta,
    TraceSpan,
    decode_model_event,
)
from edge_agent.ipc.frame_slot import Slot
from edge_agent.ipc.worker import Worker
from edge_agent.supervisor.board_monitor import BoardMonitor
from edge_agent.supervisor.camera_worker import CameraWorker
from edge_agent.supervisor.control import MAX_TEXT_CHARS, Control, VehicleState
from edge_agent.supervisor.gate import ControlState, Gate, Instruction
from edge_agent.supervisor.log import log_line
from edge_agent.supervisor.managed_worker import Clock, Readiness, Reason, ReasonKind
from edge_agent.supervisor.model_worker import ModelWorker
from edge_agent.supervisor.pause_file import was_paused
from edge_agent.supervisor.publisher import Publisher
from edge_agent.supervisor.shutdown import Shutdown
from edge_agent.supervisor.status import ORDERED_REFUSALS, StatusReporter
from edge_agent.supervisor.trace import Trace
from edge_agent.supervisor.verification import Verification
from edge_agent.suspend import SuspendDetector
from edge_agent.systemd import Watchdog, notify
from edge_agent.time_units import NS_PER_MS
from edge_agent.wire.codec import encode
from edge_agent.wire.endpoints import runtime_dir
from edge_agent.wire.messages import Action, Refusal

CAMERA_MODULE, MODEL_MODULE = "edge_agent.camera", "edge_agent.model"  # run as child processes
MS_PER_S = 1000
POLL_MS = 50
POLL_ENDING_MS = 5  # a child has closed its socket: its exit status follows within milliseconds
EXIT_WAIT_S = 2.0  # at the end, for killed children; the unit's TimeoutStopSec is longer
EXIT_POLL_S = 0.01
DESCRIPTORS = 4096  # four endpoints with 128 connections each need an eighth
MAX_DETAIL_CHARS = 500  # of a refusal
MAX_NAME_CHARS = 200  # of a vision backend, an adapter or a reason of the GPU
MAX_REASONS = 64
MAX_PIECE_CHARS = 12_000  # of one piece of text; four bytes each must fit in a message


class Supervisor:
    """Owns the slot, both child processes and the loop. run() returns the exit status of the daemon."""

    # Nine parameters: tests replace the last four.
    def __init__(
        self,
        config: Config,
        verification: Verification,
        space: ActionSpace,
        publisher: Publisher,
        trace: Trace,
        *,
        clock: Clock = time.monotonic_ns,
        start_worker: Callable[..., Worker] = Worker,
        camera_module: str = CAMERA_MODULE,
        model_module: str = MODEL_MODULE,
    ) -> None:
        """clock: CLOCK_MONOTONIC in nanoseconds. start_worker: called as Worker. The modules run as child processes."""
        self.config, self.space, self.publisher, self.trace = config, space, publisher, trace
        self.verification = verification
        self.bundle: Bundle | None = None  # until it is verified, there is no model process
        self.clock = clock
        self.suspend = SuspendDetector(clock)
        self.slot = Slot.create()
        self.watchdog = Watchdog(clock)
        flags = ("--trace",) if trace.is_on else ()
        self._model_start = b""  # the first message to the model process
        self.camera = CameraWorker(
            config.camera,
            config.watchdog.camera_stall_s,
            self.slot,
            lambda: start_worker(camera_module, self.slot, encode(config.camera)),
            clock,
        )
        self.model = ModelWorker(
            config.watchdog, lambda: start_worker(model_module, self.slot, self._model_start, flags), clock
        )
        self.control_state = ControlState(
            Instruction(0, config.task.instruction, config.language.adapter), paused=was_paused(publisher.folder)
        )
        self.gate = Gate(space, config.task.deadline_ms)
        self.board = BoardMonitor(config.governor, config.vision.max_image_tokens, clock)
        self.status = StatusReporter(config.camera, self.control_state, self.camera, self.model, self.board, clock)
        self.counters = self.status.counters
        vehicle_state = VehicleState(self.slot, space, clock)
        adapters = tuple(config.language.adapters)
        self.control = Control(adapters, self.model, self.status, publisher, vehicle_state, clock)
        self._signal_fds: list[int] = []
        self._handlers: dict[type, Callable[[Any], None]] = {
            Proposal: self._on_proposal,
            TextDelta: self.control.publish_text,
            InstructionApplied: self._on_instruction_applied,
            ModelReady: self._on_model_ready,
            StartupFailed: self._on_startup_failed,
            LogLine: lambda event: log_line(event.line),
            TraceSpan: lambda event: trace.span(event.name, event.thread, event.start_ns, event.stop_ns),
            Heartbeat: lambda event: None,  # it was counted as progress, as every event but GpuReading is
            GpuReading: self.board.note_gpu,
        }

    # -- the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Serve until stopped. The exit status."""
        notify("STATUS=verifying the bundle")
        try:
            with self._wake_on_signals():
                self.start()
                self.board.reader.start()
                while not self.status.is_stopping:
                    self.poll_once()
            raise Shutdown
        except Shutdown as shutdown:
            notify("STOPPING=1")
            if shutdown.line:
                log_line(f"edge-agent: {shutdown.line}")
            self.status.is_stopping = True
            self.control.refuse_pending(shutdown.line or "the daemon was stopped")  # every request gets its reply
            self.status.publish(self.publisher, "stopping", shutdown.line)
            return shutdown.status
        finally:
            self.close()

    def start(self) -> None:
        self.verification.start()
        self.camera.start()

    def poll_once(self) -> None:
        """One turn: wait for an event, handle what has arrived, check every time-out, publish status, feed systemd."""
        self._wait()
        self._handle_model_events()  # first: nothing may delay an answer
        self.camera.handle_events(was_ready=self.status.is_ready)
        self.camera.check_slot()
        self.publisher.serve()
        for sender, payload in self.publisher.requests():
            self.control.handle(sender, payload)
        self.control.sync_model()
        self.control.send_changes()
        self.board.update(self.counters.answers, self.counters.actions)
        self.board.sync_model(self.model)
        self._check_timeouts()
        if self.bundle is None:
            self._check_verification()
        self._become_ready()
        self.status.publish_if_due(self.publisher)
        self.watchdog.feed(self.counters.model_events)

    def close(self) -> None:
        """Kill both children and wait for a bounded time until they are gone."""
        workers = (self.camera, self.model)
        for worker in workers:
            worker.end(Reason(worker.name, ReasonKind.ENDED, "stopping"))
        for _ in range(round(EXIT_WAIT_S / EXIT_POLL_S)):
            if all(worker.is_gone for worker in workers):
                break
            time.sleep(EXIT_POLL_S)
            for worker in workers:
                worker.reap()
        self.slot.close()
        self.trace.close()

    @contextlib.contextmanager
    def _wake_on_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the loop at once: each writes a byte into a pipe that is polled."""

        def stop(_number: int, _frame: object) -> None:
            self.status.is_stopping = True

        read_fd, write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._signal_fds = [read_fd]
        signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        try:
            yield
        finally:
            signal.set_wakeup_fd(-1)
            self._signal_fds = []
            os.close(read_fd)
            os.close(write_fd)

    def _wait(self) -> None:
        """Until something arrives, at most POLL_MS."""
        fds, timeout_ms = self._waiting_for()
        poll = select.poll()
        for fd in fds:
            poll.register(fd, select.POLLIN)
        try:
            poll.poll(timeout_ms)
        except OSError:  # no memory in the kernel
            time.sleep(POLL_ENDING_MS / 1000)

    def _waiting_for(self) -> tuple[list[int], int]:
        """The descriptors that wake the loop, and the longest time to wait in milliseconds."""
        workers = [managed.worker for managed in (self.camera, self.model) if managed.worker is not None]
        fds = [worker.socket.fileno() for worker in workers if not worker.hung_up]  # else they would wake us for ever
        timeout_ms = POLL_MS if len(fds) == len(workers) else POLL_ENDING_MS
        if self.publisher.has_requests:
            timeout_ms = 0
        return [*self._signal_fds, *self.publisher.filenos(), *fds], timeout_ms

    def _check_timeouts(self) -> None:
        if lost := self.publisher.lost_endpoint():  # a daemon that cannot be told to stop may not go on
            raise Shutdown("endpoint-lost", lost)
        if reason := self.model.timeout_reason():
            self._restart_model(reason)
        self.camera.check_timeouts(was_ready=self.status.is_ready)
        self.control.check_timeouts()
        for worker in (self.camera, self.model):
            worker.forward_stderr()
            worker.reap()
            worker.start_if_due()

    def _check_verification(self) -> None:
        """Start the model process when the bundle is verified."""
        try:
            bundle = self.verification.result()
            if bundle is None:
                self.model.reason = Reason("model", ReasonKind.STARTING, "starting", self.verification.progress)
                return
            self._model_start = encode_model_start(self.config, bundle, encode_action_space(self.space))
        except UserError as error:
            raise Shutdown(error.fault or "bundle", str(error)) from None
        except OSError as error:
            line = f"{error.filename or self.config.bundle}: {error.strerror or error}"
            raise Shutdown(fault_of(error, "bundle"), line) from None
        self.bundle, self.publisher.bundle_id = bundle, bundle.id
        if not bundle.manifest.has_image_sizes:
            self.board.note_fixed_images()
        model = bundle.manifest.model
        log_line(f"bundle {bundle.id}: {model.family} {model.size} {bundle.manifest.recipe}")
        notify("STATUS=loading")
        self.model.reason = Reason("model", ReasonKind.STARTING, "starting")
        self.model.start()

    def _become_ready(self) -> None:
        """Tell systemd once that camera and model work."""
        # A short source (camera.loop: false) may have ended before the model was loaded.
        has_camera = self.camera.readiness in (Readiness.READY, Readiness.ENDED)
        if has_camera and self.model.readiness is Readiness.READY and not self.status.is_ready and self.bundle:
            self.status.is_ready = True
            if line := self.config.tuned.difference(self.camera.frame_size, self.bundle.id):
                log_line(line)
            model = self.bundle.manifest.model
            notify("READY=1", f"STATUS={model.family} {model.size}")
            log_line(f"ready: {self.publisher.folder}")

    # -- the model process --------------------------------------------------------------------------------------------

    def _handle_model_events(self) -> None:
        worker = self.model.worker
        exit_reason = self.model.exit_reason()  # read first: what the process sent before its end is received below
        for payload in self.model.receive():
            try:
                event: ModelEvent = decode_model_event(payload)
                error = _event_fault(event, self.slot.latest_seq)
            except msgspec.DecodeError as decode_error:
                error = str(decode_error)
            if error:
                self._restart_model(Reason("model", ReasonKind.FAILED, "invalid event from the model process", error))
            else:
                if not isinstance(event, GpuReading):  # a thread sends it, whatever the others do
                    self.model.note_progress()
                    self.counters.model_events += 1
                self._handlers[type(event)](event)
            if self.model.worker is not worker:  # it was killed: its other messages do not count
                return
        if exit_reason:
            self._restart_model(exit_reason)

    def _on_proposal(self, proposal: Proposal) -> None:
        """Publish the action or the refusal that the gate makes of a proposal."""
        if proposal.frame_seq <= self.counters.last_frame_seq:
            return  # a new model process finds the frame that the old one has answered
        start_ns, resumed_ns = self.clock(), self.suspend.resumed_ns()
        dropped = self.counters.count_dropped(proposal.frame_seq)
        is_ready = self.model.readiness is Readiness.READY
        result = self.gate.check(
            proposal, self.control_state, model_is_ready=is_ready, now_ns=start_ns, resumed_ns=resumed_ns
        )
        now_ns = self.clock()
        if not isinstance(result, Rejection):
            result = self.gate.check_age(proposal, now_ns, self.suspend.resumed_ns()) or result
        frame: dict[str, Any] = {
            "t_pub_ns": now_ns,
            "camera": self.config.camera.name,
            "frame_id": proposal.frame_id,
            "t_capture_ns": proposal.t_capture_ns,
            "capture_clock": proposal.capture_clock,
            "age_ms": (now_ns - proposal.t_capture_ns) / NS_PER_MS,
            "instruction": self.control_state.instruction.text,
            "dropped_frames": dropped,
        }
        if not isinstance(result, Rejection) or result.reason not in ORDERED_REFUSALS:
            self.control.note_answer()
        if isinstance(result, Rejection):
            self.counters.count_refusal(result.reason, now_ns)
            detail = result.detail[:MAX_DETAIL_CHARS]
            self.publisher.send("actions", Refusal, reason=result.reason, detail=detail, **frame)
            return
        stages_ms = msgspec.structs.replace(proposal.stages_ms, check=(now_ns - start_ns) / NS_PER_MS)
        self._publish_action(result, now_ns, stages_ms=stages_ms, **frame)
        self.model.note_success()
        if self.model.note_frame((stages_ms.encode + stages_ms.prefill + stages_ms.decode) / MS_PER_S):
            self.watchdog.set_interval_above(self.model.stall_s)
        self.trace.span(f"frame {proposal.frame_id} out", "supervisor", start_ns, self.clock())

    def _publish_action(self, checked: CheckedAction, now_ns: int, **fields: Any) -> None:
        self.publisher.send(
            "actions",
            Action,
            valid_for_ms=self.space.valid_for_ms,
            valid_until_ns=now_ns + self.space.valid_for_ms * NS_PER_MS,
            action_space=self.space.name,
            type=checked.type,
            values=checked.values,
            clamped=checked.clamped,
            adapter=self.control_state.instruction.adapter,
            chunk=checked.chunk,
            chunk_step_ms=self.space.chunk_step_ms,
            **fields,
        )
        self.counters.count_action(fields["t_capture_ns"], now_ns)

    def _on_model_ready(self, event: ModelReady) -> None:
        first_ms, by = event.warmup_ms, f"language by {event.language}, vision by {event.vision}"
        log_line(f"model ready in {event.load_s:.1f} s, first frame {first_ms:.0f} ms, {by}")
        deadline_ms = self.config.task.deadline_ms
        if first_ms > deadline_ms:
            has_sizes = self.bundle is None or self.bundle.manifest.has_image_sizes
            remedy = "lower vision.max_image_tokens" if has_sizes else "use a smaller model"
            log_line(
                f"the first frame took longer than task.deadline_ms {deadline_ms}: answers will be late; "
                f"{remedy}, or raise task.deadline_ms"
            )
        self.model.vision_backend, self.model.language_backend = event.vision, event.language
        self.model.note_warmup(first_ms / 1000)
        self.model.memory_reduced = event.memory_reduced
        self.board.model_is_new()
        if not self.control.send_control_state():
            self._restart_model(Reason("model", ReasonKind.FAILED, "takes no commands"))

    def _on_instruction_applied(self, event: InstructionApplied) -> None:
        was_loaded = self.model.is_loaded
        accepted = self.control.instruction_applied(event)
        if not event.error:
            self.model.mark_ready()
        elif not accepted and not self.status.is_ready:  # with more free memory, a later start may accept it
            raise Shutdown("instruction-reduced" if self.model.memory_reduced else "instruction", event.error)
        elif not accepted:  # a later start can have less memory and a smaller context
            self.model.mark_refused(event.error)
        self.counters.refused_since_ns = 0  # another instruction, or another process
        if self.model.is_loaded and not was_loaded:
            self.watchdog.set_interval_above(self.model.stall_s)

    def _on_startup_failed(self, event: StartupFailed) -> None:
        fault = cast(FaultName, event.fault)  # _event_fault() has checked it
        if not self.status.is_ready:
            raise Shutdown(fault, event.reason)
        if FAULTS[fault].is_permanent:  # files changed in flight: a new start of the daemon would end with 78
            self.model.failures_before_ready = 0
        self._restart_model(Reason("model", ReasonKind.FAILED, "cannot start", event.reason))

    def _restart_model(self, reason: Reason) -> None:
        """Kill the model process and refuse every request that waits for it. The next process starts after a pause."""
        if reason is self.model.reason:  # a refusal of the instruction: mark_refused counted the fault
            self.model.restart_later(reason)
        else:
            self.model.restart_after_fault(reason)
        self.watchdog.set_interval_above(self.config.watchdog.model_load_s)
        self.control.refuse_pending(reason.text)
        self.model.shut_down_after_failures()


def _event_fault(event: ModelEvent, latest_seq: int) -> str:
    """Why an event cannot be right, although it could be decoded; "": it can. A bad model must not end the daemon.

    Everything that the supervisor publishes of an event has a bound here: a message that is too large, or an integer
    that msgpack cannot hold, would raise an exception in the loop. latest_seq: of the slot.
    """
    if isinstance(event, Proposal):
        if not all(map(math.isfinite, msgspec.structs.astuple(event.stages_ms))):
            return "a stage time is not finite"
        integers_fit = all(abs(n) < 2**63 for n in (event.frame_id, event.t_capture_ns))
        is_known = 0 <= event.frame_seq <= latest_seq
        return "" if integers_fit and is_known else f"frame {event.frame_seq}, the newest is {latest_seq}"
    if isinstance(event, ModelReady):
        finite = math.isfinite(event.load_s) and math.isfinite(event.warmup_ms)
        fits = max(len(event.vision), len(event.language)) <= MAX_NAME_CHARS
        return "" if finite and fits else "a duration or a name out of bounds"
    if isinstance(event, GpuReading):
        numbers = (event.power_w, event.temperature_c, event.throttle_at_c, event.clock_mhz)
        finite = all(number is None or math.isfinite(number) for number in numbers)
        fits = len(event.throttle_reasons or ()) <= MAX_REASONS and all(
            len(reason) <= MAX_NAME_CHARS for reason in event.throttle_reasons or ()
        )
        return "" if finite and fits else "a reading of the GPU out of bounds"
    if isinstance(event, TextDelta):
        fits = len(event.text) <= MAX_PIECE_CHARS and abs(event.frame_id) < 2**63
        return "" if fits else f"a piece of text of {len(event.text)} characters"
    if isinstance(event, StartupFailed):
        return "" if event.fault in FAULTS else f"a fault {event.fault[:MAX_NAME_CHARS]!r}"
    if isinstance(event, InstructionApplied):
        fits = len(event.text) <= MAX_TEXT_CHARS and len(event.adapter) <= MAX_NAME_CHARS
        return "" if fits else f"an instruction of {len(event.text)} characters"
    return ""


def raise_descriptor_limit() -> None:
    """The soft limit is 1024 on most systems, although connections of controllers may need more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < DESCRIPTORS:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, DESCRIPTORS), hard))


def run(
    config: Config, trace_path: str = "", *, camera_module: str = CAMERA_MODULE, model_module: str = MODEL_MODULE
) -> int:
    """Bind the endpoints, verify the bundle, serve; the exit status.

    trace_path: write a timeline to this file. Raises ConfigError or EndpointError before anything starts.
    """
    raise_descriptor_limit()
    space = load_action_space(config.task.action_space)
    trace = Trace(trace_path)
    publisher = Publisher(runtime_dir(config.runtime_dir))
    try:
        return Supervisor(
            config,
            Verification(config),
            space,
            publisher,
            trace,
            camera_module=camera_module,
            model_module=model_module,
        ).run()
    finally:
        publisher.close()
