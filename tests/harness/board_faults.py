"""Faults of the board, its GPU and its memory, planted into the healthy machines of tests/harness/boards.py."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from edge_agent.doctor.machine import CudaAnswer, LlamaAnswer, OnnxruntimeAnswer
from tests.harness import boards
from tests.harness.boards import AGX_ORIN, CARD, CONTAINER, ORIN_NANO, ORIN_NX, PC, PC_WITH_CARD, RASPBERRY_PI, THOR

UNIT_FILE = "/etc/systemd/system/edge-agent.service"
DROP_IN = f"{UNIT_FILE}.d/50-local.conf"
GROUP = "/sys/fs/cgroup/system.slice/edge-agent.service"
CPU = "/sys/devices/system/cpu/cpufreq/policy0"
PYPI_ARM = CudaAnswer(sass=(89, 90, 120, 121), runtime=13)  # onnxruntime-gpu of PyPI for aarch64, read from its library


def service(*lines: str) -> dict[str, str | None]:
    return {DROP_IN: "[Service]\n" + "\n".join(lines) + "\n"}


def onnx(board: boards.Fixture, **changes: Any) -> dict[str, Any]:
    assert board.answers.onnxruntime is not None
    return {"onnxruntime": msgspec.structs.replace(board.answers.onnxruntime, **changes)}


def llama(board: boards.Fixture, **changes: Any) -> dict[str, Any]:
    assert board.answers.llama is not None
    return {"llama": msgspec.structs.replace(board.answers.llama, **changes)}


def card(**changes: Any) -> dict[str, Any]:
    return {"cards": (msgspec.structs.replace(CARD, **changes),)}


class Fault(NamedTuple):
    """One thing that is wrong, and the check that must say so."""

    board: boards.Fixture
    planted: dict[str, Any]  # arguments of Fixture.machine
    check: str
    state: str
    words: str  # in what was found or in the remedy


BOARD_FAULTS: dict[str, Fault] = {
    # -- found by a reviewer with files of other boards
    "an Orin whose GPU driver is not loaded": Fault(
        ORIN_NANO, {"files": {"/dev/nvhost-gpu": None}}, "GPU", "fail", "no GPU nodes"
    ),
    "a board that gets no newer JetPack": Fault(
        ORIN_NANO,
        {
            "files": {
                "/proc/device-tree/compatible": "nvidia,p3668\0nvidia,tegra194\0",
                "/etc/nv_tegra_release": "# R35 (release), REVISION: 6.0, GCID: 1\n",
            },
            **llama(ORIN_NANO, system_info="CUDA : NO_VMM = 1 | OPENMP = 1 | ", cuda=None),
            **onnx(ORIN_NANO, cuda=None),
        },
        "board",
        "fail",
        "use an Orin or a Thor",
    ),
    "a container without its card": Fault(
        CONTAINER,
        {"files": {"/proc/driver/nvidia/version": "NVRM version: 580\n"}, "cards": ()},
        "GPU",
        "fail",
        "--gpus all",
    ),
    "a preference for little power": Fault(
        PC,
        {
            "files": {
                f"{CPU}/scaling_driver": "intel_pstate\n",
                f"{CPU}/scaling_governor": "powersave\n",
                f"{CPU}/energy_performance_preference": "power\n",
            }
        },
        "clocks",
        "warn",
        "echo balance_performance | sudo tee",
    ),
    "clocks of a PC held down": Fault(
        PC, {"files": {f"{CPU}/scaling_max_freq": "800000\n"}}, "clocks", "warn", "/policy0/scaling_max_freq"
    ),
    "only a weak supply": Fault(
        RASPBERRY_PI,
        {
            "files": {
                "/sys/class/hwmon/hwmon7/name": "rpi_volt\n",
                "/sys/class/hwmon/hwmon7/in0_lcrit_alarm": "1\n",
            }
        },
        "throttling",
        "warn",
        "short and thick cable",
    ),
    # -- board and system
    "JetPack 5": Fault(
        ORIN_NANO,
        {"files": {"/etc/nv_tegra_release": "# R35 (release), REVISION: 4.1, GCID: 1\n"}},
        "board",
        "fail",
        "install JetPack 6 or 7",
    ),
    "no JetPack": Fault(ORIN_NX, {"files": {"/etc/nv_tegra_release": None}}, "board", "warn", "JetPack is unknown"),
    "another kernel": Fault(
        AGX_ORIN, {"files": {"/proc/sys/kernel/osrelease": "5.15.0-122-generic\n"}}, "board", "warn", "not NVIDIA's"
    ),
    "old Python": Fault(RASPBERRY_PI, {"python": (3, 9)}, "system", "fail", "Python 3.10 or newer"),
    "32 bits": Fault(RASPBERRY_PI, {"pointer_bits": 32}, "system", "fail", "64-bit"),
    "32-bit ARM": Fault(RASPBERRY_PI, {"architecture": "armv7l"}, "system", "fail", "armv7l"),
    "no AVX2": Fault(
        PC, {"files": boards.cpu(8, "powersave", "intel_pstate", 4_200_000, "fpu sse4_2")}, "processor", "warn", "avx2"
    ),
    # -- processor time
    "half a processor": Fault(
        CONTAINER,
        {"files": {"/sys/fs/cgroup/cpu.max": "50000 100000\n"}},
        "threads",
        "warn",
        "a quota of 0.5 processors",
    ),
    "more threads than the quota": Fault(
        ORIN_NANO,
        {"config": boards.CONFIG + "cpu_threads: 6\n", "files": {f"{GROUP}/cpu.max": "200000 100000\n"}},
        "threads",
        "warn",
        "set cpu_threads to 2",
    ),
    "the quota is used up": Fault(
        PC,
        {"files": {f"{GROUP}/cpu.max": "400000 100000\n", f"{GROUP}/cpu.stat": "nr_periods 1000\nnr_throttled 400\n"}},
        "threads",
        "warn",
        "40%",
    ),
    # -- power and heat
    "weakest power mode": Fault(
        ORIN_NANO,
        {"files": boards.nvpmodel(3, "15W", "25W", "MAXN_SUPER", "7W")},
        "power mode",
        "warn",
        "sudo nvpmodel -m 2 (MAXN_SUPER)",
    ),
    "15 of 50 W": Fault(
        AGX_ORIN,
        {"files": boards.nvpmodel(1, "MAXN", "MODE_15W", "MODE_30W", "MODE_50W")},
        "power mode",
        "warn",
        "MODE_15W",
    ),
    "governor powersave": Fault(
        RASPBERRY_PI, {"files": {f"{CPU}/scaling_governor": "powersave\n"}}, "clocks", "warn", "powersave"
    ),
    "preference power": Fault(
        PC, {"files": {f"{CPU}/energy_performance_preference": "power\n"}}, "clocks", "warn", "policy0: power"
    ),
    "a CPU held down": Fault(
        PC, {"files": {f"{CPU}/scaling_max_freq": "800000\n"}}, "clocks", "warn", "800 of 4200 MHz"
    ),
    "a GPU held down": Fault(
        ORIN_NX,
        {"files": {"/sys/class/devfreq/17000000.gpu/max_freq": "306000000\n"}},
        "clocks",
        "warn",
        "306 of 1020 MHz",
    ),
    "near the limit": Fault(
        ORIN_NANO, {"files": boards.zone(1, "gpu-thermal", 96, passive=99)}, "temperature", "warn", "3 °C under a limit"
    ),
    "over the limit": Fault(
        THOR, {"files": boards.zone(0, "cpu-thermal", 107, passive=105)}, "temperature", "fail", "cool the board"
    ),
    "a hot Raspberry Pi": Fault(
        RASPBERRY_PI, {"files": boards.zone(0, "cpu-thermal", 82, critical=110)}, "temperature", "fail", "over a limit"
    ),
    "no sensor works": Fault(
        THOR,
        {"files": boards.zone(0, "cpu-thermal", None) | boards.zone(1, "gpu-thermal", None)},
        "temperature",
        "warn",
        "no sensor",
    ),
    "throttled by heat": Fault(ORIN_NX, {"files": boards.cooler(1, "cpufreq-cpu0", 2)}, "throttling", "warn", "step 2"),
    "too much current": Fault(
        ORIN_NANO, {"files": {"/sys/class/hwmon/hwmon5/oc2_event_cnt": "7\n"}}, "throttling", "warn", "boot: 7"
    ),
    "under-voltage": Fault(
        RASPBERRY_PI,
        {"files": {"/sys/class/hwmon/hwmon2/in0_lcrit_alarm": "1\n"}},
        "throttling",
        "warn",
        "under-voltage",
    ),
    "a throttled card": Fault(PC_WITH_CARD, card(throttle_reasons=("temperature",)), "throttling", "warn", "RTX A2000"),
    # -- GPU and native libraries
    "no GPU nodes": Fault(
        ORIN_NANO, {"files": {"/dev/nvmap": None, "/dev/nvhost-gpu": None}}, "GPU", "fail", "no GPU nodes"
    ),
    "no driver": Fault(
        PC_WITH_CARD,
        {"files": {"/proc/driver/nvidia/version": None}, "cards": None},
        "GPU",
        "fail",
        "install NVIDIA's driver",
    ),
    "nouveau": Fault(
        PC_WITH_CARD,
        {"files": {"/proc/driver/nvidia/version": None, "/proc/modules": "nouveau 2 0 - Live\n"}, "cards": None},
        "GPU",
        "fail",
        "nouveau",
    ),
    "the driver does not answer": Fault(
        PC_WITH_CARD,
        {"cards": None, "card_error": "Driver/library version mismatch"},
        "GPU",
        "fail",
        "Driver/library version mismatch",
    ),
    "no card behind the driver": Fault(PC_WITH_CARD, {"cards": ()}, "GPU", "fail", "or finds no card"),
    "two cards": Fault(PC_WITH_CARD, {"cards": (CARD, CARD)}, "GPU", "warn", "CUDA_VISIBLE_DEVICES"),
    "every card is hidden": Fault(
        PC_WITH_CARD, {"cards": (), "visible_devices": ""}, "GPU", "warn", "hides every card"
    ),
    "a card without free memory": Fault(
        PC_WITH_CARD, card(memory_free_mib=300.0), "GPU memory", "fail", "300 of 12282"
    ),
    "llama.cpp for another processor": Fault(
        PC,
        {"llama": LlamaAnswer(error="its process is ended by SIGILL")},
        "llama.cpp",
        "fail",
        "build it on this machine",
    ),
    "another llama.cpp": Fault(
        PC,
        {"llama": LlamaAnswer(error="ImportError: llama-cpp-python: expected 0.3.36, found 0.4.0")},
        "llama.cpp",
        "fail",
        "0.4.0",
    ),
    "llama.cpp without CUDA": Fault(
        ORIN_NX, llama(ORIN_NX, gpu_build=False), "llama.cpp", "warn", "built without CUDA"
    ),
    "llama.cpp for another GPU": Fault(
        ORIN_NANO,
        llama(ORIN_NANO, cuda=CudaAnswer(sass=(86,), runtime=12)),
        "llama.cpp",
        "fail",
        "compute capability 8.7: it holds sm_86",
    ),
    "llama.cpp says another GPU": Fault(
        THOR,
        llama(THOR, cuda=None, system_info="CUDA : ARCHS = 870 | NO_VMM = 1 | OPENMP = 1"),
        "llama.cpp",
        "fail",
        "sm_87",
    ),
    "llama.cpp for a newer CUDA": Fault(
        ORIN_NANO, llama(ORIN_NANO, cuda=CudaAnswer(sass=(87,), runtime=13)), "llama.cpp", "fail", "needs CUDA 13"
    ),
    "VMM on a Jetson": Fault(
        AGX_ORIN,
        llama(AGX_ORIN, system_info="CUDA : ARCHS = 870 | USE_GRAPHS = 1 | OPENMP = 1"),
        "NO_VMM",
        "fail",
        "GGML_CUDA_NO_VMM",
    ),
    "no OpenMP": Fault(PC, llama(PC, system_info="CPU : AVX2 = 1 | "), "OpenMP", "warn", "libgomp1"),
    "PyPI's onnxruntime on an Orin": Fault(
        AGX_ORIN, onnx(AGX_ORIN, cuda=PYPI_ARM), "providers", "fail", "NVIDIA's own wheel"
    ),
    "PyPI's onnxruntime on a Thor": Fault(
        THOR, onnx(THOR, cuda=PYPI_ARM), "providers", "fail", "compute capability 11.0"
    ),
    "no cuDNN": Fault(
        PC_WITH_CARD,
        onnx(
            PC_WITH_CARD,
            providers={
                "CPUExecutionProvider": "",
                "CUDAExecutionProvider": "libcudnn.so.9: cannot open shared object file",
            },
        ),
        "providers",
        "fail",
        "libcudnn.so.9",
    ),
    "onnxruntime without CUDA": Fault(
        ORIN_NX,
        onnx(ORIN_NX, providers={"CPUExecutionProvider": ""}, cuda=None),
        "providers",
        "warn",
        "runs on the CPU",
    ),
    "no TensorRT": Fault(
        ORIN_NANO, {"config": boards.CONFIG + "vision: {tensorrt: true}\n"}, "providers", "fail", "TensorRT"
    ),
    "two onnxruntimes": Fault(
        PC_WITH_CARD,
        onnx(PC_WITH_CARD, packages=("onnxruntime", "onnxruntime-gpu")),
        "onnxruntime",
        "fail",
        "pip uninstall -y onnxruntime onnxruntime-gpu",
    ),
    "an old onnxruntime": Fault(ORIN_NANO, onnx(ORIN_NANO, version="1.17.0"), "onnxruntime", "fail", "1.20"),
    "no onnxruntime": Fault(
        RASPBERRY_PI,
        {"onnxruntime": OnnxruntimeAnswer(error="ModuleNotFoundError: no onnxruntime")},
        "onnxruntime",
        "fail",
        "vision.backend to mtmd",
    ),
    "a CPU provider that fails": Fault(
        PC, onnx(PC, providers={"CPUExecutionProvider": "bad allocation"}), "onnxruntime", "fail", "bad allocation"
    ),
    # -- memory
    "too little memory": Fault(
        CONTAINER,
        {"files": {"/proc/meminfo": boards.meminfo(2000, 300)}, "needed_mib": None},
        "memory",
        "fail",
        "300 MiB available",
    ),
    "the bundle does not fit": Fault(
        ORIN_NANO,
        {"memory_error": "5300 MiB needed (…), 2100 MiB free", "needed_mib": None},
        "memory",
        "fail",
        "a smaller bundle",
    ),
    "the plan is reduced": Fault(
        ORIN_NANO, {"reductions": ("vision.backend mtmd",)}, "memory", "warn", "vision.backend mtmd"
    ),
    "a group's limit": Fault(
        CONTAINER,
        {"files": {"/sys/fs/cgroup/memory.max": f"{(1 << 30) + (300 << 20)}\n"}, "needed_mib": None},
        "memory",
        "fail",
        "the limit of a control group",
    ),
    "killed for memory": Fault(
        RASPBERRY_PI, {"files": {"/proc/vmstat": "oom_kill 3\n"}}, "memory kills", "warn", "boot: 3"
    ),
    "killed in the unit": Fault(
        PC, {"files": {f"{GROUP}/memory.events": "oom 1\noom_kill 2\n"}}, "memory kills", "warn", "boot: 2"
    ),
    "limited address space": Fault(
        PC,
        {"files": {"/proc/self/limits": "Max address space         1073741824  1073741824  bytes\n"}},
        "largest block",
        "fail",
        "LimitAS",
    ),
    "strict overcommit": Fault(
        PC,
        {
            "files": {
                "/proc/sys/vm/overcommit_memory": "2\n",
                "/proc/meminfo": boards.meminfo(15_800, 11_000, committed_mib=15_000),
            }
        },
        "largest block",
        "fail",
        "vm.overcommit_memory",
    ),
    "memory in pieces": Fault(
        ORIN_NANO,
        {"files": {"/proc/buddyinfo": "Node 0, zone Normal 90000 4000 100 9 3 1 1 0 0 0 0\n"}},
        "largest block",
        "warn",
        "compact_memory",
    ),
    "swap in use": Fault(
        ORIN_NANO, {"files": {"/proc/meminfo": boards.meminfo(7620, 5400, 3810, 1000)}}, "swap", "warn", "2810 of 3810"
    ),
    "swap on an SD card": Fault(
        RASPBERRY_PI,
        {
            "files": {
                "/proc/swaps": "Filename\n/var/swap file 524272 0 -2\n",
                "/proc/mounts": "/dev/mmcblk0p2 / ext4 rw 0 0\n/dev/sda1 /data ext4 rw 0 0\n",
            }
        },
        "swap",
        "warn",
        "zram",
    ),
}
