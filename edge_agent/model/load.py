"""Configuration and bundle -> an ImageEncoder and an Engine, for the daemon, the benchmarks and the toolchain."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cv2
import msgspec
import numpy as np

from edge_agent.actions import action_tokens
from edge_agent.actions.grammar import json_schema
from edge_agent.actions.space import ActionSpace
from edge_agent.board.control_groups import available_cores
from edge_agent.bundle.manifest import LANGUAGE, MMPROJ, VISION, Bundle, Manifest, ModelInfo
from edge_agent.bundle.model_start import fit_to_bundle
from edge_agent.config import CameraConfig, Config
from edge_agent.errors import ConfigError
from edge_agent.ipc.events import Heartbeat
from edge_agent.model.constrained import Grammar, NonFiniteError, grammar_from_lark, grammar_from_schema
from edge_agent.model.engine import Engine
from edge_agent.model.events import NULL_EVENTS, Events
from edge_agent.model.gpu import uses_gpu
from edge_agent.model.image_encoder import ImageEncoder, NoImages
from edge_agent.model.llama import LlamaContext, LlamaOptions
from edge_agent.model.preprocess import Preprocessor
from edge_agent.model.prompt import ACTION_QUESTION, MAX_ANSWER_TOKENS, Prompt
from edge_agent.model.vision_encoder import EncoderOptions, MtmdEncoder, OnnxEncoder, check_tensorrt, open_encoder
from edge_agent.profile import ResolvedSwitches, resolve
from edge_agent.time_units import NS_PER_MS

NO_DEADLINE_NS = 2**62
WARM_UP_SIZE = (480, 640)  # height, width in pixels, if the configuration does not give the camera's


class LoadedModel(NamedTuple):
    """A frame goes through `images`, its embeddings through `engine.actions`."""

    images: ImageEncoder | NoImages
    engine: Engine
    switches: ResolvedSwitches

    def close(self) -> None:
        self.images.close()
        self.engine.close()


def llama_options(config: Config, switches: ResolvedSwitches, open_file: Callable[[Path], Path] = Path) -> LlamaOptions:
    """open_file: of load_model."""
    return LlamaOptions(
        context=config.language.context,
        threads=config.cpu_threads,
        gpu_layers=config.language.gpu_layers,
        adapters={name: str(open_file(Path(path))) for name, path in config.language.adapters.items()},
        repack=switches.repack,
        mmap=switches.mmap,
        mlock=switches.mlock,
        kv_cache_type=switches.kv_cache_type,
        flash_attention=switches.flash_attention,
        reproducible=switches.reproducible,
    )


def load_model(
    config: Config,
    bundle: Bundle,
    space: ActionSpace,
    events: Events = NULL_EVENTS,
    open_file: Callable[[Path], Path] = Path,
) -> LoadedModel:
    """Load everything; heartbeats go to `events`. Raises LlamaError, VisionError, BundleError, ConfigError.

    open_file: called with each file before it is loaded; returns the path to load it from (VerifiedFiles.open).
    """
    config = fit_to_bundle(config, bundle.manifest)
    cv2.setNumThreads(config.cpu_threads or available_cores())  # OpenCV takes every core of the machine otherwise
    gpu = uses_gpu(config.language.gpu_layers)
    switches, model = resolve(config, gpu), bundle.manifest.model
    _check_reasoning(config, model)
    llama = LlamaContext(
        open_file(bundle.path(LANGUAGE)),
        llama_options(config, switches, open_file),
        model.embedding,
        progress=lambda part: events.send(Heartbeat(f"weights {part:.0%}")),
    )
    try:
        events.send(Heartbeat("grammar"))
        grammar = _compile_grammar(llama, space)
        events.send(Heartbeat("vision"))
        encoder = _open_encoder(config, bundle, switches, llama, open_file)
        try:
            return _assemble(config, bundle.manifest, switches, llama, encoder, grammar, space)
        except BaseException:
            if encoder is not None:
                encoder[1].close()
            raise
    except BaseException:
        llama.close()
        raise


def check_start(config: Config, bundle: Bundle, space: ActionSpace) -> str:
    """What load_model() and the first instruction would refuse, without weights: reasoning, the grammar and the texts.

    One line about the context. Raises LlamaError, VisionError, BundleError, ConfigError, InstructionRefused.
    """
    config = fit_to_bundle(config, bundle.manifest)
    switches, model = resolve(config, uses_gpu(config.language.gpu_layers)), bundle.manifest.model
    _check_reasoning(config, model)
    if config.vision.tensorrt and switches.vision_backend == "onnxruntime":
        from edge_agent.model.onnx_runtime import onnxruntime

        check_tensorrt(onnxruntime.get_available_providers())
    options = msgspec.structs.replace(llama_options(config, switches), adapters={}, vocabulary_only=True)
    with LlamaContext(bundle.path(LANGUAGE), options, model.embedding) as llama:
        grammar = _compile_grammar(llama, space)
        grammar.start()
        prompt = Prompt(llama, bundle.manifest, space, grammar.forced_tokens(), config)
        return prompt.describe_fit(config.task.instruction)


def _check_reasoning(config: Config, model: ModelInfo) -> None:
    if config.language.max_reasoning_tokens and "think" not in model.special:
        raise ConfigError("language.max_reasoning_tokens: expected 0 for a model without [THINK]")


def _compile_grammar(llama: LlamaContext, space: ActionSpace) -> Grammar:
    """Raises ConfigError: no grammar for this action space, or answers that are too long."""
    grammar = Grammar(llama.vocab)
    if space.codec == "action_tokens":
        action_tokens.check_vocabulary(llama.token_text)
        n_tokens = 1 + space.horizon * max(len(action_type.fields) for action_type in space.actions.values())
        if n_tokens > MAX_ANSWER_TOKENS:
            raise ConfigError(f"horizon: expected answers of at most {MAX_ANSWER_TOKENS} tokens, found {n_tokens}")
        grammar.compile(grammar_from_lark(action_tokens.lark_grammar(space)))
    else:
        grammar.compile(grammar_from_schema(json_schema(space)))
    return grammar


def _open_encoder(
    config: Config,
    bundle: Bundle,
    switches: ResolvedSwitches,
    llama: LlamaContext,
    open_file: Callable[[Path], Path],
) -> tuple[Preprocessor, OnnxEncoder | MtmdEncoder] | None:
    """None: a text-only model."""
    manifest, vision = bundle.manifest, bundle.manifest.vision
    if vision is None:
        return None
    options = EncoderOptions(
        backend=switches.vision_backend,
        threads=config.cpu_threads,
        tensorrt=config.vision.tensorrt,
        gpu=config.language.gpu_layers != 0,
    )
    preprocessor = Preprocessor(vision, config.vision.max_image_tokens)
    path = open_file(bundle.path(MMPROJ if switches.vision_backend == "mtmd" else VISION))
    break_row = llama.embed([manifest.token_id("[IMG_BREAK]")])[0] if vision.breaks else None
    return preprocessor, open_encoder(path, options, preprocessor, llama.model, break_row)


def _assemble(
    config: Config,
    manifest: Manifest,
    switches: ResolvedSwitches,
    llama: LlamaContext,
    encoder: tuple[Preprocessor, OnnxEncoder | MtmdEncoder] | None,
    grammar: Grammar,
    space: ActionSpace,
) -> LoadedModel:
    grammar.start()
    prompt = Prompt(llama, manifest, space, grammar.forced_tokens(), config)
    images: ImageEncoder | NoImages = NoImages(prompt.buffer_rows, llama.n_embd)
    if encoder is not None:
        images = ImageEncoder(*encoder, prompt.buffer_rows)
    engine = Engine(llama, grammar, prompt, config.language, speculative=switches.speculative)
    return LoadedModel(images, engine, switches)


def warm_up(model: LoadedModel, camera: CameraConfig, clock: Callable[[], int] = time.monotonic_ns) -> float:
    """One frame and the start of a text through everything, without events -> milliseconds. The first frame allocates,
    and must not be the vehicle's. It has the camera's size where that is configured: TensorRT makes an engine for each
    size."""
    start_ns, engine = clock(), model.engine
    height, width = camera.height or WARM_UP_SIZE[0], camera.width or WARM_UP_SIZE[1]
    engine.instruct("")
    with contextlib.suppress(NonFiniteError):  # frames are checked one by one
        frame = model.images.embed(np.full((height, width, 3), 128, np.uint8))
        engine.actions.decide(frame, 0, NO_DEADLINE_NS)
        engine.measure_batch_shapes(frame)
        engine.text.start("describe", "", ACTION_QUESTION, NULL_EVENTS)
        if not engine.text.idle:
            engine.text.stop("")
    return (clock() - start_ns) / NS_PER_MS
