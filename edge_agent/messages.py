"""Every message in and out, with its units, and the one table of streams.

Three families, all msgpack maps written by msgspec: what leaves on the wire (PROTOCOL.md), what a controller may ask
for (control), and what the three processes tell each other. Nothing here opens a socket or a file, and nothing here
needs numpy: a controller on a small board imports this file.

    >>> header = dict(v=1, epoch=7, seq=0, t_pub_ns=0, bundle_id="ab")
    >>> unpack("words", pack("words", Words(lane="describe", frame_id=3, text="a", **header))).text
    'a'
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import msgspec

PROTOCOL_VERSION = 1
MAX_MESSAGE_BYTES = 64 * 1024
NS_PER_MS = 1_000_000


class Stream(msgspec.Struct, frozen=True):
    """One row of the table below: how a stream is carried."""

    topic: bytes  # the first byte of every message of the stream; empty for control, which has one reader per message
    socket: str  # what the daemon binds
    reader: str  # what a controller connects
    rate: str
    newest: bool  # the client reads what waits and keeps the newest message


STREAMS = {
    "actions": Stream(b"A", "PUB", "SUB", "one per frame", newest=True),
    "words": Stream(b"W", "PUB", "SUB", "one per decoded piece", newest=False),
    "status": Stream(b"S", "XPUB", "SUB", "5 Hz, on change, and the last value on subscribing", newest=True),
    "control": Stream(b"", "ROUTER", "DEALER", "on request", newest=False),
}

# ---------------------------------------------------------------------------------------------------------------------
# On the wire. Readers ignore keys they do not know; a field is added, never renamed.


class Header(msgspec.Struct, frozen=True, kw_only=True):
    v: int  # PROTOCOL_VERSION
    epoch: int  # random per start of the daemon: a new one means that seq starts again
    seq: int  # counts every message of this stream: a gap is a loss
    t_pub_ns: int  # CLOCK_MONOTONIC of this boot
    bundle_id: str  # first 16 hex digits of the sha256 of bundle.json; empty while none is verified


class Stages(msgspec.Struct, frozen=True, kw_only=True):
    """Where the time of one frame went, milliseconds."""

    queue: float  # capture until the model process took the frame
    encode: float  # resize, normalise and vision encoder
    prefill: float  # frame rows and closing text through the language model
    decode: float  # the answer, token by token
    post: float  # text to checked action


Clock = Literal["driver", "arrival", "sender"]  # who stamped the frame: the kernel, our read(), or the pushing process


class Action(Header, frozen=True, kw_only=True, tag_field="kind", tag="action"):
    """A checked request to the vehicle. It stands until valid_until_ns and not a moment longer."""

    camera: str
    frame_id: int
    t_capture_ns: int
    capture_clock: Clock
    age_ms: float  # capture until publication
    stages_ms: Stages
    valid_for_ms: int
    valid_until_ns: int  # t_pub_ns + valid_for_ms
    space: str  # name of the action space: what the names in values mean
    action: str
    values: dict[str, float | int | str | bool]  # SI units as the action space names them, inside its ranges
    clamped: dict[str, float]  # field -> what the model had asked for, where the envelope changed it
    task: str  # the instruction this answers
    dropped_frames: int  # frames the camera delivered since the previous answer and nobody looked at
    adapter: str = ""  # under which the model answered; empty: none
    later: list[dict[str, float | int | str | bool]] = []  # values of the steps after this one, where the space has any
    step_ms: int = 0  # from one of them to the next; 0: there is one


RefusalReason = Literal[
    "late",  # ready only after deadline_ms
    "invalid",  # the text is no action of this space
    "cut",  # the answer ended before it was complete
    "not-finite",  # the model's numbers were NaN or infinite
    "paused",  # control paused the daemon while this frame was on its way
    "stale-task",  # the frame was answered under an instruction that has since been replaced
    "clock",  # the frame claims to be from the future
]


class Refusal(Header, frozen=True, kw_only=True, tag_field="kind", tag="refusal"):
    """No action for this frame, and why. The controller holds."""

    camera: str
    frame_id: int
    t_capture_ns: int
    capture_clock: Clock
    age_ms: float
    reason: RefusalReason
    detail: str
    task: str
    dropped_frames: int


Lane = Literal["describe", "answer", "action", "thought"]


class Words(Header, frozen=True, kw_only=True, tag_field="kind", tag="words"):
    """A piece of language as it is decoded. Pieces of one sentence share lane, frame_id and request."""

    # describe: the running description; answer: to a question; thought: what a reasoning model thinks before either;
    # action: the action's own text
    lane: Lane
    frame_id: int
    text: str
    request: str = ""  # id of the question this answers
    last: bool = False
    cut: str = ""  # with last: why the sentence ended early (PROTOCOL.md lists them)


State = Literal["starting", "running", "paused", "no-frames", "stalled", "fault", "stopping"]


class Worker(msgspec.Struct, frozen=True, kw_only=True):
    alive: bool
    pid: int | None
    restarts: int
    rss_mib: float | None  # None: unknown


class Status(Header, frozen=True, kw_only=True, tag_field="kind", tag="status"):
    """What the daemon is doing. Numbers count since this epoch began; None means unknown, never 0."""

    state: State
    reason: str  # why it is not running; empty when it is
    uptime_s: float
    camera: str
    camera_worker: Worker
    model_worker: Worker
    frames: int  # delivered by the camera
    frames_dropped: int  # of these, never looked at: a newer one was there
    actions: int
    refusals: dict[str, int]  # by reason
    faults: dict[str, int]  # by "camera: reason" or "model: reason"
    last_frame_age_ms: float | None
    last_action_age_ms: float | None  # since the last action was published
    progress: int  # grows with every inference; what the watchdog looks at
    task: str
    vision: str  # which backend and provider really run, e.g. "onnxruntime CPUExecutionProvider"
    mem_available_mib: float | None
    temperature_c: float | None
    adapter: str = ""  # that is on; empty: none


# ---------------------------------------------------------------------------------------------------------------------
# Control: a request is one map, the answer one map with the same id. Repeating an id returns the first answer.

Operation = Literal["instruct", "adapter", "ask", "state", "pause", "resume", "stats"]
Fact = bool | int | float | str  # a value that a controller pushes about its vehicle


class Request(msgspec.Struct, frozen=True, kw_only=True):
    v: int
    id: str  # chosen by the controller; at most 64 characters
    op: Operation
    text: str = ""  # the instruction, the question, or the adapter's name
    values: dict[str, Fact] = {}  # of state: key -> newest value


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    v: int
    id: str
    ok: bool
    error: str = ""
    result: dict[str, Any] = {}


# ---------------------------------------------------------------------------------------------------------------------
# Between the processes: camera and model -> supervisor.


class CameraOpened(msgspec.Struct, frozen=True, tag_field="kind", tag="opened"):
    width: int
    height: int
    fps: float | None
    description: str


class CameraEnded(msgspec.Struct, frozen=True, tag_field="kind", tag="ended"):
    """A source with an end (video or folder, loop off) reached it."""


CameraReason = Literal["absent", "busy", "unreadable", "stalled", "frozen", "clock", "too-large"]


class CameraFault(msgspec.Struct, frozen=True, tag_field="kind", tag="fault"):
    reason: CameraReason
    detail: str


CameraEvent = CameraOpened | CameraEnded | CameraFault


class Ready(msgspec.Struct, frozen=True, tag_field="kind", tag="ready"):
    """The model is loaded and has answered a warm-up frame."""

    vision: str
    load_s: float
    warmup_ms: float


class CannotStart(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="cannot-start"):
    """The last words of a model process that never gets ready."""

    reason: str
    configured: bool  # the configuration is at fault: the same would happen again


class Progress(msgspec.Struct, frozen=True, tag_field="kind", tag="progress"):
    """Work was really done: a stage of loading, or a decode while no frame came."""

    what: str


class Note(msgspec.Struct, frozen=True, tag_field="kind", tag="note"):
    """One line for the log."""

    line: str


# Why an answer is not complete; empty: it is. cancelled: paused, or told something else meanwhile.
Cut = Literal["", "late", "length", "grammar", "not-finite", "cancelled"]


class Instructed(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="instructed"):
    """From here on frames are answered under this instruction and adapter; with an error, as before."""

    task_id: int
    text: str
    adapter: str
    error: str = ""


class Proposal(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="proposal"):
    """The model's answer to one frame, unchecked: the supervisor makes an Action or a Refusal of it."""

    frame_id: int
    t_capture_ns: int
    capture_clock: Clock
    frame_seq: int  # of the slot: tells how many frames were passed over
    task_id: int  # which instruction it was asked under
    text: str
    cut: Cut
    stages_ms: Stages


