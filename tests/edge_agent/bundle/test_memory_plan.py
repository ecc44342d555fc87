"""The memory plan: the parts that are added up, and the order in which options are reduced."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from edge_agent.bundle.files import BundleFile
from edge_agent.bundle.manifest import LANGUAGE, MMPROJ, VISION, Manifest, read_manifest
from edge_agent.bundle.memory_plan import (
    GPU_CONTEXT_MIB,
    Gpu,
    NotEnoughMemoryError,
    adapters_mib,
    needed_mib,
    plan_memory,
)
from edge_agent.config import AdvancedConfig, CameraConfig, Config, LanguageConfig, VisionConfig
from edge_agent.ipc.events import StartupFailed, decode_model_event
from edge_agent.model.__main__ import main
from tests.harness.rig import model_start

CONFIG = Config(bundle="b", camera=CameraConfig(source="none"))


@pytest.fixture(scope="module")
def toy(toy_bundle: Path) -> Manifest:
    return read_manifest(toy_bundle).manifest


def shape_3b(toy: Manifest, vision_gb: float = 0.839) -> Manifest:
    """The numbers of a 3B bundle at Q4_K_M, as `edge-quantize build` writes them."""
    model = msgspec.structs.replace(
        toy.model, parameters=3_849_090_048, layers=26, hidden=3072, vocab=131072, kv_bytes_per_token=106496
    )
    sizes = {LANGUAGE: 2_146_489_632, VISION: round(vision_gb * 1e9), MMPROJ: 849_000_000}
    files = {name: BundleFile(bytes=n, sha256="0" * 64) for name, n in sizes.items()}
    by_type = {"Q4_K": 1_469_988_864, "Q6_K": 661_708_800, "F32": 651_264}
    return msgspec.structs.replace(toy, model=model, files=files, bytes_by_type=by_type)


def test_a_text_only_model_needs_no_memory_for_a_vision_encoder(toy):
    manifest = msgspec.structs.replace(shape_3b(toy), vision=None)
    assert needed_mib(CONFIG, manifest)["vision encoder"] == 0.0


def test_an_encoder_with_one_size_of_image_needs_the_same_memory_for_every_number_of_tokens(toy):
    """896x896 pixels in patches of 14: 4096 patches, whose scores are a float32 each, of 16 heads."""
    assert toy.vision is not None
    manifest = shape_3b(toy)
    manifest = msgspec.structs.replace(manifest, vision=msgspec.structs.replace(toy.vision, patch=14, fixed=(896, 896)))
    for max_image_tokens in (64, 1024):
        config = msgspec.structs.replace(CONFIG, vision=VisionConfig(backend="mtmd", max_image_tokens=max_image_tokens))
        expected_mib = manifest.files[MMPROJ].bytes / 2**20 + 16 * 4096**2 * 4 / 2**20
        assert needed_mib(config, manifest)["vision encoder"] == pytest.approx(expected_mib)


@pytest.mark.parametrize(
    ("source", "max_megapixels", "n_frames"),
    [("/dev/video0", 0.9216, 4), ("clip.mp4", 33.1776, 4), ("gst:x", 2, 4), ("zmq:ipc:///x", 33.1776, 6)],
)
def test_frames_of_the_largest_size_are_in_the_plan(toy, source, max_megapixels, n_frames):
    """The slot never gives its memory back, so the largest frame that is allowed counts."""
    camera = CameraConfig(source=source, max_megapixels=max_megapixels)
    parts = needed_mib(msgspec.structs.replace(CONFIG, camera=camera), shape_3b(toy))
    assert parts["frames"] == pytest.approx(n_frames * 3 * max_megapixels * 1e6 / 2**20)


def test_the_parts_are_those_of_arithmetic(toy):
    parts = needed_mib(CONFIG, shape_3b(toy), adapters_mib=12.0)
    assert parts["language model"] == pytest.approx(2047, abs=1)
    assert parts["its file's pages"] == 0
    mapped = msgspec.structs.replace(CONFIG, advanced=AdvancedConfig(mmap=True))
    pages = needed_mib(mapped, shape_3b(toy))["its file's pages"]
    assert pages == pytest.approx((1_469_988_864 + 661_708_800) / 2**20)
    assert parts["cache"] == 2 * 1024 * 106496 / 2**20 == 208
    small = msgspec.structs.replace(CONFIG, advanced=AdvancedConfig(kv_cache_type="q8_0"))
    assert needed_mib(small, shape_3b(toy))["cache"] == 208 * 8.5 / 16  # blocks of 32 bytes, and a scale of two
    language = 1_469_988_864 // 144 * 256 + 661_708_800 // 210 * 256 + 651_264 // 4
    float32 = (3_849_090_048 - language) * 4 / 2**20
    assert parts["vision encoder"] == pytest.approx(float32 + 839e6 / 2**20 + 16 * 1024**2 * 4 / 2**20, abs=1)
    assert parts["adapters"] == 12.0
    assert parts["frames"] == pytest.approx(4 * 3 * 13e6 / 2**20)
    mtmd = msgspec.structs.replace(CONFIG, vision=VisionConfig(backend="mtmd"))
    assert needed_mib(mtmd, shape_3b(toy))["vision encoder"] == pytest.approx(849e6 / 2**20 + 64, abs=1)
    # In float32 there is nothing to convert: the file is what is kept. Of int8 a quarter is kept beside.
    whole = needed_mib(CONFIG, shape_3b(toy, float32 * 2**20 / 1e9))["vision encoder"]
    int8 = needed_mib(CONFIG, shape_3b(toy, float32 / 4 * 2**20 / 1e9))["vision encoder"]
    assert int8 - whole == pytest.approx(float32 / 4, rel=0.01)


def test_a_configuration_that_fits_is_not_changed(toy):
    for free_mib in (None, 64_000.0):
        planned = plan_memory(CONFIG, shape_3b(toy), free_mib)
        assert planned.config == CONFIG and planned.reductions == {}


def test_options_are_reduced_in_order_and_no_more_than_needed(toy):
    manifest, distinct = shape_3b(toy), []  # the different reductions, in the order in which memory gets less
    config = msgspec.structs.replace(CONFIG, advanced=AdvancedConfig(mmap=True))
    full_mib = plan_memory(config, manifest, None).mib
    for free_mib in range(round(full_mib) + 100, 500, -10):
        try:
            planned = plan_memory(config, manifest, float(free_mib))
        except NotEnoughMemoryError as error:
            assert f"{free_mib} MiB free" in str(error) and "language model 2047" in str(error)
            break
        assert planned.mib <= free_mib
        if planned.reductions not in distinct:
            distinct.append(planned.reductions)
    order = ["advanced.mmap", "advanced.kv_cache_type", "vision.backend", "vision.max_image_tokens", "language.context"]
    keys = [list(reductions) for reductions in distinct]
    assert {len(reduced) for reduced in keys} == set(range(6)), "each option is a step of its own"
    assert all(reduced == order[: len(reduced)] for reduced in keys) and keys == sorted(keys, key=len)
    assert distinct[-1] == dict(zip(order, (False, "q8_0", "mtmd", 64, 640), strict=True))
    assert distinct[4]["vision.max_image_tokens"] == 192


@pytest.mark.parametrize("vision", ["none", "of one size"])
def test_image_tokens_are_not_reduced_where_frames_have_one_number_of_them(toy, vision):
    shape, mtmd = shape_3b(toy), msgspec.structs.replace(CONFIG, vision=VisionConfig(backend="mtmd"))
    fixed = None if vision == "none" else msgspec.structs.replace(shape.vision, fixed=(896, 896))
    manifest = msgspec.structs.replace(shape, vision=fixed)
    small = msgspec.structs.replace(
        mtmd, advanced=AdvancedConfig(kv_cache_type="q8_0"), language=LanguageConfig(context=640)
    )
    planned = plan_memory(mtmd, manifest, plan_memory(small, manifest, None).mib)
    assert planned.reductions == {"advanced.kv_cache_type": "q8_0", "language.context": 640}


def test_a_cache_in_8_bit_is_not_offered_where_flash_attention_is_forbidden(toy):
    config = msgspec.structs.replace(CONFIG, advanced=AdvancedConfig(flash_attention=False))
    with pytest.raises(NotEnoughMemoryError):
        plan_memory(config, shape_3b(toy), 500.0)
    planned = plan_memory(config, shape_3b(toy), plan_memory(config, shape_3b(toy), None).mib - 50)
    assert planned.reductions == {"vision.backend": "mtmd"}


@pytest.mark.parametrize(
    "changes", [{"profile": "reproducible"}, {"advanced": AdvancedConfig(reproducible=True)}], ids=["profile", "switch"]
)
def test_a_cache_in_8_bit_is_not_offered_where_reproducible_answers_are_requested(toy, changes):
    free_mib = plan_memory(CONFIG, shape_3b(toy), None).mib - 50
    assert plan_memory(CONFIG, shape_3b(toy), free_mib).reductions == {"advanced.kv_cache_type": "q8_0"}
    config = msgspec.structs.replace(CONFIG, **changes)
    assert plan_memory(config, shape_3b(toy), free_mib).reductions == {"vision.backend": "mtmd"}


def test_the_small_profile_needs_what_is_left_after_the_first_reductions(toy):
    small = msgspec.structs.replace(CONFIG, profile="small")
    reduced = msgspec.structs.replace(
        CONFIG, vision=VisionConfig(backend="mtmd"), advanced=AdvancedConfig(kv_cache_type="q8_0")
    )
    assert needed_mib(small, shape_3b(toy)) == needed_mib(reduced, shape_3b(toy))


# -- with a GPU -------------------------------------------------------------------------------------------------------


CARD = Gpu(free_mib=24_000.0, own_memory=True)
SHARED = Gpu(free_mib=None, own_memory=False)  # as on a Jetson
MTMD = msgspec.structs.replace(CONFIG, vision=VisionConfig(backend="mtmd"))
ONNX = msgspec.structs.replace(CONFIG, vision=VisionConfig(backend="onnxruntime"))


@pytest.mark.parametrize("gpu_layers", [-1, 27, 99])
@pytest.mark.parametrize("gpu", [CARD, SHARED])
def test_a_model_on_a_gpu_has_no_repacked_copy(toy, gpu, gpu_layers):
    """-1, the default, means all layers. Weights are mapped there, and the file's pages can be dropped."""
    language = LanguageConfig(gpu_layers=gpu_layers)
    for advanced in (AdvancedConfig(), AdvancedConfig(mmap=True)):
        config = msgspec.structs.replace(CONFIG, language=language, advanced=advanced)
        assert needed_mib(config, shape_3b(toy), gpu=gpu)["its file's pages"] == 0
        assert plan_memory(config, shape_3b(toy), 64_000.0, gpu=gpu).reductions == {}


