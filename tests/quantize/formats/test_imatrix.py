"""The importance matrix: what is added up, llama.cpp's file form, what is refused, and what building with one does."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import cv2
import llama_cpp.llama_cpp as ll
import numpy as np
import pytest

from edge_agent.bundle.manifest import LANGUAGE
from edge_agent.tools import stills
from quantize.build import build as build_bundle
from quantize.formats import ggml_kernels
from quantize.formats.imatrix import Imatrix, ImatrixError, read_imatrix, write_imatrix
from quantize.measure import collect_imatrix
from quantize.progress import SILENT
from quantize.source.checkpoint import read_checkpoint
from quantize.standard_recipes import RECIPES, plan_bundle
from tests.harness import toy
from tests.harness.gguf_reading import Reader, tensors_of
from tests.harness.progress import RecordedProgress
from tests.harness.quantize_cli import refused

TEXT = 'Follow the road and stop at the gate. Halte Abstand. 빨간 원반으로 가세요. {"action":"hold"}\n' * 60


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(3):
        cv2.imwrite(str(folder / f"{i}.png"), toy.toy_image(112, 140, i)[..., ::-1])
    return folder


@pytest.fixture(scope="module")
def collected(toy_bf16: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Imatrix, Path]:
    """From two chunks of text, and the file."""
    path = tmp_path_factory.mktemp("imatrix") / "toy.gguf"
    sources = collect_imatrix.CalibrationData(text=text, max_chunks=2)
    return collect_imatrix.collect_imatrix(read_checkpoint(toy_bf16), path, sources, SILENT), path


# -- what is added up --------------------------------------------------------------------------------------------------


def test_every_weight_is_counted_at_every_position(collected, toy_bf16: Path):
    found, _ = collected
    rows = [row for row in read_checkpoint(toy_bf16).text_tensors if len(row.shape) == 2]
    assert set(found.sums) == {row.gguf for row in rows}  # tied: the embedding table is the head
    assert set(found.counts.values()) == {2 * collect_imatrix.CHUNK} and found.n_chunks == 2


def test_the_first_layer_gets_what_arithmetic_says(collected, toy_bf16: Path, text: Path):
    """Embedding rows, root-mean-square norm, times the norm's weight: by hand, without llama.cpp's graph."""
    found, _ = collected
    tensors = read_by_hand(toy_bf16)
    ids = token_ids(toy_bf16, text.read_text(encoding="utf-8"))
    total = np.zeros(256)
    for i in range(2):
        chunk = [1, *ids[i * 512 + 1 : (i + 1) * 512]]
        x = tensors["token_embd.weight"][chunk].astype(np.float64)
        x = x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-5) * tensors["blk.0.attn_norm.weight"]
        total += (x**2).sum(0)
    for side in "qkv":
        np.testing.assert_allclose(found.sums[f"blk.0.attn_{side}.weight"], total, rtol=1e-5)


def read_by_hand(folder: Path) -> dict[str, np.ndarray]:
    from tests.harness.gguf_reading import values

    return {
        "token_embd.weight": values(folder, "language_model.model.embed_tokens.weight"),
        "blk.0.attn_norm.weight": values(folder, "language_model.model.layers.0.input_layernorm.weight"),
    }


def token_ids(folder: Path, words: str) -> list[int]:
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    return Tekkenizer.from_file(folder / "tekken.json").encode(words, bos=True, eos=False)


def test_frames_are_answered_in_the_runtimes_own_prompt(
    toy_bf16: Path, text: Path, pictures: Path, tmp_path: Path, collected
):
    sources = collect_imatrix.CalibrationData(text=text, max_chunks=2, frames=pictures)
    found = collect_imatrix.collect_imatrix(read_checkpoint(toy_bf16), tmp_path / "out.gguf", sources, SILENT)
    more = found.counts["blk.0.attn_q.weight"] - 2 * collect_imatrix.CHUNK
    assert more > 3 * (100 + 5 * 4 + 3)  # three prompts of over a hundred tokens, three pictures, three closings
    head = found.counts["token_embd.weight"] - 2 * collect_imatrix.CHUNK
    assert 0 < head < more  # the head is computed for the last position of a batch only
    assert found.datasets == [text.name, pictures.name]
    text_only, _ = collected
    assert (found.sums["blk.1.ffn_down.weight"] > text_only.sums["blk.1.ffn_down.weight"]).all()


def test_a_video_gives_frames_evenly(tmp_path: Path):
    path = tmp_path / "flight.mp4"
    film = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 10, (64, 48))
    for i in range(20):
        film.write(np.full((48, 64, 3), 12 * i, np.uint8))
    film.release()
    shown = [float(image.mean()) for image in stills.Stills(path, 5)]
    assert len(shown) == 5 and np.allclose(np.diff(shown), 48, atol=6)


def test_non_finite_activations_are_refused():
    with pytest.raises(ImatrixError, match="not finite"):
        Imatrix().add("blk.0.attn_q.weight", np.array([[1.0, np.nan]], np.float32))


@pytest.mark.parametrize("name", ["blk.0.ffn_up.weight", "CUDA0#blk.0.ffn_up.weight#0", "CUDA1#blk.0.ffn_up.weight#2"])
def test_inputs_of_a_weight_are_counted_also_where_the_graph_reads_a_copy_of_it(name, monkeypatch):
    """As with a CUDA build, whose graphs cannot be made here."""
    monkeypatch.setattr(ggml_kernels, "read_float32", lambda tensor: np.full((2, 4), 3.0, np.float32))
    weight, inputs = ggml_kernels.GgmlTensor(name=name.encode()), ggml_kernels.GgmlTensor()
    node = ggml_kernels.GgmlTensor(op=ggml_kernels.MUL_MAT)
    node.src[0], node.src[1] = ctypes.addressof(weight), ctypes.addressof(inputs)
    collector = collect_imatrix.Collector(Imatrix())
    assert collector(ctypes.addressof(node), True) and collector(ctypes.addressof(node), False)
    assert {name: sums.tolist() for name, sums in collector.into.sums.items()} == {"blk.0.ffn_up.weight": [18.0] * 4}
    weight.name = b"CUDA0#cache_k_l0 (view)#0"
    assert not collector(ctypes.addressof(node), True)


# -- interrupted -------------------------------------------------------------------------------------------------------


def test_a_killed_run_is_continued(toy_bf16: Path, text: Path, tmp_path: Path, monkeypatch, collected):
    monkeypatch.setattr("quantize.measure.collect_imatrix.SAVE_EVERY_CHUNKS", 1)
    opened, out, sources = (
        read_checkpoint(toy_bf16),
        tmp_path / "out.gguf",
        collect_imatrix.CalibrationData(text=text, max_chunks=2),
    )

    def interrupt(stage: str, what: str, done: int, total: int) -> None:
        if stage == "text" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect_imatrix.collect_imatrix(opened, out, sources, RecordedProgress(interrupt))
    assert [path.name for path in tmp_path.iterdir()] == [".out.gguf.part.npz"]
    second = RecordedProgress()
    collect_imatrix.collect_imatrix(opened, out, sources, second)
    begun = [(stage, done) for stage, _, done, _ in second.steps]
    assert ("text", 0) not in begun and ("text", 1) in begun
    assert out.read_bytes() == collected[1].read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


def test_temporary_files_of_a_killed_run_are_removed(toy_bf16: Path, text: Path, tmp_path: Path, collected):
    left = tmp_path / ".out.gguf.abc.scratch"
    (left / "bf16").mkdir(parents=True)
    (left / "bf16" / "language.gguf").write_bytes(bytes(1000))
    sources = collect_imatrix.CalibrationData(text=text, max_chunks=2)
    collect_imatrix.collect_imatrix(read_checkpoint(toy_bf16), tmp_path / "out.gguf", sources, SILENT)
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


def test_saved_sums_of_other_work_are_not_used(toy_bf16: Path, text: Path, tmp_path: Path, collected):
    out = tmp_path / "out.gguf"
    state = collect_imatrix._SavedSums(tmp_path / ".out.gguf.part.npz", "of something else")
    state.save(Imatrix(sums={"blk.0.attn_q.weight": np.ones(256)}, counts={"blk.0.attn_q.weight": 5}, n_chunks=1))
    collect_imatrix.collect_imatrix(
        read_checkpoint(toy_bf16), out, collect_imatrix.CalibrationData(text=text, max_chunks=2), SILENT
    )
    assert out.read_bytes() == collected[1].read_bytes()
    state.path.write_bytes(b"torn")
    assert state.load().n_chunks == 0


# -- the file ----------------------------------------------------------------------------------------------------------


def test_the_file_is_llama_cpps(collected):
    found, path = collected
    reader = Reader(path)
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert fields == {
        "general.type": "imatrix",
        "imatrix.datasets": ["calibration.txt"],
        "imatrix.chunk_count": 2,
        "imatrix.chunk_size": 512,
    }
    shapes = {tensor.name: tuple(map(int, tensor.shape)) for tensor in reader.tensors}  # innermost first
    assert shapes["blk.1.ffn_down.weight.in_sum2"] == (512, 1) and shapes["blk.1.ffn_down.weight.counts"] == (1, 1)
    assert len(shapes) == 2 * len(found.sums)
    again = read_imatrix(path)
    assert again.counts == found.counts and again.datasets == found.datasets and again.n_chunks == 2
    for name, values in found.sums.items():
        np.testing.assert_array_equal(again.sums[name], values.astype(np.float32))
        np.testing.assert_allclose(again.of(name), values / found.counts[name], rtol=1e-6)
    assert again.of("blk.9.attn_q.weight") is None


def rewritten(path: Path, out: Path, change) -> Path:
    found = read_imatrix(path)
    change(found)
    write_imatrix(found, out)
    return out


DAMAGED = {
    "cut": lambda raw: raw[:-50],
    "garbage": lambda raw: b"GGUF" + bytes(200),
    "empty": lambda raw: b"",
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_one_line(collected, tmp_path: Path, damage):
    path = tmp_path / "x.gguf"
    path.write_bytes(damage(collected[1].read_bytes()))
    with pytest.raises(ImatrixError, match=r"^[^\n]*x\.gguf: not a GGUF file, or damaged[^\n]*$"):
        read_imatrix(path)


def test_non_finite_and_negative_sums_are_refused(collected, tmp_path: Path):
    for value in (np.nan, np.inf, -1.0):
        path = rewritten(collected[1], tmp_path / "x.gguf", lambda found: found.sums["blk.0.attn_q.weight"].fill(value))  # noqa: B023
        with pytest.raises(ImatrixError, match=r"blk\.0\.attn_q\.weight\.in_sum2: expected finite"):
            read_imatrix(path)


OTHERS = {
    "more layers": ({"layers": 1}, ("an importance matrix of 2 layers", "has 1")),
    "fewer layers": ({"layers": 3}, ("blk.2.attn_q.weight: missing",)),
    "another width": ({"hidden": 512}, ("token_embd.weight: 256 columns", "has 512", "of another model")),
    "another ffn": ({"ffn": 1024}, ("blk.0.ffn_down.weight: 512 columns", "has 1024")),
}


@pytest.mark.parametrize(("model", "words"), OTHERS.values(), ids=OTHERS)
def test_the_matrix_of_another_model_is_refused(collected, run, tmp_path: Path, model, words):
    folder = toy.write_checkpoint(tmp_path / "checkpoint", **model)
    refused(run("build", folder, tmp_path / "out", "--imatrix", collected[1]), ("toy.gguf", *words))
    assert not (tmp_path / "out").exists()


# -- building with one -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Q4_K_M", "Q4_0", "IQ4_XS"])
def test_the_bytes_are_those_of_libllama(name: str, collected, toy_bf16: Path, convert, build, tmp_path: Path):
    weighed, theirs = read_imatrix(collected[1]), tmp_path / "theirs.gguf"
    numbers = {key: np.ascontiguousarray(weighed.of(key)) for key in weighed.sums}
    entries = [
        ll.llama_model_imatrix_data(key.encode(), value.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), value.size)
        for key, value in numbers.items()
    ]
    params = ll.llama_model_quantize_default_params()
    params.ftype = RECIPES[name]
    params.imatrix = (ll.llama_model_imatrix_data * (len(entries) + 1))(*entries)
    full = convert(toy_bf16) / LANGUAGE
    assert ll.llama_model_quantize(bytes(full), bytes(theirs), ctypes.byref(params)) == 0

    plan = plan_bundle(read_checkpoint(toy_bf16), name, imatrix=weighed)
    manifest = build_bundle(plan, tmp_path / "ours", SILENT)
    assert manifest.recipe == name
    ours = {tensor.name: tensor for tensor in Reader(tmp_path / "ours" / LANGUAGE).tensors}
    expected = {tensor.name: tensor for tensor in Reader(theirs).tensors}
    assert ours.keys() == expected.keys()
    for key, found in ours.items():
        assert found.tensor_type == expected[key].tensor_type, key
        np.testing.assert_array_equal(found.data, expected[key].data, err_msg=key)
    plain = {tensor.name: tensor for tensor in Reader(build(toy_bf16, name) / LANGUAGE).tensors}
    assert any(not np.array_equal(found.data, plain[key].data) for key, found in ours.items())


def test_important_columns_have_smaller_errors(toy_bf16: Path, convert, tmp_path: Path):
    opened = read_checkpoint(toy_bf16)
    weighed = Imatrix()
    for row in opened.text_tensors:
        if len(row.shape) == 2:
            width = opened.shape(row)[1]
            counts = np.where(np.arange(width) % 32 < 4, 1000.0, 1.0)
            weighed.sums[row.gguf], weighed.counts[row.gguf] = counts, 1
    build_bundle(plan_bundle(opened, "Q4_K_M", imatrix=weighed), tmp_path / "out", SILENT)
    before, after = (tensors_of(folder / LANGUAGE) for folder in (convert(toy_bf16), tmp_path / "out"))
    error = np.square(before["blk.0.ffn_up.weight"] - after["blk.0.ffn_up.weight"]).mean(0)
    heavy = np.arange(256) % 32 < 4
    assert error[heavy].mean() < 0.7 * error[~heavy].mean()


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_writes_what_collect_gives(run, toy_bf16: Path, text: Path, tmp_path: Path, collected):
    out = tmp_path / "toy.gguf"
    status, stdout, _ = run("imatrix", toy_bf16, out, "--calibration", text, "--chunks", 2)
    assert status == 0 and "toy.gguf: 15 weights, 2 chunks" in stdout
    assert out.read_bytes() == collected[1].read_bytes()


def test_the_included_text_has_several_chunks_and_many_languages(toy_bf16: Path):
    words = collect_imatrix.TEXT.read_text(encoding="utf-8")
    assert len(token_ids(toy_bf16, words)) > 4 * collect_imatrix.CHUNK
    for word in ("road", "Fässer", "pasillo", "chemin", "빨간", "青い", "飞到", "Лети", "اذهب", "लाल"):
        assert word in words, word


REFUSED = {
    "no text": (["--calibration", "~/none.txt"], ("none.txt: not readable",)),
    "too little text": (["--calibration", "~/short.txt"], ("short.txt", "tokens; expected 512 or more")),
    "no pictures": (["--frames", "~/empty"], ("empty: no image in this folder; expected .bmp",)),
    "no folder": (["--frames", "~/none"], ("none: no such file or folder; expected a folder of images or a video",)),
    "not a picture": (["--frames", "~/broken"], ("none of its 1 images", "a.png: not a JPEG, PNG, WebP or BMP")),
    "no instructions": (["--instructions", "~/blank.txt"], ("blank.txt: no instructions",)),
}


@pytest.mark.parametrize(("arguments", "words"), REFUSED.values(), ids=REFUSED)
def test_unusable_input_is_one_line(run, toy_bf16: Path, tmp_path: Path, arguments, words):
    (tmp_path / "short.txt").write_text("Follow the road.")
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no picture")
    arguments = [argument.replace("~", str(tmp_path)) for argument in arguments]
    refused(run("imatrix", toy_bf16, tmp_path / "out.gguf", *arguments), words)
    assert not (tmp_path / "out.gguf").exists()


def test_a_text_only_model_takes_no_frames(run, pictures: Path, tmp_path: Path):
    folder = toy.write_checkpoint(tmp_path / "toy", vision=False, prefix="text")
    refused(run("imatrix", folder, tmp_path / "out.gguf", "--frames", pictures), ("text-only", "leave --frames out"))
    shutil.rmtree(folder)
    assert not any(tmp_path.iterdir())
