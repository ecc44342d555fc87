"""The names on the ROS graph: topics, services and parameters, with their types. Data only; docs/ros2.md has the same.

A name is relative to the node's namespace, `~/` to the node; `--ros-args --remap` changes it.
"""

from __future__ import annotations

from typing import NamedTuple

NODE = "edge_agent"


class Topic(NamedTuple):
    type: str
    is_reliable: bool
    depth: int
    what: str


class Parameter(NamedTuple):
    default: str | int
    what: str


PUBLISHED: dict[str, Topic] = {
    "cmd_vel": Topic("geometry_msgs/msg/TwistStamped", True, 1, "velocity of each action; zero at a hold"),
    "waypoint": Topic("geometry_msgs/msg/PoseStamped", True, 1, "waypoint of each action; zero at a hold"),
    "~/action": Topic("std_msgs/msg/String", True, 10, "each command, a line: `move forward_m_s=0.25`, `land`, `hold`"),
    "~/description": Topic("std_msgs/msg/String", True, 10, "each complete description"),
    "~/answer": Topic("std_msgs/msg/String", True, 10, "each complete answer to a question"),
    "~/text": Topic("std_msgs/msg/String", True, 1000, "both piece by piece; a line feed ends each"),
    "/diagnostics": Topic("diagnostic_msgs/msg/DiagnosticArray", True, 10, "at 1 Hz, and at every change"),
}
IMAGE = "image"
COMPRESSED_IMAGE = "image/compressed"
# One of the two, by the parameter image_transport.
SUBSCRIBED: dict[str, Topic] = {
    IMAGE: Topic("sensor_msgs/msg/Image", False, 1, "`image_transport` is `raw`"),
    COMPRESSED_IMAGE: Topic("sensor_msgs/msg/CompressedImage", False, 1, "`image_transport` is `compressed`; JPEG"),
}
# AddDiagnostics is the only service of the common interfaces that takes a text and returns one.
SERVICES: dict[str, tuple[str, str]] = {
    "~/instruct": ("diagnostic_msgs/srv/AddDiagnostics", "gives a new instruction, in `load_namespace`"),
    "~/ask": ("diagnostic_msgs/srv/AddDiagnostics", "asks a question, in `load_namespace`; `message` is the answer"),
    "~/pause": ("std_srvs/srv/Trigger", "holds at once, and pauses the daemon"),
    "~/resume": ("std_srvs/srv/Trigger", "publishes actions again"),
}
PARAMETERS: dict[str, Parameter] = {
    "frames": Parameter("", "where images are pushed: `camera.source` of the daemon without `zmq:`; empty: no images"),
    "image_transport": Parameter("raw", "`raw`: subscribes to `image`; `compressed`: to `image/compressed`"),
    "base_frame": Parameter("base_link", "`frame_id` of velocities and waypoints"),
    "action_space": Parameter("", "name of an action space of your own; those of edge-agent are known"),
    "values": Parameter("", "the values of its types, with commas: `forward_m_s,yaw_rate_rad_s`"),
    "max_age_ms": Parameter(0, "hold at an action whose image was older when it was published; 0: no limit"),
}
