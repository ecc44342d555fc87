"""msgpack bytes of one struct, and back. The only place that configures msgspec for the wire."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

_encoder = msgspec.msgpack.Encoder()
encode = _encoder.encode  # between processes: any struct -> msgpack bytes


def make_decoder(kind: Any) -> Callable[[bytes | memoryview], Any]:
    """msgpack bytes -> a struct. Raises msgspec.DecodeError, and nothing else, on anything that is none."""
    decode = msgspec.msgpack.Decoder(kind).decode

    def checked(payload: bytes | memoryview) -> Any:
        try:
            return decode(payload)
        except (UnicodeDecodeError, RecursionError) as error:  # msgspec lets these two through
            raise msgspec.DecodeError(str(error)) from None

    return checked
