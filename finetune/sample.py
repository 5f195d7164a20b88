"""Data types of a training sample, which the readers of all data formats produce: ``Sample``, ``Message``, ``Media``.

Every reader turns its records into these, so that nothing downstream depends on the file format.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args, overload

from finetune.timeline import Timeline
from finetune.utils.errors import UserError, located
from finetune.utils.quoting import plain, shown, truncate_middle

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from finetune.media.video_sampling import Frames

UNREAD = "that are not read"
"""Part of every note about a key of a record that no reader uses."""

MediaKind = Literal["image", "video", "audio"]
MEDIA_KINDS: tuple[MediaKind, ...] = get_args(MediaKind)
MEDIA_COLUMNS: dict[MediaKind, str] = {"image": "images", "video": "videos", "audio": "audios"}
"""Column of the media files of a record by kind, in the formats that have one column per kind."""
ROLES = ("system", "user", "assistant", "tool")
VIDEO_SUFFIXES = frozenset(
    (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp")
)
"""Suffixes that mark a video where nothing else says what a file is; a GIF counts as an image there."""
AUDIO_SUFFIXES = frozenset(
    (".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".m4a", ".aac", ".aiff", ".aif", ".amr", ".wma", ".ac3", ".caf")
)
"""Suffixes of audio files."""
IMAGE_SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".jp2", ".avif", ".tga")
)
"""Suffixes of image files."""


class DataError(UserError):
    """A record that cannot be used. The message says what disagrees and what to do; ``located`` adds the record."""


@dataclass(frozen=True, slots=True)
class Source:
    """File and position of the record a sample was made from; part of every error message about it.

    Attributes:
        file: path of the data file, or a name such as "chat" for samples made in memory.
        index: position of the record in the file, from 0.
        id: the record's own id, empty when it has none.
        unit: unit of the position: "record", or "byte" for a line of a full-duplex recorded file.
    """

    file: str
    index: int
    id: str = ""
    unit: str = "record"

    def __str__(self) -> str:
        return f"{plain(self.file)}, {self.unit} {self.index}" + (f" (id {shown(self.id)})" if self.id else "")


@dataclass(frozen=True, slots=True)
class Text:
    """A text part. Control tokens inside it are encoded as plain text; grounding tags such as <box> are tokens."""

    text: str


@dataclass(frozen=True, slots=True)
class Media:
    """One image, video or audio clip at its place in the conversation.

    Attributes:
        kind: "image", "video" or "audio".
        data: a file path (resolved by the reader); for images also a PIL image; for audio also the bytes of a file or a
            mono float waveform at 16 kHz (chat), or a ``Track``; for videos also the image files of the frames. The
            encoder replaces a video by ``Frames``.
    """

    kind: MediaKind
    data: Path | Image.Image | bytes | np.ndarray | tuple[Path, ...] | Frames | Track

    def __str__(self) -> str:
        if isinstance(self.data, Path):
            return f"{self.kind} {truncate_middle(plain(str(self.data)))}"
        if isinstance(self.data, tuple):
            first = f" from {truncate_middle(plain(str(self.data[0])))}" if self.data else ""
            return f"{self.kind} of {len(self.data)} frames{first}"
        if isinstance(self.data, Track):
            return f"user audio of {len(self.data.clips)} clips from {self.data.clips[0][1]}"
        return f"{self.kind} in memory"

    @property
    def files(self) -> tuple[Path, ...]:
        """The files it is read from; none for media in memory."""
        if isinstance(self.data, Track):
            return tuple(path for _, clip in self.data.clips for path in clip.files)
        if isinstance(self.data, tuple):
            return self.data
        return (self.data,) if isinstance(self.data, Path) else ()


@dataclass(frozen=True, slots=True)
class Track:
    """User audio of a full-duplex record: clips with silence between them; overlapping clips are added.

    Attributes:
        clips: (first sample at 16 kHz, clip) each.
        seconds: length in seconds.
        fixed: whether a clip that ends after ``seconds`` is an error; else the length grows to whole seconds.
        samples: number of samples that each clip must have; empty for any.
    """

    clips: tuple[tuple[int, Media], ...]
    seconds: int
    fixed: bool
    samples: tuple[int, ...] = ()


Part = Text | Media
Tool = Mapping[str, Any]
"""A tool description in the format that chat templates take."""


class Call(NamedTuple):
    """One tool call.

    Attributes:
        name: name of the tool.
        arguments: argument values by name.
    """

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    Attributes:
        role: one of ROLES.
        parts: text and media in reading order.
        train: whether the tokens of this turn are labels; only assistant turns may be trained.
        thought: reasoning before an answer, where the record stores it apart from the text.
        calls: tool calls at the end of an answer, where the record stores them apart from the text.
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
        source: file and position of its record.
        messages: its turns.
        notes: warnings about a usable record. They do not name the record, so that equal ones can be counted.
        tools: descriptions of the tools that may be called.
        timeline: who speaks when in a full-duplex record; None for a conversation. The messages of a full-duplex record
            have its system text and reference audio, its pictures and user audio, and all text of the model.
        rejected: in a preference pair the rejected answer, in place of the last message, which is the chosen one.

    Raises:
        DataError: no message, an unknown role, a trained turn that is not the assistant's, a system turn that is
            not the first, two turns in a row of user or of assistant, or a pair whose answers are not the assistant's.
    """

    id: str
    source: Source
    messages: tuple[Message, ...]
    notes: tuple[str, ...] = ()
    tools: tuple[Tool, ...] = ()
    timeline: Timeline | None = None
    rejected: Message | None = None

    def __post_init__(self) -> None:
        with located(self.source):
            self._check()

    @property
    def with_rejected_answer(self) -> Sample | None:
        """The conversation that ends with the rejected answer; None for a sample that is no preference pair."""
        if self.rejected is None:
            return None
        return replace(self, messages=(*self.messages[:-1], self.rejected), rejected=None)

    def _check(self) -> None:
        if not self.messages:
            raise DataError("the conversation is empty; give at least one user turn")
        previous = None
        for turn, message in enumerate(self.messages):
            if message.role not in ROLES:
                known = ", ".join(ROLES)
                raise DataError(f"turn {turn} has role {shown(message.role)}; known roles are {known}")
            if message.train and message.role != "assistant":
                raise DataError(f"turn {turn} is a {message.role} turn; only assistant turns are trained")
            if message.role == "system" and turn > 0:
                raise DataError(f"turn {turn} is a system turn; it must be the first")
            if message.role == previous and message.role in ("user", "assistant"):
                raise DataError(f"turns {turn - 1} and {turn} are both {message.role}; roles must alternate")
            previous = message.role
        if self.rejected is not None and {self.rejected.role, previous} != {"assistant"}:
            raise DataError(f"the answers of a pair are a {previous} and a {self.rejected.role} turn, not two answers")

    def media(self, kind: MediaKind | None = None) -> Iterator[Media]:
        """The media of the conversation in reading order, optionally of one kind."""
        for message in self.messages:
            for part in message.parts:
                if isinstance(part, Media) and kind in (None, part.kind):
                    yield part


