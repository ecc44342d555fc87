"""The tokenizer that ends up in language.gguf, against mistral-common's own reader of the same tekken.json."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from edge_agent.bundle.gguf_package import gguf
from edge_agent.bundle.manifest import LANGUAGE, EmbeddingInfo
from edge_agent.model.llama import LlamaContext, LlamaOptions
from quantize.source.hf_config import CheckpointError
from quantize.source.tokenizer import read_tokenizer
from tests.harness import toy, toy_tokenizer
from tests.harness.case import Case
from tests.harness.gguf_reading import Reader

if TYPE_CHECKING:
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

CORPUS = {
    "english": "The quick brown fox jumps over 13 lazy dogs, doesn't it? I'LL SEE. HelloWorld fooBarBAZ, don't WE'VE",
    "french": "Élise dit : « attends, puis avance » — l'été, là où ça coûte 12,50 €, naïve œuvre de cœur.",
    "german": "Überraschung! Der Fußgänger überquert die Straße größtenteils langsam; 3,14 m weiter: äöüß.",
    "spanish": "¿Dónde está el niño? ¡Mañana por la mañana, señor! El pingüino avanzó 3 pasos.",
    "korean": "천천히 앞으로 가세요. 한국어 문장입니다! 왼쪽 문으로 2미터 이동하십시오.",
    # Not here: scripts written with combining marks (Devanagari, Thai). llama.cpp's own splitting rule for Tekken has
    # no class for marks and cuts such words elsewhere: the same letters, in other tokens.
    "other scripts": "中文字符，测试。日本語のテキストかな Привет, мир! שלום العربية",
    "emoji": "👍🏽 👩‍👩‍👧 🚁🛸 done ✅ 🇫🇷 e\u0301 \u200f",
    "digits": "0123456789 1 22 333 4444 1e-5 0x1F 12.5 1,000,000 ²½ ٣",
    "spaces": "   \n\n\t  x   \r\n  y\n    z \u00a0 \u3000 end  ",
    "code": "def f(x):\n    return {'a': [1, 2]}  # note\n\tfor i in range(10): print(f\"{i:>3}\")\nx += y && z || w;",
    "case": "HTTPServer iPhone McDonald's ÀÉÎ àéî XMLHttpRequest ABCdef ǅ ﬁ ℌ",
    "one letter": "a",
    "one space": " ",
    "nothing": "",
    "control characters": "\x00\x01\x1b[0m\x7f",
}
IDS = {  # the Tekken v13 layout
    "unk": 0, "bos": 1, "eos": 2, "inst": 3, "inst_end": 4, "img": 10, "pad": 11, "img_break": 12, "img_end": 13,
    "system": 17, "system_end": 18, "think": 34, "think_end": 35,
}  # fmt: skip


def token_bytes(folder: Path) -> list[bytes]:
    """tekken.json by hand: rank -> bytes."""
    return [
        base64.b64decode(entry["token_bytes"]) for entry in json.loads((folder / "tekken.json").read_text())["vocab"]
    ]


@pytest.fixture(scope="module")
def full(toy_full_vocabulary: Path, convert: Callable[..., Path]) -> Iterator[LlamaContext]:
    """language.gguf with the whole vocabulary, in llama.cpp."""
    path = convert(toy_full_vocabulary) / LANGUAGE
    table = EmbeddingInfo(offset=0, ggml_type="BF16", row_bytes=512)  # no row is looked up here
    with LlamaContext(path, LlamaOptions(context=256, gpu_layers=0), table) as llm:
        yield llm


def tekkenizer_of(folder: Path) -> Tekkenizer:
    """mistral-common's reader of tekken.json. Its import takes a second."""
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    return Tekkenizer.from_file(folder / "tekken.json")


@pytest.fixture(scope="module")
def tekkenizer(toy_full_vocabulary: Path) -> Tekkenizer:
    return tekkenizer_of(toy_full_vocabulary)


@pytest.mark.parametrize("text", CORPUS.values(), ids=CORPUS)
def test_llama_cpp_tokenises_as_mistral_common_does(full: LlamaContext, tekkenizer: Tekkenizer, text: str):
    assert full.tokens(text) == tekkenizer.encode(text, bos=False, eos=False)


@pytest.mark.parametrize("form", ["tekken", "tokenizer"])
def test_the_same_with_a_vocabulary_cut_by_rank(form: str, convert: Callable[..., Path], tmp_path: Path):
    folder = toy.write_checkpoint(tmp_path / form, tokenizer=form, vocab=2048)
    toy_tokenizer.write_tekken(tmp_path, 2048)
    tekkenizer = tekkenizer_of(tmp_path)
    with Case({}, folder, convert(folder)).language() as llm:
        for text in CORPUS.values():
            assert llm.tokens(text) == tekkenizer.encode(text, bos=False, eos=False)


