"""Which faults end the start with 78 at once, and which are tried again: a test for each row of FAULTS."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_agent.actions.space import load_action_space
from edge_agent.bundle.files import open_plain
from edge_agent.bundle.memory_plan import NotEnoughMemoryError
from edge_agent.bundle.signing import load_private_key
from edge_agent.bundle.verify import verify_bundle
from edge_agent.camera.picture import picture_paths
from edge_agent.camera.process import open_source
from edge_agent.camera.recording import Recording
from edge_agent.camera.source import SourceError, check_size
from edge_agent.config import CameraConfig, load_config
from edge_agent.errors import EX_CONFIG, FAULTS, BundleError, ConfigError, FaultName, UserError, fault_of
from edge_agent.ipc.events import CameraFault, ModelReady, StartupFailed
from edge_agent.ipc.frame_slot import Slot
from edge_agent.supervisor.publisher import Publisher
from edge_agent.supervisor.runtime_folder import EndpointError
from edge_agent.supervisor.shutdown import Shutdown
from edge_agent.supervisor.trace import Trace
from tests.harness.in_process import FakeVerification, InProcess
from tests.test_documents import section

Provoke = Callable[[Path, pytest.MonkeyPatch], int]


def of_error(cause: Callable[[Path], object]) -> Provoke:
    """The exit status of the command that such a call ends."""

    def provoke(folder: Path, _monkeypatch: pytest.MonkeyPatch) -> int:
        with pytest.raises(UserError) as caught:
            cause(folder)
        return caught.value.exit_status

    return provoke


def of_source(source: str, **config: object) -> Provoke:
    """The daemon's status when its camera process reports what this source raises."""

    def provoke(folder: Path, _monkeypatch: pytest.MonkeyPatch) -> int:
        slot = Slot.create()
        try:
            with pytest.raises(SourceError) as caught:
                list(open_source(CameraConfig(source=source.format(folder), **config), slot))
        finally:
            slot.close()
        return camera_ends(caught.value)

    return provoke


def camera_ends(error: SourceError) -> int:
    with InProcess() as running, pytest.raises(Shutdown) as caught:
        running.load_model()
        running.camera.emit(CameraFault(error.reason, error.detail))
        running.turn()
        if not error.retryable:
            running.camera.exit_status = EX_CONFIG  # as camera.process.run() ends
        for _ in range(30):
            running.turn(1.0)
    return caught.value.status


def model_fails(fault: FaultName) -> Provoke:
    def provoke(_folder: Path, _monkeypatch: pytest.MonkeyPatch) -> int:
        with InProcess() as running, pytest.raises(Shutdown) as caught:
            running.model.emit(StartupFailed(reason="why", fault=fault))
            running.turn()
        return caught.value.status

    return provoke


def refuse_instruction(memory_reduced: bool) -> Provoke:
    def provoke(_folder: Path, _monkeypatch: pytest.MonkeyPatch) -> int:
        with InProcess() as running, pytest.raises(Shutdown) as caught:
            ready = ModelReady(vision="", load_s=0.0, warmup_ms=0.0, memory_reduced=memory_reduced)
            running.model.emit(ready)
            running.turn()
            running.apply_instruction("language.context: too small")
        return caught.value.status

    return provoke


def fail_six_times(_folder: Path, _monkeypatch: pytest.MonkeyPatch) -> int:
    with InProcess() as running, pytest.raises(Shutdown) as caught:
        running.open_camera()
        for _ in range(6):
            running.end_model_process()
            running.turn(6.0)
            running.push_frame()
    return caught.value.status


def lose_an_endpoint(_folder: Path, _monkeypatch: pytest.MonkeyPatch) -> int:
    with InProcess() as running, pytest.raises(Shutdown) as caught:
        running.publisher.lost = "runtime_dir: gone"
        running.turn()
    return caught.value.status


def fail_to_read(_folder: Path, _monkeypatch: pytest.MonkeyPatch) -> int:
    verification = FakeVerification(None)
    with InProcess(verification=verification) as running, pytest.raises(Shutdown) as caught:
        verification.error = OSError(errno.EIO, os.strerror(errno.EIO), "language.gguf")  # while it is hashed
        running.turn()
    return caught.value.status


def without_gst_launch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("PATH", str(folder))
    return of_source("gst:videotestsrc", width=64, height=48)(folder, monkeypatch)


def start_twice(folder: Path) -> None:
    first = Publisher(folder / "run")
    try:
        Publisher(folder / "run")
    finally:
        first.close()


def write_for_everybody(folder: Path) -> None:
    folder.chmod(0o777)
    Publisher(folder)


def mute_device(folder: Path, _monkeypatch: pytest.MonkeyPatch) -> int:
    return camera_ends(SourceError("stalled", f"{folder}: returns no frame"))


