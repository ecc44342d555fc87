"""The prompt: its texts in the bundle's layout, and what of it fits the context. In the order of evaluation, with
Mistral's special tokens:

<s>[SYSTEM_PROMPT] role, actions, instruction [/SYSTEM_PROMPT][INST]   prefix: once per instruction, kept in the cache
image embeddings [IMG_END]                                             once per frame
vehicle state Action?[/INST]{"action":…}                               action lane: the answer to every frame
question[/INST]text                                                    text lane: behind a copy of the same frame

Without a vision encoder a frame has no rows, and everything stands on the vehicle's state.
"""

from __future__ import annotations

import itertools

import msgspec
import numpy as np

from edge_agent.actions.prompt import describe_action_space
from edge_agent.actions.space import ActionSpace
from edge_agent.actions.vehicle_state import max_vehicle_state_tokens
from edge_agent.bundle.manifest import Manifest
from edge_agent.config import Config
from edge_agent.errors import FaultName, UserError
from edge_agent.model.llama import ROW_ALIGNMENT, LlamaContext
from edge_agent.model.preprocess import max_embedding_rows

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
ONE_FRAME = "You are the eyes and judgement of a robot. You see one camera frame."
NO_FRAME = "You are the judgement of a robot. You see no image; you get the robot's state as text."
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
        manifest: Manifest,
        space: ActionSpace,
        forced_prefix: list[int],
        config: Config,
    ) -> None:
        """manifest: of the bundle; it has the layout and its special tokens. forced_prefix: tokens that every answer
        must start with. They are appended to the prompt, so they cost no decode step."""
        self._llama, self.action_space, self.forced_prefix = llama, space, forced_prefix
        self.layout, self.special, self._manifest = manifest.prompt_layout, manifest.model.special, manifest
        self.max_answer_tokens = MAX_ANSWER_TOKENS
        vision = manifest.vision
        self.has_images = vision is not None
        # Rows of text beside those of the image, in one batch: the action lane then calls the model once for a frame.
        # Not where an image needs a batch of its own, nor where there is none: then llama.cpp itself looks tokens up.
        self.text_as_rows = vision is not None and vision.causal
        self.image_end_tokens = self._tokenise(self._layout_parts(self.layout.after_image)) if self.has_images else []
        self._closing_embeddings = llama.embed(self.closing_tokens())
        max_state_tokens = max_vehicle_state_tokens(space, lambda text: len(llama.tokens(text)))
        max_image_rows = 0 if vision is None else max_embedding_rows(vision, config.vision.max_image_tokens)
        # Image embeddings, a line break after each line but the last, the vehicle's state and the closing text.
        self.max_frame_rows = max_image_rows + len(self._closing_embeddings) + max_state_tokens
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
        template = SYSTEM_PROMPTS[self.action_space.codec]
        if not self.has_images:
            template = template.replace(ONE_FRAME, NO_FRAME)
        text = template.format(space=describe_action_space(self.action_space), instruction=instruction)
        layout = self.layout
        before_frame = layout.before_user + (layout.before_image if self.has_images else "")
        prefix = self._tokenise([*self._layout_parts(layout.before_system), text, *self._layout_parts(before_frame)])
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
        return self._llama.embed(self.closing_tokens(vehicle_state)) if vehicle_state else self._closing_embeddings

    def closing_tokens(self, vehicle_state: str = "") -> list[int]:
        """The tokens of these rows."""
        question = self.question_tokens(f"{vehicle_state}{ACTION_QUESTION}")
        return [*self.image_end_tokens, *question, *self.forced_prefix]

    def question_tokens(self, question: str) -> list[int]:
        """A question behind the frame, up to where the answer begins."""
        return self._tokenise([question, *self._layout_parts(self.layout.before_answer)])

    def _layout_parts(self, text: str) -> list[str | int]:
        """A text of the layout; a special token is its id."""
        special = self.layout.special
        return [self._manifest.token_id(part) if part in special else part for part in self.layout.parts(text)]

    def _tokenise(self, parts: list[str | int]) -> list[int]:
        """Texts that follow each other are one text: a token can be made of the end of one and the start of the next.
        Text never becomes a special token."""
        tokens: list[int] = []
        for is_text, group in itertools.groupby(parts, lambda part: isinstance(part, str)):
            same = list(group)
            tokens += self._llama.tokens("".join(map(str, same))) if is_text else map(int, same)
        return tokens
