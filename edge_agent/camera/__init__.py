"""The camera process. OpenCV reads these settings when it is loaded, so they are set before any file imports it."""

import os

from edge_agent.ipc.frame_slot import MAX_IMAGE_BYTES

os.environ |= {
    "OPENCV_LOG_LEVEL": "SILENT",  # the supervisor gets faults as messages; stderr is for unforeseen errors only
    "OPENCV_FFMPEG_LOGLEVEL": "-8",  # AV_LOG_QUIET
    "OPENCV_VIDEOIO_V4L_SELECT_TIMEOUT": "2",  # seconds until grab() gives up on a silent camera; the default is 10
    "OPENCV_IO_MAX_IMAGE_PIXELS": str(MAX_IMAGE_BYTES // 3),  # OpenCV checks this before it decodes an image
}
