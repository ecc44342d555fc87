"""Machines as tables of files, for `edge-agent doctor`: what their /proc, /sys, /etc and native libraries say.

    machine = boards.ORIN_NANO.machine()                                # healthy
    machine = boards.ORIN_NANO.machine(files={"/proc/meminfo": "…"}, year=1970)   # with something planted
    boards.ORIN_NANO.write(tmp_path)                                    # a tree for `edge-agent doctor --root`

A value None takes a file away. A value that starts with "->" is a symbolic link.
"""

from __future__ import annotations

import posixpath
import stat
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from edge_agent.config import Config, load_config_text
from edge_agent.doctor.machine import (
    Answers,
    CameraAnswer,
    CardAnswer,
    CudaAnswer,
    DiskAnswer,
    LlamaAnswer,
    Machine,
    OnnxruntimeAnswer,
)
from tests.harness import ROOT

Table = dict[str, str | None]
CONFIG_PATH = "/etc/edge-agent.yaml"
CONFIG = """bundle: /var/lib/edge-agent/bundle
camera: {source: /dev/video0}
trusted_keys: [/etc/edge-agent/fleet.pub]
"""
UNIT = (ROOT / "systemd" / "edge-agent.service").read_text()
CGROUP = {
    "/proc/self/mountinfo": "29 23 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw\n",
    "/proc/self/cgroup": "0::/system.slice/edge-agent.service\n",
    "/sys/fs/cgroup/system.slice/edge-agent.service/cpu.max": "max 100000\n",
    "/sys/fs/cgroup/system.slice/edge-agent.service/cpu.stat": "nr_periods 1000\nnr_throttled 0\nthrottled_usec 0\n",
    "/sys/fs/cgroup/system.slice/edge-agent.service/memory.max": "max\n",
    "/sys/fs/cgroup/system.slice/edge-agent.service/memory.current": "500000000\n",
    "/sys/fs/cgroup/system.slice/edge-agent.service/memory.stat": "anon 1\nactive_file 0\ninactive_file 0\n",
    "/sys/fs/cgroup/system.slice/edge-agent.service/memory.events": "low 0\nhigh 0\nmax 0\noom 0\noom_kill 0\n",
}
INSTALLED = {
    CONFIG_PATH: CONFIG,
    "/etc/edge-agent/fleet.pub": "-----BEGIN PUBLIC KEY-----\nMCow\n-----END PUBLIC KEY-----\n",
    "/var/lib/edge-agent/bundle/bundle.json": "{}",
    "/opt/edge-agent/.venv/bin/edge-agent": "#!/opt/edge-agent/.venv/bin/python\n",
    "/etc/systemd/system/edge-agent.service": UNIT,
    "/etc/systemd/system/multi-user.target.wants/edge-agent.service": "->/etc/systemd/system/edge-agent.service",
    "/etc/passwd": "root:x:0:0:root:/root:/bin/bash\nedge-agent:x:998:998::/:/usr/sbin/nologin\n",
    "/etc/group": "root:x:0:\nvideo:x:44:edge-agent\nrender:x:104:edge-agent\nedge-agent:x:998:\n",
    "/run/systemd/timesync/synchronized": "",
    "/run/edge-agent/actions": "",
    "/run/edge-agent/control": "",
    "/etc/fstab": "/dev/root / ext4 defaults 0 1\n",
    "/proc/vmstat": "nr_free_pages 100000\noom_kill 0\n",
    "/proc/self/limits": "Limit Soft Limit Hard Limit Units\nMax address space         unlimited  unlimited  bytes\n",
    "/proc/sys/vm/overcommit_memory": "0\n",
    "/proc/buddyinfo": "Node 0, zone      DMA    120   80   60   40   30   20   12    8    4    2    1\n"
    "Node 0, zone   Normal   1200  800  600  400  300  200  120   80   40   20   90\n",
}
CAMERA = {"/dev/video0": "", "/sys/class/video4linux/video0/name": "HD Pro Webcam C920\n"}
ARM_FLAGS = "fp asimd evtstrm aes crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"


def meminfo(
    total_mib: int, available_mib: int, swap_mib: int = 0, swap_free_mib: int | None = None, committed_mib: int = 900
) -> str:
    free = swap_mib if swap_free_mib is None else swap_free_mib
    rows = {
        "MemTotal": total_mib,
        "MemFree": available_mib // 2,
        "MemAvailable": available_mib,
        "SwapTotal": swap_mib,
        "SwapFree": free,
        "CommitLimit": total_mib,
        "Committed_AS": committed_mib,
    }
    return "".join(f"{name + ':':<16}{1024 * mib:>9} kB\n" for name, mib in rows.items())


