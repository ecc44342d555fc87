"""The node for real: edge-agent ros2 and a peer are two processes on a ROS graph; the daemon's sockets are a test's."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import msgspec
import numpy as np
import pytest
import zmq

from edge_agent.ros2.interfaces import PUBLISHED, SERVICES, SUBSCRIBED
from edge_agent.time_units import NS_PER_MS, NS_PER_S
from edge_agent.wire.messages import Action
from edge_agent.wire.pushed_frame import PushedFrame, decode_pushed_frame
from tests.harness import ROOT
from tests.harness.fake_daemon import FakeDaemon, make_action, make_refusal, make_reply, make_status, make_text
from tests.harness.ros2 import HANG_S, LineProcess, Peer, node_process, ros_environment

SEQUENCE = iter(range(1, 10**6))
SESSIONS = [1]  # of the test's daemon; the last one is the present one
ZERO = {f"{part}.{axis}": 0.0 for part in ("linear", "angular") for axis in "xyz"}
CLOCK_SLACK_NS = 50 * NS_PER_MS  # between system time and CLOCK_MONOTONIC, while a test runs


class Graph(NamedTuple):
    environment: dict[str, str]
    folder: Path  # runtime folder
    daemon: FakeDaemon
    frames: zmq.Socket  # what the daemon receives
    node: LineProcess
    peer: Peer

    def begin(self) -> int:
        """What was sent before has arrived. Returns where the messages from now on begin."""
        since = self.peer.mark()
        mark = speed(self, 10**6 + next(SEQUENCE))
        self.peer.wait_for("/edge_agent/action", lambda message: message["data"] == mark, since)
        since, now_ns = self.peer.mark(), time.time_ns()
        send(self, type="hold", values={})
        self.peer.wait_for("/edge_agent/action", lambda message: message["data"] == "hold", since)
        self.peer.wait_for("/cmd_vel", lambda message: message["stamp_ns"] >= now_ns, since)
        return self.peer.mark()

    def moves(self, since: int) -> list[str]:
        return [message["data"] for message in self.peer.all("/edge_agent/action", since)]


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Graph]:
    folder = tmp_path_factory.mktemp("ros2")
    environment = ros_environment(1 + os.getpid() % 100, folder)
    frames_at = f"ipc://{folder}/frames"
    with (
        contextlib.closing(Peer(environment)) as peer,
        bound_frames(frames_at) as frames,
        FakeDaemon(folder) as daemon,
        node_process(environment, folder, "--ros-args", "-p", f"frames:={frames_at}") as node,
    ):
        for stream in ("actions", "text", "status"):
            daemon.wait_for_subscriber(stream)
        peer.wait_for("/diagnostics")
        graph = Graph(environment, folder, daemon, frames, node, peer)
        for topic in ("/cmd_vel", "/waypoint", "/edge_agent/action"):
            introduce(daemon, peer, topic)
        for lane, topic in (("describe", "description"), ("answer", "answer")):
            message = msgspec.structs.replace(make_text(0, "hello", final=True), lane=lane)
            repeat_until_heard(peer, f"/edge_agent/{topic}", lambda message=message: daemon.publish("text", message))
        while not frames.poll(50):
            image(graph, "mono8", bytes(8), 4)
        while frames.poll(200):
            frames.recv()
        yield graph
        assert node.close() == 0, node.errors


def introduce(daemon: FakeDaemon, peer: Peer, topic: str) -> None:
    """What a publisher sends before it has found its subscriber is lost."""
    moves = {"action_space": "waypoint", "type": "waypoint", "values": waypoint(forward_m=0.001)}
    fields = moves if topic.endswith("waypoint") else {"type": "move", "values": velocity(forward_m_s=0.001)}
    repeat_until_heard(peer, topic, lambda: daemon.publish("actions", make_action(next(SEQUENCE), **fields)))


def repeat_until_heard(peer: Peer, topic: str, say: Callable[[], None]) -> None:
    end_s = time.monotonic() + HANG_S
    while not peer.all(topic):
        say()
        time.sleep(0.02)
        assert time.monotonic() < end_s, topic


@contextlib.contextmanager
def bound_frames(address: str) -> Iterator[zmq.Socket]:
    """The daemon's socket for pushed frames."""
    with zmq.Context() as context, context.socket(zmq.PULL) as frames:
        frames.setsockopt(zmq.LINGER, 0)
        frames.bind(address)
        yield frames


