"""Control is answered while the bundle is verified, and nothing of the bundle is used before."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from edge_agent.bundle.model_start import decode_model_start, encode_model_start
from edge_agent.bundle.store import install, list_bundles
from edge_agent.bundle.verified_files import VerifiedFiles
from edge_agent.config import CameraConfig, Config, LanguageConfig
from edge_agent.errors import BundleError, ConfigError
from edge_agent.supervisor.shutdown import Shutdown
from edge_agent.supervisor.verification import Verification
from tests.harness.in_process import FAKE_BUNDLE, FakeVerification, InProcess
from tests.harness.small_bundle import make


def done(verification: Verification) -> None:
    while verification._thread.is_alive():
        time.sleep(0.001)


def config_of(bundle: Path, **language: object) -> Config:
    return Config(
        bundle=str(bundle), camera=CameraConfig(source="zmq:ipc:///none"), language=LanguageConfig(**language)
    )


def test_requests_are_answered_while_the_bundle_is_verified():
    verification = FakeVerification(bundle=None)
    with InProcess(verification=verification) as running:
        assert running.model is None and running.camera is not None
        running.publisher.request("pause")
        running.publisher.request("instruct", "Land.")
        running.publisher.request("stats")
        running.turn(seconds=5.0)
        pause, instruct, stats = running.publisher.replies
        assert pause.result == {"paused": True} and stats.result["state"] == "starting"
        assert "not ready (model: starting: verifying the bundle, 40%); try again" in instruct.error
        assert running.model is None, "no process is started before"
        verification.bundle = FAKE_BUNDLE
        running.turn()
        assert running.model is not None and running.publisher.bundle_id == FAKE_BUNDLE.id
        running.open_camera()
        running.load_model()
        running.answer()
        assert running.publisher.stream("actions")[-1].reason == "paused"


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (BundleError("vision.onnx: sha256"), os.EX_CONFIG, "vision.onnx: sha256"),
        (ConfigError("language.adapters: x"), os.EX_CONFIG, "language.adapters: x"),
        (OSError(errno.EIO, "Input/output error", "vision.onnx"), 1, "vision.onnx: Input/output error"),
        (OSError(errno.EMFILE, "Too many open files"), 1, "none: Too many open files"),
    ],
)
def test_what_cannot_be_verified_ends_the_daemon_with_its_line(error: Exception, status: int, line: str):
    verification = FakeVerification(bundle=None)
    with InProcess(verification=verification) as running:
        verification.error = error
        with pytest.raises(Shutdown) as caught:
            running.turn()
        assert (caught.value.status, caught.value.line) == (status, line)


def test_the_verified_bundle_and_its_adapters_are_the_result(toy_bundle, switchable):
    verification = Verification(config_of(toy_bundle, adapters={"night": str(switchable)}))
    assert verification.result() is None and verification.progress == "verifying the bundle, 0%"
    verification.start()
    done(verification)
    bundle = verification.result()
    assert bundle is not None and list(bundle.adapters) == ["night"]
    assert verification.progress == "verifying the bundle, 100%"


def test_an_error_of_the_thread_is_raised_where_the_result_is_asked(toy_bundle, tmp_path):
    for config, kind in (
        (config_of(tmp_path / "missing"), BundleError),
        (config_of(toy_bundle, adapters={"night": str(tmp_path / "missing.gguf")}), ConfigError),
    ):
        verification = Verification(config)
        verification.start()
        done(verification)
        for _ in range(2):
            with pytest.raises(kind, match="missing"):
                verification.result()


def test_an_installation_while_the_daemon_runs_changes_nothing_that_it_loads(tmp_path):
    """The model process may be restarted at any time: it opens the files again by their names."""
    bundles = tmp_path / "bundles"
    served = install(bundles, make(tmp_path / "one")).bundle
    config = config_of(bundles / "current")
    verification = Verification(config)
    verification.start()
    done(verification)
    for name in ("two", "three", "four"):
        install(bundles, make(tmp_path / name))
    bundle = verification.result()
    assert bundle is not None and bundle.id == served.id and bundle.folder == served.folder
    start = decode_model_start(encode_model_start(config, bundle, b""))
    for _ in range(2):
        with VerifiedFiles(start.files) as files:
            for path in start.files:
                files.open(path)
            files.check_unchanged()
    again = Verification(config)  # a daemon that is started now
    again.start()
    done(again)
    found = again.result()
    assert found is not None and found.manifest.created_by == "four"
    assert [entry.state for entry in list_bundles(bundles) if entry.is_served] == ["current", "unused"]