def zone(number: int, name: str, temperature_c: float | None, **trips_c: float) -> Table:
    """temperature_c None: reading it fails. trips_c: passive=99, critical=104.5."""
    folder = f"/sys/class/thermal/thermal_zone{number}"
    files: Table = {f"{folder}/type": f"{name}\n", f"{folder}/temp": ""}
    if temperature_c is not None:
        files[f"{folder}/temp"] = f"{round(1000 * temperature_c)}\n"
    for i, (kind, trip_c) in enumerate(trips_c.items()):
        files[f"{folder}/trip_point_{i}_type"] = f"{kind}\n"
        files[f"{folder}/trip_point_{i}_temp"] = f"{round(1000 * trip_c)}\n"
    return files


def rail(hwmon: int, channel: int, label: str, voltage_mv: int, current_ma: int, limit_ma: int = 32760) -> Table:
    folder = f"/sys/class/hwmon/hwmon{hwmon}"
    return {
        f"{folder}/name": "ina3221\n",
        f"{folder}/in{channel}_label": f"{label}\n",
        f"{folder}/in{channel}_input": f"{voltage_mv}\n",
        f"{folder}/curr{channel}_input": f"{current_ma}\n",
        f"{folder}/curr{channel}_crit": f"{limit_ma}\n",
    }


def cooler(number: int, kind: str, state: int = 0) -> Table:
    folder = f"/sys/class/thermal/cooling_device{number}"
    return {f"{folder}/type": f"{kind}\n", f"{folder}/cur_state": f"{state}\n", f"{folder}/max_state": "3\n"}


def cpu(
    n_cores: int,
    governor: str = "schedutil",
    driver: str = "tegra194",
    max_khz: int = 2_000_000,
    flags: str = ARM_FLAGS,
) -> Table:
    key = "Features" if flags == ARM_FLAGS else "flags"
    folder = "/sys/devices/system/cpu/cpufreq/policy0"
    return {
        "/proc/cpuinfo": "".join(f"processor\t: {i}\n{key}\t: {flags}\n\n" for i in range(n_cores)),
        f"{folder}/scaling_governor": f"{governor}\n",
        f"{folder}/scaling_driver": f"{driver}\n",
        f"{folder}/scaling_cur_freq": f"{max_khz // 2}\n",
        f"{folder}/scaling_max_freq": f"{max_khz}\n",
        f"{folder}/cpuinfo_max_freq": f"{max_khz}\n",
    }


def nvpmodel(mode: int, *names: str) -> Table:
    modes = "".join(f"< POWER_MODEL ID={i} NAME={name} >\nCPU_ONLINE CORE_0 1\n\n" for i, name in enumerate(names))
    return {"/etc/nvpmodel.conf": modes, "/var/lib/nvpmodel/status": f"pmode:{mode:04d}\n"}


def tegra(model: str, chip: str, release: tuple[int, str]) -> Table:
    gpu = "/sys/class/devfreq/17000000.gpu"
    return {
        "/proc/device-tree/model": f"{model}\0",
        "/proc/device-tree/compatible": f"nvidia,p3768-0000+p3767\0nvidia,{chip}\0",
        "/etc/nv_tegra_release": f"# R{release[0]} (release), REVISION: {release[1]}, GCID: 38968081, BOARD: generic, "
        "EABI: aarch64, DATE: Wed Jan  8 01:49:37 UTC 2025\n",
        "/proc/sys/kernel/osrelease": "5.15.148-tegra\n" if release[0] == 36 else "6.8.12-tegra\n",
        "/dev/nvmap": "",
        "/dev/nvhost-gpu": "",
        "/dev/dri/renderD128": "",
        f"{gpu}/available_frequencies": "306000000 408000000 612000000 1020000000\n",
        f"{gpu}/max_freq": "1020000000\n",
        f"{gpu}/cur_freq": "612000000\n",
        "/sys/class/hwmon/hwmon5/name": "soctherm_oc\n",
        "/sys/class/hwmon/hwmon5/oc1_event_cnt": "0\n",
        "/sys/class/hwmon/hwmon5/oc2_event_cnt": "0\n",
        **cooler(0, "pwm-fan", 2),
        **cooler(1, "cpufreq-cpu0"),
        **cooler(2, "devfreq-17000000.gpu"),
    }


