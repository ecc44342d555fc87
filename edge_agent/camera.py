"""The camera process: one source, named by one string, into the newest-frame slot.

    /dev/video0, v4l2:/dev/v4l/by-id/..., 0    a V4L2 camera; the by-id name stays the same over a replug
    clip.mp4                                   a video file, at its own pace or (realtime: false) as fast as it is taken
    frames/                                    a folder of images in the order of their names
    gst:nvarguscamerasrc sensor-id=0 ! nvvidconv ! video/x-raw,format=RGBA
                                               a GStreamer pipeline, here a CSI camera; runs in gst-launch-1.0
    zmq:ipc:///run/edge-agent/frames           frames pushed by the process that owns the camera: frames.pack_frame()

The supervisor starts it (worker.py) with the CameraConfig as first message; back go CameraOpened, CameraFault and
CameraEnded. A live source that fails is named in a fault and opened again for ever; what cannot heal (no such file)
ends the process with EX_CONFIG. It cannot free itself from a read() that hangs: the supervisor kills it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import select
import shlex
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal

from edge_agent import worker
from edge_agent.config import CameraConfig
from edge_agent.frames import MAX_IMAGE_BYTES, Slot
from edge_agent.messages import CameraEnded, CameraEvent, CameraFault, CameraOpened, CameraReason, Clock, encode

# OpenCV reads these when it is loaded, so they stand above its import.
os.environ |= {
    "OPENCV_LOG_LEVEL": "SILENT",  # faults go to the supervisor by name; stderr is for what nobody foresaw
    "OPENCV_FFMPEG_LOGLEVEL": "-8",  # AV_LOG_QUIET
    "OPENCV_VIDEOIO_V4L_SELECT_TIMEOUT": "2",  # seconds until grab() gives up on a silent camera; 10 without this
    "OPENCV_IO_MAX_IMAGE_PIXELS": str(MAX_IMAGE_BYTES // 3),  # checked before an image is decoded
}

import cv2
import msgspec
import numpy as np
import zmq

NS_PER_S = 1_000_000_000
STALL_S = 2.0  # a live source silent for so long has stalled
GST_START_S = 8.0  # a CSI pipeline takes seconds to its first frame
FROZEN_FRAMES, FROZEN_NS = 30, NS_PER_S  # so many identical frames over so long: no sensor without noise does that
BACKOFF_S, MAX_BACKOFF_S = 0.5, 5.0
FOLDER_FPS, VIDEO_FPS = 5.0, 30.0  # where neither the source nor the configuration says
MAX_AHEAD_NS, MAX_AGE_NS = 5_000_000, NS_PER_S  # a pushed frame's stamp: so far in the future or past, and no further
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}


class Captured(msgspec.Struct, frozen=True):
    """One image, already in the slot's free buffer, not yet published."""

    image: np.ndarray  # (H, W, 3) uint8, RGB
    t_capture_ns: int
    capture_clock: Clock
    fps: float | None = None  # what the source says it gives
    frame_id: int | None = None  # None: counted here


Items = Generator["Captured | CameraFault", None, None]


class Broken(Exception):
    """The source gives no image, and why: what a CameraFault says."""

    def __init__(self, reason: CameraReason, detail: str, heals: bool = True):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.heals = heals  # worth another try: a camera may come back, a misspelt path does not


# ---------------------------------------------------------------------------------------------------------------------
# Sources: generators that fill the slot's free buffer and yield Captured, or a CameraFault that they can live with.


