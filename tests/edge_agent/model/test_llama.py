"""llama.cpp through our ctypes: embedding rows, two sequences, padding, text that stays text, errors of one line."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path

import llama_cpp.llama_cpp as ll
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge_agent.bundle.manifest import LANGUAGE, EmbeddingInfo
from edge_agent.model.frame_buffer import FrameBuffer
from edge_agent.model.llama import (
    ACTION_SEQ,
    TEXT_SEQ,
    LlamaContext,
    LlamaError,
    LlamaOptions,
    cells_of,
    context_for,
    usable_context,
)
from tests.harness import ROOT, toy_layout, toy_numbers
from tests.harness.gguf_reading import reader

CONTEXT = 512
N_SPECIAL = 1000  # ids below are control tokens


def embedding_of(path: Path) -> EmbeddingInfo:
    """Where a GGUF file holds its table, as the gguf package sees it."""
    table = next(tensor for tensor in reader(path).tensors if tensor.name == "token_embd.weight")
    row_bytes = table.n_bytes // int(table.shape[1])
    return EmbeddingInfo(offset=table.data_offset, ggml_type=table.tensor_type.name, row_bytes=row_bytes)


def load(folder: Path, *, reproducible: bool = False) -> LlamaContext:
    path = folder / LANGUAGE
    options = LlamaOptions(context=CONTEXT, threads=1, reproducible=reproducible)
    return LlamaContext(path, options, embedding_of(path))


@pytest.fixture(scope="module")
def language(toy_bundle):
    with load(toy_bundle, reproducible=True) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def fresh(toy_bundle):
    """Another model and context, for what is evaluated from scratch."""
    with load(toy_bundle, reproducible=True) as loaded:
        yield loaded


@pytest.fixture(autouse=True)
def empty(request):
    for name in {"language", "fresh"} & set(request.fixturenames):
        for sequence in (ACTION_SEQ, TEXT_SEQ):
            request.getfixturevalue(name).truncate(sequence, 0)


def some_tokens(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(N_SPECIAL, 4096, n).tolist()


def some_rows(n: int, seed: int) -> np.ndarray:
    """As if from the vision encoder, at the scale of the token embeddings."""
    return np.random.default_rng([seed, n]).normal(0, 0.3, (n, 256)).astype(np.float32)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


# -- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("checkpoint", "recipe"),
    [("toy_bf16", "Q4_K_M"), ("toy_bf16", "Q4_0"), ("toy_bf16", "Q8_0"), ("toy_fp8", "Q4_K_M")],
)
def test_embedding_rows_give_the_logits_of_their_tokens(request, build, recipe, checkpoint):
    with load(build(request.getfixturevalue(checkpoint), recipe)) as language:
        tokens = [1, 17, *some_tokens(60), 18, 3]
        by_token = language.logits_after_last(tokens, 0).copy()
        language.truncate(ACTION_SEQ, 0)
        assert difference(language.logits_after_last(language.embed(tokens), 0), by_token) <= 1e-5
        language.truncate(ACTION_SEQ, 0)
        language.logits_after_last(tokens[:20], 0)
        assert difference(language.logits_after_last(language.embed(tokens[20:]), 20), by_token) < 0.1


def test_embedding_rows_are_those_of_the_checkpoint(convert, toy_bf16):
    """Read from model.safetensors by hand: eight bytes of header length, a JSON header, then the numbers."""
    raw = (toy_bf16 / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    entry = json.loads(raw[8:start])["language_model.model.embed_tokens.weight"]
    bits = np.frombuffer(raw[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]], np.uint16)
    table = toy_numbers.from_bf16_bits(bits).reshape(entry["shape"])
    tokens = [0, 12, 4095, *some_tokens(30), 12]
    with load(convert(toy_bf16, "bf16")) as language:
        assert (language.embed(tokens) == table[tokens]).all()
        assert language.embed([12]).shape == (1, 256) and language.embed([12]).dtype == np.float32


def test_text_and_image_rows_in_one_batch_are_the_same_as_in_two(language):
    image, closing = some_rows(20, seed=1), language.embed(some_tokens(6))
    language.logits_after_last(some_tokens(30), 0)
    together = language.logits_after_last(np.concatenate([image, closing]), 30).copy()
    language.truncate(ACTION_SEQ, 30)
    language.logits_after_last(image, 30)
    assert difference(language.logits_after_last(closing, 50), together) < 0.1
    language.truncate(ACTION_SEQ, 30)
    assert (language.logits_after_last(np.concatenate([image, closing]), 30) == together).all()


def test_rows_and_logits_against_a_second_way_to_run_llama_cpp(convert, toy_bf16):
    """The package's own high-level class evaluates the same tokens."""
    import llama_cpp

    folder = convert(toy_bf16, "f32")
    tokens = [1, *some_tokens(40)]
    theirs = llama_cpp.Llama(str(folder / LANGUAGE), n_ctx=CONTEXT, n_threads=1, logits_all=True, verbose=False)
    theirs.eval(tokens)
    expected = np.array(theirs.scores[len(tokens) - 1])
    theirs.close()
    with load(folder) as language:
        assert difference(language.logits_after_last(tokens, 0), expected) < 1e-2
        language.truncate(ACTION_SEQ, 0)
        assert difference(language.logits_after_last(language.embed(tokens), 0), expected) < 1e-2


