"""Audio: batches, attention chunks, placeholders, the dummy clip, decoding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from sound_batch import mel, sound_batch, tokens_of
from visual_batch import OMNI, Row, gradients, make_batch, prompt, small_model

from finetune.models import MiniCPMO
from finetune.models.audio_tower import checked_clips

# Clips of 2.1 s, of the fewest frames that make a token, of half a second; a row with an image and one without clip.
ROWS: list[tuple[Row, list[int]]] = [
    ((70, [(4, 6)], 5), [210, 51]),
    ((20, [], 4), [9]),
    ((6, [(3, 3)], 6), []),
    ((80, [], 5), [50, 120]),
]
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(params=OMNI)
def model(request: pytest.FixtureRequest) -> MiniCPMO:
    loaded = small_model(request.param)
    assert isinstance(loaded, MiniCPMO)
    return loaded


def logits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**{name: value for name, value in batch.items() if name != "labels"}).logits


def loss_and_gradients(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[float, dict]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), gradients(model)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_mixed_batch_equals_single_rows(model: MiniCPMO, implementation: str) -> None:
    model.set_attn_implementation(implementation)
    assert model.apm.config._attn_implementation == implementation
    together = logits(model, sound_batch(model, ROWS))
    for index, (row, lengths) in enumerate(ROWS):
        if lengths:
            single = logits(model, sound_batch(model, [(row, lengths)]))
        else:
            single = logits(model, make_batch([row], model.query_num))
        assert torch.allclose(together[index, : single.shape[1]], single[0], atol=2e-5)


def test_eager_equals_sdpa(model: MiniCPMO) -> None:
    batch = sound_batch(model, ROWS)
    before = logits(model, batch)
    model.set_attn_implementation("eager")
    assert torch.allclose(logits(model, batch), before, atol=1e-5)
    assert model.apm.get_correct_attn_implementation("flash_attention_2") == "sdpa"


def test_what_lies_behind_a_clip_does_not_matter(model: MiniCPMO) -> None:
    batch = sound_batch(model, ROWS)
    before = logits(model, batch)
    for clip, length in zip(batch["audio_features"], batch["audio_lengths"], strict=True):
        clip[:, length:] = 7.0
    assert torch.equal(logits(model, batch), before)


def test_every_frame_counts_up_to_the_last_whole_token(model: MiniCPMO) -> None:
    step = model.pool_step
    frames = 2 * step * 3
    features, lengths = mel(frames, 0)[None], torch.tensor([frames])
    with torch.no_grad():
        before = model.get_audio_embeds(features, lengths)
        features[:, :, -1] += 3
        after = model.get_audio_embeds(features, lengths)
    assert before.shape == (3, 256)
    assert (before[-1] - after[-1]).abs().max() > 1e-4


@pytest.mark.parametrize(("seconds", "moved"), [(1.0, "own second"), (0, "all"), (2.0, "all")])
def test_a_second_sees_itself_and_the_past(model: MiniCPMO, seconds: float, moved: str) -> None:
    """Two seconds of sound, changed in the middle of the second one."""
    model.apm.chunk = int(seconds * 50)
    features, lengths = mel(200, 0)[None], torch.tensor([200])
    with torch.no_grad():
        before = model.get_audio_embeds(features, lengths)
        features[:, :, 150] += 3
        after = model.get_audio_embeds(features, lengths)
    change = (before - after).abs().amax(dim=1)
    second = len(change) // 2
    assert (change[second:] > 0).all()
    assert (change[:second] > 0).any() == (moved == "all")


def test_the_chunk_is_read_from_the_configuration() -> None:
    assert small_model("o2_6").get_submodule("apm").chunk == 50


def test_clips_are_poured_into_chunked_placeholders_row_by_row(model: MiniCPMO) -> None:
    """The runs lie next to each other here, so the same tokens must end up in the same places."""
    whole, chunked = sound_batch(model, ROWS), sound_batch(model, ROWS, run=7)
    assert len(chunked["audio_bound"]) > len(whole["audio_bound"])
    assert torch.equal(logits(model, chunked), logits(model, whole))


def test_text_row_does_not_hear_the_others(model: MiniCPMO) -> None:
    batch = sound_batch(model, ROWS)
    before = logits(model, batch)
    batch["audio_features"] = -batch["audio_features"]
    after = logits(model, batch)
    assert torch.equal(before[2], after[2])
    for row in (0, 1, 3):
        assert (before[row] - after[row]).abs().max() > 1e-3


def test_one_call_per_module(model: MiniCPMO) -> None:
    calls: dict[str, int] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    model(**sound_batch(model, ROWS))
    assert {"apm.layers.1.self_attn.k_proj", "audio_projection_layer.linear2"} <= set(calls)
    assert set(calls.values()) == {1}


@pytest.mark.parametrize(("training", "labelled", "calls"), [(True, False, 1), (False, True, 1), (False, False, 0)])
@pytest.mark.parametrize("empty", [False, True])
def test_when_the_dummy_runs(model: MiniCPMO, training: bool, labelled: bool, calls: int, empty: bool) -> None:
    model.train(training)
    seen = []
    model.apm.register_forward_hook(lambda *_: seen.append(1))
    batch = make_batch([(5, [(3, 3)], 5)], model.query_num)
    if empty:
        batch["audio_features"] = torch.zeros(0, 80, 0)
        batch["audio_lengths"] = torch.zeros(0, dtype=torch.int64)
        batch["audio_bound"] = torch.zeros(0, 3, dtype=torch.int64)
    if not labelled:
        del batch["labels"]
    model(**batch)
    assert len(seen) == calls


def test_sound_reaches_every_parameter(model: MiniCPMO) -> None:
    _, grads = loss_and_gradients(model.train(), sound_batch(model, ROWS))
    assert set(grads) == {name for name, _ in model.named_parameters()}
    for name, grad in grads.items():
        assert torch.isfinite(grad).all(), name
        assert grad.abs().sum() > 0, name


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(model: MiniCPMO, reentrant: bool) -> None:
    batch = sound_batch(model, ROWS)
    model.train()
    plain = loss_and_gradients(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    calls = []
    model.apm.layers[0].get_submodule("fc1").register_forward_hook(lambda *_: calls.append(1))
    checkpointed = loss_and_gradients(model, batch)
    assert len(calls) == 2
    assert checkpointed[0] == plain[0]
    assert set(checkpointed[1]) == set(plain[1])
    for name, grad in plain[1].items():
        assert torch.allclose(grad, checkpointed[1][name], atol=1e-7, rtol=1e-5), name


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_lora_in_the_tower(model: MiniCPMO, reentrant: bool | None) -> None:
    """Adapters above frozen convolutions, with checkpointing and without: the same gradients, all of them there."""
    family = model.config.family
    config = LoraConfig(r=4, target_modules=family.lora_targets["audio"], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = get_peft_model(model, config).train()
    batch = sound_batch(model, ROWS)
    plain = loss_and_gradients(adapted, batch)
    assert len(plain[1]) == 2 * 4 * 2  # layers, projections, matrices
    assert all(grad.abs().sum() > 0 for grad in plain[1].values())
    if reentrant is not None:
        adapted.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        checkpointed = loss_and_gradients(adapted, batch)
        for name, grad in plain[1].items():
            assert torch.allclose(grad, checkpointed[1][name], atol=1e-7, rtol=1e-5), name


def test_frozen_tower_has_no_graph(model: MiniCPMO) -> None:
    batch = sound_batch(model, ROWS)
    seen = []
    model.apm.register_forward_hook(lambda _, __, output: seen.append(output.requires_grad))
    model.apm.requires_grad_(False)
    model.enable_input_require_grads()
    model(**batch).loss.backward()
    assert seen == [False]
    assert model.audio_projection_layer.linear1.weight.grad is not None


def test_sixteen_bit_tower_with_a_float32_projection(model: MiniCPMO) -> None:
    batch = sound_batch(model, ROWS)
    exact = model(**batch).loss.item()
    model.bfloat16()
    assert model(**batch).loss.item() == pytest.approx(exact, abs=0.1)
    model.audio_projection_layer.float()
    assert model(**batch).loss.item() == pytest.approx(exact, abs=0.1)
    model.apm.float()
    model.apm.embed_positions.bfloat16()  # a table that is never trained stays as it was loaded
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.train()(**batch).loss
    loss.backward()
    assert loss.item() == pytest.approx(exact, abs=0.1)


def new_tokens(model: MiniCPMO, batch: dict[str, torch.Tensor], **options) -> list[list[int]]:
    return model.generate(**prompt(batch), **{**GREEDY, **options})[:, batch["input_ids"].shape[1] :].tolist()


def from_embeddings(model: MiniCPMO, batch: dict[str, torch.Tensor], **options) -> list[list[int]]:
    """The language model's own generate on embeddings into which everything was put one by one."""
    with torch.no_grad():
        embeddings = model.llm.model.embed_tokens(batch["input_ids"])
        features = model.get_image_features(batch["patches"], batch["tgt_sizes"])
        for feature, (row, start, end) in zip(features, batch["image_bound"].tolist(), strict=True):
            embeddings[row, start:end] = feature
        sound = model.get_audio_embeds(batch["audio_features"], batch["audio_lengths"])
        for row, start, end in batch["audio_bound"].tolist():
            embeddings[row, start:end], sound = sound[: end - start], sound[end - start :]
    assert not len(sound)
    llm: Any = copy.deepcopy(model.llm)
    options = {**GREEDY, **options}
    return llm.generate(inputs_embeds=embeddings, attention_mask=batch["attention_mask"], **options).tolist()