def velocity(**values: float) -> dict[str, float]:
    return {"forward_m_s": 0.0, "right_m_s": 0.0, "down_m_s": 0.0, "yaw_rate_rad_s": 0.0} | values


def waypoint(**values: Any) -> dict[str, Any]:
    return {"forward_m": 0.0, "right_m": 0.0, "down_m": 0.0, "pace": "slow"} | values


def send(graph: Graph, **fields: Any) -> Action:
    """An action, published now."""
    action = make_action(next(SEQUENCE), **{"session": SESSIONS[-1], "valid_ms": 900} | fields)
    graph.daemon.publish("actions", action)
    return action


def speed(graph: Graph, mm_s: int, **fields: Any) -> str:
    """A move, and its line on the topic of actions."""
    values = velocity(forward_m_s=mm_s / 1000)
    send(graph, type="move", values=values, **fields)
    return " ".join(["move", *(f"{name}={value:.9g}" for name, value in values.items())])


def twist(graph: Graph, since: int, is_so: Callable[[dict], Any]) -> dict[str, Any]:
    return graph.peer.wait_for("/cmd_vel", is_so, since)


# -- out --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "field", "sign"),
    [
        ("forward_m_s", "linear.x", 1),  # ROS: forward, left, up, counter-clockwise
        ("right_m_s", "linear.y", -1),
        ("down_m_s", "linear.z", -1),
        ("yaw_rate_rad_s", "angular.z", -1),
    ],
)
@pytest.mark.parametrize("value", [0.5, -0.25])
def test_each_axis_of_a_velocity(graph, name, field, sign, value):
    since = graph.begin()
    action = send(graph, type="move", values=velocity(**{name: value}))
    found = twist(graph, since, lambda message: message[field])
    assert {axis: found[axis] for axis in ZERO} == ZERO | {field: sign * value}
    assert found["frame_id"] == "base_link"
    published_ns = found["stamp_ns"] - (time.time_ns() - time.monotonic_ns())
    assert action.t_pub_ns - CLOCK_SLACK_NS <= published_ns <= found["at_ns"] + CLOCK_SLACK_NS


def test_each_axis_of_a_waypoint(graph):
    since = graph.begin()
    values = waypoint(forward_m=1.0, right_m=2.0, down_m=3.0)
    action = send(graph, action_space="waypoint", type="waypoint", values=values, age_ms=100, valid_ms=200)
    found = graph.peer.wait_for("/waypoint", lambda message: message["position.x"], since)
    assert [found[f"position.{axis}"] for axis in "xyz"] == [1.0, -2.0, -3.0]
    assert [found[f"orientation.{axis}"] for axis in "xyz"] == [0.0, 0.0, 0.0]
    captured_ns = found["stamp_ns"] - (time.time_ns() - time.monotonic_ns())
    assert abs(captured_ns - action.t_capture_ns) < CLOCK_SLACK_NS
    graph.peer.wait_for("/waypoint", lambda message: message["position.x"] == 0, since)
    twist(graph, since, lambda message: True)
    assert graph.moves(since)[0] == "waypoint forward_m=1 right_m=2 down_m=3 pace=slow"


def test_one_zero_at_the_expiry_and_then_nothing(graph):
    since = graph.begin()
    first = speed(graph, 101, valid_ms=100)
    twist(graph, since, lambda message: {axis: message[axis] for axis in ZERO} == ZERO)
    second = speed(graph, 102)
    twist(graph, since, lambda message: message["linear.x"] == 0.102)
    assert [message["linear.x"] for message in graph.peer.all("/cmd_vel", since)] == [0.101, 0.0, 0.102]
    graph.peer.wait_until(lambda: len(graph.moves(since)) == 3, "three commands")
    assert graph.moves(since) == [first, "hold", second]


