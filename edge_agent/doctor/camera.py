"""The check of the camera: the device, its pixel formats, and who stamps its frames."""

from __future__ import annotations

import stat

from edge_agent.doctor.finding import Finding, failed, passed, warned
from edge_agent.doctor.machine import Machine

KNOWN_FORMATS = {  # that OpenCV reads
    "YUYV", "MJPG", "JPEG", "NV12", "YU12", "RGB3", "BGR3", "UYVY", "GREY", "YV12", "NV21", "YVYU", "XR24", "BGR4",
    "RGB4",
}  # fmt: skip
RUNTIME_DIR = "/run/edge-agent"
ARGUS_SOCKET = "/tmp/argus_socket"


def camera(machine: Machine) -> Finding | None:
    devices = [name for name in machine.names("/dev") if name.startswith("video") and name[5:].isdigit()]
    if machine.config is None:
        names = [
            f"/dev/{name} ({machine.line(f'/sys/class/video4linux/{name}/name') or 'unknown'})" for name in devices
        ]
        return passed("camera", ", ".join(names[:6]) or "no V4L2 device; a network or a process may push frames")
    source = machine.config.camera.source
    device = source.removeprefix("v4l2:")
    device = f"/dev/video{device}" if device.isdigit() else device
    if device.startswith("/dev/"):
        if not machine.exists(device):
            others = ", ".join(f"/dev/{name}" for name in devices) or "none"
            return failed(
                "camera", f"{device}: no such device; there are: {others}", "plug it in, or correct camera.source"
            )
        mode = machine.files.mode(device)
        if mode is not None and not mode & (stat.S_IRGRP | stat.S_IROTH):
            return failed(
                "camera", f"{device}: its group may not read it", f"sudo chmod g+rw {device}; add a udev rule"
            )
    if "nvarguscamerasrc" in source and not machine.exists(ARGUS_SOCKET):
        return failed(
            "camera", f"{ARGUS_SOCKET}: missing: CSI cameras cannot be opened", "sudo systemctl restart nvargus-daemon"
        )
    answer = machine.answers.camera
    if answer is None:
        return passed("camera", f"{source}: exists, was not opened") if device.startswith("/dev/") else None
    if answer.formats and not KNOWN_FORMATS.intersection(answer.formats):
        found = f"{device}: pixel formats {', '.join(answer.formats)}: none that can be read"
        return failed(
            "camera", found, "use a gst: source that converts (docs/jetson.md): a raw Bayer sensor needs an ISP"
        )
    if not answer.works and source.startswith("zmq:") and answer.line.startswith("stalled: "):
        return warned("camera", answer.line, "start the process that pushes frames (FramePusher)")
    if not answer.works and _is_in_the_runtime_folder(source, machine):
        found = f"{source}: the daemon makes this folder at its start"
        return warned("camera", found, "start the daemon, then the process that pushes frames (FramePusher)")
    if not answer.works:
        return failed("camera", answer.line, "correct camera.source; docs/troubleshooting.md lists the camera faults")
    formats = f", formats {' '.join(answer.formats)}" if answer.formats else ""
    if answer.clock == "arrival" and device.startswith("/dev/"):
        remedy = "none needed for a bench; for a fast vehicle use a camera whose driver stamps with CLOCK_MONOTONIC"
        return warned(
            "camera",
            f"{answer.line}{formats}; the driver's stamps are of another clock: ages begin at the arrival",
            remedy,
        )
    return passed("camera", f"{answer.line}{formats}")


def _is_in_the_runtime_folder(source: str, machine: Machine) -> bool:
    """Whether frames are pushed to a socket in the runtime folder, which does not exist before the daemon runs."""
    folder = source.removeprefix("zmq:ipc://").rpartition("/")[0]
    configured = machine.config.runtime_dir if machine.config is not None else ""
    return source.startswith("zmq:ipc:///") and folder == (configured or RUNTIME_DIR) and not machine.exists(folder)


CHECKS = (camera,)
