"""edge-agent as a user types it: every wrong input is one line with the next step, and has its own exit status."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import pytest

from edge_agent.cli import main
from edge_agent.cli.commands import COMMANDS
from edge_agent.cli.daemon import read_config
from edge_agent.errors import ConfigError
from tests.harness import ROOT, rig, toy


def run(*arguments: object, timeout_s: float = 120.0, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "edge_agent.cli.main", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def one_line(done: subprocess.CompletedProcess, status: int, *words: str) -> None:
    lines = done.stderr.strip().splitlines()
    assert done.returncode == status, done
    assert len(lines) == 1 and lines[0].startswith("edge-agent: "), done.stderr
    for word in words:
        assert word in lines[0]


@pytest.fixture
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("r")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(3):
        cv2.imwrite(str(folder / f"{i}.png"), toy.toy_image(112, 140, i))
    return folder


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_broken_pipe_of_the_daemon_is_no_success(monkeypatch, tmp_path):
    """For a command that prints, it means that nobody reads the rest: `edge-agent listen | head`."""
    from edge_agent.supervisor import process

    def write_to_a_closed_socket(*_arguments: object, **_options: object) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(process, "run", write_to_a_closed_socket)
    monkeypatch.setattr(sys, "argv", ["edge-agent", "run", "--bundle", str(tmp_path), "--camera", "0"])
    with pytest.raises(RuntimeError, match="a socket that is closed"):
        main.main()


def test_help_teaches():
    done = run("--help")
    assert done.returncode == 0
    for word in (*COMMANDS, "examples:", "exit status:"):
        assert word in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_explains_every_argument(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")  # one line per argument
    monkeypatch.setattr(sys, "argv", ["edge-agent", command, "--help"])
    with pytest.raises(SystemExit) as ended:
        main.main()
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    for argument in COMMANDS[command].arguments:
        assert len(argument.options["help"]) > 10 and argument.options["help"] in shown


@pytest.mark.parametrize("command", ["--help", "status", "listen", "ask", "instruct"])
def test_commands_of_a_controller_load_neither_yaml_nor_numpy(command):
    """They run, until no daemon answers, in a process that then prints what it has loaded."""
    code = (
        "import sys; sys.argv[0] = 'edge-agent'\n"
        "from edge_agent.cli import main, control\n"
        "control.STATUS_TIMEOUT_S = 0.05\n"
        "try: main.main()\n"
        "except SystemExit as ended: print(ended.code, *sorted(sys.modules), sep='\\n', file=sys.stderr)\n"
    )
    arguments = {"--help": [], "status": [], "listen": [], "ask": ["What?"], "instruct": ["Land."]}[command]
    at = [] if command == "--help" else ["--runtime-dir", "/nonexistent"]
    program = [sys.executable, "-c", code, command, *arguments, *at]
    done = subprocess.run(program, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert ("0" if command == "--help" else str(os.EX_TEMPFAIL)) in lines[:2]
    assert not {"yaml", "numpy", "cv2", "cryptography", "gguf", "rich", "edge_agent.config"} & set(lines)


def test_no_configuration_at_all():
    for command in ("run", "check", "bench"):
        one_line(run(command), 2, "--config", "--bundle", "--camera")


def test_configuration_with_a_typo(tmp_path):
    path = write(tmp_path / "a.yaml", "bundle: b\ncamera: {sorce: x}\n")
    one_line(run("run", "--config", path), os.EX_CONFIG, str(path), "camera", "'sorce'", "did you mean 'source'")
    one_line(run("check", "--config", path), os.EX_CONFIG, "'sorce'")


def test_configuration_that_is_not_yaml_or_missing(tmp_path):
    path = write(tmp_path / "a.yaml", "bundle: [\n")
    one_line(run("run", "--config", path), os.EX_CONFIG, f"{path}:2:1", "not YAML")
    one_line(run("run", "--config", tmp_path / "none.yaml"), os.EX_CONFIG, "none.yaml", "No such file")


def test_bundle_folder_that_is_missing_or_empty(tmp_path, pictures, runtime):
    env = {"RUNTIME_DIRECTORY": str(runtime)}
    one_line(run("run", "--bundle", tmp_path / "no", "--camera", pictures, **env), os.EX_CONFIG, "no such folder")
    one_line(run("run", "--bundle", tmp_path, "--camera", pictures, **env), os.EX_CONFIG, "bundle.json", "missing")


def test_action_space_that_does_not_exist(toy_bundle, pictures, tmp_path):
    text = f"bundle: {toy_bundle}\ncamera: {{source: {pictures}}}\ntask: {{action_space: fly}}\n"
    path = write(tmp_path / "a.yaml", text)
    one_line(run("run", "--config", path), os.EX_CONFIG, "task.action_space", "velocity_body", "'fly'")


def test_runtime_folder_too_long(toy_bundle, pictures, tmp_path):
    long = tmp_path / ("x" * 100)
    done = run("run", "--bundle", toy_bundle, "--camera", pictures, RUNTIME_DIRECTORY=str(long))
    one_line(done, os.EX_CONFIG, "runtime_dir", "107")


def test_check_prints_a_line_per_part(toy_bundle, pictures):
    done = run("check", "--bundle", toy_bundle, "--camera", pictures)
    assert done.returncode == 0, done
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [
        ["ok", "actions"],
        ["ok", "sockets"],
        ["ok", "bundle"],
        ["ok", "camera"],
        ["ok", "cpu"],
        ["ok", "memory"],
        ["ok", "context"],
    ]
    assert "140x112" in done.stdout


def test_a_camera_that_failed_is_the_only_fault(toy_bundle):
    done = run("check", "--bundle", toy_bundle, "--camera", "/dev/video77")
    assert done.returncode == os.EX_CONFIG
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert len(failed) == 1 and "camera.source" in failed[0] and "/dev/video77" in failed[0]


@pytest.mark.parametrize("source", ["/none/such.mp4", "rtsp://camera/1", "gst:videotestsrc"])
def test_check_names_the_camera_that_failed(tmp_path, source):
    """Without a bundle: only the camera is looked at."""
    done = run("check", "--bundle", tmp_path, "--camera", source)
    assert done.returncode == os.EX_CONFIG
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAIL  camera")]
    assert len(failed) == 1 and "camera.source" in failed[0]
    assert source.removeprefix("gst:videotestsrc") in failed[0]


@pytest.mark.parametrize("name", [b"Fl\xfcge", b"\xff.mp4", b"gst:\xe4"])
@pytest.mark.parametrize("flag", ["bundle", "camera"])
def test_a_name_that_is_not_utf_8_is_refused_in_one_line(name, flag):
    """As argparse gets it. It would go to the child processes as UTF-8."""
    names = {"bundle": "b", "camera": "c"} | {flag: os.fsdecode(name)}
    with pytest.raises(ConfigError, match=rf"--{flag}: .*a name that is not UTF-8") as caught:
        read_config(argparse.Namespace(config=None, **names))
    assert str(caught.value).encode()


def test_check_continues_after_a_fault(tmp_path, pictures):
    done = run("check", "--bundle", tmp_path, "--camera", pictures)
    assert done.returncode == os.EX_CONFIG
    assert "FAIL  bundle" in done.stdout and "ok    camera" in done.stdout


def test_without_a_daemon(runtime):
    """Each command waits for seconds: all of them at once."""
    commands = (["listen"], ["status", "--json"], ["ask", "What?"], ["instruct", "Land."], ["pause"])
    with ThreadPoolExecutor(len(commands)) as pool:
        done = list(pool.map(lambda command: run(*command, "--runtime-dir", runtime), commands))
    for ended in done[:2]:
        one_line(ended, os.EX_TEMPFAIL, str(runtime), "no daemon answers")
    for ended in done[2:]:
        one_line(ended, os.EX_TEMPFAIL, str(runtime), "nobody answers there")


def wait_for_kinds(at: tuple[str, ...], expected: set[str]) -> None:
    """Run edge-agent listen --json until every expected kind of message has been printed."""
    command = [sys.executable, "-m", "edge_agent.cli.main", "listen", "--json", *at]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as listener:
        missing = set(expected)
        for line in listener.stdout:
            missing.discard(json.loads(line)["kind"])
            if not missing:
                break
        listener.send_signal(signal.SIGINT)
        listener.stdout.read()
        assert (missing, listener.wait(60)) == (set(), 130)


def wait_for_status(at: tuple[str, ...], text: str) -> None:
    """Until edge-agent status prints the text: the status that a new subscriber gets may be the one before."""
    until_s = time.monotonic() + 60
    while text not in (printed := run("status", *at).stdout):
        assert time.monotonic() < until_s, printed


def test_against_a_daemon(toy_bundle, pictures, runtime):
    config = {
        "bundle": str(toy_bundle),
        "camera": {"source": str(pictures), "fps": 20},
        "vision": {"max_image_tokens": 32},
        "language": {"context": 1024, "max_text_tokens": 8},
        "task": {"deadline_ms": 60_000},
    }
    at = ("--runtime-dir", str(runtime))
    with rig.daemon(runtime, config):
        status = run("status", *at)
        assert status.returncode == 0 and "running" in status.stdout
        assert json.loads(run("status", "--json", *at).stdout)["kind"] == "status"
        wait_for_kinds(at, {"action", "text", "status"})
        assert run("listen", "--seconds", "0.1", *at).returncode == 0
        answers = (run("ask", f"What is there {n}?", *at) for n in range(100))  # a toy may write nothing but spaces
        assert len(next(answer.stdout for answer in answers if answer.returncode == 0).strip()) > 0
        assert run("instruct", "Go there.", *at).returncode == 0
        wait_for_status(at, "Go there.")
        one_line(run("instruct", " ", *at), 1, "2000 characters")
        one_line(run("adapter", "night", *at), 1, "night")
        assert run("pause", *at).returncode == 0
        wait_for_status(at, "paused")
        assert run("resume", *at).returncode == 0
        wait_for_status(at, "running")


def test_vehicle_state_and_a_timeline(toy_bundle, pictures, runtime):
    space = write(
        runtime / "climb.yaml",
        "name: climb\nvalid_for_ms: 500\nactions: {up: {}, down: {}}\n"
        "vehicle_state: {text: '{altitude_m} {armed} {mode}. ',\n"
        "  values: {altitude_m: {unit: m}, armed: {}, mode: {}}}\n",
    )
    config = write(
        runtime / "config.yaml",
        f"bundle: {toy_bundle}\ncamera: {{source: {pictures}}}\n"
        f"task: {{action_space: {space}}}\nruntime_dir: {runtime}\n"
        "language: {gpu_layers: 0}\nvision: {max_image_tokens: 64}\n",
    )
    command = [
        sys.executable,
        "-m",
        "edge_agent.cli.main",
        "run",
        "--config",
        config,
        "--trace",
        runtime / "trace.json",
    ]
    daemon = subprocess.Popen(list(map(str, command)), env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        rig.Daemon(daemon, runtime, runtime / "log").wait("running")
        sent = run("vehicle-state", "--runtime-dir", runtime, "altitude_m=3.5", "armed=true", "mode=offboard")
        assert (sent.returncode, sent.stdout, sent.stderr) == (0, "", "")
        unknown = run("vehicle-state", "--runtime-dir", runtime, "altitude=3.5")
        one_line(unknown, 1, "altitude: expected one of altitude_m, armed, mode")
        one_line(run("vehicle-state", "--runtime-dir", runtime, "altitude_m"), 2, "KEY=VALUE")
        one_line(run("vehicle-state", "--runtime-dir", runtime, "mode=[1]"), 1, "mode: expected", "'[1]'")
    finally:
        daemon.terminate()
        assert daemon.wait(60) == 0
    assert {"encode", "prefill"} <= {event["name"] for event in json.loads((runtime / "trace.json").read_text())}
    one_line(run("run", "--config", config, "--trace", runtime / "none" / "t.json"), 78, "trace", "cannot be written")