# -- one cache, two sequences -----------------------------------------------------------------------------------------

PREFIX, N_FRAME = some_tokens(60, seed=2), 30
START = len(PREFIX)
STOP = START + N_FRAME
ACTS, QUESTION, ANSWER = some_tokens(5, seed=3), some_tokens(7, seed=4), some_tokens(4, seed=5)


def act_on(language: LlamaContext, frame: np.ndarray, between=lambda step: None) -> list[np.ndarray]:
    """Evaluate one frame as the action lane does; between(step) runs before each token."""
    language.truncate(ACTION_SEQ, START)
    logits = [language.logits_after_last(frame, START).copy()]
    for i, token in enumerate(ACTS):
        between(i)
        logits.append(language.logits_after_last([token], STOP + i).copy())
    return logits


def test_a_text_about_a_frame_continues_while_later_frames_are_answered(language, fresh):
    frames = [some_rows(N_FRAME, seed=n) for n in range(len(ANSWER) + 1)]

    language.logits_after_last(PREFIX, 0)
    logits_by_frame = [act_on(language, frames[0])]
    language.fork_sequence(STOP)
    spoken = [language.logits_after_last(QUESTION, STOP, TEXT_SEQ).copy()]

    def speak(step: int) -> None:
        if step == 2:
            place = len(spoken) - 1
            spoken.append(language.logits_after_last([ANSWER[place]], STOP + len(QUESTION) + place, TEXT_SEQ).copy())

    logits_by_frame += [act_on(language, frame, speak) for frame in frames[1:]]
    assert len(spoken) == len(ANSWER) + 1

    # The text, from an empty cache and alone.
    fresh.logits_after_last(PREFIX, 0)
    fresh.logits_after_last(frames[0], START)
    fresh.fork_sequence(STOP)  # on the same sequence: the action lane's batches are padded and use other kernels
    alone = [fresh.logits_after_last(QUESTION, STOP, TEXT_SEQ).copy()]
    for i, token in enumerate(ANSWER):
        alone.append(fresh.logits_after_last([token], STOP + len(QUESTION) + i, TEXT_SEQ).copy())
    assert max(difference(a, b) for a, b in zip(spoken, alone, strict=True)) <= 1e-3
    assert difference(spoken[0], spoken[1]) > 0.05

    # The actions, without a text beside them: not one bit differs.
    fresh.truncate(ACTION_SEQ, 0)
    fresh.logits_after_last(PREFIX, 0)
    for frame, logits in zip(frames, logits_by_frame, strict=True):
        assert all((a == b).all() for a, b in zip(logits, act_on(fresh, frame), strict=True))
    assert difference(logits_by_frame[0][-1], logits_by_frame[1][-1]) > 0.05  # the frames differ


