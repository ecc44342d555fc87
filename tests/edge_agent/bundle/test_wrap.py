"""Published GGUF files become a bundle: what is in it, what is refused, and that nothing is left half-written."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from edge_agent.bundle import signing
from edge_agent.bundle import wrap as wrap_module
from edge_agent.bundle.files import hash_file
from edge_agent.bundle.gguf_package import gguf
from edge_agent.bundle.layout import MISTRAL_VISION
from edge_agent.bundle.manifest import LANGUAGE, MANIFEST, MMPROJ, read_manifest
from edge_agent.bundle.verified_files import VerifiedFiles
from edge_agent.bundle.verify import verify_bundle
from edge_agent.bundle.wrap import wrap
from edge_agent.errors import BundleError, ConfigError, UserError
from tests.harness import gguf_toys as toys

# -- what is made ------------------------------------------------------------------------------------------------------


def test_a_published_pair_of_our_own_family_says_what_our_build_says(toy_bundle: Path, tmp_path: Path):
    built = read_manifest(toy_bundle).manifest
    wrap(toy_bundle / LANGUAGE, toy_bundle / MMPROJ, tmp_path / "out")
    wrapped = verify_bundle(tmp_path / "out").manifest
    assert set(os.listdir(tmp_path / "out")) == {LANGUAGE, MMPROJ, MANIFEST}
    for name in (LANGUAGE, MMPROJ):
        assert (tmp_path / "out" / name).read_bytes() == (toy_bundle / name).read_bytes()
        assert wrapped.files[name] == built.files[name] == hash_file(toy_bundle / name)
    assert (wrapped.layout, built.layout) == (MISTRAL_VISION, None)
    assert (wrapped.bytes_by_type, wrapped.recipe) == (built.bytes_by_type, "Q4_K_M")
    for fact in ("layers", "hidden", "vocab", "context", "kv_bytes_per_token", "embedding"):
        assert getattr(wrapped.model, fact) == getattr(built.model, fact)
    assert wrapped.model.special.items() <= built.model.special.items()
    ours, theirs = built.vision, wrapped.vision
    assert ours is not None and theirs is not None
    assert (theirs.patch, theirs.merge, theirs.image_size) == (ours.patch, ours.merge, ours.image_size)
    assert theirs.mean == pytest.approx(ours.mean) and theirs.std == pytest.approx(ours.std)


def test_a_text_only_model(chatml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("edge_agent.bundle.gguf_source.BLOCK_BYTES", 4096)
    progress: list[tuple[int, int]] = []
    wrap(chatml, None, tmp_path / "out", report=lambda *done: progress.append(done))
    manifest = verify_bundle(tmp_path / "out").manifest
    assert (manifest.vision, manifest.prompt_layout.name, manifest.licence) == (None, "chatml", "apache-2.0")
    assert manifest.model.special == {"<|im_start|>": 1, "<|im_end|>": 2}
    assert manifest.source_sha256 == {chatml.name: hash_file(chatml).sha256}
    assert progress[-1] == (chatml.stat().st_size, chatml.stat().st_size)


def test_a_signed_bundle(chatml: Path, tmp_path: Path):
    public = signing.keygen(tmp_path / "key")
    wrap(chatml, None, tmp_path / "out", signing_key=tmp_path / "key")
    verify_bundle(tmp_path / "out", trusted_keys=(str(public),))
    with pytest.raises(signing.SigningError):
        wrap(chatml, None, tmp_path / "other", signing_key=public)
    assert not (tmp_path / "other").exists()


def test_another_family_of_vision(gemma: tuple[Path, Path], tmp_path: Path):
    wrap(*gemma, tmp_path / "out")
    manifest = verify_bundle(tmp_path / "out").manifest
    assert manifest.vision is not None and manifest.vision.fixed == (56, 56)
    assert (manifest.vision.causal, manifest.vision.breaks, manifest.vision.merge) == (False, False, 2)
    assert manifest.prompt_layout.before_image == "<start_of_image>"


@pytest.mark.parametrize(
    ("special", "layout"),
    [(toys.CHATML, "chatml"), (toys.GEMMA, "gemma"), (toys.LLAMA3, "llama3"), (toys.MISTRAL, "mistral")],
)
def test_the_layout_is_found_by_the_special_tokens(special: dict, layout: str, tmp_path: Path):
    manifest = wrap(toys.write_language(tmp_path / "x.gguf", special=special), None, tmp_path / "out")
    assert manifest.layout is not None and manifest.layout.name == layout
    assert manifest.layout.before_image == manifest.layout.after_image == ""


def test_a_bos_token_that_llama_cpp_would_add_is_added(tmp_path: Path):
    special = {"<s>": toys.CONTROL, "</s>": toys.CONTROL} | toys.CHATML
    for name, add_bos, dropped, expected in (
        ("yes", True, (), "<s><|im_start|>system\n"),
        ("no", False, (), "<|im_start|>system\n"),
        ("by the kind of vocabulary", False, ("tokenizer.ggml.add_bos_token",), "<s><|im_start|>system\n"),
    ):
        keys = {"tokenizer.ggml.add_bos_token": add_bos}
        path = toys.write_language(tmp_path / f"{name}.gguf", special=special, keys=keys, drop=dropped)
        layout = wrap(path, None, tmp_path / name).layout
        assert layout is not None and layout.before_system == expected
        assert ("<s>" in layout.special) == expected.startswith("<s>")


def test_a_reasoning_model_keeps_its_tokens(tmp_path: Path):
    special = toys.MISTRAL | {"[THINK]": toys.CONTROL, "[/THINK]": toys.CONTROL}
    manifest = wrap(toys.write_language(tmp_path / "x.gguf", special=special), None, tmp_path / "out")
    assert {"think", "think_end", "bos"} <= manifest.model.special.keys()
    verify_bundle(tmp_path / "out")


def test_a_layout_that_the_user_writes(tmp_path: Path):
    special = {"<|system|>": toys.CONTROL, "<|user|>": toys.CONTROL, "<|assistant|>": toys.CONTROL}
    path = toys.write_language(tmp_path / "x.gguf", special=special)
    with pytest.raises(
        BundleError, match=r"x\.gguf: no prompt layout of mistral, chatml, gemma, llama3 .* docs/bundle"
    ):
        wrap(path, None, tmp_path / "out")
    layout = tmp_path / "zephyr.yaml"
    text = (
        'name: zephyr\nspecial: ["<|system|>", "<|user|>", "<|assistant|>"]\nbefore_system: "<|system|>\\n"\n'
        'before_user: "\\n<|user|>\\n"\nbefore_answer: "\\n<|assistant|>\\n"\n'
    )
    layout.write_text(text)
    manifest = wrap(path, None, tmp_path / "out", layout=str(layout))
    assert manifest.layout is not None and manifest.layout.name == "zephyr"
    assert verify_bundle(tmp_path / "out").manifest.model.special == {
        "<|system|>": 1, "<|user|>": 2, "<|assistant|>": 3
    }  # fmt: skip
    for old, new, words in (
        (
            'special: ["<|system|>", ',
            "special: [",
            "'<|system|>' is a special token of this model; add it to `special`",
        ),
        ("name: zephyr", "name: zephyr\nafter: x", "unknown key 'after'"),
        ('"<|system|>\\n"', "3", "before_system: expected `str`, found 3"),
        ('["<|system|>"', '["<|nobody|>", "<|system|>"', "'<|nobody|>': expected a control token"),
    ):
        layout.write_text(text.replace(old, new))
        with pytest.raises(UserError) as caught:
            wrap(path, None, tmp_path / "other", layout=str(layout))
        assert words in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read"):
        wrap(path, None, tmp_path / "other", layout=str(tmp_path / "nowhere.yaml"))
    assert not (tmp_path / "other").exists()


def test_a_layout_without_special_tokens(tmp_path: Path):
    layout = tmp_path / "plain.yaml"
    layout.write_text('{name: plain, special: [], before_system: "", before_user: "Q: ", before_answer: "A:"}')
    made = wrap(toys.write_language(tmp_path / "x.gguf"), None, tmp_path / "out", layout=str(layout)).prompt_layout
    assert (made.parts(made.before_user), made.parts(made.before_system)) == (["Q: "], [])


def test_facts_that_llama_cpp_computes_where_the_file_is_silent(gemma: tuple[Path, Path], tmp_path: Path):
    """Head sizes of the width, as many heads of keys as of queries, and Gemma's 4 patches a side."""
    stated = wrap(toys.write_language(tmp_path / "stated.gguf"), None, tmp_path / "stated").model.kv_bytes_per_token
    sizes = ("llama.attention.key_length", "llama.attention.value_length")
    silent = toys.write_language(tmp_path / "silent.gguf", drop=sizes)
    assert wrap(silent, None, tmp_path / "silent").model.kv_bytes_per_token == stated
    silent = toys.write_language(tmp_path / "heads.gguf", drop=("llama.attention.head_count_kv",))
    assert wrap(silent, None, tmp_path / "heads").model.kv_bytes_per_token == stated * toys.HEADS // toys.KV_HEADS
    listed = toys.write_language(tmp_path / "listed.gguf", keys={"llama.attention.head_count_kv": [1, 2]})
    assert wrap(listed, None, tmp_path / "listed").model.kv_bytes_per_token == stated * 3 // 4
    mmproj = toys.write_gemma_mmproj(tmp_path / "mmproj.gguf", drop=("clip.vision.projector.scale_factor",))
    vision = wrap(gemma[0], mmproj, tmp_path / "out").vision
    assert vision is not None and vision.merge == 4
    for name in ("stated", "silent", "heads", "listed", "out"):
        verify_bundle(tmp_path / name)


