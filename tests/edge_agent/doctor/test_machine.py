"""The command on a saved machine, and what is asked of this one."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import cv2
import msgspec
import pytest

from edge_agent.bundle.wrap import wrap
from edge_agent.cli import main
from edge_agent.cli.doctor import _ask_camera
from edge_agent.config import CameraConfig, Config, VisionConfig
from edge_agent.doctor import collect
from edge_agent.doctor.examine import examine
from edge_agent.doctor.machine import Answers, CardAnswer, LlamaAnswer, LocalFiles, Machine, OnnxruntimeAnswer
from edge_agent.doctor.unit import installed_unit, parse, seconds, size_mib
from tests.harness import boards, gguf_toys, toy


def doctor(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of the command."""
    monkeypatch.setattr(sys, "argv", ["edge-agent", "doctor", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main.main()
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


@pytest.mark.parametrize("board", (boards.ORIN_NX, boards.PC_WITH_CARD, boards.CONTAINER), ids=lambda board: board.name)
def test_a_saved_machine_is_examined_as_the_machine_itself(board, tmp_path, monkeypatch, capsys):
    board.write(tmp_path)
    status, out, err = doctor(monkeypatch, capsys, "--root", tmp_path, "--json")
    report = json.loads(out)
    assert (status, err, report["exit_status"], out.count("\n")) == (0, "", 0, 1)
    expected = [(finding.check, finding.state, finding.found) for finding in examine(board.machine())]
    assert [(row["check"], row["state"], row["found"]) for row in report["checks"]] == expected


def test_the_lines_name_the_remedy_and_the_status_is_for_scripts(tmp_path, monkeypatch, capsys):
    boards.ORIN_NANO.write(tmp_path)
    (tmp_path / "sys/class/hwmon/hwmon5/oc1_event_cnt").write_text("3\n")
    status, out, _ = doctor(monkeypatch, capsys, "--root", tmp_path)
    lines = out.splitlines()
    warned = next(i for i, line in enumerate(lines) if line.startswith("WARN"))
    assert status == 1 and "throttling" in lines[warned] and lines[warned + 1].strip().startswith("-> ")
    (tmp_path / "etc/edge-agent/fleet.pub").unlink()
    status, out, _ = doctor(monkeypatch, capsys, "--root", tmp_path)
    assert status == os.EX_CONFIG and "FAIL  keys" in out


def test_a_terminal_without_a_degree_sign_gets_every_line(tmp_path, monkeypatch):
    boards.ORIN_NANO.write(tmp_path)
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
    monkeypatch.setattr(sys, "argv", ["edge-agent", "doctor", "--root", str(tmp_path)])
    with pytest.raises(SystemExit):
        main.main()
    sys.stdout.flush()
    assert b"temperature    48 ?C" in written.getvalue() and b"leftovers" in written.getvalue()


def test_a_wrong_configuration_is_a_finding_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    boards.PC.write(tmp_path)
    (tmp_path / "etc/edge-agent.yaml").write_text("bundle: b\ncamera: {sorce: x}\n")
    status, out, _ = doctor(monkeypatch, capsys, "--root", tmp_path)
    assert status == os.EX_CONFIG and "'sorce'" in out and "ok    memory" in out
    status, out, _ = doctor(monkeypatch, capsys, "--root", tmp_path, "--config", "/etc/other.yaml")
    assert status == os.EX_CONFIG and "/etc/other.yaml: no such file" in out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "machine.json"),
        (b'{"pythons": [3, 9]}', "pythons"),
        (b'{"n_cores": "two"}', "n_cores"),
        (b"\xff", "machine.json"),
    ],
)
def test_wrong_answers_of_a_saved_machine_are_one_line(tmp_path, monkeypatch, capsys, content, words):
    (tmp_path / "machine.json").write_bytes(content)
    status, out, err = doctor(monkeypatch, capsys, "--root", tmp_path)
    assert (status, out, err.count("\n")) == (os.EX_CONFIG, "", 1) and words in err
    status, _, err = doctor(monkeypatch, capsys, "--root", tmp_path / "none")
    assert status == os.EX_CONFIG and "expected a folder" in err


def test_a_saved_machine_without_answers_is_examined_by_its_files(tmp_path, monkeypatch, capsys):
    boards.RASPBERRY_PI.write(tmp_path)
    (tmp_path / "machine.json").unlink()
    assert doctor(monkeypatch, capsys, "--root", tmp_path)[0] == 0


def test_links_of_a_saved_machine_lead_to_its_own_files(tmp_path):
    root = tmp_path / "saved"
    (root / "etc").mkdir(parents=True)
    (root / "data").mkdir()
    (root / "data/text").write_text("its own")
    for name, target in {"a": "/data/text", "b": "../data/text", "c": "../../../../data/text", "d": "d"}.items():
        (root / "etc" / name).symlink_to(target)
    (root / "link").symlink_to("/data")
    (tmp_path / "secret").write_text("of the workstation")
    (root / "etc/out").symlink_to("../../secret")
    files = LocalFiles(root)
    assert [files.read(f"/etc/{name}") for name in "abc"] == ["its own"] * 3
    assert (files.read("/link/text"), files.names("/link"), files.target("/link")) == ("its own", ["text"], "/data")
    assert (files.read("/etc/out"), files.read("/etc/d"), files.mode("/etc/out")) == ("", "", None)


