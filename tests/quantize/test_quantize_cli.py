"""edge-quantize from the outside: what it prints, what it refuses and how, and that nothing half-written stays."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edge_agent.bundle.manifest import LANGUAGE, MANIFEST, MMPROJ, VISION
from edge_agent.bundle.verify import verify_bundle
from edge_agent.errors import UserError
from quantize.cli.parser import make_parser
from tests.harness import ROOT
from tests.harness.quantize_cli import PROGRESS, UP, refused, rewrite, stderr_lines

# -- arguments and places ---------------------------------------------------------------------------------------------


def test_an_unknown_recipe_names_the_known_ones(toy_small: Path, run, tmp_path: Path):
    refused(
        run("build", toy_small, tmp_path / "out", "--recipe", "Q3_K_S"), ("--recipe", "Q4_K_M", "found 'Q3_K_S'"), 2
    )
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [[], ["squeeze"], ["convert", "x", "y", "--type", "q4"], ["build", "x"]], ids=str)
def test_wrong_arguments_end_with_2(run, arguments: list[str]):
    status, out, lines = run(*arguments)
    assert status == 2 and lines[0].startswith("usage: edge-quantize") and not out


@pytest.mark.parametrize("number", ["-1", "1.5", "one", "", "4294967296", "1 000", "\u0663"])
def test_a_counter_is_a_whole_number_that_the_manifest_can_hold(capsys, number: str):
    for right in ("0", "7", "2147483648"):
        assert make_parser().parse_args(["build", "x", "y", "--counter", right]).counter == int(right)
    with pytest.raises(SystemExit):
        make_parser().parse_args(["build", "x", "y", f"--counter={number}"])
    assert "--counter: expected a whole number from 0 to 2147483648, found" in capsys.readouterr().err


def test_help_shows_the_commands_with_examples(edge_quantize):
    result = edge_quantize("--help")
    assert result.returncode == 0
    for word in ("inspect", "convert", "build", "edge-quantize build", "tekken.json", "FP8"):
        assert word in result.stdout


def test_an_error_is_known_by_its_class_and_not_by_its_name(toy_small: Path, run, tmp_path: Path, monkeypatch):
    """A UserError ends with one line. An error of another library that has the same name keeps its traceback."""
    from quantize import build

    arguments = ("convert", toy_small, tmp_path / "out")

    class NewError(UserError):
        """An error class that the command line has no list of."""

    def fails_with(error: Exception) -> None:
        def convert(*_arguments: object, **_options: object) -> None:
            raise error

        monkeypatch.setattr(build, "convert", convert)

    fails_with(NewError("disk: too small"))
    refused(run(*arguments), ("disk: too small",))
    theirs = type("BuildError", (Exception,), {})
    fails_with(theirs("of another library"))
    with pytest.raises(theirs):
        run(*arguments)


@pytest.mark.parametrize("command", ["convert", "build"])
def test_an_existing_output_stays(toy_small: Path, run, tmp_path: Path, command: str):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    refused(run(command, toy_small, tmp_path / "out"), ("out: exists", "--force"))
    refused(run(command, toy_small, tmp_path / "out", "--force"), ("out: --force replaces only", "'thesis.tex'"))
    assert (tmp_path / "out" / "thesis.tex").read_text() == "precious" and os.listdir(tmp_path) == ["out"]


def test_force_replaces_what_this_tool_made(toy_small: Path, run, tmp_path: Path):
    assert run("convert", toy_small, tmp_path / "out", "--type", "f16")[0] == 0
    first = (tmp_path / "out" / LANGUAGE).stat().st_size
    assert run("convert", toy_small, tmp_path / "out", "--type", "f32", "--force")[0] == 0
    assert (tmp_path / "out" / LANGUAGE).stat().st_size > first
    assert run("build", toy_small, tmp_path / "out", "--force")[0] == 0
    assert verify_bundle(tmp_path / "out") and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("command", ["convert", "build"])
@pytest.mark.parametrize("parent", ["missing", "a file"])
def test_a_missing_parent_folder_is_one_line(toy_small: Path, run, tmp_path: Path, command: str, parent: str):
    if parent == "a file":
        (tmp_path / "parent").write_text("x")
    refused(run(command, toy_small, tmp_path / "parent" / "out"), ("parent: no such folder", "make it first"))
    assert os.listdir(tmp_path) == (["parent"] if parent == "a file" else [])


# -- full disks -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path):
    """small_disk(bytes) -> a folder on a file system of its own that holds no more."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(n_bytes: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={n_bytes}", "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("only root can mount a small file system")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True)