class SampleSet(Sequence[Sample]):
    """A data set as encoding, batching and data_check see it: samples by number, and facts about their files.

    The defaults are those of samples in memory; the data sets of ``finetune.readers`` override them.
    """

    def source(self, index: int) -> Source:
        """File and position of record ``index``, also of a record that cannot be used."""
        try:
            return self[index].source
        except DataError:
            return Source("samples in memory", index)

    def format_of(self, index: int) -> str:
        """Name of the data format of record ``index``; empty for samples in memory."""
        return ""

    @property
    def title(self) -> str:
        """Name for logs: the data set, or its file."""
        return self.source(0).file

    @property
    def files(self) -> list[Path]:
        """The data files. Cached results depend on their state; without files nothing is cached."""
        return []

    @property
    def train_on(self) -> str | None:
        """Which answers are trained, part of the key of cached results."""
        return None

    @property
    def fingerprint(self) -> str | None:
        """Text that changes when the selection of records or the way they are read changes."""
        return None

    @property
    def has_timelines(self) -> bool:
        """Whether some record is a full-duplex one."""
        return any(sample.timeline is not None for sample in self)

    @property
    def unique(self) -> SampleSet:
        """The data set without repetitions of a record."""
        return self


class SampleList(SampleSet):
    """Samples in memory as a data set."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        """The sample at ``index``."""
        return self._samples[index]


def as_sample_set(samples: Sequence[Sample]) -> SampleSet:
    """The samples as a ``SampleSet``; a plain sequence becomes a ``SampleList``."""
    return samples if isinstance(samples, SampleSet) else SampleList(samples)
