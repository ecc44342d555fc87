"""systemd/install.sh into an image, twice, over a changed configuration, and out again. And the container file."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import edge_agent.cli.main
import quantize.cli.parser
from tests.harness import ROOT
from tests.test_dependencies import requirements

SCRIPT = ROOT / "systemd" / "install.sh"
SHELLS = [shell for shell in ("dash", "bash", "busybox") if shutil.which(shell)]
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
SCRIPTS = ["systemd/install.sh", "gpu_build.sh", "tests/aarch64/smoke.sh", "tests/cuda/compile_one.sh"]
SCRIPTS += ["tests/cpp/fetch_libzmq.sh"]
EXPECTED = {
    "etc/systemd/system/edge-agent.service": "systemd/edge-agent.service",
    "etc/sysusers.d/edge-agent.conf": "systemd/edge-agent.sysusers.conf",
    "etc/edge-agent.yaml": "systemd/edge-agent.yaml",
    "opt/edge-agent/edge_agent/cli/main.py": "edge_agent/cli/main.py",
    "opt/edge-agent/quantize/measure/calibration.txt": "quantize/measure/calibration.txt",
    "opt/edge-agent/edge_agent/actions/spaces/waypoint.yaml": "edge_agent/actions/spaces/waypoint.yaml",
    "opt/edge-agent/Makefile": "Makefile",
}


@pytest.fixture
def image(tmp_path) -> Path:
    folder = tmp_path / "an image"
    folder.mkdir()
    return folder


def install(image: Path, *options: str, shell: str = "sh") -> subprocess.CompletedProcess:
    command = [*([shell, "sh"] if shell == "busybox" else [shell]), SCRIPT, "--root", image, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def lines(image: Path, *options: str, shell: str = "sh") -> list[str]:
    done = install(image, *options, shell=shell)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout.splitlines()


def tree(folder: Path) -> dict[str, tuple[int, int, bytes | str | None]]:
    """path -> mode, time of the last change, content; everything below a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(folder))] = (status.st_mode, status.st_mtime_ns, content)
    return found


@pytest.mark.parametrize("shell", SHELLS)
def test_installed_twice_and_removed_twice(image, shell):
    lines(image, shell=shell)
    first = tree(image)
    for path, source in EXPECTED.items():
        assert first[path][2] == (ROOT / source).read_bytes() and stat.S_IMODE(first[path][0]) == 0o644, path
    for path, mode in (("etc/edge-agent", 0o755), ("var/lib/edge-agent/bundles", 0o755), ("var/lib/edge-agent", 0o750)):
        assert stat.S_IMODE(first[path][0]) == mode
    assert first["usr/local/bin/edge-agent"][2] == "/opt/edge-agent/.venv/bin/edge-agent"
    assert not [path for path in first if "__pycache__" in path or path.endswith((".pyc", ".part"))]
    assert lines(image, shell=shell) == ["nothing to change"] and tree(image) == first
    shown = lines(image, "--uninstall", shell=shell)
    assert f"kept: {image}/etc/edge-agent.yaml" in shown
    assert {path for path, (_mode, _time, content) in tree(image).items() if content is not None} == {
        "etc/edge-agent.yaml"
    }
    assert "nothing to change" in lines(image, "--uninstall", shell=shell)


def test_a_dry_run_says_what_it_would_do_and_does_nothing(image):
    shown = lines(image, "--dry-run", "--csi")
    assert tree(image) == {}
    for words in ("would write", "/etc/systemd/system/edge-agent.service", "csi.conf", "/etc/edge-agent.yaml", "next:"):
        assert any(words in line for line in shown), words
    lines(image)
    before = tree(image)
    assert any(line.startswith("would remove") for line in lines(image, "--uninstall", "--dry-run"))
    assert tree(image) == before and lines(image, "--dry-run") == ["nothing to change"]


def test_a_configuration_is_never_overwritten(image):
    config = image / "etc" / "edge-agent.yaml"
    config.parent.mkdir()
    config.write_text("bundle: mine\n")
    shown = lines(image)
    assert config.read_text() == "bundle: mine\n"
    assert (image / "etc" / "edge-agent.yaml.new").read_bytes() == (ROOT / "systemd" / "edge-agent.yaml").read_bytes()
    assert any("compare" in line and "edge-agent.yaml.new" in line for line in shown)
    assert lines(image) == ["nothing to change"]
    lines(image, "--uninstall")
    assert config.read_text() == "bundle: mine\n" and os.listdir(image / "etc").count("edge-agent.yaml.new") == 0