@pytest.mark.parametrize("command", ["convert", "build"])
def test_too_little_disk_space_is_reported_before_the_work(toy_small: Path, run, small_disk, command: str):
    disk = small_disk(8 << 20)
    refused(run(command, toy_small, disk / "out"), ("~/disk", "GB needed", "0.01 GB free", "make room"))
    assert not any(disk.iterdir())


@pytest.mark.parametrize("name", [LANGUAGE, MMPROJ, VISION])
def test_a_disk_that_fills_during_the_build_is_one_line_and_no_file(
    toy_small: Path, build, run, small_disk, name: str, monkeypatch
):
    """Another program writes as well: there was room when the build began."""
    size = {path.name: path.stat().st_size for path in build(toy_small, "Q4_K_M").iterdir()}
    order = (LANGUAGE, MMPROJ, VISION)
    disk = small_disk(sum(size[earlier] for earlier in order[: order.index(name)]) + size[name] // 2)
    usage = shutil.disk_usage(disk)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=10**12))
    result = run("build", toy_small, disk / "out")
    assert not any(disk.iterdir())
    refused(result, ("~/disk", "No space left on device"))


def test_a_limit_on_file_size_is_one_line_and_no_file(toy_small: Path, edge_quantize, tmp_path: Path):
    limit = (300_000, 300_000)
    result = edge_quantize(
        "convert", toy_small, tmp_path / "out", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    )
    assert not any(tmp_path.iterdir())
    refused(
        (result.returncode, result.stdout, stderr_lines(result.stderr, tmp_path)),
        ("language.gguf has ", " MB, but this process may write files of at most 0.3 MB (ulimit -f)"),
    )


# -- stopped ----------------------------------------------------------------------------------------------------------


