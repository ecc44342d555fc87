"""edge-agent bundle wrap as a user types it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import msgspec
import pytest

from edge_agent.bundle.manifest import LANGUAGE, read_manifest
from edge_agent.bundle.model_start import decode_model_start, encode_model_start, fit_to_bundle
from edge_agent.bundle.signing import SIGNATURE, keygen
from edge_agent.bundle.verify import verify_bundle
from edge_agent.cli import check, daemon, main
from edge_agent.cli.commands import EX_USAGE, CommandFailed
from edge_agent.config import CameraConfig, Config, VisionConfig
from edge_agent.errors import BundleError, ConfigError
from tests.harness import gguf_toys as toys


def run(*arguments: object) -> int:
    return main.run_command(main.make_parser().parse_args(["bundle", "wrap", *map(str, arguments)]))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("gemma")
    language = toys.write_language(folder / "language.gguf", "gemma3", toys.GEMMA)
    return language, toys.write_gemma_mmproj(folder / "mmproj.gguf")


def test_a_pair_and_a_language_model_alone(gemma: tuple[Path, Path], tmp_path: Path, capsys):
    assert run(*gemma, tmp_path / "both") == 0
    assert capsys.readouterr().out.strip().endswith("MB, prompt layout gemma, frames and text")
    assert run(gemma[0], tmp_path / "text") == 0
    assert capsys.readouterr().out.strip().endswith("text only: it answers from the vehicle's state")
    assert verify_bundle(tmp_path / "both").manifest.model.layers == 2


def test_links_signatures_and_progress(gemma: tuple[Path, Path], tmp_path: Path, monkeypatch, capsys):
    public = keygen(tmp_path / "key")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert run(*gemma, tmp_path / "out", "--link", "--sign", tmp_path / "key", "--layout", "gemma") == 0
    assert "\r1 of 1 MB\n" in capsys.readouterr().err
    assert (tmp_path / "out" / SIGNATURE).is_file()
    verify_bundle(tmp_path / "out", (str(public),))


@pytest.mark.parametrize("n_names", [1, 4])
def test_another_number_of_names_is_a_usage_error(n_names: int, tmp_path: Path):
    with pytest.raises(CommandFailed, match=r"expected LANGUAGE\.gguf \[MMPROJ\.gguf\] OUT, found") as caught:
        run(*[tmp_path / str(i) for i in range(n_names)])
    assert caught.value.exit_status == EX_USAGE


def test_a_wrong_key_is_reported_before_any_work(gemma: tuple[Path, Path], tmp_path: Path):
    (tmp_path / "key").write_text("no key")
    with pytest.raises(Exception, match="expected an Ed25519 private key"):
        run(*gemma, tmp_path / "out", "--sign", tmp_path / "key")
    assert not (tmp_path / "out").exists()


# -- serving a bundle without vision.onnx ------------------------------------------------------------------------------


def config_of(folder: Path, **changes: object) -> Config:
    return Config(bundle=str(folder), camera=CameraConfig(source="none"), **changes)


def test_a_bundle_without_vision_onnx_is_served_by_mtmd(gemma: tuple[Path, Path], tmp_path: Path, toy_bundle: Path):
    run(*gemma, tmp_path / "out")
    bundle = read_manifest(tmp_path / "out")
    for configured in (VisionConfig(), VisionConfig(backend="mtmd"), VisionConfig(tensorrt=True)):
        config = config_of(tmp_path / "out", vision=configured)
        sent = decode_model_start(encode_model_start(config, bundle, b"")).config.vision
        assert (sent.backend, sent.tensorrt) == ("mtmd", False)
    wrong = config_of(tmp_path / "out", vision=VisionConfig(backend="onnxruntime"))
    with pytest.raises(ConfigError, match=r"vision\.backend: expected mtmd or null for a bundle without vision\.onnx"):
        encode_model_start(wrong, bundle, b"")
    built = config_of(toy_bundle, vision=VisionConfig(backend="onnxruntime"))
    assert fit_to_bundle(built, read_manifest(toy_bundle).manifest) is built


def test_onnxruntime_is_not_required_for_it(gemma: tuple[Path, Path], tmp_path: Path, toy_bundle: Path, monkeypatch):
    run(*gemma, tmp_path / "out")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    daemon.require_onnxruntime(config_of(tmp_path / "out"))
    with pytest.raises(CommandFailed, match="onnxruntime is not installed"):
        daemon.require_onnxruntime(config_of(toy_bundle))


def test_check_says_that_a_model_is_text_only(gemma: tuple[Path, Path], tmp_path: Path):
    run(gemma[0], tmp_path / "out")
    _, line = check._check_bundle(config_of(tmp_path / "out"))
    assert line.endswith("a text-only model: it answers from the vehicle's state, and a frame only says when")


def test_a_language_model_that_is_gone_is_still_one_line(gemma: tuple[Path, Path], tmp_path: Path):
    run(gemma[0], tmp_path / "out")
    manifest = msgspec.structs.replace(read_manifest(tmp_path / "out").manifest)
    (tmp_path / "out" / LANGUAGE).unlink()
    assert manifest.files.keys() == {LANGUAGE}
    with pytest.raises(BundleError, match=r"language\.gguf: missing; copy the bundle again"):
        verify_bundle(tmp_path / "out")


def test_a_text_only_model_is_not_tuned(gemma: tuple[Path, Path], tmp_path: Path):
    run(gemma[0], tmp_path / "out")
    arguments = main.make_parser().parse_args(["tune", "--bundle", str(tmp_path / "out"), "--camera", "zmq:tcp://x:1"])
    with pytest.raises(CommandFailed, match="a text-only model; tune measures answers to frames"):
        main.run_command(arguments)
