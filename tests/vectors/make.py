"""Write the golden vectors of the wire: python -m tests.vectors.make

Run this only after a change of the wire that is meant. The test of the vectors compares the files with the code.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import msgspec

from edge_agent.wire.codec import encode
from edge_agent.wire.control import Reply, Request
from edge_agent.wire.messages import (
    Action,
    BoardStatus,
    GovernorStatus,
    Refusal,
    StageTimes,
    Status,
    TextMessage,
    WorkerStatus,
)
from edge_agent.wire.pushed_frame import pack_pushed_frame
from edge_agent.wire.streams import pack

FOLDER = Path(__file__).resolve().parent
# 2^53 + 1 is not a float64: a reader that takes integers for float64 gets another number.
BEYOND_FLOAT64 = 9_007_199_254_740_993
HEADER: dict[str, Any] = {"v": 1, "session": 201_326_592_000_007, "t_pub_ns": BEYOND_FLOAT64 + 42_500_000}
HEADER |= {"bundle_id": "0123456789abcdef"}
FRAME: dict[str, Any] = {
    "camera": "front",
    "frame_id": 4711,
    "t_capture_ns": BEYOND_FLOAT64,
    "capture_clock": "driver",
    "age_ms": 42.5,
    "instruction": "Land on the red disc.",
    "dropped_frames": 2,
}
STAGES = StageTimes(queue=1.25, encode=20.5, prefill=12.0, decode=8.5, check=0.25)
ACTION = Action(
    **HEADER,
    **FRAME,
    seq=17,
    stages_ms=STAGES,
    valid_for_ms=500,
    valid_until_ns=BEYOND_FLOAT64 + 542_500_000,
    action_space="velocity_body",
    type="move",
    values={"forward_m_s": 2.0, "right_m_s": -0.5, "down_m_s": 0.0, "yaw_rate_rad_s": 0.125},
    clamped={"forward_m_s": 9.5},
)
WORKER = WorkerStatus(alive=True, pid=4242, restarts=0, rss_mib=183.5)
STATUS = Status(
    **HEADER,
    seq=400,
    state="no-frames",
    reason="camera: no frame for 3 s",
    uptime_s=80.25,
    camera="front",
    camera_worker=msgspec.structs.replace(WORKER, alive=False, pid=None, restarts=1, rss_mib=None),
    model_worker=WORKER,
    frames=2400,
    frames_dropped=31,
    actions=2361,
    refusals={"late": 8},
    faults={"camera: stalled": 1},
    last_frame_age_ms=3020.5,
    last_action_age_ms=2978.0,
    inference_count=4800,
    instruction="Land on the red disc.",
    vision_backend="onnxruntime CPUExecutionProvider",
    mem_available_mib=None,
    temperature_c=61.5,
    adapter="night",
    paused=True,
    wall_clock_ns=1_795_000_000_000_000_000,
    boot_id="0b1d6c1e-9a55-4c83-a1c6-9f1c5f3a2d11",
    language_backend="llama.cpp GPU, 33 of 33 layers",
    board=BoardStatus(power_w=14.5, energy_j_per_action=0.75, throttle_reasons=["temperature"], gpu_temperature_c=61.5),
    governor=GovernorStatus(level=2, max_image_tokens=128, max_rate_hz=12.5, reason="at most 128 image tokens"),
    information_age_ms=51.25,
)
TEXT = TextMessage(**HEADER, seq=3, lane="answer", frame_id=4711, text="ein Würfel ", request="9f3a61c2d07be845")
VECTORS: dict[str, bytes] = {
    "action": pack("actions", ACTION),
    "action_with_chunk": pack(
        "actions",
        msgspec.structs.replace(
            ACTION,
            action_space="arm",
            type="reach",
            values={"forward_m": 0.25, "grip": "open"},
            clamped={"chunk.1.forward_m": 1.5},
            adapter="night",
            chunk=[{"forward_m": 0.5, "grip": "open"}, {"forward_m": 1.0, "grip": "closed"}],
            chunk_step_ms=100,
        ),
    ),
    "refusal": pack(
        "actions", Refusal(**HEADER, **FRAME, seq=18, reason="late", detail="2100 ms old, deadline_ms is 2000")
    ),
    "text": pack("text", TEXT),
    "text_final": pack("text", msgspec.structs.replace(TEXT, seq=4, text="", final=True, stop_reason="length")),
    "status": pack("status", STATUS),
    "request_ask": encode(
        Request(v=1, id="9f3a61c2d07be845", op="ask", text="What is ahead?", expires_ns=BEYOND_FLOAT64)
    ),
    "request_vehicle_state": encode(
        Request(
            v=1,
            id="00c0ffee00c0ffee",
            op="vehicle_state",
            values={"altitude_m": 3.25, "satellites": 11, "armed": True, "mode": "offboard"},
        )
    ),
    "reply_ok": encode(
        Reply(
            v=1,
            id="9f3a61c2d07be845",
            ok=True,
            result={"text": "ein Würfel", "frame_id": 4711, "stop_reason": ""},
        )
    ),
    "reply_error": encode(Reply(v=1, id="9f3a61c2d07be845", ok=False, error="the model is not ready; try again")),
    "pushed_frame": pack_pushed_frame(4711, BEYOND_FLOAT64, 2, 1, "rgb8", bytes([255, 0, 0, 0, 128, 255])),
}


def as_json(payload: bytes) -> bytes:
    """The same message as JSON: {"topic": ..., "message": {...}}. Bytes are base64."""
    has_topic = payload[:1].isalpha()  # a msgpack map begins with 0x80 or above
    message = msgspec.msgpack.decode(payload[has_topic:])
    message |= {key: base64.b64encode(value).decode() for key, value in message.items() if isinstance(value, bytes)}
    topic = payload[:has_topic].decode()
    return msgspec.json.format(msgspec.json.encode({"topic": topic, "message": message}), indent=2) + b"\n"


def main() -> None:
    for name, payload in VECTORS.items():
        (FOLDER / f"{name}.msgpack").write_bytes(payload)
        (FOLDER / f"{name}.json").write_bytes(as_json(payload))


if __name__ == "__main__":
    main()
