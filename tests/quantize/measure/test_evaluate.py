"""A bundle against its reference: what is counted, what is refused, and the page."""

from __future__ import annotations

import html.parser
import json
from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest

from edge_agent.bundle.manifest import LANGUAGE
from quantize.build import build
from quantize.measure import perplexity
from quantize.measure.collect_imatrix import CalibrationData
from quantize.measure.evaluate import EvaluatedAnswer, EvaluateError, Evaluation, FrameResult, agree, evaluate
from quantize.measure.html_report import html_report
from quantize.progress import SILENT
from quantize.source.checkpoint import read_checkpoint
from quantize.standard_recipes import plan_bundle
from tests.harness import toy
from tests.harness.language_model import opened
from tests.harness.quantize_cli import refused

ORDERS = ("Go to the red disc.", "Hold position.")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(4):
        cv2.imwrite(str(folder / f"{i}.png"), toy.toy_image(112, 140, i)[..., ::-1])
    return folder


@pytest.fixture(scope="module")
def found(full: Path, toy_bundle: Path, toy_bf16: Path, pictures: Path) -> list[Evaluation]:
    """The reference against itself, and Q4_K_M."""
    material = CalibrationData(max_chunks=1, frames=pictures, instructions=ORDERS)
    return evaluate([full, toy_bundle], toy_bf16, material, SILENT)


def test_the_reference_has_no_divergence_from_itself(found: list[Evaluation]):
    one = found[0]
    assert one.recipe == "BF16" and abs(one.text.kl_mean) < 1e-5 and one.text.same_top == 1.0
    assert one.actions.same_action == 1.0 and one.actions.fields_within == 1.0
    assert one.actions.vision_cosine_min > 0.999999
    assert {tensor.error for tensor in one.tensors} == {0.0}


def test_the_figures_of_a_4_bit_bundle_equal_a_direct_measurement(
    found: list[Evaluation], full: Path, toy_bundle: Path, tmp_path: Path
):
    one = found[1]
    assert one.recipe == "Q4_K_M" and one.language_bytes == (toy_bundle / LANGUAGE).stat().st_size
    llm = opened(full)
    with llm:
        text = CalibrationData().text.read_text(encoding="utf-8")
        perplexity.write_reference(llm, perplexity.divide(llm, text, 1), tmp_path / "kld", SILENT)
    llm = opened(toy_bundle)
    with llm:
        again = perplexity.compare(llm, perplexity.Reference(tmp_path / "kld"), SILENT)
    assert one.text.kl_mean == pytest.approx(again.kl_mean, rel=1e-3) and one.text.n == again.n
    errors = {tensor.name: tensor for tensor in one.tensors}
    assert 0.04 < errors["blk.0.ffn_up.weight"].error < 0.12 and errors["blk.0.ffn_up.weight"].type == "Q4_K"
    assert errors["token_embd.weight"].error < 0.03 and errors["token_embd.weight"].type == "Q6_K"
    assert errors["output_norm.weight"].error == 0.0
    assert one.actions.n == 4 and [frame.number for frame in one.actions.worst] != []
    assert {frame.instruction for frame in one.actions.worst} == set(ORDERS)


def rows(*scales: float) -> np.ndarray:
    return np.array([[scale, 1.0] for scale in scales], np.float32)


def test_agreement_is_counted_by_hand():
    decisions = [
        FrameResult(EvaluatedAnswer("move", {"forward_m_s": 1.0, "right_m_s": 0.5}), rows(1, 1)),
        FrameResult(EvaluatedAnswer("move", {"forward_m_s": 0.2, "right_m_s": 0.0}), rows(1, 1)),
        FrameResult(EvaluatedAnswer("land", {}), rows(1, 1)),
        FrameResult(EvaluatedAnswer("", {}), rows(1, 1)),
    ]
    other = [
        FrameResult(EvaluatedAnswer("move", {"forward_m_s": 1.05, "right_m_s": 0.5}), rows(1, 1)),
        FrameResult(EvaluatedAnswer("move", {"forward_m_s": 0.5, "right_m_s": 0.0}), rows(1, -1)),
        FrameResult(EvaluatedAnswer("hold", {}), rows(1, 1)),
        FrameResult(EvaluatedAnswer("", {}), rows(1, 1)),
    ]
    one = agree(decisions, other, CalibrationData(instructions=("a", "b")))
    assert (one.n, one.same_action) == (4, 0.75)
    assert one.fields_within == 0.75  # 0.05 and 0 and 0 are within, 0.3 is not
    assert one.mean_difference == pytest.approx({"forward_m_s": 0.175, "right_m_s": 0.0})
    assert one.max_difference == pytest.approx({"forward_m_s": 0.3, "right_m_s": 0.0})
    assert one.vision_cosine_min == pytest.approx(0.0) and one.vision_cosine_mean == pytest.approx(0.75)
    assert [frame.number for frame in one.worst] == [2, 1, 0, 3]  # another action, then the largest difference
    assert [frame.instruction for frame in one.worst] == ["a", "b", "a", "b"]


