"""edge-agent: camera frames in, checked robot actions and language out over ZeroMQ, on the device, offline."""

__version__ = "0.1.0"
