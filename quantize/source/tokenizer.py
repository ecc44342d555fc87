"""The checkpoint's tokenizer -> the lists of a GGUF file. Reads tekken.json or tokenizer.json. Does not tokenise text.

Tekken is byte-level BPE by rank: special ids first, then ranks. llama.cpp needs explicit merges in the byte alphabet of
GPT-2 (`tokenizer.ggml.model = gpt2`, `pre = tekken`), so the merges are rebuilt from the ranks.
"""

from __future__ import annotations

import base64
import functools
import re
from collections.abc import Callable
from pathlib import Path

import msgspec

from edge_agent.bundle.manifest import SPECIAL_TOKENS, THINK_TOKENS
from quantize.source.hf_config import CheckpointError, read_table

NORMAL, CONTROL = 1, 3  # gguf.TokenType


LAST_VERSION_WITHOUT_NAMES = 7
# The names of the first special tokens where tekken.json does not list them, as in mistral-common.
OLD_SPECIAL_NAMES = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip


class Tokenizer(msgspec.Struct, frozen=True):
    """A tokenizer as GGUF stores it. tokens and types: one entry per token id."""

    file: Path
    tokens: list[str]  # in the GPT-2 byte alphabet; special tokens as plain text
    types: list[int]  # NORMAL or CONTROL
    merges: list[str]  # "left right", in order of priority
    special: dict[str, int]  # the names of SPECIAL_TOKENS -> id, and of THINK_TOKENS where the vocabulary has both
    beside: str = ""  # what another tokenizer file in the folder says; "": there is none

    @property
    def gguf_bytes(self) -> int:
        """Bytes of the three lists in a GGUF header: each string has a length of 8 bytes, each type has 4 bytes."""
        texts = [*self.tokens, *self.merges]
        return sum(8 + len(text.encode()) for text in texts) + 4 * len(self.types)


def read_tokenizer(folder: Path, vocab: int) -> Tokenizer:
    """The tokenizer of a checkpoint. Takes about a second for 131072 tokens: read it once and hand it over.

    Two files must say the same about every row of the embedding table; of two, the one that fits the table is taken.
    vocab: rows of the embedding table. Raises CheckpointError when no file fits, or when two that fit differ.
    """
    found: list[Tokenizer] = []
    errors: list[CheckpointError] = []
    for name, reader in (("tekken.json", functools.partial(_tekken, vocab=vocab)), ("tokenizer.json", _hf)):
        if (folder / name).is_file():
            try:
                found.append(_read_file(folder / name, vocab, reader))
            except CheckpointError as error:
                errors.append(error)
    if not found:
        raise (
            errors[0] if errors else CheckpointError(f"{folder}: no tokenizer; expected tekken.json or tokenizer.json")
        )
    if errors:
        return msgspec.structs.replace(found[0], beside=f"not used: {errors[0]}")
    if len(found) == 1:
        return found[0]
    first, second = found
    if difference := _first_difference(first, second):
        raise CheckpointError(f"{folder}: {difference}; remove the file that the model was not trained with")
    return msgspec.structs.replace(first, beside=f"{second.file.name} has the same tokens")


def _first_difference(first: Tokenizer, second: Tokenizer) -> str:
    """ "": none. Names of special tokens that nothing here uses may differ."""
    used = {*SPECIAL_TOKENS.values(), *THINK_TOKENS.values()}
    for i, (a, b) in enumerate(zip(first.tokens, second.tokens, strict=True)):
        both_unused = first.types[i] == second.types[i] == CONTROL and not {a, b} & used
        if a != b and not both_unused:
            return f"token {i}: {first.file.name} has {a[:40]!r}, {second.file.name} has {b[:40]!r}"
    return ""


def _read_file(path: Path, vocab: int, reader: Callable[[dict], tuple[list[str], list[int], list[str]]]) -> Tokenizer:
    try:
        tokens, types, merges = reader(read_table(path))
    except (AttributeError, KeyError, TypeError, IndexError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged: {type(error).__name__} {error}; download it again") from None
    if len(tokens) != vocab:
        raise CheckpointError(f"{path}: {len(tokens)} tokens, but the embedding has {vocab} rows; they are not a pair")
    ids = {token: i for i, token in enumerate(tokens) if types[i] == CONTROL}
    missing = [text for text in SPECIAL_TOKENS.values() if text not in ids]
    if missing:
        raise CheckpointError(f"{path}: no special token {', '.join(missing)}; expected the Tekken tokenizer")
    special = {name: ids[text] for name, text in SPECIAL_TOKENS.items()}
    # Not from `ids`: in some files these two have the type NORMAL.
    think_ids = {token: i for i, token in enumerate(tokens) if token in THINK_TOKENS.values()}
    if len(think_ids) == len(THINK_TOKENS):
        special |= {name: think_ids[text] for name, text in THINK_TOKENS.items()}
    return Tokenizer(path, tokens, types, merges, special)


def _version(text: str) -> int:
    """v7 or v7m1 -> 7."""
    found = re.match(r"v(\d+)", text)
    if not found:
        raise ValueError(f"version {text!r}")
    return int(found[1])


def _byte_letters() -> dict[int, str]:
    """GPT-2's printable letter for every byte: the byte's own character, or the next letter from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in plain}
    others = [byte for byte in range(256) if byte not in letters]
    return letters | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _tekken(data: dict, vocab: int) -> tuple[list[str], list[int], list[str]]:
    n_special, names = data["config"]["default_num_special_tokens"], data.get("special_tokens")
    if names is None and _version(data["config"]["version"]) <= LAST_VERSION_WITHOUT_NAMES:
        names = [{"rank": i, "token_str": name} for i, name in enumerate(OLD_SPECIAL_NAMES)]
    # A release's file lists more ranks than its model has embeddings; the first `vocab - n_special` are used.
    entries = sorted(data["vocab"], key=lambda entry: entry["rank"])[: vocab - n_special]
    by_rank = [base64.b64decode(entry["token_bytes"], validate=True) for entry in entries]
    if [entry["rank"] for entry in entries] != list(range(len(entries))):
        raise ValueError("ranks are not 0, 1, 2, …")
    special = {entry["rank"]: entry["token_str"] for entry in names or []}
    letters = _byte_letters()
    spelled = ["".join(letters[byte] for byte in token) for token in by_rank]
    tokens = [special.get(i, f"<SPECIAL_{i}>") for i in range(n_special)] + spelled
    types = [CONTROL] * n_special + [NORMAL] * len(spelled)
    return tokens, types, _merges(by_rank, spelled)


def _merges(by_rank: list[bytes], spelled: list[str]) -> list[str]:
    """Ranks -> merge rules: every pair of tokens whose concatenation is a token, in the order of that token."""
    rank_of = {token: rank for rank, token in enumerate(by_rank)}
    merges = []
    for token in by_rank[256:]:
        pairs = [
            (left, right)
            for split in range(1, len(token))
            if (left := rank_of.get(token[:split])) is not None and (right := rank_of.get(token[split:])) is not None
        ]
        merges += [f"{spelled[left]} {spelled[right]}" for left, right in sorted(pairs)]
    return merges


def _hf(data: dict) -> tuple[list[str], list[int], list[str]]:
    by_id = {i: token for token, i in data["model"]["vocab"].items()}
    types = dict.fromkeys(by_id, NORMAL)
    for added in data["added_tokens"]:
        by_id[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else NORMAL
    if sorted(by_id) != list(range(len(by_id))):
        raise ValueError("token ids are not 0, 1, 2, …")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in data["model"]["merges"]]
    return [by_id[i] for i in range(len(by_id))], [types[i] for i in range(len(by_id))], merges
