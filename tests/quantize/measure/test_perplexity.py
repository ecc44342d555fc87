"""Perplexity and KL divergence: against a float64 computation, and through the file of the reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_agent.bundle.manifest import read_manifest
from edge_agent.model.llama import ACTION_SEQ, LlamaContext
from quantize.measure import perplexity
from quantize.measure.collect_imatrix import TEXT
from quantize.measure.perplexity import MeasureError
from quantize.progress import SILENT
from tests.harness.language_model import opened


@pytest.fixture(scope="module")
def reference(full: Path, tmp_path_factory: pytest.TempPathFactory) -> perplexity.Reference:
    path = tmp_path_factory.mktemp("reference") / "kld"
    llm = opened(full)
    with llm:
        cut = perplexity.divide(llm, TEXT.read_text(encoding="utf-8"), 2)
        perplexity.write_reference(llm, cut, path, SILENT)
    return perplexity.Reference(path)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_a_model_has_no_divergence_from_itself(full: Path, reference: perplexity.Reference):
    llm = opened(full)
    with llm:
        found = perplexity.compare(llm, reference, SILENT)
    assert found.n == 2 * 255 and found.same_top == 1.0
    assert abs(found.kl_mean) < 1e-5 and abs(found.kl_max) < 1e-3
    assert found.delta_p_rms < 1e-4


def test_the_figures_equal_a_float64_computation(full: Path, toy_bundle: Path, reference: perplexity.Reference):
    """All of it again in float64, without the file."""
    rows = {}
    for name, folder in (("p", full), ("q", toy_bundle)):
        llm = opened(folder)
        with llm:
            rows[name] = np.concatenate(
                [log_softmax(perplexity.logits(llm, chunk)[:-1].copy()) for chunk in reference.chunks]
            )
            if name == "q":
                found = perplexity.compare(llm, reference, SILENT)
    p, q = rows["p"], rows["q"]
    right = np.concatenate([chunk[257:] for chunk in reference.chunks])
    at = np.arange(len(right))
    kl = (np.exp(p) * (p - q)).sum(1)
    assert found.perplexity == pytest.approx(np.exp(-q[at, right].mean()), rel=1e-4)
    assert found.kl_mean == pytest.approx(kl.mean(), rel=2e-3)
    assert found.kl_median == pytest.approx(np.median(kl), rel=5e-3)
    assert found.kl_p99 == pytest.approx(np.quantile(kl, 0.99), rel=5e-3)
    assert found.kl_max == pytest.approx(kl.max(), rel=5e-3)
    assert found.same_top == pytest.approx((p.argmax(1) == q.argmax(1)).mean(), abs=2 / len(kl))
    delta = np.exp(q[at, right]) - np.exp(p[at, right])
    assert found.delta_p_rms == pytest.approx(np.sqrt((delta**2).mean()), rel=1e-2)
    assert 0 < found.kl_median < found.kl_mean < found.kl_p99 < found.kl_max
    assert found.kl_sd == pytest.approx(kl.std() / np.sqrt(len(kl) - 1), rel=1e-2)


def test_stored_log_probabilities_are_exact_to_one_step():
    logits = np.random.default_rng(0).normal(0, 4, (3, 77)).astype(np.float32)
    logits[1, 5] = 60.0  # then most of the row is more than 16 below
    stored = perplexity._stored(logits)
    assert stored.shape == (3, 2 * 39 + 4) and stored.dtype == np.uint16
    scale, least = np.ascontiguousarray(stored[:, :4]).view(np.float32).T[..., None]
    back = scale * stored[:, 4 : 4 + 77].astype(np.float32) + least
    expected = np.maximum(log_softmax(logits), log_softmax(logits).max(1, keepdims=True) - 16)
    assert np.abs(back - expected).max() <= 16 / 65535


def test_a_vocabulary_without_bos_gets_none(full: Path, reference: perplexity.Reference, monkeypatch):
    """As wrapped ChatML files: their first token is the text's own."""
    with opened(full) as llm:
        assert llm.bos == read_manifest(full).manifest.model.special["bos"]
        monkeypatch.setattr(LlamaContext, "bos", None)
        chunk = perplexity.divide(llm, TEXT.read_text(encoding="utf-8"), 1)[0]
        assert list(chunk) == llm.tokens(TEXT.read_text(encoding="utf-8"))[: perplexity.CHUNK]
        found = perplexity.logits(llm, chunk).copy()
        llm.truncate(ACTION_SEQ, 0)
        alone = llm.logits_at(list(map(int, chunk)), 0, [perplexity.CHUNK - 1])
        np.testing.assert_allclose(found[-1], alone[0], atol=2e-3)


def test_every_chunk_starts_with_bos_and_an_empty_cache(full: Path, reference: perplexity.Reference):
    llm = opened(full)
    with llm:
        one = perplexity.logits(llm, reference.chunks[1]).copy()
        perplexity.logits(llm, reference.chunks[0])
        again = perplexity.logits(llm, reference.chunks[1])
        np.testing.assert_array_equal(one, again)
        other = reference.chunks[1].copy()
        other[0] = 7  # the text's own token there is never read
        np.testing.assert_array_equal(one, perplexity.logits(llm, other))


def test_text_too_short_is_refused(full: Path):
    llm = opened(full)
    with llm, pytest.raises(MeasureError, match="expected 512 or more"):
        perplexity.divide(llm, "Follow the road.")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda raw: b"nothing", "not a file of log"),
        (lambda raw: raw[:-10], "expected"),
        (lambda raw: raw[:15], "not a"),
    ],
)
def test_a_damaged_reference_is_refused(reference: perplexity.Reference, tmp_path: Path, damage, words: str):
    path = tmp_path / "kld"
    path.write_bytes(damage(reference.path.read_bytes()))
    with pytest.raises(MeasureError, match=words):
        perplexity.Reference(path)


def test_a_reference_of_another_vocabulary_is_refused(reference: perplexity.Reference, build, toy_small: Path):
    llm = opened(build(toy_small, "Q4_K_M"))
    with llm, pytest.raises(MeasureError, match="vocabulary of 4096, but the model has 2048"):
        perplexity.compare(llm, reference, SILENT)
