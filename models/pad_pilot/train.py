"""Train the pilot from random weights: a small Ministral 3 that finds pads, follows orders and answers questions.

    python -m models.pad_pilot.train OUT                  about two hours on 2 cores with bf16; run it again to resume
    python -m models.pad_pilot.train OUT --until 300      the first quarter of an hour, for a first look at the curve

Training needs torch and the vocabulary of mistral-common. Running the model needs neither. Every picture and sentence
is made during training (lessons.py) from the seed and the number of the step, in the prompt layout of the runtime
(rows.py).

There are three stages. The first trains the vision tower alone, on the content of each 28-pixel cell. The second trains
the whole model. The third is short and adds cases that are rare in the second. These are pads in the middle of the
picture, where only the order decides between holding, descending and landing, and the bands of the rule (task.py).

The second and third stage have auxiliary losses. Linear readers (READERS) predict the content of each cell, its line
and column, and the cell that an order or a question is about. The checkpoint does not contain the readers. Without them
the model learns the action type long before it learns the position. Optimisers: Muon for matrices (torch.optim.Muon;
Jordan 2024), AdamW for the other tensors. The learning rate is constant, then falls linearly to zero.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

# Set before torch is imported. Training is 20 % faster, because small matrix products wait for each other.
os.environ.setdefault("OMP_WAIT_POLICY", "ACTIVE")

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file

from edge_agent.bundle.manifest import VisionInfo
from edge_agent.model.preprocess import Preprocessor
from models.pad_pilot.lessons import Grounds, lesson, training_photographs
from models.pad_pilot.network import MEAN, SIZES, STD, encode_pictures, hidden_states, norm
from models.pad_pilot.rows import NO_CELL, Rows, Tokenizer, cells
from models.pad_pilot.scene import COLOURS, SHAPES

PICTURES, ORDERS = 16, 3  # per step; the first stage takes as many pictures as the second has rows
SIZES_PX = [  # (height, width) of pictures, and their share
    ((140, 140), 0.85),  # 5 by 5 cells
    ((126, 168), 0.15),  # 4 by 6 cells
]
CELL_PX, MAX_CELLS = 28, 25
STAGES = ("vision", "whole", "edges")
VISION_STEPS, STEPS, EDGE_STEPS = 1200, 8000, 1000
LEARNING_RATE, WARM_UP, DECAY = 4e-3, 150, 0.45  # DECAY: the share of the steps in which the rate falls
RATE_SHARES = (1.0, 1.0, 0.2)  # share of the learning rate, by stage
# Share of the rate for the vision tower after the first stage. With the full rate it forgets what it has learnt.
VISION_RATE_LATER = 0.1
# Weights of the readers' losses after the first stage. They fall with the learning rate.
READER_WEIGHTS = {"cell": 0.5, "early": 0.25, "match": 0.5, "aim": 0.5}
N_COLOURS = 1 + len(COLOURS)  # the first: no pad
N_CELL = N_COLOURS + len(SHAPES) + 3
N_LINES = 6  # the most lines or columns of a grid
REPORT_EVERY, VALIDATE_EVERY = 50, 250
VALIDATION_SEED = 10**6
READERS = {  # outputs of the linear readers
    "cell": N_CELL,  # after the projector: the content of the cell
    "early": 2 * N_LINES + N_CELL,  # after layer 2, at the picture's tokens: line, column, and content
    "match": 1,  # after layer 3, at the picture's tokens: whether the cell contains the pad that the instruction names
    "aim": NO_CELL + 1,  # after layer 4, at the end of a question: the cell of the pad in question
}

Tensors = dict[str, torch.Tensor]


class Batches:
    """The lessons of any step. They depend only on the seed and the number of the step."""

    def __init__(self, rows: Rows, seed: int, device: torch.device) -> None:
        self.rows, self.seed, self.device = rows, seed, device
        self.grounds = Grounds(training_photographs(), seed)
        vision_info = VisionInfo(patch=14, merge=2, image_size=1540, mean=tuple(MEAN.tolist()), std=tuple(STD.tolist()))
        self.preprocessor = Preprocessor(vision_info, MAX_CELLS)

    def make(
        self, step: int, n_pictures: int, n_orders: int, size: int | None = None, edge_cases: bool = False
    ) -> Tensors:
        """size: index in SIZES_PX; None: random. edge_cases: see lesson()."""
        rng = np.random.default_rng([self.seed, step])
        which = rng.choice(len(SIZES_PX), p=[share for _, share in SIZES_PX]) if size is None else size
        size_px = SIZES_PX[which][0]
        lessons = [
            lesson(rng, self.grounds, n_orders, size_px=size_px, crowded=not n_orders, edge_cases=edge_cases)
            for _ in range(n_pictures)
        ]
        pictures = np.stack([self.preprocessor.image(example.picture).copy() for example in lessons])
        grid = pictures.shape[1] // CELL_PX, pictures.shape[2] // CELL_PX
        arrays = {"pictures": pictures, **cells(lessons, grid)}
        if n_orders:
            arrays |= self.rows.lay_out(lessons, grid)
        return {key: torch.from_numpy(np.ascontiguousarray(value)).to(self.device) for key, value in arrays.items()}


# -- losses ------------------------------------------------------------------------------------------------------------


def cell_loss(guess: torch.Tensor, cell_targets: Tensors) -> torch.Tensor:
    """Loss of content and position in each cell.

    guess (n, lines, columns, N_CELL); cell_targets: from rows.cells().
    """
    guess, has_pad = guess.float(), (cell_targets["cell_colour"] > 0).float()
    colours, shapes, where = guess.split([N_COLOURS, len(SHAPES), 3], -1)
    colour_target, shape_target = cell_targets["cell_colour"].flatten(), cell_targets["cell_shape"].flatten()
    colour = F.cross_entropy(colours.flatten(0, 2), colour_target, reduction="none").view_as(has_pad)
    shape = F.cross_entropy(shapes.flatten(0, 2), shape_target, reduction="none").view_as(has_pad)
    off = (where - cell_targets["cell_where"]).abs().sum(-1)
    weight = 1 + 3 * has_pad
    return (colour * weight).sum() / weight.sum() + ((shape + off) * has_pad).sum() / (has_pad.sum() + 1)


def vision_loss(w: Tensors, reader: torch.Tensor, batch: Tensors) -> torch.Tensor:
    return cell_loss(F.linear(encode_pictures(w, batch["pictures"], SIZES), reader), batch)


def lesson_loss(
    w: Tensors, readers: Tensors, batch: Tensors, prefix: torch.Tensor, config: dict, reader_weight: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the loss, the logits at the targets (n, vocab), the targets (n,).

    reader_weight: None omits the readers.
    """
    image_embeddings = encode_pictures(w, batch["pictures"], SIZES)
    embedding = w["language_model.model.embed_tokens.weight"]
    tokens, branch, picture = batch["tokens"], batch["branch"], batch["picture"]
    (n, t), (lines, columns), device = tokens.shape, image_embeddings.shape[1:3], tokens.device
    cell = torch.arange(lines, device=device)[:, None] * (columns + 1) + torch.arange(columns, device=device)
    at_cell = (batch["image_at"][:, None] + cell.flatten())[..., None].expand(-1, -1, embedding.shape[1])
    x = F.embedding(tokens, embedding)
    x = x.scatter(1, at_cell, image_embeddings.flatten(1, 2)[picture].to(x.dtype))
    before = torch.ones(t, t, dtype=torch.bool, device=device).tril()
    is_visible = (branch[:, :, None] == branch[:, None]) | (branch[:, None] == 0)
    bias = torch.zeros(n, t, t, dtype=image_embeddings.dtype, device=device).masked_fill(~(before & is_visible), -1e4)
    positions = prefix.shape[1] + batch["position"]
    layers = hidden_states(w, F.embedding(prefix, embedding), x, positions, bias, config, SIZES)
    at = batch["targets"] >= 0
    logits = F.linear(norm(layers[-1][at], w["language_model.model.norm.weight"]), embedding).float()
    targets = batch["targets"][at]
    loss = F.cross_entropy(logits, targets)
    if reader_weight is not None:
        at_cells = [layer.gather(1, at_cell) for layer in layers[1:3]]
        auxiliary = reader_losses(readers, batch, image_embeddings, at_cells, layers[3])
        loss = loss + reader_weight * sum(READER_WEIGHTS[name] * value for name, value in auxiliary.items())
    return loss, logits, targets


