"""Losses of preference training: the figures of TRL 1.16, signs, and what is left out."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from finetune.arguments.preference import PreferenceOptions
from finetune.training.preference_loss import FIGURES, pair_figures

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "preference.json").read_text())
REWARDS = FIGURES[:4]
LOSSES = ("sigmoid", "ipo", "hinge", "orpo", "simpo")


def rows(order: tuple[str, str] = ("chosen", "rejected")) -> torch.Tensor:
    """Negative log-likelihoods and lengths of the golden answers."""
    return torch.tensor([[-sum(pair[name]), len(pair[name])] for name in order for pair in GOLDEN["pairs"]])


def references() -> torch.Tensor:
    return torch.tensor([pair["reference"] for pair in GOLDEN["pairs"]])


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"{case['loss']}-{case['beta']}")
def test_figures_are_those_of_trl(case):
    options = PreferenceOptions(**{name: value for name, value in case.items() if name != "figures"})
    loss, table = pair_figures(rows(), references(), options)
    found = {"loss": loss, **dict(zip(FIGURES, table.T, strict=True))}
    if case["loss"] == "orpo":  # TRL adds the likelihood of the chosen answers elsewhere
        means = -rows()[: len(loss), 0] / rows()[: len(loss), 1]
        found["odds"] = -(loss + means)
    for name in case["figures"][0]:
        expected = torch.tensor([figures[name] for figures in case["figures"]])
        assert torch.allclose(found[name], expected, rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize("loss", LOSSES)
def test_swapped_answers_change_the_sign_of_margins_and_gradients(loss):
    options = PreferenceOptions(loss=loss, gamma=0.0)
    given, swapped = rows().requires_grad_(), rows(("rejected", "chosen")).requires_grad_()
    table = pair_figures(given, references(), options).table
    other = pair_figures(swapped, references().flip(1), options).table
    margin, accuracy = FIGURES.index("rewards/margins"), FIGURES.index("rewards/accuracies")
    assert torch.allclose(table[:, margin], -other[:, margin], atol=1e-5)
    assert torch.equal(table[:, accuracy], 1 - other[:, accuracy])
    if loss != "ipo":  # which has a minimum
        for each in (given, swapped):
            pair_figures(each, references(), PreferenceOptions(loss=loss)).loss.sum().backward()
            assert each.grad is not None
            chosen, rejected = each.grad[:, 0].view(2, -1)
            assert (chosen >= 0).all(), "a more likely chosen answer has a higher loss"
            assert (rejected <= 0).all(), "a more likely rejected answer has a lower loss"


def test_the_reference_itself_has_the_loss_of_an_undecided_model():
    options, given = PreferenceOptions(), rows()
    loss, table = pair_figures(given, -given[:, 0].view(2, -1).T, options)
    assert loss.tolist() == pytest.approx([math.log(2)] * len(loss))
    assert not table[:, :4].any()


def test_ftx_adds_the_loss_of_the_better_answers():
    plain = pair_figures(rows(), references(), PreferenceOptions()).loss
    added = pair_figures(rows(), references(), PreferenceOptions(ftx=0.5)).loss
    nll, tokens = rows()[: len(plain)].T
    assert torch.allclose(added - plain, 0.5 * nll / tokens, atol=1e-6)


def test_a_certain_answer_has_a_finite_loss():
    certain = torch.tensor([[0.0, 3.0], [2.0, 3.0]], requires_grad=True)
    loss = pair_figures(certain, None, PreferenceOptions(loss="orpo")).loss
    loss.sum().backward()
    assert certain.grad is not None
    assert torch.isfinite(loss).all()
    assert torch.isfinite(certain.grad).all()


def test_a_loss_without_its_reference_is_refused():
    with pytest.raises(ValueError, match="sigmoid needs log-probabilities of a reference"):
        pair_figures(rows(), None, PreferenceOptions())