def test_a_configuration_that_is_a_link_is_left_alone(image):
    (image / "etc").mkdir()
    (image / "etc" / "edge-agent.yaml").symlink_to("/data/edge-agent.yaml")
    lines(image)
    assert os.readlink(image / "etc" / "edge-agent.yaml") == "/data/edge-agent.yaml"


def test_an_update_replaces_what_is_old_and_keeps_what_somebody_changed(image):
    lines(image)
    unit = image / "etc" / "systemd" / "system" / "edge-agent.service"
    unit.write_text("[Unit]\n")
    program = image / "opt" / "edge-agent"
    (program / "edge_agent" / "cli" / "main.py").write_text("old")
    (program / "edge_agent" / "gone.py").write_text("of an older version")
    (program / "mine.txt").write_text("x")
    files = program / "installed-files"
    files.write_text("".join(sorted([*files.read_text().splitlines(keepends=True), "edge_agent/gone.py\n"])))
    shown = lines(image)
    assert any("keep the unit before" in line for line in shown) and any("write 1 files" in line for line in shown)
    assert unit.read_bytes() == (ROOT / "systemd" / "edge-agent.service").read_bytes()
    assert unit.with_name("edge-agent.service.old").read_text() == "[Unit]\n"
    assert (program / "edge_agent" / "cli" / "main.py").read_bytes() == (ROOT / "edge_agent/cli/main.py").read_bytes()
    assert not (program / "edge_agent" / "gone.py").exists()
    lines(image, "--uninstall")
    assert tree(program).keys() == {"mine.txt"}


def test_the_bridge_to_an_autopilot_is_installed_only_when_it_is_asked_for(image):
    lines(image)
    assert not [path for path in tree(image / "etc") if "mavlink" in path]
    shown = lines(image, "--mavlink")
    assert any("systemctl enable --now edge-agent-mavlink" in line for line in shown)
    for path, source in {
        "etc/systemd/system/edge-agent-mavlink.service": "systemd/edge-agent-mavlink.service",
        "etc/sysusers.d/edge-agent-mavlink.conf": "systemd/edge-agent-mavlink.sysusers.conf",
        "etc/edge-agent-mavlink.yaml": "systemd/edge-agent-mavlink.yaml",
    }.items():
        assert (image / path).read_bytes() == (ROOT / source).read_bytes()
    (image / "etc" / "edge-agent-mavlink.yaml").write_text("land: true\n")
    assert lines(image, "--mavlink") == ["nothing to change"]
    lines(image, "--uninstall")
    assert [path for path in tree(image / "etc") if "mavlink" in path] == ["edge-agent-mavlink.yaml"]


