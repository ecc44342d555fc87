"""A ROS node that knows nothing of edge-agent: prints what it receives, and does what it is told. Run by a ROS Python.

stdin: one JSON object for each line, {"do": "image" | "call" | "subscribe" | "clock" | "graph", ...}. stdout: one JSON
object for each message, {"topic", "at_ns": CLOCK_MONOTONIC of its arrival, and its fields}.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from diagnostic_msgs.srv import AddDiagnostics
from geometry_msgs.msg import PoseStamped, Twist, TwistStamped
from rclpy.event_handler import SubscriptionEventCallbacks
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy, qos_profile_sensor_data
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import String
from std_srvs.srv import Trigger

TYPES = {"Twist": Twist, "TwistStamped": TwistStamped, "Image": Image}
LISTENED = {
    "/cmd_vel": TwistStamped,
    "/waypoint": PoseStamped,
    "/edge_agent/action": String,
    "/edge_agent/description": String,
    "/edge_agent/answer": String,
    "/edge_agent/text": String,
    "/diagnostics": DiagnosticArray,
}
print_lock = threading.Lock()


def say(**fields):
    with print_lock:
        print(json.dumps(fields), flush=True)


def fields_of(message):
    if isinstance(message, TwistStamped | PoseStamped):
        stamp = message.header.stamp
        head = {"frame_id": message.header.frame_id, "stamp_ns": stamp.sec * 10**9 + stamp.nanosec}
        if isinstance(message, TwistStamped):
            linear, angular = message.twist.linear, message.twist.angular
            names = {"linear": linear, "angular": angular}
        else:
            names = {"position": message.pose.position, "orientation": message.pose.orientation}
        axes = {f"{name}.{axis}": getattr(part, axis) for name, part in names.items() for axis in "xyz"}
        return head | axes
    if isinstance(message, String):
        return {"data": message.data}
    return {
        "entries": {
            status.name: [status.level[0], status.message, {pair.key: pair.value for pair in status.values}]
            for status in message.status
        }
    }


class Peer:
    def __init__(self):
        self.node = rclpy.create_node("peer")
        self.publishers = {}
        for topic, kind in LISTENED.items():
            self.listen(topic, kind, 100)

    def listen(self, topic, kind, qos):
        def callback(message):
            say(topic=topic, at_ns=time.monotonic_ns(), **fields_of(message))

        return self.node.create_subscription(kind, topic, callback, qos)

    def listen_to(self, order):
        self.listen(order["topic"], TYPES[order["type"]], 100)

    def publisher(self, topic, kind, qos=qos_profile_sensor_data):
        if topic not in self.publishers:
            self.publishers[topic] = self.node.create_publisher(kind, topic, qos)
        return self.publishers[topic]

    def stamp(self, header, told):
        """told: seconds before now, or {"sec", "nanosec"}."""
        if isinstance(told, dict):
            header.stamp.sec, header.stamp.nanosec = told["sec"], told["nanosec"]
        else:
            ns = time.time_ns() - round(told * 1e9)
            header.stamp.sec, header.stamp.nanosec = ns // 10**9, ns % 10**9

    def image(self, order):
        topic = order.get("topic", "/image")
        if "format" in order:
            message, kind = CompressedImage(format=order["format"]), CompressedImage
        else:
            names = ("width", "height", "encoding", "is_bigendian", "step")
            message, kind = Image(**{name: order[name] for name in names}), Image
        publisher = self.publisher(topic, kind)
        while order.get("wait", True) and not publisher.get_subscription_count():
            time.sleep(0.01)
        self.stamp(message.header, order["stamp"])
        message.data = bytes.fromhex(order["data"])
        publisher.publish(message)

    def stream(self, order):
        """The image again and again, each time with the stamp of now. Not stopped."""
        self.node.create_timer(order["period_s"], lambda: self.image(order | {"stamp": 0.0, "wait": False}))

    def call(self, order):
        kind = Trigger if order.get("text") is None else AddDiagnostics
        client = self.node.create_client(kind, order["service"])
        client.wait_for_service(60)
        request = Trigger.Request() if kind is Trigger else AddDiagnostics.Request(load_namespace=order["text"])

        def done(future):
            reply = future.result()
            say(topic=order["service"], at_ns=time.monotonic_ns(), success=reply.success, message=reply.message)

        client.call_async(request).add_done_callback(done)

    def subscribe(self, order):
        durability = DurabilityPolicy.TRANSIENT_LOCAL if order.get("transient_local") else DurabilityPolicy.VOLATILE
        qos = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=durability)
        silent = SubscriptionEventCallbacks(use_default_callbacks=False)  # its handlers would keep the subscription
        kind = TYPES[order["type"]]
        self.extra = self.node.create_subscription(kind, order["to"], lambda _: None, qos, event_callbacks=silent)

    def unsubscribe(self, _order):
        self.node.destroy_subscription(self.extra)

    def offer(self, order):
        self.publisher(order["on"], TYPES[order["type"]])

    def clock(self, order):
        message = Clock()
        message.clock.sec, message.clock.nanosec = order["sec"], order["nanosec"]
        publisher = self.publisher("/clock", Clock)
        while not publisher.get_subscription_count():
            time.sleep(0.01)
        publisher.publish(message)

    def graph(self, _order):
        node = self.node
        publishers = dict(node.get_publisher_names_and_types_by_node("edge_agent", "/"))
        subscribers = dict(node.get_subscriber_names_and_types_by_node("edge_agent", "/"))
        services = dict(node.get_service_names_and_types_by_node("edge_agent", "/"))
        say(topic="graph", publishers=publishers, subscribers=subscribers, services=services)


def read_orders(peer):
    for line in sys.stdin:
        order = json.loads(line)
        getattr(peer, order["do"])(order)
    rclpy.try_shutdown()


def main():
    rclpy.init()
    peer = Peer()
    threading.Thread(target=read_orders, args=(peer,), daemon=True).start()
    say(topic="ready")
    with contextlib.suppress(KeyboardInterrupt, rclpy.executors.ExternalShutdownException):
        rclpy.spin(peer.node)


main()
