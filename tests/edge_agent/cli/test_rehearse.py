"""edge-agent rehearse as a user calls it: the list, the verdict, the exit status, and what it refuses."""

from __future__ import annotations

import json
import sys

import pytest

from edge_agent.cli import main as cli
from edge_agent.rehearsal import SCENARIOS, player
from edge_agent.supervisor.publisher import Publisher
from tests.harness import ROOT
from tests.harness.plain_controller import PlainController

CONTROLLER = [sys.executable, str(ROOT / "examples" / "controller.py"), "--runtime-dir", "{dir}"]
# Subscribes, and repeats the first action for ever.
REPEATS = """
import sys, zmq
from edge_agent.client import Client
with Client(sys.argv[1]) as agent:
    action = next(agent.actions())
    while True:
        print("move", f"forward_m_s={action.values['forward_m_s']}", flush=True)
        agent.next_answer(0.02)
"""


@pytest.fixture
def run(monkeypatch, capsys):
    """edge-agent with these arguments: exit status, lines of stdout, stderr."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run_main(*words: object) -> tuple[int, list[str], str]:
        monkeypatch.setattr(sys, "argv", ["edge-agent", *map(str, words)])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        printed = capsys.readouterr()
        return exit_info.value.code or 0, printed.out.splitlines(), printed.err

    return run_main


def test_without_a_scenario_it_lists_them(run):
    status, lines, _ = run("rehearse")
    assert (status, len(lines)) == (0, 2 * len(SCENARIOS))
    assert lines[0].startswith("normal-flight") and "A right controller follows each action" in lines[1]
    status, lines, _ = run("rehearse", "--json")
    assert [json.loads(line)["scenario"] for line in lines] == list(SCENARIOS)


def test_a_right_controller_passes(run):
    status, lines, errors = run("rehearse", "normal-flight", "clamped", "--", *CONTROLLER)
    assert (status, errors) == (0, "")
    assert lines[0].startswith("PASS  normal-flight") and "hold after at most" in lines[0]
    assert lines[1].startswith("PASS  clamped") and lines[2] == "2 of 2 passed"


def test_what_a_wrong_controller_did_is_said(run, tmp_path, monkeypatch):
    monkeypatch.setattr(player, "PATIENCE_S", 1.0)
    folder = tmp_path / "sockets"
    words = ("rehearse", "normal-flight", "--runtime-dir", folder)
    status, lines, _ = run(*words, "--", sys.executable, "-c", REPEATS, "{dir}")
    assert status == 1 and lines[0].startswith("FAIL  normal-flight") and lines[-1] == "0 of 1 passed"
    assert "move forward_m_s=0.101: the action had expired by" in lines[1] and "(message: a valid action)" in lines[1]
    status, lines, _ = run(*words, "--json", "--", sys.executable, "-c", REPEATS, "{dir}")
    (line,) = map(json.loads, lines)
    assert (status, line["scenario"], line["passed"]) == (1, "normal-flight", False) and line["faults"]


def test_a_controller_that_ends_by_itself_fails(run):
    status, lines, _ = run("rehearse", "silence", "--", sys.executable, "-c", "raise SystemExit(3)")
    assert status == 1 and lines[1].endswith("the controller ended by itself: exit status 3")
    killed = "import os; os.kill(os.getpid(), 9)"
    status, lines, _ = run("rehearse", "silence", "--", sys.executable, "-c", killed)
    assert status == 1 and lines[1].endswith("the controller ended by itself: SIGKILL")


def test_a_controller_that_does_not_connect_is_named(run, monkeypatch):
    monkeypatch.setattr(player, "CONNECT_S", 0.1)
    status, lines, error = run("rehearse", "silence", "--", "sleep", "100")
    assert (status, lines) == (1, []) and error.count("\n") == 1
    assert "/actions: nobody subscribed within 0.1 s; start the controller with this folder" in error


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["flight"], 2, "no scenario 'flight'; expected all, or some of normal-flight"),
        (["all", "silence", "--", "true"], 2, "no scenario 'all'"),
        (["silence"], 2, "name the folder that it reads, with --runtime-dir"),
        (["silence", "--"], 2, "give the command of the controller after --"),
        (["silence", "--", "/nonexistent/program"], 1, "/nonexistent/program: cannot be started: No such file"),
    ],
)
def test_a_wrong_call_gives_one_line(run, words, status, said):
    found, lines, error = run("rehearse", *words)
    assert (found, lines) == (status, []) and said in error and error.count("\n") == 1


def test_it_never_plays_beside_a_daemon(run, tmp_path):
    daemon = Publisher(tmp_path)
    try:
        for command in ([], ["--", "sleep", "100"]):
            status, _, error = run("rehearse", "silence", "--runtime-dir", tmp_path, *command)
            assert status == 78 and "runs in this folder; stop it, or set another runtime_dir" in error
    finally:
        daemon.close()


def test_without_a_command_it_plays_to_whoever_is_connected_and_prints_what_a_controller_should_do(run, tmp_path):
    """The right controller of the harness is the hardware here; its commands are not known to the rehearsal."""
    folder = tmp_path / "sockets"
    with PlainController(folder) as controller:
        status, lines, _ = run("rehearse", "expired", "--runtime-dir", folder)
    assert status == 0 and {"move", "hold"} == {command.type for command in controller.commands}
    assert controller.commands[-1].type == "hold"
    assert any("expired 400 ms before it was sent" in line and "to discard" in line for line in lines)
    assert any("may be followed" in line and "forward_m_s" in line for line in lines)


def test_what_it_plays_can_be_read_by_a_program(run, tmp_path):
    folder = tmp_path / "sockets"
    with PlainController(folder):
        words = ("--json", "--runtime-dir", folder, "--action-space", "waypoint")
        status, lines, _ = run("rehearse", "clamped", *words)
    rows = [json.loads(line) for line in lines]
    assert status == 0 and {row["scenario"] for row in rows} == {"clamped"}
    assert rows[0]["expected"] == "may be followed" and rows[0]["values"]["pace"] == "slow"
    assert rows[-1]["expected"] == "hold"


def test_another_command_keeps_its_two_dashes():
    assert cli.split_controller(["ask", "--", "-5?"]) == (["ask", "--", "-5?"], [])
    assert cli.split_controller(["rehearse", "a", "--", "x", "--", "y"]) == (["rehearse", "a"], ["x", "--", "y"])
