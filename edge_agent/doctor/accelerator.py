"""Checks of the GPU: the driver, its memory, and whether llama.cpp and onnxruntime hold code for it."""

from __future__ import annotations

import re

from edge_agent.board.cuda_code import CudaCode, from_build_flags
from edge_agent.doctor.finding import Finding, failed, passed, warned
from edge_agent.doctor.hardware import CUDA_OF_JETPACK, is_container, jetson
from edge_agent.doctor.machine import CudaAnswer, Machine

NVIDIA_VENDOR, DISPLAY_CLASSES = "0x10de", ("0x0300", "0x0302")  # of PCI: VGA, and 3D without a monitor
# Of the GPU's own driver, on Orin and on Thor. /dev/nvmap belongs to another one, and is there without a GPU.
JETSON_NODES = ("/dev/nvhost-gpu", "/dev/nvgpu", "/dev/nvhost-ctrl-gpu", "/dev/nvidia0")
MIN_FREE_MIB = 1024.0  # of a card, if the bundle is not known
CPU_PROVIDER, CUDA_PROVIDER, TENSORRT_PROVIDER = (
    f"{name}ExecutionProvider" for name in ("CPU", "CUDA", "Tensorrt")
)  # fmt: skip
MIN_ONNXRUNTIME = (1, 20)
JETSON_WHEELS = "install NVIDIA's own wheel for this JetPack (docs/jetson.md), not PyPI's"
REINSTALL = "pip install --force-reinstall --no-cache-dir"
BUILD_FLAGS = f'CMAKE_ARGS="-DGGML_CUDA=on -DGGML_CUDA_NO_VMM=ON" {REINSTALL}'
LLAMA_CPP_PYTHON = "llama-cpp-python==0.3.36"


def pci_cards(machine: Machine) -> int:
    """NVIDIA cards on the PCI bus."""
    folder = "/sys/bus/pci/devices"
    return sum(
        machine.line(f"{folder}/{name}/vendor") == NVIDIA_VENDOR
        and machine.line(f"{folder}/{name}/class").startswith(DISPLAY_CLASSES)
        for name in machine.names(folder)
    )


def capabilities(machine: Machine) -> list[int]:
    """Compute capabilities of the GPUs that CUDA can use here."""
    found = jetson(machine)
    if found is not None:
        return [found.capability] if any(machine.exists(node) for node in JETSON_NODES) else []
    return [card.capability for card in machine.answers.cards or () if card.capability is not None]


def has_gpu(machine: Machine) -> bool:
    return bool(capabilities(machine) or machine.answers.cards)


def wants_gpu(machine: Machine) -> bool:
    return machine.config is None or machine.config.language.gpu_layers != 0


def gpu(machine: Machine) -> Finding:
    """The GPU and its driver."""
    board = jetson(machine)
    if board is not None:
        if any(machine.exists(node) for node in JETSON_NODES):
            return passed("GPU", f"{board.family}, compute capability {board.capability / 10:.1f}")
        if is_container(machine):
            return failed("GPU", "the container has no GPU nodes in /dev", "start it with --runtime nvidia")
        return failed(
            "GPU", "no GPU nodes in /dev", "install nvidia-l4t-core and NVIDIA's kernel, then restart the board"
        )
    answers, n_pci = machine.answers, pci_cards(machine)
    driver = machine.exists("/proc/driver/nvidia/version")
    if answers.visible_devices is not None and driver and answers.cards == () and not answers.card_error:
        found = f"CUDA_VISIBLE_DEVICES={answers.visible_devices!r} hides every card"
        return warned("GPU", found, "unset CUDA_VISIBLE_DEVICES, or name a card that exists")
    if answers.cards:
        names = "; ".join(
            card.name + (f", compute capability {card.capability / 10:.1f}" if card.capability else "")
            for card in answers.cards
        )
        if len(answers.cards) > 1:
            remedy = "name one card: CUDA_VISIBLE_DEVICES=0 (Environment= in a drop-in of the unit)"
            return warned("GPU", f"{len(answers.cards)} cards, the model is spread over all of them: {names}", remedy)
        return passed("GPU", names)
    if answers.card_error or (driver and answers.cards == ()):
        if is_container(machine) and not answers.card_error:  # it sees the driver of the machine, and no card
            return failed("GPU", "the container has no NVIDIA card", "start the container with --gpus all")
        why = answers.card_error or "NVML is not installed, or finds no card"
        remedy = "restart the machine; if that does not help, install the driver again. `nvidia-smi` says more"
        return failed("GPU", f"the driver is loaded and does not answer: {why}", remedy)
    if driver:
        return passed("GPU", "NVIDIA's driver is loaded")
    if n_pci and not wants_gpu(machine):
        return passed("GPU", "an NVIDIA card without its driver, not used: language.gpu_layers is 0")
    if n_pci:
        loaded = "nouveau is loaded instead" if "nouveau " in machine.read("/proc/modules") else "no driver is loaded"
        if is_container(machine):
            return failed("GPU", f"an NVIDIA card, and {loaded}", "start the container with --gpus all")
        return failed("GPU", f"an NVIDIA card, and {loaded}", "install NVIDIA's driver, then restart the machine")
    return passed("GPU", "no NVIDIA GPU: the CPU serves")