@pytest.mark.parametrize("name", ["<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "<SPECIAL_999>", "<unk>"])
def test_special_names_in_plain_text_stay_letters(full: LlamaContext, tekkenizer: Tekkenizer, name: str):
    for text in (name, f"say {name} twice {name}", f"{name}{name}"):
        ids = full.tokens(text)
        assert min(ids) >= 1000
        assert ids == tekkenizer.encode(text, bos=False, eos=False)
        assert b"".join(full.token_bytes(i) for i in ids).decode() == text


def test_every_token_gives_back_its_bytes(full: LlamaContext, toy_full_vocabulary: Path):
    assert [full.token_bytes(1000 + rank) for rank in range(131072 - 1000)] == token_bytes(toy_full_vocabulary)
    assert {full.token_bytes(i) for i in range(1000)} == {b""}


def test_only_the_end_of_sequence_ends_an_answer(full: LlamaContext):
    assert [i for i in range(0, 131072) if full.is_end_of_generation(i)] == [2]


@pytest.mark.parametrize("vocab", [1256, 4096])
def test_both_tokenizer_files_give_the_same_tokenizer(tmp_path: Path, vocab: int):
    toy_tokenizer.write_tekken(tmp_path, vocab)
    by_tekken = read_tokenizer(tmp_path, vocab)
    (tmp_path / "tekken.json").unlink()
    toy_tokenizer.write_tokenizer(tmp_path, vocab)
    by_hf = read_tokenizer(tmp_path, vocab)
    assert (by_tekken.file.name, by_hf.file.name) == ("tekken.json", "tokenizer.json")
    assert by_tekken.tokens == by_hf.tokens
    assert by_tekken.types == by_hf.types
    assert by_tekken.merges == by_hf.merges
    assert by_tekken.special == by_hf.special == IDS


def test_a_vocabulary_without_reasoning_has_no_think_tokens(tmp_path: Path):
    """Tekken before v11; or one that calls them normal in tokenizer.json."""
    toy_tokenizer.write_tokenizer(tmp_path, 1256)
    path = tmp_path / "tokenizer.json"
    table = json.loads(path.read_text())
    for added in table["added_tokens"]:
        added["special"] &= added["id"] not in (34, 35)
    path.write_text(json.dumps(table))
    assert read_tokenizer(tmp_path, 1256).special == IDS
    for added in table["added_tokens"]:
        if added["id"] in (34, 35):
            added |= {"content": f"<SPECIAL_{added['id']}>", "special": True}
    path.write_text(json.dumps(table))
    assert read_tokenizer(tmp_path, 1256).special.keys() == IDS.keys() - {"think", "think_end"}


# -- older and doubled files -------------------------------------------------------------------------------------------


def edit(path: Path, change: Callable[[dict], object]) -> None:
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))


def older(version: str) -> Callable[[dict], None]:
    """tekken.json as it was before it listed its special tokens."""

    def change(table: dict) -> None:
        del table["special_tokens"]
        table["config"]["version"] = version

    return change


@pytest.mark.parametrize("version", ["v1", "v3", "v7"])
def test_names_that_an_older_file_does_not_list_are_those_of_mistral_common(tmp_path: Path, version: str):
    toy_tokenizer.write_tekken(tmp_path, 2048)
    edit(tmp_path / "tekken.json", older(version))
    found, theirs = read_tokenizer(tmp_path, 2048), tekkenizer_of(tmp_path)
    assert found.tokens[:1000] == [theirs.id_to_piece(i) for i in range(1000)]
    assert found.special == {name: i for name, i in IDS.items() if not name.startswith("think")}


@pytest.mark.parametrize("version", ["v11", "v13", "x"])
def test_a_newer_file_without_names_is_refused_and_the_other_file_taken(tmp_path: Path, version: str):
    toy_tokenizer.write_tekken(tmp_path, 2048)
    edit(tmp_path / "tekken.json", older(version))
    with pytest.raises(CheckpointError, match=r"tekken\.json: (no special token|damaged: ValueError version)"):
        read_tokenizer(tmp_path, 2048)
    toy_tokenizer.write_tokenizer(tmp_path, 2048)
    found = read_tokenizer(tmp_path, 2048)
    assert found.file.name == "tokenizer.json" and found.beside.startswith("not used: ") and "tekken" in found.beside


