"""tekken.json and tokenizer.json of a toy checkpoint: the first ranks of the real vocabulary."""

import base64
import functools
import json
from importlib import resources

from tests.harness.toy_config import write_json
from tests.harness.toy_layout import MERGE, N_SPECIAL, PATCH_PX, SPECIAL_NAMES


def special_name(token_id):
    return SPECIAL_NAMES.get(token_id, f"<SPECIAL_{token_id}>")


@functools.cache
def _tekken():
    """The vocabulary in mistral-common's wheel (v3: byte pairs as in v13, but without the names of special ids)."""
    return json.loads((resources.files("mistral_common") / "data" / "tekken_240911.json").read_text(encoding="utf-8"))


def write_tekken(folder, vocab):
    """tekken.json as v13 writes it. The first ranks of a byte-pair vocabulary are themselves such a vocabulary."""
    write_json(
        folder / "tekken.json",
        {
            "config": {
                "pattern": _tekken()["config"]["pattern"],
                "num_vocab_tokens": vocab - N_SPECIAL,
                "default_vocab_size": vocab,
                "default_num_special_tokens": N_SPECIAL,
                "version": "v13",
            },
            "vocab": _tekken()["vocab"][: vocab - N_SPECIAL],
            "special_tokens": [{"rank": i, "token_str": special_name(i), "is_control": True} for i in range(N_SPECIAL)],
            "image": {"image_patch_size": PATCH_PX, "max_image_size": 1540, "spatial_merge_size": MERGE},
        },
    )


def _byte_alphabet():
    """byte → the printable character that byte-level BPE writes for it (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def _merges(pieces):
    """Every way to join two known pieces into a third, in the order of the third's rank."""
    rank = {piece: n for n, piece in enumerate(pieces)}
    merges = []
    for piece in pieces:
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        splits = [(a, b) for a, b in splits if a in rank and b in rank]
        merges += sorted(splits, key=lambda split: (rank[split[0]], rank[split[1]]))
    return merges


def write_tokenizer(folder, vocab):
    """tokenizer.json and tokenizer_config.json: the same ids for the same text, in the fast-tokenizer form."""
    alphabet = _byte_alphabet()
    pieces = [base64.b64decode(entry["token_bytes"]) for entry in _tekken()["vocab"][: vocab - N_SPECIAL]]

    def spell(piece):
        return "".join(alphabet[byte] for byte in piece)

    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    specials = {special_name(i): i for i in range(N_SPECIAL)}
    write_json(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {
                    "id": i,
                    "content": name,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": True,
                }
                for name, i in specials.items()
            ],
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {
                        "type": "Split",
                        "pattern": {"Regex": _tekken()["config"]["pattern"]},
                        "behavior": "Isolated",
                        "invert": False,
                    },
                    byte_level,
                ],
            },
            "post_processor": byte_level | {"trim_offsets": False, "use_regex": True},
            "decoder": byte_level | {"add_prefix_space": True, "use_regex": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": True,  # a whole word that is a token is that token, as tiktoken has it
                "vocab": specials | {spell(piece): N_SPECIAL + n for n, piece in enumerate(pieces)},
                "merges": [[spell(a), spell(b)] for a, b in _merges(pieces)],
            },
        },
    )
    write_json(
        folder / "tokenizer_config.json",
        {
            "backend": "tokenizers",
            "bos_token": "<s>",
            "clean_up_tokenization_spaces": False,
            "eos_token": "</s>",
            "model_max_length": 1000000000000000019884624838656,
            "pad_token": "<pad>",
            "processor_class": "PixtralProcessor",
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "<unk>",
        },
    )
