"""Freeze what transformers computes for toy checkpoints into CASE.npz beside this file, for the parity tests.

The tests only read the frozen files; this script is run by hand, when tests/harness/toy.py or a case changes. It needs
torch, transformers, accelerate (transformers asks for it before it reads fp8) and mistral-common:

    python tests/reference/make_reference.py

Everything is computed in float32 with eager attention on the CPU. bf16 weights become float32 unchanged; fp8 weights
are dequantised by transformers itself while loading at float32, which gives q · weight_scale_inv without rounding the
product to bf16; activation_scale plays no part. Images go in at sizes on the 28-pixel grid: nothing is resized here,
and transformers' image processor is not involved.

Keys of a file (logits belong to the last 8 positions; image keys repeat for each size, named HEIGHTxWIDTH):
    arguments                 JSON: the keyword arguments of toy.write_checkpoint
    versions                  JSON: what computed the numbers
    image_seed, image_sizes   for toy.toy_image: a number and (n, 2) heights and widths in pixels
    text_ids, text_logits                                    (n,) int32, (8, vocab) float32
    HxW_ids, HxW_features, HxW_logits                        the same; features: (rows, hidden) float32, no breaks
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from transformers import Mistral3ForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.harness import toy, toy_layout

HERE = Path(__file__).resolve().parent

# Seeds were searched for clear answers: at every last position the best token leads by 5 % of the range of logits or
# more. (At some earlier positions it does not: compare the argmax there only where the lead allows.)
# A vocabulary of 2048 keeps the files small.
CASES = {
    "bf16_tied": {"seed": 40, "vocab": 2048},
    "bf16_untied": {"seed": 15, "vocab": 2048, "tied": False},
    "fp8_tied": {"seed": 32, "vocab": 2048, "dtype": "fp8"},
    "fp8_untied": {"seed": 27, "vocab": 2048, "dtype": "fp8", "tied": False, "rope_theta": 1e9},
    # The text passes positions 64, 128 and 192: in no other case do the queries scale.
    "short_context": {"seed": 66, "vocab": 2048, "original_context": 64},
    "mistral_untied": {"seed": 49, "vocab": 2048, "tied": False, "family": "mistral", "rope_theta": 1e9},
}
IMAGE_SIZES = [(112, 112), (140, 196), (224, 84)]  # height, width: square, wide and tall, all on the 28-pixel grid
IMAGE_SEED = 7
N_KEPT = 8  # positions whose logits are stored, counted from the end

SYSTEM = "You steer a small vehicle. Answer with one action."
SENTENCE = (
    "The corridor ahead is 12.5 m long and 3 m wide; a person in a red jacket walks towards us on the left side, "
    "slowly, and a door at the far end is half open. Élise says: « attends, puis avance ». 천천히 앞으로 가세요. "
    "Keep 0.75 m away from everything, pass on the right, stop at the door, and say what you see behind it."
)
QUESTION = "Where is the bright disc, and how far may we go?"


def image_ids(height, width):
    """Row by row, a break between rows and one end: (rows · columns + rows) ids."""
    row = [toy_layout.IMG] * (width // toy_layout.GRID_PX)
    n_rows = height // toy_layout.GRID_PX
    return ([*row, toy_layout.IMG_BREAK]) * (n_rows - 1) + row + [toy_layout.IMG_END]


def prompt_ids(tokenizer, image, words):
    """The released layout, with the image (a list of ids, empty for none) first inside [INST]."""

    def special(name):
        return [tokenizer.get_special_token(name)]

    def encode(text):
        return tokenizer.encode(text, bos=False, eos=False)

    return (
        special("<s>")
        + special("[SYSTEM_PROMPT]")
        + encode(SYSTEM)
        + special("[/SYSTEM_PROMPT]")
        + special("[INST]")
        + image
        + encode(words)
        + special("[/INST]")
    )


def pixel_values(image):
    """(height, width, 3) uint8 RGB → (1, 3, height, width) float32."""
    pixels = (image.astype(np.float32) / np.float32(255) - np.float32(toy_layout.PIXEL_MEAN)) / np.float32(
        toy_layout.PIXEL_STD
    )
    return torch.from_numpy(pixels.transpose(2, 0, 1)[None].copy())


def load(folder):
    model, report = Mistral3ForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    if any(report.values()):
        raise ValueError(f"{folder}: transformers expects other tensors: {report}")
    # From fp8 checkpoints transformers leaves the tensors that are not quantised in bf16, whatever dtype was asked for.
    return model.float().eval()


@torch.inference_mode()
def logits_of(model, ids, **image):
    """(8, vocab) float32 for the last positions."""
    return model(input_ids=torch.tensor([ids]), **image).logits[0, -N_KEPT:].numpy()


@torch.inference_mode()
def features_of(model, **image):
    """(rows, hidden) float32: the image after the projector."""
    return model.get_image_features(**image).pooler_output[0].numpy()


def image_inputs(height, width, seed):
    return {
        "pixel_values": pixel_values(toy.toy_image(height, width, seed)),
        "image_sizes": torch.tensor([[height, width]]),
    }


def margins(logits):
    """(8,): the lead of the best token over the second, as a part of the whole range of logits."""
    ordered = np.sort(logits, axis=-1)
    return (ordered[:, -1] - ordered[:, -2]) / (ordered[:, -1] - ordered[:, 0])


def compute(arguments):
    """(the arrays of one case, its line for the reader)."""
    with tempfile.TemporaryDirectory() as folder:
        toy.write_checkpoint(Path(folder), **arguments)
        tokenizer = Tekkenizer.from_file(Path(folder) / "tekken.json")
        model = load(folder)

    versions = {module.__name__: module.__version__ for module in (transformers, torch, np)}
    ids = prompt_ids(tokenizer, [], SENTENCE)
    arrays = {
        "arguments": np.array(json.dumps(arguments)),
        "versions": np.array(json.dumps(versions)),
        "image_seed": np.array(IMAGE_SEED),
        "image_sizes": np.array(IMAGE_SIZES, dtype=np.int32),
        "text_ids": np.array(ids, dtype=np.int32),
        "text_logits": logits_of(model, ids),
    }
    line = f"text n={len(ids)} margin={_margin_text(arrays['text_logits'])}"
    for height, width in IMAGE_SIZES:
        key = f"{height}x{width}"
        image = image_inputs(height, width, IMAGE_SEED)
        ids = prompt_ids(tokenizer, image_ids(height, width), QUESTION)
        logits = logits_of(model, ids, **image)
        arrays |= {
            f"{key}_ids": np.array(ids, dtype=np.int32),
            f"{key}_features": features_of(model, **image),
            f"{key}_logits": logits,
        }
        other = logits_of(model, ids, **image_inputs(height, width, IMAGE_SEED + 1))
        change = np.abs(other - logits).mean() / logits.std()
        line += f" | {key} n={len(ids)} margin={_margin_text(logits)} change={change:.2f}"
    return arrays, line


def _margin_text(logits):
    lead = margins(logits)
    return f"{lead[-1]:.3f} ({(lead >= 0.05).sum()} of {N_KEPT} above 0.05, least {lead.min():.4f})"


def save(path, arrays):
    """Atomically: a test that runs meanwhile reads the old file or the new one."""
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez_compressed(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def main():
    torch.set_num_threads(1)  # one order of summation, so that a rerun changes no byte
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(
        "margin: top-1 minus top-2 at the last position, as a part of the range of logits; "
        "change: mean |difference| of logits for another image, in standard deviations"
    )
    n_bytes = 0
    for name, arguments in CASES.items():
        arrays, line = compute(arguments)
        path = HERE / f"{name}.npz"
        save(path, arrays)
        n_bytes += path.stat().st_size
        print(f"{name}: {line}")
    print(f"{len(CASES)} files, {n_bytes} bytes")


if __name__ == "__main__":
    main()