def reader_losses(
    readers: Tensors, batch: Tensors, image_embeddings: torch.Tensor, at_cells: list[torch.Tensor], late: torch.Tensor
) -> Tensors:
    """The loss of each reader.

    at_cells: (n, cells, hidden) after layers 2 and 3; late: (n, tokens, hidden) after layer 4.
    """
    (lines, columns), n, device = image_embeddings.shape[1:3], len(late), late.device
    guess = F.linear(at_cells[0], readers["early"]).view(n, lines, columns, -1).float()
    line = torch.arange(lines, device=device)[None, :, None].expand(n, lines, columns)
    column = torch.arange(columns, device=device)[None, None].expand(n, lines, columns)
    early_loss = F.cross_entropy(guess[..., :N_LINES].flatten(0, 2), line.flatten())
    early_loss = early_loss + F.cross_entropy(guess[..., N_LINES : 2 * N_LINES].flatten(0, 2), column.flatten())
    cell_targets = {key: values[batch["picture"]] for key, values in batch.items() if key.startswith("cell_")}
    early_loss = early_loss + cell_loss(guess[..., 2 * N_LINES :], cell_targets)
    aim = batch["aim"].flatten()
    aim_loss = F.cross_entropy(F.linear(late.flatten(0, 1), readers["aim"]).float(), aim, ignore_index=-1)
    # The action is the first branch of each row. Its aim is the cell of the pad that the instruction names, if any.
    is_act = (batch["branch"] == 1) & (batch["aim"] >= 0)
    named = torch.where(is_act, batch["aim"], -1).amax(1)
    match = F.linear(at_cells[1], readers["match"])[..., 0].float()
    is_target = (torch.arange(lines * columns, device=device) == named[:, None]).float()
    weight = (1 + 7 * is_target) * (named >= 0)[:, None]
    match_loss = F.binary_cross_entropy_with_logits(match, is_target, weight, reduction="sum") / (weight.sum() + 1)
    cell_term = cell_loss(F.linear(image_embeddings, readers["cell"]), batch)
    return {"cell": cell_term, "early": early_loss, "match": match_loss, "aim": aim_loss}


