"""An evaluation as one self-contained HTML page: a table, two plots, and the frames where the answers differ most.

Names and instructions come from outside and are escaped. Images are embedded.
"""

from __future__ import annotations

import base64
import functools
import html
import re
from collections.abc import Callable, Mapping, Sequence

import cv2
import numpy as np

from quantize.measure.evaluate import EvaluatedAnswer, EvaluatedFrame, Evaluation

WIDTH, HEIGHT, MARGIN = 560, 300, 48
COLOURS = ("#1b6ca8", "#c8553d", "#3c8d5a", "#8458a8", "#a88c1b", "#5a5a5a", "#c83d8c")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .2em .8em; text-align: right }
th:first-child, td:first-child { text-align: left } tr + tr td { border-top: 1px solid #ddd }
figure { display: inline-block; margin: 0 1em 1em 0; vertical-align: top; max-width: 17em }
figure img { width: 100%; image-rendering: pixelated } figcaption { font-size: 13px } svg text { font-size: 12px }
"""


def html_report(evaluations: list[Evaluation], frames: Mapping[int, np.ndarray]) -> str:
    """frames: number of an evaluated frame -> (H, W, 3) uint8 RGB; those that frame_numbers() names are needed."""
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>edge-quantize evaluate</title>",
        f"<style>{STYLE}</style><h1>Loss by quantisation</h1>",
        _table(evaluations),
        "<h2>Size against divergence</h2>",
        _sizes(evaluations),
    ]
    for result in evaluations:
        parts += [f"<h2>{_escaped(result.recipe)}: error of the weights, by layer</h2>", _layers(result)]
        if result.actions is not None:
            parts.append(f"<h2>{_escaped(result.recipe)}: frames where the answers differ most</h2>")
            parts += [_frame(frame, frames[frame.number]) for frame in result.actions.worst]
    return "\n".join(parts) + "</html>\n"


def frame_numbers(evaluations: list[Evaluation]) -> set[int]:
    """The frames that the page shows."""
    return {frame.number for result in evaluations if result.actions is not None for frame in result.actions.worst}


def _table(evaluations: list[Evaluation]) -> str:
    head = ["", *(f"{_escaped(result.recipe)}" for result in evaluations)]
    rows: list[tuple[str, Callable[[Evaluation], str | None]]] = [
        ("language model, MB", lambda result: f"{result.language_bytes / 1e6:.1f}"),
        ("perplexity", lambda result: f"{result.text.perplexity:.6g} ± {result.text.perplexity_sd:.4g}"),
        ("perplexity of the reference", lambda result: f"{result.text.reference_perplexity:.6g}"),
        ("KL divergence, mean", lambda result: f"{result.text.kl_mean:.5f} ± {result.text.kl_sd:.5f}"),
        ("KL divergence, median", lambda result: f"{result.text.kl_median:.5f}"),
        ("KL divergence, 99 %", lambda result: f"{result.text.kl_p99:.5f}"),
        ("KL divergence, maximum", lambda result: f"{result.text.kl_max:.5f}"),
        ("same most likely token", lambda result: f"{result.text.same_top:.2%}"),
        ("frames", lambda result: str(result.actions.n) if result.actions else None),
        ("same action", lambda result: f"{result.actions.same_action:.1%}" if result.actions else None),
        ("fields within 0.05", lambda result: f"{result.actions.fields_within:.1%}" if result.actions else None),
        (
            "vision embeddings, least cosine",
            lambda result: f"{result.actions.vision_cosine_min:.5f}" if result.actions else None,
        ),
    ]
    fields = sorted({key for result in evaluations if result.actions for key in result.actions.mean_difference})
    rows += [(f"{key}, mean difference", functools.partial(_difference, key)) for key in fields]
    body = [[name, *(value(result) or "" for result in evaluations)] for name, value in rows]
    cells = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body if any(row[1:]))
    return "<table><tr>" + "".join(f"<th>{cell}</th>" for cell in head) + f"</tr>{cells}</table>"


def _difference(key: str, result: Evaluation) -> str:
    differences = result.actions.mean_difference if result.actions else {}
    return f"{differences[key]:.4f}" if key in differences else ""


def _sizes(evaluations: list[Evaluation]) -> str:
    points = [(result.language_bytes / 1e6, result.text.kl_mean, result.recipe) for result in evaluations]
    x, y = _scale([p[0] for p in points], WIDTH, False), _scale([p[1] for p in points], HEIGHT, True)
    marks = [
        f"<circle cx='{x(size):.1f}' cy='{y(kl):.1f}' r='5' fill='{COLOURS[i % len(COLOURS)]}'/>"
        f"<text x='{x(size) + 8:.1f}' y='{y(kl) - 6:.1f}'>{_escaped(name)}: {size:.1f} MB, {kl:.4g}</text>"
        for i, (size, kl, name) in enumerate(points)
    ]
    return _svg("MB of the language model", "mean KL divergence", marks)


def _layers(result: Evaluation) -> str:
    lines: dict[str, list[tuple[int, float]]] = {}
    for tensor in result.tensors:
        if (found := re.fullmatch(r"blk\.(\d+)\.(.+)\.weight", tensor.name)) and tensor.error > 0:
            lines.setdefault(found[2], []).append((int(found[1]), tensor.error))
    points = [point for line in lines.values() for point in line]
    if not points:
        return "<p>No weight differs.</p>"
    x, y = _scale([p[0] for p in points], WIDTH, False), _scale([p[1] for p in points], HEIGHT, True)
    marks = []
    for i, (role, line) in enumerate(sorted(lines.items())):
        colour = COLOURS[i % len(COLOURS)]
        path = " ".join(f"{x(layer):.1f},{y(error):.1f}" for layer, error in line)
        marks.append(f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='2'/>")
        marks += [f"<circle cx='{x(n):.1f}' cy='{y(error):.1f}' r='3' fill='{colour}'/>" for n, error in line]
        marks.append(f"<text x='{WIDTH + 8}' y='{MARGIN + 16 * i}' fill='{colour}'>{_escaped(role)}</text>")
    return _svg("layer", "relative error", marks, extra=110)


def _scale(values: Sequence[float], length: int, upwards: bool) -> Callable[[float], float]:
    """Value -> pixels along an axis of `length` pixels. An upwards axis starts at 0."""
    low, high = min([*values, 0.0]) if upwards else min(values), max(values)
    if high <= low:
        low, high = low - 1, high + 1
    span = (length - 2 * MARGIN) / (high - low)
    return lambda v: (length - MARGIN - (v - low) * span) if upwards else (MARGIN + (v - low) * span)


def _svg(across: str, up: str, marks: list[str], extra: int = 220) -> str:
    low, left = HEIGHT - MARGIN, MARGIN
    axes = (
        f"<path d='M{left} {MARGIN} V{low} H{WIDTH - MARGIN}' fill='none' stroke='#888'/>"
        f"<text x='{WIDTH / 2}' y='{HEIGHT - 12}' text-anchor='middle'>{across}</text>"
        f"<text x='{left}' y='{MARGIN - 14}'>{up}</text>"
    )
    return f"<svg width='{WIDTH + extra}' height='{HEIGHT}'>{axes}{''.join(marks)}</svg>"


def _frame(frame: EvaluatedFrame, picture: np.ndarray) -> str:
    height, width = picture.shape[:2]
    scale = min(1.0, 320 / max(height, width))
    small = cv2.resize(picture, (max(1, round(width * scale)), max(1, round(height * scale))))
    png = cv2.imencode(".png", cv2.cvtColor(small, cv2.COLOR_RGB2BGR))[1]
    data = base64.b64encode(png.tobytes()).decode()
    return (
        f"<figure><img alt='frame {frame.number}' src='data:image/png;base64,{data}'><figcaption>"
        f"{frame.number}: {_escaped(frame.instruction)}<br>reference: {_answer_text(frame.reference)}<br>"
        f"this bundle: {_answer_text(frame.found)}<br>least cosine {frame.cosine:.5f}</figcaption></figure>"
    )


def _answer_text(answer: EvaluatedAnswer) -> str:
    values = ", ".join(f"{key} {value}" for key, value in answer.values.items())
    return _escaped(f"{answer.action or 'refused'} {values}".strip())


def _escaped(text: str) -> str:
    return html.escape(text, quote=True)
