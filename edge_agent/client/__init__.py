"""What a controller imports: from edge_agent.client import Client. Needs msgspec and pyzmq, nothing else."""

from edge_agent.client.chunk_player import ChunkPlayer, ChunkStep
from edge_agent.client.client import Client, ConnectionEnded, NotConnected, RequestRefused, is_valid
from edge_agent.client.pusher import FramePusher

__all__ = [
    "ChunkPlayer",
    "ChunkStep",
    "Client",
    "ConnectionEnded",
    "FramePusher",
    "NotConnected",
    "RequestRefused",
    "is_valid",
]
