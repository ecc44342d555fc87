"""Every message in and out, with its units, and the one table of streams.

Three families, all msgpack maps written by msgspec: what leaves on the wire (PROTOCOL.md), what a controller may ask
for (control), and what the three processes tell each other. Nothing here opens a socket or a file, and nothing here
needs numpy: a controller on a small board imports this file.

    >>> header = dict(v=1, session=7, seq=0, t_pub_ns=0, bundle_id="ab")
    >>> unpack("text", pack("text", TextMessage(lane="describe", frame_id=3, text="a", **header))).text
    'a'
"""

from __future__ import annotations

from typing import Literal

import msgspec

PROTOCOL_VERSION = 1
MAX_MESSAGE_BYTES = 64 * 1024
NS_PER_MS = 1_000_000

# On the wire. Readers ignore keys they do not know; a field is added, never renamed.


class Header(msgspec.Struct, frozen=True, kw_only=True):
    v: int  # PROTOCOL_VERSION
    session: int  # random per start of the daemon: a new one means that seq starts again
    seq: int  # counts every message of this stream: a gap is a loss
    t_pub_ns: int  # CLOCK_MONOTONIC of this boot
    bundle_id: str  # first 16 hex digits of the sha256 of bundle.json; empty while none is verified


class StageTimes(msgspec.Struct, frozen=True, kw_only=True):
    """Where the time of one frame went, milliseconds."""

    queue: float  # capture until the model process took the frame
    encode: float  # resize, normalise and vision encoder
    prefill: float  # frame rows and closing text through the language model
    decode: float  # the answer, token by token
    check: float  # text to checked action


CaptureClock = Literal[
    "driver", "arrival", "sender"
]  # who stamped the frame: the kernel, our read(), or the pushing process


class Action(Header, frozen=True, kw_only=True, tag_field="kind", tag="action"):
    """A checked request to the vehicle. It stands until valid_until_ns and not a moment longer."""

    camera: str
    frame_id: int
    t_capture_ns: int
    capture_clock: CaptureClock
    age_ms: float  # capture until publication
    stages_ms: StageTimes
    valid_for_ms: int
    valid_until_ns: int  # t_pub_ns + valid_for_ms
    action_space: str  # name of the action space: what the names in values mean
    type: str
    values: dict[str, float | int | str | bool]  # SI units as the action space names them, inside its ranges
    clamped: dict[str, float]  # field -> what the model had asked for, where the envelope changed it
    instruction: str  # the instruction this answers
    dropped_frames: int  # frames the camera delivered since the previous answer and nobody looked at
    adapter: str = ""  # under which the model answered; empty: none
    chunk: list[dict[str, float | int | str | bool]] = []  # values of the steps after this one, where the space has any
    chunk_step_ms: int = 0  # from one of them to the next; 0: there is one


RefusalReason = Literal[
    "late",  # ready only after deadline_ms
    "invalid",  # the text is no action of this space
    "truncated",  # the answer ended before it was complete
    "not-finite",  # the model's numbers were NaN or infinite
    "paused",  # control paused the daemon while this frame was on its way
    "stale-instruction",  # the frame was answered under an instruction that has since been replaced
    "future-timestamp",  # the frame claims to be from the future
]


class Refusal(Header, frozen=True, kw_only=True, tag_field="kind", tag="refusal"):
    """No action for this frame, and why. The controller holds."""

    camera: str
    frame_id: int
    t_capture_ns: int
    capture_clock: CaptureClock
    age_ms: float
    reason: RefusalReason
    detail: str
    instruction: str
    dropped_frames: int


Lane = Literal["describe", "answer", "action", "reasoning"]


class TextMessage(Header, frozen=True, kw_only=True, tag_field="kind", tag="text"):
    """A piece of language as it is decoded. Pieces of one sentence share lane, frame_id and request."""

    # describe: the running description; answer: to a question; thought: what a reasoning model thinks before either;
    # action: the action's own text
    lane: Lane
    frame_id: int
    text: str
    request: str = ""  # id of the question this answers
    final: bool = False
    stop_reason: str = ""  # with last: why the sentence ended early (PROTOCOL.md lists them)


DaemonState = Literal["starting", "running", "paused", "no-frames", "stalled", "fault", "stopping"]


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True):
    alive: bool
    pid: int | None
    restarts: int
    rss_mib: float | None  # None: unknown


class Status(Header, frozen=True, kw_only=True, tag_field="kind", tag="status"):
    """What the daemon is doing. Numbers count since this session began; None means unknown, never 0."""

    state: DaemonState
    reason: str  # why it is not running; empty when it is
    uptime_s: float
    camera: str
    camera_worker: WorkerStatus
    model_worker: WorkerStatus
    frames: int  # delivered by the camera
    frames_dropped: int  # of these, never looked at: a newer one was there
    actions: int
    refusals: dict[str, int]  # by reason
    faults: dict[str, int]  # by "camera: reason" or "model: reason"
    last_frame_age_ms: float | None
    last_action_age_ms: float | None  # since the last action was published
    inference_count: int  # grows with every inference; what the watchdog looks at
    instruction: str
    vision_backend: str  # which backend and provider really run, e.g. "onnxruntime CPUExecutionProvider"
    mem_available_mib: float | None
    temperature_c: float | None
    adapter: str = ""  # that is on; empty: none
