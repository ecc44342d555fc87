"""What `edge-agent check` says about the context: the lines of the daemon, from the vocabulary alone."""

from __future__ import annotations

import os
import subprocess
import sys

import msgspec
import pytest

from edge_agent.actions.space import load_action_space
from edge_agent.bundle.manifest import read_manifest
from edge_agent.config import AdvancedConfig, Config, LanguageConfig, TaskConfig, VisionConfig
from edge_agent.errors import UserError
from edge_agent.model import load
from edge_agent.model.load import check_start, load_model
from tests.harness import ROOT
from tests.harness.rig import config_of, model_start


def start(config: Config) -> None:
    """What the model process does at its start."""
    model = load_model(config, read_manifest(config.bundle), load_action_space(config.task.action_space))
    try:
        model.engine.instruct(config.task.instruction)
    finally:
        model.close()


def checked(config: Config) -> str:
    return check_start(config, read_manifest(config.bundle), load_action_space(config.task.action_space))


def language(**changes: object) -> dict:
    return {"language": LanguageConfig(gpu_layers=0, **changes)}


REFUSED = {
    "a long instruction": language() | {"task": TaskConfig(instruction="Go to the door. " * 100)},
    "a small context": language(context=512),
    "long texts": language(max_text_tokens=900),
    "a long question for descriptions": language(describe_prompt="ÄÖÜ, ñ, 그리고 " * 150),
    "many image tokens": language() | {"vision": VisionConfig(max_image_tokens=1024)},
    "reasoning": language(max_reasoning_tokens=900),
}


@pytest.mark.parametrize("what", REFUSED)
def test_the_check_says_what_the_daemon_would_say(toy_bundle, what):
    config = config_of(toy_bundle, **REFUSED[what])
    with pytest.raises(UserError) as by_the_daemon:
        start(config)
    with pytest.raises(UserError) as by_the_check:
        checked(config)
    assert str(by_the_check.value) == str(by_the_daemon.value)
    assert by_the_check.value.exit_status == by_the_daemon.value.exit_status == os.EX_CONFIG


@pytest.mark.parametrize("reproducible", [True, False])
def test_the_smallest_context_that_the_check_accepts_is_that_of_the_daemon(toy_bundle, reproducible):
    """The refusal names it. Padding takes a part of the last cells."""
    config = config_of(toy_bundle, **language(context=300), advanced=AdvancedConfig(reproducible=reproducible))
    with pytest.raises(UserError) as refused:
        checked(config)
    smallest = int(str(refused.value).partition(" to ")[2].partition(",")[0])
    smallest_config = msgspec.structs.replace(config, **language(context=smallest))
    assert "tokens of prompt" in checked(smallest_config)
    start(smallest_config)
    with pytest.raises(UserError):
        checked(msgspec.structs.replace(config, **language(context=smallest - 1)))


def test_a_grammar_that_cannot_be_compiled_is_found(toy_bundle, monkeypatch):
    monkeypatch.setattr(load, "json_schema", lambda space: {"type": "number", "minimum": 2, "maximum": 1})
    with pytest.raises(UserError, match="cannot compile a grammar for this action space"):
        checked(config_of(toy_bundle))


def test_tensorrt_that_is_not_installed_is_found(toy_bundle):
    config = config_of(toy_bundle, vision=VisionConfig(tensorrt=True))
    with pytest.raises(UserError, match=r"vision\.tensorrt: onnxruntime here has only") as caught:
        checked(config)
    assert caught.value.exit_status == os.EX_CONFIG


@pytest.mark.parametrize("instruction", ["Land.", "Go to the door. " * 100], ids=["fits", "too long"])
def test_the_process_prints_one_line(toy_bundle, instruction):
    config = config_of(toy_bundle, task=TaskConfig(instruction=instruction))
    done = subprocess.run(
        [sys.executable, "-m", "edge_agent.model", "--check"],
        input=model_start(config),
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
    )
    if instruction == "Land.":
        assert done.returncode == 0 and done.stdout.decode().strip() == checked(config)
    else:
        assert done.returncode == os.EX_CONFIG and done.stdout == b""
        assert done.stderr.decode().strip().startswith("language.context: ")