def in_the_foreground() -> None:
    """Shells let their background jobs ignore these, and children inherit it."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def stop_at(stage: str, how: int, folder: Path, out: Path) -> subprocess.Popen:
    """A build in a process of its own that is sent a signal as soon as it says it has begun a stage."""
    command = [sys.executable, "-m", "quantize.cli", "build", str(folder), str(out), "--recipe", "Q4_K_M"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, preexec_fn=in_the_foreground)
    for line in process.stderr:
        if line.startswith(stage):
            process.send_signal(how)
            break
    process.stderr_lines = process.stderr.read().splitlines()
    process.stderr.close()
    process.wait(timeout=60)
    return process


@pytest.mark.parametrize(
    ("stage", "how"),
    [("language", signal.SIGINT), ("language", signal.SIGTERM), ("validate", signal.SIGTERM)],
)
def test_an_interrupted_build_leaves_nothing_or_resumable_files(
    toy_bf16: Path, tmp_path: Path, run, stage: str, how: signal.Signals
):
    process = stop_at(stage, how, toy_bf16, tmp_path / "out")
    assert process.returncode == 130
    left = [path.name for path in tmp_path.iterdir()]
    goes_on = "the same command continues from here"
    assert left == ([".out.part"] if goes_on in process.stderr_lines[-1] else []), process.stderr_lines
    assert goes_on in process.stderr_lines[-1] or stage == "language"  # before the first file is whole
    assert process.stderr_lines[-1] in (
        f"edge-quantize: interrupted; {goes_on}", "edge-quantize: interrupted; nothing was left behind"
    )  # fmt: skip
    assert not any("Traceback" in line for line in process.stderr_lines)
    status, _, lines = run("build", toy_bf16, tmp_path / "out", "--recipe", "Q4_K_M")
    assert status == 0
    assert any("continuing: an earlier run left language.gguf" in line for line in lines) == bool(left)
    assert os.listdir(tmp_path) == ["out"]


def test_sighup_ends_a_build_like_an_interrupt(toy_bf16: Path, tmp_path: Path):
    """SSH that goes away sends SIGHUP, which by itself would end the process on the spot."""
    process = stop_at("language", signal.SIGHUP, toy_bf16, tmp_path / "out")
    assert process.returncode == 130 and "interrupted" in process.stderr_lines[-1]
    assert not (tmp_path / "out").exists()


def test_under_nohup_sighup_is_ignored(toy_small: Path, tmp_path: Path):
    command = ["nohup", sys.executable, "-m", "quantize.cli", "convert", str(toy_small), str(tmp_path / "out")]
    process = subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if line.startswith("language"):
            process.send_signal(signal.SIGHUP)
    process.stderr.close()
    assert process.wait(timeout=60) == 0
    assert os.listdir(tmp_path) == ["out"]


def test_an_interrupt_that_arrives_inside_llama_cpp_is_not_lost(toy_small: Path, tmp_path: Path):
    """A signal's handler may run in a callback that llama.cpp calls, and no exception comes out of one."""
    code = """if True:
        import signal
        from edge_agent.model import llama as language
        from quantize import cli
        real, left = language.log_to, [signal.SIGINT]
        def log_to(receiver):
            def noisy(text):
                if left:
                    signal.raise_signal(left.pop())
                receiver(text)
            real(noisy if receiver else None)
        language.log_to = log_to
        cli.main()
    """
    command = [sys.executable, "-c", code, "build", toy_small, tmp_path / "out"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=env, capture_output=True, preexec_fn=in_the_foreground)
    assert result.returncode == 130
    assert not (tmp_path / "out").exists()


def test_a_killed_build_leaves_only_hidden_files_and_the_next_one_works(toy_bf16: Path, tmp_path: Path, run):
    out = tmp_path / "out"
    process = stop_at("language", signal.SIGKILL, toy_bf16, out)
    assert process.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name == ".out.part" and not (left / MANIFEST).exists()
    assert run("convert", toy_bf16, out)[0] == 0  # other work: nothing of it is used
    assert set(os.listdir(out)) == {LANGUAGE, MMPROJ, VISION}
    assert os.listdir(tmp_path) == ["out"]


# -- when all is well -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "dtype"), [("toy_bf16", "BF16"), ("toy_fp8", "FP8")])
def test_inspect_describes_a_checkpoint(run, build, request, source: str, dtype: str):
    folder = request.getfixturevalue(source)
    status, out, lines = run("inspect", folder, "--json")
    assert (status, lines, out.count("\n")) == (0, [], 1)
    facts = json.loads(out)
    layer = 2 * 256 + 256 * (512 + 256 + 256 + 512) + 3 * 256 * 512
    vision_layer = 2 * 128 + 4 * 128 * 128 + 3 * 128 * 256
    vision = 128 * 3 * 14 * 14 + 128 + 2 * vision_layer + 128 + 128 * 512 + 256 * 128 + 256 * 256
    head = 4096 * 256 if source == "toy_fp8" else 0
    assert facts["parameters"] == 4096 * 256 + head + 2 * layer + 256 + vision
    scales = 14 if source == "toy_fp8" else 0
    assert facts["tensors"] == 2 + bool(head) + 2 * 9 + 2 + 2 * 9 + 4 + scales
    assert len(facts["ignored"]) == scales
    assert (facts["family"], facts["variant"], facts["dtype"]) == ("ministral3", "base", dtype)
    assert facts["tied_embeddings"] == (source == "toy_bf16")
    assert (facts["tokenizer"], facts["vocab"]) == ("tekken.json", 4096)
    assert facts["vision_bytes"] == 2 * vision
    manifest = json.loads((build(folder, "Q4_K_M") / MANIFEST).read_text())
    assert facts["language_bytes"]["Q4_K_M"] == sum(manifest["bytes_by_type"].values())
    assert sorted(facts["language_bytes"]) == sorted(
        ["Q4_K_M", "Q4_K_S", "Q4_0", "IQ4_XS", "Q5_K_M", "Q6_K", "Q8_0", "BF16"]
    )
    size = (folder / "model.safetensors").stat().st_size
    ignored = 2 * scales  # bytes of the activation scales, one bfloat16 each
    header = 8 + int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    assert facts["source_bytes"] == size - header - ignored
    assert facts["fits"][0] == "Orin Nano 4GB"


