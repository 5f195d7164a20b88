"""What the page does, without a browser; with gradio, that the page can be built."""

from __future__ import annotations

import html
import socket
import sys
from dataclasses import replace
from typing import Any

import pytest
from zoo import gradient

from finetune.__main__ import main
from finetune.chat.pipeline import ChatPromptOptions, SamplingOptions
from finetune.chat.session import ChatSession
from finetune.chat.web_page import Page, build, serve, shown
from finetune.models import load_model
from finetune.utils.errors import ArgumentError, UserError

OPTIONS: dict[str, Any] = {"sampling": False, "max_new_tokens": 5}


@pytest.fixture
def page(tiny) -> Page:
    return Page(
        ChatSession(str(tiny("llama3_v2_5")), device="cpu"),
        ChatPromptOptions(max_slice_nums=1),
        SamplingOptions(**OPTIONS),
    )


@pytest.fixture
def both(tiny, page, tmp_path) -> Page:
    """A page with an adapter beside the base."""
    from peft import LoraConfig, get_peft_model

    base: Any = load_model(tiny("llama3_v2_5"))
    config = LoraConfig(r=4, target_modules=r"llm\..*\.q_proj", init_lora_weights=False)
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data *= 8
    model.save_pretrained(str(tmp_path / "tuned"))
    session = ChatSession(str(tiny("llama3_v2_5")), [str(tmp_path / "tuned")], device="cpu")
    return Page(session, page.prompting, page.decoding)


def test_adapter_and_base_answer_side_by_side(tiny, both, tmp_path):
    gradient().save(tmp_path / "a.png")
    assert both.models == ("tuned", "off")
    conversations = both.start()
    steps = list(both.ask(" What? ", str(tmp_path / "a.png"), conversations))
    tuned, base = steps[-1]
    assert [turn["role"] for turn in tuned] == ["user", "user", "assistant"]
    assert tuned[0]["content"] == {"path": str((tmp_path / "a.png").resolve())}
    assert tuned[1]["content"] == "What?"
    model: Any = load_model(tiny("llama3_v2_5"))
    msgs = [{"role": "user", "content": "What?"}]
    answer = model.chat(image=gradient(), msgs=msgs, max_slice_nums=1, **OPTIONS)
    assert base[-1]["content"] == html.escape(answer, quote=False)
    assert tuned[-1]["content"] != base[-1]["content"]
    assert len(steps) >= 4
    for earlier, later in zip(steps, steps[1:], strict=False):  # text only grows
        assert all(
            later[column][-1]["content"].startswith(turns[-1]["content"])
            for column, turns in enumerate(earlier)
            if turns[-1]["role"] == "assistant"
        )
    list(both.ask("More?", None, conversations))
    assert [len(conversation.turns) for conversation in conversations] == [4, 4]


def test_what_cannot_be_used_is_forgotten(page, tmp_path):
    conversations = page.start()
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for question, picture in (("  ", None), ("What?", "/none.png"), ("What?", str(tmp_path / "broken.png"))):
        with pytest.raises(UserError):
            list(page.ask(question, picture, conversations))
        assert (conversations[0].turns, conversations[0].files) == ([], [])
    left = page.ask("What?", None, conversations)
    next(left)
    left.close()
    assert shown(conversations[0]) == []
    assert shown_answer(page, conversations)


def test_a_conversation_takes_a_limited_number_of_images(page, tmp_path):
    gradient().save(tmp_path / "a.png")
    page = replace(page, max_files=1)
    conversations = page.start()
    list(page.ask("What?", str(tmp_path / "a.png"), conversations))
    with pytest.raises(ArgumentError, match="as many as --max_files allows: clear the conversation"):
        list(page.ask("And?", str(tmp_path / "a.png"), conversations))
    assert [role for role, _, _ in conversations[0].turns] == ["user", "assistant"]
    assert shown_answer(page, conversations)


def test_limits_of_the_page_need_the_page(tiny, capsys):
    for flag in ("--max_files", "--max_file_mb"):
        assert main(["chat", "--model", str(tiny("llama3_v2_5")), flag, "2"]) == 2
        assert "add --web" in capsys.readouterr().err


def test_a_large_upload_is_refused(page, tmp_path, monkeypatch):
    """By gradio's server, before anything is written."""
    gradio = pytest.importorskip("gradio")
    httpx = pytest.importorskip("httpx")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    launched: list[Any] = []
    launch = gradio.Blocks.launch

    def unblocked(blocks: Any, **options: Any) -> None:
        launched.append(blocks)
        launch(blocks, **options, prevent_thread_lock=True, quiet=True)

    monkeypatch.setattr(gradio.Blocks, "launch", unblocked)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve(page, port, max_file_mb=1)
    try:
        sizes = {2**19: True, 2**21: False}
        for size, accepted in sizes.items():
            answer = httpx.post(
                f"http://127.0.0.1:{port}/gradio_api/upload", files={"files": ("a.png", bytes(size))}, timeout=30
            )
            assert answer.is_success == accepted, answer.text
    finally:
        launched[0].close()


def shown_answer(page: Page, conversations: list[Any]) -> str:
    return list(page.ask("What?", None, conversations))[-1][0][-1]["content"]


def test_without_gradio_the_extra_is_named(page, monkeypatch, tiny, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ArgumentError, match=r"pip install -e '\.\[web\]'"):
        build(page)
    assert main(["chat", "--web", "--model", str(tiny("llama3_v2_5")), "--device", "cpu"]) == 2
    assert "needs gradio" in capsys.readouterr().err


def test_the_page_is_built(page):
    pytest.importorskip("gradio")
    assert build(page) is not None
