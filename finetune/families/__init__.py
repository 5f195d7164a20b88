"""The supported model families, and the detection of a checkpoint's family from its config.json."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version

from finetune.families.family import Config, Family
from finetune.families.llama3_v2_5 import LLAMA3_V2_5
from finetune.families.o2_6 import O2_6
from finetune.families.o4_5 import O4_5
from finetune.families.ocr1_0 import OCR1_0
from finetune.families.v2_0 import V2_0
from finetune.families.v2_6 import V2_6
from finetune.families.v4_0 import V4_0
from finetune.families.v4_5 import V4_5
from finetune.families.v4_6 import V4_6
from finetune.families.v4_7 import V4_7
from finetune.sample import MediaKind
from finetune.utils.errors import UserError

FAMILIES: tuple[Family, ...] = (V2_0, LLAMA3_V2_5, V2_6, O2_6, V4_0, V4_5, O4_5, V4_6, V4_7, OCR1_0)


class UnknownFamilyError(UserError):
    """A checkpoint of no supported family, or of one that the installed transformers does not support."""


def detect(config: Config) -> Family:
    """The family of a checkpoint, from its config.json as a dictionary.

    Raises:
        UnknownFamilyError: no family matches; the message lists what was read and what is supported. Or as
            ``check_transformers``.
    """
    for family in FAMILIES:
        if family.matches(config):
            check_transformers(family)
            return family
    keys = ("model_type", "architectures", "version", "hidden_size", "vocab_size", "query_num", "vision_encoder")
    read = ", ".join(f"{key}={config[key]!r}" for key in keys if key in config) or "none of the expected keys"
    supported = "; ".join(f"{family.title} ({family.hub_id})" for family in FAMILIES)
    raise UnknownFamilyError(f"unknown checkpoint: config.json has {read}. Supported: {supported}")


def check_transformers(family: Family, installed: str | None = None) -> None:
    """Checks that transformers has the model classes of a family.

    Args:
        family: model family.
        installed: version of transformers; None for the installed one.

    Raises:
        UnknownFamilyError: it is too old; the message has both versions.
    """
    if family.transformers and _release(installed or version("transformers")) < _release(family.transformers):
        raise UnknownFamilyError(
            f"{family.title} needs transformers {family.transformers} or newer, installed is "
            f"{installed or version('transformers')}: pip install 'transformers>={family.transformers}'"
        )


def usable(installed: str | None = None) -> tuple[Family, ...]:
    """The families that a version of transformers supports; None for the installed version."""
    given = installed or version("transformers")
    return tuple(each for each in FAMILIES if not each.transformers or _release(given) >= _release(each.transformers))


def _release(number: str) -> tuple[int, int]:
    """Major and minor number of a version."""
    major, minor, *_ = number.split(".")
    return int(major), int(minor)


def by_name(name: str) -> Family:
    """The family called ``name``.

    Raises:
        UnknownFamilyError: no such family; the message lists the names.
    """
    for family in FAMILIES:
        if family.name == name:
            return family
    raise UnknownFamilyError(f"unknown family {name!r}; known: {', '.join(family.name for family in FAMILIES)}")


def no_timeline(family: Family, generate: bool) -> str:
    """The message that a family has no full-duplex prompt, with those that have one; or that it is no question."""
    if family.render_timeline is not None and generate:
        return "is a full-duplex record, which has no question to answer; leave it out here"
    able = ", ".join(each.title for each in FAMILIES if each.render_timeline is not None)
    return f"is a full-duplex record, and {family.title} has no prompt for it; use a model that has one ({able})"


def unsupported(family: Family, kind: MediaKind) -> str:
    """The message that a family does not support a kind of media, with the families that do."""
    has: Callable[[Family], object] = (lambda each: each.video) if kind == "video" else (lambda each: each.audio_spec)
    able = ", ".join(each.title for each in FAMILIES if has(each) is not None)
    kinds = ["images", *(["videos"] if family.video else []), *(["audio"] if family.audio_spec else []), "text"]
    supported = f"{', '.join(kinds[:-1])} and {kinds[-1]}"
    return f"{family.title} takes {supported}, no {kind}; use a model that does ({able})"
