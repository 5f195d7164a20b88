"""Published tokenizer folders load with AutoTokenizer, with the published ids and without remote code."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2Tokenizer
from visual_batch import GOLDEN

from finetune.families import by_name
from finetune.models import CheckpointError, load_tokenizer
from finetune.tokenizers.sentencepiece_tokenizer import from_sentencepiece
from finetune.tokenizers.tokenization import (
    MiniCPMOTokenizerFast,
    MiniCPMVTokenizer,
    MiniCPMVTokenizerFast,
    check_tokens,
)

TOKENIZERS = GOLDEN / "encode" / "tokenizers"
INDEX = json.loads((TOKENIZERS / "index.json").read_text())["tokenizers"]
TRUST = [{}, {"trust_remote_code": True}, {"trust_remote_code": False}]


def assert_recorded(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    assert len(tokenizer) == INDEX[name]["length"]
    for sample in INDEX[name]["samples"]:
        assert tokenizer.encode(sample["text"]) == sample["ids"], sample["text"]
    for token, index in INDEX[name]["ids"].items():
        assert tokenizer.convert_tokens_to_ids(token) == index


@pytest.fixture
def published(tmp_path: Path) -> Callable[..., Path]:
    """A folder as published: class name and auto_map in tokenizer_config.json, the named python files absent."""

    def make(name: str, class_name: str, *, without: str = "", config: dict | None = None) -> Path:
        folder = tmp_path / f"{name}_{class_name}"
        shutil.copytree(TOKENIZERS / name, folder)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings["tokenizer_class"] = class_name
        module = "tokenization_minicpmv" + ("_fast" if class_name.endswith("Fast") else "")
        pair = [None, f"{module}.{class_name}"] if class_name.endswith("Fast") else [f"{module}.{class_name}", None]
        settings["auto_map"] = {"AutoTokenizer": pair}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        if without:
            (folder / without).unlink()
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


BASE = json.loads((GOLDEN / "forward" / "llama3_v2_5" / "config.json").read_text())
ADAPTER_LIKE = None


@pytest.mark.parametrize("options", TRUST)
@pytest.mark.parametrize(
    "config", [BASE, BASE | {"auto_map": {"AutoConfig": "configuration_minicpm.MiniCPMVConfig"}}, ADAPTER_LIKE]
)
def test_auto_tokenizer_fast(published: Callable[..., Path], options: dict, config: dict | None) -> None:
    """With config.json beside it (a base folder) and without (an adapter folder)."""
    tokenizer = AutoTokenizer.from_pretrained(published("llama3", "MiniCPMVTokenizerFast", config=config), **options)
    assert type(tokenizer) is MiniCPMVTokenizerFast
    assert_recorded(tokenizer, "llama3")


def split(folder: Path) -> Path:
    """The folder with vocab.json and merges.txt in place of tokenizer.json, as V-4.5 has them."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    lines = [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]))
    return folder


@pytest.mark.parametrize("options", TRUST)
@pytest.mark.parametrize("model_type", ["minicpmv", "minicpmo", None])
@pytest.mark.parametrize("kind", [MiniCPMVTokenizerFast, MiniCPMOTokenizerFast])
@pytest.mark.parametrize("files", ["one", "several"])
def test_auto_tokenizer_qwen(
    published: Callable[..., Path], options: dict, model_type: str | None, kind: type, files: str
) -> None:
    """Base folders of both model types and an adapter folder, with tokenizer.json and with its parts."""
    config = None if model_type is None else BASE | {"model_type": model_type, "auto_map": {"AutoConfig": "a.B"}}
    folder = published("qwen", kind.__name__, config=config)
    if files == "several":
        split(folder)
    loaded = AutoTokenizer.from_pretrained(folder, **options)
    assert type(loaded) is type(load_tokenizer(folder)) is kind
    assert_recorded(loaded, "qwen")


def test_split_files_equal_the_class_of_transformers(published: Callable[..., Path]) -> None:
    folder = split(published("qwen", "MiniCPMVTokenizerFast"))
    ours, theirs = load_tokenizer(folder), Qwen2Tokenizer.from_pretrained(folder)
    chance = random.Random(0)
    pieces = [
        *map(chr, range(32, 127)),
        *"\n\r\t\u00a0\u3000\u0301é你好☃😀ﬁ٣",
        "'ll",
        "<image>",
        "<unk>",
        "<think>",
        "\n\n",
        "  ",
    ]
    texts = ["".join(chance.choices(pieces, k=chance.randint(1, 50))) for _ in range(500)]
    texts += ["I'm you'LL 12345 3.14", "é é Å", "\u3000全角ＡＢＣ", "def f():\n    return 1\n\n\n", "\x00\x7f", ""]
    for text in texts:
        ids = ours.encode(text)
        assert ids == theirs.encode(text), text
        assert ours.decode(ids) == theirs.decode(ids)
    assert ours.all_special_tokens == theirs.all_special_tokens
    assert (ours.eos_token, ours.pad_token) == (theirs.eos_token, theirs.pad_token)


