"""edge-agent ros2: the daemon's actions, text and status on a ROS graph, and its images into the daemon.

The main thread reads the daemon and publishes commands. The node's callbacks run in threads of their own; those that
wait for the daemon (instruct, ask, pause, resume) use a client of their own.
"""

from __future__ import annotations

import signal
import threading
import time

import rclpy
from rclpy.signals import SignalHandlerOptions

from edge_agent.client import Client, NotConnected
from edge_agent.errors import ConfigError
from edge_agent.ros2.diagnostics import commands_entry, daemon_entry
from edge_agent.ros2.follower import Command, Follower
from edge_agent.ros2.node import RosNode
from edge_agent.ros2.requests import request
from edge_agent.time_units import NS_PER_S
from edge_agent.wire.messages import Action, Refusal, Status, TextMessage

MAX_TEXT_MESSAGES = 20  # read in one turn; the next turn reads more
MAX_TEXT_CHARS = 12_000  # of a description or an answer
TOPICS = {"describe": "~/description", "answer": "~/answer"}  # lane -> topic. The lane action is not a command
WHOLE = ("", "length")  # stop reasons of a text that is not replaced by another one
REPORT_CHECK_S, REPORT_NS = 0.2, NS_PER_S
RETRY_S = 0.1


def run(runtime_dir: str, dry_run: bool, ros_args: list[str]) -> int:
    """Until SIGTERM or SIGINT. Returns the exit status. Raises ConfigError."""
    has_ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: has_ended.set())
    try:
        args = ["--ros-args", *ros_args] if ros_args else []
        rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    except Exception as error:  # of the arguments; rclpy has a class for each mistake, and none of its own above them
        raise ConfigError(f"--ros-args {' '.join(ros_args)}: {' '.join(str(error).split())}") from None
    try:
        node = RosNode(dry_run)
        with Client(runtime_dir) as client:
            bridge = Bridge(client, node, has_ended)
            node.start()
            bridge.run()
        node.close()
    finally:
        rclpy.try_shutdown()
    if node.failure is not None:
        raise node.failure
    return 0


class Bridge:
    """Between one client of the daemon and the node. run() is the loop."""

    def __init__(self, client: Client, node: RosNode, has_ended: threading.Event) -> None:
        self._client, self._node, self._has_ended = client, node, has_ended
        self._follower = Follower(client, node.parameter("max_age_ms"), node.own_space)
        self._lock = threading.Lock()  # from the check that an action is valid until it is published
        self._status: Status | None = None
        self._status_ns = 0
        self._texts: dict[str, str] = dict.fromkeys(TOPICS, "")  # lane -> its text so far
        self._reported: list[tuple[int, str]] = []  # levels and messages
        self._reported_ns = 0
        self._peers: tuple[list[str], list[str]] = ([], [])
        self._services = {
            "~/instruct": self._instruct,
            "~/ask": self._ask,
            "~/pause": self._pause,
            "~/resume": self._resume,
        }

    def run(self) -> None:
        """Whatever ends it: the last command is a hold."""
        for name, answer in self._services.items():
            self._node.serve(name, answer)
        self._node.every(REPORT_CHECK_S, self._report)
        self._node.info(f"reads {self._client.folder}")
        try:
            while not self._has_ended.is_set() and self._node.failure is None:
                self._turn()
        finally:
            self._has_ended.set()
            with self._lock:
                self._publish(self._follower.stop("the node ends"))
            self._node.wait_until_received()

    def _turn(self) -> None:
        try:
            answer: Action | Refusal | None = self._client.next_answer(self._follower.wait_s())
        except NotConnected as error:
            answer = None
            self._node.warn_throttled(str(error))
            self._has_ended.wait(RETRY_S)
        with self._lock:
            self._publish(self._follower.step(answer))
        try:
            self._read_text()
            if (status := self._client.status(0.0)) is not None:
                self._status, self._status_ns = status, time.monotonic_ns()
        except NotConnected:
            return

    def _publish(self, commands: list[Command]) -> None:
        for command in commands:
            self._node.publish(command)
            if command.why:
                self._node.info(f"hold: {command.why}")

    def _read_text(self) -> None:
        for _ in range(MAX_TEXT_MESSAGES):
            message = self._client.next_text(0.0)
            if message is None:
                return
            if message.lane in TOPICS:
                self._say(message)

    def _say(self, message: TextMessage) -> None:
        self._node.say("~/text", message.text + ("\n" if message.final else ""))
        text = self._texts[message.lane] + message.text
        if message.final and message.stop_reason in WHOLE:
            self._node.say(TOPICS[message.lane], text)
        self._texts[message.lane] = "" if message.final else text[:MAX_TEXT_CHARS]

    # -- in the threads of the node -----------------------------------------------------------------------------------

    def _instruct(self, text: str) -> tuple[bool, str]:
        outcome = request(str(self._client.folder), "instruct", text, self._has_ended)
        if not outcome.is_done:
            return False, outcome.line
        task = (str(outcome.result.get("instruction", text)), str(outcome.result.get("adapter", "")))
        with self._lock:
            self._publish(self._follower.end_actions("a new instruction", task))
        return True, task[0]

    def _ask(self, text: str) -> tuple[bool, str]:
        outcome = request(str(self._client.folder), "ask", text, self._has_ended)
        return outcome.is_done, str(outcome.result.get("text", "")) if outcome.is_done else outcome.line

    def _pause(self, _text: str) -> tuple[bool, str]:
        """Holds first. Without a reply, this node follows nothing until resume."""
        with self._lock:
            self._publish(self._follower.stop("paused through this node; call the service resume"))
        outcome = request(str(self._client.folder), "pause", "", self._has_ended)
        if not outcome.is_done:
            return False, f"{outcome.line}; this node holds until resume"
        with self._lock:
            self._publish(self._follower.end_actions("paused"))
            self._follower.go()
        return True, "paused"

    def _resume(self, _text: str) -> tuple[bool, str]:
        outcome = request(str(self._client.folder), "resume", "", self._has_ended)
        if outcome.is_done:
            with self._lock:
                self._follower.go()
        return outcome.is_done, outcome.line or "resumed"

    def _report(self) -> None:
        now_ns = time.monotonic_ns()
        is_due = now_ns - self._reported_ns >= REPORT_NS
        if is_due:
            self._peers = (self._node.wrong_listeners(), self._node.wrong_publishers())
            self._node.warn_once([*self._peers[0], *self._peers[1]])
        follower, client = self._follower, self._client
        counters = {"commands": follower.commands, "not_usable": follower.not_usable}
        counters |= {"expired": client.expired, "missed": client.missed}
        entries = [
            daemon_entry(self._status, now_ns - self._status_ns),
            commands_entry(follower.why, counters, self._peers[0]),
        ]
        if self._node.takes_images:
            entries.append(self._node.frames.entry(self._peers[1]))
        levels = [(entry.level, entry.message) for entry in entries]
        if is_due or levels != self._reported:
            self._reported_ns = now_ns if is_due else self._reported_ns
            self._reported = levels
            self._node.publish_diagnostics(entries)