def test_only_plain_files_are_read(tmp_path):
    """Neither of these may make doctor hang or grow."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "large").write_bytes(b"a" * (3 << 20))
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    files = LocalFiles(tmp_path)
    assert [files.read(f"/{name}") for name in ("pipe", "zero", "latin", "none", "")] == [""] * 5
    assert len(files.read("/large")) == 1 << 20
    live = LocalFiles()
    assert live.read("/dev/zero") == live.read(str(tmp_path / "pipe")) == live.read("/proc") == ""
    assert "MemTotal" in live.read("/proc/meminfo")


def test_a_sensor_that_is_switched_off_is_an_empty_text(tmp_path, monkeypatch):
    """Its file answers EAGAIN, and Python's read() then returns None."""

    class SwitchedOff(io.BufferedReader):
        def read(self, size=-1):
            return None

    (tmp_path / "temp").write_text("0")
    monkeypatch.setattr(os, "fdopen", lambda fd, mode: SwitchedOff(io.FileIO(fd, "r")))
    assert LocalFiles(tmp_path).read("/temp") == ""


# -- this machine -----------------------------------------------------------------------------------------------------


def test_a_user_who_may_not_look_and_has_no_home_gets_every_other_answer(tmp_path, monkeypatch):
    """As one who is not root: an existing folder that cannot be entered."""
    closed, look = str(tmp_path / "closed"), os.stat

    def stat(path, *arguments, **options):
        if str(path).startswith(closed + "/"):
            raise PermissionError(13, "Permission denied", str(path))
        return look(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", stat)
    monkeypatch.setattr(collect, "state_dir", lambda: Path("~nobody-of-this-name").expanduser())
    config = Config(bundle=f"{closed}/bundle", camera=CameraConfig(source="0"))
    found = collect._system(config)
    assert "/" in found.disks
    assert collect._bundle(config) == {"bundle_error": f"{closed}/bundle: Permission denied"}


def test_a_card_whose_driver_hangs_is_an_answer(monkeypatch):
    monkeypatch.setattr(collect, "_run", lambda command, timeout_s: (None, b""))
    assert collect._cards() == {"cards": (), "card_error": "does not answer in 60 s", "cuda_version": None}


def test_this_machine_answers(tmp_path):
    """The native libraries really run here."""
    llama = collect._native("llama", LlamaAnswer)
    assert (llama.error, llama.version) == ("", "0.3.36") and "OPENMP = 1" in llama.system_info
    onnxruntime = collect._native("onnxruntime", OnnxruntimeAnswer)
    assert onnxruntime.error == "" and onnxruntime.providers["CPUExecutionProvider"] == ""
    system = collect._system(None)
    assert (
        system.n_cores == len(os.sched_getaffinity(0)) and 0 < system.disks["/"].free_mib < system.disks["/"].total_mib
    )
    assert system.largest_block_mib > 100 and system.year >= 2025
    assert {"cards", "card_error", "cuda_version"} == collect._cards().keys()


def test_a_bundle_is_planned_for(toy_bundle, tmp_path):
    from tests.harness.rig import config_of

    found = collect._bundle(config_of(toy_bundle))
    assert found["needed_mib"] > 100 and found["reductions"] == () and found["has_vision_onnx"]
    missing = collect._bundle(config_of(tmp_path))
    assert "bundle.json: missing" in missing["bundle_error"]
    assert collect._bundle(None) == {}


@pytest.mark.parametrize("mmproj", [False, True])
def test_a_wrapped_bundle_is_planned_for(mmproj, tmp_path):
    from tests.harness.rig import config_of

    language = gguf_toys.write_language(tmp_path / "x.gguf", "gemma3", gguf_toys.GEMMA)
    wrap(language, gguf_toys.write_gemma_mmproj(tmp_path / "m.gguf") if mmproj else None, tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert collect._bundle(config)["has_vision_onnx"] is False
    onnxruntime = msgspec.structs.replace(config, vision=VisionConfig(backend="onnxruntime"))
    assert "vision.backend: expected mtmd or null" in collect._bundle(onnxruntime)["bundle_error"]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os; os.kill(os.getpid(), 4)", "SIGILL: it was built for another processor"),
        ("import os; os.abort()", "SIGABRT"),
        ("print('not json')", "no answer"),
        ('print(\'{"error": "ImportError: x"}\')', "ImportError: x"),
    ],
)
def test_a_native_library_that_ends_its_process_is_an_answer(monkeypatch, code, words):
    real_run = collect._run
    monkeypatch.setattr(collect, "_run", lambda command, timeout_s: real_run([sys.executable, "-c", code], timeout_s))
    assert words in collect._native("llama", LlamaAnswer).error


