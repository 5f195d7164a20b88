"""What a full-duplex record needs for the prompt of a run: whether it can be written in it, and how it is heard."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from finetune.encoding.media_sizes import TrackLength
from finetune.media import audio
from finetune.media.audio_layout import AudioPlan, AudioSpec, plan_audio
from finetune.sample import DataError, Media, Track
from finetune.templates.prompt_types import DuplexName
from finetune.timeline import Timeline

DUPLEX_FLAG = "--duplex_prompt"


def check_timeline(timeline: Timeline | None, prompt: DuplexName) -> None:
    """Refuses a timeline that cannot be written in a prompt; None, for a conversation, can.

    Raises:
        DataError: why, and what to do.
    """
    if timeline is None:
        return
    if prompt == "o45_fc" and timeline.prepared is None:
        raise DataError(
            f"is a timeline of seconds ('duplex'), and {DUPLEX_FLAG} o45_fc takes records of minicpm-o5-sdk alone: "
            "leave the flag out, or write the record with the package"
        )
    if prompt == "native" and timeline.unsupported:
        raise DataError(
            f"has {', '.join(timeline.unsupported)}, which the native prompt has no place for: remove it, or train "
            f"in the prompt that has ({DUPLEX_FLAG} o45_fc)"
        )


def plan_track(length: TrackLength, spec: AudioSpec) -> AudioPlan:
    """The placeholders of user audio, one run per second; encoded as a whole, or every second alone."""
    if not length.alone:
        return plan_audio(length.samples, replace(spec, run_seconds=1.0))
    unit = plan_audio(spec.rate, spec)
    count = length.samples // spec.rate
    return AudioPlan(unit.runs * count, unit.frames * count)


def waves_of(media: Media, *, alone: bool) -> list[np.ndarray]:
    """The waveforms of an audio clip that are encoded by themselves: all of it, or every second of user audio.

    Raises:
        DataError: it cannot be decoded.
    """
    wave = audio.load(media)
    split = alone and isinstance(media.data, Track)
    return np.split(wave, range(audio.SAMPLING_RATE, len(wave), audio.SAMPLING_RATE)) if split else [wave]