@pytest.mark.parametrize("command", ["inspect", "convert", "build", "imatrix"])
def test_a_command_reads_the_tokenizer_once(command: str, toy_small: Path, run, tmp_path: Path, tokenizer_reads):
    out = [] if command == "inspect" else [tmp_path / "out"]
    chunks = ["--chunks", 1] if command == "imatrix" else []
    status, _, _ = run(command, toy_small, *out, *chunks)
    assert status == 0 and tokenizer_reads == ["tekken.json"]


def test_inspect_as_text(run, toy_fp8: Path):
    status, out, errors = run("inspect", toy_fp8)
    assert (status, errors) == (0, [])
    for words in (
        "ministral3", "0.004 B parameters", "2 layers, hidden 256, 4 heads x 128, 2 kv heads, ffn 512",
        "4096 tokens, separate", "FP8", "14: static FP8 activation scale", "tekken.json, 4096 tokens", "Q4_K_M",
        "Orin Nano 8GB",
    ):  # fmt: skip
        assert words in out


def test_two_builds_are_the_same_to_the_byte_and_the_manifest_comes_out(
    edge_quantize, toy_small: Path, build, tmp_path: Path
):
    result, first = edge_quantize("build", toy_small, tmp_path / "out", "--json"), build(toy_small, "Q4_K_M")
    assert result.returncode == 0 and result.stdout.count("\n") == 1
    for file in first.iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name
    assert json.loads(result.stdout) == json.loads((first / MANIFEST).read_text())
    stages = [line.split(":")[0] for line in result.stderr.splitlines()]
    assert list(dict.fromkeys(stages)) == ["language Q4_K_M", "mmproj", "vision", "validate", "hash source"]
    assert all(PROGRESS.fullmatch(line) for line in result.stderr.splitlines())


def test_build_and_convert_print_their_results(run, toy_small: Path, tmp_path: Path):
    status, out, errors = run("convert", toy_small, tmp_path / "full")
    assert (status, errors) == (0, [])
    assert re.fullmatch(rf"{tmp_path}/full: ministral3 \d+\.\dM at bf16\n", out)
    status, out, errors = run("build", toy_small, tmp_path / "bundle", "--recipe", "Q6_K")
    assert (status, errors) == (0, [])
    assert re.fullmatch(rf"{tmp_path}/bundle: ministral3 \d+\.\dM Q6_K, \d+\.\d MB, validated and hashed\n", out)


def test_wrong_input_is_found_before_native_code_is_loaded(toy_bf16: Path, tmp_path: Path):
    """A checkpoint's faults show in the first second also where loading llama.cpp alone takes longer."""
    folder = shutil.copytree(toy_bf16, tmp_path / "checkpoint")
    rewrite(lambda tensors: tensors.pop(UP))(folder)
    code = (
        "import sys; from quantize import cli; sys.argv[1:] = ['inspect', sys.argv[1]]\n"
        "try: cli.main()\nexcept SystemExit: print(*sorted({'llama_cpp', 'onnxruntime', 'onnx'} & set(sys.modules)))"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code, folder], env=env, capture_output=True, text=True)
    assert result.stdout == "\n" and "up_proj" in result.stderr


def test_a_closed_stdout_gives_no_traceback(toy_bf16: Path):
    command = [sys.executable, "-m", "quantize.cli", "inspect", str(toy_bf16)]
    process = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()
    process.wait(timeout=60)