def test_the_drop_in_of_a_csi_camera(image):
    lines(image, "--csi")
    path = image / "etc" / "systemd" / "system" / "edge-agent.service.d" / "csi.conf"
    assert path.read_bytes() == (ROOT / "systemd" / "edge-agent-csi.conf").read_bytes()
    path.write_text("[Service]\nPrivateTmp=no\nNice=5\n")
    lines(image, "--uninstall")
    assert path.exists(), "it was changed by somebody"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--root"], "--root: expected a folder"),
        (["--root", ""], "--root: expected a folder"),
        (["--root", "/nowhere/at/all"], "no such folder; mount the image first"),
        (["--remove"], "--remove: unknown option"),
        (["/mnt"], "/mnt: unknown option"),
    ],
)
def test_wrong_arguments_change_nothing(options, words):
    done = subprocess.run(["sh", SCRIPT, *options], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and words in done.stderr and done.stdout == ""


def test_a_link_that_leads_out_of_the_image_is_refused(image, tmp_path):
    (tmp_path / "host").mkdir()
    (image / "etc").symlink_to(tmp_path / "host")
    done = install(image)
    assert done.returncode == 1 and "expected a folder inside of" in done.stderr
    assert os.listdir(tmp_path / "host") == []


@pytest.mark.parametrize("name", ["/etc/passwd", "../../etc/edge-agent.yaml"])
def test_a_list_of_files_that_somebody_changed_removes_nothing_else(image, name):
    lines(image)
    (image / "opt" / "edge-agent" / "installed-files").write_text(f"{name}\n")
    done = install(image, "--uninstall")
    assert done.returncode != 0 and "expected names inside of" in done.stderr
    assert (image / "etc" / "edge-agent.yaml").exists() and Path("/etc/passwd").exists()


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
def test_the_installed_unit_is_valid(image):
    lines(image, "--csi")
    program = image / "opt" / "edge-agent" / ".venv" / "bin" / "edge-agent"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = "/etc/systemd/system/edge-agent.service"
    command = ["systemd-analyze", "verify", "--man=no", f"--root={image}", unit]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    ours = [line for line in done.stderr.splitlines() if "edge-agent" in line and ".target not found" not in line]
    assert ours == []


@pytest.mark.skipif(not SHELLCHECK, reason="shellcheck is not installed: PyPI has it for x86-64 only")
@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_has_no_remark(script):
    done = subprocess.run([SHELLCHECK, "--shell=sh", ROOT / script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


# -- the documents ----------------------------------------------------------------------------------------------------


def commands(page: str) -> list[list[str]]:
    """The indented command lines of a page, as words."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = re.findall(r"^ {4,6}((?:sudo |edge-agent |edge-quantize ).*)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in found]


@pytest.mark.parametrize("page", ["jetson.md", "bundle.md"])
def test_the_commands_of_a_page_exist(page):
    parsers = {"edge-agent": edge_agent.cli.main.make_parser(), "edge-quantize": quantize.cli.parser.make_parser()}
    seen = set()
    for words in commands(page):
        words = words[1:] if words[0] == "sudo" else words
        words = words[2:] if words[:1] == ["-u"] else words
        if words[0] in parsers:
            parsers[words[0]].parse_args(words[1:])
        elif words[0] == "sh":
            assert Path(words[1]).relative_to("/opt/edge-agent") == SCRIPT.relative_to(ROOT)
            assert set(words[2:]) <= {"--dry-run", "--csi", "--uninstall"}
        else:
            assert words[0] in {"apt", "git", "nano", "systemctl", "/opt/edge-agent/.venv/bin/pip"}, words
        seen.add(words[0])
    assert "edge-agent" in seen


def test_the_list_for_a_jetson_is_complete():
    text = (ROOT / "docs" / "jetson.md").read_text(encoding="utf-8")
    first = text.split("\n## ")[0]
    assert "JetPack 6" in first and "JetPack 7" in first
    steps = ["apt install", "git clone", "install.sh --dry-run", "install.sh\n", "bundle install", "check", "enable"]
    commands = first.split("\n    ", 1)[1]
    places = [commands.index(step) for step in steps]
    assert places == sorted(places)


# -- ARM64 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("python", ["3.10", "3.12"])
def test_every_dependency_was_resolved_for_arm64(python):
    """`make aarch64` asks PyPI and writes the lists; here they are compared with setup.cfg."""
    text = (ROOT / "tests" / "aarch64" / f"python{python}.txt").read_text()
    found = dict(line.split("==") for line in text.split())
    not_for_boards = {"llama-cpp-python", "onnxruntime-gpu", "torch", "uv"}
    board = {"platform_machine": "aarch64", "python_version": python}
    asked = [
        requirement
        for requirement in requirements()
        if requirement.name not in not_for_boards and (not requirement.marker or requirement.marker.evaluate(board))
    ]
    assert len(asked) > 20
    for requirement in asked:
        version = found.get(requirement.name.lower().replace("_", "-"))
        assert version and requirement.specifier.contains(version), f"{requirement}: make aarch64"


# -- the container file -----------------------------------------------------------------------------------------------


def test_every_source_and_extra_of_the_container_file_exists():
    text = (ROOT / "Containerfile").read_text()
    copied = [name for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for name in line.split()[:-1]]
    assert copied and all((ROOT / name).exists() for name in copied), copied
    wanted = {extra for names in re.findall(r"\.\[([\w,]+)\]", text) for extra in names.split(",")}
    config = (ROOT / "setup.cfg").read_text()
    assert wanted and all(f"\n{extra} =\n" in config for extra in wanted), wanted
    instructions = re.findall(r"^([A-Z]+) ", re.sub(r"\\\n", " ", text), re.MULTILINE)
    assert set(instructions) <= {"ARG", "FROM", "RUN", "COPY", "ENV", "USER", "WORKDIR", "VOLUME", "ENTRYPOINT", "CMD"}
    assert instructions[:2] == ["ARG", "FROM"] and "USER" in instructions
    paths = re.findall(r"/etc/edge-agent\.yaml|/var/lib/edge-agent/bundles", text)
    assert set(paths) == {"/etc/edge-agent.yaml", "/var/lib/edge-agent/bundles"}