def test_a_part_of_the_layers_on_a_gpu_leaves_the_rest_on_the_cpu(toy):
    """The 3B has 26 layers, and the head counts as one."""
    config = msgspec.structs.replace(MTMD, language=LanguageConfig(gpu_layers=9))
    planned = plan_memory(config, shape_3b(toy), 64_000.0, gpu=CARD)
    assert planned.card_parts_mib["language model"] == pytest.approx(2047 / 3, abs=1)
    assert planned.parts_mib["language model"] == pytest.approx(2047 * 2 / 3, abs=1)
    mapped = needed_mib(config, shape_3b(toy), gpu=CARD)["its file's pages"]
    assert mapped == pytest.approx((1_469_988_864 + 661_708_800) / 2**20 * 2 / 3)


def test_a_cards_own_memory_is_a_sum_of_its_own(toy):
    """Measured on an H200: 4,068 MiB with mtmd and 5,380 with onnxruntime."""
    planned = plan_memory(MTMD, shape_3b(toy), 64_000.0, 12.0, CARD)
    assert 4068 < planned.card_mib < 1.1 * 4068
    assert planned.card_parts_mib["adapters"] == 12.0 and planned.card_parts_mib["the GPU's context"] == GPU_CONTEXT_MIB
    assert {name for name, mib in planned.parts_mib.items() if mib >= 1} == {"frames", "the process"}
    assert 5380 < plan_memory(ONNX, shape_3b(toy), 64_000.0, gpu=CARD).card_mib < 1.1 * 5380
    two = plan_memory(MTMD, shape_3b(toy), 64_000.0, 12.0, Gpu(free_mib=24_000.0, own_memory=True, n_devices=2))
    assert two.card_mib - planned.card_mib == GPU_CONTEXT_MIB