def test_left_padded_batch_equals_single_runs(model: MiniCPMO) -> None:
    rows = [entry for entry in ROWS if entry[1]]
    together = new_tokens(model, sound_batch(model, rows, side="left"))
    assert together == [new_tokens(model, sound_batch(model, [entry]))[0] for entry in rows]
    assert len({tuple(tokens) for tokens in together}) == 3


def test_sound_is_heard_once(model: MiniCPMO) -> None:
    calls = []
    model.apm.register_forward_hook(lambda *_: calls.append(1))
    batch = sound_batch(model, ROWS, side="left")
    cached = new_tokens(model, batch)
    assert len(calls) == 1
    assert new_tokens(model, batch, use_cache=False) == cached
    assert len(calls) == 1 + GREEDY["max_new_tokens"]


@pytest.mark.parametrize("run", [None, 7])
def test_beams_equal_the_language_model_on_embeddings(model: MiniCPMO, run: int | None) -> None:
    batch = sound_batch(model, ROWS, side="left", run=run)
    assert new_tokens(model, batch) == from_embeddings(model, batch)
    beams = {"num_beams": 3, "num_return_sequences": 2}
    calls = []
    model.apm.register_forward_hook(lambda *_: calls.append(1))
    ours = new_tokens(model, batch, **beams)
    assert len(calls) == 1
    assert ours == from_embeddings(model, batch, **beams)


