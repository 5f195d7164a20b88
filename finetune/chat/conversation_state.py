"""A chat history: the turns so far, and the media files attached to the next question."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.chat.messages import read_messages
from finetune.media import audio, image, video
from finetune.sample import Media, MediaKind, Sample, Source
from finetune.utils.errors import ArgumentError, located
from finetune.utils.paths import expand

File = tuple[MediaKind, Path]


CHAT = Source("chat", 0)
# Opens a file of each kind, so that an unusable file is reported as soon as it is attached.
_OPENED: dict[MediaKind, Callable[[Media], object]] = {
    "image": image.size,
    "video": video.probe,
    "audio": audio.load,
}


def found(path: str, kind: MediaKind) -> Path | None:
    """The file at a path; a path in quotes or with backslashes is unquoted when no file has that exact name."""
    try:
        words = shlex.split(path)
    except ValueError:  # an unclosed quote
        words = []
    for each in (path, *(words if len(words) == 1 else ())):
        file = expand(each)
        if file.is_file() or (kind == "video" and file.is_dir()):
            return file
    return None


class ConversationState:
    """The turns of a chat with their images, videos and audio.

    Args:
        system_prompt: text of a system turn, None for none.

    Attributes:
        turns: role, text and files of every turn so far.
        files: kind and path of the media attached to the next question.
    """

    def __init__(self, system_prompt: str | None = None) -> None:
        self.system_prompt = system_prompt
        self.turns: list[tuple[str, str, list[File]]] = []
        self.files: list[File] = []
        self._saved: set[Path] = set()

    def reset(self) -> None:
        """Clears all turns but the system turn."""
        self.turns, self.files = [], []

    def show(self, path: str, kind: MediaKind = "image") -> None:
        """Attaches an image, or a file of another kind, in front of the next question.

        Args:
            path: plain, or quoted as terminals insert the path of a dragged file.
            kind: "image", "video" or "audio".

        Raises:
            ArgumentError: there is no such file.
            DataError: the file is not of that kind, or cannot be read.
        """
        file = found(path, kind)
        if file is None:
            raise ArgumentError(f"{path}: no such file (looked in {Path.cwd()})")
        with located(CHAT):
            _OPENED[kind](Media(kind, file))
        self.files.append((kind, file.resolve()))

    def ask(self, question: str) -> Sample:
        """The conversation up to a new question; ``take_back`` removes it, ``answered`` completes it.

        Raises:
            DataError: a file no longer exists.
        """
        self.turns.append(("user", question, self.files))
        self.files = []
        msgs = [
            {"role": role, "content": [*({"type": kind, kind: path} for kind, path in files), text]}
            for role, text, files in self.turns
        ]
        return read_messages(msgs, system_prompt=self.system_prompt)

    def answered(self, answer: str) -> None:
        """Adds the answer to the last question."""
        self.turns.append(("assistant", answer, []))

    def take_back(self) -> None:
        """Removes the last question and its files."""
        self.turns.pop()

    def record(self) -> dict[str, Any]:
        """The conversation as a training record."""
        media: dict[str, dict[str, str]] = {}
        turns = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        for role, text, files in self.turns:
            content = ""
            for kind, path in files:
                named = media.setdefault(kind, {})
                tag = f"<{kind}_{len(named):02d}>"
                named[tag] = str(path)
                content += f"{tag}\n"
            turns.append({"role": role, "content": content + text})
        return {"id": "chat", **media, "conversations": turns}

    def save(self, path: str) -> Path:
        """Writes the conversation as a data file with one record.

        Raises:
            ArgumentError: nothing to save, the file exists already, or it cannot be written.
        """
        file = expand(path).resolve()
        if not self.turns:
            raise ArgumentError("the conversation is empty: ask a question first")
        if file.exists() and file not in self._saved:
            raise ArgumentError(f"{file} exists; choose another name")
        try:
            file.write_text(json.dumps([self.record()], indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise ArgumentError(f"{file} cannot be written: {error}") from error
        self._saved.add(file)
        return file
