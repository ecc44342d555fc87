"""What a controller imports: from edge_agent.client import Client. Needs msgspec and pyzmq, nothing else."""

from edge_agent.client.client import Client, RequestRefused, is_valid

__all__ = ["Client", "RequestRefused", "is_valid"]
