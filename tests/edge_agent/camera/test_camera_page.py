"""docs/camera.md: its sizes are those of the code, and its pipelines can be read, and run where elements stand in."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from contextlib import closing

import pytest
import yaml

from edge_agent.camera.gstreamer import frame_size, pipeline_of
from edge_agent.camera.process import open_source
from edge_agent.camera.source import CapturedFrame
from edge_agent.config import CameraConfig, load_config_text
from edge_agent.ipc.events import CameraOpened
from edge_agent.ipc.image_grid import ImageRequest, image_size
from tests.harness import ROOT

PAGE = (ROOT / "docs" / "camera.md").read_text(encoding="utf-8")
BLOCKS = [block for block in re.findall(r"(?:^    .*\n)+", PAGE, flags=re.MULTILINE) if "gst:" in block]
SIZE_ROWS = re.findall(r"^\| (\d+) \| (\d+x\d+) \| (\d+x\d+) \| (\d+x\d+) \| (\d+x\d+) \|$", PAGE, flags=re.MULTILINE)
STAND_INS = {  # an element of a board -> one that every GStreamer has
    r"nvarguscamerasrc sensor-id=0 ! video/x-raw\(memory:NVMM\)": "videotestsrc ! video/x-raw",
    r"v4l2src device=/dev/video0 ! image/jpeg(,[^ ]*)": r"videotestsrc ! video/x-raw\1 ! jpegenc",
    r"v4l2src device=/dev/video0": "videotestsrc",
    r"nvv4l2decoder mjpeg=1": "jpegdec",
    r"nvvidconv interpolation-method=5": "videoconvert ! videoscale",
    r"v4l2convert": "videoscale",
}


def camera_of(block: str) -> CameraConfig:
    return load_config_text("bundle: /b\n" + block.replace("\n    ", "\n").removeprefix("    "), "camera.md").camera


def pixels(text: str) -> tuple[int, int]:
    width, height = text.split("x")
    return int(height), int(width)


def test_the_sizes_are_those_of_the_grid():
    assert len(SIZE_ROWS) == 3
    for tokens, *sizes in SIZE_ROWS:
        request = ImageRequest(unit=28, longest_side=1540, max_tokens=int(tokens))
        for camera, image, asked in (((1080, 1920), *sizes[:2]), ((960, 1280), *sizes[2:])):
            assert image_size(*camera, request) == pixels(image)
            assert pixels(asked) == tuple(2 * side for side in pixels(image))
            assert image_size(*pixels(asked), request) == pixels(image), "the frame that is asked for gives that image"


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_a_pipeline_of_the_page_can_be_read(block):
    config = camera_of(block)
    width, height = frame_size(config)
    command = pipeline_of(config, width, height)
    assert command[-1] == f"video/x-raw,format=RGB,width={width},height={height}"
    elements = shlex.join(command).split(" '!' ")
    assert all(re.match(r"^'?[a-z0-9]+(/x-raw|/jpeg)?", element) for element in elements), elements
    assert f"{width}x{height}" in {asked for row in SIZE_ROWS for asked in (row[2], row[4])}


def has_elements(*names: str) -> bool:
    inspect = shutil.which("gst-inspect-1.0")
    return bool(inspect) and all(subprocess.run([inspect, "--exists", name]).returncode == 0 for name in names)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_a_pipeline_of_the_page_runs_with_elements_that_stand_in(block, slot, clock):
    """The board's elements are not here. What is in the other places is: caps, their order, and the size at the end."""
    source = yaml.safe_load(block)["camera"]["source"]
    for element, stand_in in STAND_INS.items():
        source = re.sub(element, stand_in, source)
    if not has_elements(*(word for word in ("videotestsrc", "videoscale", "jpegenc", "jpegdec") if word in source)):
        pytest.skip("GStreamer or one of its elements is not installed")
    config = camera_of(block)
    with closing(
        open_source(CameraConfig(source=source, width=config.width, height=config.height), slot, clock)
    ) as items:
        opened, frame = next(items), next(items)
    assert isinstance(opened, CameraOpened) and isinstance(frame, CapturedFrame)
    assert frame.size == (config.height, config.width) and frame.image.std() > 30
