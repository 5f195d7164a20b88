"""Prompt o45_fc of full-duplex records: fits audio placeholders into the ids and labels that duplex_sdk.py has made.

A unit has slots, each in a pair of tokens: user audio, events, what the model says, and what it does beside that
(thinking, tool calls). 24 tokens are new; their ids follow the published vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from finetune.media.audio_layout import AudioPlan
from finetune.sample import Media, Sample
from finetune.templates.prompt_types import TokenizedPrompt

FIRST_ID = 151_748
"""Rows of the published embedding table; the id of the first new token."""
NEW_TOKENS = (
    *("<user_video_slot>", "</user_video_slot>", "<user_audio_slot>", "</user_audio_slot>"),
    *("<input_event_slot>", "</input_event_slot>", "<tool_response_event>", "</tool_response_event>"),
    *("<tool_call_id>", "</tool_call_id>", "<|tool_started|>", "<|event_budget_reached|>"),
    *("<|tool_response_streaming|>", "<standalone_event>", "</standalone_event>"),
    *("<ai_spoken_slot>", "</ai_spoken_slot>", "<ai_non_spoken_slot>", "</ai_non_spoken_slot>"),
    *("<|no_action|>", "<|non_spoken_eos|>", "<|non_spoken_budget_reached|>", "<|non_spoken_hold|>"),
    "<|non_spoken_abort|>",
)
"""The new tokens in the order of their ids."""
LAST_ID = FIRST_ID + len(NEW_TOKENS)
"""Rows of the embedding table with the new tokens."""
_ID = {token: FIRST_ID + number for number, token in enumerate(NEW_TOKENS)}
SPOKEN_SLOT = (_ID["<ai_spoken_slot>"], _ID["</ai_spoken_slot>"])
"""The tokens around what the model says in a unit."""
PUBLISHED_IDS: Mapping[str, int] = {
    "<unk>": 128244,
    "<tool_call>": 151657,
    "</tool_call>": 151658,
    "<tool_response>": 151665,
    "</tool_response>": 151666,
    "<think>": 151667,
    "</think>": 151668,
    "<image>": 151669,
    "</image>": 151670,
    "<unit>": 151683,
    "</unit>": 151684,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<|audio_start|>": 151697,
    "<|audio|>": 151698,
    "<|audio_end|>": 151699,
    "<|listen|>": 151705,
    "<|speak|>": 151706,
    "<|turn_eos|>": 151717,
    "<|chunk_eos|>": 151718,
    "<|tts_pad|>": 151722,
}
"""Tokens of the published vocabulary that the prompt has, under their published names."""
AUDIO_PLACE = PUBLISHED_IDS["<|audio|>"]
"""The token at the places of audio, in place of the <unk> of other prompts."""
_OPEN = PUBLISHED_IDS["<|audio_start|>"]


def render_prepared(sample: Sample, plans: Sequence[AudioPlan]) -> TokenizedPrompt:
    """The ids and labels of the package; audio of the system turn gets as many places as the audio tower gives tokens.

    Args:
        sample: a sample with prepared ids.
        plans: placeholders of every audio clip in reading order: those of the system turn, then the user audio, which
            has one run per unit.
    """
    assert sample.timeline is not None
    assert sample.timeline.prepared is not None
    first = sample.messages[0]
    references = sum(isinstance(part, Media) for part in first.parts) if first.role == "system" else 0
    rendered = TokenizedPrompt()
    inside = iter(plans[:references])
    prepared = sample.timeline.prepared
    for token, label in zip(prepared.ids, prepared.labels, strict=True):
        rendered.add([token])
        rendered.labels[-1] = label
        if token == _OPEN:
            for run in next(inside).runs:
                rendered.add_run(run, AUDIO_PLACE)
    own = [run for plan in plans[references:] for run in plan.runs]
    found = list(_runs(rendered.input_ids))[references:]
    rendered.audio_bounds += found
    assert [last - start for start, last in found] == own, (found, own)
    return rendered


def _runs(ids: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The half-open ranges of neighbouring audio placeholders."""
    place = 0
    for audio, group in groupby(ids, key=lambda token: token == AUDIO_PLACE):
        end = place + len(list(group))
        if audio:
            yield place, end
        place = end