def wrong(batch: dict[str, torch.Tensor], step: int) -> dict[str, tuple[dict, str]]:
    bounds, lengths = batch["audio_bound"], batch["audio_lengths"]
    counts = [tokens_of(length, step) for length in lengths.tolist()]
    shifted = bounds.clone()
    shifted[1, 2] -= 1
    shifted[2, 2] += 1
    short, long = lengths.clone(), lengths.clone()
    short[2], long[0] = 2 * step - 2, 300
    parted = torch.cat([bounds[1:], bounds[:1]])
    return {
        "places": ({"audio_bound": bounds[:-1]}, f"make {sum(counts)} tokens, but audio_bound has"),
        "rows": ({"audio_bound": shifted}, "row 0 has .* its clips make another number"),
        "outside": ({"audio_bound": bounds + torch.tensor([0, 500, 500])}, "audio_bound 0 is row 0.*batch has 4 rows"),
        "order": ({"audio_bound": parted}, "row 0"),
        "short": ({"audio_lengths": short}, f"clip 2 has {2 * step - 2} mel frames; {2 * step - 1} are needed"),
        "long": ({"audio_lengths": long}, "clip 0 has 300 mel frames, but audio_features holds 210"),
        "count": ({"audio_lengths": lengths[1:]}, "5 audio clips, but 4 audio_lengths"),
        "bins": ({"audio_features": batch["audio_features"][:, 1:]}, r"must be \(clips, 80, frames\)"),
        "no bounds": ({"audio_bound": None}, "audio_features and audio_lengths given without audio_bound"),
        "embeds": ({"audio_embeds": torch.zeros(3, 256)}, "audio_embeds has 3 tokens, but audio_bound"),
        "embeds only": ({"audio_embeds": torch.zeros(3, 256), "audio_bound": None}, "without audio_bound"),
    }


FAULTS = ("places", "rows", "outside", "order", "short", "long", "count", "bins", "no bounds", "embeds", "embeds only")


@pytest.mark.parametrize("fault", FAULTS)
def test_disagreeing_inputs_name_both_numbers(model: MiniCPMO, fault: str) -> None:
    batch = sound_batch(model, ROWS)
    change, message = wrong(batch, model.pool_step)[fault]
    with pytest.raises(ValueError, match=message):
        model(**{**batch, **change})


def test_longer_than_the_tower_takes() -> None:
    with pytest.raises(ValueError, match="takes 3000: split longer audio into clips"):
        checked_clips(torch.zeros(1, 80, 3002), torch.tensor([3002]), bins=80, longest=3000, step=2)


@pytest.mark.parametrize(("frames", "step"), [(99, 2), (100, 2), (101, 2), (3000, 2), (9, 5), (58, 5), (3000, 5)])
def test_number_of_tokens(frames: int, step: int) -> None:
    clips = checked_clips(torch.zeros(1, 80, frames), torch.tensor([frames]), bins=80, longest=3000, step=step)
    assert clips.counts == [tokens_of(frames, step)]
