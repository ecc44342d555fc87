"""From a frame to image embeddings: sizes, pixels, and that the two encoders agree."""

from __future__ import annotations

import tracemalloc

import cv2
import numpy as np
import pytest

from edge_agent.bundle.manifest import LANGUAGE, MMPROJ, VISION, VisionInfo, read_manifest
from edge_agent.camera.picture import decode_jpeg, decode_jpeg_for
from edge_agent.camera.source import WantedImage
from edge_agent.ipc.image_grid import image_grid, image_size, resize
from edge_agent.model.llama import LlamaContext, LlamaOptions
from edge_agent.model.onnx_runtime import onnxruntime
from edge_agent.model.preprocess import Preprocessor, image_request, n_embedding_rows
from edge_agent.model.token_budget import TokenBudget
from edge_agent.model.vision_encoder import (
    TENSORRT,
    EncoderOptions,
    MtmdEncoder,
    OnnxEncoder,
    VisionError,
    open_encoder,
)
from tests.harness import toy
from tests.harness.pictures import encoded, scene

UNIT = 28  # pixels a side of one token
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
FACTS = VisionInfo(patch=14, merge=2, image_size=1540, mean=MEAN, std=STD)


@pytest.fixture(scope="module")
def opened(toy_bundle):
    return read_manifest(toy_bundle)


@pytest.fixture(scope="module")
def language(opened):
    with LlamaContext(opened.path(LANGUAGE), LlamaOptions(context=256), opened.manifest.model.embedding) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def break_row(language, opened):
    return language.embed([opened.manifest.model.special["img_break"]])[0]


@pytest.fixture(scope="module")
def onnx(opened):
    encoder = OnnxEncoder(opened.path(VISION), Preprocessor(opened.manifest.vision, 256), 1)
    yield encoder
    encoder.close()


@pytest.fixture(scope="module")
def mtmd(opened, language, break_row):
    encoder = MtmdEncoder(opened.path(MMPROJ), language.model, break_row, UNIT, 1, gpu=False)
    yield encoder
    encoder.close()


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# -- sizes ------------------------------------------------------------------------------------------------------------


def test_rows_are_tokens_and_the_breaks_between_lines():
    assert n_embedding_rows(5, 7) == 5 * 7 + 4  # 140x196 pixels: 39 rows
    assert n_embedding_rows(1, 8) == 8 and n_embedding_rows(8, 1) == 15


# -- pixels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(28, 224), (140, 196), (448, 448)])
def test_an_image_on_the_grid_is_left_as_it_is(size):
    frame = noise(*size)
    assert (Preprocessor(FACTS, 256).image(frame) == frame).all()


@pytest.mark.parametrize("size", [(1, 1), (480, 640), (8000, 10), (10, 8000), (4320, 7680), (37, 1540)])
def test_any_frame_is_resized_to_the_grid(size):
    image = Preprocessor(FACTS, 256).image(noise(*size))
    lines, columns = image_grid(*size, image_request(FACTS, 256))
    assert image.shape == (lines * UNIT, columns * UNIT, 3) and image.dtype == np.uint8
    assert lines * columns <= 256


