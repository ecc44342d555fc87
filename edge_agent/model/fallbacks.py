"""What runs in another way than was asked for. Native libraries fall back without an error; each case is one log line.

Pure: facts of the loaded model in, lines out.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from edge_agent.config import Config
from edge_agent.profile import ResolvedSwitches

CPU_PROVIDER = "CPUExecutionProvider"


class LanguageFacts(NamedTuple):
    """How llama.cpp really runs the language model."""

    gpu_layers: int  # on a GPU
    layers: int  # of the model, as llama.cpp counts them; 0: unknown
    is_gpu_build: bool  # llama.cpp was built for GPUs
    has_openmp: bool
    mlock_failed: bool

    @property
    def backend(self) -> str:
        """For the status."""
        return f"llama.cpp GPU, {self.gpu_layers} of {self.layers} layers" if self.gpu_layers else "llama.cpp CPU"


def language_facts(log: list[str], system_info: str, *, is_gpu_build: bool) -> LanguageFacts:
    """log: llama.cpp's lines while it loads a model. system_info: of llama_print_system_info."""
    offloaded = re.search(r"offloaded ([0-9]+)/([0-9]+) layers to GPU", "\n".join(log))
    gpu_layers, layers = map(int, offloaded.groups()) if offloaded else (0, 0)
    return LanguageFacts(
        gpu_layers=gpu_layers,
        layers=layers,
        is_gpu_build=is_gpu_build,
        has_openmp="OPENMP = 1" in system_info,
        mlock_failed=any("failed to mlock" in line for line in log),
    )


def find_fallbacks(
    config: Config, switches: ResolvedSwitches, language: LanguageFacts, vision_asked: str, vision_runs: str
) -> list[str]:
    """One line per fallback. vision_asked, vision_runs: the first execution provider of onnxruntime that was asked for,
    and the one that runs; both "" with mtmd."""
    asked, lines = config.language.gpu_layers, []
    missing = "finds no GPU that it may use" if language.is_gpu_build else "was built without a GPU"
    if not language.gpu_layers and (asked > 0 or (asked < 0 and language.is_gpu_build)):
        lines.append(f"language.gpu_layers is {asked}, but the model runs on the CPU: llama.cpp {missing}")
    elif asked != 0 and 0 < language.gpu_layers < (language.layers if asked < 0 else min(asked, language.layers)):
        lines.append(
            f"language.gpu_layers is {asked}, but {language.gpu_layers} of {language.layers} layers are on the GPU; "
            "the others run on the CPU"
        )
    if vision_asked != vision_runs:
        lines.append(
            f"the vision encoder runs by {vision_runs}: onnxruntime could not start {vision_asked}; its libraries or "
            "the GPU are missing, or the unit keeps the GPU away"
        )
    if switches.mlock and language.mlock_failed:
        lines.append("advanced.mlock: the weights are not locked in memory; set LimitMEMLOCK=infinity in the unit")
    if not language.has_openmp:
        lines.append("llama.cpp was built without OpenMP: its threads keep the cores busy while they wait")
    if config.profile == "reproducible" and not switches.reproducible:
        where = "with flash attention" if switches.flash_attention else "with the kernels of this CPU"
        where = "on a GPU" if language.gpu_layers else where
        lines.append(f"profile: reproducible is not possible {where}; ties between tokens may depend on the draft")
    return lines
