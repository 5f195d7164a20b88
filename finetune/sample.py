"""What a record means, whatever file format it came from: a conversation of ordered text and media parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from finetune.utils.errors import UserError
from finetune.utils.quoting import cut, plain, shown

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from finetune.media.video_sampling import Frames

UNREAD = "that nothing reads"
"""Words of every note about a key of a record that is read by nothing: mostly there for others."""

MediaKind = Literal["image", "video", "audio"]
MEDIA_KINDS: tuple[MediaKind, ...] = get_args(MediaKind)
MEDIA_COLUMNS: dict[MediaKind, str] = {"image": "images", "video": "videos", "audio": "audios"}
"""Keys of the files of a record, by their kind, in the forms that keep them in columns."""
ROLES = ("system", "user", "assistant", "tool")
VIDEO_SUFFIXES = frozenset(
    (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp")
)
"""Endings of files that are videos wherever nobody says what a file is; a GIF is a picture there."""
SOUND_SUFFIXES = frozenset(
    (".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".m4a", ".aac", ".aiff", ".aif", ".amr", ".wma", ".ac3", ".caf")
)
"""Endings of files that are heard, not seen."""
PICTURE_SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".jp2", ".avif", ".tga")
)
"""Endings of files that are pictures."""


class DataError(UserError):
    """A record that cannot be used. The message says where it is, what disagrees and what to do."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a sample came from; printed in every error about it.

    Attributes:
        file: path of the data file, or a word such as "chat" for samples made in memory.
        index: position of the record in the file, from 0.
        id: the record's own id, empty when it has none.
        unit: what the position counts: "record", or "byte" for a line of a file that is read from the middle.
    """

    file: str
    index: int
    id: str = ""
    unit: str = "record"

    def __str__(self) -> str:
        return f"{plain(self.file)}, {self.unit} {self.index}" + (f" (id {shown(self.id)})" if self.id else "")


@dataclass(frozen=True, slots=True)
class Text:
    """A run of user text. Control tokens inside it are plain text, grounding marks such as <box> are not."""

    text: str


@dataclass(frozen=True, slots=True)
class Media:
    """One image, video or audio clip at its place in the conversation.

    Attributes:
        kind: "image", "video" or "audio".
        data: a file path (resolved by the reader), for images a decoded PIL image, for sound the bytes of a file or
            samples of one channel at 16 kHz, a float array (chat), for videos also the files of their frames; the
            encoder puts ``Frames`` in the place of a video.
    """

    kind: MediaKind
    data: Path | Image.Image | bytes | np.ndarray | tuple[Path, ...] | Frames

    def __str__(self) -> str:
        if isinstance(self.data, Path):
            return f"{self.kind} {cut(plain(str(self.data)))}"
        if isinstance(self.data, tuple):
            first = f" from {cut(plain(str(self.data[0])))}" if self.data else ""
            return f"{self.kind} of {len(self.data)} frames{first}"
        return f"{self.kind} in memory"

    @property
    def files(self) -> tuple[Path, ...]:
        """The files it comes from."""
        if isinstance(self.data, tuple):
            return self.data
        return (self.data,) if isinstance(self.data, Path) else ()


Part = Text | Media
Tool = Mapping[str, Any]
"""The description of a tool, as chat templates take it."""


class Call(NamedTuple):
    """One call of a tool.

    Attributes:
        name: of the tool.
        arguments: by name.
    """

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    Attributes:
        role: one of ROLES.
        parts: text and media in reading order.
        train: whether this turn carries loss; only assistant turns may.
        thought: the thinking before an answer, where the record has it apart from the text.
        calls: of tools, which an answer ends with, where the record has them apart from the text.
    """

    role: str
    parts: tuple[Part, ...]
    train: bool = False
    thought: str = ""
    calls: tuple[Call, ...] = ()

    @property
    def text(self) -> str:
        """The text parts, concatenated."""
        return "".join(part.text for part in self.parts if isinstance(part, Text))


@dataclass(frozen=True, slots=True)
class Sample:
    """One conversation, validated on construction.

    Attributes:
        id: the record's own id, or its position.
        source: where it came from.
        messages: its turns.
        notes: what its author may not have meant, though it can be used; a sentence names no record, so that equal ones
            are counted.
        tools: descriptions of those that may be called.

    Raises:
        DataError: no message, an unknown role, a trained turn that is not the assistant's, a system turn that is
            not the first, or two turns in a row of user or of assistant.
    """

    id: str
    source: Source
    messages: tuple[Message, ...]
    notes: tuple[str, ...] = ()
    tools: tuple[Tool, ...] = ()

    def __post_init__(self) -> None:
        if not self.messages:
            raise DataError(f"{self.source}: the conversation is empty; give at least one user turn")
        previous = None
        for turn, message in enumerate(self.messages):
            if message.role not in ROLES:
                known = ", ".join(ROLES)
                raise DataError(f"{self.source}: turn {turn} has role {shown(message.role)}; known roles are {known}")
            if message.train and message.role != "assistant":
                raise DataError(
                    f"{self.source}: turn {turn} is a {message.role} turn; only assistant turns are trained"
                )
            if message.role == "system" and turn > 0:
                raise DataError(f"{self.source}: turn {turn} is a system turn; it must be the first")
            if message.role == previous and message.role in ("user", "assistant"):
                raise DataError(
                    f"{self.source}: turns {turn - 1} and {turn} are both {message.role}; roles must alternate"
                )
            previous = message.role

    def media(self, kind: MediaKind | None = None) -> Iterator[Media]:
        """The media of the conversation in reading order, optionally of one kind."""
        for message in self.messages:
            for part in message.parts:
                if isinstance(part, Media) and kind in (None, part.kind):
                    yield part
