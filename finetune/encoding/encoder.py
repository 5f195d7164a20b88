"""A conversation becomes tensors: the one path of training, evaluation and chat."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypedDict, Unpack

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from finetune.encoding.alignment import AlignmentError, Spans, media_faults
from finetune.encoding.chat_template_check import complete_layout
from finetune.encoding.chat_template_tools import ToolWriter
from finetune.encoding.example import Example
from finetune.encoding.example_size import ExampleSize
from finetune.encoding.log_mel import log_mel
from finetune.encoding.pixel_inputs import INPUTS, ImageBackend
from finetune.encoding.text_inputs import text_tensors
from finetune.encoding.video_frames import (
    Spread,
    VideoFrames,
    VideoPlan,
    decoded,
    items_of,
    look,
    plan_footage,
    spread,
    video_options,
)
from finetune.families import FAMILIES
from finetune.families.family import Config, Family
from finetune.families.settings import DOWNSAMPLE_MODE, disagreements
from finetune.media import audio, image, transformers_processor
from finetune.media.audio_layout import AudioSpec, Sound, sound
from finetune.media.slicing import MERGES, SlicePlan, SliceSpec, plan
from finetune.media.small_print import SmallPrint, check_installed
from finetune.media.video_sampling import VideoOptions
from finetune.sample import DataError, Media, MediaKind, Sample
from finetune.templates.rendering import IGNORE, Layout, Rendered, Spoken, Thinking
from finetune.templates.rendering import Vocabulary as Spelling
from finetune.templates.tokenizer_view import TextError, TokenizerView
from finetune.utils.errors import UserError
from finetune.utils.log_once import warn_once

logger = logging.getLogger(__name__)

Extent = tuple[int, int] | SmallPrint | int | VideoFrames
"""Size of a medium: (width, height) in pixels of an image, samples of a clip, the chosen frames of a video.

