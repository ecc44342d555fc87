"""Everything that is decided before the first byte is written: which checkpoint, which types, which formats."""

from __future__ import annotations

from typing import Any

import llama_cpp
import msgspec

import edge_agent
from edge_agent.bundle.gguf_package import gguf
from quantize.formats.ggml_kernels import Type
from quantize.formats.imatrix import Imatrix
from quantize.source.checkpoint import Checkpoint, fingerprint
from quantize.source.hf_config import CheckpointError
from quantize.source.tensor_names import TensorSpec
from quantize.source.tokenizer import Tokenizer, read_tokenizer

INT8 = "int8"  # a format of vision.onnx alone
FLOAT_TYPES = {  # --type -> (GGUF tensor type, llama.cpp's file type)
    "bf16": (Type.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "f16": (Type.F16, gguf.LlamaFileType.MOSTLY_F16),
    "f32": (Type.F32, gguf.LlamaFileType.ALL_F32),
    "q8_0": (Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),  # of mmproj.gguf alone
}
# llama.cpp's convolution does not take bfloat16. Its own files keep these two at float32 unless they are float16.
CONVOLUTIONS = ("v.patch_embd.weight", "mm.patch_merger.weight")
BYTES_PER_WEIGHT = {"bf16": 2.0, "f16": 2.0, "f32": 4.0, INT8: 1.0, "q8_0": 34 / 32}


class VisionFormat(msgspec.Struct, frozen=True):
    """How the vision encoder is stored, once for onnxruntime and once for llama.cpp."""

    onnx: str = "bf16"  # vision.onnx: bf16, f16, f32 or int8
    mmproj: str = "bf16"  # mmproj.gguf: bf16, f16, f32 or q8_0
    fixed: tuple[int, int] | None = None  # height and width, pixels: the only size that vision.onnx takes

    @property
    def needs_reference(self) -> bool:
        """Whether vision.onnx loses precision, so that validation needs a second, lossless encoder."""
        return self.onnx in ("f16", INT8)

    @property
    def bytes_per_weight_while_building(self) -> float:
        """Of everything that is written, the reference of the validation included."""
        written = BYTES_PER_WEIGHT[self.onnx] + BYTES_PER_WEIGHT[self.mmproj]
        return written + (BYTES_PER_WEIGHT["bf16"] if self.needs_reference else 0.0)


class BuildPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What is written, complete: the same plan gives the same bytes."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    name: str  # of the recipe; the manifest's `recipe`
    types: dict[str, Type]  # GGUF name -> type, of every text tensor
    file_type: int  # llama.cpp's number for the mixture of types, written to language.gguf
    vision: VisionFormat = VisionFormat()
    imatrix: Imatrix | None = None
    facts: dict[str, Any] = {}  # more for report.json

    def fingerprint(self) -> str:
        """Of everything that the files depend on."""
        types = {name: kind.name for name, kind in self.types.items()}
        imatrix = self.imatrix.digest() if self.imatrix is not None else ""
        versions = (edge_agent.__version__, llama_cpp.__version__)
        return fingerprint(self.checkpoint, versions, types, self.file_type, self.vision, imatrix)


def plan_conversion(checkpoint: Checkpoint, kind: str, tokenizer: Tokenizer | None = None) -> BuildPlan:
    """All three files at bf16, f16 or f32. tokenizer: if it is read already. Raises CheckpointError."""
    return BuildPlan(
        checkpoint=checkpoint,
        tokenizer=tokenizer or read_tokenizer(checkpoint.folder, checkpoint.text.vocab),
        name=kind,
        types=uniform_types(checkpoint, checkpoint.text_tensors, kind),
        file_type=FLOAT_TYPES[kind][1],
        vision=VisionFormat(kind, kind),
    )


def uniform_types(checkpoint: Checkpoint, specs: list[TensorSpec], kind: str) -> dict[str, Type]:
    """GGUF name -> type: every matrix in one type (a key of FLOAT_TYPES), vectors in float32."""

    def type_of(spec: TensorSpec) -> Type:
        shape = checkpoint.shape(spec)
        if len(shape) == 1:
            return Type.F32
        if kind == "q8_0" and (spec.gguf in CONVOLUTIONS or shape[-1] % 32):
            return Type.F16
        return Type.F32 if spec.gguf in CONVOLUTIONS and kind == "bf16" else FLOAT_TYPES[kind][0]

    return {spec.gguf: type_of(spec) for spec in specs}


def check_fixed_size(checkpoint: Checkpoint, fixed: tuple[int, int]) -> None:
    """Whether vision.onnx can have this one frame size, (height, width) in pixels. Raises CheckpointError."""
    v = checkpoint.vision
    if v is None:
        raise CheckpointError(f"--fixed: {checkpoint.folder} is a text-only model; leave it out")
    token_side = v.patch * v.merge  # pixels
    if any(side % token_side or not token_side <= side <= v.image_size for side in fixed):
        raise CheckpointError(
            f"--fixed: expected sides that are multiples of {token_side}, up to {v.image_size}, found "
            f"{fixed[0]}x{fixed[1]}"
        )