def gpu_memory(machine: Machine) -> Finding | None:
    """Free memory of each card that is used."""
    known = [card for card in machine.answers.cards or () if card.memory_free_mib is not None]
    if not known or not wants_gpu(machine):
        return None
    needed_mib = machine.answers.needed_mib or MIN_FREE_MIB
    free_mib = sum(card.memory_free_mib or 0.0 for card in known)
    found = ", ".join(
        f"{card.name}: {card.memory_free_mib:.0f} of {card.memory_total_mib or 0:.0f} MiB free" for card in known
    )
    if free_mib < needed_mib:
        what = "for the bundle" if machine.answers.needed_mib else "for any model"
        remedy = "end the other programs on the card (`nvidia-smi` lists them), or set language.gpu_layers to 0"
        return failed("GPU memory", f"{found}; {needed_mib:.0f} MiB needed {what}", remedy)
    return passed("GPU memory", found)


def llama(machine: Machine) -> Finding | None:
    """llama.cpp: loads, was built for this GPU and for this CUDA."""
    answer = machine.answers.llama
    if answer is None:
        return None
    if answer.error:
        return failed("llama.cpp", answer.error, f"build it on this machine: {REINSTALL} {LLAMA_CPP_PYTHON}")
    if not answer.gpu_build:
        if has_gpu(machine) and wants_gpu(machine):
            remedy = f"{BUILD_FLAGS} {LLAMA_CPP_PYTHON}"
            return warned("llama.cpp", "built without CUDA: the GPU is not used", remedy)
        return passed("llama.cpp", f"{answer.version or 'loads'}, for the CPU")
    if not has_gpu(machine):
        return passed("llama.cpp", f"{answer.version or 'loads'}, built with CUDA; the CPU serves")
    code = _llama_code(machine)
    if code is not None and (problem := _mismatch(code, machine)):
        remedy = f"build it on this machine: {BUILD_FLAGS} {LLAMA_CPP_PYTHON}"
        return failed("llama.cpp", problem, remedy)
    return passed("llama.cpp", f"{answer.version or 'loads'}, CUDA for {code.text() if code else 'unknown GPUs'}")


def _llama_code(machine: Machine) -> CudaCode | None:
    """What the library holds; if that is unknown, what llama.cpp says it was built for."""
    answer = machine.answers.llama
    if answer is None:
        return None
    flags = re.search(r"\bARCHS = ([0-9,]+)", answer.system_info)
    listed = from_build_flags(flags.group(1)) if flags else None
    read = _code(answer.cuda) if answer.cuda is not None else None
    if read is not None and (read.sass or read.ptx):
        return read
    return listed._replace(runtime=read.runtime if read else None) if listed is not None else read


def _code(answer: CudaAnswer) -> CudaCode:
    return CudaCode(answer.sass, answer.ptx, answer.runtime)


def _mismatch(code: CudaCode, machine: Machine) -> str:
    """Why CUDA code cannot run here; "": it can, as far as is known."""
    board = jetson(machine)
    driver = machine.answers.cuda_version or (CUDA_OF_JETPACK.get(board.jetpack or 0) if board is not None else None)
    for capability in capabilities(machine) if code.sass or code.ptx else ():
        if not code.runs_on(capability):
            return f"has no code for this GPU, compute capability {capability / 10:.1f}: it holds {code.text()}"
    if code.runtime is not None and driver is not None and code.runtime > driver:
        return f"needs CUDA {code.runtime}, and the driver runs CUDA {driver}"
    return ""


