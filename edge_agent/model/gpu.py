"""The GPU that llama.cpp would use, and its memory. Loads ggml's libraries, and no model.

python -m edge_agent.model.gpu        prints a Gpu as JSON, or null; for commands that load no native code themselves
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import NamedTuple

import llama_cpp
import llama_cpp.llama_cpp as ll
import msgspec

from edge_agent.bundle.memory_plan import MIB, Gpu

DEVICE_GPU, DEVICE_INTEGRATED = 1, 2  # of enum ggml_backend_dev_type


class Device(NamedTuple):
    """What ggml says of one device."""

    type: int
    free_bytes: int  # 0: unknown


def uses_gpu(gpu_layers: int) -> bool:
    """Whether a model with this setting runs on a GPU: only with a GPU build of llama.cpp and a GPU that it can use."""
    return bool(ll.llama_supports_gpu_offload()) and gpu_layers != 0


def gpu_in_use(gpu_layers: int) -> Gpu | None:
    """The GPU of a model with this setting, now; None: it runs on the CPU."""
    return gpu_of(_devices()) if uses_gpu(gpu_layers) else None


def gpu_of(devices: list[Device]) -> Gpu | None:
    """llama.cpp divides a model among all cards; it takes an integrated GPU only where there is no card."""
    cards = [device for device in devices if device.type == DEVICE_GPU]
    used = cards or [device for device in devices if device.type == DEVICE_INTEGRATED]
    if not used:
        return None
    is_known = all(device.free_bytes for device in used)
    free_mib = sum(device.free_bytes for device in used) / MIB if is_known else None
    return Gpu(free_mib=free_mib, own_memory=bool(cards), n_devices=len(used))


def _devices() -> list[Device]:
    folder = Path(llama_cpp.__file__).parent / "lib"
    registry, base = ctypes.CDLL(str(folder / "libggml.so")), ctypes.CDLL(str(folder / "libggml-base.so"))
    registry.ggml_backend_dev_count.restype = ctypes.c_size_t
    registry.ggml_backend_dev_get.restype, registry.ggml_backend_dev_get.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    base.ggml_backend_dev_type.restype, base.ggml_backend_dev_type.argtypes = ctypes.c_int, [ctypes.c_void_p]
    size_pointer = ctypes.POINTER(ctypes.c_size_t)
    base.ggml_backend_dev_memory.restype = None
    base.ggml_backend_dev_memory.argtypes = [ctypes.c_void_p, size_pointer, size_pointer]
    found = []
    for i in range(registry.ggml_backend_dev_count()):
        device, free, total = registry.ggml_backend_dev_get(i), ctypes.c_size_t(), ctypes.c_size_t()
        base.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        found.append(Device(base.ggml_backend_dev_type(device), free.value))
    return found


if __name__ == "__main__":
    ll.llama_backend_init()
    sys.stdout.buffer.write(msgspec.json.encode(gpu_in_use(-1)))
