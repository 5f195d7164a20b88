"""Prompt of the ChatML generations."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.media.slicing import Plan
from finetune.sample import Sample
from finetune.templates.rendering import Layout, Rendered, Vocabulary

ROLES = ("system", "user", "assistant")


def render(sample: Sample, plans: Sequence[Plan], vocabulary: Vocabulary, layout: Layout, generate: bool) -> Rendered:
    """Not written yet."""
    raise NotImplementedError