def added_in_training(table: dict) -> None:
    """Five tokens in place of the last words, as in fine-tuning; tekken.json stays that of the release."""
    words = {token: i for token, i in table["model"]["vocab"].items() if i < 2043}
    table["model"] |= {"vocab": words, "merges": [p for p in table["model"]["merges"] if "".join(p) in words]}
    like = table["added_tokens"][0]
    table["added_tokens"] += [like | {"id": 2043 + n, "content": f"<wp{n}>"} for n in range(5)]


def another_word(table: dict) -> None:
    words = table["model"]["vocab"]
    word = next(token for token, i in words.items() if i == 1500)
    words["another"] = words.pop(word)


def swapped_special(table: dict) -> None:
    for added in table["added_tokens"]:
        added["content"] = {"[IMG]": "[IMG_END]", "[IMG_END]": "[IMG]"}.get(added["content"], added["content"])
    words = table["model"]["vocab"]
    words["[IMG]"], words["[IMG_END]"] = words["[IMG_END]"], words["[IMG]"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (added_in_training, r"token 2043: tekken\.json has '.*', tokenizer\.json has '<wp0>'; remove the file that"),
        (another_word, r"token 1500: tekken\.json has '.*', tokenizer\.json has 'another'"),
        (swapped_special, r"token 10: tekken\.json has '\[IMG\]', tokenizer\.json has '\[IMG_END\]'"),
    ],
)
def test_two_tokenizers_that_differ_are_refused_with_the_first_difference(tmp_path: Path, change, words: str):
    toy_tokenizer.write_tekken(tmp_path, 2048)
    toy_tokenizer.write_tokenizer(tmp_path, 2048)
    assert read_tokenizer(tmp_path, 2048).beside == "tokenizer.json has the same tokens"
    edit(tmp_path / "tokenizer.json", change)
    with pytest.raises(CheckpointError, match=words):
        read_tokenizer(tmp_path, 2048)
    (tmp_path / "tekken.json").unlink()
    assert read_tokenizer(tmp_path, 2048).file.name == "tokenizer.json"


def test_two_tokenizers_of_which_one_has_another_size(tmp_path: Path):
    toy_tokenizer.write_tekken(tmp_path, 2048)
    toy_tokenizer.write_tokenizer(tmp_path, 2100)
    found = read_tokenizer(tmp_path, 2048)
    assert found.file.name == "tekken.json" and "2100 tokens, but the embedding has 2048 rows" in found.beside


def test_names_of_special_tokens_that_nothing_uses_may_differ(tmp_path: Path):
    toy_tokenizer.write_tekken(tmp_path, 2048)
    toy_tokenizer.write_tokenizer(tmp_path, 2048)
    edit(tmp_path / "tekken.json", lambda table: table["special_tokens"][900].update(token_str="<SPECIAL_X>"))
    assert read_tokenizer(tmp_path, 2048).beside == "tokenizer.json has the same tokens"


def test_merges_spelled_in_one_string_are_read_too(tmp_path: Path):
    """Older tokenizer.json files write "a b" where newer ones write ["a", "b"]."""
    toy_tokenizer.write_tokenizer(tmp_path, 2048)
    newer = read_tokenizer(tmp_path, 2048)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert read_tokenizer(tmp_path, 2048).merges == newer.merges


def test_a_release_lists_more_ranks_than_its_model_has_rows(tmp_path: Path):
    toy_tokenizer.write_tekken(tmp_path, 2048)
    cut = read_tokenizer(tmp_path, 2048)
    toy_tokenizer.write_tekken(tmp_path, 2348)
    assert read_tokenizer(tmp_path, 2048).tokens == cut.tokens
    assert read_tokenizer(tmp_path, 2048).merges == cut.merges


def test_the_gguf_holds_tokens_types_and_merges(toy_bf16: Path, convert: Callable[..., Path]):
    fields = Reader(convert(toy_bf16) / LANGUAGE).fields
    tokens, types, merges = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type", "merges"))
    assert tokens[:1000] == [toy_tokenizer.special_name(i) for i in range(1000)]
    assert types == [gguf.TokenType.CONTROL] * 1000 + [gguf.TokenType.NORMAL] * 3096
    letters = toy_tokenizer._byte_alphabet()
    assert tokens[1000:] == ["".join(letters[byte] for byte in piece) for piece in token_bytes(toy_bf16)]
    # A merge joins two tokens into a third, and rules stand in the order of what they make.
    rank = {token: i for i, token in enumerate(tokens)}
    made = [rank["".join(merge.split(" "))] for merge in merges]
    assert made == sorted(made) and set(made) == set(range(1256, 4096))
    assert len(set(merges)) == len(merges)
