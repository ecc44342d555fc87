"""pymavlink's tables of messages, MAVLink 2, with the CRC always checked.

Only the generated tables are imported. pymavlink's mavutil would load every dialect, change global state, and reconnect
and print by itself.
"""

from __future__ import annotations

from pymavlink.dialects.v20 import common

common.MAVLINK_IGNORE_CRC = 0  # the variable MAV_IGNORE_CRC of the environment would let flipped bits through
mavlink = common
