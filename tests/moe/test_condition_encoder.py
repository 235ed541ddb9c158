# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""The condition encoder of MoPE: conditions that are there, and those that are missing in every way."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from medmoe.conditions import Column, Schema
from medmoe.errors import ConfigError
from medmoe.moe.mope import ConditionEncoder
from tests.moe.small_mope import (
    BATCH,
    CATEGORIES,
    IMAGE,
    NUMBERS,
    PSI,
    SCHEMA,
    TEXT,
    TEXTS,
    full_condition,
    mope,
    no_condition,
    patches,
)


def test_no_condition_is_a_condition_of_which_all_is_missing() -> None:
    encoder = mope().eval().encoder
    null = encoder(None, BATCH)
    assert torch.equal(null, encoder({}, BATCH))
    assert torch.equal(null, encoder(no_condition(), BATCH))
    assert not torch.allclose(null, encoder(full_condition(), BATCH))


@pytest.mark.parametrize("name", ["numbers", "categories", "text", "image_features"])
def test_a_group_that_is_absent_is_a_group_that_is_missing(name: str) -> None:
    encoder, condition = mope().eval().encoder, full_condition()
    absent = encoder({key: value for key, value in condition.items() if key != name}, BATCH)
    assert torch.equal(absent, encoder({**condition, name: no_condition()[name]}, BATCH))
    assert not torch.allclose(absent, encoder(condition, BATCH))


@pytest.mark.parametrize("training", [True, False])
def test_missing_values_give_no_nan_in_outputs_or_gradients(training: bool) -> None:
    model = mope().train(training)
    with torch.no_grad():
        for p in model.encoder.parameters():
            p.add_(0.1 * torch.randn_like(p))  # also where training starts from zeros
    condition = full_condition()
    condition["numbers"][0, 1] = condition["numbers"][1] = math.nan
    condition["categories"][0, 0] = 0
    condition["text"][2, 0] = condition["text"][3] = condition["image_features"][4] = math.nan
    for given in (condition, no_condition()):
        floats = [value.requires_grad_() for value in given.values() if value.is_floating_point()]
        prompts, weights = model(0, 0, patches(), model.encode(given, BATCH))
        (prompts.square().sum() + model.importance_loss([weights])).backward()
        assert prompts.isfinite().all()
        found = [t.grad for t in (*floats, *model.parameters()) if t.grad is not None]
        assert len(found) > len(floats)
        assert all(gradient.isfinite().all() for gradient in found)


def test_partly_missing_groups_keep_what_is_there() -> None:
    encoder, condition = mope().eval().encoder, full_condition()
    for name in ("numbers", "categories", "text"):
        values = condition[name].clone()
        values[:, 0] = math.nan if values.is_floating_point() else 0
        partly = encoder({**condition, name: values}, BATCH)
        assert not torch.allclose(partly, encoder({**condition, name: no_condition()[name]}, BATCH))
        values[:, 1] = values[:, 1].flip(0) + (1 if name != "categories" else 0)
        if not torch.equal(values[:, 1], condition[name][:, 1]):
            assert not torch.allclose(partly, encoder({**condition, name: values}, BATCH))


def test_a_value_that_was_never_missing_in_training_is_neutral_when_it_is() -> None:
    """An untrained mask does not move psi: a number is at its mean, a text or a category never seen adds nothing."""
    encoder, condition = mope().eval().encoder, full_condition()
    for name in ("numbers", "text"):
        neutral, missing = condition[name].clone(), condition[name].clone()
        neutral[:, 0], missing[:, 0] = 0, math.nan
        expected = encoder({**condition, name: neutral}, BATCH)
        assert torch.equal(encoder({**condition, name: missing}, BATCH), expected)
    group = encoder.groups[1]
    unseen = torch.tensor([[0, 2]])
    assert torch.equal(group(unseen, unseen == 0), group.embeddings[1].weight[2:3])


def test_a_category_never_seen_can_be_learned() -> None:
    encoder = mope().eval().encoder
    condition = {**full_condition(), "categories": torch.tensor([[0, 1]]).expand(BATCH, -1)}
    encoder(condition, BATCH).square().sum().backward()
    assert encoder.groups[1].embeddings[0].weight.grad[0].abs().sum() > 0


def test_scale_of_a_frozen_encoder_does_not_matter() -> None:
    encoder, condition = mope().eval().encoder, full_condition()
    scaled = {**condition, "text": 1000 * condition["text"], "image_features": 1000 * condition["image_features"]}
    torch.testing.assert_close(encoder(scaled, BATCH), encoder(condition, BATCH), atol=1e-3, rtol=1e-3)


def test_modality_dropout_drops_groups_in_training_only() -> None:
    """The whole condition with probability p, else each of four groups with q; 5 standard errors of 4000 samples."""
    count, p, q = 4000, 0.3, 0.2
    encoder = ConditionEncoder(SCHEMA, PSI, IMAGE, dropout=p, group_dropout=q)
    one = full_condition(1)
    condition = {name: value.expand(count, *value.shape[1:]) for name, value in one.items()}
    null, full = encoder.eval()(None, 1), encoder(one, 1)
    assert torch.allclose(encoder(condition, count), full, atol=1e-5)
    seen = encoder.train()(condition, count)

    def share(psi: Tensor) -> float:
        return (seen - psi).abs().amax(1).lt(1e-4).float().mean().item()

    without_text = encoder.eval()({name: value for name, value in one.items() if name != "text"}, 1)
    whole = 1 - p
    for psi, expected in (
        (null, p + whole * q**4),
        (full, whole * (1 - q) ** 4),
        (without_text, whole * q * (1 - q) ** 3),
    ):
        assert share(psi) == pytest.approx(expected, abs=5 * math.sqrt(expected * (1 - expected) / count))


def test_one_condition_serves_all_windows() -> None:
    encoder, one = mope().eval().encoder, full_condition(1)
    repeated = {name: value.expand(BATCH, *value.shape[1:]) for name, value in one.items()}
    torch.testing.assert_close(encoder(one, BATCH), encoder(repeated, BATCH))


@pytest.mark.parametrize("columns", [NUMBERS, CATEGORIES, TEXTS, (Column("t2", "image"),)])
def test_each_kind_of_condition_alone(columns: tuple[Column, ...]) -> None:
    encoder = ConditionEncoder(Schema(columns, "some/encoder", TEXT), PSI, IMAGE).eval()
    psi = encoder(full_condition(), BATCH)
    assert psi.shape == (BATCH, PSI)
    assert len(encoder.nulls) == 1
    assert not torch.allclose(psi, encoder(None, BATCH))


def test_conditions_that_do_not_fit() -> None:
    encoder = mope().encoder
    with pytest.raises(ConfigError, match=r"'numbers' has 5 row\(s\) of 3 column\(s\): expected 5 \(or 1\) of 2"):
        encoder({"numbers": torch.zeros(BATCH, 3)}, BATCH)
    with pytest.raises(ConfigError, match=r"'categories' has 2 row\(s\)"):
        encoder({"categories": torch.ones(2, 2, dtype=torch.long)}, BATCH)
