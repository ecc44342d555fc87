"""The camera process. OpenCV reads these settings when it is loaded: they are set before any file imports it."""

import os

from edge_agent.ipc.frame_slot import MAX_IMAGE_BYTES

os.environ |= {
    "OPENCV_LOG_LEVEL": "SILENT",  # faults go to the supervisor by name; stderr is for what nobody foresaw
    "OPENCV_FFMPEG_LOGLEVEL": "-8",  # AV_LOG_QUIET
    "OPENCV_VIDEOIO_V4L_SELECT_TIMEOUT": "2",  # seconds until grab() gives up on a silent camera; 10 without this
    "OPENCV_IO_MAX_IMAGE_PIXELS": str(MAX_IMAGE_BYTES // 3),  # checked before an image is decoded
}
