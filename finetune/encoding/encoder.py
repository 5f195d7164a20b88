"""``Encoder``: from ``Sample`` to ``Example``, the single encoding path of training, evaluation and chat."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypedDict, Unpack

import numpy as np
from PIL import Image

from finetune.encoding import encoder_settings
from finetune.encoding.alignment import AlignmentError, DecodedMedia, PlaceholderCheck, media_faults
from finetune.encoding.chat_template_check import complete_layout
from finetune.encoding.chat_template_tools import ToolWriter
from finetune.encoding.example import Example, empty_example, example_of
from finetune.encoding.example_size import ExampleSize
from finetune.encoding.log_mel import log_mel
from finetune.encoding.media_sizes import MediaPlan, MediaSize, PictureSize, TrackLength
from finetune.encoding.pixel_inputs import INPUTS, READERS, ImageBackend
from finetune.encoding.timeline_prompt import check_timeline, plan_track, waves_of
from finetune.encoding.video_frames import (
    ExpandedSample,
    VideoFrames,
    decoded,
    expand_videos,
    items_of,
    plan_video,
    probe_video,
    video_options,
)
from finetune.families import FAMILIES, no_timeline, unsupported
from finetune.families.family import Config, Family
from finetune.families.settings import DOWNSAMPLE_MODE, disagreements
from finetune.media import audio, image, transformers_processor
from finetune.media.audio_layout import AudioPlan, plan_audio
from finetune.media.slicing import MERGES, SliceSpec, plan
from finetune.media.small_print import SmallPrint
from finetune.media.video_sampling import VideoOptions
from finetune.sample import DataError, Media, Sample, Track
from finetune.templates.decision_weights import decision_weights
from finetune.templates.duplex_fc import AUDIO_PLACE
from finetune.templates.prompt_types import IGNORE, DuplexName, PromptTokenizer, Spoken, Thinking, TokenizedPrompt
from finetune.templates.tokenizer_view import TokenizerView
from finetune.utils.errors import located
from finetune.utils.log_once import warn_once

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class PromptOptions(TypedDict, total=False):
    """Prompt options that the user can set; see ``PromptLayout``."""

    thinking: Thinking
    enable_thinking: bool | None
    image_ids: bool
    spoken: Spoken
    duplex: DuplexName


class Encoder:
    """Encodes samples for one checkpoint, by its settings.

    Options that are None keep the checkpoint's value. Route of a sample: ``sizes`` reads the media headers, ``plans``
    computes slices and placeholders, ``render`` gives token ids and labels, ``assemble`` decodes the media and checks
    them against the placeholders. ``encode`` does all.

    >>> from tempfile import mkdtemp
    >>> from PIL import Image
    >>> from finetune.checkpoints.base_checkpoint import resolve_base
    >>> from finetune.tokenizers.tokenization import load_tokenizer
    >>> from finetune.sample import Media, Message, Sample, Source, Text
    >>> from finetune.tiny.checkpoint_writer import write_tiny_checkpoint
    >>> base = resolve_base(write_tiny_checkpoint("v2_6", mkdtemp()))
    >>> encoder = Encoder(base.family, load_tokenizer(base.folder), base.settings)
    >>> question = Message("user", (Media("image", Image.new("RGB", (112, 112))), Text("What is it?")))
    >>> turns = (question, Message("assistant", (Text("A dog."),), train=True))
    >>> example = encoder.encode(Sample("0", Source("memory", 0), turns))
    >>> labels = example.labels[example.labels >= 0]  # the answer and its end token
    >>> encoder.tokenizer.decode(labels), example.tgt_sizes.tolist()
    ('A dog.<|im_end|>', [[8, 8]])

    Args:
        family: model family.
        tokenizer: the checkpoint's fast tokenizer; it is not modified.
        config: the checkpoint's settings (``BaseCheckpoint.settings``). Where its files have different values, the
            value in use is logged once.
        max_slice_nums: slices per image.
        max_length: maximum number of tokens of a sample, None for no limit; nothing is truncated.
        refuse_above_pixels: images of more pixels are refused.
        max_pixels: larger images are downscaled to at most this many pixels before slicing; None for never.
        video: video sampling options.
        run_seconds: seconds of audio per run of placeholders.
        image_backend: "pillow", or "fast" to decode JPEG files by simplejpeg.
        unit_weights: weights of decisions of full-duplex records in the loss (``templates.decision_weights``).
        prompt: fields of the prompt layout.

    Raises:
        UserError: the family does not support the image backend, or its image processor needs a missing package.
        MissingTokenError: the tokenizer lacks a token that the family needs.
        TemplateMismatchError: the chat template writes a prefix that the family's prompt does not support.
        CheckpointError: contradicting files, or a value that is not supported.
    """

    def __init__(
        self,
        family: Family,
        tokenizer: PreTrainedTokenizerBase,
        config: Config,
        *,
        max_slice_nums: int | None = None,
        max_length: int | None = None,
        refuse_above_pixels: int | None = None,
        max_pixels: int | None = None,
        video: VideoOptions | None = None,
        run_seconds: float | None = None,
        image_backend: ImageBackend = "pillow",
        unit_weights: Mapping[str, float] | None = None,
        **prompt: Unpack[PromptOptions],
    ) -> None:
        self.family = family
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.refuse_above_pixels = image.MAX_PIXELS if refuse_above_pixels is None else refuse_above_pixels
        self.max_pixels = max_pixels
        self.unit_weights = unit_weights
        self._inputs = INPUTS[family.inputs]
        self._reader = READERS[image_backend]
        self.slicing = encoder_settings.slicing_of(family, config, max_slice_nums)
        self.audio_spec = encoder_settings.audio_of(family, config, run_seconds)
        self.video = video_options(family, config, video)
        # The prompt options count as flags under their names in the checkpoint's files.
        flags = {"max_slice_nums": max_slice_nums, "use_image_id": prompt.get("image_ids")}
        flags["video_max_slice_nums"] = video and video.max_slice_nums
        decided = frozenset(name for name, value in flags.items() if value is not None)
        for line in disagreements(config, family.settings, decided):
            warn_once(logger, f"{family.title}: {line}")
        layout = replace(family.layout(config), **prompt)
        # Options set by the user are not read from the checkpoint's chat template.
        layout = replace(layout, assumed=tuple(name for name in layout.assumed if name not in prompt))
        self.layout = complete_layout(family, layout, tokenizer)
        self._alone = self.layout.duplex == "o45_fc"  # whether each second of user audio is encoded alone
        self.tools = ToolWriter(family, tokenizer, self.layout, FAMILIES)
        self._set_tokens()

    def _set_tokens(self) -> None:
        family, layout = self.family, self.layout
        self.prompt_tokenizer = TokenizerView(self.tokenizer, family.control_tokens, family.required_tokens)
        self._placeholder = self.prompt_tokenizer.control(layout.placeholder)
        # Without this token, the first video raises MissingTokenError.
        has_video = self.prompt_tokenizer.has(layout.video_placeholder)
        self._video_placeholder = self._placeholder
        if has_video:
            self._video_placeholder = self.prompt_tokenizer.control(layout.video_placeholder)
        # Padding is masked, so any id works for a tokenizer without a pad token.
        pad_id = self.tokenizer.pad_token_id
        self.pad_id = pad_id if isinstance(pad_id, int) else 0
        self.stop_ids = [self.prompt_tokenizer.control(token) for token in family.stop_tokens]
        if self.prompt_tokenizer.has(layout.speech_end):
            self.stop_ids.append(self.prompt_tokenizer.control(layout.speech_end))

    @property
    def downsample_mode(self) -> str | None:
        """The downsample_mode that the model must use for these prompts; None for families without the setting."""
        if DOWNSAMPLE_MODE not in self.family.settings:
            return None
        return next(mode for mode, merge in MERGES.items() if merge == self.slicing.merge)

    def sizes(self, sample: Sample) -> tuple[MediaSize, ...]:
        """The size of every medium, in reading order: images by their headers, audio decoded, videos by their index.

        Images are decoded only where their pixels decide the slicing.

        Raises:
            DataError: a medium that cannot be read, or that this family does not support.
        """
        with located(sample.source):
            check_timeline(sample.timeline, self.layout.duplex)
            sizes = tuple(self._media_size(media) for media in sample.media())
        if sample.timeline is None:
            return sizes
        return tuple(PictureSize(*size) if isinstance(size, tuple) else size for size in sizes)

    def _media_size(self, media: Media) -> MediaSize:
        if media.kind == "image" and self.slicing.enlarge == "adaptive":
            return SmallPrint(self._image(media), self.slicing.scale_resolution)
        if media.kind == "image":
            return image.shrunk(image.size(media, self.refuse_above_pixels), self.max_pixels)
        if media.kind == "audio" and self.audio_spec is not None:
            samples = len(audio.load(media))
            if isinstance(media.data, Track):
                return TrackLength(samples, self._alone)
            if samples < self.audio_spec.shortest:
                raise DataError(
                    f"{media} lasts {1000 * samples / self.audio_spec.rate:.0f} ms, and "
                    f"{1000 * self.audio_spec.shortest / self.audio_spec.rate:.0f} ms make one token; remove it"
                )
            return samples
        if media.kind == "video" and self.family.video is not None:
            transformers_processor.check_videos(self.slicing)
            return probe_video(media, self.family.video, self.video, self.refuse_above_pixels)
        raise DataError(f"{media}: {unsupported(self.family, media.kind)}, or remove the record")

    def plans(self, sizes: Sequence[MediaSize], max_slice_nums: int | None = None) -> tuple[MediaPlan, ...]:
        """Placeholders of media of these sizes; ``max_slice_nums`` replaces the encoder's own for images."""
        most = self.slicing.max_slice_nums if max_slice_nums is None else max_slice_nums
        slicing = replace(self.slicing, max_slice_nums=most)
        return tuple(self._planned(size, slicing) for size in sizes)

    def _planned(self, size: MediaSize, slicing: SliceSpec) -> MediaPlan:
        if isinstance(size, VideoFrames):
            return plan_video(size, slicing, self.video)
        if isinstance(size, TrackLength):
            assert self.audio_spec is not None  # ``sizes`` gives one only with it
            return plan_track(size, self.audio_spec)
        if isinstance(size, PictureSize):
            return plan(*size, replace(slicing, max_slice_nums=1))
        if isinstance(size, int):
            assert self.audio_spec is not None  # ``sizes`` gives an int only with it
            return plan_audio(size, self.audio_spec)
        if isinstance(size, SmallPrint):
            return plan(*size.size, slicing, size)
        return plan(*size, slicing)

    def _expanded(self, sample: Sample, plans: Sequence[MediaPlan]) -> ExpandedSample:
        return expand_videos(sample, plans, "" if self.family.video is None else self.family.video.separator)

    def measure(self, sample: Sample, generate: bool | None = None) -> ExampleSize:
        """Size of the encoded sample from its text and its media headers, also of a sample above max_length.

        Args:
            sample: the conversation.
            generate: as in ``encode``; None for True unless the sample ends with an answer.

        Raises:
            DataError: as ``encode``, except for the length and for images that fail only when decoded.
        """
        plans = self.plans(self.sizes(sample))
        if generate is None:
            generate = sample.messages[-1].role != "assistant"
        return self.size_of(sample, plans, self.render(sample, plans, generate))

    def size_of(self, sample: Sample, plans: Sequence[MediaPlan], rendered: TokenizedPrompt) -> ExampleSize:
        """Size of a rendered sample."""
        sizes = items_of(self._expanded(sample, plans), self.slicing.patch_size).grids
        frames = sum(sum(clip.frames) for clip in plans if isinstance(clip, AudioPlan))
        return ExampleSize(len(rendered.input_ids), len(sizes), sum(rows * columns for rows, columns in sizes), frames)

    def encode(self, sample: Sample, generate: bool = False) -> Example:
        """The tensors of a sample.

        Args:
            sample: the conversation.
            generate: end with the generation prompt; a final answer in the sample is dropped, all labels are -100.

        Raises:
            DataError: unreadable media, text the tokenizer cannot represent, turns the template does not support, a
                sample longer than max_length, or (for training) one without labels.
            AlignmentError: placeholders and media inputs disagree.
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
        plans: Sequence[MediaPlan],
        generate: bool = False,
        *,
        prompt_tokenizer: PromptTokenizer | None = None,
    ) -> TokenizedPrompt:
        """Token ids and labels of a sample, with the placeholders of ``plans``.

        Args:
            sample: the conversation.
            plans: one per medium.
            generate: as in ``encode``.
            prompt_tokenizer: this encoder's, as a ``CachedPromptTokenizer`` where a sample is rendered several times.

        Raises:
            DataError: text the tokenizer cannot represent, or turns the template does not support.
        """
        sample = self.tools.expand(sample)
        expanded, layout = self._expanded(sample, plans), self.layout
        if sample.timeline is not None or (expanded.sample is not sample and not layout.ids_beside_video):
            layout = replace(layout, image_ids=False)
        with located(sample.source):
            if sample.timeline is not None:
                if self.family.render_timeline is None or generate:
                    raise DataError(no_timeline(self.family, generate))
                return self.family.render_timeline(*expanded, prompt_tokenizer or self.prompt_tokenizer, layout)
            return self.family.render(*expanded, prompt_tokenizer or self.prompt_tokenizer, layout, generate)

    def assemble(self, sample: Sample, plans: Sequence[MediaPlan], rendered: TokenizedPrompt) -> Example:
        """The tensors of a rendered sample; its media are decoded here.

        Raises:
            DataError: a medium that cannot be decoded.
            AlignmentError: placeholders and media inputs disagree.
        """
        media = self.decode(sample, plans, rendered)
        return example_of(
            rendered,
            media,
            loss_weights=self._loss_weights(sample, rendered),
            from_video=bool(self.layout.video_placeholder) and any(media.items.video),
            source=str(sample.source),
            inputs=self.family.inputs,
        )

    def decode(self, sample: Sample, plans: Sequence[MediaPlan], rendered: TokenizedPrompt) -> DecodedMedia:
        """The decoded media of a rendered sample, which its placeholders match.

        Raises:
            DataError: a medium that cannot be decoded.
            AlignmentError: placeholders and media inputs disagree.
        """
        with located(sample.source):
            return self._decoded(sample, plans, rendered)

    def _decoded(self, sample: Sample, plans: Sequence[MediaPlan], rendered: TokenizedPrompt) -> DecodedMedia:
        expanded = self._expanded(sample, plans)
        images = decoded(expanded, self._image, self.video.max_pixels)
        patches, grids = INPUTS[self.family.inputs].cut(images, self.slicing)
        items = items_of(expanded, self.slicing.patch_size)
        log_mels = self._log_mels(sample)
        audio_plans = [found for found in plans if isinstance(found, AudioPlan)]
        audio_place = AUDIO_PLACE if self._alone and sample.timeline is not None else self._placeholder
        spans = PlaceholderCheck(
            self.layout, self.slicing.patch_size, self._placeholder, self._video_placeholder, audio_place
        )
        if faults := [*spans.faults(rendered, items, audio_plans), *media_faults(items, grids, audio_plans, log_mels)]:
            raise AlignmentError(f"{sample.source}: {'; '.join(faults)}; please report this record")
        return DecodedMedia(items, patches, log_mels)

    def _log_mels(self, sample: Sample) -> tuple[torch.Tensor, ...]:
        """Log-mel chunks of all audio clips."""
        if self.audio_spec is None:
            return ()
        waves = (waves_of(media, alone=self._alone) for media in sample.media("audio"))
        return tuple(chunk for each in waves for wave in each for chunk in log_mel(wave, self.audio_spec))

    def _loss_weights(self, sample: Sample, rendered: TokenizedPrompt) -> list[float] | None:
        """Weights of the labels of a full-duplex record, if decisions have some."""
        if self.unit_weights is None or sample.timeline is None:
            return None
        ids, labels = rendered.input_ids, rendered.labels
        return decision_weights(ids, labels, self.prompt_tokenizer, self.unit_weights)

    def _image(self, media: Media) -> Image.Image:
        """A decoded image, downscaled by ``max_pixels``."""
        decoded_image = image.load(media, self.refuse_above_pixels, self._reader)
        return image.shrink(decoded_image, self.max_pixels)

    def empty(self, source: str) -> Example:
        """An example of one padding token without label or image, in place of a skipped sample."""
        patches = np.zeros((0, 3 * self.slicing.patch_size**2), self._inputs.dtype)
        return empty_example(self.pad_id, patches, source, self.family.inputs)

    def fits(self, rendered: TokenizedPrompt) -> bool:
        """Whether the number of tokens is within max_length."""
        return self.max_length is None or len(rendered.input_ids) <= self.max_length

    def check_labels(self, sample: Sample, rendered: TokenizedPrompt) -> None:
        """Refuses a sample without labels.

        Raises:
            DataError: no token has a label.
        """
        if rendered.labels.count(IGNORE) == len(rendered.labels):
            raise DataError(f"{sample.source}: no token has a label; train at least one answer or remove the record")

    def check_length(self, sample: Sample, rendered: TokenizedPrompt) -> None:
        """Refuses a sample above max_length.

        Raises:
            DataError: with its length, the number of image tokens, and what to do.
        """
        tokens, items = len(rendered.input_ids), len(rendered.image_bounds)
        if not self.fits(rendered):
            visual = sum(last - first for first, last in rendered.image_bounds)
            audio_tokens = sum(last - first for first, last in rendered.audio_bounds)
            also = f", {audio_tokens} for audio" if audio_tokens else ""
            lower = "max_slice_nums or video_max_frames" if any(sample.media("video")) else "max_slice_nums"
            raise DataError(
                f"{sample.source}: {tokens} tokens ({visual} of them for {items} image slices{also}), the limit is "
                f"{self.max_length}; raise model_max_length, lower {lower}, or shorten or split the record"
            )
