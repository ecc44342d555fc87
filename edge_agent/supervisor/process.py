"""The parent: starts camera and model, applies the envelope, publishes, watches, restarts. Must not die.

It imports no native model code and holds no frame. Whatever goes wrong, the action stream falls silent and the status
stream says why; nothing is ever published twice. Exit status: 78 wrong configuration, bundle or source (systemd does
not retry), 69 no camera yet, 1 a worker that will not run, 0 asked to stop.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import select
import signal
import time
from collections import Counter, OrderedDict
from collections.abc import Callable

import msgspec
import zmq

from edge_agent.actions.envelope import CheckedAction, Rejection, parse_answer
from edge_agent.actions.space import ActionSpace, load_action_space
from edge_agent.actions.vehicle_state import check_vehicle_state
from edge_agent.board import health
from edge_agent.bundle.lora_check import verify_adapters
from edge_agent.bundle.manifest import Bundle
from edge_agent.bundle.verify import verify_bundle
from edge_agent.config import Config
from edge_agent.ipc.events import (
    AskQuestion,
    CameraEnded,
    CameraOpened,
    InstructionApplied,
    LogLine,
    ModelCommand,
    ModelReady,
    Proposal,
    SetInstruction,
    SetPaused,
    StartupFailed,
    TextDelta,
    TraceSpan,
    decode_camera_event,
    decode_model_event,
)
from edge_agent.ipc.frame_slot import Slot
from edge_agent.ipc.worker import Worker
from edge_agent.supervisor.publisher import Publisher
from edge_agent.supervisor.systemd import Watchdog, notify
from edge_agent.supervisor.trace import Trace
from edge_agent.wire.codec import encode
from edge_agent.wire.control import Reply, Request, StateValue, decode_request
from edge_agent.wire.endpoints import runtime_dir
from edge_agent.wire.messages import (
    PROTOCOL_VERSION,
    Action,
    DaemonState,
    Lane,
    Refusal,
    Status,
    TextMessage,
    TextStopReason,
    WorkerStatus,
)

EX_UNAVAILABLE, EX_CONFIG = os.EX_UNAVAILABLE, os.EX_CONFIG
CAMERA_MODULE, MODEL_MODULE = "edge_agent.camera", "edge_agent.model"  # the modules run as children
STATUS_INTERVAL_NS = 200_000_000
# A camera that is not there at the start gets this long. The unit gives up after 20 starts in 300 s: with 15 s for each
# it never does, so a camera plugged in later is still found.
CAMERA_WAIT_S = 15.0
CAMERA_HUNG_S = 8.0  # beyond camera_stall_s without a frame or a word: its process hangs in the driver
BACKOFF_S, MAX_BACKOFF_S = 0.2, 5.0
MAX_CONSECUTIVE_FAILURES = 5  # of a model that never gets ready again: let systemd start everything afresh
MAX_ID_CHARS = 64
MAX_REMEMBERED_REPLIES = 256
ASK_TIMEOUT_S = 60.0
MAX_PENDING_REQUESTS = 8  # questions and instructions the model has not answered yet: no backlog
STALL_FACTOR = 3  # a model is not stalled before so many times the duration of its warm-up frame
NS_PER_S = 1_000_000_000
NS_PER_MS = 1_000_000


class Shutdown(Exception):
    """Leave the loop with this exit status; the line says why, empty when we were asked to."""

    def __init__(self, status: int, line: str = "") -> None:
        super().__init__(line)
        self.status = status


class ManagedWorker:
    """One worker over its restarts: process, back-off, when it was last heard."""

    def __init__(self, module: str, slot: Slot, first_message: Callable[[], bytes]) -> None:
        self._module, self._slot, self._first = module, slot, first_message
        self.worker: Worker | None = None
        self.restarts = -1
        self.in_a_row = 0  # failures since it last worked
        self.heard_ns = 0
        self.due_ns = 0  # when to start it; meaningful while there is no worker
        self.reason = "starting"  # why it gives nothing; empty when it works

    def start(self) -> None:
        self.worker = Worker(self._module, self._slot, self._first())
        self.restarts += 1
        self.heard_ns = time.monotonic_ns()

    def lose(self, reason: str) -> None:
        """Kill what is left, and start again after a pause that grows while it keeps failing."""
        if self.worker:
            self.worker.kill()
        self.worker, self.reason = None, reason
        self.due_ns = time.monotonic_ns() + round(min(BACKOFF_S * 2**self.in_a_row, MAX_BACKOFF_S) * NS_PER_S)
        self.in_a_row += 1

    def end(self) -> None:
        if self.worker:
            self.worker.kill()
            self.worker = None

    def seen(self) -> WorkerStatus:
        pid = self.worker.process.pid if self.worker else None
        return WorkerStatus(
            alive=self.worker is not None,
            pid=pid,
            restarts=max(self.restarts, 0),
            rss_mib=health.rss_mib(pid) if pid else None,
        )


class Supervisor:
    """Owns the slot, the sockets and both children. run() returns the exit status."""

    def __init__(self, config: Config, verified: Bundle, space: ActionSpace, link: Publisher, timeline: Trace) -> None:
        self.config, self.bundle, self.action_space, self.link = config, verified, space, link
        self.slot = Slot.create()
        self.trace = timeline
        self.session = random.SystemRandom().getrandbits(48)
        self.started_ns = time.monotonic_ns()
        self.instruction, self.adapter = config.task.instruction, config.language.adapter
        self.instruction_id, self.next_instruction_id = 0, 1  # of an instruction and an adapter together
        self.camera = ManagedWorker(CAMERA_MODULE, self.slot, lambda: encode(config.camera))
        self.model = ManagedWorker(MODEL_MODULE, self.slot, lambda: encode(config))
        self.watchdog = Watchdog()
        self.ready = False  # READY was said
        self.model_ready = self.camera_open = self.camera_ended = self.paused = self.stopping = False
        self.vision, self.frame_s = "", 0.0  # which encoder really runs; how long the warm-up frame took
        self.inference_count = self.actions = 0
        self.refusals: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.dropped = 0
        self.last_seq = 0  # of the slot, of the frame answered last
        self.latest_seq, self.frame_ns = 0, 0  # newest frame in the slot, and when we saw it there
        self.action_ns = 0
        self.replies: OrderedDict[tuple[bytes, str], bytes | None] = OrderedDict()  # None: still being worked on
        self.instructing: dict[int, tuple[list[bytes], str]] = {}  # instruction_id -> sender, id
        self.asking: dict[str, tuple[list[bytes], str, list[str], int]] = {}  # -> sender, id, pieces, asked at ns
        self.facts: dict[str, tuple[StateValue, int]] = {}  # what controllers say of the vehicle, and when
        self.said: tuple[str, str] = ("", "")
        self.status_ns = 0

    # -- life ---------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        notify("STATUS=loading")
        try:
            self.camera.start()
            self._start_model()
            while not self.stopping:
                self._turn(wake_read)
            raise Shutdown(0)
        except Shutdown as stop:
            notify("STOPPING=1")
            if stop.args[0]:
                log(f"edge-agent: {stop.args[0]}")
            self.stopping = True
            self._publish_status("stopping", stop.args[0])
            return stop.status
        finally:
            signal.set_wakeup_fd(-1)
            self.camera.end()
            self.model.end()
            self.slot.close()
            self.trace.close()

    def _on_signal(self, _number: int, _frame: object) -> None:
        self.stopping = True

    def _turn(self, wake_fd: int) -> None:
        poller = zmq.Poller()
        poller.register(self.link.control, zmq.POLLIN)
        poller.register(self.link.status, zmq.POLLIN)
        poller.register(wake_fd, zmq.POLLIN)
        for child in (self.camera, self.model):
            if child.worker:
                poller.register(child.worker.socket, zmq.POLLIN)
        poller.poll(50)
        with contextlib.suppress(BlockingIOError):
            os.read(wake_fd, 64)
        self._model_events()  # first: an answer must not wait behind anything
        self._camera_events()
        for sender, payload in self.link.requests():
            self._request(sender, payload)
        self._watch()
        self._say_status()
        self.watchdog.feed(self.inference_count)

    def _start_model(self) -> None:
        self.model_ready = False
        self.model.start()

    # -- the model's events -------------------------------------------------------------------------------------------

    def _model_events(self) -> None:
        worker = self.model.worker
        if worker is None:
            return
        for payload in worker.receive():
            try:
                event = decode_model_event(payload)
            except msgspec.DecodeError as error:
                self._lose_model(f"garbage from the model process: {error}")
                return
            self.model.heard_ns = time.monotonic_ns()
            self.inference_count += 1
            if isinstance(event, Proposal):
                if not all(map(math.isfinite, msgspec.structs.astuple(event.stages_ms))):
                    self._lose_model("garbage from the model process: stage times that are no numbers")
                    return
                self._proposal(event)
            elif isinstance(event, TextDelta):
                self._piece(event)
            elif isinstance(event, InstructionApplied):
                self._instructed(event)
            elif isinstance(event, ModelReady):
                self._model_is_ready(event)
            elif isinstance(event, LogLine):
                log(event.line)
            elif isinstance(event, TraceSpan):
                self.trace.span(event.name, event.thread, event.start_ns, event.stop_ns)
            elif isinstance(event, StartupFailed):
                if not self.ready:
                    raise Shutdown(EX_CONFIG if event.configured else 1, event.reason)
                self._lose_model(event.reason)
                return
        if worker.exit_status is not None:
            self._lose_model(_describe_exit(worker.exit_status))

    def _model_is_ready(self, event: ModelReady) -> None:
        log(f"model ready in {event.load_s:.1f} s, first frame {event.warmup_ms:.0f} ms, vision by {event.vision}")
        if event.warmup_ms > self.config.task.deadline_ms:
            deadline_ms = self.config.task.deadline_ms
            log(
                f"slower than task.deadline_ms {deadline_ms}: answers will be late; "
                "lower vision.max_image_tokens, or raise task.deadline_ms"
            )
        self.vision, self.frame_s = event.vision, event.warmup_ms / 1000
        self.model.worker.send(encode(SetPaused(self.paused)))
        self.model.worker.send(
            encode(SetInstruction(instruction_id=self.instruction_id, text=self.instruction, adapter=self.adapter))
        )

    def _instructed(self, event: InstructionApplied) -> None:
        sender, request = self.instructing.pop(event.instruction_id, (None, ""))
        if event.error:
            if sender is None:
                raise Shutdown(EX_CONFIG, event.error)
            self._reply(sender, request, error=event.error)
            return
        self.instruction_id, self.instruction, self.adapter = event.instruction_id, event.text, event.adapter
        if sender is not None:
            self._reply(sender, request, result={"instruction": self.instruction, "adapter": self.adapter})
        if not self.model_ready:
            self.model_ready, self.model.reason, self.model.in_a_row = True, "", 0
            slow = STALL_FACTOR * self.frame_s * 1e6 > self.watchdog.interval_us
            self.watchdog.allow(STALL_FACTOR * self.frame_s if slow else None)

    def _proposal(self, p: Proposal) -> None:
        """The one place where a model's words become an action: everything is checked here, nowhere later."""
        start_ns = time.monotonic_ns()
        dropped = max(0, p.frame_seq - self.last_seq - 1)
        self.last_seq = p.frame_seq
        self.dropped += dropped
        result = self._checked(p, start_ns)
        common = {
            "camera": self.config.camera.name,
            "frame_id": p.frame_id,
            "t_capture_ns": p.t_capture_ns,
            "capture_clock": p.capture_clock,
            "instruction": self.instruction,
            "dropped_frames": dropped,
        }
        now_ns = time.monotonic_ns()
        common |= self._header("actions", now_ns) | {"age_ms": (now_ns - p.t_capture_ns) / NS_PER_MS}
        if isinstance(result, Rejection):
            self.refusals[result.reason] += 1
            self.link.publish("actions", Refusal(reason=result.reason, detail=result.detail[:500], **common))
            return
        valid_ms = self.action_space.valid_for_ms
        message = Action(
            stages_ms=msgspec.structs.replace(p.stages_ms, check=(now_ns - start_ns) / NS_PER_MS),
            valid_for_ms=valid_ms,
            valid_until_ns=now_ns + valid_ms * NS_PER_MS,
            action_space=self.action_space.name,
            type=result.type,
            values=result.values,
            clamped=result.clamped,
            adapter=self.adapter,
            chunk=result.chunk,
            chunk_step_ms=self.action_space.chunk_step_ms,
            **common,
        )
        self.link.publish("actions", message)
        self.actions, self.action_ns = self.actions + 1, now_ns
        self.trace.span(f"frame {p.frame_id} out", "supervisor", start_ns, time.monotonic_ns())

    def _checked(self, p: Proposal, now_ns: int) -> CheckedAction | Rejection:
        age_ms = (now_ns - p.t_capture_ns) / NS_PER_MS
        if self.paused:
            return Rejection("paused", "")
        if p.instruction_id != self.instruction_id or not self.model_ready or p.stop_reason == "cancelled":
            return Rejection("stale-instruction", "")
        if age_ms < 0:
            return Rejection("future-timestamp", f"the frame is stamped {-age_ms:.1f} ms in the future")
        if p.stop_reason == "late" or age_ms > self.config.task.deadline_ms:
            return Rejection("late", f"{age_ms:.0f} ms old, deadline_ms is {self.config.task.deadline_ms}")
        if p.stop_reason:
            return Rejection(p.stop_reason if p.stop_reason == "not-finite" else "truncated", f"after {p.text[:200]!r}")
        return parse_answer(p.text, self.action_space)

    def _piece(self, piece: TextDelta) -> None:
        self._words(piece.lane, piece.frame_id, piece.text, piece.request, piece.final, piece.stop_reason)
        if piece.lane != "answer" or piece.request not in self.asking:
            return
        sender, request, pieces, _ = self.asking[piece.request]
        pieces.append(piece.text)
        if piece.final:
            del self.asking[piece.request]
            result = {"text": "".join(pieces)[:12_000], "frame_id": piece.frame_id, "stop_reason": piece.stop_reason}
            self._reply(sender, request, result=result)

    def _words(
        self, lane: Lane, frame_id: int, text: str, request: str, final: bool, stop_reason: TextStopReason
    ) -> None:
        header = self._header("text", time.monotonic_ns())
        self.link.publish(
            "text",
            TextMessage(
                lane=lane, frame_id=frame_id, text=text, request=request, final=final, stop_reason=stop_reason, **header
            ),
        )

    def _lose_model(self, reason: str) -> None:
        self._fault("model", reason)
        self.model.lose(f"model: {reason}")
        self.model_ready = False
        self.watchdog.allow(self.config.watchdog.model_load_s)
        for key, (sender, request, _, _) in list(self.asking.items()):
            self._words("answer", 0, "", key, True, "model-restart")
            self._reply(sender, request, error=f"the model process was lost ({reason}); ask again")
        for sender, request in self.instructing.values():
            self._reply(sender, request, error=f"the model process was lost ({reason}); all stays as it was before")
        self.asking.clear()
        self.instructing.clear()
        if self.model.in_a_row > MAX_CONSECUTIVE_FAILURES:
            raise Shutdown(1, f"model: {reason}; it failed {self.model.in_a_row} times in a row")

    # -- the camera's events ------------------------------------------------------------------------------------------

    def _camera_events(self) -> None:
        worker = self.camera.worker
        if worker is None:
            return
        for payload in worker.receive():
            try:
                event = decode_camera_event(payload)
            except msgspec.DecodeError as error:
                self._lose_camera(f"garbage from the camera process: {error}")
                return
            self.camera.heard_ns = time.monotonic_ns()
            if isinstance(event, CameraOpened):
                self.camera_open, self.camera.reason, self.camera.in_a_row = True, "", 0
                rate = f" at {event.fps:g} fps" if event.fps else ""
                log(f"camera {self.config.camera.name}: {event.description}, {event.width}x{event.height}{rate}")
            elif isinstance(event, CameraEnded):
                self.camera_ended, self.camera_open = True, False
                self.camera.reason = "camera: the source has ended"
            else:
                self.camera.reason = f"camera: {event.reason}: {event.detail}"
                self._fault("camera", event.reason, event.detail)
        status = worker.exit_status
        if status is None:
            return
        if status == EX_CONFIG and not self.ready:
            raise Shutdown(EX_CONFIG, f"camera.source: {self.camera.reason.removeprefix('camera: ')}")
        if self.camera_ended:
            self.camera.end()
        elif status == EX_CONFIG:  # its last words say more than its status
            self.camera_open = False
            self.camera.lose(self.camera.reason)
        else:
            self._lose_camera(_describe_exit(status))

    def _lose_camera(self, reason: str) -> None:
        self._fault("camera", reason)
        self.camera_open = False
        self.camera.lose(f"camera: {reason}")

    # -- watching -----------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        now_ns, watch = time.monotonic_ns(), self.config.watchdog
        if (seq := self.slot.latest_seq) != self.latest_seq:
            self.latest_seq, self.frame_ns, self.camera.heard_ns = seq, now_ns, now_ns
            if self.camera_open:
                self.camera.reason = ""  # one unreadable frame among good ones is counted, and no more
        for child in (self.camera, self.model):
            if child.worker is None and now_ns >= child.due_ns and not (child is self.camera and self.camera_ended):
                self._start_model() if child is self.model else child.start()
        model_s = max(watch.model_stall_s, STALL_FACTOR * self.frame_s) if self.model_ready else watch.model_load_s
        if self.model.worker and now_ns - self.model.heard_ns > model_s * NS_PER_S:
            self._lose_model(f"stalled: no progress in {model_s:g} s")
        slow_s = 2 / self.config.camera.fps if self.config.camera.fps else 0.0
        hung_s = max(watch.camera_stall_s, slow_s) + CAMERA_HUNG_S
        if self.camera.worker and self.config.camera.realtime and now_ns - self.camera.heard_ns > hung_s * NS_PER_S:
            self._lose_camera(f"stalled: no frame and no word in {hung_s:g} s")
        for key, (sender, request, _, asked_ns) in list(self.asking.items()):
            if now_ns - asked_ns > ASK_TIMEOUT_S * NS_PER_S:
                del self.asking[key]
                self._reply(sender, request, error=f"no answer in {ASK_TIMEOUT_S:g} s ({self._state()[1] or 'busy'})")
        if not self.ready:
            self._become_ready(now_ns)

    def _become_ready(self, now_ns: int) -> None:
        if self.model_ready and self.camera_open:
            self.ready = True
            notify("READY=1", f"STATUS={self.bundle.manifest.model.family} {self.bundle.manifest.model.size}")
            log(f"ready: {self.link.folder}")
        elif not self.camera_open and now_ns - self.started_ns > CAMERA_WAIT_S * NS_PER_S:
            reason = self.camera.reason.removeprefix("camera: ")
            raise Shutdown(EX_UNAVAILABLE, f"camera.source: {reason}; plug it in, or correct camera.source")

    def _state(self) -> tuple[DaemonState, str]:
        now_ns, stall_ns = time.monotonic_ns(), self.config.watchdog.camera_stall_s * NS_PER_S
        if self.stopping:
            return "stopping", ""
        if not self.ready:
            return "starting", self.model.reason or self.camera.reason
        if self.model.worker is None or not self.model_ready:
            return ("stalled" if "stalled" in self.model.reason else "fault"), self.model.reason or "model: starting"
        if self.paused:
            return "paused", "by control"
        if not self.camera_open or (self.camera.reason and now_ns - self.frame_ns > NS_PER_S):
            return "no-frames", self.camera.reason
        slow_ns = 2 * NS_PER_S / self.config.camera.fps if self.config.camera.fps else 0
        if self.config.camera.realtime and now_ns - self.frame_ns > max(stall_ns, slow_ns):
            return "no-frames", f"camera: no frame for {(now_ns - self.frame_ns) / NS_PER_S:.0f} s"
        return "running", ""

    def _say_status(self) -> None:
        state, reason = self._state()
        kind = (state, reason.rstrip("0123456789 s"))
        due = time.monotonic_ns() - self.status_ns >= STATUS_INTERVAL_NS
        if due or kind != self.said or self.link.new_subscriber():
            if kind != self.said:
                log(f"state {state}" + (f": {reason}" if reason else ""))
            self.said = kind
            self._publish_status(state, reason)

    def _publish_status(self, state: DaemonState, reason: str) -> None:
        now_ns = time.monotonic_ns()
        self.status_ns = now_ns
        message = Status(
            state=state,
            reason=reason[:1000],
            camera=self.config.camera.name,
            camera_worker=self.camera.seen(),
            model_worker=self.model.seen(),
            last_frame_age_ms=(now_ns - self.frame_ns) / NS_PER_MS if self.frame_ns else None,
            last_action_age_ms=(now_ns - self.action_ns) / NS_PER_MS if self.action_ns else None,
            vision_backend=self.vision,
            mem_available_mib=health.mem_available_mib(),
            temperature_c=health.temperature_c(),
            **self._counts(now_ns),
            **self._header("status", now_ns),
        )
        self.link.publish("status", message)

    def _counts(self, now_ns: int) -> dict:
        return {
            "uptime_s": (now_ns - self.started_ns) / NS_PER_S,
            "frames": self.slot.latest_seq,
            "frames_dropped": self.dropped,
            "actions": self.actions,
            "refusals": dict(self.refusals),
            "faults": dict(self.faults),
            "inference_count": self.inference_count,
            "instruction": self.instruction,
            "adapter": self.adapter,
        }

    def _header(self, stream: str, now_ns: int) -> dict:
        return {
            "v": PROTOCOL_VERSION,
            "session": self.session,
            "seq": self.link.next_seq(stream),
            "t_pub_ns": now_ns,
            "bundle_id": self.bundle.id,
        }

    def _fault(self, who: str, reason: str, detail: str = "") -> None:
        key = f"{who}: {reason.split(':')[0]}"
        self.faults[key] += 1
        log(f"fault {who}: {reason}" + (f": {detail}" if detail else ""))

    # -- control ------------------------------------------------------------------------------------------------------

    def _request(self, sender: list[bytes], payload: bytes) -> None:
        try:
            request = decode_request(payload)
        except msgspec.DecodeError as error:
            reply = Reply(v=PROTOCOL_VERSION, id="", ok=False, error=f"not a request: {error}"[:500])
            self.link.reply(sender, encode(reply))
            return
        if request.v != PROTOCOL_VERSION or not 0 < len(request.id) <= MAX_ID_CHARS:
            self.link.reply(
                sender,
                encode(
                    Reply(
                        v=PROTOCOL_VERSION,
                        id=request.id[:MAX_ID_CHARS],
                        ok=False,
                        error=f"expected v {PROTOCOL_VERSION} and an id of 1 to {MAX_ID_CHARS} characters",
                    )
                ),
            )
            return
        if (
            request.op == "vehicle_state"
        ):  # comes often, and doing it twice does no harm: it leaves the others' replies alone
            self._operate(sender, request)
            return
        key = (sender[0], request.id)
        if key in self.replies:
            if (known := self.replies[key]) is not None:
                self.link.reply(sender, known)
            return
        self.replies[key] = None
        while len(self.replies) > MAX_REMEMBERED_REPLIES:
            self.replies.popitem(last=False)
        self._operate(sender, request)

    def _operate(self, sender: list[bytes], request: Request) -> None:
        text, worker = request.text.strip(), self.model.worker
        if request.op in ("instruct", "adapter", "ask"):
            known = ("", *self.config.language.adapters)
            if request.op == "adapter" and text not in known:
                expected = ", ".join(map(repr, known))
                self._reply(sender, request.id, error=f"adapter: expected one of {expected}, found {text[:64]!r}")
            elif request.op != "adapter" and not 0 < len(text) <= 2000:
                self._reply(sender, request.id, error=f"text: expected 1 to 2000 characters, found {len(text)}")
            elif not self.model_ready or worker is None:
                self._reply(sender, request.id, error=f"the model is not ready ({self._state()[1]}); try again")
            elif len(self.asking) + len(self.instructing) >= MAX_PENDING_REQUESTS:
                self._reply(sender, request.id, error=f"{MAX_PENDING_REQUESTS} requests are waiting already; try again")
            elif request.op != "ask":
                self.instructing[self.next_instruction_id] = (sender, request.id)
                change = {"text" if request.op == "instruct" else "adapter": text}
                self._command(sender, request.id, SetInstruction(instruction_id=self.next_instruction_id, **change))
                self.next_instruction_id += 1
            elif request.id in self.asking:
                self._reply(sender, request.id, error="id: another controller is asking under it; choose a random one")
            else:
                self.asking[request.id] = (sender, request.id, [], time.monotonic_ns())
                self._command(sender, request.id, AskQuestion(request.id, text))
        elif request.op == "vehicle_state":
            if error := check_vehicle_state(request.values, self.action_space):
                self._reply(sender, request.id, error=error)
                return
            now_ns = time.monotonic_ns()
            self.facts |= {key: (value, now_ns) for key, value in request.values.items()}
            self.slot.write_note(encode(self.facts))
            self._reply(sender, request.id)
        elif request.op == "stats":
            self._reply(sender, request.id, result=self._counts(time.monotonic_ns()) | {"state": self._state()[0]})
        else:
            self.paused = request.op == "pause"  # from this moment no action leaves, whatever the model is doing
            if worker:
                worker.send(encode(SetPaused(self.paused)))
            self._reply(sender, request.id, result={"paused": self.paused})

    def _command(self, sender: list[bytes], request: str, command: ModelCommand) -> None:
        if not self.model.worker.send(encode(command)):
            self._reply(sender, request, error="the model process takes no commands now; try again")

    def _reply(self, sender: list[bytes], request: str, result: dict | None = None, error: str = "") -> None:
        payload = encode(Reply(v=PROTOCOL_VERSION, id=request, ok=not error, error=error, result=result or {}))
        if (sender[0], request) in self.replies:
            self.replies[(sender[0], request)] = payload
        self.link.reply(sender, payload)


def _describe_exit(status: int) -> str:
    if status < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-status).name}"
    return f"ended with status {status}"


def log(line: str) -> None:
    """One line to stderr, which is the journal's. Whoever reads it may be dead or stuck: then the line is lost."""
    with contextlib.suppress(OSError):
        if select.select([], [2], [], 0)[1]:
            os.write(2, line.encode(errors="replace")[:4000] + b"\n")  # below PIPE_BUF: cannot wait once it is writable


def run(config: Config) -> int:
    """Verify the bundle, bind the endpoints, serve. Raises ConfigError, BundleError, LinkError before READY."""
    space = load_action_space(config.task.action_space)
    timeline = Trace(config.trace)
    link = Publisher(runtime_dir(config.runtime_dir))
    try:
        notify("STATUS=verifying the bundle")
        verified = verify_bundle(config.bundle, config.trusted_keys)
        verify_adapters(config.language.adapters, verified, config.trusted_keys)
        model = verified.manifest.model
        log(f"bundle {verified.id}: {model.family} {model.size} {verified.manifest.recipe}")
        return Supervisor(config, verified, space, link, timeline).run()
    finally:
        link.close()