class Piece(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="piece"):
    lane: Lane
    frame_id: int
    text: str
    request: str = ""
    last: bool = False
    cut: str = ""


class Span(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="span"):
    """Something that was done, for the timeline (`edge-agent run --trace`)."""

    name: str
    thread: str
    start_ns: int
    stop_ns: int


ModelEvent = Ready | CannotStart | Progress | Note | Instructed | Proposal | Piece | Span


# Supervisor -> model.


class Instruct(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="instruct"):
    """None: as it is."""

    task_id: int
    text: str | None = None
    adapter: str | None = None


class Ask(msgspec.Struct, frozen=True, tag_field="kind", tag="ask"):
    request: str
    question: str


class SetPaused(msgspec.Struct, frozen=True, tag_field="kind", tag="paused"):
    paused: bool


ModelCommand = Instruct | Ask | SetPaused

# ---------------------------------------------------------------------------------------------------------------------

_encoder = msgspec.msgpack.Encoder()
encode = _encoder.encode  # between processes: any struct -> msgpack bytes


def _decoder(kind: Any) -> Callable[[bytes | memoryview], Any]:
    """msgpack bytes -> a struct. Raises msgspec.DecodeError, and nothing else, on anything that is none."""
    decode = msgspec.msgpack.Decoder(kind).decode

    def checked(payload: bytes | memoryview) -> Any:
        try:
            return decode(payload)
        except (UnicodeDecodeError, RecursionError) as error:  # msgspec lets these two through
            raise msgspec.DecodeError(str(error)) from None

    return checked


