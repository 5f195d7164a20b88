import copy
import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
from golden_tokenizers import FOLDER, tokenizer, vocabulary
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from finetune.templates.tokenizer_view import GROUNDING, DataError, MissingTokenError, TokenizerView

NAMES = ("llama3", "minicpm", "qwen")
CONTROL = {
    "llama3": ("<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<|reserved_special_token_1|>"),
    "minicpm": ("<s>", "</s>"),
    "qwen": ("<|im_start|>", "<|im_end|>", "<image_id>", "</image_id>", "<unit>", "<|reserved_0|>"),
}
EVERYWHERE = ("<unk>", "<image>", "</image>", "<slice>", "</slice>")


def special_ids(name: str) -> set[int]:
    """Every special token of the tokenizer that is not a grounding mark, read from the tokenizer itself."""
    added = tokenizer(name).added_tokens_decoder
    return {number for number, token in added.items() if token.special and token.content not in GROUNDING}


def pieces(name: str) -> st.SearchStrategy[str]:
    words = [*EVERYWHERE, *CONTROL[name], *GROUNDING, "<think>", "<", ">", "|", "s", "unk", "image", "\n", " ", "用户"]
    return st.lists(st.sampled_from(words) | st.text(max_size=5), max_size=12).map("".join)


@pytest.mark.parametrize("name", NAMES)
def test_text_never_gives_a_control_id(name: str) -> None:
    forbidden = special_ids(name)
    assert len(forbidden) >= 7
    words = vocabulary(name)

    @settings(deadline=None, max_examples=250)
    @given(pieces(name))
    @example("".join((*EVERYWHERE, *CONTROL[name])))
    def check(text: str) -> None:
        for encode in (words.text, words.continuation, words.fixed):
            assert forbidden.isdisjoint(encode(text))

    check()


@pytest.mark.parametrize("name", NAMES)
def test_control_tokens_in_text_are_spelled_out(name: str) -> None:
    for token in (*EVERYWHERE, *CONTROL[name]):
        official = tokenizer(name)(f"a{token}b", add_special_tokens=False)["input_ids"]
        assert not special_ids(name).isdisjoint(official)
        ids = vocabulary(name).text(f"a{token}b")
        assert tokenizer(name).decode(ids) == f"a{token}b"


@pytest.mark.parametrize("name", NAMES)
def test_marks_become_their_ids(name: str) -> None:
    for mark in GROUNDING:
        expected = tokenizer(name).convert_tokens_to_ids(mark)
        assert [number for number in vocabulary(name).text(f"see {mark}(1,2)") if number == expected] == [expected]
    text = "go <box>(426,937),(481,960)</box> <ref>it</ref> end"
    official = tokenizer(name)(text, add_special_tokens=False)["input_ids"]
    assert vocabulary(name).text(text) == official


def test_think_tags_where_the_tokenizer_has_them() -> None:
    assert tokenizer("qwen").convert_tokens_to_ids("<think>") in vocabulary("qwen").text("<think>\nyes\n</think>")
    assert tokenizer("llama3").decode(vocabulary("llama3").text("<think>yes")) == "<think>yes"


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=150)
@given(text=st.text(max_size=40))
def test_other_text_keeps_the_original_ids(name: str, text: str) -> None:
    official = tokenizer(name)(text, add_special_tokens=False)["input_ids"]
    if special_ids(name).isdisjoint(official):
        assert vocabulary(name).text(text) == official


def test_recorded_encodings() -> None:
    for name in NAMES:
        index = json.loads((FOLDER / "index.json").read_text())
        samples = (index.get("tokenizers") or index)[name]["samples"]
        compared = 0
        for sample in samples:
            if any(token in sample["text"] for token in EVERYWHERE):
                continue
            bos = {"llama3": [700], "minicpm": [1], "qwen": []}[name]
            assert [*bos, *vocabulary(name).text(sample["text"])] == sample["ids"]
            compared += 1
        assert compared >= 10


def test_the_tokenizer_of_the_user_stays_as_it_is() -> None:
    ours = PreTrainedTokenizerFast.from_pretrained(FOLDER / "minicpm")
    before = ours.backend_tokenizer.to_str()
    ids = ours("<image><unk></image>")["input_ids"]
    TokenizerView(ours, ("<image>",)).text("<image> x")
    assert ours.backend_tokenizer.to_str() == before
    assert ours("<image><unk></image>")["input_ids"] == ids


