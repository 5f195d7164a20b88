"""Packs: every sample once, within the limits, rounds of similar work; and the sizes they are planned from."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.batching.lengths import measure
from finetune.batching.packing import balanced_packs, best_fit, rounds, split_to_count
from finetune.encoding.collate import pack
from finetune.encoding.sample_policy import SamplePolicy
from finetune.readers.mixture import open_data
from finetune.sample import DataError

SIZES = st.lists(st.tuples(st.integers(1, 120), st.integers(0, 12)), min_size=1, max_size=60)


@settings(deadline=None)
@given(SIZES, st.integers(1, 100), st.none() | st.integers(1, 15))
def test_best_fit_keeps_its_limits_and_every_sample(sizes, capacity, most):
    lengths, items = (np.array(column, np.int32) for column in zip(*sizes, strict=True))
    packs = best_fit(lengths, items, np.arange(len(sizes))[::-1], capacity, most)
    assert sorted(sample for each in packs for sample in each) == list(range(len(sizes)))
    for each in packs:
        assert len(each) == 1 or lengths[each].sum() <= capacity
        assert most is None or len(each) == 1 or items[each].sum() <= most


def test_best_fit_takes_the_least_room_that_is_left():
    lengths = np.array([60, 70, 30, 40, 35], np.int32)
    packs = best_fit(lengths, np.zeros(5, np.int32), np.arange(5), 100)
    assert sorted(map(sorted, packs)) == [[0, 3], [1, 2], [4]]


@settings(deadline=None)
@given(SIZES, st.integers(1, 5))
def test_rounds_have_a_pack_for_every_rank_and_every_sample_once(sizes, world):
    lengths, items = (np.array(column, np.int32) for column in zip(*sizes, strict=True))
    cost = lengths + 10.0 * items
    packs = best_fit(lengths, items, np.arange(len(sizes)), 150)
    count = -(-len(packs) // world) * world
    made = rounds(split_to_count(packs, cost, count), cost, world, (0, 1))
    assert len(made) * world == count
    assert all(len(each) == world for each in made)
    assert sorted(sample for each in made for one in each for sample in one) == list(range(len(sizes)))
    # A rank is idle only where there is nothing left to divide.
    if any(not one for each in made for one in each):
        assert all(len(one) < 2 for each in made for one in each)


def test_rounds_are_of_similar_work():
    draw = np.random.default_rng(0)
    lengths = draw.integers(50, 2000, 4000).astype(np.int32)
    items = draw.integers(0, 10, 4000).astype(np.int32)
    cost = lengths + 100.0 * items
    packs = best_fit(lengths, items, draw.permutation(4000), 4096)
    made = rounds(split_to_count(packs, cost, -(-len(packs) // 8) * 8), cost, 8, (0, 0))
    work = np.array([[cost[one].sum() for one in each] for each in made])
    assert work.max(1).sum() / work.mean(1).sum() < 1.02
    assert lengths.sum() / (len(packs) * 4096) > 0.98


def test_dealing_balances_and_heeds_the_capacity():
    cost = np.array([9.0, 8, 7, 6, 5, 4])
    assert [cost[one].sum() for one in balanced_packs(range(6), cost, 3)] == [13, 13, 13]
    lengths = np.array([90, 90, 10, 10], np.int32)
    packs = balanced_packs(range(4), np.array([1.0, 1, 5, 4]), 2, lengths, 100)
    assert all(lengths[one].sum() <= 100 for one in packs)
    # More than fits anywhere still goes somewhere.
    assert sum(map(len, balanced_packs(range(4), cost, 2, lengths, 50))) == 4


def records(folder, count=6):
    turns = [{"role": "user", "content": "say it"}, {"role": "assistant", "content": "word " * 3}]
    made = [
        {"id": str(number), "conversations": [turns[0], turns[1] | {"content": "word " * (number + 1)}]}
        for number in range(count)
    ]
    (folder / "data.json").write_text(json.dumps(made))
    return folder / "data.json"


def test_sizes_are_those_of_the_examples_and_remembered(tmp_path, monkeypatch, make_encoder):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sample_policy = SamplePolicy(open_data(records(tmp_path), None), make_encoder())
    sizes = measure(sample_policy)
    examples = [sample_policy.example(index) for index in range(6)]
    assert sizes.tokens.tolist() == [len(example.input_ids) for example in examples]
    assert sizes.cost.tolist() == sizes.tokens.tolist()

    def fail(*args, **kwargs):
        raise AssertionError("measured again")

    monkeypatch.setattr(sample_policy.length_policy, "fit", fail)
    assert measure(sample_policy).table.tolist() == sizes.table.tolist()
    sample_policy.remeasure = True
    with pytest.raises(AssertionError, match="measured again"):
        measure(sample_policy)


def test_ranks_divide_the_measuring(tmp_path, monkeypatch, make_encoder):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sample_policy = SamplePolicy(open_data(records(tmp_path, 7), None), make_encoder())
    whole = measure(sample_policy).table
    sample_policy.remeasure = True

    def gather(part):
        return [part] if part.ndim == 1 else [part, whole[1::2]]

    assert measure(sample_policy, rank=0, world=2, gather=gather).table.tolist() == whole.tolist()


def test_what_is_left_out_takes_one_token_and_what_is_not_stops(tmp_path, monkeypatch, make_encoder):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = records(tmp_path)
    made = json.loads(file.read_text())
    made[2]["conversations"] = made[2]["conversations"][:1]
    file.write_text(json.dumps(made))
    with pytest.raises(DataError, match="record 2"):
        measure(SamplePolicy(open_data(file, None), make_encoder()))
    kept = SamplePolicy(open_data(file, None), make_encoder(), on_bad_sample="skip")
    assert measure(kept).table[2].tolist() == [1, 0, 0, 0]
    row = pack([kept.example(index) for index in (1, 2, 3)])
    assert row["cu_seq_lens_q"].diff().tolist() == [measure(kept).tokens[1], 1, measure(kept).tokens[3]]
    assert (row["labels"][0, row["cu_seq_lens_q"][:-1].long()] == -100).all()