# -- validation --------------------------------------------------------------------------------------------------------


def scores(batch: Tensors, logits: torch.Tensor, targets: torch.Tensor, tokenizer: Tokenizer) -> dict[str, float]:
    """Shares of right answers, and the mean error of velocities, with teacher forcing.

    If every token of an answer is right here, greedy decoding gives the same answer. If a token is wrong, the answer of
    greedy decoding may differ more than these figures show.
    """
    chosen, expected = logits.argmax(-1).tolist(), targets.tolist()
    rows, columns = (batch["targets"] >= 0).nonzero(as_tuple=True)
    answers: dict[tuple[int, int], list[int]] = {}
    for i, key in enumerate(zip(rows.tolist(), batch["branch"][rows, columns].tolist(), strict=True)):
        answers.setdefault(key, []).append(i)
    action_spans, text_spans = [], []  # a span: the indices of the tokens of one answer
    for span in answers.values():
        (action_spans if tokenizer.decode([expected[span[0]]]) == "{" else text_spans).append(span)
    errors_m_s = []
    for span in action_spans:
        try:
            given, right = (json.loads(tokenizer.decode([source[i] for i in span])) for source in (chosen, expected))
            errors_m_s += [abs(given[key] - right[key]) for key in ("vx", "vy", "vz") if key in right]
        except (ValueError, KeyError, TypeError):
            continue  # another type of action, or not JSON: counted as wrong

    def share(spans: list[list[int]]) -> float:
        return sum(all(chosen[i] == expected[i] for i in span) for span in spans) / max(1, len(spans))

    type_at = 5  # the five tokens of {"action":" are the same in every action; the next token gives the type
    type_share = sum(chosen[span[type_at]] == expected[span[type_at]] for span in action_spans) / len(action_spans)
    error_m_s = float(np.mean(errors_m_s or [9]))
    return {"type": type_share, "m/s off": error_m_s, "action": share(action_spans), "words": share(text_spans)}


# -- the run -----------------------------------------------------------------------------------------------------------


