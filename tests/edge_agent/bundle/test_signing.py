"""Keys, signatures, and what a device with trusted_keys refuses."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from edge_agent.bundle import signing, verify
from edge_agent.bundle.manifest import MANIFEST
from edge_agent.bundle.signing import SigningError
from edge_agent.bundle.verify import verify_bundle
from edge_agent.errors import BundleError
from quantize.build import build
from quantize.progress import SILENT
from quantize.source.checkpoint import read_checkpoint
from quantize.standard_recipes import plan_bundle
from tests.harness.progress import RecordedProgress


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two key pairs: ours, theirs."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("ours", "theirs"):
        signing.keygen(folder / name)
    return folder


@pytest.fixture(scope="module")
def signed(keys: Path, toy_small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("signed") / "bundle"
    build(plan_bundle(read_checkpoint(toy_small), "Q4_0"), out, SILENT, signing_key=keys / "ours")
    return out


def test_a_signed_bundle_is_accepted_with_the_key_that_signed_it(signed: Path, keys: Path):
    ours, theirs = str(keys / "ours.pub"), str(keys / "theirs.pub")
    assert (signed / signing.SIGNATURE).stat().st_size == 64
    for trusted in ((ours,), (theirs, ours), ()):
        assert verify_bundle(signed, trusted).manifest.recipe == "Q4_0"
    with pytest.raises(BundleError, match=r"bundle\.sig: not signed by any key in trusted_keys: .*theirs\.pub"):
        verify_bundle(signed, (theirs,))


def test_an_unsigned_bundle_is_refused(signed: Path, keys: Path, tmp_path: Path):
    folder = shutil.copytree(signed, tmp_path / "bundle")
    (folder / signing.SIGNATURE).unlink()
    verify_bundle(folder)
    with pytest.raises(BundleError, match=r"bundle\.sig: missing, but trusted_keys requires a signature"):
        verify_bundle(folder, (str(keys / "ours.pub"),))


def test_a_changed_manifest_or_signature_is_refused(signed: Path, keys: Path, tmp_path: Path):
    trusted = (str(keys / "ours.pub"),)
    folder = shutil.copytree(signed, tmp_path / "bundle")
    manifest = (folder / MANIFEST).read_bytes()
    (folder / MANIFEST).write_bytes(manifest.replace(b"apache", b"APACHE") + b"\n")
    with pytest.raises(BundleError, match="not signed by any key"):
        verify_bundle(folder, trusted)
    (folder / MANIFEST).write_bytes(manifest)
    signature = (folder / signing.SIGNATURE).read_bytes()
    for wrong in (bytes(64), signature[:63], signature + b"x", signature[:-1] + bytes([signature[-1] ^ 1])):
        (folder / signing.SIGNATURE).write_bytes(wrong)
        with pytest.raises(BundleError, match="not signed by any key"):
            verify_bundle(folder, trusted)
    (folder / signing.SIGNATURE).write_bytes(signature)
    assert verify_bundle(folder, trusted)


def test_a_manifest_that_changes_between_two_reads_is_refused(signed: Path, keys: Path, tmp_path: Path, monkeypatch):
    """It is read twice: for its content, and for its signature."""
    folder = shutil.copytree(signed, tmp_path / "bundle")
    real = verify.open_plain

    def open_plain(path: Path) -> int:
        if path.name == MANIFEST:
            path.write_bytes(path.read_bytes() + b"\n")
        return real(path)

    monkeypatch.setattr(verify, "open_plain", open_plain)
    with pytest.raises(BundleError, match=r"bundle\.json: changed while it was read; try again"):
        verify_bundle(folder, (str(keys / "ours.pub"),))


def test_a_link_is_not_a_signature(signed: Path, keys: Path, tmp_path: Path):
    folder = shutil.copytree(signed, tmp_path / "bundle")
    (folder / signing.SIGNATURE).rename(tmp_path / "sig")
    (folder / signing.SIGNATURE).symlink_to(tmp_path / "sig")
    with pytest.raises(BundleError, match="plain file"):
        verify_bundle(folder, (str(keys / "ours.pub"),))


def test_keys_are_private_and_never_overwritten(tmp_path: Path):
    public = signing.keygen(tmp_path / "key")
    assert public == tmp_path / "key.pub" and stat.S_IMODE(os.stat(tmp_path / "key").st_mode) == 0o600
    assert b"PRIVATE" in (tmp_path / "key").read_bytes() and b"PRIVATE" not in public.read_bytes()
    before = (tmp_path / "key").read_bytes()
    with pytest.raises(SigningError, match="exists; a key is never overwritten"):
        signing.keygen(tmp_path / "key")
    assert (tmp_path / "key").read_bytes() == before
    with pytest.raises(SigningError, match="No such file"):
        signing.keygen(tmp_path / "nowhere" / "key")


@pytest.mark.parametrize("content", [b"", b"no key", "public"], ids=["empty", "text", "the public half"])
def test_a_wrong_private_key_is_reported_before_any_work(keys: Path, toy_small: Path, tmp_path: Path, content):
    path = tmp_path / "key"
    path.write_bytes((keys / "ours.pub").read_bytes() if content == "public" else content)
    with pytest.raises(SigningError, match="expected an Ed25519 private key"):
        plan = plan_bundle(read_checkpoint(toy_small), "Q4_0")
        begun = RecordedProgress(lambda *_: pytest.fail("the work began"))
        build(plan, tmp_path / "out", begun, signing_key=path)
    assert not (tmp_path / "out").exists()


def test_a_wrong_public_key_is_an_error_also_beside_a_right_one(signed: Path, keys: Path):
    ours = str(keys / "ours.pub")
    for wrong, words in ((keys / "ours", "expected an Ed25519 public key"), (keys / "none", "No such file")):
        for trusted in ((str(wrong),), (ours, str(wrong))):
            with pytest.raises(BundleError, match=words):
                verify_bundle(signed, trusted)


def test_keygen_build_check_and_run_on_the_command_line(signed: Path, toy_small: Path, tmp_path: Path, edge_quantize):
    def edge_agent(*arguments: object) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "edge_agent.cli.main", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    first = edge_agent("keygen", tmp_path / "drone")
    assert first.returncode == 0 and "drone.pub: public" in first.stdout
    again = edge_agent("keygen", tmp_path / "drone")
    assert again.returncode == 1 and len(again.stderr.splitlines()) == 1
    built = edge_quantize("build", toy_small, tmp_path / "out", "--sign", tmp_path / "drone", "--counter", "3")
    assert built.returncode == 0 and verify_bundle(tmp_path / "out").manifest.counter == 3, built.stderr
    for trusted, words in (("drone.pub", "every hash is right, signed"), ("other.pub", "No such file")):
        config = tmp_path / "config.yaml"
        config.write_text(
            f"bundle: {tmp_path / 'out'}\ntrusted_keys: [{tmp_path / trusted}]\n"
            f"camera: {{source: {tmp_path / 'none'}}}\n"
        )
        checked = edge_agent("check", "--config", config)
        assert words in checked.stdout
        ran = edge_agent("run", "--config", config)
        assert ran.returncode == 78 and ("camera.source" in ran.stderr) == (trusted == "drone.pub")
