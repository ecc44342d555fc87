"""The messages between the three processes: events to the supervisor, and commands to the model process."""

from __future__ import annotations

from typing import Literal

import msgspec

from edge_agent.wire.codec import make_decoder
from edge_agent.wire.messages import CaptureClock, Lane, StageTimes, TextStopReason

# -- camera process -> supervisor -------------------------------------------------------------------------------------


class CameraOpened(msgspec.Struct, frozen=True, tag_field="kind", tag="opened"):
    """The source was opened, or its frames have a new size."""

    width: int
    height: int
    fps: float | None
    description: str


class CameraEnded(msgspec.Struct, frozen=True, tag_field="kind", tag="ended"):
    """A source that has an end (a video or a folder, loop: false) has reached it."""


CameraFaultReason = Literal["absent", "busy", "unreadable", "stalled", "frozen", "clock", "too-large", "other-camera"]


class CameraFault(msgspec.Struct, frozen=True, tag_field="kind", tag="fault"):
    """The source delivers no frame. The camera process opens it again, or ends with EX_CONFIG."""

    reason: CameraFaultReason
    detail: str


CameraEvent = CameraOpened | CameraEnded | CameraFault


# -- model process -> supervisor --------------------------------------------------------------------------------------


class ModelReady(msgspec.Struct, frozen=True, tag_field="kind", tag="ready"):
    """The model is loaded and has answered a warm-up frame."""

    vision: str  # backend and provider that really run, for example "onnxruntime CPUExecutionProvider"
    load_s: float
    warmup_ms: float  # duration of the warm-up frame
    memory_reduced: bool = False  # the memory plan reduced the configuration, for example the context
    language: str = ""  # where the language model really runs, for example "llama.cpp CPU"


class StartupFailed(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="cannot-start"):
    """The model process cannot load, and ends."""

    reason: str
    fault: str  # a row of FAULTS in edge_agent/errors.py


class Heartbeat(msgspec.Struct, frozen=True, tag_field="kind", tag="progress"):
    """Work was done: a stage of loading, or a decode step while no frame came."""

    what: str


class LogLine(msgspec.Struct, frozen=True, tag_field="kind", tag="note"):
    """One line for the log."""

    line: str


# Why an answer to a frame is not complete; "": it is. cancelled: a pause or a new instruction came meanwhile.
AnswerStopReason = Literal["", "late", "length", "grammar", "not-finite", "cancelled"]
StopReason = Literal[AnswerStopReason, "no-state"]


class InstructionApplied(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="instructed"):
    """The answer to SetInstruction: frames are now answered under this instruction and adapter."""

    instruction_id: int
    text: str
    adapter: str
    error: str = ""  # why the instruction was refused: then frames are answered as before


class Proposal(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="proposal"):
    """The model's answer to one frame, unchecked. The supervisor makes an Action or a Refusal of it."""

    frame_id: int
    t_capture_ns: int
    capture_clock: CaptureClock
    frame_seq: int  # number of the frame in the slot: a gap is the number of dropped frames
    instruction_id: int  # of the instruction that the model followed
    text: str
    stop_reason: StopReason
    stages_ms: StageTimes


class TextDelta(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="piece"):
    """A piece of text as it is decoded."""

    lane: Lane
    frame_id: int
    text: str
    request: str = ""  # of AskQuestion, if the text answers a question
    final: bool = False  # the last piece of this text
    stop_reason: TextStopReason = ""
    error: str = ""  # in the final piece: why the question was refused; nothing was decoded


class TraceSpan(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="span"):
    """What was done when, for the timeline (`edge-agent run --trace`). The model process emits it if started with
    --trace."""

    name: str
    thread: str
    start_ns: int  # CLOCK_MONOTONIC
    stop_ns: int


class GpuReading(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="gpu"):
    """What the cards say once a second. The model process reads them, because their driver may hang or crash. It is no
    sign of progress. None: unknown. Of several cards: power is added up, of the others the worst value counts."""

    power_w: float | None = None
    temperature_c: float | None = None
    throttle_at_c: float | None = None  # of the card that is nearest to it; temperature_c is of the same card
    throttle_reasons: tuple[str, ...] | None = None
    clock_mhz: float | None = None


ModelEvent = (
    ModelReady
    | StartupFailed
    | Heartbeat
    | LogLine
    | InstructionApplied
    | Proposal
    | TextDelta
    | TraceSpan
    | GpuReading
)


# -- supervisor -> model process --------------------------------------------------------------------------------------


class SetInstruction(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="instruct"):
    """Follow another instruction, use another adapter, or both. The answer is InstructionApplied."""

    instruction_id: int  # a new number for each command
    text: str | None = None  # None: keep the instruction
    adapter: str | None = None  # None: keep the adapter; "": use none


class AskQuestion(msgspec.Struct, frozen=True, tag_field="kind", tag="ask"):
    """Answer a question about the newest frame. The answer is TextDelta on the lane "answer"."""

    request: str  # number that the supervisor gave to this question; comes back in TextDelta
    question: str


class CancelQuestion(msgspec.Struct, frozen=True, tag_field="kind", tag="cancel"):
    """End the answer to a question, or forget the question: nobody waits for it any more."""

    request: str  # of AskQuestion


class SetPaused(msgspec.Struct, frozen=True, tag_field="kind", tag="paused"):
    """Answer no frames, or answer them again."""

    paused: bool


class LimitLoad(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="limit"):
    """Work less, or as configured: the governor's command. It never changes a deadline."""

    max_image_tokens: int = 0  # of a frame; 0: as configured
    min_interval_ms: float = 0.0  # between the beginnings of two frames
    describe: bool = True  # write descriptions


ModelCommand = SetInstruction | AskQuestion | CancelQuestion | SetPaused | LimitLoad
decode_camera_event = make_decoder(CameraEvent)
decode_model_event = make_decoder(ModelEvent)
decode_model_command = make_decoder(ModelCommand)
