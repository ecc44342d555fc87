"""One struct <-> msgpack bytes. The only file that configures msgspec for the wire."""

from __future__ import annotations

from collections.abc import Callable
from types import UnionType
from typing import Any, TypeVar, overload

import msgspec

T = TypeVar("T")

encode: Callable[[msgspec.Struct | dict[str, Any]], bytes] = msgspec.msgpack.Encoder().encode


@overload
def make_decoder(kind: type[T]) -> Callable[[bytes | memoryview], T]: ...
@overload
def make_decoder(kind: UnionType) -> Callable[[bytes | memoryview], Any]: ...
def make_decoder(kind: Any) -> Callable[[bytes | memoryview], Any]:
    """A function: msgpack bytes -> a value of `kind`. It raises msgspec.DecodeError, and nothing else, if the bytes
    are not valid msgpack or the value has another type."""
    decode = msgspec.msgpack.Decoder(kind).decode

    def decode_or_decode_error(payload: bytes | memoryview) -> Any:
        try:
            return decode(payload)
        except (UnicodeDecodeError, RecursionError) as error:  # msgspec does not convert these two
            raise msgspec.DecodeError(str(error)) from None

    return decode_or_decode_error
