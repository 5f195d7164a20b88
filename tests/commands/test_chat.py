"""python -m finetune chat with piped input, as a user's script would."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from zoo import gradient

from finetune.__main__ import main
from finetune.chat.conversation_state import ConversationState
from finetune.chat.session import ChatSession
from finetune.checkpoints.base_checkpoint import resolve_base
from finetune.checkpoints.saving import finish_adapter
from finetune.families import by_name
from finetune.models import load_model
from finetune.readers import read
from finetune.sample import DataError
from finetune.utils.errors import ArgumentError

FAMILY = "llama3_v2_5"
QUICK = ("--device", "cpu", "--greedy", "--max_new_tokens", "5", "--max_slice_nums", "1")
OPTIONS: dict[str, Any] = {"sampling": False, "max_new_tokens": 5, "max_slice_nums": 1}


@pytest.fixture(scope="module")
def adapters(tiny, tmp_path_factory) -> list[Path]:
    base = resolve_base(str(tiny(FAMILY)))
    folders = []
    for number in (1, 2):
        torch.manual_seed(number)
        config = LoraConfig(r=4, target_modules=by_name(FAMILY).lora_targets["llm"], init_lora_weights=False)
        model = get_peft_model(load_model(base.folder), config)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data *= 5
        folder = tmp_path_factory.mktemp("adapters") / f"run-{number}.0"
        model.save_pretrained(str(folder))
        finish_adapter(model, folder, base)
        folders.append(folder)
    return folders


@pytest.fixture
def picture(tmp_path) -> Path:
    gradient().save(tmp_path / "a picture.png")
    return tmp_path / "a picture.png"


def chat(monkeypatch, capsys, lines: list[str], *flags: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    status = main(["chat", *flags, *QUICK])
    out, err = capsys.readouterr()
    return status, out, err


def says(model: Any, *turns: str, image: Any = None) -> str:
    msgs = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(turns)]
    return model.chat(image=image, msgs=msgs, **OPTIONS)


def test_rounds_pictures_and_adapters(tiny, adapters, picture, tmp_path, monkeypatch, capsys):
    lines = ["Hello", f"/image {picture}", "And this?", "/adapter run-2_0", "/reset", "Hello", "/adapter off", "/reset"]
    lines += ["Hello", f"/save {tmp_path / 'saved.json'}", "/adapter"]
    status, out, err = chat(monkeypatch, capsys, lines, *(f"--adapter={folder}" for folder in adapters))
    assert status == 0
    first, second = (load_model(folder) for folder in adapters)
    hello = says(first, "Hello")
    content = [gradient(), "And this?"]
    msgs = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": hello}]
    this = first.chat(msgs=[*msgs, {"role": "user", "content": content}], **OPTIONS)  # pyright: ignore[reportCallIssue]
    base = says(load_model(tiny(FAMILY)), "Hello")
    assert out == f"{hello}\n{this}\n{says(second, 'Hello')}\n{base}\n"
    assert len({hello, says(second, "Hello"), base}) == 3
    assert "  run-1_0\n  run-2_0\n* off" in err
    (sample,) = read(tmp_path / "saved.json")
    assert [message.text for message in sample.messages] == ["Hello", base]


def test_the_base_alone_and_a_picture_from_the_start(tiny, picture, monkeypatch, capsys):
    status, out, err = chat(monkeypatch, capsys, ["What?"], "--model", str(tiny(FAMILY)), "--image", str(picture))
    assert status == 0
    assert out == says(load_model(tiny(FAMILY)), "What?", image=gradient()) + "\n"
    assert "MiniCPM-Llama3-V 2.5 on cpu; /help" in err


def test_a_folder_of_an_adapter_given_as_the_model(adapters, monkeypatch, capsys):
    _, out, _ = chat(monkeypatch, capsys, ["Hello", "/quit", "Hello"], "--model", str(adapters[0]))
    assert out == says(load_model(adapters[0]), "Hello") + "\n"


def test_mistakes_are_said_and_the_talk_goes_on(tiny, tmp_path, monkeypatch, capsys):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    gradient(30, 30).save(tmp_path / "a b.png")
    lines = [f"'{tmp_path / 'a b.png'}'", str(tmp_path / "a b.png"), "/reset"]  # dragged into the terminal
    lines += ["/image /none.png", "/adaptor off", "/adapter x", "/save", "/save x.json"]
    lines += [f"/image {tmp_path / 'broken.png'}", "Hello", "", "/help"]
    status, out, err = chat(monkeypatch, capsys, lines, "--model", str(tiny(FAMILY)))
    assert status == 2
    assert out == says(load_model(tiny(FAMILY)), "Hello") + "\n"
    for message in ("/none.png: no such file", "did you mean /adapter?", "no adapter 'x'", "usage: /save FILE"):
        assert message in err
    assert "1 attached to the next question\n2 attached to the next question\n" in err
    assert "the conversation is empty" in err
    assert "is not an image" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --model, or --adapter"),
        (["--adapter", "off=ADAPTER"], "the name 'off' is taken"),
        (["--adapter", "ADAPTER", "--adapter", "ADAPTER"], "the name 'run-1_0' is taken"),
        (["--adapter", "llm=ADAPTER"], "'llm' cannot be the name"),
        (["--model", "OTHER", "--adapter", "ADAPTER"], "does not fit MiniCPM-V 2.0"),
        (["--adapter", "OTHER"], "is no adapter"),
        (["--adapter", "ADAPTER", "--thinking"], "has no thinking mode"),
        (["--adapter", "ADAPTER", "--image", "/none.png"], "no such file"),
    ],
)
def test_refused_at_the_start(tiny, adapters, monkeypatch, capsys, flags, message):
    flags = [flag.replace("ADAPTER", str(adapters[0])).replace("OTHER", str(tiny("v2_0"))) for flag in flags]
    status, out, err = chat(monkeypatch, capsys, ["Hello"], *flags)
    assert (status, out) == (2, "")
    assert message in err


def test_a_room_names_its_adapters(adapters):
    session = ChatSession(None, [f"a={adapters[0]}", f"b={adapters[1]}"], device="cpu")
    assert (list(session.adapters), session.active) == (["a", "b"], "a")
    session.choose("off")
    with pytest.raises(ArgumentError, match="there are a, b, off"):
        session.choose("c")


def test_a_saved_conversation_is_a_record(picture, tmp_path):
    conversation = ConversationState("Be brief.")
    conversation.show(str(picture))
    conversation.show(str(picture))
    conversation.ask("Same?")
    conversation.answered("Yes.")
    conversation.save(str(tmp_path / "talk.json"))
    conversation.ask("Sure?")
    conversation.answered("Yes.")
    conversation.save(str(tmp_path / "talk.json"))
    (sample,) = read(tmp_path / "talk.json")
    assert [message.role for message in sample.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [media.data for media in sample.media()] == [picture.resolve()] * 2
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ArgumentError, match="exists"):
        conversation.save(str(tmp_path / "other.json"))


@pytest.mark.parametrize("written", ["{}", "'{}'", '"{}"', "BACKSLASHES"])
def test_a_path_as_a_terminal_writes_it(picture, tmp_path, written):
    file = tmp_path / "it's a picture.png"
    file.write_bytes(picture.read_bytes())
    path = str(file).replace(" ", "\\ ").replace("'", "\\'") if written == "BACKSLASHES" else written.format(file)
    conversation = ConversationState()
    if written == "'{}'":  # a file with a quote in its name is quoted in another way
        path = path.replace("it's", "it'\\''s")
    conversation.show(path)
    assert conversation.files == [("image", file.resolve())]


@pytest.mark.parametrize("kind", ["image", "video", "audio"])
def test_a_file_is_opened_when_it_is_named(tmp_path, kind):
    (tmp_path / "empty.bin").touch()
    conversation = ConversationState()
    with pytest.raises(DataError, match="is empty"):
        conversation.show(str(tmp_path / "empty.bin"), kind)
    assert conversation.files == []


def test_out_of_memory_costs_the_question_alone(tiny, picture, monkeypatch, capsys):
    stream = ChatSession.stream

    def short(session: ChatSession, sample: Any, *options: Any) -> Any:
        if any(sample.media()):
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of"
            )
        return stream(session, sample, *options)

    monkeypatch.setattr(ChatSession, "stream", short)
    lines = [f"/image {picture}", "What?", "Hello"]
    status, out, err = chat(monkeypatch, capsys, lines, "--model", str(tiny(FAMILY)), "--max_slice_nums", "6")
    assert status == 2
    assert out == says(load_model(tiny(FAMILY)), "Hello") + "\n"
    assert "error: out of GPU memory: 2.0 GB asked for; the question is taken back. What needs less" in err
    assert "    /reset, which clears the conversation" in err
    assert "Traceback" not in err


def test_in_a_new_process(adapters, tmp_path):
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "finetune", "chat", "--adapter", str(adapters[0]), *QUICK]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command,
        input="Hello\n/save x.json\n",
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == says(load_model(adapters[0]), "Hello") + "\n"
    assert json.loads((tmp_path / "x.json").read_text())[0]["conversations"][0]["content"] == "Hello"
