"""Decoding with images: batches, cache, beams, several returned sequences."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from visual_batch import GOLDEN, Row, make_batch, prompt

from finetune.models import MiniCPMV, MiniCPMVConfig
from finetune.models.kv_cache import CACHE, NAMES

ROWS: list[Row] = [(3, [(4, 6)], 5), (6, [], 3), (2, [(3, 3), (5, 2)], 4)]
GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def new_tokens(model: MiniCPMV, batch: dict[str, torch.Tensor], **options) -> list[list[int]]:
    return model.generate(**prompt(batch), **{**GREEDY, **options})[:, batch["input_ids"].shape[1] :].tolist()


def merged(model: MiniCPMV, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Embeddings with the features put in place one by one."""
    with torch.no_grad():
        embeddings = model.llm.model.embed_tokens(batch["input_ids"]) * model.config.read("scale_emb", 1)
        features = model.get_image_features(batch["patches"], batch["tgt_sizes"])
        for feature, (row, start, end) in zip(features, batch["image_bound"].tolist(), strict=True):
            embeddings[row, start:end] = feature
    return embeddings


def from_embeddings(model: MiniCPMV, batch: dict[str, torch.Tensor], **options) -> list[list[int]]:
    """The language model's own generate on the same embeddings, its table scaled as the wrapper scales it."""
    embeddings, mask = merged(model, batch), batch["attention_mask"]
    llm: Any = copy.deepcopy(model.llm)
    llm.model.embed_tokens.weight.data *= model.config.read("scale_emb", 1)
    return llm.generate(inputs_embeds=embeddings, attention_mask=mask, **{**GREEDY, **options}).tolist()


def test_left_padded_batch_equals_single_runs(model: MiniCPMV) -> None:
    queries = model.query_num
    together = new_tokens(model, make_batch(ROWS, queries, side="left"))
    alone = [new_tokens(model, make_batch([row], queries))[0] for row in ROWS]
    assert together == alone
    assert len({tuple(tokens) for tokens in together}) == 3


def test_the_images_steer_the_answer(model: MiniCPMV) -> None:
    batch = make_batch(ROWS, model.query_num, side="left")
    before = new_tokens(model, batch)
    batch["patches"] = 255 - batch["patches"]
    after = new_tokens(model, batch)
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, True, False]


def test_cache_equals_no_cache_and_images_run_once(model: MiniCPMV) -> None:
    calls = []
    model.vpm.register_forward_hook(lambda *_: calls.append(1))
    batch = make_batch(ROWS, model.query_num, side="left")
    cached = new_tokens(model, batch)
    assert len(calls) == 1
    assert new_tokens(model, batch, use_cache=False) == cached
    assert len(calls) == 1 + GREEDY["max_new_tokens"]


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_is_taken_by_either_name_and_given_back_by_that_of_transformers(model: MiniCPMV, name: str) -> None:
    batch = prompt(make_batch([ROWS[0]], model.query_num))
    with torch.no_grad():
        whole = model(**batch).logits[:, -1]
        start = model(**batch | {key: batch[key][:, :-1] for key in ("input_ids", "attention_mask")}, use_cache=True)
        kept = start[CACHE]
        text = {"input_ids": batch["input_ids"][:, -1:], "attention_mask": batch["attention_mask"]}
        end = model(**text, **{name: kept}, use_cache=True)
    assert end[CACHE] is kept
    assert kept.get_seq_length() == batch["input_ids"].shape[1]
    assert torch.allclose(end.logits[:, -1], whole, atol=1e-5)
    with pytest.raises(ValueError, match="both were given"):
        model(**text, **dict.fromkeys(NAMES, kept))


def test_generate_goes_on_from_a_cache(model: MiniCPMV) -> None:
    batch = prompt(make_batch([ROWS[0]], model.query_num))
    first = model.generate(**batch, **GREEDY | {"max_new_tokens": 3, "min_new_tokens": 3}, return_dict_in_generate=True)
    mask = torch.ones_like(first.sequences)
    more = GREEDY | {"max_new_tokens": 5, "min_new_tokens": 5}
    tokens = model.generate(first.sequences, attention_mask=mask, **{CACHE: first[CACHE]}, **more)
    assert tokens.tolist() == model.generate(**batch, **GREEDY).tolist()


def test_generate_caches_although_the_published_config_says_no() -> None:
    config = json.loads((GOLDEN / "forward" / "llama3_v2_5" / "config.json").read_text())
    model = MiniCPMV(MiniCPMVConfig(**config | {"use_cache": False})).eval()
    calls = []
    model.vpm.register_forward_hook(lambda *_: calls.append(1))
    new_tokens(model, make_batch(ROWS, model.query_num, side="left"))
    assert len(calls) == 1


def test_greedy_equals_the_language_model_on_embeddings(model: MiniCPMV) -> None:
    batch = make_batch(ROWS, model.query_num, side="left")
    assert new_tokens(model, batch) == from_embeddings(model, batch)


def test_beams_equal_the_language_model_on_embeddings(model: MiniCPMV) -> None:
    batch = make_batch(ROWS, model.query_num, side="left")
    beams = {"num_beams": 4, "num_return_sequences": 2}
    ours = new_tokens(model, batch, **beams)
    assert ours == from_embeddings(model, batch, **beams)
    assert ours[::2] != new_tokens(model, batch)


def test_beams_encode_each_image_once(model: MiniCPMV) -> None:
    seen = []
    model.vpm.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    batch = make_batch(ROWS, model.query_num, side="left")
    new_tokens(model, batch, num_beams=3)
    assert seen == [len(batch["patches"])]


def test_several_sampled_sequences(model: MiniCPMV) -> None:
    batch = make_batch(ROWS, model.query_num, side="left")
    sampling = {"do_sample": True, "num_return_sequences": 3, "temperature": 0.7, "top_k": 20}
    torch.manual_seed(0)
    ours = new_tokens(model, batch, **sampling)
    torch.manual_seed(0)
    assert ours == from_embeddings(model, batch, **sampling)
    assert len({tuple(tokens) for tokens in ours}) == 9


def test_generate_from_embeddings_through_the_wrapper(model: MiniCPMV) -> None:
    batch = make_batch(ROWS, model.query_num, side="left")
    embeddings, mask = merged(model, batch), batch["attention_mask"]
    tokens = model.generate(inputs_embeds=embeddings, attention_mask=mask, **GREEDY)
    assert tokens.tolist() == new_tokens(model, batch)


def test_text_only_generation(model: MiniCPMV) -> None:
    batch = make_batch([(6, [], 3)], model.query_num)
    plain = {name: batch[name] for name in ("input_ids", "attention_mask")}
    tokens = model.generate(**plain, **GREEDY, num_beams=2)[:, batch["input_ids"].shape[1] :].tolist()
    assert tokens == new_tokens(model, batch, num_beams=2)
    assert tokens == from_embeddings(model, batch, num_beams=2)


def test_misplaced_bounds_are_refused_by_generate(model: MiniCPMV) -> None:
    batch = make_batch(ROWS, model.query_num, side="left")
    batch["image_bound"] = batch["image_bound"][:2]
    with pytest.raises(ValueError, match="3 visual items, but image_bound has 2 rows"):
        new_tokens(model, batch)