@pytest.mark.parametrize("type", ["search", "land", "hold"])
def test_a_type_without_values_is_a_zero_and_its_name(graph, type):
    since = graph.begin()
    send(graph, type=type, values={})
    found = twist(graph, since, lambda message: True)
    assert {axis: found[axis] for axis in ZERO} == ZERO
    assert graph.peer.wait_for("/edge_agent/action", lambda message: message["data"] == type, since)


def test_a_refusal_is_a_zero_at_once(graph):
    since = graph.begin()
    speed(graph, 103)
    twist(graph, since, lambda message: message["linear.x"] == 0.103)
    graph.daemon.publish("actions", make_refusal(next(SEQUENCE), t_pub_ns=time.monotonic_ns(), session=SESSIONS[-1]))
    twist(graph, since, lambda message: message["linear.x"] == 0)
    graph.node.wait_until(lambda: any("refusal: late" in line for line in graph.node.errors), "the reason")


def test_bytes_that_are_no_message_change_nothing(graph):
    since = graph.begin()
    for payload in (b"A", b"A\xc1", b"A" + msgspec.msgpack.encode({"v": 1, "kind": "action"}), b"A" + bytes(60_000)):
        graph.daemon.send("actions", payload)
    line = speed(graph, 104)
    graph.peer.wait_for("/edge_agent/action", lambda message: message["data"] == line, since)


def test_text(graph):
    since = graph.peer.mark()
    pieces = [
        ("describe", "a red ", False),
        ("action", "move!", True),
        ("describe", "disc", True),
        ("answer", "é", True),
    ]
    for seq, (lane, text, final) in enumerate(pieces):
        message = msgspec.structs.replace(make_text(seq, text, final=final), lane=lane)
        graph.daemon.publish("text", message)
    assert graph.peer.wait_for("/edge_agent/answer", since=since)["data"] == "é"
    assert graph.peer.wait_for("/edge_agent/description", since=since)["data"] == "a red disc"
    graph.peer.wait_until(lambda: len(graph.peer.all("/edge_agent/text", since)) == 3, "three pieces")
    assert [message["data"] for message in graph.peer.all("/edge_agent/text", since)] == ["a red ", "disc\n", "é\n"]


def entry(message: dict[str, Any], name: str) -> Any:
    return message["entries"].get(f"edge_agent: {name}", [None, "", {}])


def test_diagnostics_show_the_status_and_its_end(graph):
    since = graph.peer.mark()
    for seq in range(2):
        status = msgspec.structs.replace(make_status("too hot"), state="fault", seq=seq)
        graph.daemon.publish("status", status)
    found = graph.peer.wait_for("/diagnostics", lambda message: entry(message, "daemon")[0] == 2, since)
    _, message, values = entry(found, "daemon")
    assert (message, values["model_worker.restarts"]) == ("fault: too hot", "2")
    graph.peer.wait_for("/diagnostics", lambda message: entry(message, "daemon")[0] == 3, graph.peer.mark())


def test_the_graph_is_as_documented(graph):
    graph.peer.tell(do="graph")
    found = graph.peer.wait_for("graph")

    def full(name: str) -> str:
        return name.replace("~", "/edge_agent") if name[0] in "~/" else f"/{name}"

    published = {full(name): [topic.type] for name, topic in PUBLISHED.items()}
    assert {name: kinds for name, kinds in found["publishers"].items() if name in published} == published
    assert set(found["publishers"]) - set(published) == {"/rosout", "/parameter_events"}
    assert found["subscribers"]["/image"] == [SUBSCRIBED["image"].type]
    services = {full(name): [kind] for name, (kind, _) in SERVICES.items()}
    assert {name: kinds for name, kinds in found["services"].items() if name in services} == services


# -- services ---------------------------------------------------------------------------------------------------------


