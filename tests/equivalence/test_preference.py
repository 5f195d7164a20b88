"""Preference training: what does not change its result, and where it starts."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from made_records import write_pairs
from peft import PeftModel
from stack import KINDS, build, flags, near, steps, trained, unwrapped

from dataset import DataCollator, SupervisedDataset
from finetune.batching.reference_cache import ReferenceCache
from finetune.training.preference_loss import FIGURES
from finetune.utils.errors import UserError
from preference_trainer import PreferenceTrainer

pytestmark = pytest.mark.usefixtures("one_thread")
FOUR = ("--max_steps", "3", "--per_device_train_batch_size", "4")
SINGLE = ("--max_steps", "3", "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "4")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "data")


@pytest.fixture(scope="module")
def heard(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("heard") / "data", sound=True)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def make(tiny, data, tmp_path):
    def made(family: str, kind: str, *more: str) -> PreferenceTrainer:
        argv = flags(tiny(family), data, tmp_path / "out", "--stage", "dpo", "--max_samples", "12", *KINDS[kind], *more)
        trainer = build(argv)
        assert isinstance(trainer, PreferenceTrainer)
        return trainer

    return made


def assert_equal(ours: PreferenceTrainer, other: PreferenceTrainer) -> None:
    assert len(steps(ours)) == len(steps(other)) == 3
    for step, expected in zip(steps(ours), steps(other), strict=True):
        assert step.loss == pytest.approx(expected.loss, abs=1e-5)
        assert step.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
    expected = trained(other)
    for name, value in trained(ours).items():
        assert near(value, expected[name]), name
    for number, (one, same) in enumerate(zip(*(each.state.log_history for each in (ours, other)), strict=True)):
        for name in FIGURES if number else FIGURES[:2]:  # whether a margin of zero is above it is rounding
            assert one.get(name) == pytest.approx(same.get(name), abs=1e-4), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["v2_6", "v4_6"])
def test_it_starts_at_ln_2_and_accumulation_equals_a_batch(make, family, kind):
    batch = make(family, kind, *FOUR)
    batch.train()
    assert steps(batch)[0].loss == pytest.approx(math.log(2), abs=1e-5)
    assert steps(batch)[2].loss != pytest.approx(math.log(2), abs=1e-5)
    single = make(family, kind, *SINGLE)
    single.train()
    assert_equal(single, batch)


def test_the_adapter_switched_off_is_the_cached_reference(make):
    cached, switched = (make("v2_6", "lora", *FOUR, "--pref_reference", how) for how in ("cached", "adapter_off"))
    cached.train()
    switched.train()
    assert isinstance(switched.train_dataset, SupervisedDataset)
    assert switched.train_dataset.references is None
    assert_equal(switched, cached)


@pytest.mark.parametrize("loss", ["ipo", "hinge", "orpo", "simpo"])
def test_other_losses_train(make, loss):
    trainer = make("v2_6", "lora", *FOUR, "--pref_loss", loss, "--pref_ftx", "0.1")
    trainer.train()
    assert all(math.isfinite(step.loss) and step.grad_norm > 0 for step in steps(trainer))
    assert isinstance(trainer.train_dataset, SupervisedDataset)
    assert (trainer.train_dataset.references is None) == (loss in ("orpo", "simpo"))


def test_packed_rows_equal_padded_ones(make):
    padded = make("v2_6", "full", *FOUR)
    padded.train()
    packed = make("v2_6", "full", *FOUR, "--packing", "batch", "--packing_tokens", "100000")
    packed.train()
    assert_equal(packed, padded)


@pytest.mark.parametrize("family", ["v2_6", "o2_6", "v4_5", "v4_6", "v4_7"])
def test_both_answers_share_their_media(tiny, data, heard, tmp_path, family):
    """Text, images, videos, and audio for a model that hears; a frame of 4.5 shares its placeholders with others."""
    where = heard if family == "o2_6" else data
    packed = ("--video_packing", "2") if family == "v4_5" else ()
    trainer = build(flags(tiny(family), where, tmp_path / "out", "--stage", "dpo", *packed))
    dataset, collator = trainer.train_dataset, trainer.data_collator
    assert isinstance(dataset, SupervisedDataset)
    assert isinstance(collator, DataCollator)
    examples = [dataset[index] for index in range(8)]
    batch = collator(examples)
    assert len(batch["input_ids"]) == 16
    sizes = [batch[name] for name in ("tgt_sizes", "target_sizes", "target_sizes_videos") if name in batch]
    assert sum(map(len, sizes)) == sum(len(example.tgt_sizes) for example in examples) > 0
    assert len(batch.get("audio_lengths", ())) == sum(len(example.audio) for example in examples)
    model = unwrapped(trainer).eval()
    del batch["sources"], batch["pair_weights"]
    plain = DataCollator(collator.pad_id)
    with torch.no_grad():
        together = model(**batch).row_loss
        for number, example in enumerate(examples):
            for place, each in enumerate((example, example.rejected)):
                alone = plain([_owner(each)])
                del alone["sources"]
                expected = model(**alone).row_loss[0]
                assert torch.allclose(together[number + 8 * place], expected, atol=1e-4)


def _owner(example: Any) -> Any:
    return replace(example, borrows_media=False)


def test_evaluation_has_the_figures_of_the_pairs_at_every_batch_size(make):
    one, four = (make("v2_6", "lora", "--per_device_eval_batch_size", size) for size in ("1", "4"))
    assert one.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)
    for trainer in (one, four):  # an adapter that changes nothing gives both answers the same reward, but for rounding
        random = torch.Generator().manual_seed(0)
        for name, value in trainer.model.named_parameters():
            if ".lora_B" in name:
                value.data.normal_(generator=random)
    found = one.evaluate(), four.evaluate()
    assert 0 < found[0]["eval_rewards/accuracies"] < 1
    for name in ("eval_tokens", *(f"eval_{name}" for name in FIGURES)):
        assert found[0][name] == pytest.approx(found[1][name], abs=1e-4), name


def test_a_cached_reference_is_not_computed_again_and_belongs_to_its_data_and_base(make, data, monkeypatch):
    first = make("v2_6", "full", *FOUR)
    first.train()
    again = make("v2_6", "full", *FOUR)
    monkeypatch.setattr(again, "_computed", lambda dataset: pytest.fail("computed again"))
    again.train()
    assert_equal(again, first)
    policies = [trainer.train_dataset.sample_policy for trainer in (first, again)]  # pyright: ignore
    paths = {ReferenceCache(policy, first._reference_key).path for policy in policies}
    assert len(paths) == 1
    other = make("v4_6", "full", *FOUR)
    assert other._reference_key != first._reference_key


def test_a_trained_model_is_no_reference(make, tmp_path):
    trainer = make("v2_6", "full", *FOUR)
    trainer.state.global_step = 1
    with pytest.raises(UserError, match="has been trained for 1 steps: start again, or restore the cache"):
        trainer.prepare_references()
    adapted = make("v2_6", "lora", *FOUR)
    model = unwrapped(adapted)
    assert isinstance(model, PeftModel)
    adapted.prepare_references()
    expected = adapted.train_dataset.references  # pyright: ignore
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.train_dataset.references = None  # pyright: ignore
    adapted.state.global_step = 1
    (tmp_path / "cache").rename(tmp_path / "lost")
    adapted.prepare_references()
    assert torch.allclose(torch.tensor(adapted.train_dataset.references), torch.tensor(expected), atol=1e-4)  # pyright: ignore


@pytest.mark.parametrize("kind", KINDS)
def test_two_and_two_steps_are_four(make, tmp_path, kind):
    """Bit for bit, with the reference from the cache: the resumed model is another one by then."""
    saved = ("--save_strategy", "steps", "--save_steps", "2", "--max_steps", "4", "--learning_rate", "1e-3")
    whole = make("v2_6", kind, *saved)
    whole.train()
    resumed = make("v2_6", kind, *saved, "--output_dir", str(tmp_path / "again"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert steps(resumed) == steps(whole)
    expected = trained(whole)
    assert [name for name, value in trained(resumed).items() if not torch.equal(value, expected[name])] == []


def test_a_batch_of_4_6_has_the_log_probabilities_of_the_class_of_transformers(tiny, data, tmp_path):
    """As TRL computes them: a row and pixels of its own for every answer, logits of every token. What becomes of them
    is compared with TRL's figures in tests/training/test_preference_loss.py."""
    trainer = build(flags(tiny("v4_6"), data, tmp_path / "out", "--stage", "dpo"))
    dataset, collator = trainer.train_dataset, trainer.data_collator
    assert isinstance(dataset, SupervisedDataset)
    assert isinstance(collator, DataCollator)
    examples = [dataset[index] for index in range(8)]
    batch = collator(examples)
    del batch["sources"], batch["pair_weights"]
    rows = [replace(example, rejected=None) for example in examples]
    rows += [replace(each.rejected, borrows_media=False) for each in examples if each.rejected is not None]
    separate = DataCollator(collator.pad_id)(rows)
    labels = separate.pop("labels")[:, 1:]
    del separate["sources"]
    stock = transformers.MiniCPMV4_6ForConditionalGeneration.from_pretrained(tiny("v4_6"), dtype=torch.float32).eval()
    with torch.no_grad():
        found = unwrapped(trainer).eval()(**batch).row_loss
        likely = stock(**separate).logits[:, :-1].log_softmax(-1)
    picked = likely.gather(2, labels.clamp(min=0)[..., None])[..., 0] * (labels >= 0)
    assert torch.equal(found[:, 1], (labels >= 0).sum(1).float())
    assert torch.allclose(-found[:, 0], picked.sum(1), rtol=1e-5, atol=1e-5)
