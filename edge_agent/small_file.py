"""Files that a person writes: configurations, layouts, keys. Whatever their name leads to, reading one ends.

A shell gives a pipe for `--config <(command)`. A pipe without a writer is empty, and does not wait for one.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

MAX_BYTES = 1 << 20


def read_small_file(path: str | Path) -> bytes:
    """The bytes of a file, or of a pipe that has a writer. Raises OSError, also if it has more than MAX_BYTES."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.set_blocking(descriptor, True)
        data = bytearray()
        while len(data) <= MAX_BYTES and (block := os.read(descriptor, MAX_BYTES)):
            data += block
    finally:
        os.close(descriptor)
    if len(data) > MAX_BYTES:
        raise OSError(errno.EFBIG, f"more than {MAX_BYTES >> 20} MiB; expected a small text file", str(path))
    return bytes(data)
