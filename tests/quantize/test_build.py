"""Complete bundles: all or nothing, described correctly, and the same bytes from every build."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

import quantize.build
import quantize.build_folder
from edge_agent.bundle import manifest, verify
from edge_agent.bundle.gguf_package import gguf
from edge_agent.model.llama import LlamaContext, LlamaOptions
from edge_agent.model.onnx_runtime import onnxruntime
from quantize.build_folder import BuildError, BuildFolder
from quantize.formats import ggml_kernels
from quantize.formats.build_plan import BuildPlan, plan_conversion
from quantize.progress import SILENT, Progress
from quantize.source import checkpoint, hf_config
from quantize.standard_recipes import RECIPES, bytes_by_type, plan_bundle, recipe_types
from tests.harness import toy_layout
from tests.harness.gguf_reading import Reader, reader, tensors_of
from tests.harness.progress import RecordedProgress

RECIPE = "Q8_0"  # the one that is made fastest: what these tests look at is the same for all
FILES = {"bundle.json", "language.gguf", "mmproj.gguf", "report.json", "vision.onnx"}


def built(folder: Path, out: Path, name: str = RECIPE, force: bool = False, progress: Progress = SILENT) -> Path:
    plan = plan_bundle(checkpoint.read_checkpoint(folder), name)
    quantize.build.build(plan, out, progress, force=force)
    return out


def converted(folder: Path, out: Path, kind: str, force: bool = False, progress: Progress = SILENT) -> Path:
    plan = plan_conversion(checkpoint.read_checkpoint(folder), kind)
    quantize.build.convert(plan, out, progress, force=force)
    return out


def matrix_type(folder: Path) -> str:
    """Of the weights in language.gguf."""
    tensors = {tensor.name: tensor for tensor in Reader(folder / manifest.LANGUAGE).tensors}
    return tensors["blk.0.attn_q.weight"].tensor_type.name


# -- what is in a bundle ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_makes_a_bundle_that_verifies_and_runs(toy_small: Path, build: Callable[..., Path], name: str):
    out = build(toy_small, name)
    verified = verify.verify_bundle(out)
    assert set(os.listdir(out)) == FILES and verified.manifest.files.keys() == FILES - {"bundle.json"}
    assert (verified.manifest.recipe, verified.manifest.source_dtype) == (name, "FP8")
    opened = checkpoint.read_checkpoint(toy_small)
    assert verified.manifest.bytes_by_type == bytes_by_type(opened, recipe_types(opened, name))
    found = reader(out / manifest.LANGUAGE)
    assert f"MOSTLY_{name}" == gguf.LlamaFileType(found.fields["general.file_type"].contents()).name
    # The rows the runtime looks up by itself are those the `gguf` package finds.
    table = next(tensor for tensor in found.tensors if tensor.name == "token_embd.weight")
    rows = gguf.quants.dequantize(table.data, table.tensor_type)
    embedding = verified.manifest.model.embedding
    assert (embedding.offset, embedding.ggml_type) == (table.data_offset, table.tensor_type.name)
    assert embedding.row_bytes * 2048 == table.n_bytes
    config = LlamaOptions(context=256, threads=1, gpu_layers=0)
    with LlamaContext(out / manifest.LANGUAGE, config, embedding) as llm:
        ids = [0, 1, 12, 999, 1000, 1234, 2047]
        np.testing.assert_array_equal(llm.embed(ids), rows[ids])
        assert np.isfinite(llm.logits_after_last(ids, 0)).all()


def test_a_bundle_holds_the_encoders_of_the_conversion(toy_bf16: Path, toy_bundle: Path, convert):
    for name in (manifest.VISION, manifest.MMPROJ):
        assert (toy_bundle / name).read_bytes() == (convert(toy_bf16) / name).read_bytes()


def test_the_quantised_model_is_the_converted_one_rounded(toy_bf16: Path, toy_bundle: Path, convert):
    before = tensors_of(convert(toy_bf16) / manifest.LANGUAGE)
    after = tensors_of(toy_bundle / manifest.LANGUAGE)
    assert after.keys() == before.keys()
    for name, value in after.items():
        assert np.linalg.norm(value - before[name]) <= 0.1 * np.linalg.norm(before[name]), name


def test_the_manifest_describes_the_files(toy_bf16: Path, tmp_path: Path):
    folder = shutil.copytree(toy_bf16, tmp_path / "checkpoint")
    (folder / "README.md").write_text("---\nlibrary_name: vllm\nlicense: apache-2.0\n---\n# Card\n")
    (folder / "chat_template.jinja").write_text("{{ '[INST]' }}")
    manifest = verify.verify_bundle(built(folder, tmp_path / "out")).manifest
    model = manifest.model
    config = json.loads((folder / "config.json").read_text())["text_config"]
    raw = (folder / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    weights = [entry["shape"] for name, entry in header.items() if name.endswith(".weight")]
    assert (model.family, model.variant) == ("ministral3", "instruct")
    assert model.parameters == sum(int(np.prod(shape)) for shape in weights)
    assert (model.layers, model.hidden, model.vocab) == (2, 256, 4096)
    assert model.context == config["max_position_embeddings"]
    assert model.kv_bytes_per_token == 2 * 2 * 2 * 2 * 128  # layers, K and V, bytes, heads, width
    assert model.special["img_break"] == toy_layout.IMG_BREAK and model.special["inst"] == 3
    assert (manifest.vision.patch, manifest.vision.merge, manifest.vision.image_size) == (14, 2, 1540)
    assert (manifest.vision.mean, manifest.vision.std) == (toy_layout.PIXEL_MEAN, toy_layout.PIXEL_STD)
    assert manifest.source_dtype == "BF16"
    assert manifest.licence == "apache-2.0"
    assert manifest.source_sha256 == {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("config.json", "model.safetensors")
    }
    for name, file in manifest.files.items():
        raw = (tmp_path / "out" / name).read_bytes()
        assert (file.bytes, file.sha256) == (len(raw), hashlib.sha256(raw).hexdigest())


# -- complete or not there --------------------------------------------------------------------------------------------


def test_a_link_in_the_place_of_the_hidden_folder_is_not_followed(toy_small: Path, tmp_path: Path):
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "language.gguf").write_text("precious")
    (tmp_path / ".out.part").symlink_to(tmp_path / "victim")
    with pytest.raises(BuildError, match=r"\.out\.part: expected what an interrupted run has left, found a link"):
        quantize.build.build(plan_bundle(checkpoint.read_checkpoint(toy_small), "Q8_0"), tmp_path / "out", SILENT)
    assert (tmp_path / "victim" / "language.gguf").read_text() == "precious"


def test_the_manifest_comes_last_and_the_bundle_appears_at_once(toy_small: Path, tmp_path: Path, monkeypatch):
    out, stages, contents = tmp_path / "bundle", [], {}
    write_manifest = manifest.write_manifest

    def watch(stage: str, what: str, done: int, total: int) -> None:
        assert 0 <= done <= total and "\n" not in what
        if stage not in stages:
            stages.append(stage)
        (work,) = tmp_path.iterdir()  # hidden, and the only thing there
        assert work.name == ".bundle.part"
        assert not (work / manifest.MANIFEST).exists()

    def look_and_write(work: Path, manifest: manifest.Manifest) -> None:
        names = set(os.listdir(work)) - {"journal.json", "lock"}
        contents.update({name: (work / name).read_bytes() for name in names})
        write_manifest(work, manifest)

    monkeypatch.setattr("quantize.build.write_manifest", look_and_write)
    built(toy_small, out, progress=RecordedProgress(watch))
    assert stages == [f"language {RECIPE}", "mmproj", "vision", "validate", "hash source"]
    assert os.listdir(tmp_path) == ["bundle"] and set(os.listdir(out)) == FILES
    assert contents == {name: (out / name).read_bytes() for name in FILES - {manifest.MANIFEST}}


@pytest.mark.parametrize(
    ("stage", "error"),
    [
        (f"language {RECIPE}", KeyboardInterrupt),
        ("mmproj", OSError(errno.ENOSPC, "No space left on device")),
        ("vision", KeyboardInterrupt),
        ("validate", OSError(errno.EIO, "Input/output error")),
        ("hash source", KeyboardInterrupt),
    ],
)
def test_a_stopped_build_keeps_the_old_bundle_and_leaves_only_resumable_files(
    toy_small: Path, build: Callable[..., Path], tmp_path: Path, stage: str, error: BaseException
):
    out = tmp_path / "bundle"
    shutil.copytree(build(toy_small, "Q4_K_M"), out)
    before = {name: (out / name).read_bytes() for name in FILES}

    def stop(at: str, *_: object) -> None:
        if at == stage:
            raise error

    with pytest.raises((KeyboardInterrupt, OSError, BuildError)):
        built(toy_small, out, force=True, progress=RecordedProgress(stop))
    interrupted = error is KeyboardInterrupt and not stage.startswith("language")
    assert sorted(os.listdir(tmp_path)) == [*([".bundle.part"] if interrupted else []), "bundle"]
    assert {name: (out / name).read_bytes() for name in os.listdir(out)} == before


def test_an_existing_folder_is_replaced_only_when_asked(toy_small: Path, build: Callable[..., Path], tmp_path: Path):
    out = tmp_path / "bundle"
    shutil.copytree(build(toy_small, "Q4_K_M"), out)
    with pytest.raises(BuildError, match=r"bundle: exists; .*--force"):
        converted(toy_small, out, "f16")
    assert verify.verify_bundle(out)
    converted(toy_small, out, "f16", force=True)
    assert matrix_type(out) == "F16" and set(os.listdir(out)) == FILES - {"bundle.json", "report.json"}
    assert os.listdir(tmp_path) == ["bundle"]


@pytest.mark.parametrize(
    "kind", ["foreign file", "sub-folder", "plain file", "link to a bundle", "the checkpoint itself"]
)
def test_force_replaces_only_what_this_tool_made(
    toy_small: Path, build: Callable[..., Path], tmp_path: Path, kind: str
):
    folder, out = tmp_path / "checkpoint", tmp_path / "bundle"
    shutil.copytree(toy_small, folder)
    if kind == "plain file":
        out.write_text("precious")
    elif kind == "link to a bundle":
        shutil.copytree(build(toy_small, "Q4_K_M"), tmp_path / "real")
        out.symlink_to("real")
    elif kind == "the checkpoint itself":
        out = folder
    else:
        shutil.copytree(build(toy_small, "Q4_K_M"), out)
        (out / "notes").mkdir() if kind == "sub-folder" else (out / "thesis.tex").write_text("precious")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(BuildError, match=r"--force replaces only folders made by edge-quantize; found '"):
        built(folder, out, force=True)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_replacing_on_a_file_system_without_rename_exchange(toy_small: Path, tmp_path: Path, monkeypatch):
    out = converted(toy_small, tmp_path / "full", "bf16")

    class Plain:
        def renameat2(self, *_: object) -> int:
            return -1

    monkeypatch.setattr("quantize.build_folder._libc", Plain())
    converted(toy_small, out, "f16", force=True)
    assert matrix_type(out) == "F16" and os.listdir(tmp_path) == ["full"]

    rename, calls = os.rename, []

    def stop_before_the_second(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(*arguments)

    monkeypatch.setattr(os, "rename", stop_before_the_second)
    with pytest.raises(KeyboardInterrupt):
        converted(toy_small, out, "f32", force=True)
    (old,) = tmp_path.iterdir()  # whatever it is called by now, the old one is whole
    assert matrix_type(old) == "F16" and len(os.listdir(old)) == 3


class Stopped(RecordedProgress):
    """Interrupts the work when a share of a stage is done."""

    def __init__(self, stage: str = "", share: float = 0.0) -> None:
        super().__init__()
        self.stage, self.share = stage, share

    def step(self, stage: str, what: str, done: int, total: int) -> None:
        super().step(stage, what, done, total)
        if self.stage and stage.startswith(self.stage) and done >= self.share * total:
            raise KeyboardInterrupt

    @property
    def made(self) -> set[tuple[str, str]]:
        """(stage, item)."""
        return {(stage, what) for stage, what, _, _ in self.steps if what}


@pytest.fixture
def journalled_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantize.build_folder.JOURNAL_INTERVAL_S", 0.0)


@pytest.mark.usefixtures("journalled_at_once")
@pytest.mark.parametrize(
    ("stage", "share", "left", "again"),
    [
        ("language", 0.9, {manifest.LANGUAGE}, {f"language {RECIPE}", "mmproj", "vision"}),
        ("mmproj", 0.5, {manifest.LANGUAGE, manifest.MMPROJ}, {"mmproj", "vision"}),
        ("vision", 0.5, {manifest.LANGUAGE, manifest.MMPROJ, manifest.VISION}, {"vision"}),
        ("validate", 1.0, {manifest.LANGUAGE, manifest.MMPROJ, manifest.VISION}, set()),
    ],
)
def test_an_interrupted_build_is_continued(
    toy_small: Path,
    build: Callable[..., Path],
    tmp_path: Path,
    stage: str,
    share: float,
    left: set[str],
    again: set[str],
):
    first = Stopped(stage, share)
    with pytest.raises(KeyboardInterrupt):
        built(toy_small, tmp_path / "out", progress=first)
    assert not (tmp_path / "out").exists()
    assert {path.name for path in (tmp_path / ".out.part").iterdir()} == left | {"journal.json", "lock"}
    assert quantize.build_folder.resumable_bytes(tmp_path / "out") > 1000
    second = Stopped()
    built(toy_small, tmp_path / "out", progress=second)
    assert len(second.remarks) == 1 and second.remarks[0].startswith("continuing: an earlier run left language.gguf")
    assert {made for made, _ in second.made} - {"validate", "hash source"} == again
    tensors = [{what for made, what in progress.made if made.startswith("language")} for progress in (first, second)]
    if stage == "language":  # the tensor that was interrupted is made again, those before it are not
        assert len(tensors[0]) > 3 and len(tensors[0] & tensors[1]) <= 1 and tensors[1]
    assert os.listdir(tmp_path) == ["out"] and quantize.build_folder.resumable_bytes(tmp_path / "out") == 0
    for name in FILES:
        assert (tmp_path / "out" / name).read_bytes() == (build(toy_small, RECIPE) / name).read_bytes(), name


@pytest.mark.parametrize("journal", [b"\xff", b'{"key": "\xff"}', b"[" * 200_000, b"{}"])
def test_a_damaged_journal_is_as_none(tmp_path, journal):
    (tmp_path / "journal.json").write_bytes(journal)
    (tmp_path / "left.gguf").write_bytes(b"of an earlier run")
    BuildFolder(tmp_path, "key", [])
    assert os.listdir(tmp_path) == ["journal.json"]


@pytest.mark.parametrize("how", ["recipe", "checkpoint", "journal", "cut"])
def test_files_of_other_work_are_not_used(toy_small: Path, build: Callable[..., Path], tmp_path: Path, how: str):
    folder = shutil.copytree(toy_small, tmp_path / "toy")
    with pytest.raises(KeyboardInterrupt):
        built(folder, tmp_path / "out", progress=Stopped("mmproj"))
    left, recipe = tmp_path / ".out.part", RECIPE
    (left / "strange").write_bytes(b"left by nobody")
    if how == "recipe":
        recipe = "Q4_0"
    elif how == "checkpoint":
        os.utime(folder / "model.safetensors", ns=(1, 1))
    elif how == "journal":
        (left / "journal.json").write_bytes(b'{"key": 3')
    else:
        os.truncate(left / manifest.LANGUAGE, 1000)
    again = Stopped()
    built(folder, tmp_path / "out", recipe, progress=again)
    assert again.remarks == [] and ("mmproj", "v.patch_embd.weight") in again.made
    for name in FILES:
        assert (tmp_path / "out" / name).read_bytes() == (build(toy_small, recipe) / name).read_bytes(), name


def test_a_failed_build_leaves_no_resumable_files(toy_small: Path, tmp_path: Path, monkeypatch):
    def broken(*_: object) -> None:
        raise BuildError("as if the files could not be used")

    monkeypatch.setattr("quantize.build.validate_in_subprocess", broken)
    with pytest.raises(BuildError, match="as if"):
        built(toy_small, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_two_builds_of_one_target_exclude_each_other(toy_small: Path, tmp_path: Path):
    (tmp_path / ".full.part").mkdir()
    (tmp_path / ".full.part" / manifest.LANGUAGE).write_bytes(b"half")
    lock = os.open(tmp_path / ".full.part" / "lock", os.O_RDWR | os.O_CREAT)  # as another edge-quantize holds it
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(BuildError, match="full: another edge-quantize is writing it"):
        converted(toy_small, tmp_path / "full", "bf16")
    assert (tmp_path / ".full.part" / manifest.LANGUAGE).read_bytes() == b"half"
    os.close(lock)  # killed
    converted(toy_small, tmp_path / "full", "bf16")
    assert os.listdir(tmp_path) == ["full"]


def test_a_full_disk_is_reported_before_anything_is_written(toy_small: Path, tmp_path: Path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=33 << 20))
    for call in (
        lambda: built(toy_small, tmp_path / "bundle"),
        lambda: quantize.build.convert(
            plan_conversion(checkpoint.read_checkpoint(toy_small), "f32"), tmp_path / "full", SILENT
        ),
    ):
        with pytest.raises(BuildError, match=r"GB needed while building, 0\.03 GB free; make room"):
            call()
    assert not any(tmp_path.iterdir())


def plan_of(folder: Path, kind: str) -> BuildPlan:
    opened = checkpoint.read_checkpoint(folder)
    return plan_bundle(opened, RECIPE) if kind == "bundle" else plan_conversion(opened, kind)


@pytest.mark.parametrize("kind", ["bf16", "f32", "bundle"])
def test_the_required_disk_space_is_the_used_space(toy_bf16: Path, tmp_path: Path, monkeypatch, kind: str):
    """Not less: that would end in a full disk after an hour. The tokenizer is not counted, a toy's tenth."""
    taken = []

    def measure(*_: object) -> None:
        taken.append(sum(path.stat().st_size for path in tmp_path.rglob("*")))

    if kind == "bundle":
        built(toy_bf16, tmp_path / "out", progress=RecordedProgress(measure))
    else:
        converted(toy_bf16, tmp_path / "out", kind, progress=RecordedProgress(measure))
    measure()
    plan = plan_of(toy_bf16, kind)
    for share, enough in ((0.85, False), (1.1, True)):
        free = round(share * max(taken)) + quantize.build.SPARE_BYTES
        usage = shutil.disk_usage(tmp_path)._replace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, usage=usage: usage)
        if enough:
            quantize.build._check_space(plan, tmp_path / "other")
        else:
            with pytest.raises(BuildError, match="GB needed while building"):
                quantize.build._check_space(plan, tmp_path / "other")