def emmc(life: str = "0x01 0x01", spare: str = "0x01") -> Table:
    folder = "/sys/block/mmcblk0/device"
    return {f"{folder}/life_time": f"{life}\n", f"{folder}/pre_eol_info": f"{spare}\n"}


class TableFiles:
    """Files of a table, in place of a file system."""

    def __init__(self, table: Table, modes: dict[str, int]) -> None:
        self.table = {path: text for path, text in table.items() if text is not None}
        self.modes = modes

    def read(self, path: str) -> str:
        text = self.table.get(self._real(path), "")
        return "" if text.startswith("->") else text

    def names(self, folder: str) -> list[str]:
        start = folder.rstrip("/") + "/"
        return sorted({path[len(start) :].split("/")[0] for path in self.table if path.startswith(start)})

    def mode(self, path: str) -> int | None:
        path = self._real(path)
        if path in self.modes:
            return self.modes[path]
        if path in self.table:
            return stat.S_IFREG | 0o644
        return stat.S_IFDIR | 0o755 if path == "/" or self.names(path) else None

    def target(self, path: str) -> str | None:
        text = self.table.get(path, "")
        return text[2:] if text.startswith("->") else None

    def _real(self, path: str) -> str:
        target = self.target(path)
        return path if target is None else posixpath.normpath(posixpath.join(posixpath.dirname(path), target))


class Fixture(NamedTuple):
    """One healthy machine."""

    name: str
    files: Table
    answers: Answers
    config: str = CONFIG

    def machine(
        self,
        files: Table | None = None,
        modes: dict[str, int] | None = None,
        config: str | None = None,
        config_error: str = "",
        **answers: Any,
    ) -> Machine:
        """This machine, with other files, modes of files, configuration or answers."""
        table = self.files | (files or {})
        text = self.config if config is None else config
        parsed: Config | None = load_config_text(text, CONFIG_PATH) if text and not config_error else None
        return Machine(
            TableFiles(table, modes or {}),
            msgspec.structs.replace(self.answers, **answers),
            parsed,
            CONFIG_PATH if parsed is not None else "",
            config_error,
        )

    def write(self, root: Path) -> None:
        """The tree that `edge-agent doctor --root` takes."""
        for path, text in (self.files | ({CONFIG_PATH: self.config} if self.config else {})).items():
            if text is None:
                continue
            file = root / path.lstrip("/")
            file.parent.mkdir(parents=True, exist_ok=True)
            if text.startswith("->"):
                file.symlink_to(text[2:])
            else:
                file.write_text(text)
        (root / "machine.json").write_bytes(msgspec.json.encode(self.answers))


def native(cuda: CudaAnswer | None, package: str = "onnxruntime-gpu", no_vmm: bool = True) -> dict[str, Any]:
    """The native libraries of a machine; cuda: the code that both hold, None: for the CPU."""
    archs = ",".join(f"{10 * n}" for n in cuda.sass) if cuda else ""
    info = f"CUDA : ARCHS = {archs} | {'NO_VMM = 1 | ' if no_vmm else ''}USE_GRAPHS = 1 | " if cuda else ""
    providers = {"CPUExecutionProvider": ""} | ({"CUDAExecutionProvider": ""} if cuda else {})
    return {
        "llama": LlamaAnswer(
            version="0.3.36",
            gpu_build=cuda is not None,
            cuda=cuda,
            system_info=f"{info}CPU : NEON = 1 | OPENMP = 1 | REPACK = 1 | ",
        ),
        "onnxruntime": OnnxruntimeAnswer(
            version="1.23.0", packages=(package if cuda else "onnxruntime",), providers=providers, cuda=cuda
        ),
    }


WORKING_CAMERA = CameraAnswer(
    works=True, line="/dev/video0: 640x480 at 30 fps", formats=("YUYV", "MJPG"), clock="driver"
)


def answers(architecture: str, n_cores: int, needed_mib: float, **more: Any) -> Answers:
    fields: dict[str, Any] = {
        "architecture": architecture,
        "python": (3, 10),
        "pointer_bits": 64,
        "n_cores": n_cores,
        "user": "edge-agent",
        "largest_block_mib": 60_000.0,
        "clock_synchronised": True,
        "year": 2026,
        "disks": {
            "/": DiskAnswer(total_mib=60_000, free_mib=30_000, free_files=3_000_000),
            "/var/lib/edge-agent/bundle": DiskAnswer(total_mib=200_000, free_mib=90_000, free_files=9_000_000),
        },
        "camera": WORKING_CAMERA,
        "needed_mib": needed_mib,
        "listening": True,
    }
    return Answers(**(fields | more))


