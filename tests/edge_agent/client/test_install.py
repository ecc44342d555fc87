"""The base install, in a real empty environment: msgspec and pyzmq, nothing else, and nothing is compiled."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import zmq

from edge_agent.wire.pushed_frame import decode_pushed_frame
from tests.harness import ROOT, wheels
from tests.harness.fake_daemon import FakeDaemon, make_action, make_status, make_text
from tests.harness.shared import SharedFolders

TIMEOUT_S = 120.0  # bounds a hang, not a duration


@pytest.fixture(scope="session")
def wheel(shared: SharedFolders) -> Path:
    """The wheel of this tree, beside wheels of its dependencies."""

    def fill(folder: Path) -> None:
        folder.mkdir()
        for name in ("msgspec", "pyzmq"):
            wheels.repack(name, folder)
        wheels.build_wheel(folder)

    (found,) = shared.folder("wheels-of-the-base-install", fill).glob("edge_agent-*.whl")
    return found


@pytest.fixture(scope="session")
def environment(wheel: Path, shared: SharedFolders) -> Path:
    """A virtual environment with the base install of this tree. It knows its own name, so it cannot be made under
    another one: an empty folder beside it says that it is complete."""
    folder = shared.root / "base-install"

    def fill(complete: Path) -> None:
        wheels.install(wheel.parent, folder, "edge-agent")
        complete.mkdir()

    shared.folder("base-install-is-complete", fill)
    return folder


def run(environment: Path, *command: object) -> subprocess.CompletedProcess[str]:
    """A program of the environment, away from this tree and without this process's variables."""
    program, *arguments = map(str, command)
    return subprocess.run(
        [environment / "bin" / program, *arguments],
        cwd=environment,
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


@contextlib.contextmanager
def running(environment: Path, *command: object) -> Iterator[subprocess.Popen[str]]:
    """The same, while it runs. Ctrl-C ends it."""
    program, *arguments = map(str, command)
    process = subprocess.Popen(
        [environment / "bin" / program, *arguments],
        cwd=environment,
        env={"PATH": "/usr/bin:/bin"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=TIMEOUT_S)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    with FakeDaemon(tmp_path) as opened:
        yield opened


def test_the_wheel_holds_every_file_of_both_packages(wheel):
    packed = set(zipfile.ZipFile(wheel).namelist())
    patterns = ("edge_agent/**/*.py", "quantize/**/*.py", "edge_agent/actions/spaces/*.yaml")
    expected = {str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern)}
    expected |= {"edge_agent/py.typed", "quantize/measure/calibration.txt"}
    assert len(expected) > 60 and expected <= packed
    assert not [name for name in packed if name.startswith(("tests/", "models/", "benchmarks/", "examples/"))]


def test_the_base_install_is_three_packages(environment):
    code = "from importlib.metadata import distributions; print(*(d.name for d in distributions()))"
    done = run(environment, "python", "-c", code)
    assert (set(done.stdout.split()), done.stderr) == ({"edge-agent", "msgspec", "pyzmq"}, "")


def test_the_client_loads_the_standard_library_and_its_two_dependencies(environment):
    """An allow-list. Names that msgspec and pyzmq load of themselves are theirs."""
    code = (
        "import sys; before = set(sys.modules)\n"
        "import edge_agent.client\n"
        "print(*(name for name in set(sys.modules) - before if name.split('.')[0] not in sys.stdlib_module_names))"
    )
    done = run(environment, "python", "-I", "-c", code)
    loaded = {name for name in done.stdout.split() if "cython" not in name}  # Cython's own names inside pyzmq
    assert done.stderr == ""
    assert {name.split(".")[0] for name in loaded} == {"zmq", "msgspec", "edge_agent"}
    own = {name.split(".")[1] for name in loaded if name.startswith("edge_agent.")}
    assert own == {"client", "suspend", "time_units", "wire"}


@pytest.mark.parametrize("command", [["status"], ["status", "--json"], ["listen"], ["ask", "What?"]])
def test_commands_of_a_controller_work_with_the_base_install(environment, tmp_path, command):
    done = run(environment, "edge-agent", *command, "--runtime-dir", tmp_path)
    assert (done.returncode, done.stdout) == (75, "")
    assert len(done.stderr.splitlines()) == 1 and str(tmp_path) in done.stderr


def test_help_works_with_the_base_install(environment):
    assert "instruct" in run(environment, "edge-agent", "--help").stdout
    assert "--camera" in run(environment, "edge-agent", "run", "--help").stdout


@pytest.mark.parametrize("command", [["run", "--config", "a.yaml"], ["check"], ["bench"], ["keygen", "k"]])
def test_commands_of_the_daemon_name_the_extra_to_install(environment, command):
    done = run(environment, "edge-agent", *command)
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr.startswith(f"edge-agent {command[0]} needs the daemon; in the folder of its source: pip install")
    assert len(done.stderr.splitlines()) == 1
    for words in ("'.[cpu]'", "'.[gpu]'", "not installed here: cryptography, cv2, gguf, llama_cpp"):
        assert words in done.stderr


VALUES = {"forward_m_s": 0.5, "right_m_s": 0.0, "down_m_s": 0.0, "yaw_rate_rad_s": -0.1}


def publishing_actions(daemon: FakeDaemon) -> contextlib.AbstractContextManager[None]:
    return daemon.publishing(lambda seq: make_action(seq, type="move", values=VALUES), first_seq=1)


def read_until(process: subprocess.Popen[str], words: str) -> str:
    """The first line of stdout with these words in it."""
    for line in process.stdout:
        if words in line:
            return line
    raise AssertionError(f"no line with {words!r}: {process.stderr.read()}")


def test_listen_prints_lines_without_rich(environment, daemon, tmp_path):
    with running(environment, "edge-agent", "listen", "--runtime-dir", tmp_path) as process:
        daemon.wait_for_subscriber("status")
        daemon.publish("status", make_status())
        for stream in ("actions", "text"):
            daemon.wait_for_subscriber(stream)
        daemon.publish("text", make_text(1, "A red box.", final=True))
        assert process.stdout.readline() == "A red box.\n"
        with publishing_actions(daemon):
            assert "move forward_m_s=0.5 right_m_s=0 down_m_s=0 yaw_rate_rad_s=-0.1 (age 20 ms)" in read_until(
                process, "frame "
            )
    assert process.returncode == 130


def test_the_example_controller_follows_actions_and_holds_on_silence(environment, daemon, tmp_path):
    controller = (ROOT / "examples" / "controller.py", "--runtime-dir", tmp_path)
    with running(environment, "python", *controller) as process:
        daemon.wait_for_subscriber("actions")
        assert process.stdout.readline().endswith(" hold\n")
        with publishing_actions(daemon):
            told = read_until(process, "move").partition(" ")[2]
            assert told == "move forward_m_s=0.5 right_m_s=0.0 down_m_s=0.0 yaw_rate_rad_s=-0.1\n"
        assert read_until(process, "hold").startswith("@")  # the last action has expired
    assert process.returncode == 0


def test_a_controller_is_rehearsed_with_the_base_install(environment):
    controller = (environment / "bin" / "python", ROOT / "examples" / "controller.py")
    done = run(environment, "edge-agent", "rehearse", "clamped", "--", *controller)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("PASS  clamped")


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[zmq.Socket[bytes]]:
    """The daemon's end of a camera.source zmq:ipc:///…/frames."""
    with zmq.Context() as context, context.socket(zmq.PULL) as socket:
        socket.bind(f"ipc://{tmp_path}/frames")
        yield socket


def received(receiver: zmq.Socket[bytes], n: int) -> list[bytes]:
    """The pixels of n frames of 640 x 480."""
    frames = []
    for _ in range(n):
        assert receiver.poll(round(TIMEOUT_S * 1000)), "no frame"
        frame = decode_pushed_frame(receiver.recv()[1:])
        assert (frame.width, frame.height, frame.format) == (640, 480, "rgb8")
        frames.append(frame.data)
    return frames


def test_the_example_pushes_generated_frames(environment, receiver, tmp_path):
    pusher = (ROOT / "examples" / "push_frames.py", f"ipc://{tmp_path}/frames", "--rate", "50")
    with running(environment, "python", *pusher) as process:
        frames = received(receiver, 3)
    assert process.returncode == 0 and len(set(frames)) == 3
    done = run(environment, "python", *pusher, "--count", "2")
    assert len(done.stdout.splitlines()) == 2 and done.stdout.startswith("frame 0: ")


def test_the_example_pushes_image_files(receiver, tmp_path):
    """With the environment of the tests, which has OpenCV."""
    images = []
    for n, colour in enumerate(((255, 0, 0), (0, 0, 255))):  # RGB
        images.append(tmp_path / f"{n}.png")
        cv2.imwrite(str(images[-1]), np.full((480, 640, 3), colour[::-1], np.uint8))
    command = [sys.executable, ROOT / "examples" / "push_frames.py", f"ipc://{tmp_path}/frames", *images]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([*map(str, command), "--rate", "50"], env=env, stdout=subprocess.DEVNULL) as process:
        colours = {frame[:3] for frame in received(receiver, 4)}
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT_S) == 0
    assert colours == {b"\xff\x00\x00", b"\x00\x00\xff"}
    images[0].write_bytes(images[0].read_bytes()[:-20])
    command[-2:] = images[:1]
    done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 1 and "0.png: PNG: cut after" in done.stderr and done.stderr.count("\n") == 1
