"""Store the answers of transformers with the trained checkpoint in pad_pilot.npz, for tests/models/test_pad_pilot.py.

Run by hand when models/pad_pilot/checkpoint changes. It needs torch, transformers and the packages of the tests:

    python tests/reference/make_pad_pilot.py

transformers loads the folder by itself (config, weights, tokenizer.json). It decodes greedily in float32, without a
grammar and without the model code of this project. Pictures are on the 28-pixel grid: no picture is resized.

Keys: pictures (n, 140, 140, 3) uint8; instructions, questions, actions, words: (n,) text; margins (n, 2) float32: the
smallest lead of the chosen token over the next in the action and in the words; versions: JSON.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import Mistral3ForConditionalGeneration, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from edge_agent.actions.prompt import describe_action_space  # noqa: E402
from edge_agent.actions.space import load_action_space  # noqa: E402
from edge_agent.model.prompt import ACTION_QUESTION, SYSTEM_PROMPT  # noqa: E402
from models.pad_pilot.lessons import Grounds, held_out_photographs, lesson  # noqa: E402

CHECKPOINT = ROOT / "models" / "pad_pilot" / "checkpoint"
N, SEED, LONGEST = 16, 60_000_000, 64
BOS, EOS, INST, INST_END, IMG, IMG_BREAK, IMG_END, SYSTEM, SYSTEM_END = 1, 2, 3, 4, 10, 12, 13, 17, 18
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def answer(model, tokenizer, picture: np.ndarray, instruction: str, question: str) -> tuple[str, float]:
    """The model's greedy answer, and the smallest lead of a chosen token over the next best."""
    space = describe_action_space(load_action_space("velocity_body"))

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    lines, columns = (side // 28 for side in picture.shape[:2])
    image = ([IMG] * columns + [IMG_BREAK]) * (lines - 1) + [IMG] * columns + [IMG_END]
    prompt = [
        BOS,
        SYSTEM,
        *encode(SYSTEM_PROMPT.format(space=space, instruction=instruction)),
        SYSTEM_END,
        INST,
        *image,
    ]
    prompt += [*encode(question), INST_END]
    pixels = torch.from_numpy(((picture.astype(np.float32) / 255 - MEAN) / STD).transpose(2, 0, 1)[None].copy())
    sizes = torch.tensor([picture.shape[:2]])
    tokens, lead = [], float("inf")
    with torch.no_grad():
        while len(tokens) < LONGEST:
            logits = model(input_ids=torch.tensor([prompt + tokens]), pixel_values=pixels, image_sizes=sizes).logits[
                0, -1
            ]
            best, next_best = torch.topk(logits, 2).values.tolist()
            lead = min(lead, best - next_best)
            tokens.append(int(logits.argmax()))
            if tokens[-1] == EOS:
                break
    return tokenizer.decode(tokens, skip_special_tokens=True), lead


def main() -> None:
    model = Mistral3ForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(CHECKPOINT / "tokenizer.json"))
    grounds = [Grounds([], SEED), Grounds(held_out_photographs(), SEED, only_photographs=True)]
    columns: dict[str, list] = {
        key: [] for key in ("pictures", "instructions", "questions", "actions", "words", "margins")
    }
    i = 0
    while len(columns["pictures"]) < N:
        example = lesson(np.random.default_rng([SEED, i]), grounds[i % 2], n_orders=1, n_questions=1)
        i += 1
        if not example.exercises or not example.exercises[0].exchanges:
            continue
        exercise = example.exercises[0]
        question = exercise.exchanges[0].question
        action, lead = answer(model, tokenizer, example.picture, exercise.instruction, ACTION_QUESTION)
        words, words_lead = answer(model, tokenizer, example.picture, exercise.instruction, question)
        for key, value in zip(
            columns, (example.picture, exercise.instruction, question, action, words, (lead, words_lead)), strict=True
        ):
            columns[key].append(value)
        print(
            f"{exercise.instruction} | {action} ({lead:.2f}) | {question} {words} ({words_lead:.2f})",
            f"right: {exercise}",
            flush=True,
        )
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    arrays = {key: np.array(values) for key, values in columns.items()}
    arrays["margins"] = arrays["margins"].astype(np.float32)
    np.savez_compressed(Path(__file__).with_name("pad_pilot.npz"), **arrays, versions=json.dumps(versions))


if __name__ == "__main__":
    main()