def test_a_layout_of_two_that_fit_is_chosen_by_name(tmp_path: Path):
    path = toys.write_language(tmp_path / "x.gguf", special=toys.LLAMA3 | toys.CHATML)
    with pytest.raises(BundleError, match="has the special tokens of chatml and llama3; choose one with --layout"):
        wrap(path, None, tmp_path / "out")
    manifest = wrap(path, None, tmp_path / "out", layout="llama3")
    assert manifest.layout is not None and manifest.layout.name == "llama3"


# -- copies and links --------------------------------------------------------------------------------------------------


def test_a_link_shares_the_file_and_is_verified(chatml: Path, tmp_path: Path):
    source = Path(shutil.copy(chatml, tmp_path / "x.gguf"))
    manifest = wrap(source, None, tmp_path / "out", link=True)
    linked = tmp_path / "out" / LANGUAGE
    assert manifest.files[LANGUAGE].linked == (linked.stat().st_ino == source.stat().st_ino)
    bundle = verify_bundle(tmp_path / "out")
    with VerifiedFiles({bundle.path(LANGUAGE): bundle.manifest.files[LANGUAGE]}) as files:
        files.open(bundle.path(LANGUAGE))
        files.check_unchanged()


def test_blocks_that_are_shared_make_a_file_of_its_own(chatml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As on btrfs and XFS; the file system of the tests may not have it."""

    def clone(descriptor: int, _request: int, source: int) -> None:
        os.sendfile(descriptor, source, 0, os.fstat(source).st_size)

    monkeypatch.setattr("edge_agent.bundle.wrap.fcntl.ioctl", clone)
    manifest = wrap(chatml, None, tmp_path / "out", link=True)
    assert not manifest.files[LANGUAGE].linked and (tmp_path / "out" / LANGUAGE).stat().st_nlink == 1
    verify_bundle(tmp_path / "out")


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM])
def test_a_link_that_the_file_system_cannot_make(
    chatml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
):
    def refuse(*_arguments: object, **_options: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("edge_agent.bundle.wrap.os.link", refuse)
    monkeypatch.setattr("edge_agent.bundle.wrap.fcntl.ioctl", refuse)
    with pytest.raises(BundleError, match=r"cannot be linked to .*; leave out --link"):
        wrap(chatml, None, tmp_path / "out", link=True)
    assert os.listdir(tmp_path) == []


def test_what_a_killed_run_has_left_is_replaced(chatml: Path, tmp_path: Path):
    left = tmp_path / ".out.wrap"
    left.mkdir()
    (left / LANGUAGE).write_bytes(b"half")
    wrap(chatml, None, tmp_path / "out")
    verify_bundle(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


def test_what_a_killed_run_cannot_have_left_is_not_touched(chatml: Path, tmp_path: Path):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / LANGUAGE).write_text("precious")
    left = tmp_path / ".out.wrap"
    left.symlink_to(victim)
    with pytest.raises(BundleError, match=r"\.out\.wrap: a link, a file or a folder of another user; .* remove it"):
        wrap(chatml, None, tmp_path / "out")
    left.unlink()
    left.mkdir()
    (left / "notes.txt").write_text("precious")
    with pytest.raises(BundleError, match=r"\.out\.wrap/notes\.txt: expected what an interrupted run has left"):
        wrap(chatml, None, tmp_path / "out")
    assert (victim / LANGUAGE).read_text() == (left / "notes.txt").read_text() == "precious"
    assert not (tmp_path / "out").exists()


def test_a_context_of_millions_counts_as_the_most_that_is_counted(tmp_path: Path):
    path = toys.write_language(tmp_path / "x.gguf", keys={"llama.context_length": 10_485_760})
    wrap(path, None, tmp_path / "out")
    assert verify_bundle(tmp_path / "out").manifest.model.context == 1 << 20


def test_a_vocabulary_of_another_size_than_the_embeddings_is_refused(tmp_path: Path):
    texts, types, scores = (values[:-1] for values in toys.vocabulary(toys.CHATML))
    keys = {"tokenizer.ggml.tokens": texts, "tokenizer.ggml.token_type": types, "tokenizer.ggml.scores": scores}
    with pytest.raises(BundleError, match=r"rows, but tokenizer\.ggml\.tokens has another number of tokens"):
        wrap(toys.write_language(tmp_path / "x.gguf", keys=keys), None, tmp_path / "out")


def test_a_token_that_is_there_twice_is_its_control_token(tmp_path: Path):
    texts, types, scores = toys.vocabulary(toys.CHATML)
    texts[-1], types[-1] = "<|im_start|>", toys.NORMAL
    keys = {"tokenizer.ggml.tokens": texts, "tokenizer.ggml.token_type": types, "tokenizer.ggml.scores": scores}
    wrap(toys.write_language(tmp_path / "x.gguf", keys=keys), None, tmp_path / "out")
    assert verify_bundle(tmp_path / "out").manifest.model.special["<|im_start|>"] == 1


def test_files_of_one_name_and_of_a_name_in_another_encoding(gemma: tuple[Path, Path], tmp_path: Path):
    name = os.fsdecode(b"m\xff.gguf")
    for folder, file in zip("ab", gemma, strict=True):
        (tmp_path / folder).mkdir()
        shutil.copy(file, tmp_path / folder / name)
    wrap(tmp_path / "a" / name, tmp_path / "b" / name, tmp_path / "out")
    found = verify_bundle(tmp_path / "out").manifest.source_sha256
    assert list(found) == ["m\\udcff.gguf", "m\\udcff.gguf (mmproj.gguf)"] and len(set(found.values())) == 2


@pytest.mark.parametrize(("key", "numbers"), [("mean", [float("nan")] * 3), ("std", [0.0] * 3)])
def test_pixels_that_verify_refuses_are_refused_before_the_copy(gemma, tmp_path: Path, key: str, numbers: list):
    mmproj = toys.write_gemma_mmproj(tmp_path / "m.gguf", keys={f"clip.vision.image_{key}": numbers})
    with pytest.raises(BundleError, match="no bundle can be made of it: "):
        wrap(gemma[0], mmproj, tmp_path / "out")
    assert os.listdir(tmp_path) == ["m.gguf"]


def test_a_file_system_without_locks(chatml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_arguments: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("edge_agent.bundle.wrap.fcntl.flock", refuse)
    wrap(chatml, None, tmp_path / "out")
    verify_bundle(tmp_path / "out")


def test_a_name_that_is_given_to_another_file_before_it_is_linked(
    chatml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def swap(source: Path, target: Path, **_options: object) -> None:
        shutil.copy(source, target)

    def refuse(*_arguments: object) -> None:
        raise OSError(errno.ENOTTY, "not here")

    monkeypatch.setattr("edge_agent.bundle.wrap.os.link", swap)
    monkeypatch.setattr("edge_agent.bundle.wrap.fcntl.ioctl", refuse)
    with pytest.raises(BundleError, match=r"toy-chatml\.gguf: changed while it was read; try again"):
        wrap(chatml, None, tmp_path / "out", link=True)


def test_two_at_once_do_not_write_one_folder(chatml: Path, tmp_path: Path):
    def second(_n_done: int, _n_total: int) -> None:
        with pytest.raises(BundleError, match=r"out: another edge-agent bundle wrap is writing it"):
            wrap(chatml, None, tmp_path / "out")

    wrap(chatml, None, tmp_path / "out", report=second)
    verify_bundle(tmp_path / "out")


@pytest.mark.parametrize("where", ["write", "fdatasync", "fsync", "rename"])
def test_a_full_disk_leaves_nothing(chatml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str):
    def full(*_arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"edge_agent.bundle.wrap.os.{where}", full)
    with pytest.raises(BundleError, match=r"out: No space left on device while writing it; nothing is left of it"):
        wrap(chatml, None, tmp_path / "out")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == []


def test_a_disk_with_too_little_room_is_told_first(chatml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("edge_agent.bundle.wrap.shutil.disk_usage", lambda _folder: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(BundleError, match=r"MB needed, 0\.0 MB free; make room"):
        wrap(chatml, None, tmp_path / "out")


def test_an_interrupted_wrap_leaves_nothing(chatml: Path, tmp_path: Path):
    def interrupt(_n_done: int, _n_total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        wrap(chatml, None, tmp_path / "out", report=interrupt)
    assert os.listdir(tmp_path) == []


def test_a_file_that_changes_while_it_is_read(chatml: Path, tmp_path: Path):
    source = Path(shutil.copy(chatml, tmp_path / "x.gguf"))

    def overwrite(_n_done: int, _n_total: int) -> None:
        with source.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"x")

    with pytest.raises(BundleError, match=r"x\.gguf: changed while it was read; try again"):
        wrap(source, None, tmp_path / "out", report=overwrite)
    assert os.listdir(tmp_path) == ["x.gguf"]


def test_a_folder_that_exists_or_has_no_place(chatml: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    with pytest.raises(BundleError, match="out: exists; give the name of a new folder"):
        wrap(chatml, None, tmp_path / "out")
    with pytest.raises(BundleError, match="no such folder; make it first"):
        wrap(chatml, None, tmp_path / "nowhere" / "out")


# -- what a verification compares --------------------------------------------------------------------------------------


def test_a_manifest_that_contradicts_wrapped_files_is_refused(gemma: tuple[Path, Path], tmp_path: Path):
    wrap(*gemma, tmp_path / "out")
    path = tmp_path / "out" / MANIFEST
    raw = path.read_text()
    for old, new, words in (
        ('"causal": false', '"causal": true', "vision: expected VisionInfo"),
        ('"breaks": false', '"breaks": true', "vision: expected VisionInfo"),
        ('"<bos>": 1,', '"<bos>": 9,', "model.special.<bos>: expected 1 by language.gguf, found 9"),
        ('"<start_of_turn>": 2,', "", "model.special.<start_of_turn>: expected 2 by language.gguf, found None"),
        ('"<bos>": 1,', '"<bos>": 1, "<b>": 7,', "model.special.<b>: expected -1 by language.gguf, found 7"),
        ('"kv_bytes_per_token": 256', '"kv_bytes_per_token": 8', "model.kv_bytes_per_token: expected 256"),
        ('"projector": "gemma3"', '"projector": "pixtral"', "vision: expected VisionInfo"),
        ('"layers": 2', '"layers": 3', "model.layers: expected 2 by language.gguf, found 3"),
    ):
        assert old in raw, old
        path.write_text(raw.replace(old, new, 1))
        with pytest.raises(BundleError) as caught:
            verify_bundle(tmp_path / "out")
        assert words in str(caught.value) and "\n" not in str(caught.value)


def test_an_mmproj_of_another_model_is_refused_when_it_is_verified(gemma: tuple[Path, Path], tmp_path: Path):
    wrap(*gemma, tmp_path / "out")
    target, manifest = tmp_path / "out" / MMPROJ, tmp_path / "out" / MANIFEST
    old = hash_file(target)
    target.unlink()
    new = hash_file(toys.write_gemma_mmproj(target, keys={"clip.vision.projection_dim": 128}))
    text = manifest.read_text().replace(old.sha256, new.sha256).replace(str(old.bytes), str(new.bytes))
    manifest.write_text(text)
    with pytest.raises(BundleError, match=r"bundle\.json: clip\.vision\.projection_dim: 128 numbers for each row"):
        verify_bundle(tmp_path / "out")


def test_a_tensor_type_that_only_other_tools_write(chatml: Path, tmp_path: Path):
    """The sizes of all types are those of the gguf package."""
    from edge_agent.bundle.file_check import BLOCKS

    for number, (name, elements, n_bytes) in BLOCKS.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (kind.name, gguf.GGML_QUANT_SIZES[kind]) == (name, (elements, n_bytes))
    assert wrap_module.FICLONE == 0x40049409
