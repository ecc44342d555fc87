"""The published messages: every field with its type and unit. PROTOCOL.md has the same fields as tables.

A controller on a small computer imports this file, so it needs msgspec only. Nothing here opens a socket or a file.

Rules for changes: a field may be added, with a default. A field is never renamed and never removed. Readers ignore
fields that they do not know.

    >>> from edge_agent.wire.streams import pack, unpack
    >>> header = dict(v=1, session=7, seq=0, t_pub_ns=0, bundle_id="0123456789abcdef")
    >>> unpack("text", pack("text", TextMessage(lane="describe", frame_id=3, text="a disc", **header))).text
    'a disc'
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

PROTOCOL_VERSION: Final = 1
MAX_MESSAGE_BYTES = 64 * 1024


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """The first fields of every published message."""

    v: Literal[1]  # PROTOCOL_VERSION
    session: int  # random number, new at every start of the daemon; seq then starts again at 0
    seq: int  # counts the messages of this stream within a session; a gap is a lost message
    t_pub_ns: int  # time of publication, CLOCK_MONOTONIC
    bundle_id: str  # first 16 hex digits of the SHA-256 of bundle.json


# -- stream actions ---------------------------------------------------------------------------------------------------


class StageTimes(msgspec.Struct, frozen=True, kw_only=True):
    """Where the time of one frame went. Milliseconds."""

    queue: float  # the frame waits: from capture until the model process starts to work on it
    encode: float  # resize, normalise, vision encoder
    prefill: float  # language model: image embeddings, vehicle state and closing prompt
    decode: float  # language model: the answer, token by token
    check: float  # from the answer's arrival in the supervisor to publication


# Who set t_capture_ns: the camera driver, our own read() when the frame arrived, or the process that pushed the frame.
CaptureClock = Literal["driver", "arrival", "sender"]
ActionValue = float | str  # of a NumberField, of a ChoiceField


class Action(Header, frozen=True, kw_only=True, tag_field="kind", tag="action"):
    """A checked request to the vehicle. It is valid until valid_until_ns."""

    camera: str
    frame_id: int
    t_capture_ns: int  # CLOCK_MONOTONIC
    capture_clock: CaptureClock
    age_ms: float  # from capture to publication
    stages_ms: StageTimes
    valid_for_ms: int
    valid_until_ns: int  # t_pub_ns + valid_for_ms; CLOCK_MONOTONIC
    action_space: str  # name of the action space: defines the action types and the names in values
    type: str  # action type
    values: dict[str, ActionValue]  # unit by the action space; each number inside its range
    clamped: dict[str, float]  # name -> number that the model had written, where it was outside the range
    instruction: str  # the instruction that the model follows
    dropped_frames: int  # frames that the camera delivered and the model skipped since the previous answer
    adapter: str = ""  # name of the active LoRA adapter; "" without one
    chunk: list[dict[str, ActionValue]] = []  # values of the steps after this one; empty with horizon 1
    chunk_step_ms: int = 0  # time from one step to the next; 0 with horizon 1


RefusalReason = Literal[
    "late",  # the answer is older than task.deadline_ms
    "invalid",  # the model's text is not an action of this action space
    "truncated",  # the answer ended before it was complete
    "not-finite",  # the model's numbers were NaN or infinite
    "no-state",  # a text-only model, and a value of the vehicle's state is missing or too old
    "paused",  # control paused the daemon while the model worked on this frame
    "stale-instruction",  # the model answered under an instruction that has since been replaced
    "future-timestamp",  # t_capture_ns is later than the present
]


class Refusal(Header, frozen=True, kw_only=True, tag_field="kind", tag="refusal"):
    """There is no action for this frame. The controller holds."""

    camera: str
    frame_id: int
    t_capture_ns: int  # CLOCK_MONOTONIC
    capture_clock: CaptureClock
    age_ms: float  # from capture to publication
    reason: RefusalReason
    detail: str  # for people; at most 500 characters
    instruction: str
    dropped_frames: int


# -- stream text ------------------------------------------------------------------------------------------------------

Lane = Literal[
    "action",  # the model's own text of an answer to a frame, before any check
    "describe",  # the running description of what the camera shows
    "answer",  # the answer to a question
    "reasoning",  # what a reasoning model writes before a description or an answer
]
TextStopReason = Literal[
    "",  # the text is complete, or goes on
    "late",  # the deadline passed
    "length",  # the limit of tokens or of the context was reached
    "grammar",  # no token of the model fits the grammar of the action space
    "not-finite",  # the model's numbers were NaN or infinite
    "cancelled",  # a new instruction or a pause ended an answer to a frame, or nobody waits for an answer any more
    "new-instruction",  # a new instruction ended a description or an answer
    "new-question",  # a question ended a description
    "model-restart",  # the model process ended
]


class TextMessage(Header, frozen=True, kw_only=True, tag_field="kind", tag="text"):
    """A piece of text as the model writes it. The pieces of one text share lane, frame_id and request."""

    lane: Lane
    frame_id: int  # the frame that the text is about
    text: str
    request: str = ""  # id of the request `ask` that this text answers; "" without one
    final: bool = False  # the last piece of this text
    stop_reason: TextStopReason = ""  # in the final piece: why the text ended early


# -- stream status ----------------------------------------------------------------------------------------------------

DaemonState = Literal[
    "starting",  # not ready yet
    "running",  # frames are answered
    "paused",  # by control
    "no-frames",  # the camera delivers nothing
    "stalled",  # the model process made no progress and is restarted
    "fault",  # the model process ended and is restarted
    "stopping",  # the daemon ends; the last status of a session
]


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One child process of the daemon."""

    alive: bool
    pid: int | None  # None: no process
    restarts: int
    rss_mib: float | None  # resident memory; None: unknown


class BoardStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What the board's sensors and the GPU say. None means unknown."""

    power_w: float | None = None  # of the whole board; where nothing measures that, of the cards
    energy_j_per_action: float | None = None  # of the last 30 s: everything that power_w measures, for each action
    throttle_reasons: list[str] | None = None  # why clocks are lowered now; empty: they are not
    cpu_mhz: float | None = None  # of the fastest core
    gpu_mhz: float | None = None
    gpu_temperature_c: float | None = None  # of a card; degrees Celsius


class GovernorStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What the governor does to keep the board from throttling."""

    level: int = 0  # 0: nothing; each level saves more
    max_image_tokens: int | None = None  # None: as configured
    max_rate_hz: float | None = None  # answers per second; None: as fast as the model is
    reason: str = ""  # for people: what is limited, and why; "" at level 0


class Status(Header, frozen=True, kw_only=True, tag_field="kind", tag="status"):
    """What the daemon does. Counters start at 0 with the session. None means unknown."""

    state: DaemonState
    reason: str  # why the state is not "running", or why no actions come although it is; "" otherwise
    uptime_s: float
    camera: str
    camera_worker: WorkerStatus
    model_worker: WorkerStatus
    frames: int  # frames that the camera delivered
    frames_dropped: int  # frames that the model skipped because a newer one was there
    actions: int  # actions published
    refusals: dict[str, int]  # refusal reason -> count
    faults: dict[str, int]  # "camera: REASON" or "model: REASON" -> count
    last_frame_age_ms: float | None  # since the newest frame was captured; None: no frame yet
    last_action_age_ms: float | None  # since the last action was published; None: no action yet
    inference_count: int  # grows while the model process works; the watchdog checks it
    instruction: str
    vision_backend: str  # for example "onnxruntime CPUExecutionProvider"; "" until the model is ready
    mem_available_mib: float | None  # memory that the daemon can still use, by the machine and by its control groups
    temperature_c: float | None  # the hottest part: of the thermal zones and the cards; degrees Celsius
    adapter: str = ""  # name of the active LoRA adapter; "" without one
    paused: bool = False  # by control, in whatever state; no action is published until resume
    # For recorders, which want a date: nothing may be decided by these two.
    wall_clock_ns: int = 0  # CLOCK_REALTIME at t_pub_ns, ns since 1970; wrong where nothing has set the clock
    boot_id: str = ""  # of the kernel; stamps of two boots cannot be compared
    language_backend: str = ""  # for example "llama.cpp CPU"; "" until the model is ready
    board: BoardStatus | None = None
    governor: GovernorStatus | None = None
    # Mean age of information: how old the picture behind the newest action is, on average over the last 30 s. None:
    # fewer than two actions in that time, or paused.
    information_age_ms: float | None = None
