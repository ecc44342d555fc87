"""The command tune: what it writes, what it refuses before the minutes of measuring, and one real measurement."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from edge_agent.cli import main, tune
from edge_agent.config import load_config
from edge_agent.doctor.machine import OnnxruntimeAnswer
from edge_agent.errors import UserError
from edge_agent.tools import tune as search
from edge_agent.tools.measure_daemon import Measured, measure
from tests.harness import ROOT

BEST = {
    "vision.backend": "mtmd",
    "vision.tensorrt": False,
    "vision.max_image_tokens": 64,
    "cpu_threads": 1,
    "advanced.overlap": False,
    "advanced.speculative": True,
    "advanced.kv_cache_type": "f16",
}
TEXT = "# my robot\nbundle: {bundle}\ncamera:\n  source: zmq:ipc:///tmp/x  # pushed\n  width: 64\n  height: 48\nvision: {{max_image_tokens: 64}}\nruntime_dir: {runtime}\n"  # fmt: skip  # noqa: E501


@pytest.fixture
def file(tmp_path: Path, toy_bundle: Path) -> Path:
    path = tmp_path / "agent.yaml"
    path.write_text(TEXT.format(bundle=toy_bundle, runtime=tmp_path / "run"))
    return path


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of minutes of measuring: the result is BEST."""

    def fake(config: Any, manifest: Any, encoders: Any, report: Any, measure_s: float) -> search.Tuned:
        start = search.values_in_force(config, gpu=False)
        report("as configured", None, 1, 1)
        report("as configured", Measured(90.0, 60.0, 11.0, 44), 1, 1)
        tried = [search.Tried("as configured", start, Measured(90.0, 60.0, 11.0, 44))]
        return search.Tuned(tried, start, BEST, 90.0, 41.5)

    monkeypatch.setattr(search, "tune", fake)
    monkeypatch.setattr(tune, "busy_cores", lambda: 0.0)
    monkeypatch.setattr(tune, "ask_onnxruntime", OnnxruntimeAnswer)


def run(*arguments: object) -> int:
    return main.run_command(main.make_parser().parse_args(["tune", *map(str, arguments)]))


def test_without_write_the_file_stays(file: Path, measured: None, capsys: pytest.CaptureFixture[str]) -> None:
    before = file.read_bytes()
    assert run("--config", file) == 0
    out, err = capsys.readouterr()
    assert file.read_bytes() == before and sorted(path.name for path in file.parent.iterdir()) == ["agent.yaml"]
    assert json.loads(out.splitlines()[-1])["chosen"] == BEST
    assert "mean age of information: 41.5 ms, as configured: 90 ms" in err and "  cpu_threads: 1" in err


@pytest.mark.parametrize("arguments", [(), ("--tensorrt",)])
def test_the_encoders_of_the_bundle_and_of_this_machine(
    file: Path, measured: None, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    asked = dict.fromkeys(("CPUExecutionProvider", "TensorrtExecutionProvider"), "")
    monkeypatch.setattr(tune, "ask_onnxruntime", lambda: OnnxruntimeAnswer(providers=asked))
    fake, seen = search.tune, []
    monkeypatch.setattr(search, "tune", lambda *given: (seen.extend(given[2]), fake(*given))[1])
    assert run("--config", file, *arguments) == 0
    assert [row.name for row in seen if not row.skip] == [
        "onnxruntime CPU (bf16)", *["onnxruntime TensorRT (bf16)"] * len(arguments), "mtmd (bf16)"
    ]  # fmt: skip


def test_a_choice_of_tensorrt_says_what_the_daemon_needs(
    file: Path, measured: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(BEST, "vision.backend", "onnxruntime")
    monkeypatch.setitem(BEST, "vision.tensorrt", True)
    assert run("--config", file, "--write") == 0
    assert load_config(file).vision.tensorrt
    assert "set watchdog.model_load_s to 1800 for it" in capsys.readouterr().err


def test_write_sets_the_keys_and_leaves_the_rest(file: Path, measured: None) -> None:
    before = file.read_text()
    file.chmod(0o640)
    assert run("--config", file, "--write") == 0
    after = file.read_text()
    config = load_config(file)
    assert {key: _get(config, key) for key in BEST} == BEST
    assert (config.tuned.frames, config.tuned.mean_age_ms, config.tuned.deadline_ms) == ("64x48", 41.5, 2000)
    assert len(config.tuned.bundle) == 16 and config.tuned.board
    assert "# my robot\n" in after and "  # pushed\n" in after
    assert f"cpu_threads: 1  # tune {config.tuned.date}: 41.5 ms mean age, frames of 64x48\n" in after
    assert file.stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in file.parent.iterdir()) == ["agent.yaml"]
    assert run("--config", file, "--write") == 0  # again: the same keys, once each
    assert file.read_text() == after != before


def test_a_file_of_another_owner_is_written_and_keeps_what_it_can(
    file: Path, measured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "chown", refuse)
    assert run("--config", file, "--write") == 0
    assert load_config(file).cpu_threads == 1


def test_a_disk_that_fails_at_the_end_does_not_lose_the_figures(
    file: Path, measured: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_arguments: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="Input/output"):
        run("--config", file, "--write")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["chosen"] == BEST


def test_a_file_that_cannot_be_edited_is_told_before_the_measuring(file: Path, measured: None) -> None:
    text = file.read_text().replace("vision: {max_image_tokens: 64}", "vision: &v {max_image_tokens: 64}")
    file.write_text(text)
    with pytest.raises(UserError, match=r"run tune without --write, and set the printed keys by hand$"):
        run("--config", file, "--write")


def test_write_follows_a_link(file: Path, measured: None, tmp_path: Path) -> None:
    link = tmp_path / "link.yaml"
    link.symlink_to(file)
    assert run("--config", link, "--write") == 0
    assert link.is_symlink() and load_config(file).cpu_threads == 1


def _get(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (("--bundle", "B", "--camera", "x", "--write"), 2, "--write: expected --config FILE"),
        (("--config", "FILE", "--seconds", "0"), 2, "--seconds: expected 0.5 to 600, found 0"),
        (("--config", "FILE", "--deadline-ms", "0"), 2, "--deadline-ms: expected 1 to 600000, found 0"),
        (("--config", "FILE", "--bundle", "/nowhere"), 78, "/nowhere"),
        (("--config", "FILE", "--camera", "/nowhere.mp4"), 78, "camera.source"),
        (("--config", "ALIAS", "--write"), 78, "cannot be edited here; run tune without --write"),
        (("--config", "OLDER"), 78, "tuned: unknown key"),
    ],
)
def test_a_fault_is_found_before_the_measurement(
    file: Path, arguments: tuple[str, ...], status: int, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "tune", lambda *_: pytest.fail("measured"))
    alias, older = file.with_name("alias.yaml"), file.with_name("older.yaml")
    alias.write_text(file.read_text() + "language: &a {}\ntuned: *a\n")
    older.write_text(file.read_text() + "tuned: {date: '2025-01-01', rows: 16}\n")
    names = {"FILE": file, "ALIAS": alias, "OLDER": older}
    with pytest.raises(UserError, match=says) as caught:
        run(*(names.get(argument, argument) for argument in arguments))
    assert caught.value.exit_status == status


