"""What each profile means, and which switches follow from others."""

from __future__ import annotations

import itertools

import msgspec
import pytest

from edge_agent.config import AdvancedConfig, CameraConfig, Config, VisionConfig, load_config_text
from edge_agent.errors import ConfigError
from edge_agent.profile import ResolvedSwitches, resolve

CONFIG = Config(bundle="b", camera=CameraConfig(source="none"))
DEFAULT = {  # on a CPU
    "vision_backend": "onnxruntime",
    "reproducible": False,
    "speculative": True,
    "overlap": False,
    "repack": True,
    "mmap": False,
    "mlock": False,
    "kv_cache_type": "f16",
    "flash_attention": False,
}
GPU = {"vision_backend": "mtmd", "reproducible": False, "mmap": True, "flash_attention": None}
SMALL = {"vision_backend": "mtmd", "reproducible": False, "kv_cache_type": "q8_0", "flash_attention": True}


def switches(profile: str | None, gpu: bool, **advanced: object) -> ResolvedSwitches:
    config = msgspec.structs.replace(CONFIG, profile=profile, advanced=AdvancedConfig(**advanced))
    return resolve(config, gpu)


@pytest.mark.parametrize(
    ("profile", "gpu", "changes"),
    [
        (None, False, {}),
        ("reproducible", False, {"reproducible": True}),
        ("fast", False, {}),
        ("small", False, SMALL),
        (None, True, GPU),
        ("reproducible", True, GPU),  # bits depend on the batch there; the model process logs it
        ("fast", True, GPU),
        ("small", True, SMALL | {"mmap": True}),
    ],
)
def test_a_profile_is_a_group_of_switches(profile, gpu, changes):
    assert msgspec.to_builtins(switches(profile, gpu)) == DEFAULT | changes


@pytest.mark.parametrize("profile", [None, "reproducible", "fast", "small"])
@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize(
    ("switch", "value"),
    [
        *itertools.product(("speculative", "overlap", "repack", "mmap", "mlock", "flash_attention"), (False, True)),
        ("kv_cache_type", "q8_0"),
        ("kv_cache_type", "f16"),
    ],
)
def test_a_single_switch_replaces_the_profiles(profile, gpu, switch, value):
    assert getattr(switches(profile, gpu, **{switch: value}), switch) == value


def test_overlap_is_off_until_it_is_set():
    """It buys rate and costs freshness: only a measurement on the board can say whether it is worth it."""
    for profile, gpu in itertools.product((None, "reproducible", "fast", "small"), (False, True)):
        assert not switches(profile, gpu).overlap and switches(profile, gpu, overlap=True).overlap


def test_tensorrt_is_used_by_onnxruntime():
    config = msgspec.structs.replace(CONFIG, vision=VisionConfig(tensorrt=True))
    assert resolve(config, gpu=True).vision_backend == "onnxruntime"


def test_the_backend_replaces_the_profiles():
    for backend, profile in (("mtmd", None), ("onnxruntime", "small")):
        config = msgspec.structs.replace(CONFIG, profile=profile, vision=VisionConfig(backend=backend))
        assert resolve(config, gpu=False).vision_backend == backend


@pytest.mark.parametrize(
    ("profile", "advanced", "changes"),
    [
        (None, {"kv_cache_type": "q8_0"}, {"kv_cache_type": "q8_0", "flash_attention": True}),
        ("reproducible", {"flash_attention": True}, {"flash_attention": True}),
        (None, {"repack": False}, {"repack": False, "mmap": True}),
        ("small", {"flash_attention": False}, SMALL | {"kv_cache_type": "f16", "flash_attention": False}),
        ("small", {"kv_cache_type": "f16"}, SMALL | {"kv_cache_type": "f16", "flash_attention": False}),
        ("fast", {"reproducible": True}, {"reproducible": True}),
    ],
)
def test_switches_follow_from_others(profile, advanced, changes):
    assert msgspec.to_builtins(switches(profile, False, **advanced)) == DEFAULT | changes


@pytest.mark.parametrize(
    ("advanced", "key"),
    [
        ("{kv_cache_type: q8_0, flash_attention: false}", "kv_cache_type: expected f16"),
        ("{reproducible: true, kv_cache_type: q8_0}", "reproducible: expected false"),
        ("{reproducible: true, flash_attention: true}", "reproducible: expected false"),
    ],
)
def test_switches_that_exclude_each_other_are_refused(advanced, key):
    with pytest.raises(ConfigError, match=key):
        load_config_text(f"bundle: /b\ncamera: {{source: x}}\nadvanced: {advanced}\n", "agent.yaml")