class Run:
    """Weights, readers, optimisers, and their folder."""

    def __init__(self, out: Path, seed: int, steps: int) -> None:
        self.out, self.seed, self.steps = out, seed, (VISION_STEPS, steps, EDGE_STEPS)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        write_layout(out)
        self.config = json.loads((out / "config.json").read_text())["text_config"]
        self.tokenizer = Tokenizer(out)
        rows = Rows(self.tokenizer)
        self.prefix = torch.tensor([rows.prefix], device=self.device)
        self.batches = Batches(rows, seed, self.device)
        validation = Batches(rows, VALIDATION_SEED, self.device)
        self.validation = [validation.make(i, 32, 2, 0) for i in range(4)]
        shapes = {name: tensor.shape for name, tensor in load_file(out / "model.safetensors").items()}
        weights = initial_weights(shapes, seed)
        self.w = {name: tensor.to(self.device).requires_grad_() for name, tensor in weights.items()}
        generator = torch.Generator().manual_seed(seed)
        self.readers = {
            name: (torch.randn(n, SIZES["hidden"], generator=generator) * 0.02).to(self.device).requires_grad_()
            for name, n in READERS.items()
        }
        self.vision = {name: tensor for name, tensor in self.w.items() if "language_model" not in name}
        self.optimisers = [
            optimisers(self.vision, [self.readers["cell"]], 1.0),
            *(optimisers(self.w, list(self.readers.values()), VISION_RATE_LATER) for _ in STAGES[1:]),
        ]
        self.vision_loss, self.lesson_loss = torch.compile(vision_loss), torch.compile(lesson_loss)
        self._maker = ThreadPoolExecutor(1)
        self._next_batch: dict[tuple[int, int], Future] = {}
        self.stage, self.step, spent_s = self._resume()
        self.began_s = time.monotonic() - spent_s

    def loss(self, stage: int, step: int, share: float) -> torch.Tensor:
        """share: share of the full learning rate."""
        with torch.autocast(self.device.type, torch.bfloat16):
            batch = self._batch(stage, step)
            if stage == 0:
                return self.vision_loss(self.vision, self.readers["cell"], batch)
            reader_weight = torch.tensor(min(1.0, 2 * share), device=self.device)
            return self.lesson_loss(self.w, self.readers, batch, self.prefix, self.config, reader_weight)[0]

    def _batch(self, stage: int, step: int) -> Tensors:
        """The lessons of this step. Another thread makes the lessons of the next step meanwhile."""
        future = self._next_batch.pop((stage, step), None) or self._maker.submit(self._make, stage, step)
        self._next_batch = {(stage, step + 1): self._maker.submit(self._make, stage, step + 1)}
        return future.result()

    def _make(self, stage: int, step: int) -> Tensors:
        if stage == 0:
            return self.batches.make(10**8 + step, PICTURES * ORDERS, 0)
        if stage == 1:
            return self.batches.make(step, PICTURES, ORDERS)
        return self.batches.make(2 * 10**8 + step, PICTURES, ORDERS, edge_cases=True)

    def train_step(self, stage: int, step: int) -> float:
        """Make one step of the optimisers. Returns the loss."""
        share = RATE_SHARES[stage] * rate_at(step, self.steps[stage])
        loss = self.loss(stage, step, share)
        loss.backward()
        weights = [*self.w.values(), *self.readers.values()]
        torch.nn.utils.clip_grad_norm_([tensor for tensor in weights if tensor.grad is not None], 1.0)
        for optimiser in self.optimisers[stage]:
            for group in optimiser.param_groups:
                group["lr"] = LEARNING_RATE * share * group["part"]
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return loss.item()

    def validate(self) -> dict[str, float]:
        results = []
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16):
            for batch in self.validation:
                _, logits, targets = lesson_loss(self.w, self.readers, batch, self.prefix, self.config, None)
                results.append(scores(batch, logits, targets, self.tokenizer))
        return {key: float(np.mean([result[key] for result in results])) for key in results[0]}

    def save(self, stage: int, step: int) -> None:
        """Write the checkpoint, and state.pt, from which a later run resumes."""
        plain = {name: tensor.detach().cpu() for name, tensor in self.w.items()}
        state = {
            "stage": stage,
            "step": step,
            "spent_s": time.monotonic() - self.began_s,
            "w": plain,
            "aux": {name: tensor.detach().cpu() for name, tensor in self.readers.items()},
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers[stage]],
        }
        torch.save(state, self.out / "state.new")
        (self.out / "state.new").replace(self.out / "state.pt")
        weights = {name: tensor.bfloat16().contiguous() for name, tensor in plain.items()}
        save_file(weights, self.out / "model.safetensors", metadata={"format": "pt"})

    def _resume(self) -> tuple[int, int, float]:
        if not (self.out / "state.pt").is_file():
            return 0, 0, 0.0
        state = torch.load(self.out / "state.pt", map_location=self.device)
        with torch.no_grad():
            for mine, saved in ((self.w, state["w"]), (self.readers, state["aux"])):
                for name, tensor in saved.items():
                    mine[name].copy_(tensor)
        if state["step"]:  # at the start of a stage the optimisers are new
            for optimiser, values in zip(self.optimisers[state["stage"]], state["optimisers"], strict=True):
                optimiser.load_state_dict(values)
        return state["stage"], state["step"], state["spent_s"]


