"""Results of earlier checks, remembered by the state of the files they depend on."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import finetune
from finetune.encoding.length_policy import LengthPolicy, Outcome
from finetune.sample import Sample
from finetune.utils.cache import atomic_write, folder, signature

logger = logging.getLogger(__name__)


class CachedCheck(NamedTuple):
    """A record that can be used.

    Attributes:
        outcome: what had to give for it.
        tokens: its length then.
        lost_images: images that go with dropped turns.
        trained: tokens that carry loss.
        items: thumbnails, slices and frames.
        media: images, videos and sounds of the record, whatever goes with dropped turns.
        notes: of the sample, and what is suspicious in it.
        alike: equal for records that may be copies of each other, whatever their files are called; see ``likeness``.
        answer: its last answer that is trained; a long one is shortened, and still differs from others.
    """

    outcome: Outcome
    tokens: int
    lost_images: int
    trained: int
    items: int
    media: tuple[int, int, int]
    notes: tuple[str, ...]
    alike: int
    answer: str


class CheckCache:
    """Good records of one data set under one setting.

    Problems are not remembered: what mends them (an image put in its place) need not change the data file. Threads may
    share an object; each record is looked at by one of them.

    Args:
        data: the data files; no result is remembered where there is none, or one cannot be read.
        setting: everything else the results depend on; see ``fingerprint``.
        rebuild: look at every record again.
    """

    def __init__(self, data: Sequence[Path], setting: str, *, rebuild: bool = False) -> None:
        # Relative image paths are also looked for in the current directory.
        key = "\n".join([*(str(path.resolve()) for path in data), str(Path.cwd()), setting, *CachedCheck._fields])
        self._path = folder() / f"check-{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
        readable = data and all(path.is_file() for path in data)
        self._state = [list(signature(path)) for path in data] if readable else None
        self._known = {} if rebuild else self._read()
        self._fresh: dict[str, list] = {}
        self.reused = 0

    def get(self, index: int) -> CachedCheck | None:
        """The result of a record none of whose files has changed."""
        entry = self._known.get(str(index))
        if entry is None:
            return None
        looked, files = entry
        try:
            if any(list(signature(Path(path))) != [path, *state] for path, *state in files):
                return None
        except OSError:
            return None
        self._fresh[str(index)] = entry
        self.reused += 1
        return CachedCheck(*looked)

    def put(self, index: int, looked: CachedCheck, files: Sequence[Path]) -> None:
        """Remembers a result, which depends on these files; not where one of them has vanished."""
        try:
            self._fresh[str(index)] = [looked, [signature(path) for path in files]]
        except OSError:
            self._known.pop(str(index), None)

    def write(self) -> None:
        """Saves what was looked at; a folder that cannot be written is no reason to stop."""
        if self._state is None:
            return
        text = json.dumps({"data": self._state, "records": self._known | self._fresh})
        try:
            with atomic_write(self._path) as file:
                file.write(text.encode())
        except OSError as error:
            logger.warning("the results of the check are not remembered: %s", error)

    def _read(self) -> dict[str, list]:
        try:
            stored = json.loads(self._path.read_text(encoding="utf-8"))
            same = self._state is not None and stored["data"] == self._state
            return dict(stored["records"]) if same else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}  # absent, cut short or of another version: then everything is looked at again


def fingerprint(fitter: LengthPolicy, samples: Sequence[Sample]) -> str:
    """All settings that decide what becomes of a record; readers may have one of their own."""
    encoder = fitter.encoder
    backend = getattr(encoder.tokenizer, "backend_tokenizer", None)
    assert backend is not None  # the encoder's vocabulary is made from it
    values = {
        "version": finetune.__version__,
        "family": encoder.family.name,
        "slicing": asdict(encoder.slicing),
        "layout": asdict(encoder.layout),
        "max_length": encoder.max_length,
        "max_pixels": encoder.max_pixels,
        "shrink_pixels": encoder.shrink_pixels,
        "hearing": None if encoder.hearing is None else asdict(encoder.hearing),
        "video": asdict(encoder.video),
        "policy": fitter.policy,
        "train_on": getattr(samples, "train_on", None),
        "meaning": getattr(samples, "meaning", None),
        # What it writes for tools.
        "chat_template": encoder.tokenizer.chat_template,
        "tokenizer": hashlib.sha256(backend.to_str().encode()).hexdigest(),
    }
    return json.dumps(values, sort_keys=True)
