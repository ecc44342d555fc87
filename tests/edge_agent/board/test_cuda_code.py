"""CUDA code in libraries: for which GPUs, and on which it runs."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.board.cuda_code import CudaCode, cuda_code, from_build_flags, read_fat_binaries

PTX, SASS = 1, 2


def entry(kind: int, capability: int, payload: bytes = b"code" * 4) -> bytes:
    return struct.pack("<HHIQ12xI32x", kind, 0x101, 64, len(payload), capability) + payload


def fat_binary(*entries: bytes) -> bytes:
    body = b"".join(entries)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def test_every_entry_of_every_fat_binary_counts():
    content = b"\x7fELF" + bytes(60) + fat_binary(entry(SASS, 87), entry(PTX, 90)) + bytes(8)
    content += fat_binary(entry(SASS, 120), entry(SASS, 87)) + b"needs\0libcudart.so.13\0"
    assert read_fat_binaries(content) == CudaCode(sass=(87, 120), ptx=(90,), runtime=13)
    assert read_fat_binaries(content).text() == "sm_87, sm_120, PTX 90"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no code at all",
        fat_binary()[:12],
        fat_binary(entry(SASS, 87))[:40],
        struct.pack("<IHHQ", 0xBA55ED50, 1, 0, 1 << 40) + bytes(100),
        struct.pack("<IHHQ", 0xBA55ED50, 1, 16, 64) + struct.pack("<HHIQ12xI", SASS, 0, 0, 0, 87) + bytes(60),
        fat_binary(entry(SASS, 87)[:8] + struct.pack("<Q", 1 << 60) + bytes(60)),
        fat_binary(entry(7, 87), entry(SASS, 0), entry(SASS, 100_000)),
    ],
)
def test_what_is_not_a_fat_binary_has_no_code(content):
    assert read_fat_binaries(content) == CudaCode((), (), None)


@given(st.binary(max_size=200))
def test_any_bytes_behind_the_magic_are_survived(rest):
    read_fat_binaries(struct.pack("<I", 0xBA55ED50) + rest + struct.pack("<I", 0xBA55ED50))


@pytest.mark.parametrize(
    ("sass", "ptx", "capability", "expected"),
    [
        ((86,), (), 86, True),
        ((80,), (), 86, True),  # machine code runs on later minors of its major
        ((86,), (), 80, False),
        ((80,), (), 90, False),
        ((80,), (), 87, False),  # a desktop's code never runs on a Jetson
        ((87,), (), 89, False),  # nor a Jetson's on a desktop
        ((87,), (), 87, True),
        ((), (80,), 87, True),
        ((), (90,), 87, False),
        ((89, 90, 120, 121), (), 87, False),  # onnxruntime-gpu 1.31.1 of PyPI for aarch64, on an Orin
        ((89, 90, 120, 121), (), 110, False),  # on a Thor
        ((89, 90, 120, 121), (), 121, True),
        ((), (), 87, False),
    ],
)
def test_where_code_runs(sass, ptx, capability, expected):
    assert CudaCode(sass, ptx).runs_on(capability) is expected


@pytest.mark.parametrize(
    ("archs", "sass"), [("870", (87,)), ("750,860,1100", (75, 86, 110)), ("", ()), ("x,²,870", (87,))]
)
def test_architectures_of_a_build(archs, sass):
    assert from_build_flags(archs).sass == sass


def test_files_that_cannot_be_read(tmp_path):
    assert cuda_code(tmp_path / "none") is None
    (tmp_path / "empty").touch()
    assert cuda_code(tmp_path / "empty") is None


@pytest.mark.soak
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_what_nvcc_compiles(tmp_path: Path):
    (tmp_path / "k.cu").write_text("__global__ void f(float *x) { x[0] = 1; }\n")
    wanted = ["-gencode", "arch=compute_87,code=sm_87", "-gencode", "arch=compute_110,code=compute_110"]
    command = ["nvcc", "-fatbin", *wanted, "-o", "k.fatbin", "k.cu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert cuda_code(tmp_path / "k.fatbin") == CudaCode((87,), (110,))