def test_a_native_library_that_hangs_is_killed(monkeypatch):
    monkeypatch.setattr(collect, "_run", lambda command, timeout_s: (None, b""))
    assert "does not answer" in collect._native("llama", LlamaAnswer).error
    assert collect._run.__name__ == "<lambda>"
    monkeypatch.undo()
    assert collect._run([sys.executable, "-c", "import time; time.sleep(60)"], 0.1) == (None, b"")


def test_the_camera_is_asked_by_the_probe_of_check(tmp_path):
    cv2.imwrite(str(tmp_path / "0.png"), toy.toy_image(112, 140, 0))
    found = _ask_camera(CameraConfig(source=str(tmp_path)))
    assert (found.works, found.line, found.clock) == (True, f"{tmp_path}: 140x112 at 5 fps", "arrival")
    found = _ask_camera(CameraConfig(source=str(tmp_path / "none.mp4")))
    assert not found.works and found.line.startswith("absent: ")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("bundle: /b\ncamera: {source: /dev/video0}\n", ("/b", "")),
        ("bundle: /b\n", (None, "camera")),
        (None, (None, "No such file")),
    ],
)
def test_without_arguments_the_configuration_is_that_of_the_unit(tmp_path, text, found):
    path = tmp_path / "agent.yaml"
    if text is not None:
        path.write_text(text)
    unit = f"[Service]\nExecStart=/bin/edge-agent run --config {path}\n"
    files = boards.TableFiles({"/etc/systemd/system/edge-agent.service": unit}, {})
    config, config_path, error = collect._config_of_the_unit(files)
    assert (config.bundle if config is not None else None, config_path) == (found[0], str(path))
    assert (found[1] in error) and bool(error) == (config is None)
    assert collect._config_of_the_unit(boards.TableFiles({}, {})) == (None, "", "")


def test_a_line_of_tegrastats_is_taken_and_the_program_is_ended(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert collect._tegrastats() == ""
    program = tmp_path / "tegrastats"
    program.write_text("#!/bin/sh\necho 'RAM 1/2MB cpu@47C'\necho second\nexec sleep 600\n")
    program.chmod(0o755)
    monkeypatch.setattr(collect, "TEGRASTATS_S", 0.5)
    assert collect._tegrastats() == "RAM 1/2MB cpu@47C"


# -- the unit ---------------------------------------------------------------------------------------------------------


def unit_of(files: dict) -> object:
    return installed_unit(Machine(boards.TableFiles(files, {}), Answers()))


def test_a_unit_is_read_as_systemd_reads_it():
    base = "/etc/systemd/system/edge-agent.service"
    unit = unit_of(
        {
            base: "[Unit]\nType=oneshot\n[Service]\n# Type=x\nType=notify\nDeviceAllow=a\n"
            "ExecStart=/bin/a run \\\n  --config=/etc/c.yaml\n",
            f"{base}.d/20-b.conf": "[Service]\nDeviceAllow=\nDeviceAllow=b\n",
            f"{base}.d/10-a.conf": "[Service]\nDeviceAllow=c\nType = simple\n",
            f"{base}.d/readme.txt": "[Service]\nDeviceAllow=d\n",
            "/usr/lib/systemd/system/edge-agent.service.d/20-b.conf": "[Service]\nDeviceAllow=e\n",
        }
    )
    assert (unit.last("Type"), unit.settings["DeviceAllow"], unit.config_path) == ("simple", ["b"], "/etc/c.yaml")
    assert [path.rsplit("/", 1)[1] for path in unit.drop_ins] == ["10-a.conf", "20-b.conf"]
    assert unit_of({}) is None
    assert unit_of({base: "[Service]\nExecStart=/bin/a 'b\n"}).command == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1.5G", 1536.0),
        ("1G:2G", 1024.0),
        ("2G", 2048.0),
        ("512M", 512.0),
        ("1048576", 1.0),
        ("infinity", None),
        ("50%", None),
        ("", None),
    ],
)
def test_sizes(text, expected):
    assert size_mib(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("20seconds", 20.0),
        ("1 minute 5 sec", 65.0),
        ("15", 15.0),
        ("15s", 15.0),
        ("1min 30s", 90.0),
        ("500ms", 0.5),
        ("infinity", None),
        ("", None),
    ],
)
def test_durations(text, expected):
    assert seconds(text) == expected


def test_lines_of_a_unit():
    assert parse("[Install]\nWantedBy=a=b\n\n;x=1\n[X-Other]\nA=1\n") == [("WantedBy", "a=b")]


def test_every_answer_of_a_card_is_one_of_nvml():
    from edge_agent.board.nvml import Card

    assert set(CardAnswer.__struct_fields__) <= set(Card._fields)
