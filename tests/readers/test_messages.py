from pathlib import Path

import pytest
from PIL import Image

from finetune.readers import messages
from finetune.sample import DataError, Media, Text

PICTURE = Image.new("RGB", (8, 8))
SEEN = Media("image", PICTURE)


def test_contents_are_joined_by_newlines() -> None:
    sample = messages.sample([{"role": "user", "content": ["a", PICTURE, PICTURE, "b"]}])
    line = Text("\n")
    assert sample.messages[0].parts == (Text("a"), line, SEEN, line, SEEN, line, Text("b"))
    assert str(sample.source) == "chat, record 0"


def test_image_and_system_prompt() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    sample = messages.sample(turns, image=PICTURE, system_prompt="s")
    assert [message.role for message in sample.messages] == ["system", "user", "assistant", "user"]
    assert sample.messages[1].parts == (SEEN, Text("\n"), Text("a"))
    assert not any(message.train for message in sample.messages)


def test_files_and_single_contents() -> None:
    sample = messages.sample([{"role": "user", "content": Path("a.png")}])
    assert sample.messages[0].parts == (Media("image", Path("a.png")),)


def test_bad_messages() -> None:
    with pytest.raises(
        DataError, match="chat, record 0: turn 0 contains a value of type int; give strings and PIL images"
    ):
        messages.sample([{"role": "user", "content": ["a", 3]}])
    with pytest.raises(DataError, match="turn 0 is .*; it needs 'role' and 'content'"):
        messages.sample([{"content": "a"}])
    with pytest.raises(DataError, match="the conversation is empty"):
        messages.sample([])
