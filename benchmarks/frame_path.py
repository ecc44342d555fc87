"""Where the time of a frame goes between camera and encoder, on one core: no model, no daemon.

    python benchmarks/frame_path.py                    # seconds

"Before" is what the model process did with a frame as captured; "model" is what it does now with an image that the
camera process has resized; "camera" is the resize there, which is done while the model answers the frame before;
"opencv" is the same resize by OpenCV's INTER_AREA. Times are of the thread's processor, so other programs disturb them
little. The last line is one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import simplejpeg

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from edge_agent.bundle.manifest import VisionInfo  # noqa: E402
from edge_agent.camera.picture import decode_jpeg_for  # noqa: E402
from edge_agent.camera.source import WantedImage, into_slot  # noqa: E402
from edge_agent.config import CameraConfig  # noqa: E402
from edge_agent.ipc.frame_slot import Slot  # noqa: E402
from edge_agent.ipc.image_grid import image_size  # noqa: E402
from edge_agent.model.preprocess import Preprocessor  # noqa: E402
from edge_agent.tools.bench import synthetic_frames  # noqa: E402

SIZES = ((480, 640), (720, 1280), (1080, 1920), (2160, 3840))
TOKENS = (25, 256)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
REPEATS = 60
CONFIG = CameraConfig(source="none")


def milliseconds(work: Callable[[], object]) -> dict[str, float]:
    work()
    took_ms = []
    for _ in range(REPEATS):
        start_s = time.thread_time()
        work()
        took_ms.append(1000 * (time.thread_time() - start_s))
    return {"p50": round(float(np.percentile(took_ms, 50)), 3), "p99": round(float(np.percentile(took_ms, 99)), 3)}


def measure(height: int, width: int, tokens: int) -> dict[str, object]:
    vision = VisionInfo(patch=14, merge=2, image_size=1540, mean=MEAN, std=STD)
    preprocessor, slot = Preprocessor(vision, tokens), Slot.create()
    wanted = WantedImage(1, preprocessor.request())
    frame = cv2.resize(synthetic_frames(1)[0], (width, height), interpolation=cv2.INTER_CUBIC)
    noise = np.random.default_rng(0).normal(0, 3, frame.shape)
    frame = np.clip(frame + noise, 0, 255).astype(np.uint8)
    jpeg = simplejpeg.encode_jpeg(frame, quality=85, colorspace="BGR", colorsubsampling="420")

    def camera_jpeg() -> None:
        bgr, size = decode_jpeg_for(wanted, jpeg)
        into_slot(bgr, slot, CONFIG, wanted=wanted, full_size=size)

    image = into_slot(frame, slot, CONFIG, wanted=wanted).copy()
    size = image.shape[1::-1]
    return {
        "frame": f"{width}x{height}",
        "tokens": tokens,
        "image": "{1}x{0}".format(*image_size(height, width, wanted.request or preprocessor.request())),
        "before_ms": milliseconds(lambda: preprocessor.pixels(preprocessor.image(frame))),
        "model_ms": milliseconds(lambda: preprocessor.pixels(preprocessor.image(image))),
        "camera_ms": milliseconds(lambda: into_slot(frame, slot, CONFIG, wanted=wanted)),
        "opencv_ms": milliseconds(lambda: cv2.resize(frame, size, interpolation=cv2.INTER_AREA)),
        "camera_jpeg_ms": milliseconds(camera_jpeg),
    }


def main() -> int:
    cv2.setNumThreads(1)
    rows = [measure(*size, tokens) for size in SIZES for tokens in TOKENS]
    for row in rows:
        print(row, file=sys.stderr)
    print(json.dumps({"benchmark": "frame_path", "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