@pytest.mark.parametrize("whole_words", [False, True])
def test_a_control_token_that_merges_can_spell(whole_words: bool) -> None:
    # As in a base vocabulary that holds <unk> as an ordinary token: by merges, or looked up as a whole word.
    pieces = ["<", "u", "n", "k", ">", "s", "<u", "nk", "nk>", "<unk>", "<unk>s"]
    merges = [("<", "u"), ("n", "k"), ("nk", ">"), ("<u", "nk>"), ("<unk>", "s")]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(vocab, merges, ignore_merges=whole_words)))
    assert plain.backend_tokenizer.encode("<unk>").tokens == ["<unk>"]
    ids = TokenizerView(plain, ("<unk>",), ("<unk>",)).text("<unk>")
    assert [pieces[number] for number in ids] == ["<u", "nk>"]


def unknowing() -> PreTrainedTokenizerFast:
    """The minicpm tokenizer without byte fallback: what it does not know becomes <unk>, the image placeholder."""
    spec = json.loads(tokenizer("minicpm").backend_tokenizer.to_str())
    spec["model"]["byte_fallback"] = False
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)))


def test_unknown_character_is_refused_not_a_placeholder() -> None:
    assert unknowing().backend_tokenizer.encode("a☃", add_special_tokens=False).ids[-1] == 0
    words = TokenizerView(unknowing(), ("<unk>",))
    with pytest.raises(DataError, match=r"'☃' \(character 5 of 'snow ☃'.*the control token <unk>; remove"):
        words.text("snow ☃")
    with pytest.raises(DataError, match="☃"):
        words.continuation("☃")
    assert 0 not in vocabulary("minicpm").text("snow ☃")


def test_text_with_our_hidden_names_is_refused() -> None:
    with pytest.raises(DataError, match="would become the control token <image>"):
        vocabulary("llama3").text("\U0010ffff710\U0010ffff")


def test_missing_tokens() -> None:
    with pytest.raises(MissingTokenError, match=r"has no <\|eot_id\|>; it belongs to another model"):
        TokenizerView(tokenizer("minicpm"), ("<unk>", "<|eot_id|>"), ("<|eot_id|>",))
    with pytest.raises(MissingTokenError, match="no control token '<quad>'"):
        vocabulary("minicpm").control("<quad>")
    assert vocabulary("minicpm").control("<image>") == 101


def test_continuation_has_no_word_start() -> None:
    words = vocabulary("minicpm")
    assert words.text("Two dogs.") == [292, 423, 357, 502, 718]
    assert words.continuation("Two dogs.") == [726, 423, 357, 502, 718]
    assert words.continuation("") == words.text("") == []
    box = tokenizer("minicpm").convert_tokens_to_ids("<box>")
    # Behind a mark the official encoding has the word-start piece again.
    assert words.continuation("No<box>a") == [*words.continuation("No"), box, *words.text("a")]
    assert words.continuation("<box>a") == [box, *words.text("a")]
    assert vocabulary("llama3").continuation("Two dogs.") == vocabulary("llama3").text("Two dogs.")


@pytest.mark.parametrize("text", ["", "a", " and", "</box> and", "\n a", "  two", "图片 a"])
def test_the_llama_class_of_transformers_gives_the_same_ids(text: str) -> None:
    words = TokenizerView(AutoTokenizer.from_pretrained(FOLDER / "minicpm"), ("<unk>",))
    assert words.text(text) == vocabulary("minicpm").text(text)
    assert words.continuation(text) == vocabulary("minicpm").continuation(text)


def test_threads_and_pickles() -> None:
    words = vocabulary("minicpm")
    texts = [f"line {number} <image> <box>" for number in range(200)]
    expected = [words.text(text) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(words.text, texts)) == expected
    for copied in (pickle.loads(pickle.dumps(words)), copy.deepcopy(words)):
        assert [copied.text(text) for text in texts] == expected
        assert copied.continuation("Two") == words.continuation("Two")


@pytest.mark.parametrize("name", NAMES)
def test_with_and_without_threads_of_the_tokenizer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where tokenizers may start no threads, ids come by its shorter way."""
    words = vocabulary(name)

    def found(switch: str | None) -> list[list[int]]:
        monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
        if switch is not None:
            monkeypatch.setenv("TOKENIZERS_PARALLELISM", switch)
        texts = ["", "Two dogs, 12 cats.\n\n", "用户 <image> <ref>x</ref>", " a\tb  c" * 50]
        return [encode(text) for text in texts for encode in (words.text, words.continuation)]

    assert found(None) == found("true") == found("false") == found("0")