def test_a_new_session_with_another_instruction_waits_for_instruct(graph):
    since = graph.begin()
    speed(graph, 105)
    twist(graph, since, lambda message: message["linear.x"] == 0.105)
    SESSIONS.append(SESSIONS[-1] + 1)
    speed(graph, 106, instruction="Fly home.")
    twist(graph, since, lambda message: message["linear.x"] == 0)
    speed(graph, 107, instruction="Fly home.")
    with graph.daemon.answering(
        lambda request: [make_reply(request, instruction=request.text, adapter="")]
    ) as requests:
        reply = graph.peer.call("/edge_agent/instruct", "Fly home.")
    assert (reply["success"], reply["message"]) == (True, "Fly home.")
    assert [(request.op, request.text) for request in requests] == [("instruct", "Fly home.")]
    speed(graph, 108, instruction="Fly home.")
    twist(graph, since, lambda message: message["linear.x"] == 0.108)
    with graph.daemon.answering(lambda request: [make_reply(request, instruction=request.text, adapter="")]):
        graph.peer.call("/edge_agent/instruct", "Hold position.")
    assert [message["linear.x"] for message in graph.peer.all("/cmd_vel", since)][:3] == [0.105, 0, 0.108]


def test_a_question_does_not_hold_up_actions_and_other_services(graph):
    answer_now = threading.Event()

    def answer(request: Any) -> list[bytes]:
        if request.op == "ask":
            assert answer_now.wait(HANG_S)
            return [make_reply(request, text="A disc.", frame_id=1, stop_reason="")]
        return [make_reply(request, "not while a test runs")]

    since = graph.begin()
    with graph.daemon.answering(answer) as requests:
        graph.peer.tell(do="call", service="/edge_agent/ask", text="What is ahead?")
        graph.peer.wait_until(lambda: requests, "the question")
        speed(graph, 109)
        twist(graph, since, lambda message: message["linear.x"] == 0.109)
        answer_now.set()
        reply = graph.peer.wait_for("/edge_agent/ask", since=since)
        refused = graph.peer.call("/edge_agent/instruct", "Fly.")
    assert (reply["success"], reply["message"]) == (True, "A disc.")
    assert (refused["success"], refused["message"]) == (False, "not while a test runs")


def test_pause_holds_until_resume_also_without_a_reply(graph):
    since = graph.begin()
    speed(graph, 110)
    twist(graph, since, lambda message: message["linear.x"] == 0.110)
    with graph.daemon.answering(lambda request: [make_reply(request, "cannot be written")]):
        reply = graph.peer.call("/edge_agent/pause")
    assert not reply["success"] and reply["message"] == "cannot be written; this node holds until resume"
    twist(graph, since, lambda message: message["linear.x"] == 0)
    speed(graph, 111)
    with graph.daemon.answering(lambda request: [make_reply(request, paused=request.op == "pause")]):
        assert graph.peer.call("/edge_agent/resume")["success"]
        speed(graph, 112)
        twist(graph, since, lambda message: message["linear.x"] == 0.112)
        assert graph.peer.call("/edge_agent/pause")["message"] == "paused"
        twist(graph, since, lambda message: message["linear.x"] == 0 and message["stamp_ns"] > 0)
        assert graph.peer.call("/edge_agent/resume")["success"]
    speeds = [message["linear.x"] for message in graph.peer.all("/cmd_vel", since)]
    assert [value for value in speeds if value] == [0.110, 0.112]


# -- images -----------------------------------------------------------------------------------------------------------


def receive(graph: Graph) -> PushedFrame:
    assert graph.frames.poll(round(HANG_S * 1000)), graph.node.errors[-5:]
    return decode_pushed_frame(memoryview(graph.frames.recv())[1:])


def image(graph: Graph, encoding: str, pixels: bytes, step: int, stamp: Any = 0.0, **size: int) -> None:
    fields = {"width": 4, "height": 2, "is_bigendian": 0} | size
    graph.peer.tell(do="image", encoding=encoding, step=step, data=pixels.hex(), stamp=stamp, **fields)