ORIN_CODE, THOR_CODE = CudaAnswer(sass=(87,), runtime=12), CudaAnswer(sass=(110,), runtime=13)
ORIN_NANO = Fixture(
    "Orin Nano",
    tegra("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", "tegra234", (36, "4.3"))
    | INSTALLED
    | CGROUP
    | CAMERA
    | cpu(6, max_khz=1_510_400)
    | {
        "/proc/meminfo": meminfo(7620, 5400, 3810),
        "/proc/swaps": "Filename Type Size Used Priority\n/dev/zram0 partition 650000 0 5\n",
    }
    | zone(0, "cpu-thermal", 48.2, passive=99, critical=104.5)
    | zone(1, "gpu-thermal", 47.5, passive=99, critical=104.5)
    | zone(2, "cv0-thermal", None, passive=99)
    | zone(8, "tj-thermal", 48.4, passive=99)
    | rail(1, 1, "VDD_IN", 5056, 1016, 4000)
    | rail(1, 2, "VDD_CPU_GPU_CV", 5056, 200)
    | nvpmodel(2, "15W", "25W", "MAXN_SUPER", "7W"),
    answers("aarch64", 6, 3500.0, cuda_version=None, **native(ORIN_CODE)),
)
ORIN_NX = Fixture(
    "Orin NX",
    tegra("NVIDIA Jetson Orin NX Engineering Reference Developer Kit", "tegra234", (36, "4.4"))
    | INSTALLED
    | CGROUP
    | cpu(8, max_khz=1_984_000)
    | {
        "/proc/meminfo": meminfo(15655, 12800, 7827),
        "/tmp/argus_socket": "",
        "/dev/video0": "",
        "/etc/systemd/system/edge-agent.service.d/csi.conf": (ROOT / "systemd" / "edge-agent-csi.conf").read_text(),
    }
    | zone(0, "cpu-thermal", 55.0, passive=99, critical=104.5)
    | zone(1, "gpu-thermal", 54.0, passive=99, critical=104.5)
    | rail(1, 1, "VDD_IN", 19000, 420)
    | nvpmodel(0, "MAXN", "10W", "15W", "25W"),
    answers(
        "aarch64",
        8,
        5300.0,
        camera=CameraAnswer(works=True, line="gst: 1280x720 at 30 fps", clock="arrival"),
        **native(ORIN_CODE),
    ),
    config="bundle: /var/lib/edge-agent/bundle\n"
    "camera: {source: 'gst:nvarguscamerasrc ! nvvidconv', width: 1280, height: 720}\n",
)
AGX_ORIN = Fixture(
    "AGX Orin",
    tegra("Jetson AGX Orin Developer Kit", "tegra234", (36, "3.0"))
    | INSTALLED
    | CGROUP
    | CAMERA
    | cpu(12, max_khz=2_201_600)
    | emmc("0x02 0x01")
    | {"/proc/meminfo": meminfo(62841, 55000, 31420)}
    | zone(0, "CPU-therm", 45.0, passive=99)
    | zone(1, "GPU-therm", None, passive=99)
    | zone(2, "CV0-therm", None, passive=99)
    | rail(1, 1, "VDD_GPU_SOC", 19840, 200)
    | rail(1, 2, "VDD_CPU_CV", 19840, 40)
    | rail(1, 3, "VIN_SYS_5V0", 5000, 600)
    | nvpmodel(2, "MAXN", "MODE_15W", "MODE_30W", "MODE_50W"),
    answers("aarch64", 12, 5300.0, **native(ORIN_CODE)),
)
THOR = Fixture(
    "Thor",
    tegra("NVIDIA Jetson AGX Thor Developer Kit", "tegra264", (38, "2.1"))
    | INSTALLED
    | CGROUP
    | CAMERA
    | cpu(14, max_khz=2_601_000)
    | {"/proc/meminfo": meminfo(125_800, 118_000)}
    | zone(0, "cpu-thermal", 41.0, passive=105, critical=113)
    | zone(1, "gpu-thermal", 40.0, passive=105)
    | nvpmodel(1, "MAXN", "120W", "90W", "70W", "40W"),
    answers(
        "aarch64",
        14,
        9000.0,
        python=(3, 12),
        cuda_version=13,
        cards=(CardAnswer(name="NVIDIA Thor", capability=110),),
        **native(THOR_CODE),
    ),
)
RASPBERRY_PI = Fixture(
    "Raspberry Pi 5",
    INSTALLED
    | CGROUP
    | CAMERA
    | cpu(4, "ondemand", "cpufreq-dt", 2_400_000)
    | {
        "/proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
        "/proc/device-tree/compatible": "raspberrypi,5-model-b\0brcm,bcm2712\0",
        "/proc/meminfo": meminfo(8062, 7200, 512),
        "/proc/swaps": "Filename Type Size Used Priority\n/dev/zram0 partition 524272 0 100\n",
        "/sys/class/hwmon/hwmon2/name": "rpi_volt\n",
        "/sys/class/hwmon/hwmon2/in0_lcrit_alarm": "0\n",
        "/dev/dri/renderD128": "",
    }
    | zone(0, "cpu-thermal", 58.0, critical=110, active=50),
    answers("aarch64", 4, 3500.0, python=(3, 11), **native(None)),
)
PC = Fixture(
    "x86 without a card",
    INSTALLED
    | CGROUP
    | CAMERA
    | cpu(8, "powersave", "intel_pstate", 4_200_000, "fpu sse4_2 avx f16c fma avx2 bmi2")
    | {
        "/sys/class/dmi/id/sys_vendor": "LENOVO\n",
        "/sys/class/dmi/id/product_name": "20XW\n",
        "/sys/devices/system/cpu/cpufreq/policy0/energy_performance_preference": "balance_performance\n",
        "/proc/meminfo": meminfo(15_800, 11_000, 2048),
        "/proc/swaps": "Filename Type Size Used Priority\n/swapfile file 2097148 0 -2\n",
        "/proc/mounts": "/dev/nvme0n1p2 / ext4 rw 0 0\n",
        "/sys/class/thermal/thermal_zone9/type": "iwlwifi_1\n",
    }
    | zone(0, "acpitz", 51.0, critical=128)
    | zone(1, "x86_pkg_temp", 52.0, passive=0)
    | cooler(0, "Processor"),
    answers("x86_64", 8, 3500.0, python=(3, 12), **native(None)),
)
CARD = CardAnswer(
    name="NVIDIA RTX A2000",
    capability=86,
    memory_total_mib=12_282,
    memory_free_mib=11_600,
    temperature_c=44.0,
    throttle_at_c=90.0,
    throttle_reasons=(),
    power_w=22.0,
)
PC_WITH_CARD = Fixture(
    "x86 with a card",
    PC.files
    | {
        "/proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX  580.65.06\n",
        "/dev/nvidia0": "",
        "/sys/bus/pci/devices/0000:01:00.0/vendor": "0x10de\n",
        "/sys/bus/pci/devices/0000:01:00.0/class": "0x030000\n",
    },
    answers(
        "x86_64",
        8,
        5300.0,
        python=(3, 12),
        cards=(CARD,),
        cuda_version=13,
        **native(CudaAnswer(sass=(75, 80, 86, 89), ptx=(90,), runtime=13), no_vmm=False),
    ),
)
CONTAINER = Fixture(
    "container",
    cpu(16, "performance", "amd-pstate-epp", 4_800_000, "fpu avx avx2 fma f16c")
    | {
        "/.dockerenv": "",
        "/proc/meminfo": meminfo(64_000, 40_000),
        "/proc/1/cgroup": "0::/\n",
        "/proc/self/mountinfo": CGROUP["/proc/self/mountinfo"],
        "/proc/self/cgroup": "0::/\n",
        "/sys/fs/cgroup/cpu.max": "400000 100000\n",
        "/sys/fs/cgroup/memory.max": f"{8 << 30}\n",
        "/sys/fs/cgroup/memory.current": f"{1 << 30}\n",
        "/sys/fs/cgroup/memory.stat": "active_file 0\ninactive_file 0\n",
        "/etc/passwd": "root:x:0:0:root:/root:/bin/bash\n",
        "/etc/group": "root:x:0:\nvideo:x:44:\n",
    },
    answers(
        "x86_64",
        16,
        3500.0,
        python=(3, 12),
        user="root",
        camera=None,
        listening=False,
        clock_synchronised=False,
        **native(None),
    ),
    config="",
)
BOARDS = (ORIN_NANO, ORIN_NX, AGX_ORIN, THOR, RASPBERRY_PI, PC, PC_WITH_CARD, CONTAINER)
