"""For which GPUs a shared library holds CUDA code, from the library's own bytes.

nvcc puts compiled code into "fat binaries": a header, then one entry for each architecture. An entry holds machine code
(SASS) for one compute capability, or PTX, which the driver compiles for later ones. No tool of NVIDIA is needed to read
the headers.

    cuda_code(Path("libonnxruntime_providers_cuda.so"))  ->  CudaCode(sass=(89, 90, 120), ptx=(), runtime=13)
"""

from __future__ import annotations

import mmap
import re
import struct
from pathlib import Path
from typing import NamedTuple

FATBIN_MAGIC = struct.pack("<I", 0xBA55ED50)
HEADER, ENTRY = struct.Struct("<IHHQ"), struct.Struct("<HHIQ12xI")  # magic, version, size, bytes; kind … architecture
PTX, SASS = 1, 2  # kinds of entry
MAX_CAPABILITY = 999
RUNTIME = re.compile(rb"libcudart\.so\.([0-9]{1,3})\0")
TEGRA = (53, 62, 72, 87, 101, 110)  # of Jetson modules: code for another one never runs there, nor theirs elsewhere


class CudaCode(NamedTuple):
    """Compute capabilities as numbers: 87 is 8.7."""

    sass: tuple[int, ...]  # machine code
    ptx: tuple[int, ...]
    runtime: int | None = None  # major version of the CUDA runtime library that it needs; None: unknown, or none

    def runs_on(self, capability: int) -> bool:
        """Whether a GPU of this compute capability can run the code.

        Machine code runs on its own major version from its own minor version on. On a Jetson, only code for exactly
        that GPU runs. PTX runs on its own capability and on later ones.
        """
        if any(ptx <= capability for ptx in self.ptx):
            return True
        if capability in TEGRA:
            return capability in self.sass
        return any(sass // 10 == capability // 10 and sass <= capability for sass in self.sass if sass not in TEGRA)

    def text(self) -> str:
        """For people: "sm_87, PTX 90"."""
        names = [f"sm_{n}" for n in self.sass] + [f"PTX {n}" for n in self.ptx]
        return ", ".join(names) or "no CUDA code"


def cuda_code(path: Path) -> CudaCode | None:
    """The code in a library; None: it cannot be read. The file is mapped, not loaded."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return read_fat_binaries(content)
    except (OSError, ValueError):  # ValueError: an empty file
        return None


def read_fat_binaries(content: bytes | mmap.mmap) -> CudaCode:
    """The entries of every fat binary in these bytes. What is not one, although it begins like one, is passed over."""
    found: dict[int, set[int]] = {PTX: set(), SASS: set()}
    at = content.find(FATBIN_MAGIC)
    while at >= 0:
        at = content.find(FATBIN_MAGIC, _read_one(content, at, found))
    runtimes = [int(match.group(1)) for match in RUNTIME.finditer(content)]
    return CudaCode(tuple(sorted(found[SASS])), tuple(sorted(found[PTX])), max(runtimes, default=None))


def _read_one(content: bytes | mmap.mmap, start: int, found: dict[int, set[int]]) -> int:
    """Add the entries of the fat binary at `start`. Returns where to search on."""
    if start + HEADER.size > len(content):
        return start + 1
    _magic, _version, header_bytes, n_bytes = HEADER.unpack_from(content, start)
    at: int = start + header_bytes
    end: int = at + n_bytes
    if header_bytes < HEADER.size or end > len(content):
        return start + 1
    while at + ENTRY.size <= end:
        kind, _version, entry_header_bytes, payload_bytes, capability = ENTRY.unpack_from(content, at)
        if entry_header_bytes < ENTRY.size or at + entry_header_bytes + payload_bytes > end:
            break
        if kind in found and 0 < capability <= MAX_CAPABILITY:
            found[kind].add(capability)
        at += entry_header_bytes + payload_bytes
    return max(at, start + 1)


def from_build_flags(archs: str) -> CudaCode:
    """From llama.cpp's list of the architectures that it was built for: "870" or "750,860". It does not say which of
    them are PTX, so all count as machine code."""
    numbers = [int(word) for word in archs.split(",") if word.isascii() and word.isdigit() and len(word) < 6]
    return CudaCode(tuple(sorted({n // 10 for n in numbers if n >= 100})), ())