def v4l2(config: CameraConfig, slot: Slot) -> Items:
    device = config.source.removeprefix("v4l2:")
    device = f"/dev/video{device}" if device.isdigit() else device
    check_device(device)
    capture = cv2.VideoCapture(device, cv2.CAP_V4L2)
    try:
        if not capture.isOpened():
            raise Broken("unreadable", f"{device}: opens, but is no V4L2 camera with a pixel format known to OpenCV")
        wishes = {
            cv2.CAP_PROP_FRAME_WIDTH: config.width,
            cv2.CAP_PROP_FRAME_HEIGHT: config.height,
            cv2.CAP_PROP_FPS: config.fps,
            cv2.CAP_PROP_BUFFERSIZE: 1,  # the driver queues frames: this loop always drains, and what it gets is new
        }
        for wish, value in wishes.items():
            if value is not None:
                capture.set(wish, value)
        fps = capture.get(cv2.CAP_PROP_FPS) or None
        bgr, last_driver_ns, good_ns = None, 0, time.monotonic_ns()
        while capture.grab():
            arrival_ns = time.monotonic_ns()
            # JetPack drivers stamp with another clock, half a minute off: only a plausible stamp is the driver's.
            driver_ns = round(capture.get(cv2.CAP_PROP_POS_MSEC) * 1e6)
            by_driver = 0 <= arrival_ns - driver_ns <= NS_PER_S
            if by_driver and driver_ns <= last_driver_ns:
                continue  # the same exposure handed out again is not a new frame
            ok, bgr = capture.retrieve(bgr)
            if ok:
                last_driver_ns, good_ns = (driver_ns if by_driver else 0), arrival_ns
                clock: Clock = "driver" if by_driver else "arrival"
                yield Captured(into_slot(bgr, slot), driver_ns if by_driver else arrival_ns, clock, fps)
            elif arrival_ns - good_ns > STALL_S * NS_PER_S:
                raise Broken("unreadable", f"{device}: gives buffers, but no image in {STALL_S:g} s")
        if not os.path.exists(device):
            raise Broken("absent", f"{device}: is gone")
        raise Broken("stalled", f"{device}: gives no frame")
    finally:
        capture.release()