def test_colours_and_directions_stay():
    """Red above left, green above right, blue below: shrunk and enlarged."""
    for size in ((960, 960), (60, 60)):
        frame = np.zeros((*size, 3), np.uint8)
        half = size[0] // 2
        frame[:half, :half, 0] = frame[:half, half:, 1] = frame[half:, :, 2] = 255
        image = Preprocessor(FACTS, 64).image(frame)
        height, width = image.shape[:2]
        assert tuple(image[height // 4, width // 4]) == (255, 0, 0)
        assert tuple(image[height // 4, 3 * width // 4]) == (0, 255, 0)
        assert tuple(image[3 * height // 4, width // 2]) == (0, 0, 255)


def test_a_shrunk_frame_is_an_average_and_not_a_sample():
    board = np.indices((896, 896)).sum(0) % 2 * 255  # black and white, pixel by pixel
    image = Preprocessor(FACTS, 256).image(np.repeat(board[..., None], 3, 2).astype(np.uint8))
    assert abs(image.astype(int) - 127.5).max() <= 1


def test_pixels_are_those_of_plain_numpy():
    image = np.arange(256, dtype=np.uint8).repeat(28 * 28 * 3 // 16).reshape(-1, 28 * 8, 3)[: 28 * 6]
    pixels = Preprocessor(FACTS, 256).pixels(image)
    exact = (image.astype(np.float64) / 255 - np.array(MEAN)) / np.array(STD)
    assert pixels.shape == (1, 3, *image.shape[:2]) and pixels.dtype == np.float32
    error = np.abs(pixels[0].transpose(1, 2, 0) - exact)
    assert (error <= 4 * np.spacing(np.float32(np.abs(exact).max()))).all()
    by_hand = {0: -1.79226, 255: 1.93034}  # (0 - 0.48145466) / 0.26862954 and (1 - 0.48145466) / 0.26862954
    for value, normalised in by_hand.items():
        grey = np.full((28, 224, 3), value, np.uint8)
        assert abs(Preprocessor(FACTS, 256).pixels(grey)[0, 0, 0, 0] - normalised) < 1e-5


def test_buffers_are_reused_while_the_size_stays():
    preprocessor = Preprocessor(FACTS, 256)
    image = preprocessor.image(noise(480, 640))
    pixels = preprocessor.pixels(image)
    frame = noise(480, 640, seed=1)
    tracemalloc.start()
    try:
        assert preprocessor.image(frame) is image and preprocessor.pixels(image) is pixels
        allocated = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert allocated < pixels.nbytes / 10
    assert (image == Preprocessor(FACTS, 256).image(frame)).all()
    assert (pixels == Preprocessor(FACTS, 256).pixels(image)).all()

    smaller = preprocessor.image(noise(300, 300))
    assert smaller.shape != image.shape
    preprocessor.pixels(smaller)
    assert preprocessor.image(noise(480, 640)).shape == image.shape


# -- rows -------------------------------------------------------------------------------------------------------------


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


@pytest.mark.parametrize("frame_size", [(2160, 3840), (2016, 3584), (3024, 4032)])
def test_a_jpeg_that_was_reduced_first_gives_the_same_rows(onnx, frame_size):
    """Decoded at a half of its size, against one average over exact areas."""
    request = image_request(FACTS, 25)
    jpeg = encoded(".jpg", cv2.resize(scene(480, 640), frame_size[::-1], interpolation=cv2.INTER_CUBIC))
    decoded, reduced = decode_jpeg(jpeg), decode_jpeg_for(WantedImage(1, request), jpeg).bgr
    assert len(reduced) <= len(decoded) // 2
    height, width = image_size(*frame_size, request)
    image = np.empty((height, width, 3), np.uint8)
    resize(reduced, image)
    exact = cv2.resize(decoded, (width, height), interpolation=cv2.INTER_AREA)
    assert not np.array_equal(image, exact)
    cosine = cosines(onnx.encode(image).copy(), onnx.encode(exact))
    assert cosine.mean() >= 0.9999 and cosine.min() >= 0.9998, "one row of a dark, even place feels a rounding"


@pytest.mark.parametrize("tokens", [(1, 8), (8, 1), (3, 3), (4, 5), (16, 16), (12, 21), (1, 55), (55, 1)])
def test_both_encoders_give_the_same_rows(onnx, mtmd, tokens):
    lines, columns = tokens
    image = toy.toy_image(lines * UNIT, columns * UNIT)
    by_onnx, by_mtmd = onnx.encode(image), np.array(mtmd.encode(image))
    assert by_onnx.shape == by_mtmd.shape == (n_embedding_rows(lines, columns), 256)
    assert by_onnx.dtype == by_mtmd.dtype == np.float32
    assert cosines(by_onnx, by_mtmd).min() >= 0.999
    lengths = np.linalg.norm(by_onnx, axis=1) / np.linalg.norm(by_mtmd, axis=1)
    assert abs(lengths - 1).max() < 0.02


def test_rows_go_line_by_line_with_the_break_row_between(onnx, mtmd, break_row):
    for encoder in (onnx, mtmd):
        rows = np.array(encoder.encode(toy.toy_image(3 * UNIT, 4 * UNIT)))
        alike = cosines(rows, np.broadcast_to(break_row, rows.shape)) > 0.99
        assert list(np.flatnonzero(alike)) == [4, 9]


def test_an_image_changes_the_rows_and_nothing_else_does(onnx, mtmd):
    one, other = toy.toy_image(112, 140, seed=1), toy.toy_image(112, 140, seed=2)
    for encoder in (onnx, mtmd):
        first = np.array(encoder.encode(one))
        assert not np.allclose(first, encoder.encode(other), rtol=0.1)
        encoder.encode(toy.toy_image(448, 28, seed=3))
        assert (first == encoder.encode(one)).all()


def test_break_rows_are_finite_whatever_was_in_memory_before(mtmd, break_row):
    """llama.cpp multiplies uninitialised memory with zero, and NaN times zero is NaN."""
    sizes = [(84, 84), (112, 140), (28, 448), (196, 196), (448, 28)]
    for n in range(50):
        height, width = sizes[n % len(sizes)]
        rows = mtmd.encode(noise(height, width, seed=n))
        assert np.isfinite(rows).all()
        columns = width // UNIT
        assert (rows[columns :: columns + 1] == break_row).all()


@pytest.mark.parametrize("backend", ["onnxruntime", "mtmd"])
@pytest.mark.parametrize("max_tokens", [8, 9, 256])
@pytest.mark.parametrize("size", [(1, 1), (480, 640), (448, 448), (8000, 10), (4320, 7680)])
def test_every_frame_gives_the_rows_of_its_grid(opened, language, break_row, backend, max_tokens, size):
    preprocessor = Preprocessor(opened.manifest.vision, max_tokens)
    options = EncoderOptions(backend=backend, threads=1, tensorrt=False, gpu=False)
    file = opened.path(MMPROJ if backend == "mtmd" else VISION)
    encoder = open_encoder(file, options, preprocessor, language.model, break_row)
    try:
        rows = encoder.encode(preprocessor.image(noise(*size)))
        assert rows.shape == (
            n_embedding_rows(*image_grid(*size, image_request(opened.manifest.vision, max_tokens))),
            256,
        )
        assert np.isfinite(rows).all()
    finally:
        encoder.close()


# -- loading ----------------------------------------------------------------------------------------------------------


def test_the_provider_names_what_really_runs(onnx, mtmd):
    assert onnx.provider in ("onnxruntime CPUExecutionProvider", "onnxruntime CUDAExecutionProvider")
    assert mtmd.provider == "mtmd CPU"


@pytest.mark.parametrize("content", [b"", b"not a model", b"GGUF" + b"\xff" * 100, bytes(10_000)])
def test_a_damaged_encoder_file_is_an_error_of_one_line(tmp_path, language, break_row, content):
    path = tmp_path / "encoder"
    path.write_bytes(content)
    for make in (
        lambda: OnnxEncoder(path, Preprocessor(FACTS, 64), 1),
        lambda: MtmdEncoder(path, language.model, break_row, UNIT, 1, gpu=False),
    ):
        with pytest.raises(VisionError) as caught:
            make()
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_projector_of_another_width_is_refused(tmp_path, language, break_row):
    from quantize.build import convert
    from quantize.formats.build_plan import plan_conversion
    from quantize.progress import SILENT
    from quantize.source.checkpoint import read_checkpoint

    wide = read_checkpoint(toy.write_checkpoint(tmp_path / "wide", hidden=512))
    convert(plan_conversion(wide, "bf16"), tmp_path / "out", SILENT)
    with pytest.raises(VisionError, match="for this language model"):
        MtmdEncoder(tmp_path / "out" / MMPROJ, language.model, break_row, UNIT, 1, gpu=False)


# -- in time -----------------------------------------------------------------------------------------------------------


def test_a_budget_is_the_largest_that_is_in_time():
    budget = TokenBudget.of(256)
    assert budget.sizes == [256, 192, 128, 96, 64]
    assert budget.select(1000).tokens == 256  # nothing is measured yet
    budget = budget.record(256, 256 * 10.0, 100.0)  # 10 ms a token
    selected = []
    for left_ms in (3000, 2300, 1700, 1300, 900, 100):
        budget = budget.select(left_ms)
        selected.append(budget.tokens)
    assert selected == [256, 192, 128, 96, 64, 64]


def test_a_larger_budget_returns_when_there_is_a_margin():
    budget = TokenBudget.of(256).record(256, 2560.0, 0.0).select(2400)
    assert budget.tokens == 192
    assert budget.select(2850).tokens == 192  # 256 would just be in time: that would switch back and forth
    assert budget.select(3500).tokens == 256
    for _ in range(30):  # the board is cooler now, and the estimates follow
        budget = budget.record(256, 256.0, 10.0)
    assert budget.select(400).tokens == 256


def test_a_small_budget_has_one_size():
    for n in (8, 25, 64):
        budget = TokenBudget.of(n).record(n, 1e6, 1e6)
        assert budget.sizes == [n] and budget.select(1.0).tokens == n


def test_tensorrt_is_refused_where_it_is_missing_and_tried_first_where_it_is_not(toy_bundle, monkeypatch, tmp_path):
    """There is no GPU here: the arguments for onnxruntime are checked, not their effect."""
    path = toy_bundle / VISION
    with pytest.raises(VisionError, match=r"vision\.tensorrt: onnxruntime here has only .*CPU"):
        OnnxEncoder(path, Preprocessor(FACTS, 64), 1, tensorrt=True)
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path))
    passed, real = [], onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [TENSORRT, "CPUExecutionProvider"])
    monkeypatch.setattr(
        onnxruntime, "InferenceSession",
        lambda path, options, providers: passed.append(providers) or real(path, options, providers=providers[1:]),
    )  # fmt: skip
    encoder = OnnxEncoder(path, Preprocessor(FACTS, 64), 1, tensorrt=True)
    assert encoder.provider == "onnxruntime CPUExecutionProvider", "the provider that runs, not the requested one"
    assert (encoder.asked, encoder.runs) == (TENSORRT, "CPUExecutionProvider")
    (name, options), cpu = passed[0]
    assert (name, cpu) == (TENSORRT, "CPUExecutionProvider")
    assert options["trt_engine_cache_path"] == str(tmp_path / "tensorrt") and (tmp_path / "tensorrt").is_dir()