def vmm(machine: Machine) -> Finding | None:
    """Without GGML_CUDA_NO_VMM, llama.cpp reserves 32 GB of addresses. A Jetson can refuse that."""
    answer = machine.answers.llama
    if answer is None or answer.error or not answer.gpu_build or jetson(machine) is None:
        return None
    if "NO_VMM = 1" in answer.system_info:
        return passed("NO_VMM", "llama.cpp was built with it")
    found = "llama.cpp was built without GGML_CUDA_NO_VMM: the first image can end the model process"
    return failed("NO_VMM", found, f"{BUILD_FLAGS} {LLAMA_CPP_PYTHON}")


def openmp(machine: Machine) -> Finding | None:
    answer = machine.answers.llama
    if answer is None or answer.error or not answer.system_info:
        return None
    if "OPENMP = 1" in answer.system_info:
        return passed("OpenMP", "llama.cpp was built with it")
    remedy = "install libgomp1 and g++, then build llama-cpp-python again"
    return warned("OpenMP", "llama.cpp was built without it: its threads keep the cores busy while they wait", remedy)


def onnxruntime(machine: Machine) -> Finding | None:
    """Which onnxruntime is installed, and that it runs on the CPU."""
    answer = machine.answers.onnxruntime
    if answer is None:
        return None
    if len(answer.packages) > 1:
        remedy = f"pip uninstall -y {' '.join(answer.packages)}, then install the one for this machine"
        return failed("onnxruntime", f"installed twice: {', '.join(answer.packages)}", remedy)
    if answer.error:
        if why := _why_not_needed(machine):
            return passed("onnxruntime", f"not usable here, and not needed: {why}")
        remedy = "pip install '.[cpu]', or set vision.backend to mtmd"
        return failed("onnxruntime", answer.error, remedy)
    numbers = re.match(r"([0-9]{1,4})\.([0-9]{1,4})", answer.version)
    if numbers and tuple(map(int, numbers.groups())) < MIN_ONNXRUNTIME:
        return failed("onnxruntime", f"version {answer.version}", "install version 1.20 or newer")
    if answer.providers.get(CPU_PROVIDER, "it is missing"):
        found = f"the CPU's provider does not run a graph: {answer.providers.get(CPU_PROVIDER, 'it is missing')}"
        return failed("onnxruntime", found, "install onnxruntime again")
    package = answer.packages[0] if answer.packages else "onnxruntime"
    return passed("onnxruntime", f"{package} {answer.version}: the CPU's provider runs a graph")


def _why_not_needed(machine: Machine) -> str:
    """Why onnxruntime encodes no image here; "": it does, or that is not known."""
    if machine.answers.has_vision_onnx is False:
        return "the bundle has no vision.onnx"
    config = machine.config
    return "vision.backend is mtmd" if config is not None and config.vision.backend == "mtmd" else ""


def providers(machine: Machine) -> Finding | None:
    """Whether onnxruntime really runs on the GPU. It falls back to the CPU without an error."""
    answer, config = machine.answers.onnxruntime, machine.config
    if answer is None or answer.error or not has_gpu(machine):
        return None
    if _why_not_needed(machine):
        return None
    wheels = JETSON_WHEELS if jetson(machine) else "pip install '.[gpu]' in place of [cpu]"
    problem = _mismatch(_code(answer.cuda), machine) if answer.cuda is not None else ""
    if problem:
        return failed("providers", f"onnxruntime {problem}", wheels)
    if CUDA_PROVIDER not in answer.providers:
        found = "onnxruntime has no CUDA: the vision encoder runs on the CPU"
        return warned("providers", found, f"{wheels}; or set vision.backend to mtmd")
    if why := answer.providers[CUDA_PROVIDER]:
        remedy = f"{wheels}, with the CUDA and cuDNN that it needs; or set vision.backend to mtmd"
        return failed("providers", f"onnxruntime's CUDA does not run a graph: {why}", remedy)
    if config is not None and config.vision.tensorrt and (why := answer.providers.get(TENSORRT_PROVIDER, "missing")):
        return failed(
            "providers", f"TensorRT does not run a graph: {why}", "install TensorRT, or set vision.tensorrt to false"
        )
    return passed("providers", "onnxruntime's CUDA runs a graph")


CHECKS = (gpu, gpu_memory, llama, vmm, openmp, onnxruntime, providers)