def test_a_reference_of_another_model_is_refused(toy_bundle: Path, toy_small: Path, tmp_path: Path):
    with pytest.raises(EvaluateError, match=r"parameters: \d+, but the reference .* has \d+; they are not"):
        evaluate([toy_bundle], toy_small, CalibrationData(max_chunks=1), SILENT)
    with pytest.raises(EvaluateError, match="recipe: expected BF16, F16, F32, found Q4_K_M"):
        evaluate([toy_bundle], toy_bundle, CalibrationData(max_chunks=1), SILENT)


def test_a_text_only_model_is_evaluated_on_text(tmp_path: Path, pictures: Path):
    folder = toy.write_checkpoint(tmp_path / "toy", vision=False, prefix="text", vocab=2048, layers=1)
    build(plan_bundle(read_checkpoint(folder), "Q4_K_M"), tmp_path / "out", SILENT)
    (one,) = evaluate([tmp_path / "out"], folder, CalibrationData(max_chunks=1), SILENT)
    assert one.actions is None and one.text.kl_mean > 0
    with pytest.raises(EvaluateError, match="text-only model; leave --frames out"):
        evaluate([tmp_path / "out"], folder, CalibrationData(max_chunks=1, frames=pictures), SILENT)


class Checked(html.parser.HTMLParser):
    VOID = ("meta", "img", "br", "path", "circle", "polyline")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag, attributes):
        assert not any(name.startswith("on") for name, _ in attributes)
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_is_self_contained_and_escapes_its_input(found: list[Evaluation], pictures: Path):
    from edge_agent.tools.stills import Stills

    frames = dict(enumerate(Stills(pictures, 64)))
    evil = "<script>alert('x')</script>\"&"
    worst = [msgspec.structs.replace(frame, instruction=evil) for frame in found[1].actions.worst]
    one = msgspec.structs.replace(found[1], recipe=evil, actions=msgspec.structs.replace(found[1].actions, worst=worst))
    text = html_report([found[0], one], frames)
    parsed = Checked()
    parsed.feed(text)
    assert not parsed.open and "<script>" not in text
    assert parsed.sources and all(source.startswith("data:image/png;base64,") for source in parsed.sources)
    words = " ".join(parsed.words)
    for expected in (evil, "ffn_down", "least cosine", f"{one.text.kl_mean:.5f}", "MB of the language model"):
        assert expected in words
    assert text.count("<figure>") == len(found[0].actions.worst) + len(worst)
    assert html_report([found[0]], frames).count("<svg") == 1  # nothing differs: no lines to draw


def test_the_command(run, toy_bundle: Path, toy_bf16: Path, full: Path, pictures: Path, tmp_path: Path):
    status, stdout, _ = run("evaluate", toy_bundle, "--reference", full, "--chunks", 1, "--frames", pictures,
                          "--html", tmp_path / "page.html")  # fmt: skip
    assert status == 0 and "KL divergence   mean" in stdout and "same action" in stdout
    assert (tmp_path / "page.html").stat().st_size > 10_000
    status, stdout, _ = run("evaluate", toy_bundle, "--reference", toy_bf16, "--chunks", 1, "--json")
    (evaluation,) = json.loads(stdout)
    assert status == 0 and evaluation["text"]["kl_mean"] > 0 and evaluation["actions"] is None
    refused(run("evaluate", tmp_path, "--reference", full), ("bundle.json: missing",))
    refused(run("evaluate", toy_bundle, "--reference", toy_bundle), ("recipe: expected BF16",))


def test_unreadable_calibration_data_is_one_line(run, toy_bundle: Path, full: Path, tmp_path: Path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 900)
    against = ("evaluate", toy_bundle, "--reference", full)
    refused(run(*against, "--calibration", tmp_path / "latin.txt"), ("latin.txt: not readable as UTF-8 text",))
    refused(run(*against, "--instructions", tmp_path / "latin.txt"), ("latin.txt: not readable as UTF-8 text",))
    refused(run(*against, "--max-frames", 0), ("--max-frames: expected 1 or more, found 0",), 2)
