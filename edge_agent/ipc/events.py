"""What the three processes tell each other: events to the supervisor, commands to the model process."""

from __future__ import annotations

from typing import Literal

import msgspec

from edge_agent.wire.codec import make_decoder
from edge_agent.wire.messages import CaptureClock, Lane, StageTimes, TextStopReason

# Between the processes: camera and model -> supervisor.


class CameraOpened(msgspec.Struct, frozen=True, tag_field="kind", tag="opened"):
    width: int
    height: int
    fps: float | None
    description: str


class CameraEnded(msgspec.Struct, frozen=True, tag_field="kind", tag="ended"):
    """A source with an end (video or folder, loop off) reached it."""


CameraFaultReason = Literal["absent", "busy", "unreadable", "stalled", "frozen", "clock", "too-large"]


class CameraFault(msgspec.Struct, frozen=True, tag_field="kind", tag="fault"):
    reason: CameraFaultReason
    detail: str


CameraEvent = CameraOpened | CameraEnded | CameraFault


class ModelReady(msgspec.Struct, frozen=True, tag_field="kind", tag="ready"):
    """The model is loaded and has answered a warm-up frame."""

    vision: str
    load_s: float
    warmup_ms: float


class StartupFailed(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="cannot-start"):
    """The last words of a model process that never gets ready."""

    reason: str
    configured: bool  # the configuration is at fault: the same would happen again


class Heartbeat(msgspec.Struct, frozen=True, tag_field="kind", tag="progress"):
    """Work was really done: a stage of loading, or a decode while no frame came."""

    what: str


class LogLine(msgspec.Struct, frozen=True, tag_field="kind", tag="note"):
    """One line for the log."""

    line: str


# Why an answer is not complete; empty: it is. cancelled: paused, or told something else meanwhile.
StopReason = Literal["", "late", "length", "grammar", "not-finite", "cancelled"]


class InstructionApplied(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="instructed"):
    """From here on frames are answered under this instruction and adapter; with an error, as before."""

    instruction_id: int
    text: str
    adapter: str
    error: str = ""


class Proposal(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="proposal"):
    """The model's answer to one frame, unchecked: the supervisor makes an Action or a Refusal of it."""

    frame_id: int
    t_capture_ns: int
    capture_clock: CaptureClock
    frame_seq: int  # of the slot: tells how many frames were passed over
    instruction_id: int  # which instruction it was asked under
    text: str
    stop_reason: StopReason
    stages_ms: StageTimes


class TextDelta(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="piece"):
    lane: Lane
    frame_id: int
    text: str
    request: str = ""
    final: bool = False
    stop_reason: TextStopReason = ""


class TraceSpan(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="span"):
    """Something that was done, for the timeline (`edge-agent run --trace`)."""

    name: str
    thread: str
    start_ns: int
    stop_ns: int


ModelEvent = ModelReady | StartupFailed | Heartbeat | LogLine | InstructionApplied | Proposal | TextDelta | TraceSpan


# Supervisor -> model.


class SetInstruction(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="instruct"):
    """None: as it is."""

    instruction_id: int
    text: str | None = None
    adapter: str | None = None


class AskQuestion(msgspec.Struct, frozen=True, tag_field="kind", tag="ask"):
    request: str
    question: str


class SetPaused(msgspec.Struct, frozen=True, tag_field="kind", tag="paused"):
    paused: bool


ModelCommand = SetInstruction | AskQuestion | SetPaused
decode_camera_event = make_decoder(CameraEvent)
decode_model_event = make_decoder(ModelEvent)
decode_model_command = make_decoder(ModelCommand)
