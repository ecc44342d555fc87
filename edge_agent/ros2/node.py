"""The node on the ROS graph: publishers, services, the subscription to images. The only file that loads ROS.

Callbacks run in the threads of an executor. Commands are published by the thread that calls publish(), at once: no
callback can delay them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import rclpy
from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from diagnostic_msgs.srv import AddDiagnostics
from geometry_msgs.msg import PoseStamped, TwistStamped
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from rclpy.clock import Clock, ClockType
from rclpy.duration import Duration
from rclpy.executors import ExternalShutdownException, MultiThreadedExecutor
from rclpy.qos import (
    DurabilityPolicy,
    LivelinessPolicy,
    QoSProfile,
    ReliabilityPolicy,
)
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import String
from std_srvs.srv import Trigger

from edge_agent.client import FramePusher
from edge_agent.errors import ConfigError
from edge_agent.ros2.diagnostics import Entry, FrameCounters
from edge_agent.ros2.follower import Command
from edge_agent.ros2.image import ImageRefused, picture_of, picture_of_compressed
from edge_agent.ros2.interfaces import (
    COMPRESSED_IMAGE,
    IMAGE,
    NODE,
    PARAMETERS,
    PUBLISHED,
    SERVICES,
    SUBSCRIBED,
    Topic,
)
from edge_agent.ros2.motion import OwnSpace, Velocity, Waypoint
from edge_agent.ros2.stamps import Clocks, StampReader, StampRefused, read_clocks, to_ros_ns
from edge_agent.time_units import NS_PER_S

TYPES = {
    "geometry_msgs/msg/TwistStamped": TwistStamped,
    "geometry_msgs/msg/PoseStamped": PoseStamped,
    "std_msgs/msg/String": String,
    "diagnostic_msgs/msg/DiagnosticArray": DiagnosticArray,
    "sensor_msgs/msg/Image": Image,
    "sensor_msgs/msg/CompressedImage": CompressedImage,
    "diagnostic_msgs/srv/AddDiagnostics": AddDiagnostics,
    "std_srvs/srv/Trigger": Trigger,
}
N_THREADS = 6  # images, diagnostics, three services that wait for the daemon, and the node's own services
NO_LIMIT_NS = 10**9 * NS_PER_S
WARN_EVERY_S = 5.0
LAST_COMMAND_S = 0.5  # at the end: how long to wait until every subscriber has the last hold


def _profile(topic: Topic) -> QoSProfile:
    reliability = ReliabilityPolicy.RELIABLE if topic.is_reliable else ReliabilityPolicy.BEST_EFFORT
    return QoSProfile(depth=topic.depth, reliability=reliability, durability=DurabilityPolicy.VOLATILE)


class RosNode:
    """Owns the node and its executor; close() ends both."""

    def __init__(self, dry_run: bool) -> None:
        """dry_run: print each command instead of publishing it. Raises ConfigError, after rclpy.init()."""
        self.node = rclpy.create_node(NODE)
        self.failure: BaseException | None = None  # of a callback
        self._dry_run = dry_run
        self._parameters = {name: self._parameter(name) for name in PARAMETERS}
        names = (name.strip() for name in self.parameter("values").split(","))
        self.own_space = OwnSpace(self.parameter("action_space"), tuple(name for name in names if name))
        if mistake := self.own_space.mistake():
            raise ConfigError(f"parameter {mistake}")
        self._publishers = {name: self._publisher(name) for name in PUBLISHED}
        self._steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.frames = FrameCounters(self.warn, time.monotonic_ns)
        self._said: set[str] = set()  # what is wrong with peers and was logged
        self._has_waypoints = False
        self._pusher: FramePusher | None = None
        self._image = ("", SUBSCRIBED[IMAGE])  # the full name of its topic; "": no images
        if self.parameter("frames"):
            self._subscribe(FramePusher(self.parameter("frames")))
        self._executor = MultiThreadedExecutor(N_THREADS)
        self._executor.add_node(self.node)
        self._thread = threading.Thread(target=self._spin, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._executor.shutdown(timeout_sec=1.0)
        self._thread.join(2.0)
        self.node.destroy_node()
        if self._pusher is not None:
            self._pusher.close()

    def _spin(self) -> None:
        try:
            self._executor.spin()
        except ExternalShutdownException:
            pass
        except BaseException as error:  # the main thread ends the program, after a last hold
            self.failure = error

    def warn(self, line: str) -> None:
        self.node.get_logger().warning(line)

    def warn_throttled(self, line: str) -> None:
        self.node.get_logger().warning(line, throttle_duration_sec=WARN_EVERY_S)

    def info(self, line: str) -> None:
        self.node.get_logger().info(line)

    def parameter(self, name: str) -> Any:
        return self._parameters[name]

    @property
    def takes_images(self) -> bool:
        return self._pusher is not None

    def _parameter(self, name: str) -> Any:
        default = PARAMETERS[name].default
        try:
            value = self.node.declare_parameter(name, default).value
        except Exception as error:  # rclpy has one class for each mistake
            raise ConfigError(f"parameter {name}: {error}") from None
        if name == "image_transport" and value not in ("raw", "compressed"):
            raise ConfigError(f"parameter {name}: expected raw or compressed, found {value!r}")
        if name == "frames" and value and not value.startswith("ipc:///"):
            raise ConfigError(f"parameter {name}: expected ipc:///absolute/path, found {value!r}")
        if name == "max_age_ms" and value < 0:
            raise ConfigError(f"parameter {name}: expected 0 or more, found {value}")
        return value

    # -- out ----------------------------------------------------------------------------------------------------------

    def _publisher(self, name: str) -> Any:
        topic = PUBLISHED[name]
        return self.node.create_publisher(TYPES[topic.type], name, _profile(topic))

    def clocks(self) -> Clocks:
        clock = self.node.get_clock()
        return read_clocks(lambda: int(clock.now().nanoseconds), clock.ros_time_is_active)

    def publish(self, command: Command) -> None:
        """The stamp of a velocity is from before the check that the action is valid."""
        if self._dry_run:
            print(f"@{command.read_ns} {command.line}", flush=True)
            return
        clocks = self.clocks()
        stamp_ns = to_ros_ns(command.read_ns, clocks)
        if isinstance(command.motion, Waypoint):
            self._has_waypoints = True
            self._publishers["waypoint"].publish(self._pose(command.motion, to_ros_ns(command.captured_ns, clocks)))
        else:
            self._publishers["cmd_vel"].publish(self._twist(command.motion or Velocity(), stamp_ns))
            if (
                command.motion is None and self._has_waypoints
            ):  # the vehicle stands at its last waypoint, or flies to it
                self._publishers["waypoint"].publish(self._pose(Waypoint(), stamp_ns))
        self.say("~/action", command.line)

    def _twist(self, velocity: Velocity, stamp_ns: int) -> Any:
        message = TwistStamped()
        message.header.stamp, message.header.frame_id = _time(stamp_ns), self.parameter("base_frame")
        linear = message.twist.linear
        linear.x, linear.y, linear.z, message.twist.angular.z = velocity
        return message

    def _pose(self, waypoint: Waypoint, stamp_ns: int) -> Any:
        message = PoseStamped()
        message.header.stamp, message.header.frame_id = _time(stamp_ns), self.parameter("base_frame")
        position = message.pose.position
        position.x, position.y, position.z = waypoint
        message.pose.orientation.w = 1.0
        return message

    def say(self, topic: str, text: str) -> None:
        self._publishers[topic].publish(String(data=text))

    def wait_until_received(self) -> None:
        """After the last hold: its subscribers must have it before this node leaves the graph."""
        for name in ("cmd_vel", "waypoint", "~/action"):
            self._publishers[name].wait_for_all_acked(Duration(seconds=LAST_COMMAND_S))

    def publish_diagnostics(self, entries: list[Entry]) -> None:
        message = DiagnosticArray()
        message.header.stamp = self.node.get_clock().now().to_msg()
        full_name = self.node.get_fully_qualified_name().lstrip("/")
        for entry in entries:
            values = [KeyValue(key=key, value=value) for key, value in entry.values.items()]
            status = DiagnosticStatus(name=f"{full_name}: {entry.name}", message=entry.message, values=values)
            status.level, status.hardware_id = bytes([entry.level]), "edge-agent"
            message.status.append(status)
        self._publishers["/diagnostics"].publish(message)

    def every(self, seconds: float, callback: Callable[[], None]) -> None:
        """By the steady clock: a simulator that stands still must not stop it."""
        group = MutuallyExclusiveCallbackGroup()
        self.node.create_timer(seconds, callback, callback_group=group, clock=self._steady)

    # -- in -----------------------------------------------------------------------------------------------------------

    def serve(self, name: str, answer: Callable[[str], tuple[bool, str]]) -> None:
        """answer: the text of the request -> whether it was carried out, and a line. It may wait."""

        def callback(request: Any, response: Any) -> Any:
            response.success, response.message = answer(getattr(request, "load_namespace", ""))
            return response

        group = MutuallyExclusiveCallbackGroup()
        self.node.create_service(TYPES[SERVICES[name][0]], name, callback, callback_group=group)

    def _subscribe(self, pusher: FramePusher) -> None:
        self._pusher, self._stamps, self._frame_id = pusher, StampReader(), 0
        name = IMAGE if self.parameter("image_transport") == "raw" else COMPRESSED_IMAGE
        topic = SUBSCRIBED[name]
        subscription = self.node.create_subscription(
            TYPES[topic.type], name, self._take_image, _profile(topic), callback_group=MutuallyExclusiveCallbackGroup()
        )
        self._image = (subscription.topic_name, topic)

    def _take_image(self, message: Any) -> None:
        stamp = message.header.stamp
        try:
            captured_ns = self._stamps.captured_ns(stamp.sec, stamp.nanosec, self.clocks())
            picture = picture_of(message) if isinstance(message, Image) else picture_of_compressed(message)
        except (StampRefused, ImageRefused) as error:
            self.frames.refuse(error.reason, str(error))
            return
        self._frame_id += 1
        assert self._pusher is not None
        self.frames.push(
            self._pusher.push(
                picture.data,
                frame_id=self._frame_id,
                t_capture_ns=captured_ns,
                format=picture.format,
                width=picture.width,
                height=picture.height,
            )
        )

    # -- the other side ----------------------------------------------------------------------------------------------

    def wrong_listeners(self) -> list[str]:
        """Subscribers of commands that get none: of another type, or with a QoS that this node does not offer."""
        lines: list[str] = []
        for name in ("cmd_vel", "waypoint"):
            full_name = self._publishers[name].topic_name
            for info in self.node.get_subscriptions_info_by_topic(full_name):
                lines += self._mismatch(full_name, info, PUBLISHED[name], is_publisher=False)
        return lines

    def wrong_publishers(self) -> list[str]:
        """The same of the publishers of images."""
        full_name, topic = self._image
        infos = self.node.get_publishers_info_by_topic(full_name) if full_name else []
        return [line for info in infos for line in self._mismatch(full_name, info, topic, is_publisher=True)]

    def warn_once(self, lines: list[str]) -> None:
        """Log each line when it appears, and again if it had gone."""
        for line in lines:
            if line not in self._said:
                self.warn(line)
        self._said = set(lines)

    def _mismatch(self, name: str, info: Any, topic: Topic, is_publisher: bool) -> list[str]:
        peer = f"{info.node_namespace.rstrip('/')}/{info.node_name}"
        what = "publishes" if is_publisher else "subscribes to"
        if info.topic_type != topic.type:
            return [f"{name}: {peer} {what} {info.topic_type}, expected {topic.type}: nothing goes through"]
        own = _profile(topic)
        offered, requested = (info.qos_profile, own) if is_publisher else (own, info.qos_profile)
        if policies := _too_much(offered, requested):
            return [f"{name}: the QoS of {peer} does not match ({', '.join(policies)}): nothing goes through"]
        return []


def _too_much(offered: QoSProfile, requested: QoSProfile) -> list[str]:
    """What a subscription requests and a publisher does not offer.

    Not rclpy's qos_check_compatible: it takes "no deadline", as it is discovered, for a deadline.
    """
    found = []
    if requested.reliability == ReliabilityPolicy.RELIABLE and offered.reliability == ReliabilityPolicy.BEST_EFFORT:
        found.append("reliability: reliable requested, best effort offered")
    if requested.durability == DurabilityPolicy.TRANSIENT_LOCAL and offered.durability == DurabilityPolicy.VOLATILE:
        found.append("durability: transient local requested, volatile offered")
    for name in ("deadline", "liveliness_lease_duration"):
        asked_ns, given_ns = (_limit_ns(getattr(profile, name)) for profile in (requested, offered))
        if asked_ns < given_ns:
            found.append(f"{name}: {asked_ns / NS_PER_S:g} s requested, a longer one offered")
    if requested.liveliness == LivelinessPolicy.MANUAL_BY_TOPIC != offered.liveliness:
        found.append("liveliness: manual requested, automatic offered")
    return found


def _limit_ns(duration: Duration) -> int:
    """0 and decades mean that there is no limit."""
    return int(duration.nanoseconds) if 0 < duration.nanoseconds < NO_LIMIT_NS else NO_LIMIT_NS


def _time(ns: int) -> Any:
    return Time(sec=ns // NS_PER_S, nanosec=ns % NS_PER_S)
