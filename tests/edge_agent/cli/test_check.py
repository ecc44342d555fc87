"""edge-agent check: what the daemon would refuse at its start, each with the words of the daemon."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest
import yaml

from edge_agent.bundle.wrap import wrap
from edge_agent.cli import check as command
from edge_agent.cli.check import Probe
from edge_agent.supervisor.pause_file import keep_pause
from edge_agent.supervisor.publisher import Publisher
from edge_agent.supervisor.runtime_folder import EndpointError, check_folder
from tests.harness import gguf_toys

FRAME = Probe(True, "64x48 at 30 fps")


@pytest.fixture
def runtime(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("r") / "run"


@pytest.fixture
def checked(toy_bundle, tmp_path, runtime, monkeypatch, capsys):
    """checked(probe, source, keys…): the exit status, and the lines by their part. The camera is not opened."""

    def check(probe: Probe = FRAME, source: str = "/dev/video0", **keys: object) -> tuple[int, dict[str, str]]:
        monkeypatch.setattr(command, "probe_camera", lambda config: probe)
        config = {"bundle": str(toy_bundle), "camera": {"source": source}, "runtime_dir": str(runtime)} | keys
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        status = command.check(argparse.Namespace(config=str(tmp_path / "config.yaml"), bundle=None, camera=None))
        lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
        return status, {part: f"{word} {line}" for word, part, line in lines}

    return check


@pytest.fixture
def no_context(monkeypatch) -> None:
    """The vocabulary is not read, which takes a second."""
    monkeypatch.setattr(command, "_check_context", lambda *_arguments: 0)


# -- the context ------------------------------------------------------------------------------------------------------


def test_an_instruction_that_does_not_fit_is_found(checked):
    status, lines = checked(task={"instruction": "Go to the door. " * 100}, language={"gpu_layers": 0})
    assert status == os.EX_CONFIG
    assert lines["context"].startswith("FAIL language.context: ") and "shorten the instruction" in lines["context"]
    assert {lines[part].split()[0] for part in lines.keys() - {"context"}} == {"ok"}


def test_a_process_that_hangs_or_cannot_start_is_a_fault(checked, monkeypatch):
    monkeypatch.setattr(command, "PROMPT_TIMEOUT_S", 0.01)
    status, lines = checked()
    assert status == os.EX_CONFIG and lines["context"] == "FAIL the vocabulary was not read in 0.01 s"
    monkeypatch.setattr(command.sys, "executable", "/bin/false")
    monkeypatch.setattr(command, "PROMPT_TIMEOUT_S", 60.0)
    status, lines = checked()
    assert status == os.EX_CONFIG and lines["context"] == "FAIL the process ended without a word"


def test_a_disk_that_fails_is_one_line(checked, monkeypatch):
    def fail(*_arguments: object) -> None:
        raise OSError(5, "Input/output error", "language.gguf")

    monkeypatch.setattr(command, "verify_bundle", fail)
    status, lines = checked()
    assert status == os.EX_CONFIG and lines["bundle"] == "FAIL language.gguf: Input/output error"


# -- the runtime folder -----------------------------------------------------------------------------------------------


def test_a_daemon_that_runs_is_named_by_its_process(checked, runtime, no_context):
    publisher = Publisher(runtime)
    try:
        status, lines = checked()
    finally:
        publisher.close()
    assert status == os.EX_CONFIG
    assert f"another edge-agent (process {os.getpid()}) runs in this folder" in lines["sockets"]
    assert checked()[0] == 0


def test_a_folder_that_is_free_or_is_not_there_is_left_as_it_is(runtime):
    assert check_folder(runtime) == f"{runtime}: the daemon makes it"
    assert not runtime.exists()
    runtime.mkdir()
    assert check_folder(runtime) == f"{runtime}: free"
    assert not any(runtime.iterdir())


def test_sockets_that_a_killed_daemon_left_are_no_fault_and_stay(runtime):
    publisher = Publisher(runtime)
    left = sorted(path.lstat().st_ino for path in runtime.iterdir())
    for endpoint in publisher.endpoints.values():
        endpoint._listener.socket.close()  # the process was killed
        endpoint._epoll.close()
    os.close(publisher._folder_fd)
    assert check_folder(runtime) == f"{runtime}: free"
    assert sorted(path.lstat().st_ino for path in runtime.iterdir()) == left and len(left) == 4


def test_a_pause_that_outlives_a_daemon_is_told(runtime):
    runtime.mkdir()
    keep_pause(runtime, True)
    assert "a daemon starts paused: `edge-agent resume` ends it" in check_folder(runtime)


def put_a_file_in_place(runtime: Path) -> None:
    runtime.mkdir()
    (runtime / "text").write_text("a note")


def let_everybody_write(runtime: Path) -> None:
    runtime.mkdir()
    runtime.chmod(0o777)


def put_a_file_above(runtime: Path) -> None:
    runtime.parent.rmdir()
    runtime.parent.write_text("a file")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (put_a_file_in_place, "text: cannot be bound: expected a socket or nothing, found a file"),
        (let_everybody_write, "everybody may write to it"),
        (put_a_file_above, "Not a directory"),
    ],
)
def test_a_folder_that_the_daemon_would_refuse_is_refused_with_its_words(runtime, make, words):
    make(runtime)
    for look in (check_folder, Publisher):
        with pytest.raises(EndpointError, match=words) as caught:
            look(runtime)
        assert caught.value.exit_status == os.EX_CONFIG


@pytest.mark.parametrize("name", ["x" * 120, "a\0b", "a\ud800"])
def test_a_name_that_no_folder_of_sockets_can_have_is_refused(tmp_path, name):
    with pytest.raises(EndpointError, match="runtime_dir"):
        check_folder(tmp_path / name)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_arguments: False)
    with pytest.raises(EndpointError, match=f"cannot be made: {tmp_path}: Permission denied"):
        check_folder(tmp_path / "a" / "b")


# -- the camera -------------------------------------------------------------------------------------------------------

STALLED = Probe(False, "stalled: ipc:///run/x/frames: no frame was pushed for 2 s")
ABSENT = Probe(False, "absent: cannot be bound: No such file or directory")


def test_a_source_without_a_pusher_is_a_warning_with_a_remedy(checked, no_context):
    status, lines = checked(STALLED, "zmq:ipc:///run/x/frames")
    assert status == 0 and lines["camera"].startswith("WARN zmq:ipc:///run/x/frames: nobody pushes frames now; start")


def test_frames_in_a_runtime_folder_that_the_daemon_makes_are_a_warning(checked, runtime, no_context):
    status, lines = checked(ABSENT, f"zmq:ipc://{runtime}/frames")
    assert status == 0 and lines["camera"].startswith("WARN")
    status, lines = checked(ABSENT, "zmq:ipc:///no/such/frames")
    assert status == os.EX_CONFIG and lines["camera"].startswith("FAIL")


@pytest.mark.parametrize(
    ("probe", "source", "words"),
    [
        (Probe(False, "stalled: /dev/video0: returns no frame"), "/dev/video0", "returns no frame"),
        (Probe(False, "busy: process 7 listens there"), "zmq:ipc:///run/x/frames", "process 7 listens there"),
        (Probe(False, "unreadable: frame 3: cut"), "zmq:ipc:///run/x/frames", "frame 3: cut"),
        (Probe(False, "zmq: no frame in 12 s"), "zmq:ipc:///run/x/frames", "no frame in 12 s"),
        (Probe(False, "the process ended without a word"), "/dev/video0", "the process ended without a word"),
    ],
)
def test_every_other_camera_without_a_frame_is_a_fault(checked, no_context, probe, source, words):
    status, lines = checked(probe, source)
    assert status == os.EX_CONFIG and lines["camera"].startswith("FAIL camera.source: ") and words in lines["camera"]


def test_the_real_probe_of_pushed_frames_ends_as_the_warning_expects(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "PROBE_S", 0.1)
    monkeypatch.setattr(command, "PROBE_EXIT_S", 60.0)
    probe = command.probe_camera(command.CameraConfig(source=f"zmq:ipc://{tmp_path}/frames"))
    assert not probe.is_open and probe.line.startswith("stalled: ")
    assert not (tmp_path / "frames").exists()


# -- what was tuned, and what a model can answer to -------------------------------------------------------------------


def test_a_configuration_that_was_tuned_for_other_frames_is_a_warning(checked, no_context):
    tuned = {"date": "2026-11-27", "frames": "1280x720"}
    status, lines = checked(tuned=tuned)
    assert status == 0
    assert lines["tuned"].startswith("WARN tuned on 2026-11-27 for frames of 1280x720, found 64x48: run")
    assert "tuned" not in checked(tuned=tuned | {"frames": "64x48"})[1]
    assert "tuned" not in checked(probe=Probe(False, "stalled: x"), source="zmq:ipc:///nowhere/x", tuned=tuned)[1]


def test_a_text_only_model_without_a_state_to_answer_from_is_a_warning(checked, no_context, tmp_path):
    wrap(gguf_toys.write_language(tmp_path / "language.gguf"), None, tmp_path / "text")
    status, lines = checked(bundle=str(tmp_path / "text"))
    assert status == 0 and lines["actions"].startswith("WARN velocity_body has no vehicle_state")
    space = tmp_path / "climb.yaml"
    space.write_text(
        "name: climb\nvalid_for_ms: 500\nactions: {up: {}, down: {}}\n"
        "vehicle_state:\n  text: 'At {altitude_m}. '\n  values: {altitude_m: {unit: m, max_age_ms: 200}}\n"
    )
    assert checked(bundle=str(tmp_path / "text"), task={"action_space": str(space)})[1]["actions"].startswith("ok")