def test_a_pinned_prefix_gives_the_logits_of_a_new_one(language, fresh):
    language.logits_after_last(PREFIX, 0)
    for n in range(5):
        pinned = act_on(language, some_rows(N_FRAME, seed=n))
        fresh.truncate(ACTION_SEQ, 0)
        fresh.logits_after_last(PREFIX, 0)
        assert all((a == b).all() for a, b in zip(pinned, act_on(fresh, some_rows(N_FRAME, seed=n)), strict=True))


@pytest.mark.parametrize("reproducible", [False, True])
def test_a_fork_drops_the_previous_text_and_copies_no_more_than_its_stop(convert, toy_bf16, reproducible):
    """At full precision: the cells have another order here, which 4-bit kernels turn into a difference of 3 %."""
    folder = convert(toy_bf16, "f32")
    with load(folder, reproducible=reproducible) as language, load(folder, reproducible=reproducible) as fresh:
        language.logits_after_last(PREFIX, 0)
        act_on(language, some_rows(N_FRAME, seed=1))
        language.fork_sequence(STOP)
        language.logits_after_last(some_tokens(20, seed=9), STOP, TEXT_SEQ)
        act_on(language, some_rows(N_FRAME, seed=2))
        language.fork_sequence(STOP)  # not the actions behind it
        spoken = language.logits_after_last(QUESTION, STOP, TEXT_SEQ).copy()
        fresh.logits_after_last(PREFIX, 0)
        fresh.logits_after_last(some_rows(N_FRAME, seed=2), START)
        assert difference(spoken, fresh.logits_after_last(QUESTION, STOP)) <= 1e-2


def test_truncating_frees_the_cells(language):
    """Frames with texts beside them, twice what the cache holds; then everything fits that fits an empty cache."""
    language.logits_after_last(PREFIX, 0)
    for n in range(24):
        act_on(language, some_rows(N_FRAME, seed=n))
        language.fork_sequence(STOP)
        language.logits_after_last(QUESTION, STOP, TEXT_SEQ)
        if n % 3 == 0:
            language.truncate(TEXT_SEQ, 0)
    language.truncate(TEXT_SEQ, 0)
    language.truncate(ACTION_SEQ, 0)
    for sequence in (ACTION_SEQ, TEXT_SEQ):
        assert np.isfinite(language.logits_after_last(some_tokens(language.n_ctx), 0, sequence)).all()


# -- text -------------------------------------------------------------------------------------------------------------


def is_kept(language: LlamaContext, text: str) -> bool:
    """Whether its tokens are ordinary ones, of the same bytes."""
    tokens = language.tokens(text)
    assert all(N_SPECIAL <= token < language.n_vocab for token in tokens)
    return b"".join(language.token_bytes(token) for token in tokens) == text.encode()


@settings(deadline=None, max_examples=60)
@given(text=st.text(max_size=60))
@example(text="")
@example(text="Hold position. 3.5 m/s\n\tÄpfel 日本 \U0001f681 \x00 \x7f")
@example(text="".join(chr(n) for n in range(256)))
def test_any_text_becomes_ordinary_tokens_of_the_same_bytes(language, text):
    assert is_kept(language, text)


@pytest.mark.soak
@settings(deadline=None, max_examples=2_000)
@given(text=st.text(max_size=60))
def test_thousands_of_texts_become_ordinary_tokens_of_the_same_bytes(language, text):
    assert is_kept(language, text)


@pytest.mark.parametrize("name", [*toy_layout.SPECIAL_NAMES.values(), "<SPECIAL_20>", "<SPECIAL_999>"])
def test_the_names_of_control_tokens_stay_letters(language, name):
    """Text from an instruction cannot open or close a part of the prompt."""
    for text in (name, f"Land.{name}[INST]now", name * 3, f" {name}\n"):
        assert is_kept(language, text)


def test_control_tokens_have_no_bytes_and_one_ends_a_text(language):
    assert [language.token_bytes(token) for token in (0, 1, 2, 3, 4, 10, 12, 13, 17, 18, 999)] == [b""] * 11
    assert language.is_end_of_generation(2)
    assert not any(language.is_end_of_generation(token) for token in (1, 3, 4, 12, 13, *some_tokens(50)))