def test_merges_that_are_missing(published: Callable[..., Path]) -> None:
    """Counted and refused, with tokenizer.json beside them never asked."""
    whole = published("qwen", "MiniCPMVTokenizerFast")
    tokenizer_json = (whole / "tokenizer.json").read_bytes()
    folder = split(whole)
    lines = (folder / "merges.txt").read_text().splitlines()
    (folder / "merges.txt").write_text("\n".join(lines[:-7]))
    with pytest.raises(CheckpointError, match=r"tokenizer.json is missing; this merges.txt lacks 7 merges"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer_json)
    assert_recorded(load_tokenizer(folder), "qwen")


def test_added_tokens_from_their_own_file(published: Callable[..., Path]) -> None:
    """Older folders have added_tokens.json and no list in tokenizer_config.json."""
    folder = split(published("qwen", "MiniCPMVTokenizerFast"))
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    listed = settings.pop("added_tokens_decoder")
    file.write_text(json.dumps(settings))
    (folder / "added_tokens.json").write_text(json.dumps({each["content"]: int(at) for at, each in listed.items()}))
    assert_recorded(load_tokenizer(folder), "qwen")


def test_added_tokens_that_do_not_belong(published: Callable[..., Path]) -> None:
    folder = split(published("qwen", "MiniCPMVTokenizerFast"))
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings["added_tokens_decoder"].pop("703")
    file.write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="'<think>' has id 704 in tokenizer_config.json .* give it 703; these"):
        load_tokenizer(folder)


@pytest.mark.parametrize("options", TRUST)
@pytest.mark.parametrize("config", [BASE, ADAPTER_LIKE])
@pytest.mark.parametrize("without", ["", "tokenizer.json"])
def test_auto_tokenizer_v2_0(published: Callable[..., Path], options: dict, config: dict | None, without: str) -> None:
    """V-2.0 ships tokenizer.model only; its legacy ids come out with and without a tokenizer.json."""
    folder = published("minicpm", "MiniCPMVTokenizer", without=without, config=config)
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    assert isinstance(tokenizer, MiniCPMVTokenizerFast)
    assert_recorded(tokenizer, "minicpm")


@pytest.mark.parametrize("name", ["llama3", "minicpm", "qwen"])
def test_load_tokenizer_whatever_class_is_named(name: str) -> None:
    """The recorded minicpm folder names LlamaTokenizer, whose class in transformers 5 gives other ids."""
    assert_recorded(load_tokenizer(TOKENIZERS / name), name)


def test_sentencepiece_only_equals_tokenizer_json_on_long_text(published: Callable[..., Path]) -> None:
    folder = published("minicpm", "MiniCPMVTokenizer", without="tokenizer.json")
    ours, theirs = load_tokenizer(folder), load_tokenizer(TOKENIZERS / "minicpm")
    assert type(ours) is MiniCPMVTokenizer
    texts = json.loads((GOLDEN / "encode" / "prompts_v2_0.json").read_text())["cases"]
    prompts = [case["result"]["prompt"] for case in texts if case["result"]]
    prompts += [" ".join(prompts), "  a  <image>  b</s> c\t<box>1</box>\r\n" * 3, "\u3000全角　ＡＢＣ ﬁ é", "\x00\x7f"]
    assert len(prompts) > 8
    for prompt in prompts:
        ids = ours.encode(prompt)
        assert ids == theirs.encode(prompt)
        assert ours.decode(ids) == theirs.decode(ids)
    assert ours.all_special_tokens == theirs.all_special_tokens
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (1, 2, 0)


def test_without_bos_when_the_folder_says_so(published: Callable[..., Path]) -> None:
    folder = published("minicpm", "MiniCPMVTokenizer", without="tokenizer.json")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": False}))
    assert load_tokenizer(folder).encode("hello world") == [684, 656, 467, 346]


def test_a_sentencepiece_model_with_other_rules_is_refused(tmp_path: Path) -> None:
    import sentencepiece

    (tmp_path / "text.txt").write_text("some words to learn from, repeated words and some more\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(tmp_path / "other"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=False,
        minloglevel=2,
    )
    with pytest.raises(CheckpointError, match="uses other rules"):
        from_sentencepiece(tmp_path / "other.model", ())


def test_folder_without_tokenizer_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer: it needs one of tokenizer\.json, vocab\.json with"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no tokenizer.*vocab\.json with merges\.txt"):
        load_tokenizer(tmp_path)


def test_check_tokens() -> None:
    tokenizer = load_tokenizer(TOKENIZERS / "llama3")
    check_tokens(tokenizer, by_name("llama3_v2_5"), 722, "folder", {})
    with pytest.raises(CheckpointError, match="id 721 in the tokenizer of folder, but the model has 721 embeddings"):
        check_tokens(tokenizer, by_name("llama3_v2_5"), 721, "folder", {})
    with pytest.raises(CheckpointError, match="does not know <s>, </s>, which MiniCPM-V 2.0 needs"):
        check_tokens(tokenizer, by_name("v2_0"), 722, "folder", {})
