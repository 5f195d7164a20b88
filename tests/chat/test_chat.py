"""``model.chat`` and the guide's class on tiny checkpoints of every family."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from zoo import gradient

import finetune.models
from chat import MiniCPMVChat, img2base64
from finetune.families import by_name
from finetune.models import load_model, load_tokenizer
from finetune.sample import DataError
from finetune.tiny.checkpoint_writer import FAMILIES
from finetune.utils.errors import ArgumentError

GREEDY: dict[str, Any] = {"sampling": False, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def ready(tiny) -> Callable[[str], tuple[Any, Any]]:
    """Network and tokenizer by family, loaded once."""
    loaded: dict[str, tuple[Any, Any]] = {}

    def make(family: str) -> tuple[Any, Any]:
        if family not in loaded:
            loaded[family] = load_model(tiny(family)).eval(), load_tokenizer(tiny(family))
        return loaded[family]

    return make


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content[0] if len(content) == 1 else list(content)}


def said(answer: str) -> dict[str, Any]:
    return {"role": "assistant", "content": answer}


def answer_of(result: Any) -> Any:
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_its_single_runs(ready, family):
    model, tokenizer = ready(family)
    picture, wide = gradient(), gradient(900, 300)
    conversations = [
        [user("Hello")],
        [user("What is this?")],
        [user(picture, "What is this?")],
        [user("Compare", picture, "with", wide)],
        [user("One"), said("two"), user("three and four and five and six?")],
        [user(picture, "One"), said("two"), user("three?")],
        [user("a")],
        [user(wide)],
    ]
    options = {**GREEDY, "max_slice_nums": 2, "tokenizer": tokenizer}
    together = answer_of(model.chat(msgs=conversations, **options))
    alone = [answer_of(model.chat(msgs=turns, **options)) for turns in conversations]
    assert together == alone
    assert len(set(alone)) > 3, alone
    before = answer_of(model.chat(image=[None, picture], msgs=[[user("Hello")], [user("What is this?")]], **options))
    assert before == [alone[0], alone[2]]


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_text_is_the_answer(ready, family):
    model, tokenizer = ready(family)
    for sampling in (False, True):
        options = {"sampling": sampling, "max_new_tokens": 24, "tokenizer": tokenizer, "max_slice_nums": 1}
        torch.manual_seed(0)
        whole = answer_of(model.chat(image=gradient(), msgs=[user("What?")], **options))
        torch.manual_seed(0)
        pieces = list(model.chat(image=gradient(), msgs=[user("What?")], stream=True, **options))
        assert "".join(pieces) == whole
        assert len(pieces) > 1 or len(whole) < 3
        assert not model.training


@pytest.mark.parametrize("family", FAMILIES)
def test_the_guide(tiny, tmp_path, family):
    """Several rounds as the guide prints them; the second is the same conversation in one."""
    gradient().save(tmp_path / "airplane.png")
    chat_model = MiniCPMVChat(tiny(family), device="cpu")
    model: Any = chat_model.model
    im_64 = img2base64(tmp_path / "airplane.png")
    msgs = [{"role": "user", "content": "Tell me the model of this aircraft."}]
    answer = chat_model.chat({"image": im_64, "question": json.dumps(msgs)}, **GREEDY)
    blind = chat_model.chat({"question": json.dumps(msgs)}, **GREEDY)
    msgs += [said(answer), user("Introduce something about Airbus A380.")]
    second = chat_model.chat({"image": im_64, "question": json.dumps(msgs)}, **GREEDY)
    picture = Image.open(tmp_path / "airplane.png")
    assert second == answer_of(model.chat(image=picture, msgs=msgs, **GREEDY))
    # A few tokens of random weights may be the same once.
    assert (answer, second) != (blind, chat_model.chat({"question": json.dumps(msgs)}, **GREEDY))
    assert chat_model.chat({"image": "", "question": json.dumps(msgs)}, **GREEDY)
    assert len(chat_model.chat({"image": im_64, "question": json.dumps(msgs)}, max_new_tokens=4)) < len(im_64)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("not base64!", "not base64"),
        ("aGVsbG8gd29ybGQ=", "is not an image in a supported format"),
        ("half", "cannot be decoded"),
    ],
)
def test_an_undecodable_image_is_an_error(tiny, tmp_path, image, message):
    if image == "half":
        Image.effect_noise((64, 64), 90).save(tmp_path / "whole.png")
        whole = (tmp_path / "whole.png").read_bytes()
        (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
        image = img2base64(tmp_path / "half.png")
    chat_model = MiniCPMVChat(tiny("llama3_v2_5"), device="cpu")
    with pytest.raises(DataError, match=message):
        chat_model.chat({"image": image, "question": json.dumps([user("What?")])})


def test_a_missing_image_file_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no such image file"):
        img2base64(tmp_path / "none.png")


def test_v2_0_returns_context_and_history(ready):
    model, tokenizer = ready("v2_0")
    first = [user("Hello")]
    res, context, history = model.chat(
        image=gradient(),
        msgs=first,
        context=None,
        tokenizer=tokenizer,
        sampling=True,
        temperature=0.7,
        max_new_tokens=4,
    )
    assert context == history
    assert context[-1] == said(res)
    assert first == [user("Hello")]
    options = {**GREEDY, "tokenizer": tokenizer}
    goes_on, *_ = model.chat(image=None, msgs=[user("More")], context=context, **options)
    at_once, *_ = model.chat(image=gradient(), msgs=[user("Hello"), said(res), user("More")], **options)
    again, *_ = model.chat(image=None, msgs=[*context, user("More")], context=context, **options)
    assert goes_on == at_once == again


def test_pictures_in_every_form(ready, tmp_path):
    model, tokenizer = ready("llama3_v2_5")
    gradient().save(tmp_path / "a.png")
    coded = img2base64(tmp_path / "a.png")
    options = {**GREEDY, "tokenizer": tokenizer}
    expected = model.chat(image=gradient(), msgs=[user("What?")], **options)
    for turn in (
        user(gradient(), "What?"),
        user(tmp_path / "a.png", "What?"),
        user({"type": "image", "image": coded}, {"type": "text", "text": "What?"}),
        user({"type": "image", "pairs": coded}, {"type": "text", "pairs": "What?"}),
    ):
        assert model.chat(msgs=[turn], **options) == expected
    assert model.chat(image=str(tmp_path / "a.png"), msgs=json.dumps([user("What?")]), **options) == expected
    assert model.chat(None, [user(gradient(), "What?")], tokenizer, **GREEDY) == expected
    assert model.chat(image=[gradient(), gradient()], msgs=[user("What?")], **options) != ""


def test_options_reach_prompt_and_network(ready):
    model, tokenizer = ready("v2_6")
    options = {**GREEDY, "tokenizer": tokenizer, "msgs": [user("What?")], "image": gradient(1400, 900)}
    plain = model.chat(**options)
    assert plain == model.chat(**options, use_image_id=True, system_prompt=None, processor=None)
    with pytest.raises(DataError, match="the limit is 64"):
        model.chat(**options, max_inp_length=64)
    # What is written changes with each of them; the tiny network's answer need not.
    from finetune.chat.messages import read_messages
    from finetune.chat.pipeline import ChatPipeline, ChatPromptOptions

    pipeline = ChatPipeline(model, tokenizer)

    def ids(system_prompt: str | None = None, **prompting: Any) -> list[int]:
        sample = read_messages(options["msgs"], options["image"], system_prompt=system_prompt)
        return pipeline.encoder(ChatPromptOptions(**prompting)).encode(sample, generate=True).input_ids.tolist()

    forms = [ids(), ids(max_slice_nums=1), ids(use_image_id=False), ids(system_prompt="Be brief.")]
    assert len({tuple(form) for form in forms}) == 4
    assert len(forms[1]) < len(forms[0])


@pytest.mark.parametrize("family", ["v4_5", "o4_5", "v4_6"])
def test_thinking(ready, family):
    model, tokenizer = ready(family)
    options = {**GREEDY, "tokenizer": tokenizer, "msgs": [user("What?")]}
    thought = model.chat(**options, enable_thinking=True)
    assert thought.startswith("<think>\n") == (family != "o4_5")
    assert "".join(model.chat(**options, enable_thinking=True, stream=True)) == thought
    assert model.chat(**options, enable_thinking=False) == model.chat(**options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"enable_thinking": True}, ArgumentError, "MiniCPM-Llama3-V 2.5 has no thinking mode"),
        ({"temprature": 0.5}, ArgumentError, "no option temprature=0.5"),
        ({"stream": True, "num_beams": 3}, ArgumentError, r"num_beams=3\) cannot"),
        ({"msgs": [[user("a")]], "stream": True}, ArgumentError, "not with a batch"),
        ({"msgs": [[user("a")]], "image": gradient()}, ArgumentError, "1 conversations but images: one"),
        ({"msgs": [user("a"), said("b")]}, DataError, "nothing to answer"),
        ({"msgs": []}, DataError, "the conversation is empty"),
        ({"msgs": None}, DataError, "give a list of turns"),
        ({"msgs": "hello"}, DataError, "not JSON"),
        ({"msgs": [user(gradient(), 3)]}, DataError, "contains a int"),
        ({"msgs": [user({"type": "scent", "scent": "x"})]}, DataError, "type 'scent'"),
        ({"image": "/none.png"}, DataError, "does not exist"),
        ({"image": 5}, DataError, "image of type int"),
    ],
)
def test_refused(ready, options, error, message):
    model, tokenizer = ready("llama3_v2_5")
    given = {"msgs": [user("a")], "tokenizer": tokenizer, **GREEDY, **options}
    with pytest.raises(error, match=message):
        model.chat(**given)


def test_errors_in_the_thread_arrive(ready, monkeypatch):
    model, tokenizer = ready("llama3_v2_5")
    monkeypatch.setattr(model.llm.model.layers[0], "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(model.chat(msgs=[user("a")], tokenizer=tokenizer, stream=True, **GREEDY))


def test_a_reader_who_leaves_ends_the_generation(ready):
    model, tokenizer = ready("llama3_v2_5")
    model.train()
    pieces = model.chat(msgs=[user("a")], tokenizer=tokenizer, stream=True, sampling=False, max_new_tokens=100_000)
    next(pieces)
    pieces.close()
    assert model.training
    model.eval()


def test_id_zero_is_a_token_like_any_other(ready, monkeypatch):
    model, tokenizer = ready("llama3_v2_5")
    prompt = []

    def generate(input_ids, **_):
        prompt.append(input_ids)
        return torch.cat([input_ids, torch.tensor([[0, 0, 72, 0]])], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    assert model.chat(msgs=[user("a")], tokenizer=tokenizer) == tokenizer.decode([0, 0, 72, 0])


def test_the_tokenizer_may_be_left_out(ready):
    model, tokenizer = ready("llama3_v2_5")
    assert model.chat(msgs=[user("a")], **GREEDY) == model.chat(msgs=[user("a")], tokenizer=tokenizer, **GREEDY)


def test_the_shape_of_the_answer_is_the_family_s():
    assert [name for name in FAMILIES if by_name(name).chat_gives_context] == ["v2_0"]
    assert finetune.models.MiniCPMV.chat.__doc__
