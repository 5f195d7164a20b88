"""Batch size, accumulation, gradient checkpointing and merging do not change the result of a training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from made_records import write_records
from peft import PeftModel
from stack import FAMILIES, KINDS, OTHERS, build, flags, near, steps, trained, unwrapped

from dataset import DataCollator, SupervisedDataset
from finetune.models import MiniCPMV
from trainer import CPMTrainer

FOUR = ("--max_steps", "4", "--per_device_train_batch_size", "4")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_records(tmp_path_factory.mktemp("equivalence") / "data")


@pytest.fixture(params=[(family, kind) for family in FAMILIES for kind in KINDS], ids="-".join)
def make(request, tiny, data, tmp_path):
    """Builds the trainer of some flags; runs the test once per family and way of training."""
    family, kind = request.param

    def made(*more: str) -> CPMTrainer:
        return build(flags(tiny(family), data, tmp_path / "out", *KINDS[kind], *more))

    return made


@pytest.fixture(params=OTHERS)
def make_other(request, tiny, data, tmp_path):
    """As ``make``, for the other generations, in full."""
    return lambda *more: build(flags(tiny(request.param), data, tmp_path / "out", *more))


def assert_equal(ours: CPMTrainer, other: CPMTrainer, loss: float, norm: float) -> None:
    assert len(steps(ours)) == len(steps(other)) == 4
    for number, (step, expected) in enumerate(zip(steps(ours), steps(other), strict=True), 1):
        assert step.loss == pytest.approx(expected.loss, abs=loss), f"loss of step {number}"
        assert step.grad_norm == pytest.approx(expected.grad_norm, rel=norm), f"gradient norm of step {number}"
    expected = trained(other)
    for name, value in trained(ours).items():
        assert near(value, expected[name]), name


def test_accumulation_equals_a_batch_and_is_the_mean_over_tokens(make):
    batch = make(*FOUR)
    examples, collator = batch.train_dataset, batch.data_collator
    assert isinstance(examples, SupervisedDataset)
    assert isinstance(collator, DataCollator)
    # Training starts in train mode; with every dropout 0 it computes the same.
    total = count = 0.0
    for index in range(4):
        inputs = collator([examples[index]])
        del inputs["sources"]
        with torch.no_grad():
            nll, tokens = unwrapped(batch)(**inputs).row_loss.sum(0).tolist()
        total, count = total + nll, count + tokens
    batch.train()
    assert steps(batch)[0].loss == pytest.approx(total / count, abs=1e-5)
    single = make("--max_steps", "4", "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "4")
    single.train()
    assert_equal(single, batch, loss=1e-5, norm=2e-5)


def test_accumulation_equals_a_batch_in_every_generation(make_other):
    batch = make_other(*FOUR)
    batch.train()
    single = make_other("--max_steps", "4", "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "4")
    single.train()
    assert_equal(single, batch, loss=1e-5, norm=2e-5)


def test_checkpointing_changes_nothing_in_any_generation(make_other):
    check_checkpointing(make_other)


def test_checkpointing_changes_nothing(make):
    check_checkpointing(make)


def check_checkpointing(make):
    plain, recomputed = make(*FOUR), make(*FOUR, "--gradient_checkpointing", "true")
    plain.train()
    recomputed.train()
    assert not any(getattr(module, "gradient_checkpointing", False) for module in unwrapped(plain).modules())
    assert any(getattr(module, "gradient_checkpointing", False) for module in unwrapped(recomputed).modules())
    assert_equal(recomputed, plain, loss=1e-6, norm=1e-6)


def test_evaluation_at_batch_one_equals_batch_four(make):
    one, four = (make("--per_device_eval_batch_size", size).evaluate() for size in ("1", "4"))
    assert one["eval_tokens"] == four["eval_tokens"]
    assert one["eval_loss"] == pytest.approx(four["eval_loss"], abs=1e-5)


def test_a_text_only_batch_trains_the_language_model_alone(make):
    """The dummy image adds nothing: the gradient is that of the language model by itself, of the towers zero."""
    trainer = make()
    model, examples, collator = unwrapped(trainer), trainer.train_dataset, trainer.data_collator
    assert isinstance(examples, SupervisedDataset)
    assert isinstance(collator, DataCollator)
    inputs = collator([examples[2], examples[3]])  # the second rank's of step 1
    del inputs["sources"]
    assert len(inputs["tgt_sizes"]) == 0
    model(**inputs).loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, MiniCPMV)
    embeddings = base.get_input_embeddings()(inputs["input_ids"]) * base.embedding_scale
    text = {name: inputs[name] for name in ("attention_mask", "position_ids")}
    logits = base.llm(inputs_embeds=embeddings, use_cache=False, **text).logits
    targets = inputs["labels"][:, 1:].flatten()
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(ours.pop(name), parameter.grad, rtol=1e-4, atol=1e-6), name
    assert ours
    assert not any(gradient.any() for gradient in ours.values()), "a tower was trained by a batch without images"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_adapter_computes_the_same(tiny, data, tmp_path, family):
    trainer = build(flags(tiny(family), data, tmp_path / "out", *KINDS["lora"], *FOUR, "--learning_rate", "1e-3"))
    examples, collator = trainer.train_dataset, trainer.data_collator
    assert isinstance(examples, SupervisedDataset)
    assert isinstance(collator, DataCollator)
    trainer.train()
    model = unwrapped(trainer).eval()
    assert isinstance(model, PeftModel)
    inputs = collator([examples[index] for index in range(4)])
    del inputs["sources"], inputs["labels"]
    with torch.no_grad():
        adapted = model(**inputs).logits
        with model.disable_adapter():
            base = model(**inputs).logits
        merged = model.merge_and_unload()(**inputs).logits
    assert (adapted - base).abs().max() > 1e-2
    # Granite's logits of the tiny V-2.0 reach tens: the tolerance is relative to their size.
    assert torch.allclose(merged, adapted, rtol=1e-4, atol=1e-4)