# -- limits ------------------------------------------------------------------------------------------------


def test_too_many_rows_are_an_error_and_the_cache_stays(language):
    language.logits_after_last(PREFIX, 0)
    most = language.n_ctx
    assert most == CONTEXT - 15  # padding must fit too
    for n, start in ((most + 1, 0), (most, 1), (1, most), (most - START + 1, START), (0, 5)):
        with pytest.raises(LlamaError, match=f"positions {start} to {start + n} do not fit a context of {most}"):
            language.logits_after_last([1000] * n, start)
        with pytest.raises(LlamaError, match=f"context of {most}"):
            language.logits_after_last(np.zeros((n, 256), np.float32), start)
    after = act_on(language, some_rows(N_FRAME, seed=0))
    language.truncate(ACTION_SEQ, 0)
    language.logits_after_last(PREFIX, 0)
    assert all((a == b).all() for a, b in zip(after, act_on(language, some_rows(N_FRAME, seed=0)), strict=True))


def test_each_sequence_has_the_whole_context(language):
    assert np.isfinite(language.logits_after_last(some_tokens(language.n_ctx), 0)).all()
    assert np.isfinite(language.logits_after_last(some_tokens(language.n_ctx), 0, TEXT_SEQ)).all()


@pytest.mark.parametrize("cut", [[40], [1] * 40, [17, 23], [3, 33, 4], [16, 16, 8], [39, 1]])
def test_the_same_rows_give_the_same_bits_in_any_batches(toy_bundle, cut):
    """Of a 4-bit model, for any output rows, and for tokens as well as embeddings."""
    tokens = some_tokens(40)
    with load(toy_bundle, reproducible=True) as language:
        expected = [row.copy() for row in language.logits_at(tokens, 0, list(range(40)))]
        for kind in ("tokens", "rows"):
            language.truncate(ACTION_SEQ, 0)
            at, found = 0, []
            for n in cut:
                output_rows = sorted({0, n // 2, n - 1})
                part = tokens[at : at + n]
                batch = part if kind == "tokens" else language.embed(part)
                logits = language.logits_at(batch, at, output_rows)
                found += [(at + i, row.copy()) for i, row in zip(output_rows, logits, strict=True)]
                at += n
            assert all((row == expected[i]).all() for i, row in found), kind
        language.truncate(ACTION_SEQ, 0)
        assert (language.logits_after_last(tokens, 0) == expected[-1]).all()


def test_padding_is_dropped(toy_bundle):
    with load(toy_bundle, reproducible=True) as language:
        most = language.n_ctx
        language.logits_after_last(some_tokens(most - 3), 0)
        language.logits_after_last(some_tokens(3), most - 3)
        with pytest.raises(LlamaError, match="do not fit"):
            language.logits_after_last(some_tokens(1), most)
        embeddings = language.embed(some_tokens(20))
        language.truncate(ACTION_SEQ, 0)
        expected = language.logits_after_last(embeddings, 0).copy()  # padded in a copy

        buffer = FrameBuffer(48, language.n_embd)
        buffer.padded(48)[:] = 0
        buffer.embeddings(12)[:] = embeddings[:12]
        buffer.append(embeddings[12:])
        language.truncate(ACTION_SEQ, 0)
        assert (language.logits_after_last(buffer, 0) == expected).all()  # padded in place
        assert (buffer.padded(20) == embeddings).all() and len(buffer) == 20
        assert (buffer.padded(32)[20:] == embeddings[-1]).all()

        buffer.drop_text()
        assert len(buffer) == buffer.n_image_rows == 12
        assert (buffer.image_rows == embeddings[:12]).all()


# -- loading ----------------------------------------------------------------------------------------------------------


def test_progress_is_reported_while_weights_are_read(toy_bundle):
    path, parts = toy_bundle / LANGUAGE, []
    LlamaContext(path, LlamaOptions(context=256), embedding_of(path), parts.append).close()
    assert parts == sorted(parts) and parts[-1] == 1.0


@pytest.mark.parametrize(("gpu_layers", "hides_devices"), [(0, True), (-1, False), (5, False)])
def test_without_gpu_layers_llama_cpp_gets_no_device(toy_bundle, monkeypatch, gpu_layers, hides_devices):
    """Otherwise it computes large batches on a GPU that the configuration does not want."""
    real, given = ll.llama_model_load_from_file, []

    def load(path: bytes, params: ll.llama_model_params) -> int:
        devices = params.devices
        given.append(None if devices is None else ctypes.c_void_p.from_address(devices).value)
        given.append(devices is not None)
        return real(path, params)

    monkeypatch.setattr(ll, "llama_model_load_from_file", load)
    path = toy_bundle / LANGUAGE
    LlamaContext(path, LlamaOptions(context=256, threads=1, gpu_layers=gpu_layers), embedding_of(path)).close()
    assert given == [None, hides_devices]  # an empty list, which ends with null; or llama.cpp's own choice


def test_closing_twice_is_closing_once(toy_bundle):
    language = load(toy_bundle)
    language.close()
    language.close()
    assert (language.context, language.model) == (0, 0)


def test_reproducible_needs_the_attention_and_the_cache_that_allow_it():
    for impossible in ({"flash_attention": True}, {"kv_cache_type": "q8_0"}):
        with pytest.raises(ValueError, match="not possible"):
            LlamaOptions(context=256, reproducible=True, **impossible)


BROKEN = """
import sys
from pathlib import Path
from edge_agent.bundle.manifest import EmbeddingInfo
from edge_agent.model.llama import LlamaContext, LlamaError, LlamaOptions

good, path = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2])
embedding = EmbeddingInfo(offset=0, ggml_type="Q6_K", row_bytes=210)
def overwritten(at, data):
    return good[:at] + data + good[at + len(data):]
contents = [b"", b"\\n", b"GGUF", b"GGUF" + b"\\xff" * 4000, bytes(10_000), b"\\x7fELF" + good[4:]]
contents += [good[:n] for n in (3, 4, 8, 23, 24, 100, 5000, 100_000, len(good) // 2, len(good) - 1)]
contents += [overwritten(at, b"\\xff" * 8) for at in (4, 8, 16, 24, 32, 40, 64, 200, 1000)]
contents.append(good.replace(b"mistral3", b"nonsense"))
contents.append(good.replace(b"blk.0.attn_q.weight", b"blk.0.attn_x.weight"))
for content in contents:
    path.write_bytes(content)
    try:
        LlamaContext(path, LlamaOptions(context=256), embedding).close()
    except LlamaError as error:
        print(str(error).replace("\\n", "<newline>"))
    else:
        print("loaded")
path.unlink()
for missing in (path, path.parent):
    try:
        LlamaContext(missing, LlamaOptions(context=256), embedding)
    except LlamaError as error:
        print(str(error).replace("\\n", "<newline>"))
"""


def test_a_damaged_model_file_is_an_error_of_one_line(toy_bundle, tmp_path):
    """In a process of its own: a crash of a native parser would end this one."""
    path = tmp_path / "broken.gguf"
    done = subprocess.run(
        [sys.executable, "-c", BROKEN, toy_bundle / LANGUAGE, path], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 29
    for line in lines:
        assert line.startswith(str(tmp_path)) and " cannot " in line and "<newline>" not in line, line


def test_another_release_of_llama_cpp_python_is_refused():
    code = "import llama_cpp; llama_cpp.__version__ = '0.3.99'\nimport edge_agent.model.llama"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "expected 0.3.36, found 0.3.99" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("alignment", [1, 16])
def test_the_context_to_configure_is_the_smallest_that_is_enough(alignment):
    for n_tokens in range(1, 1600):
        context = context_for(n_tokens, alignment)
        assert usable_context(context, alignment) >= n_tokens
        assert usable_context(context - 1, alignment) < n_tokens


def test_the_usable_context_is_that_of_the_loaded_model(language):
    assert language.n_ctx == usable_context(CONTEXT, 16) and language.context_for(CONTEXT) == CONTEXT + 1
    assert ll.llama_n_ctx_seq(language.context) == cells_of(CONTEXT)