def test_onnxruntime_may_keep_the_encoder_in_the_machines_memory(toy):
    """The plan does not know whether it can use the card: the encoder counts in both."""
    planned = plan_memory(ONNX, shape_3b(toy), 64_000.0, gpu=CARD)
    assert planned.parts_mib["vision encoder"] == planned.card_parts_mib["vision encoder"] > 2000


def test_a_card_that_is_short_of_memory_reduces_options_and_is_named(toy):
    manifest, seen = shape_3b(toy), []
    full_mib = plan_memory(ONNX, manifest, None, gpu=CARD).card_mib
    for free_mib in range(round(full_mib) + 100, 500, -50):
        gpu = Gpu(free_mib=float(free_mib), own_memory=True)
        try:
            planned = plan_memory(ONNX, manifest, 64_000.0, gpu=gpu)
        except NotEnoughMemoryError as error:
            assert str(error).startswith("GPU memory: ") and f"{free_mib} MiB free" in str(error)
            break
        assert planned.card_mib <= free_mib
        seen += [planned.reductions] if planned.reductions not in seen else []
    order = ["advanced.kv_cache_type", "vision.backend", "vision.max_image_tokens", "language.context"]
    assert [list(reductions) for reductions in seen if len(reductions) < 3] == [[], order[:1], order[:2]]
    assert list(seen[-1]) == order, "mmap costs nothing on a GPU"


