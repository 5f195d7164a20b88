"""A conversation in the making: what has been said, and the pictures of the next question."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune.chat.messages import read_messages
from finetune.errors import ArgumentError
from finetune.sample import Sample


class Dialogue:
    """Questions with their pictures, and answers.

    Args:
        system_prompt: text of a system turn, None for none.

    Attributes:
        turns: role, text and pictures of every turn so far.
        pictures: files for the next question.
    """

    def __init__(self, system_prompt: str | None = None) -> None:
        self.system_prompt = system_prompt
        self.turns: list[tuple[str, str, list[Path]]] = []
        self.pictures: list[Path] = []
        self._saved: set[Path] = set()

    def reset(self) -> None:
        """Forgets everything but the system turn."""
        self.turns, self.pictures = [], []

    def show(self, path: str) -> None:
        """Puts a picture in front of the next question.

        Raises:
            ArgumentError: there is no such file.
        """
        file = Path(path).expanduser()
        if not file.is_file():
            raise ArgumentError(f"{path}: no such file (looked in {Path.cwd()})")
        self.pictures.append(file.resolve())

    def ask(self, question: str) -> Sample:
        """The conversation up to a new question; ``take_back`` forgets it again, ``answered`` completes it.

        Raises:
            DataError: a picture that is gone.
        """
        self.turns.append(("user", question, self.pictures))
        self.pictures = []
        msgs = [{"role": role, "content": [*pictures, text]} for role, text, pictures in self.turns]
        return read_messages(msgs, system_prompt=self.system_prompt)

    def answered(self, answer: str) -> None:
        """The answer to the last question."""
        self.turns.append(("assistant", answer, []))

    def take_back(self) -> None:
        """Forgets the last question and its pictures."""
        self.turns.pop()

    def record(self) -> dict[str, Any]:
        """The conversation as a record that training reads."""
        images: dict[str, str] = {}
        turns = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        for role, text, pictures in self.turns:
            content = ""
            for picture in pictures:
                tag = f"<image_{len(images):02d}>"
                images[tag] = str(picture)
                content += f"{tag}\n"
            turns.append({"role": role, "content": content + text})
        return {"id": "chat", **({"image": images} if images else {}), "conversations": turns}

    def save(self, path: str) -> Path:
        """Writes a data file of this one conversation.

        Raises:
            ArgumentError: nothing to save, the file exists already, or it cannot be written.
        """
        file = Path(path).expanduser().resolve()
        if not self.turns:
            raise ArgumentError("nothing has been said yet")
        if file.exists() and file not in self._saved:
            raise ArgumentError(f"{file} exists; choose another name")
        try:
            file.write_text(json.dumps([self.record()], indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise ArgumentError(f"{file} cannot be written: {error}") from error
        self._saved.add(file)
        return file