def check_device(device: str) -> None:
    """Name the reason that OpenCV keeps to itself: no device, no permission, or somebody else's."""
    try:
        fd = os.open(device, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except PermissionError:
        raise Broken("unreadable", f"{device}: no permission; is this user in group video?") from None
    except OSError as error:
        reason = "busy" if error.errno == errno.EBUSY else "absent"
        raise Broken(reason, f"{device}: {error.strerror}") from None
    try:
        # VIDIOC_REQBUFS for no buffers (count, type CAPTURE, memory MMAP, ...) fails while another process streams.
        fcntl.ioctl(fd, 0xC0145608, struct.pack("=5I", 0, 1, 1, 0, 0))
    except OSError as error:  # what else it may say, OpenCV finds out as well
        if error.errno == errno.EBUSY:
            raise Broken("busy", f"{device}: another process has it") from None
    finally:
        os.close(fd)


def gst(config: CameraConfig, slot: Slot) -> Items:
    width, height = config.width, config.height
    if width is None or height is None:
        raise Broken("unreadable", "gst: needs camera.width and camera.height, the size of its frames", heals=False)
    if width % 4:
        detail = f"gst: camera.width must be a multiple of 4 (GStreamer pads rows to 4 bytes), found {width}"
        raise Broken("unreadable", detail, heals=False)
    check_size(height, width)
    process, frames_fd = launch(config)
    try:
        said_fd, said = process.stdout.fileno(), b""
        poll = select.poll()
        poll.register(frames_fd, select.POLLIN)
        poll.register(said_fd, select.POLLIN)
        patience_s = GST_START_S
        while True:
            image = slot.write(height, width)
            free = image.data.cast("B")
            heard_s = time.monotonic()
            while len(free):
                ready = dict(poll.poll(200))
                if said_fd in ready:
                    said = (said + os.read(said_fd, 65536))[-500:]
                if frames_fd in ready:
                    n_bytes = os.readv(frames_fd, [free])
                    if n_bytes == 0:
                        said = (said + os.read(said_fd, 65536))[-500:]
                        said_last = " ".join(said.decode(errors="replace").split())
                        raise Broken("unreadable", f"gst: the pipeline ended: {said_last or 'without a word'}")
                    free, heard_s = free[n_bytes:], time.monotonic()
                elif time.monotonic() - heard_s > patience_s:
                    raise Broken("stalled", f"gst: no frame in {patience_s:g} s")
            patience_s = STALL_S
            yield Captured(image, time.monotonic_ns(), "arrival", config.fps)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        os.close(frames_fd)


def launch(config: CameraConfig) -> tuple[subprocess.Popen, int]:
    """gst-launch-1.0 as our child, and the pipe its frames come out of: not its stdout, where CSI plug-ins print."""
    frames_fd, write_fd = os.pipe()
    caps = f"video/x-raw,format=RGB,width={config.width},height={config.height}"
    rate = []
    if config.fps:
        rate = ["videorate", "drop-only=true", "!"]  # never repeats a frame to reach a rate
        fps = Fraction(config.fps).limit_denominator(1001)
        caps += f",framerate={fps.numerator}/{fps.denominator}"
    pipeline = shlex.split(config.source.removeprefix("gst:"))
    try:
        process = subprocess.Popen(
            ["gst-launch-1.0", "-q", *pipeline, "!", *rate, "videoconvert", "!", caps, "!", "fdsink", f"fd={write_fd}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(write_fd,),
            start_new_session=True,  # Ctrl-C in a terminal is for the supervisor
            preexec_fn=functools.partial(worker.die_with, os.getpid()),
        )
    except FileNotFoundError:
        os.close(frames_fd)
        raise Broken("absent", "gst: gst-launch-1.0 is not installed (gstreamer1.0-tools)", heals=False) from None
    finally:
        os.close(write_fd)
    with contextlib.suppress(PermissionError):  # the system's limit may be lower; then it is only more wake-ups
        fcntl.fcntl(frames_fd, fcntl.F_SETPIPE_SZ, 1 << 20)
    return process, frames_fd


class PushedFrame(msgspec.Struct, frozen=True):
    """What a pusher sends, after the topic byte b"F"."""

    v: Literal[1]
    frame_id: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
    t_capture_ns: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
    width: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    height: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    format: Literal["rgb8", "bgr8", "gray8", "jpeg"]
    data: bytes


# format -> bytes per pixel (None: compressed), and OpenCV's conversion to RGB (None: it is RGB)
PUSHED_FORMATS = {
    "rgb8": (3, None),
    "bgr8": (3, cv2.COLOR_BGR2RGB),
    "gray8": (1, cv2.COLOR_GRAY2RGB),
    "jpeg": (None, cv2.COLOR_BGR2RGB),
}
PUSHED_AT_ONCE = 2  # wait in the socket at most
decode_pushed = msgspec.msgpack.Decoder(PushedFrame).decode


def pushed(config: CameraConfig, slot: Slot) -> Items:
    endpoint = config.source.removeprefix("zmq:")
    path = endpoint.removeprefix("ipc://")
    if not endpoint.startswith("ipc:///"):
        detail = f"zmq:{endpoint}: expected zmq:ipc:///absolute/path; frames do not come over a network"
        raise Broken("unreadable", detail, heals=False)
    with contextlib.ExitStack() as stack:
        try:
            # ZeroMQ lets a second process bind the same path and take the traffic without a word.
            lock = stack.enter_context(open(path + ".lock", "a"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            receiver = stack.enter_context(zmq.Context()).socket(zmq.PULL)
            stack.enter_context(receiver)
            receiver.setsockopt(zmq.LINGER, 0)
            receiver.setsockopt(zmq.RCVHWM, PUSHED_AT_ONCE)
            receiver.setsockopt(zmq.MAXMSGSIZE, MAX_IMAGE_BYTES + 4096)
            receiver.bind(endpoint)
        except BlockingIOError:
            raise Broken("busy", f"{endpoint}: another process receives there") from None
        except (OSError, zmq.ZMQError) as error:
            raise Broken("absent", f"{endpoint}: {error.strerror}") from None
        newest = slot.peek(0)  # a frame from before our restart is not new again
        last_ns = newest.t_capture_ns if newest else 0
        n_refused, told_ns = 0, -NS_PER_S
        while True:
            if not receiver.poll(STALL_S * 1000):
                yield CameraFault("stalled", f"{endpoint}: no frame pushed for {STALL_S:g} s")
                continue
            message = receiver.recv(copy=False)
            with contextlib.suppress(zmq.Again):  # the newest, whatever the pusher's pace; CONFLATE may hold one back
                for _ in range(PUSHED_AT_ONCE):
                    message = receiver.recv(zmq.NOBLOCK, copy=False)
            now_ns = time.monotonic_ns()
            try:
                frame = read_pushed(message.buffer, last_ns, now_ns)
                image = into_slot(pushed_pixels(frame), slot, PUSHED_FORMATS[frame.format][1])
            except Broken as bad:
                n_refused += 1
                if now_ns - told_ns >= NS_PER_S:  # a pusher that is wrong is wrong at its full rate
                    yield CameraFault(bad.reason, f"{endpoint}: {n_refused} refused, the last: {bad.detail}")
                    n_refused, told_ns = 0, now_ns
                continue
            last_ns = frame.t_capture_ns
            yield Captured(image, frame.t_capture_ns, "sender", frame_id=frame.frame_id)


def read_pushed(message: memoryview, last_ns: int, now_ns: int) -> PushedFrame:
    """One message, checked but for its pixels. `last_ns` is the stamp of the frame before. Raises Broken."""
    if message[:1] != b"F":
        raise Broken("unreadable", f"expected topic b'F', found {bytes(message[:1])!r}")
    try:
        frame = decode_pushed(message[1:])
    except msgspec.DecodeError as error:
        raise Broken("unreadable", str(error)) from None
    check_size(frame.height, frame.width)
    n_bytes = frame.width * frame.height * (PUSHED_FORMATS[frame.format][0] or 0)
    if n_bytes and len(frame.data) != n_bytes:
        size = f"{frame.width}x{frame.height} {frame.format}"
        raise Broken("unreadable", f"{size} is {n_bytes} bytes, found {len(frame.data)}")
    age_ns = now_ns - frame.t_capture_ns
    if not -MAX_AHEAD_NS <= age_ns <= MAX_AGE_NS:
        raise Broken("clock", f"frame {frame.frame_id} is stamped {age_ns / 1e6:.1f} ms ago by CLOCK_MONOTONIC")
    if frame.t_capture_ns <= last_ns:
        behind_ms = (last_ns - frame.t_capture_ns) / 1e6
        raise Broken("clock", f"frame {frame.frame_id} is stamped {behind_ms:.1f} ms before the one before it")
    return frame


def pushed_pixels(frame: PushedFrame) -> np.ndarray:
    """(H, W, 3) or (H, W) uint8, in the format's own channel order."""
    data = np.frombuffer(frame.data, np.uint8)
    if frame.format == "gray8":
        return data.reshape(frame.height, frame.width)
    if frame.format != "jpeg":
        return data.reshape(frame.height, frame.width, 3)
    # Whole, and no other format: OpenCV has decoders for a dozen, and takes half a JPEG for a grey-bottomed image.
    if bytes(data[:3]) != b"\xff\xd8\xff" or bytes(data[-2:]) != b"\xff\xd9":
        raise Broken("unreadable", f"frame {frame.frame_id}: not one whole JPEG")
    try:
        bgr = cv2.imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:
        raise Broken("unreadable", f"frame {frame.frame_id}: JPEG: {error.err}") from None
    found = (0, 0) if bgr is None else bgr.shape[:2]
    if found != (frame.height, frame.width):
        size = f"{frame.width}x{frame.height}, found {found[1]}x{found[0]}"
        raise Broken("unreadable", f"frame {frame.frame_id}: JPEG: expected {size}")
    return bgr


def video(config: CameraConfig, slot: Slot) -> Items:
    path = config.source
    if not os.path.isfile(path):
        found = "not a regular file" if os.path.exists(path) else "no such file or folder"
        raise Broken("absent", f"{path}: {found}", heals=False)
    due_ns = time.monotonic_ns()
    while True:
        capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG)
        try:
            fps = capture.get(cv2.CAP_PROP_FPS)
            fps = fps if 0 < fps <= 1000 else config.fps or VIDEO_FPS  # a broken header may claim anything
            period_ns, n_read, bgr = round(NS_PER_S / fps), 0, None
            while True:
                if config.realtime:
                    sleep_until(due_ns)
                    due_ns = catch_up(capture, due_ns, period_ns)
                if not capture.grab():
                    break
                captured_ns = time.monotonic_ns()
                ok, bgr = capture.retrieve(bgr)
                due_ns += period_ns
                if not ok:
                    continue
                n_read += 1
                image = into_slot(bgr, slot)
                if not config.realtime:
                    captured_ns = until_wanted(slot)
                yield Captured(image, captured_ns, "arrival", fps)
        finally:
            capture.release()
        if n_read == 0:
            raise Broken("unreadable", f"{path}: no frame in it that OpenCV can decode", heals=False)
        if not config.loop:
            return


def catch_up(capture: cv2.VideoCapture, due_ns: int, period_ns: int) -> int:
    """Pass over the frames whose time is gone, without converting them; returns when the next one was due.

    At most a second's worth: where decoding is slower than the video, some frame has to be shown all the same.
    """
    for _ in range(max(1, NS_PER_S // period_ns)):
        if time.monotonic_ns() < due_ns + period_ns or not capture.grab():
            return due_ns
        due_ns += period_ns
    return time.monotonic_ns()


def folder(config: CameraConfig, slot: Slot) -> Items:
    fps = config.fps or FOLDER_FPS
    due_ns = time.monotonic_ns()
    named: set[Path] = set()  # unreadable images are named once, not once per round
    while True:
        try:
            files = sorted(path for path in Path(config.source).iterdir() if path.is_file())
        except OSError as error:
            raise Broken("absent", f"{config.source}: {error.strerror}", heals=False) from None
        paths = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
        if not paths:
            kinds = ", ".join(sorted(IMAGE_SUFFIXES))
            raise Broken("absent", f"{config.source}: no image in this folder ({kinds})", heals=False)
        n_read = 0
        for path in paths:
            if config.realtime:
                sleep_until(due_ns)
            try:
                image = into_slot(read_image(path), slot)
            except Broken as bad:
                if path not in named:
                    named.add(path)
                    yield CameraFault(bad.reason, f"{bad.detail}; passed over")
                continue
            n_read += 1
            captured_ns = time.monotonic_ns() if config.realtime else until_wanted(slot)
            due_ns = max(due_ns + round(NS_PER_S / fps), captured_ns)
            yield Captured(image, captured_ns, "arrival", fps if config.realtime else None)
        if n_read == 0:
            raise Broken("unreadable", f"{config.source}: none of the {len(paths)} images can be read", heals=False)
        if not config.loop:
            return


def read_image(path: Path) -> np.ndarray:
    try:
        bgr = cv2.imread(str(path), cv2.IMREAD_COLOR)
    except cv2.error as error:
        raise Broken("unreadable", f"{path}: {error.err}") from None
    if bgr is None:
        raise Broken("unreadable", f"{path}: not an image that OpenCV can decode")
    return bgr


# ---------------------------------------------------------------------------------------------------------------------
# What they share.


def check_size(height: int, width: int) -> None:
    if height * width * 3 > MAX_IMAGE_BYTES:
        limit = f"the limit is {MAX_IMAGE_BYTES // 3} pixels (7680x4320)"
        raise Broken("too-large", f"frames of {width}x{height}; {limit}", heals=False)


def into_slot(pixels: np.ndarray, slot: Slot, conversion: int | None = cv2.COLOR_BGR2RGB) -> np.ndarray:
    """Convert into the slot's free buffer, with no copy in between; returns that buffer's view, RGB."""
    if pixels.dtype != np.uint8 or (pixels.ndim == 3 and pixels.shape[2] != 3):
        raise Broken("unreadable", f"expected 8-bit pixels of 3 channels, found {pixels.shape} {pixels.dtype}")
    height, width = pixels.shape[:2]
    check_size(height, width)
    image = slot.write(height, width)
    if conversion is None:
        np.copyto(image, pixels)
    else:
        cv2.cvtColor(pixels, conversion, dst=image)  # in place: shape and type are what it would allocate
    return image


def sleep_until(due_ns: int) -> None:
    time.sleep(max(0, due_ns - time.monotonic_ns()) / NS_PER_S)


def until_wanted(slot: Slot) -> int:
    """Wait until the model asks for another frame; returns that time, which stands for a file's time of capture."""
    while not slot.wanted():
        time.sleep(0.001)
    return time.monotonic_ns()


def without_frozen(items: Items, slot: Slot) -> Items:
    """Give up on a device that hands out one buffer over and over with success: a dead image processor does.

    The frame before the first is the last one published, also before a restart: a device that is still frozen when it
    is opened again gets no second second.
    """
    newest = slot.peek(0)
    last = fingerprint(newest.image) if newest else None
    n_same, since_ns = FROZEN_FRAMES, 0
    with contextlib.closing(items):  # the device, before it is opened again
        for item in items:
            if isinstance(item, Captured):
                now_ns, this = time.monotonic_ns(), fingerprint(item.image)
                if this != last:
                    last, n_same, since_ns = this, 0, now_ns
                n_same += 1
                if n_same >= FROZEN_FRAMES and now_ns - since_ns >= FROZEN_NS:
                    raise Broken("frozen", f"the same {item.image.shape[1]}x{item.image.shape[0]} image over and over")
            yield item


def fingerprint(image: np.ndarray) -> bytes:
    """Some 4096 bytes from all over and every 64th row: enough to meet a sensor's noise, cheap enough for 4K."""
    flat, rows = image.reshape(-1), image.reshape(len(image), -1)
    return flat[:: flat.size // 4096 | 1].tobytes() + rows[::64].tobytes() + bytes(str(image.shape), "ascii")


SOURCES: dict[str, Callable[[CameraConfig, Slot], Items]] = {
    "v4l2": v4l2,
    "gst": gst,
    "zmq": pushed,
    "video": video,
    "folder": folder,
}
FREEZING = {"v4l2", "gst"}  # a pusher's repeated frame shows in its stamp; a file may stand still as it likes


def kind_of(source: str) -> str:
    """Which row of SOURCES a source string means. Raises Broken."""
    prefix = source.partition(":")[0]
    if prefix in ("v4l2", "gst", "zmq") and ":" in source:
        return prefix
    if source.isdigit() or source.startswith("/dev/"):
        return "v4l2"
    if "://" in source:
        detail = f"{source}: expected /dev/videoN, v4l2:, gst:, zmq:ipc://, a file or a folder"
        raise Broken("absent", detail, heals=False)
    return "folder" if os.path.isdir(source) else "video"


def open_source(config: CameraConfig, slot: Slot) -> Generator[Captured | CameraFault | CameraOpened, None, None]:
    """The frames of a source, the first and every change of size announced by CameraOpened. Raises Broken."""
    kind, shape = kind_of(config.source), None
    items = SOURCES[kind](config, slot)
    for item in without_frozen(items, slot) if kind in FREEZING else items:
        if isinstance(item, Captured) and item.image.shape != shape:
            shape = item.image.shape
            yield CameraOpened(width=shape[1], height=shape[0], fps=item.fps, description=f"{kind} {config.source}")
        yield item


def probe(config: CameraConfig, timeout_s: float = 10.0) -> str:
    """Open the source, read one frame, and say "640x480 at 30 fps". Raises Broken.

    A camera can hang in read() for ever: call this in a process that you can kill.
    """
    slot, give_up_s = Slot.create(), time.monotonic() + timeout_s
    with contextlib.closing(slot), contextlib.closing(open_source(config, slot)) as items:
        for item in items:
            if isinstance(item, CameraOpened):
                return f"{item.width}x{item.height}" + (f" at {item.fps:g} fps" if item.fps else "")
            if isinstance(item, CameraFault) and time.monotonic() > give_up_s:
                raise Broken(item.reason, item.detail)
    raise Broken("unreadable", f"{config.source}: no frame")


# ---------------------------------------------------------------------------------------------------------------------
# The process.


def run(config: CameraConfig, slot: Slot, send: Callable[[CameraEvent], None]) -> int:
    """Publish the source's frames until it ends (0) or cannot heal (EX_CONFIG)."""
    backoff_s = BACKOFF_S
    while True:
        try:
            newest = slot.peek(0)
            frame_id = newest.frame_id if newest else 0
            for item in open_source(config, slot):
                if isinstance(item, Captured):
                    frame_id = frame_id + 1 if item.frame_id is None else item.frame_id
                    slot.publish(frame_id, item.t_capture_ns, item.capture_clock)
                    backoff_s = BACKOFF_S
                else:
                    send(item)
            if not config.realtime:
                until_wanted(slot)  # the last frame is looked at, too
            send(CameraEnded())
            return 0
        except Broken as broken:
            send(CameraFault(broken.reason, broken.detail[:1000]))
            if not broken.heals:
                return os.EX_CONFIG
        time.sleep(backoff_s)
        backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)


def main() -> int:
    slot, events, first = worker.attach()
    cv2.setNumThreads(1)  # the cores are the model's
    config = msgspec.msgpack.decode(first, type=CameraConfig)
    try:
        return run(config, slot, lambda event: events.send(encode(event)))
    except BrokenPipeError:
        return 0


if __name__ == "__main__":
    sys.exit(main())