def too_large(folder: Path, _monkeypatch: pytest.MonkeyPatch) -> int:
    with pytest.raises(SourceError) as caught:
        check_size(4320, 7680, 1_000_000)
    return camera_ends(caught.value)


def busy_path(folder: Path, _monkeypatch: pytest.MonkeyPatch) -> int:
    publisher = Publisher(folder / "run")
    try:
        return of_source("zmq:ipc://{}/run/control")(folder, _monkeypatch)
    finally:
        publisher.close()


ROWS: dict[FaultName, Provoke] = {
    "configuration": of_error(lambda folder: load_action_space("no such space")),
    "bundle": of_error(verify_bundle),
    "installation": without_gst_launch,
    "runtime-folder": of_error(write_for_everybody),
    "folder-in-use": of_error(start_twice),
    "source-name": of_source("rtsp://camera/1"),
    "source-file": of_source("{}/none.mp4"),
    "source-pipeline": of_source("gst:videotestsrc ! appsink", width=64, height=48),
    "frame-size": too_large,
    "instruction": refuse_instruction(memory_reduced=False),
    "source-device": mute_device,
    "source-in-use": busy_path,
    "machine": fail_to_read,
    "memory": of_error(lambda folder: (_ for _ in ()).throw(NotEnoughMemoryError("memory: 9 MiB needed"))),
    "instruction-reduced": refuse_instruction(memory_reduced=True),
    "native": model_fails("native"),
    "process": fail_six_times,
    "endpoint-lost": lose_an_endpoint,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_ends_the_start_as_its_row_says(fault, tmp_path, monkeypatch):
    assert ROWS[fault](tmp_path, monkeypatch) == FAULTS[fault].exit_status


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_model_process_ends_the_start_as_its_row_says(fault, tmp_path, monkeypatch):
    assert model_fails(fault)(tmp_path, monkeypatch) == FAULTS[fault].exit_status


def test_the_page_repeats_the_table():
    rows = section("docs/troubleshooting.md", "Which faults end the start")
    found = [
        tuple(cell.strip() for cell in line.strip("|").split("|"))
        for line in rows.splitlines()
        if line.startswith("| `")
    ]
    assert found == [(f"`{name}`", row.what, str(row.exit_status)) for name, row in FAULTS.items()]


# -- more members: errors of the system, in every place that reads a file before READY ---------------------------------

READERS: dict[str, Callable[[Path], object]] = {
    "configuration": load_config,
    "action space": lambda path: load_action_space(str(path)),
    "bundle": open_plain,
    "key": load_private_key,
    "timeline": lambda path: Trace(str(path)),
    "pictures": picture_paths,
    "recording": Recording,
    "runtime folder": lambda path: Publisher(path / "run"),
}
OF_THE_MACHINE = [errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.ESTALE, errno.EDQUOT]
OF_THE_CONFIGURATION = [errno.EACCES, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG]


@pytest.mark.parametrize("number", OF_THE_MACHINE + OF_THE_CONFIGURATION, ids=errno.errorcode.get)
@pytest.mark.parametrize("reader", READERS)
def test_an_error_of_the_machine_is_tried_again_wherever_it_comes(reader, number, tmp_path, monkeypatch):
    def fail(*_arguments: object, **_more: object) -> None:
        raise OSError(number, os.strerror(number))

    (tmp_path / "x.yaml").touch()
    for owner, name in ((os, "open"), (Path, "open"), (Path, "iterdir"), (Path, "mkdir"), (Path, "read_text")):
        monkeypatch.setattr(owner, name, fail)
    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(UserError) as caught:
        READERS[reader](tmp_path / "x.yaml")
    monkeypatch.undo()
    assert os.strerror(number) in str(caught.value)
    assert (caught.value.exit_status == EX_CONFIG) is (number in OF_THE_CONFIGURATION)


@pytest.mark.parametrize("number", OF_THE_MACHINE, ids=errno.errorcode.get)
def test_a_socket_that_cannot_be_made_now_can_be_made_later(number, tmp_path, monkeypatch):
    def fail(*_arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("edge_agent.zmtp.listener.socket.socket", fail)
    with pytest.raises(EndpointError) as caught:
        Publisher(tmp_path / "run")
    assert caught.value.fault == "machine"


def test_a_file_in_the_place_of_a_socket_is_a_fault_of_the_folder(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "status").write_text("a note")
    with pytest.raises(EndpointError) as caught:
        Publisher(tmp_path / "run")
    assert caught.value.fault == "runtime-folder"


def test_an_error_without_a_number_is_no_fault_of_the_machine():
    assert fault_of(OSError("odd"), "bundle") == "bundle"
    assert ConfigError("x").fault == "configuration" and BundleError("x", "machine").exit_status == 1