def test_an_image_is_pushed_without_padding_and_with_its_time(graph):
    rows = np.arange(2 * 15, dtype=np.uint8).reshape(2, 15)
    time.sleep(0.25)  # the image of another test is older than this one
    told_ns = time.monotonic_ns()
    image(graph, "bgr8", rows.tobytes(), 15, stamp=0.2)
    frame = receive(graph)
    assert (frame.format, frame.width, frame.height) == ("bgr8", 4, 2)
    assert bytes(frame.data) == rows[:, :12].tobytes()
    age_ns = 200 * NS_PER_MS
    assert told_ns - age_ns - CLOCK_SLACK_NS <= frame.t_capture_ns
    assert frame.t_capture_ns <= time.monotonic_ns() - age_ns + CLOCK_SLACK_NS
    image(graph, "yuyv", bytes([128] * 16), 8)
    following = receive(graph)
    assert (following.format, following.frame_id) == ("rgb8", frame.frame_id + 1)
    assert len(set(bytes(following.data))) == 1, "grey"
    image(graph, "mono16", bytes([0, 255] * 8), 8)
    assert bytes(receive(graph).data) == bytes([254] * 8)


REFUSED = [
    ("rgb8", 24, 11, 0.0, "size"),  # a row has 12 bytes
    ("rgb8", 23, 12, 0.0, "size"),
    ("32FC1", 32, 16, 0.0, "encoding"),
    ("mono8", 8, 4, {"sec": 0, "nanosec": 0}, "zero"),
    ("mono8", 8, 4, {"sec": 12, "nanosec": 5}, "wrong-clock"),
    ("mono8", 8, 4, -3.0, "future"),
    ("mono8", 8, 4, 1.5, "old"),
]


def test_images_that_are_refused(graph):
    since = graph.peer.mark()
    for encoding, n_bytes, step, stamp, reason in REFUSED:
        n_lines = len(graph.node.errors)
        image(graph, encoding, bytes(n_bytes), step, stamp)
        line = f"image refused ({reason})"
        graph.node.wait_until(
            lambda line=line, n=n_lines, reason=reason: (
                any(line in found for found in graph.node.errors[n:])
                or (reason == "size" and any(line in found for found in graph.node.errors))
            ),
            line,
        )
    image(graph, "mono8", bytes(8), 4)
    assert receive(graph).format == "gray8", "and the next good image is taken: nothing before it was pushed"
    counted = {f"refused.{reason}" for *_, reason in REFUSED}
    graph.peer.wait_for("/diagnostics", lambda message: counted <= entry(message, "frames")[2].keys(), since)


# -- the other side ---------------------------------------------------------------------------------------------------


def test_a_qos_that_does_not_match_is_said(graph):
    graph.peer.wait_for("/diagnostics", lambda message: entry(message, "commands")[0] in (0, 1), graph.peer.mark())
    since = graph.peer.mark()
    graph.peer.tell(do="subscribe", to="/cmd_vel", type="TwistStamped", transient_local=True)
    found = graph.peer.wait_for("/diagnostics", lambda message: "QoS" in entry(message, "commands")[1], since)
    assert entry(found, "commands")[0] == 2 and "/cmd_vel: the QoS of /peer" in entry(found, "commands")[1]
    graph.node.wait_until(lambda: any("the QoS of /peer" in line for line in graph.node.errors), "a line")
    graph.peer.tell(do="unsubscribe")
    since = graph.peer.mark()
    graph.peer.wait_for("/diagnostics", lambda message: entry(message, "commands")[0] != 2, since)


# -- the command ----------------------------------------------------------------------------------------------------

WRONG = [
    (["-p", "frames:=tcp://127.0.0.1:5555"], "parameter frames: expected ipc:///absolute/path"),
    (["-p", "max_age_ms:=fast"], "parameter max_age_ms: "),
    (["-p", "action_space:=rover"], "parameter values: expected some of"),
    (["-p", "nonsense"], "--ros-args -p nonsense: "),
]


@pytest.mark.parametrize(("arguments", "expected"), WRONG)
def test_wrong_arguments_are_one_line(tmp_path, arguments, expected):
    with node_process(ros_environment(1, tmp_path), tmp_path, "--ros-args", *arguments) as node:
        assert node.process.wait(HANG_S) == 78
    lines = [line for line in node.errors if "[rcl]" not in line]  # rcl has a logger of its own
    assert len(lines) == 1 and lines[0].startswith(f"edge-agent: {expected}")


