"""Prompt layouts: what stands around the system prompt, the frame and the question, for each family of models.

A GGUF file contains a chat template, which is a program that comes from outside: it is never run. A layout is data: it
is one of the table LAYOUTS, found by the special tokens of the vocabulary, or a YAML file that the user writes. The
manifest records the layout.

    name: zephyr
    special: ["<|system|>", "<|user|>", "<|assistant|>", "</s>"]
    before_system: "<|system|>\\n"
    before_user: "</s>\\n<|user|>\\n"
    before_answer: "</s>\\n<|assistant|>\\n"
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated

import msgspec
from msgspec import Meta

from edge_agent.bundle.file_check import Token
from edge_agent.errors import BundleError
from edge_agent.strict_yaml import convert, parse_yaml, read_text

CONTROL = 3  # tokenizer.ggml.token_type: text from outside never becomes such a token

_Text = Annotated[str, Meta(max_length=200)]
_Special = Annotated[str, Meta(min_length=1, max_length=63)]


class PromptLayout(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """In the order of the prompt: before_system, the system prompt, before_user, [before_image, the frame,
    after_image], the vehicle's state and the question, before_answer, the answer.

    The texts consist of the special tokens in `special` and of plain text.
    """

    name: Annotated[str, Meta(min_length=1, max_length=32)]
    special: Annotated[tuple[_Special, ...], Meta(max_length=32)]
    before_system: _Text
    before_user: _Text
    before_image: _Text = ""
    after_image: _Text = ""
    before_answer: Annotated[str, Meta(min_length=1, max_length=200)]
    projectors: Annotated[tuple[_Special, ...], Meta(max_length=8)] = ()  # of the mmproj files whose rows it can hold

    def parts(self, text: str) -> list[str]:
        """A text of the layout as special tokens and the plain texts between them."""
        longest_first = sorted(self.special, key=len, reverse=True)
        either = "|".join(map(re.escape, longest_first)) or "(?!)"
        return [part for part in re.split(f"({either})", text) if part]


MISTRAL = PromptLayout(
    name="mistral",
    special=("<s>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]"),
    before_system="<s>[SYSTEM_PROMPT]",
    before_user="[/SYSTEM_PROMPT][INST]",
    before_answer="[/INST]",
)
MISTRAL_VISION = msgspec.structs.replace(
    MISTRAL, special=(*MISTRAL.special, "[IMG_END]"), after_image="[IMG_END]", projectors=("pixtral",)
)
CHATML = PromptLayout(
    name="chatml",
    special=("<|im_start|>", "<|im_end|>"),
    before_system="<|im_start|>system\n",
    before_user="<|im_end|>\n<|im_start|>user\n",
    before_answer="<|im_end|>\n<|im_start|>assistant\n",
)
GEMMA = PromptLayout(  # no system prompt of its own: it is the beginning of the user's text
    name="gemma",
    special=("<bos>", "<start_of_turn>", "<end_of_turn>"),
    before_system="<bos><start_of_turn>user\n",
    before_user="\n\n",
    before_answer="<end_of_turn>\n<start_of_turn>model\n",
)
GEMMA_VISION = msgspec.structs.replace(
    GEMMA,
    special=(*GEMMA.special, "<start_of_image>", "<end_of_image>"),
    before_image="<start_of_image>",
    after_image="<end_of_image>",
    projectors=("gemma3",),
)
LLAMA3 = PromptLayout(
    name="llama3",
    special=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    before_system="<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n",
    before_user="<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n",
    before_answer="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
)
# Name -> the layout of text, and of frames and text where there is one.
LAYOUTS: dict[str, tuple[PromptLayout, ...]] = {
    "mistral": (MISTRAL, MISTRAL_VISION),
    "chatml": (CHATML,),
    "gemma": (GEMMA, GEMMA_VISION),
    "llama3": (LLAMA3,),
}
SPECIAL_TEXTS = frozenset(text for layouts in LAYOUTS.values() for layout in layouts for text in layout.special)


def recognise(tokens: Iterable[Token]) -> str:
    """The name of the layout whose special tokens are in the vocabulary. Raises BundleError if it is not exactly
    one."""
    control = {token.text for token in tokens if token.type == CONTROL}
    found = [name for name, (text_only, *_) in LAYOUTS.items() if control.issuperset(text_only.special)]
    if len(found) == 1:
        return found[0]
    if found:
        raise BundleError(f"the vocabulary has the special tokens of {' and '.join(found)}; choose one with --layout")
    known = ", ".join(LAYOUTS)
    raise BundleError(
        f"no prompt layout of {known} has its special tokens in this vocabulary; write a layout: docs/bundle.md"
    )


def read_layout(path: str) -> PromptLayout:
    """Read a layout that the user wrote. Raises ConfigError."""
    return convert(parse_yaml(read_text(path), path), PromptLayout, path)
