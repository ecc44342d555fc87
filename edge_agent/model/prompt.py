"""The prompt: its layout and special tokens, and what of it fits the context. In the order of evaluation:

<s>[SYSTEM_PROMPT] role, actions, instruction [/SYSTEM_PROMPT][INST]   prefix: once per instruction, kept in the cache
image embeddings [IMG_END]                                             once per frame
vehicle state Action?[/INST]{"action":…}                               action lane: the answer to every frame
question[/INST]text                                                    text lane: behind a copy of the same frame
"""

from __future__ import annotations

import msgspec
import numpy as np

from edge_agent.actions.prompt import describe_action_space
from edge_agent.actions.space import ActionSpace
from edge_agent.actions.vehicle_state import max_vehicle_state_tokens
from edge_agent.bundle.manifest import VisionInfo
from edge_agent.config import Config
from edge_agent.errors import FaultName, UserError
from edge_agent.model.llama import ROW_ALIGNMENT, LlamaContext

SYSTEM_PROMPT = (  # models are trained on it: the words stay as they are
    "You are the eyes and judgement of a robot. You see one camera frame.\n"
    'When asked "Action?", answer with one JSON object, an action of this list and its fields:\n{space}\n'
    "When asked anything else, answer in a few plain words.\n"
    "Instruction: {instruction}"
)
SYSTEM_PROMPTS = {
    "json": SYSTEM_PROMPT,
    "action_tokens": SYSTEM_PROMPT.replace("answer with one JSON object, an action", "answer with one action"),
}
ACTION_QUESTION = "Action?"
MAX_ANSWER_TOKENS = 160  # bounds an answer; the grammar ends it long before
MIN_QUESTION_TOKENS = 64  # of a question; a larger context leaves more


class InstructionRefused(UserError):
    """An instruction does not fit the context; the previous one stays active. One line."""

    fault: FaultName | None = "instruction"


class CacheState(msgspec.Struct):
    """What the action lane's sequence holds. The engine pins the prefix, the action lane adds a frame, and the text
    lane starts from a copy of it."""

    prefix_tokens: list[int] = []
    frame_id: int = 0
    frame_end_position: int = 0  # after the frame's [IMG_END]; 0: the cache holds no frame


class Prompt:
    """Texts and special tokens of one model and action space, as token ids and embedding rows."""

    def __init__(
        self,
        llama: LlamaContext,
        special: dict[str, int],
        space: ActionSpace,
        forced_prefix: list[int],
        vision: VisionInfo,
        config: Config,
    ) -> None:
        """special: name -> id of the special tokens. forced_prefix: tokens that every answer must start with. They are
        appended to the prompt, so they cost no decode step."""
        self._llama, self.special, self.action_space, self.forced_prefix = llama, special, space, forced_prefix
        self.max_answer_tokens = MAX_ANSWER_TOKENS
        self._closing_embeddings = self._embed_closing("")
        max_lines = vision.image_size // (vision.patch * vision.merge)
        max_state_tokens = max_vehicle_state_tokens(space, lambda text: len(llama.tokens(text)))
        # Image embeddings, a line break after each line but the last, the vehicle's state and the closing text.
        self.max_frame_rows = (
            config.vision.max_image_tokens + max_lines + len(self._closing_embeddings) + max_state_tokens
        )
        self._max_text_tokens = config.language.max_text_tokens + config.language.max_reasoning_tokens
        # Every instruction leaves room for this many. A description that did not fit would be empty, frame after frame.
        self._min_question_tokens = max(MIN_QUESTION_TOKENS, len(self.question_tokens(config.language.describe_prompt)))

    @property
    def buffer_rows(self) -> int:
        """Rows of a FrameBuffer: a frame, the longest draft, and padding or one token of the text lane."""
        return self.max_frame_rows + self.max_answer_tokens + ROW_ALIGNMENT

    def prefix_tokens(self, instruction: str) -> list[int]:
        """The pinned beginning. Raises InstructionRefused when it leaves no room for a frame, an answer, a question and
        its text, or language.describe_prompt and its text."""
        text = SYSTEM_PROMPTS[self.action_space.codec].format(
            space=describe_action_space(self.action_space), instruction=instruction
        )
        special = self.special
        prefix = [
            special["bos"],
            special["system"],
            *self._llama.tokens(text),
            special["system_end"],
            special["inst"],
        ]
        needed, parts = self._needed(prefix)
        if needed > self._llama.n_ctx:
            described = " or language.describe_prompt" if self._min_question_tokens > MIN_QUESTION_TOKENS else ""
            raise InstructionRefused(
                f"language.context: {parts} make {needed}, found {self._llama.n_ctx}; raise it from "
                f"{self._llama.configured_context} to {self._llama.context_for(needed)}, lower "
                f"vision.max_image_tokens, or shorten the instruction{described}"
            )
        return prefix

    def describe_fit(self, instruction: str) -> str:
        """One line: what the instruction and the other texts need of the context. Raises InstructionRefused."""
        needed, parts = self._needed(self.prefix_tokens(instruction))
        return f"{parts} make {needed} of {self._llama.n_ctx}"

    def _needed(self, prefix: list[int]) -> tuple[int, str]:
        """(tokens of context that a prompt needs, what they are for)"""
        longest_reply = max(self.max_answer_tokens, self._max_text_tokens + self._min_question_tokens)
        parts = (
            f"{len(prefix)} tokens of prompt, {self.max_frame_rows} of a frame and {longest_reply} of the longest text"
        )
        return len(prefix) + self.max_frame_rows + longest_reply, parts

    def check_question(self, tokens: list[int], prefix_tokens: list[int]) -> str:
        """Why a question leaves no room for the longest text behind it; "": it fits. tokens: of question_tokens."""
        before = len(prefix_tokens) + self.max_frame_rows + self._max_text_tokens
        room = self._llama.n_ctx - before
        if len(tokens) <= room:
            return ""
        return (
            f"the question has {len(tokens)} tokens, {room} fit: raise language.context from "
            f"{self._llama.configured_context} to {self._llama.context_for(before + len(tokens))}, or shorten it"
        )

    def closing_embeddings(self, vehicle_state: str = "") -> np.ndarray:
        """The rows behind the image embeddings: (n, n_embd) float32. vehicle_state: of render_vehicle_state."""
        return self._embed_closing(vehicle_state) if vehicle_state else self._closing_embeddings

    def image_end_embedding(self) -> np.ndarray:
        """(1, n_embd) float32: the row that ends a frame."""
        return self._closing_embeddings[:1]

    def _embed_closing(self, vehicle_state: str) -> np.ndarray:
        text = self._llama.tokens(f"{vehicle_state}{ACTION_QUESTION}")
        special = self.special
        return self._llama.embed([special["img_end"], *text, special["inst_end"], *self.forced_prefix])

    def question_tokens(self, question: str) -> list[int]:
        return [*self._llama.tokens(question), self.special["inst_end"]]