def test_without_ros_the_command_says_what_to_do():
    command = [sys.executable, "-m", "edge_agent.cli.main", "ros2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 78 and done.stderr.count("\n") == 1
    assert "edge-agent ros2 needs ROS 2 (No module named 'rclpy'): source /opt/ros/" in done.stderr


# -- the end ----------------------------------------------------------------------------------------------------------


def test_another_node_with_simulated_time_and_compressed_images(graph, tmp_path):
    """A lost daemon and a signal end in one zero each; a subscriber of another type is said."""
    arguments = ["-r", "cmd_vel:=/sim/cmd_vel", "-r", "image/compressed:=/sim/image", "-r", "__node:=sim"]
    arguments += ["-r", "waypoint:=/sim/waypoint", "-p", "image_transport:=compressed"]
    jpeg = bytes(cv2.imencode(".jpg", np.zeros((2, 4), np.uint8))[1])
    arguments += ["-p", "use_sim_time:=true", "-p", f"frames:=ipc://{tmp_path}/frames"]
    graph.peer.tell(do="listen_to", topic="/sim/cmd_vel", type="TwistStamped")
    with (
        bound_frames(f"ipc://{tmp_path}/frames") as frames,
        node_process(graph.environment, tmp_path, "--ros-args", *arguments) as node,
    ):
        with FakeDaemon(tmp_path) as daemon:
            daemon.wait_for_subscriber("actions")
            introduce(daemon, graph.peer, "/sim/cmd_vel")
        graph.peer.wait_for("/sim/cmd_vel", lambda message: message["linear.x"] == 0)
        graph.peer.tell(do="subscribe", to="/sim/waypoint", type="Twist")
        wrong = "/sim/waypoint: /peer subscribes to geometry_msgs/msg/Twist, expected geometry_msgs/msg/PoseStamped"
        node.wait_until(lambda: any(wrong in line for line in node.errors), wrong)
        graph.peer.tell(do="unsubscribe")
        image_at = {"topic": "/sim/image", "format": "jpeg", "data": jpeg.hex()}
        while not any("(no-clock)" in line for line in node.errors):
            graph.peer.tell(do="image", stamp={"sec": 5, "nanosec": 0}, **image_at)
            time.sleep(0.05)
        end_ns = time.monotonic_ns() + round(HANG_S * NS_PER_S)
        stamps = iter(range(5_000_000_001, 5_100_000_000))
        while not frames.poll(50):  # /clock and the image are two topics: either may come first
            stamp = {"sec": 5, "nanosec": next(stamps) - 5_000_000_000}
            graph.peer.tell(do="clock", sec=5, nanosec=100_000_000)  # the first one is lost if it comes too early
            graph.peer.tell(do="image", stamp=stamp, **image_at)
            assert time.monotonic_ns() < end_ns, node.errors
        frame = decode_pushed_frame(memoryview(frames.recv())[1:])
        assert (frame.format, frame.width, frame.height, bytes(frame.data)) == ("jpeg", 4, 2, jpeg)
        assert frame.t_capture_ns <= time.monotonic_ns() - 100 * NS_PER_MS + 1000, "as old as in simulated time"
        with FakeDaemon(tmp_path) as daemon:
            daemon.wait_for_subscriber("actions")
            since = graph.peer.mark()
            action = make_action(next(SEQUENCE), type="move", values=velocity(forward_m_s=0.114), valid_ms=900)
            daemon.publish("actions", action)
            graph.peer.wait_for("/sim/cmd_vel", lambda message: message["linear.x"] == 0.114)
            assert node.close() == 0, node.errors
            graph.peer.wait_for("/sim/cmd_vel", lambda message: message["linear.x"] == 0, since)
    speeds = [message["linear.x"] for message in graph.peer.all("/sim/cmd_vel")]
    assert [speed for speed, _ in itertools.groupby(speeds)] == [0.001, 0, 0.114, 0]
    assert speeds.count(0) == 2