Images whose pixels decide how they are cut are there decoded.
"""
Planned = SlicePlan | Sound | VideoPlan
"""How a medium takes its place in the prompt."""


class PromptOptions(TypedDict, total=False):
    """How prompts are written, where the user has a say; see ``Layout``."""

    thinking: Thinking
    enable_thinking: bool | None
    image_ids: bool
    spoken: Spoken


def _not_taken(family: Family, kind: MediaKind) -> str:
    """That a family has no input for a kind of media, and which have."""
    has: Callable[[Family], object] = (lambda each: each.video) if kind == "video" else (lambda each: each.audio_spec)
    able = ", ".join(each.title for each in FAMILIES if has(each) is not None)
    kinds = ["images", *(["videos"] if family.video else []), *(["sound"] if family.audio_spec else []), "text"]
    taken = f"{', '.join(kinds[:-1])} and {kinds[-1]}"
    return f"{family.title} takes {taken}, no {kind}; use a model that does ({able})"


class Encoder:
    """Samples to examples for one checkpoint.

    Args:
        family: the generation.
        tokenizer: the checkpoint's fast tokenizer; it is not changed.
        layout: how prompts are written; what only the checkpoint's chat template can tell is taken from there.
        slicing: how images are cut.
        max_length: most tokens of a sample, or None for no limit; nothing is ever cut.
        max_pixels: most pixels of an image.
        shrink_pixels: images of more pixels are shrunk to about so many before they are cut; None for none.
        hearing: how the checkpoint hears; None for one that cannot.
        video: how videos are looked at, where the user has a say.
        image_backend: how images are decoded and resized: "pillow", or "fast" with some bytes one level off.

    Raises:
        UserError: the family keeps the pixels of its published image processor, and another backend is asked for; or
            that processor needs a package that is missing.
        MissingTokenError: the tokenizer lacks a token that the family needs.
        TemplateMismatchError: its chat template begins in a way that the family's prompt cannot.
    """

    def __init__(
        self,
        family: Family,
        tokenizer: PreTrainedTokenizerBase,
        *,
        layout: Layout,
        slicing: SliceSpec,
        max_length: int | None,
        max_pixels: int = image.MAX_PIXELS,
        shrink_pixels: int | None = None,
        hearing: AudioSpec | None = None,
        video: VideoOptions = VideoOptions(),  # noqa: B008 - frozen
        image_backend: ImageBackend = "pillow",
    ) -> None:
        if image_backend not in INPUTS[family.inputs].backends:
            raise UserError(
                f"--image_backend {image_backend}: {family.title} keeps the pixels of its published image processor, "
                "which has its own way to resize; leave the option out"
            )
        if slicing.enlarge == "adaptive":
            check_installed()
        self.family = family
        self.tokenizer = tokenizer
        self.layout = complete_layout(family, layout, tokenizer)
        self.slicing = slicing
        self.max_length = max_length
        self.max_pixels = max_pixels
        self.shrink_pixels = shrink_pixels
        self.hearing = hearing
        self.video = video
        self.tools = ToolWriter(family, tokenizer, self.layout, FAMILIES)
        self.vocabulary = TokenizerView(tokenizer, family.control_tokens, family.required_tokens)
        self._inputs = INPUTS[family.inputs]
        self._backend = self._inputs.backends[image_backend]
        self._placeholder = self.vocabulary.control(layout.placeholder)
        # A checkpoint without this token is told so by the first video.
        seen_moving = self.vocabulary.has(layout.video_placeholder)
        self._moving = self.vocabulary.control(layout.video_placeholder) if seen_moving else self._placeholder
        # Padding is masked, so any id serves a tokenizer that names none.
        self.pad_id = tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0
        self.stop_ids = [self.vocabulary.control(token) for token in family.stop_tokens]
        if self.vocabulary.has(layout.speech_end):
            self.stop_ids.append(self.vocabulary.control(layout.speech_end))

    @classmethod
    def from_config(
        cls,
        family: Family,
        tokenizer: PreTrainedTokenizerBase,
        config: Config,
        *,
        max_slice_nums: int | None = None,
        max_length: int | None = None,
        max_pixels: int | None = None,
        shrink_pixels: int | None = None,
        video: VideoOptions | None = None,
        run_seconds: float | None = None,
        image_backend: ImageBackend = "pillow",
        **prompt: Unpack[PromptOptions],
    ) -> Encoder:
        """The encoder of a checkpoint from its settings (``Checkpoint.settings``); None keeps the checkpoint's value.

        Where files of the folder hold different values, the log says once which is used.
        Further options replace fields of the layout of the same name; to leave one out keeps the family's value.

        Raises:
            CheckpointError: files of the folder that cannot both be right, or a value that is not supported.
        """
        slicing, hearing = family.slice_spec(config), family.audio_spec and family.audio_spec(config)
        flags = {
            "max_slice_nums": max_slice_nums,
            "use_image_id": prompt.get("image_ids"),
            "video_max_slice_nums": video and video.max_slice_nums,
        }
        decided = frozenset(name for name, value in flags.items() if value is not None)
        for line in disagreements(config, family.settings, decided):
            warn_once(logger, f"{family.title}: {line}")
        if max_slice_nums is not None:
            slicing = replace(slicing, max_slice_nums=max_slice_nums)
        if run_seconds is not None and hearing is not None:
            hearing = replace(hearing, run_seconds=run_seconds)
        layout = replace(family.layout(config), **prompt)
        return cls(
            family,
            tokenizer,
            # What the user has decided the checkpoint's chat template is not asked for.
            layout=replace(layout, assumed=tuple(name for name in layout.assumed if name not in prompt)),
            slicing=slicing,
            max_length=max_length,
            max_pixels=image.MAX_PIXELS if max_pixels is None else max_pixels,
            shrink_pixels=shrink_pixels,
            hearing=hearing,
            video=video_options(family, config, video),
            image_backend=image_backend,
        )

    @property
    def downsample_mode(self) -> str | None:
        """The mode in which the network has to work for prompts of this encoder; None where it has one way only."""
        if DOWNSAMPLE_MODE not in self.family.settings:
            return None
        return next(mode for mode, merge in MERGES.items() if merge == self.slicing.merge)

    def sizes(self, sample: Sample) -> tuple[Extent, ...]:
        """The size of every medium, in reading order: of images as they are cut, from their headers; of sound decoded.

        Images are decoded too where their pixels decide how they are cut.

        Raises:
            DataError: a medium that cannot be read, or that this family has no input for.
        """
        return tuple(self._extent(media, sample) for media in sample.media())

    def _extent(self, media: Media, sample: Sample) -> Extent:
        if media.kind == "image" and self.slicing.enlarge == "adaptive":
            return SmallPrint(self._picture(media, sample), self.slicing.scale_resolution)
        if media.kind == "image":
            return image.shrunk(image.size(media, sample.source, self.max_pixels), self.shrink_pixels)
        if media.kind == "audio" and self.hearing is not None:
            samples = len(audio.load(media, sample.source))
            if samples < self.hearing.shortest:
                raise DataError(
                    f"{sample.source}: {media} lasts {1000 * samples / self.hearing.rate:.0f} ms, and "
                    f"{1000 * self.hearing.shortest / self.hearing.rate:.0f} ms make a token; remove it"
                )
            return samples
        if media.kind == "video" and self.family.video is not None:
            transformers_processor.check_videos(self.slicing)
            return look(media, sample.source, self.family.video, self.video, self.max_pixels)
        raise DataError(f"{sample.source}: {media}: {_not_taken(self.family, media.kind)}, or remove the record")

    def plans(self, sizes: Sequence[Extent], max_slice_nums: int | None = None) -> tuple[Planned, ...]:
        """How media of these sizes take their places; None for the encoder's own most slices of images."""
        most = self.slicing.max_slice_nums if max_slice_nums is None else max_slice_nums
        slicing = replace(self.slicing, max_slice_nums=most)
        return tuple(self._planned(size, slicing) for size in sizes)

    def _planned(self, size: Extent, slicing: SliceSpec) -> Planned:
        if isinstance(size, VideoFrames):
            return plan_footage(size, slicing, self.video)
        if isinstance(size, int):
            assert self.hearing is not None  # or there would be no such size
            return sound(size, self.hearing)
        if isinstance(size, SmallPrint):
            return plan(*size.size, slicing, size)
        return plan(*size, slicing)

    def _spread(self, sample: Sample, plans: Sequence[Planned]) -> Spread:
        return spread(sample, plans, "" if self.family.video is None else self.family.video.between)

    def measure(self, sample: Sample, generate: bool | None = None) -> ExampleSize:
        """Size of the encoded sample from its text and its image headers; a sample above max_length is measured too.

        Args:
            sample: the conversation.
            generate: as in ``encode``; None for True unless the sample ends with an answer.

        Raises:
            DataError: as ``encode``, except for length and for images whose header is right and whose body is not.
        """
        plans = self.plans(self.sizes(sample))
        if generate is None:
            generate = sample.messages[-1].role != "assistant"
        return self.measured(sample, plans, self.render(sample, plans, generate))

    def measured(self, sample: Sample, plans: Sequence[Planned], rendered: Rendered) -> ExampleSize:
        """Size of a sample that has been planned and rendered."""
        sizes = items_of(self._spread(sample, plans), self.slicing.patch_size).grids
        frames = sum(sum(heard.frames) for heard in plans if isinstance(heard, Sound))
        return ExampleSize(len(rendered.input_ids), len(sizes), sum(rows * columns for rows, columns in sizes), frames)

    def encode(self, sample: Sample, generate: bool = False) -> Example:
        """The tensors of a sample.

        Args:
            sample: the conversation.
            generate: end where the model has to answer; a final answer in the sample is left out, all labels are -100.

        Raises:
            DataError: an image that cannot be read, text the tokenizer cannot represent, turns the template lacks,
                a sample longer than max_length, or (to train) one without any labelled token.
            AlignmentError: placeholders, items and patches disagree.
        """
        plans = self.plans(self.sizes(sample))
        rendered = self.render(sample, plans, generate)
        self.check_length(sample, rendered)
        if not generate:
            self.check_labels(sample, rendered)
        return self.assemble(sample, plans, rendered)

    def render(
        self,
        sample: Sample,
        plans: Sequence[Planned],
        generate: bool = False,
        *,
        vocabulary: Spelling | None = None,
    ) -> Rendered:
        """Ids and labels of a sample whose media take their places by ``plans``.

        Args:
            sample: the conversation.
            plans: one per medium.
            generate: as in ``encode``.
            vocabulary: this encoder's, in a ``Remembered`` where a sample is rendered several times.

        Raises:
            DataError: text the tokenizer cannot represent, or turns the template lacks.
        """
        sample = self.tools.written(sample)
        shown, layout = self._spread(sample, plans), self.layout
        if shown.sample is not sample and not layout.ids_beside_video:
            layout = replace(layout, image_ids=False)
        try:
            return self.family.render(*shown, vocabulary or self.vocabulary, layout, generate)
        except TextError as error:
            raise DataError(f"{sample.source}: {error}") from error

    def assemble(self, sample: Sample, plans: Sequence[Planned], rendered: Rendered) -> Example:
        """The tensors of a sample that has been planned and rendered; here its images are decoded.

        Raises:
            DataError: a medium that cannot be decoded.
            AlignmentError: placeholders, items and patches disagree.
        """
        shown = self._spread(sample, plans)
        pictures = decoded(shown, lambda media: self._picture(media, sample), self.video.max_pixels)
        patches, cut = self._backend.cut(pictures, self.slicing)
        items = items_of(shown, self.slicing.patch_size)
        clips = self._clips(sample)
        heard = [found for found in plans if isinstance(found, Sound)]
        spans = Spans(self.layout, self.slicing.patch_size, self._placeholder, self._moving)
        if faults := [*spans.faults(rendered, items, heard), *media_faults(items, cut, heard, clips)]:
            raise AlignmentError(f"{sample.source}: {'; '.join(faults)}; please report this record")
        told_apart = bool(self.layout.video_placeholder) and any(items.video)
        return Example(
            **text_tensors(rendered),
            patches=patches,
            tgt_sizes=torch.tensor(items.grids, dtype=torch.int64).reshape(-1, 2),
            temporal_ids=torch.tensor(items.times, dtype=torch.int64),
            group_sizes=torch.tensor(items.groups) if any(size > 1 for size in items.groups) else None,
            from_video=torch.tensor(items.video) if told_apart else None,
            audio=clips,
            source=str(sample.source),
            inputs=self.family.inputs,
        )

    def _clips(self, sample: Sample) -> tuple[torch.Tensor, ...]:
        """Log-mel frames of all sound, in pieces that the network takes."""
        if self.hearing is None:
            return ()
        waves = (audio.load(media, sample.source) for media in sample.media("audio"))
        return tuple(piece for wave in waves for piece in log_mel(wave, self.hearing))

    def _picture(self, media: Media, sample: Sample) -> Image.Image:
        """A decoded image in the size in which it is cut."""
        picture = image.load(media, sample.source, self.max_pixels, self._backend.read)
        return image.shrink(picture, self.shrink_pixels)

    def empty(self, source: str) -> Example:
        """An example of one padding token that teaches nothing and has no image."""
        return Example(
            input_ids=torch.tensor([self.pad_id]),
            labels=torch.tensor([IGNORE]),
            position_ids=torch.zeros(1, dtype=torch.int64),
            patches=torch.zeros(0, 3 * self.slicing.patch_size**2, dtype=self._inputs.dtype),
            tgt_sizes=torch.zeros(0, 2, dtype=torch.int64),
            image_bound=torch.zeros(0, 2, dtype=torch.int64),
            temporal_ids=torch.zeros(0, dtype=torch.int64),
            source=source,
            inputs=self.family.inputs,
        )

    def fits(self, rendered: Rendered) -> bool:
        """Whether the ids are within max_length."""
        return self.max_length is None or len(rendered.input_ids) <= self.max_length

    def check_labels(self, sample: Sample, rendered: Rendered) -> None:
        """Refuses a sample that teaches nothing.

        Raises:
            DataError: no token carries loss.
        """
        if rendered.labels.count(IGNORE) == len(rendered.labels):
            raise DataError(f"{sample.source}: no token carries loss; train at least one answer or remove the record")

    def check_length(self, sample: Sample, rendered: Rendered) -> None:
        """Refuses a sample above max_length.

        Raises:
            DataError: naming its length, what of it is images, and what to do.
        """
        tokens, items = len(rendered.input_ids), len(rendered.image_bounds)
        if not self.fits(rendered):
            visual = sum(last - first for first, last in rendered.image_bounds)
            heard = sum(last - first for first, last in rendered.audio_bounds)
            also = f", {heard} for sound" if heard else ""
            lower = "max_slice_nums or video_max_frames" if any(sample.media("video")) else "max_slice_nums"
            raise DataError(
                f"{sample.source}: {tokens} tokens ({visual} of them for {items} image slices{also}), the limit is "
                f"{self.max_length}; raise model_max_length, lower {lower}, or shorten or split the record"
            )
