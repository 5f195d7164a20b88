"""``CheckCache``: check results cached on disk, keyed by the settings and the state of the files."""

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
from finetune.sample import SampleSet
from finetune.utils.cache import atomic_write, folder, signature

logger = logging.getLogger(__name__)


class CachedCheck(NamedTuple):
    """The check result of a usable record.

    Attributes:
        outcome: result of ``LengthPolicy``.
        tokens: number of tokens after it.
        lost_media: number of images, videos and audio clips in removed turns.
        trained: number of tokens with a label.
        items: number of visual items: thumbnails, slices and frames.
        media: number of images, videos and audio clips of the record, including those in removed turns.
        notes: notes of the sample, and what is suspicious in it.
        content_key: equal for possible duplicates; see ``sample_hash.content_key``.
        answer: the last trained answer; a long one as its beginning and a digest.
        decisions: of a full-duplex record, as ``decision_counts.Decisions``; empty for a conversation.
        pair: whether it is a preference pair.
    """

    outcome: Outcome
    tokens: int
    lost_media: int
    trained: int
    items: int
    media: tuple[int, int, int]
    notes: tuple[str, ...]
    content_key: int
    answer: str
    decisions: tuple[int, ...] = ()
    pair: bool = False


class CheckCache:
    """Cached results of the usable records of one data set under one setting.

    Errors are not cached, since fixing them (adding a missing image) need not change the data file. Threads may share
    an object; each record is checked by one of them.

    Args:
        data: the data files; without files, or with unreadable ones, nothing is cached.
        setting: everything else the results depend on; see ``fingerprint``.
        rebuild: check every record again.
    """

    def __init__(self, data: Sequence[Path], setting: str, *, rebuild: bool = False) -> None:
        # Relative image paths are also resolved against the current directory.
        key = "\n".join([*(str(path.resolve()) for path in data), str(Path.cwd()), setting, *CachedCheck._fields])
        self._path = folder() / f"check-{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
        readable = data and all(path.is_file() for path in data)
        self._state = [list(signature(path)) for path in data] if readable else None
        self._known = {} if rebuild else self._read()
        self._fresh: dict[str, list] = {}
        self.reused = 0

    def get(self, index: int) -> CachedCheck | None:
        """The cached result of a record, unless one of its files has changed."""
        entry = self._known.get(str(index))
        if entry is None:
            return None
        result, files = entry
        try:
            if any(list(signature(Path(path))) != [path, *state] for path, *state in files):
                return None
        except OSError:
            return None
        self._fresh[str(index)] = entry
        self.reused += 1
        return CachedCheck(*result)

    def put(self, index: int, result: CachedCheck, files: Sequence[Path]) -> None:
        """Caches a result that depends on these files, unless one of them no longer exists."""
        try:
            self._fresh[str(index)] = [result, [signature(path) for path in files]]
        except OSError:
            self._known.pop(str(index), None)

    def write(self) -> None:
        """Writes the cache file; if that fails, a warning is logged."""
        if self._state is None:
            return
        text = json.dumps({"data": self._state, "records": self._known | self._fresh})
        try:
            with atomic_write(self._path) as file:
                file.write(text.encode())
        except OSError as error:
            logger.warning("the results of the data check are not cached: %s", error)

    def _read(self) -> dict[str, list]:
        try:
            stored = json.loads(self._path.read_text(encoding="utf-8"))
            same = self._state is not None and stored["data"] == self._state
            return dict(stored["records"]) if same else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}  # missing, truncated or of another version: all records are checked again


def fingerprint(length_policy: LengthPolicy, samples: SampleSet) -> str:
    """All settings that the check result of a record depends on, as text."""
    encoder = length_policy.encoder
    backend = getattr(encoder.tokenizer, "backend_tokenizer", None)
    assert backend is not None  # the encoder accepts fast tokenizers only
    values = {
        "version": finetune.__version__,
        "family": encoder.family.name,
        "slicing": asdict(encoder.slicing),
        "layout": asdict(encoder.layout),
        "max_length": encoder.max_length,
        "refuse_above_pixels": encoder.refuse_above_pixels,
        "max_pixels": encoder.max_pixels,
        "audio": None if encoder.audio_spec is None else asdict(encoder.audio_spec),
        "video": asdict(encoder.video),
        "policy": length_policy.policy,
        "train_on": samples.train_on,
        "samples": samples.fingerprint,
        # It renders tools.
        "chat_template": encoder.tokenizer.chat_template,
        "tokenizer": hashlib.sha256(backend.to_str().encode()).hexdigest(),
    }
    return json.dumps(values, sort_keys=True)