def initial_weights(shapes: dict[str, torch.Size], seed: int) -> Tensors:
    """Random weights. In matrices that add to the residual stream, more layers mean smaller weights."""
    generator, w = torch.Generator().manual_seed(seed), {}
    layers = {True: SIZES["vision_layers"], False: SIZES["layers"]}
    for name, shape in sorted(shapes.items()):
        if len(shape) == 1:
            w[name] = torch.ones(shape)
            continue
        std = 0.05 if "embed_tokens" in name else 1 / math.sqrt(math.prod(shape[1:]))
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= math.sqrt(2 * layers["vision" in name])
        w[name] = torch.randn(shape, generator=generator) * std
    return w


def optimisers(w: Tensors, readers: list[torch.Tensor], vision_part: float) -> list[torch.optim.Optimizer]:
    """Muon and AdamW.

    vision_part: share of the learning rate for the vision tower and the projector. Below 1 they use AdamW, because Muon
    takes a fifth of the time of a step.
    """
    is_vision = {name: "language_model" not in name for name in w}
    is_matrix = {name: tensor.ndim == 2 and "embed_tokens" not in name for name, tensor in w.items()}
    muon = {name for name in w if is_matrix[name] and (vision_part == 1.0 or not is_vision[name])}
    slow = [tensor for name, tensor in w.items() if name not in muon and is_vision[name]]
    rest = [tensor for name, tensor in w.items() if name not in muon and not is_vision[name]] + readers
    return [
        torch.optim.Muon([{"params": [w[name] for name in w if name in muon], "part": 1.0}], lr=LEARNING_RATE,
                         weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([{"params": slow, "part": vision_part}, {"params": rest, "part": 1.0}], lr=LEARNING_RATE,
                          betas=(0.9, 0.98), weight_decay=0.0),
    ]  # fmt: skip


def rate_at(step: int, steps: int) -> float:
    """Share of the full rate at a step."""
    return min(1.0, (step + 1) / WARM_UP, max(0.0, (steps - step) / (DECAY * steps)))


def write_layout(folder: Path) -> None:
    """config.json, tokenizer and processor files as in a release, and weights that are replaced later."""
    from tests.harness.toy import write_checkpoint

    if not (folder / "config.json").is_file():
        write_checkpoint(folder, tokenizer="both", **SIZES)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the checkpoint; with state.pt in it the run resumes")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of the second stage (default {STEPS})")
    parser.add_argument("--until", type=int, help="stop before this step of the second stage; run again to resume")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    console = Console()
    run = Run(options.out, options.seed, options.steps)
    if run.stage or run.step:
        console.print(f"resuming stage {run.stage + 1} at step {run.step}", highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        for stage in range(run.stage, len(STAGES)):
            bar = progress.add_task(STAGES[stage], total=run.steps[stage], completed=run.step)
            for step in range(run.step, run.steps[stage]):
                if stage == 1 and step == options.until:
                    run.save(stage, step)
                    return 0
                loss = run.train_step(stage, step)
                progress.update(bar, completed=step + 1)
                if (step + 1) % REPORT_EVERY == 0:
                    line = f"stage {stage + 1} step {step + 1} {time.monotonic() - run.began_s:.0f} s loss {loss:.4f}"
                    if stage and (step + 1) % VALIDATE_EVERY == 0:
                        line += "".join(f"  {key} {value:.4f}" for key, value in run.validate().items())
                        run.save(stage, step + 1)
                    console.print(line, highlight=False)
            run.step, last = 0, stage == len(STAGES) - 1
            run.save(*((stage, run.steps[stage]) if last else (stage + 1, 0)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