_WIRE = {"actions": _decoder(Action | Refusal), "words": _decoder(Words), "status": _decoder(Status)}
decode_camera_event = _decoder(CameraEvent)
decode_model_event = _decoder(ModelEvent)
decode_model_command = _decoder(ModelCommand)
decode_request = _decoder(Request)
decode_reply = _decoder(Reply)


def pack(stream: str, message: Header) -> bytes:
    """The one frame that goes on the wire: topic byte, then the map.

    Raises ValueError when the message is too large or an action's number is not finite: neither may leave.
    """
    if isinstance(message, Action) and not _finite(message):
        raise ValueError(f"action {message.action!r} of frame {message.frame_id} holds a number that is not finite")
    payload = STREAMS[stream].topic + _encoder.encode(message)
    if len(payload) > MAX_MESSAGE_BYTES:
        raise ValueError(f"{stream}: message of {len(payload)} bytes, the limit is {MAX_MESSAGE_BYTES}")
    return payload


def _finite(action: Action) -> bool:
    numbers = [
        action.age_ms,
        *action.values.values(),
        *action.clamped.values(),
        *(number for values in action.later for number in values.values()),
        *msgspec.structs.astuple(action.stages_ms),
    ]
    return all(math.isfinite(number) for number in numbers if isinstance(number, float))


def unpack(stream: str, payload: bytes) -> Any:
    """The message in one wire frame. Raises msgspec.DecodeError (a ValueError) on anything else."""
    topic = STREAMS[stream].topic
    if payload[:1] != topic:
        raise msgspec.DecodeError(f"{stream}: expected topic {topic!r}, found {payload[:1]!r}")
    return _WIRE[stream](memoryview(payload)[1:])