def test_a_daemon_that_runs_is_named(file: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with socket.socket(socket.AF_UNIX) as control:
        control.bind(str(tmp_path / "run" / "control"))
        control.listen()
        with pytest.raises(UserError, match=r"a daemon runs in .*stop it first"):
            run("--config", file)


def test_busy_cores_are_counted_from_the_first_line_of_proc_stat() -> None:
    texts = iter(["cpu  100 0 100 800 0 0 0 0 0 0\ncpu0 1", "cpu  150 0 100 950 0 0 0 0 0 0\ncpu0 1"])
    cores = tune.available_cores()
    assert tune.busy_cores(lambda: next(texts), 0) == pytest.approx(cores * 50 / 200)
    assert tune.busy_cores(lambda: "", 0) == 0.0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupt_leaves_no_daemon_and_no_change(file: Path, number: signal.Signals) -> None:
    before = file.read_bytes()
    command = [sys.executable, "-m", "edge_agent.cli.main", "tune", "--config", str(file), "--write"]
    with tempfile.TemporaryDirectory() as scratch:  # short, for sockets; SIGKILL leaves tune's folder
        env = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": scratch}
        child = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.PIPE, env=env)
        daemon = _wait_for_daemon(child.pid)
        child.send_signal(number)
        assert child.communicate(timeout=60)[0] == b""
        assert child.returncode == (-9 if number == signal.SIGKILL else 130)
        for _ in range(600):  # after SIGKILL of its parent the daemon ends by itself
            if not Path(f"/proc/{daemon}").exists():
                break
            time.sleep(0.05)
    assert not Path(f"/proc/{daemon}").exists()
    assert file.read_bytes() == before


def _wait_for_daemon(parent: int) -> int:
    """Pid of the daemon that `parent` started."""
    for _ in range(1200):
        for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
            if b"main\0run\0" in Path(f"/proc/{child}/cmdline").read_bytes():
                return int(child)
        time.sleep(0.05)
    raise AssertionError("no daemon")


def test_one_real_measurement(file: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    config = load_config(file)
    result = measure(config, tmp_path_factory.mktemp("m"), 0.5)
    assert result.problem == "" and result.mean_age_ms is not None and result.age_ms is not None
    assert result.n_actions >= 2 and result.mean_age_ms > result.age_ms / 2
    assert result.language_backend.startswith("llama.cpp") and result.vision_backend.startswith("onnxruntime")


def test_a_daemon_that_does_not_start_is_the_problem(file: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    file.write_text(file.read_text().replace("max_image_tokens: 64", "max_image_tokens: 1024"))
    folder = tmp_path_factory.mktemp("m")
    result = measure(load_config(file), folder, 0.5)
    assert not load_config(folder / "config.yaml").governor.enabled  # its limit would be another configuration
    assert result.mean_age_ms is None and "context" in result.problem