@pytest.mark.parametrize(
    ("free_mib", "gpu_free_mib", "decides"), [(64e3, 3000.0, 3000), (3000.0, 64e3, 3000), (3000.0, None, 3000)]
)
def test_a_shared_memory_is_one_sum_and_the_smaller_figure_counts(toy, free_mib, gpu_free_mib, decides):
    gpu = Gpu(free_mib=gpu_free_mib, own_memory=False)
    with pytest.raises(NotEnoughMemoryError, match=rf"^memory: .* {decides} MiB free"):
        plan_memory(CONFIG, shape_3b(toy), free_mib, gpu=gpu)
    planned = plan_memory(CONFIG, shape_3b(toy), 64e3, gpu=Gpu(free_mib=64e3, own_memory=False))
    assert planned.card_parts_mib == {} and planned.parts_mib["the GPU's context"] == GPU_CONTEXT_MIB


def test_an_unknown_memory_of_a_card_reduces_nothing(toy):
    assert plan_memory(CONFIG, shape_3b(toy), 64e3, gpu=Gpu(free_mib=None, own_memory=True)).reductions == {}
    with pytest.raises(NotEnoughMemoryError, match=r"^memory: "):
        plan_memory(CONFIG, shape_3b(toy), 200.0, gpu=Gpu(free_mib=None, own_memory=True))


def test_adapters_are_added_to_the_sum(tmp_path):
    (tmp_path / "a.gguf").write_bytes(bytes(3 << 20))
    language = LanguageConfig(adapters={"a": str(tmp_path / "a.gguf"), "b": str(tmp_path / "none")})
    assert adapters_mib(msgspec.structs.replace(CONFIG, language=language)) == 3.0


def test_too_little_memory_is_not_an_error_of_the_configuration(toy_bundle, monkeypatch):
    """After an error of the configuration systemd never starts the daemon again. Another program may free memory."""
    config = msgspec.structs.replace(CONFIG, bundle=str(toy_bundle))
    events: list = []

    class Events:
        def send(self, payload: bytes) -> None:
            events.append(decode_model_event(payload))

    monkeypatch.setattr(
        "edge_agent.model.__main__.attach_to_supervisor", lambda: (None, Events(), model_start(config), False)
    )
    monkeypatch.setattr("edge_agent.board.health.mem_available_mib", lambda: 100.0)
    assert main() == 1
    assert isinstance(events[-1], StartupFailed) and events[-1].fault == "memory"
    assert "100 MiB free" in events[-1].reason
