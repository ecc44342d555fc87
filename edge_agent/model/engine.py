"""One language model with two lanes: actions for every frame, text between frames. Knows no image and no socket.

Owns the llama.cpp context, the instruction and the adapter. A frame reaches it as a FrameBuffer of image embeddings.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from edge_agent.config import LanguageConfig
from edge_agent.model import batch_shape
from edge_agent.model.action_lane import ActionLane
from edge_agent.model.constrained import Grammar
from edge_agent.model.frame_buffer import FrameBuffer
from edge_agent.model.llama import ACTION_SEQ, TEXT_SEQ, LlamaContext
from edge_agent.model.prompt import CacheState, Prompt
from edge_agent.model.text_lane import LaneContext, TextLane

# Evaluated at warm-up to compare shapes of batches; any text of some 50 tokens will do.
CALIBRATION_TEXT = (
    'The road is clear. A person in a red coat stands 4.25 m ahead on the left. {"action":"move","forward_m_s":0.75,'
    '"yaw_rate_rad_s":-0.125} Halte Abstand, fliege langsam nach rechts.'
)


class Engine:
    """Closing it frees the model. For one thread.

    Frames are answered by `actions`, questions by `text`.
    """

    def __init__(
        self,
        llama: LlamaContext,
        grammar: Grammar,
        prompt: Prompt,
        config: LanguageConfig,
        *,
        speculative: bool = True,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """speculative: the previous answer is the draft of the next. clock: CLOCK_MONOTONIC, nanoseconds."""
        self.llama, self.grammar, self.prompt = llama, grammar, prompt
        self.cache = CacheState()
        shared = LaneContext(llama, prompt, self.cache, clock)
        self.text = TextLane(shared, config)
        self.actions = ActionLane(
            shared, grammar, self.text, speculative=speculative, stream_text=config.stream_action_text
        )
        self.instruction, self.adapter = "", ""

    def close(self) -> None:
        self.llama.close()

    def instruct(self, instruction: str, adapter: str = "") -> None:
        """Evaluate and pin a new prefix under an adapter (empty: none). A text that is being decoded ends. Raises
        InstructionRefused when the prefix leaves no room for frames; then the previous instruction stays active."""
        prefix_tokens = self.prompt.prefix_tokens(instruction)
        if not self.text.idle:
            self.text.stop("new-instruction")
        self.llama.truncate(TEXT_SEQ, 0)
        self.llama.truncate(ACTION_SEQ, 0)
        self.llama.set_adapter(adapter)
        self.llama.logits_after_last(prefix_tokens, 0)
        self.cache.prefix_tokens, self.cache.frame_end_position = prefix_tokens, 0
        self.instruction, self.adapter = instruction, adapter

    def measure_batch_shapes(self, frame: FrameBuffer) -> None:
        """Learn how to evaluate drafts on this machine (batch_shape.py). frame: the one that the cache holds; it stays
        there, without an answer."""
        llama, start = self.llama, self.cache.frame_end_position
        tokens = llama.tokens(CALIBRATION_TEXT)
        if llama.reproducible:
            alignment = batch_shape.row_alignment(llama, tokens, start)
            llama.reproducible, llama.row_alignment = alignment > 0, max(alignment, 1)
        if llama.reproducible:
            self.actions.draft_margin = 0.0
            return
        if self.prompt.text_as_rows:  # then a draft is evaluated in the frame's batch
            if not llama.on_gpu:  # a GPU has other kernels for larger batches than those that are compared here
                self.actions.frame_alignment = batch_shape.row_alignment(llama, tokens, start)
            frame.drop_text()
            frame.append(llama.embed(self.prompt.image_end_tokens))
            shift = batch_shape.largest_shift(llama, tokens, len(self.cache.prefix_tokens), frame)
        else:
            shift = batch_shape.largest_shift(llama, tokens, start)
        self.actions.draft_margin = batch_shape.margin_of(shift) if math.isfinite(shift) else None

    def keep_warm(self) -> None:
        """One real decode step behind the frame, dropped afterwards. The frame stays: a question may still come."""
        start = self.cache.frame_end_position or len(self.cache.prefix_tokens)
        self.llama.truncate(ACTION_SEQ, start)
        self.llama.logits_after_last(self.prompt.question_tokens("")[-1:], start)
        self.llama.truncate(ACTION_SEQ, start)