# -- what a build finds wrong -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("validation_process")
def test_nan_weights_never_become_a_bundle(toy_small: Path, tmp_path: Path):
    folder, out = tmp_path / "checkpoint", tmp_path / "out" / "bundle"
    shutil.copytree(toy_small, folder)
    out.parent.mkdir()
    raw = bytearray((folder / "model.safetensors").read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    at = start + json.loads(raw[8:start])["language_model.model.norm.weight"]["data_offsets"][0]
    raw[at : at + 2] = b"\xc0\x7f"  # NaN
    (folder / "model.safetensors").write_bytes(raw)
    with pytest.raises((BuildError, hf_config.CheckpointError), match=r"^[^\n]*norm\.weight[^\n]*NaN[^\n]*$"):
        built(folder, out)
    assert not any(out.parent.iterdir())


@pytest.mark.usefixtures("validation_process")
def test_a_wrong_embedding_offset_never_becomes_a_bundle(toy_small: Path, tmp_path: Path, monkeypatch):
    """The same trial, with a table that says the embedding begins a row later than it does."""
    real = ggml_kernels.tensor_table

    def shifted(path: Path) -> list[ggml_kernels.TensorInfo]:
        first, *others = real(path)
        return [msgspec.structs.replace(first, offset=first.offset + first.n_bytes // 2048), *others]

    monkeypatch.setattr("quantize.build.tensor_table", shifted)
    with pytest.raises(BuildError, match=r"embeddings read from language.gguf differ from libllama's own by"):
        built(toy_small, tmp_path / "bundle")
    assert not any(tmp_path.iterdir())


@pytest.mark.usefixtures("validation_process")
def test_encoders_that_disagree_never_become_a_bundle(toy_small: Path, tmp_path: Path, monkeypatch):
    """The same trial that every build makes, on a vision.onnx with one matrix turned round."""
    real = quantize.build.write_vision

    def spoil(plan: BuildPlan, out: Path, progress: Progress) -> None:
        real(plan, out, progress)
        raw = bytearray(out.read_bytes())
        raw[-4096:] = raw[-4096:][::-1]
        out.write_bytes(raw)
        onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])  # it still loads

    monkeypatch.setattr(quantize.build, "write_vision", spoil)
    with pytest.raises(BuildError, match=r"(vision|mmproj) at bf16: cosine"):
        built(toy_small, tmp_path / "bundle")
    assert not any(tmp_path.iterdir())
