"""The GPU that llama.cpp would use: pure rules over what ggml says of its devices, and ggml's real answer here."""

from __future__ import annotations

import pytest

from edge_agent.bundle.memory_plan import MIB, Gpu
from edge_agent.model import gpu
from edge_agent.model.gpu import DEVICE_GPU, DEVICE_INTEGRATED, Device, gpu_in_use, gpu_of

CPU, ACCELERATOR = Device(0, 24_000 * MIB), Device(3, 0)
CARD, JETSON = Device(DEVICE_GPU, 8000 * MIB), Device(DEVICE_INTEGRATED, 5000 * MIB)


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        ([CPU], None),
        ([CPU, ACCELERATOR], None),
        ([CARD, CPU], Gpu(free_mib=8000.0, own_memory=True)),
        ([CARD, CARD, CPU], Gpu(free_mib=16_000.0, own_memory=True, n_devices=2)),
        ([JETSON, CPU], Gpu(free_mib=5000.0, own_memory=False)),
        ([CARD, JETSON, CPU], Gpu(free_mib=8000.0, own_memory=True)),
        ([Device(DEVICE_GPU, 0), CPU], Gpu(free_mib=None, own_memory=True)),
        ([CARD, Device(DEVICE_GPU, 0)], Gpu(free_mib=None, own_memory=True, n_devices=2)),
        ([], None),
    ],
)
def test_cards_come_before_an_integrated_gpu_and_a_figure_of_zero_is_unknown(devices, expected):
    assert gpu_of(devices) == expected


def test_ggml_names_the_devices_of_this_machine():
    found = gpu._devices()
    assert 0 in {device.type for device in found}, "the CPU is one of them"
    assert all(device.free_bytes >= 0 for device in found)


@pytest.mark.parametrize(
    ("offload", "gpu_layers", "expected"), [(True, -1, True), (True, 0, False), (False, -1, False)]
)
def test_no_gpu_is_in_use_without_layers_or_without_a_build_for_it(monkeypatch, offload, gpu_layers, expected):
    monkeypatch.setattr("llama_cpp.llama_cpp.llama_supports_gpu_offload", lambda: offload)
    monkeypatch.setattr(gpu, "_devices", lambda: [CARD, CPU])
    assert (gpu_in_use(gpu_layers) is not None) is expected
