"""The networks of 4.6, 4.7 and OCR: figures of the classes of transformers, and what training asks beyond."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conversations import CONVERSATIONS, encoder, sample
from safetensors.torch import load_file, save_file

from finetune.encoding.collate import pad
from finetune.families import by_name
from finetune.models import load_model
from finetune.models.kv_cache import CACHE, NAMES
from finetune.models.minicpmv4_6 import NATIVE_MODELS
from finetune.utils.errors import CheckpointError

Batch = dict[str, torch.Tensor]
MIXED = ("several", "text", "turns")


def batch_of(folder: Path, *names: str, generate: bool = False) -> Batch:
    made = encoder(folder)
    examples = [made.encode(sample(CONVERSATIONS[name]), generate=generate) for name in names]
    batch = pad(examples, made.pad_id, side="left" if generate else "right")
    if generate:
        del batch["labels"]
    return batch


def stock(folder: Path) -> Any:
    return transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def ours(folder: Path) -> Any:
    return load_model(folder).eval()


def gradients(model: Any, batch: Batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("mode", ["16x", "4x"])
@pytest.mark.parametrize("names", [MIXED, ("text", "system"), ("sliced",)], ids="+".join)
def test_loss_and_logits_are_the_stock_ones(native, family: str, mode: str, names: tuple[str, ...]) -> None:
    folder = native(family, mode)
    batch, theirs, model = batch_of(folder, *names), stock(folder), ours(folder)
    with torch.no_grad():
        wanted, given = theirs(**batch), model(**batch)
        assert given.loss.item() == pytest.approx(wanted.loss.item(), rel=2e-6)
        assert given.logits is None
        kept = batch["attention_mask"].bool()
        unlabelled = {key: tensor for key, tensor in batch.items() if key != "labels"}
        logits = model(**unlabelled).logits
        assert torch.equal(logits[kept], wanted.logits[kept])
        torch.testing.assert_close(model(**unlabelled, logits_to_keep=3).logits, logits[:, -3:])


def test_loss_is_a_sum_over_the_items_of_the_batch(native, family: str) -> None:
    folder = native(family)
    batch, model = batch_of(folder, *MIXED), ours(folder)
    with torch.no_grad():
        out = model(**batch)
        total, count = out.row_loss.sum(0).tolist()
        assert count == (batch["labels"] >= 0).sum()
        assert out.loss.item() == pytest.approx(total / count)
        assert model(**batch, num_items_in_batch=7).loss.item() == pytest.approx(total / 7)
    assert type(model).accepts_loss_kwargs


@pytest.mark.parametrize("mode", ["16x", "4x"])
def test_gradients_are_the_stock_ones(native, family: str, mode: str) -> None:
    folder = native(family, mode)
    batch = batch_of(folder, "several", "text")
    wanted, given = gradients(stock(folder), batch), gradients(ours(folder), batch)
    assert wanted.keys() <= given.keys()
    for name, gradient in given.items():
        if name in wanted:
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-5, msg=name)
        else:
            assert not gradient.any(), name  # the merger that "4x" leaves out


@pytest.mark.parametrize("mode", ["16x", "4x"])
def test_every_weight_has_a_gradient_without_images(native, family: str, mode: str) -> None:
    folder = native(family, mode)
    model = ours(folder)
    found = gradients(model.train(), batch_of(folder, "text", "system"))
    assert found.keys() == {name for name, _ in model.named_parameters()}
    for name, gradient in found.items():
        assert gradient.isfinite().all()
        assert name.startswith(("model.language_model", "lm_head")) or not gradient.any(), name


def test_each_layer_is_called_once(native, family: str) -> None:
    """Whatever the batch: under ZeRO-3 the ranks gather weights in step with these calls."""
    folder = native(family)
    model = ours(folder).train()
    calls: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    orders = []
    for names in (MIXED, ("text",), ("whole",)):
        calls.clear()
        model(**batch_of(folder, *names))
        orders.append(list(calls))
    assert orders[0] == orders[1] == orders[2]
    assert len(set(orders[0])) == len(orders[0])


def test_batch_is_its_rows(native, family: str) -> None:
    """Right padding changes no earlier token, of the linear attention neither."""
    folder = native(family)
    model = ours(folder)
    with torch.no_grad():
        together = model(**batch_of(folder, *MIXED)).row_loss
        alone = torch.cat([model(**batch_of(folder, name)).row_loss for name in MIXED])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", ["v4_6", "v4_7"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(native, family: str, reentrant: bool) -> None:
    folder = native(family)
    batch, model = batch_of(folder, *MIXED), ours(folder).train()
    plain = gradients(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for name, gradient in gradients(model, batch).items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-5, atol=1e-6, msg=name)


def test_a_frozen_tower_has_no_graph(native, family: str) -> None:
    folder = native(family)
    model = ours(folder).train()
    model.model.vision_tower.requires_grad_(False)
    model.model.merger.requires_grad_(False)
    model.enable_input_require_grads()
    kept: list[bool] = []
    model.model.vision_tower.register_forward_hook(lambda *given: kept.append(given[2].last_hidden_state.requires_grad))
    found = gradients(model, batch_of(folder, *MIXED))
    assert kept == [False]
    assert found
    assert not any(name.startswith(("model.vision_tower", "model.merger")) for name in found)


@pytest.mark.parametrize("beams", [1, 3])
def test_generates_what_the_stock_class_does(native, family: str, beams: int) -> None:
    folder = native(family)
    batch = batch_of(folder, *MIXED, generate=True)
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "output_logits": True}
    wanted, given = (
        model.generate(**batch, **options, return_dict_in_generate=True) for model in (stock(folder), ours(folder))
    )
    assert torch.equal(given.sequences, wanted.sequences)
    for ours_, theirs in zip(given.logits, wanted.logits, strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["v4_6", "v4_7"])
def test_generates_row_by_row_and_without_a_cache(native, family: str) -> None:
    folder = native(family)
    model = ours(folder)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    batch = batch_of(folder, *MIXED, generate=True)
    length = batch["input_ids"].shape[1]
    together = model.generate(**batch, **options)[:, length:]
    assert torch.equal(model.generate(**batch, **options, use_cache=False)[:, length:], together)
    for name, row in zip(MIXED, together, strict=True):
        alone = batch_of(folder, name, generate=True)
        assert torch.equal(model.generate(**alone, **options)[0, alone["input_ids"].shape[1] :], row), name


def test_steps_continue_the_positions_of_training(native, family: str) -> None:
    """Logits of a prompt with cached answer tokens are those of one pass; 4.7 has its positions from the canvas."""
    folder = native(family)
    model, batch = ours(folder), batch_of(folder, "sliced", generate=True)
    out = model.generate(
        **batch, max_new_tokens=5, do_sample=False, eos_token_id=None, output_logits=True, return_dict_in_generate=True
    )
    whole = dict(batch, input_ids=out.sequences, attention_mask=torch.ones_like(out.sequences))
    if "mm_token_type_ids" in batch:
        whole["mm_token_type_ids"] = torch.nn.functional.pad(batch["mm_token_type_ids"], (0, 5))
    with torch.no_grad():
        logits = model(**whole).logits[:, -6:-1]
    torch.testing.assert_close(torch.stack(out.logits, 1), logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_is_taken_by_either_name_and_given_back_by_that_of_transformers(native, family: str, name: str) -> None:
    folder = native(family)
    model, batch = ours(folder), batch_of(folder, "text", generate=True)
    start, end = ({key: tensor[:, place] for key, tensor in batch.items()} for place in (slice(-1), slice(-1, None)))
    with torch.no_grad():
        kept = model(**start, use_cache=True)[CACHE]
        out = model(**end | {"attention_mask": batch["attention_mask"]}, **{name: kept}, use_cache=True)
        assert out[CACHE] is kept
        torch.testing.assert_close(out.logits[:, -1], model(**batch).logits[:, -1], rtol=1e-4, atol=1e-4)


def test_canvas_positions_matter(native) -> None:
    folder = native("v4_7")
    model, batch = ours(folder), batch_of(folder, "sliced")
    seen: list[Any] = []
    model.model.language_model.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["position_ids"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**batch)
        model(**batch_of(folder, "text"))
    canvas, text = seen
    assert canvas.shape == (3, *batch["input_ids"].shape)
    assert not torch.equal(canvas[1], canvas[2])
    assert text is None  # plain positions, not those of the batch before
    assert model.model.config.newline_id == encoder(folder).prompt_tokenizer.fixed("\n")[0]


def test_forward_takes_every_input_by_name(family: str) -> None:
    """``generate`` looks at the names to decide what it prepares."""
    network = NATIVE_MODELS[by_name(family).published.config["model_type"]]
    parent = next(base for base in network.__mro__ if base.__module__.startswith("transformers.models"))
    wanted = inspect.signature(parent.forward).parameters  # type: ignore[attr-defined]
    assert network.__name__ == parent.__name__
    assert set(wanted) <= set(inspect.signature(network.forward).parameters)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda batch: batch.pop("target_sizes"), "pixel_values given without target_sizes"),
        (lambda batch: batch.update(target_sizes=batch["target_sizes"][1:]), "patches, but .* were given"),
        (
            lambda batch: batch["target_sizes"][0].copy_(batch["target_sizes"][0] * torch.tensor([2.0, 0.5])),
            "merged by",
        ),
        (lambda batch: batch.update(pixel_values=batch["pixel_values"].repeat(2, 1, 1, 1)), "items side by side"),
    ],
)
def test_what_does_not_fit_is_named(native, family: str, change: Any, message: str) -> None:
    folder = native(family, "16x")
    batch = batch_of(folder, "sliced")
    change(batch)
    with pytest.raises(ValueError, match=message):
        ours(folder)(**batch)


def test_too_few_placeholders_are_refused(native, family: str) -> None:
    folder = native(family)
    batch = batch_of(folder, "sliced")
    made = encoder(folder)
    pads = batch["input_ids"].eq(made.prompt_tokenizer.control(made.layout.placeholder)).nonzero()
    batch["input_ids"][tuple(pads[-1])] = 5
    with pytest.raises(ValueError, match="features and tokens do not match"):
        ours(folder)(**batch)


def damaged(folder: Path, target: Path, change: Any) -> Path:
    shutil.copytree(folder, target)
    state = load_file(target / "model.safetensors")
    change(state)
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_loading_is_strict(native, family: str, tmp_path: Path) -> None:
    name = "model.merger.mlp.0.linear_1.weight"
    folder = native(family)
    with pytest.raises(CheckpointError, match=f"missing in the file: {name}"):
        load_model(damaged(folder, tmp_path / "missing", lambda state: state.pop(name)))
    with pytest.raises(CheckpointError, match="unknown to the model: more"):
        load_model(damaged(folder, tmp_path / "more", lambda state: state.update(more=torch.zeros(2))))
    with pytest.raises(CheckpointError, match="another shape: model.merger"):
        load_model(damaged(folder, tmp_path / "shape", lambda state: state.update({name: torch.zeros(2, 2)})))


def test_wrong_tokenizer_is_refused(native, family: str, tmp_path: Path) -> None:
    folder = shutil.copytree(native(family), tmp_path / "folder")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = 600
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="600 embeddings"):
        load_model(folder)


def test_what_it_saves_the_stock_class_loads(native, family: str, tmp_path: Path) -> None:
    model = ours(native(family))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(model).__name__]
    state, again = model.state_dict(), stock(tmp_path).state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in state.items())
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
