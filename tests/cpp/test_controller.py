"""The controller of examples/cpp as a process: beside sockets that a test publishes on, and beside the real daemon."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_agent.wire.control import Request, read_request
from edge_agent.wire.streams import pack
from tests.cpp.conftest import libzmq_environment
from tests.harness import rig
from tests.harness.fake_daemon import FakeDaemon, make_action, make_refusal, make_reply

HANG_S = 60.0  # bounds a hang, not a duration
MOVE = {"forward_m_s": 0.25, "right_m_s": 0.0, "down_m_s": -0.5, "yaw_rate_rad_s": 0.0}


class Controller:
    """One running controller; `start` makes it."""

    def __init__(self, *command: object) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            list(map(str, command)), stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=libzmq_environment()
        )

    def next(self) -> str:
        """The next line of its standard output, without the time."""
        assert self.process.stdout is not None and self.process.stderr is not None
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        assert re.match(r"@\d+ \w+", line), line
        return line.split(" ", 1)[1].rstrip("\n")

    def until(self, words: str) -> str:
        while words not in (line := self.next()):
            pass
        return line

    def end(self) -> tuple[list[str], str]:
        """Stop it; the rest of its commands, and its reasons."""
        self.process.send_signal(signal.SIGTERM)
        rest, reasons = self.process.communicate(timeout=HANG_S)
        assert self.process.returncode == 0, reasons
        return [line.split(" ", 1)[1] for line in rest.splitlines()], reasons


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("r")  # short: the path of a socket may have 107 bytes


@pytest.fixture
def daemon(folder: Path) -> Iterator[FakeDaemon]:
    with FakeDaemon(folder) as daemon:
        yield daemon


@pytest.fixture
def start(controller: Path, folder: Path) -> Iterator[Callable[..., Controller]]:
    """start(arguments after the folder) -> a running controller, after its first hold."""
    with contextlib.ExitStack() as processes:

        def start(*arguments: str) -> Controller:
            started = Controller(controller, folder, *arguments)
            processes.callback(started.process.communicate)
            processes.callback(started.process.kill)
            assert started.next() == "hold"
            return started

        yield start


def move(seq: int, **changes: Any) -> Any:
    """An action that is valid for 900 ms, and can be told from the others by its speed."""
    values = MOVE | {"forward_m_s": seq / 1000}
    return make_action(seq, **{"type": "move", "values": values, "valid_ms": 900} | changes)


def test_it_follows_an_action_until_its_expiry_and_then_holds(start, daemon):
    running = start()
    daemon.wait_for_subscriber("actions")
    action = move(250)
    daemon.publish("actions", action)
    assert running.next() == "move forward_m_s=0.25 right_m_s=0 down_m_s=-0.5 yaw_rate_rad_s=0"
    assert running.until("hold") == "hold"
    assert time.monotonic_ns() >= action.valid_until_ns
    rest, reasons = running.end()
    assert rest == ["hold"] and "hold: expired\n" in reasons


def publishing(daemon: FakeDaemon, first_seq: int = 0, **changes: Any) -> contextlib.AbstractContextManager[None]:
    return daemon.publishing(lambda seq: move(seq, **changes), first_seq)


def test_what_must_be_discarded_does_not_stop_it(start, daemon):
    running = start()
    daemon.wait_for_subscriber("actions")
    good = pack("actions", move(2))
    daemon.send("actions", good + b"\x00" * 70_000)  # longer than a message may be
    for parts in ([good, b""], [b"", good], [b"more", good], [good, good]):
        daemon.sockets["actions"].send_multipart(parts)
        time.sleep(0.02)  # for a wrong controller to follow it
    daemon.send("actions", b"A" + b"\x91" * 60_000)
    daemon.send("actions", b"A")
    future_ns = time.monotonic_ns() + 10**10
    for bad in (move(3, v=2), move(4, t_pub_ns=future_ns), move(5, values=MOVE | {"down_m_s": None})):
        daemon.send("actions", b"A" + msgspec.msgpack.encode(bad))
    daemon.publish("actions", move(10))
    assert running.next().startswith("move forward_m_s=0.01 ")


def test_an_action_that_it_cannot_follow_is_a_hold(start, daemon):
    running = start()
    daemon.wait_for_subscriber("actions")
    incomplete = {name: value for name, value in MOVE.items() if name != "down_m_s"}
    changes: list[dict] = [{"type": "dance"}, {"values": incomplete}, {"values": MOVE | {"down_m_s": "up"}}]
    changes += [{"age_ms": 1001.0, "values": MOVE | {"forward_m_s": 0.9}}]
    for n, change in enumerate(changes):
        daemon.publish("actions", move(2 * n))
        assert running.until("move").startswith(f"move forward_m_s={2 * n / 1000:g} ")
        bad = move(2 * n + 1, **change)
        daemon.publish("actions", bad)
        while (line := running.next()) != "hold":
            assert line.startswith(f"move forward_m_s={2 * n / 1000:g} "), bad
    running.end()


def test_a_refusal_ends_an_action(start, daemon):
    running = start()
    daemon.wait_for_subscriber("actions")
    daemon.publish("actions", move(1))
    running.until("move")
    daemon.publish("actions", msgspec.structs.replace(make_refusal(2), t_pub_ns=time.monotonic_ns()))
    running.until("hold")
    daemon.publish("actions", move(3))
    assert running.until("move").startswith("move forward_m_s=0.003 ")
    assert "hold: refusal: late\n" in running.end()[1]


def test_nothing_is_followed_before_the_reply_to_instruct(start, daemon):
    running = start("Land on the red disc.")
    daemon.wait_for_subscriber("actions")
    sender, payload = daemon.sockets["control"].recv_multipart()
    first = read_request(payload)
    assert (first.op, first.text) == ("instruct", "Land on the red disc.")
    assert time.monotonic_ns() < first.expires_ns
    daemon.publish("actions", move(1))  # before the reply
    sender, payload = daemon.sockets["control"].recv_multipart()  # its session is new to the controller
    request = read_request(payload)
    assert (request.op, request.text) == ("instruct", "Land on the red disc.") and request.id != first.id
    good = make_reply(request)
    fields = msgspec.msgpack.decode(good)
    bad = [fields | change for change in ({"v": 2}, {"ok": 1}, {"id": 7}, {"id": ""}, {"error": None}, {"result": []})]
    replies = [[make_reply(first)], [good, good], [good + b"\xc0"], *([msgspec.msgpack.encode(reply)] for reply in bad)]
    for seq, parts in enumerate(replies, start=2):
        daemon.sockets["control"].send_multipart([sender, *parts])
        daemon.publish("actions", move(seq))
        time.sleep(0.02)  # for a wrong controller to follow it
    running.process.send_signal(signal.SIGSTOP)
    daemon.publish("actions", move(50))
    daemon.sockets["control"].send_multipart([sender, good])  # both are there when it goes on
    running.process.send_signal(signal.SIGCONT)
    with publishing(daemon, first_seq=100):
        assert running.next() > "move forward_m_s=0.1"


def test_a_new_session_is_instructed_before_its_actions_are_followed(start, daemon):
    running = start("Land on the red disc.")
    daemon.wait_for_subscriber("actions")
    with daemon.answering(lambda request: [make_reply(request)]), publishing(daemon):
        running.until("move")
    daemon.publish("actions", move(500, session=2))  # forward_m_s=0.5
    running.until("hold")
    with daemon.answering(lambda request: [make_reply(request)]) as requests, publishing(daemon, 600, session=2):
        assert running.until("move") > "move forward_m_s=0.6"
    assert {(request.op, request.text) for request in requests} == {("instruct", "Land on the red disc.")}
    assert "hold: instruct: no reply yet\n" in running.end()[1]


def test_a_refused_instruction_is_a_hold_with_its_reason(start, daemon):
    running = start("Dance.")
    daemon.wait_for_subscriber("actions")
    requests: list[Request]
    with daemon.answering(lambda request: [make_reply(request, error="too long")]) as requests, publishing(daemon):
        while len(requests) < 3:  # it asks again: the refusal may have been "the model loads"
            time.sleep(0.01)
    assert running.end()[0] == ["hold"]


# -- the folder -------------------------------------------------------------------------------------------------------


def ends_at_once(*command: object) -> tuple[int, str]:
    arguments, env = list(map(str, command)), libzmq_environment()
    done = subprocess.run(arguments, capture_output=True, text=True, env=env, timeout=HANG_S)
    assert done.stdout == ""
    return done.returncode, done.stderr


def test_arguments_that_it_cannot_use_are_one_line(controller, folder, tmp_path):
    assert ends_at_once(controller) == (2, "usage: controller FOLDER [INSTRUCTION]\n")
    long = tmp_path / ("x" * 120)
    assert ends_at_once(controller, long) == (1, f"controller: {long}/actions: File name too long\n")
    folder.chmod(0o777)
    assert ends_at_once(controller, folder) == (1, f"controller: {folder}: everybody may write to it\n")
    folder.chmod(0o700)
    (folder / "file").touch()
    assert ends_at_once(controller, folder / "file" / "r") == (1, f"controller: {folder}/file/r: Not a directory\n")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make a folder of another user")
def test_a_folder_of_another_user_where_anybody_can_make_one_is_refused(controller, tmp_path):
    tmp_path.chmod(0o1777)
    folder, link, own = tmp_path / "edge-agent", tmp_path / "link", tmp_path / "own"
    folder.mkdir()
    own.mkdir()
    link.symlink_to(own)
    os.chown(folder, 12345, -1)
    os.chown(link, 12345, -1, follow_symlinks=False)
    (tmp_path / "own-link").symlink_to(folder)
    assert ends_at_once(controller, folder) == (1, f"controller: {folder}: it is of another user\n")
    assert ends_at_once(controller, f"{link}//") == (1, f"controller: {link}//: it is of another user\n")
    own_link = tmp_path / "own-link"
    assert ends_at_once(controller, own_link) == (1, f"controller: {own_link}: it is of another user\n")
    tmp_path.chmod(0o755)  # as /run: only root makes folders there
    running = Controller(controller, folder)
    assert running.next() == "hold"
    running.end()


def test_it_waits_for_a_daemon_that_has_not_made_its_folder(controller, folder):
    running = Controller(controller, folder / "later")
    assert running.next() == "hold"
    (folder / "later").mkdir()
    with FakeDaemon(folder / "later") as daemon, publishing(daemon):
        assert running.next().startswith("move ")
    assert running.end()[1].startswith(f"hold: {folder}/later: No such file or directory\n")


def test_a_folder_that_everybody_may_write_to_since_is_a_hold(start, daemon, folder):
    running = start()
    with publishing(daemon):
        running.until("move")
        folder.chmod(0o777)
        running.until("hold")
        folder.chmod(0o700)
        running.until("move")
    running.end()


# -- pause and resume -------------------------------------------------------------------------------------------------


def test_pause_is_asked_for_until_it_is_in_force_and_again_in_a_new_session(probe_program, folder, daemon):
    running = Controller(probe_program, folder)
    output, orders = running.process.stdout, running.process.stdin
    answers: list[bool] = []  # whether the next requests are carried out

    def answer(request: Request) -> list[bytes]:
        return [make_reply(request, error="" if not answers or answers.pop(0) else "not yet")]

    with daemon.answering(answer) as requests:
        assert output.readline() == "hold: no action yet\n"
        with publishing(daemon):
            assert output.readline() == "move\n"
            print("pause", file=orders, flush=True)
            assert output.readline() == "hold: pause: no reply yet\n"
            assert output.readline() == "hold: pause\n"
        daemon.publish("actions", move(0, session=2))
        assert output.readline() == "hold: pause: no reply yet\n"
        assert output.readline() == "hold: pause\n"
        answers.append(False)
        print("resume", file=orders, flush=True)
        with publishing(daemon, 1, session=2):
            while (line := output.readline()) != "move\n":
                assert line.startswith(("hold: resume: ", "hold: reply to resume")), line
    assert [request.op for request in requests] == ["pause", "pause", "resume", "resume"]
    assert len({request.id for request in requests}) == 4
    running.process.communicate(timeout=HANG_S)
    assert running.process.returncode == 0


# -- the real daemon --------------------------------------------------------------------------------------------------


def test_kill_9_of_the_daemon_is_a_hold_and_its_next_session_is_instructed(start, folder, toy_bundle):
    config = {"bundle": str(toy_bundle), "camera": {"source": f"zmq:ipc://{folder}/frames"}}
    with rig.Pusher(f"ipc://{folder}/frames"):
        with rig.daemon(folder, config, fake={}) as daemon:
            running = start("Land on the red disc.")
            assert running.until("move") == "move forward_m_s=1 right_m_s=0 down_m_s=0 yaw_rate_rad_s=0"
            assert daemon.wait("running").instruction == "Land on the red disc."
            with daemon.client() as client:  # another controller
                client.pause()
                running.until("hold")
                client.resume()
                running.until("move")
            daemon.process.kill()
            running.until("hold")
        with rig.daemon(folder, config, fake={}) as daemon:
            running.until("move")
            assert daemon.wait("running").instruction == "Land on the red disc."
            daemon.stop()
            running.until("hold")
    assert "hold: instruct: no reply yet\n" in running.end()[1]
