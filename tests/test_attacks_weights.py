"""Quantisation, pruning, noise, undoing and interpolation: the numbers, and the model's weights afterwards."""

import attacks_cases as cases
import numpy as np
import pandas as pd
import pytest
import small
import torch

from helpers import attacks
from helpers.attacks.weights import GROUP, changed, nf4_levels, round_trip, smallest_dropped
from helpers.selection import everything

READINGS = ["prob_true", "prob_edit", "top_true", "top_edit"]
BOUND = {"int8": 0.5 / 127, "int4": 0.5 / 7, "nf4": 0.152}  # of the largest weight of a group


def matrix(rows=7, columns=200, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.logspace(-4, 2, rows)[:, None]


@pytest.mark.parametrize("kind", GROUP)
@pytest.mark.parametrize("columns", [1, 64, 200])
def test_quantisation_error_is_bounded(kind, columns):
    """By half a step of the group's scale, also in the last, shorter group."""
    weight = matrix(columns=columns)
    error = (round_trip(weight, kind) - weight).abs()
    group = min(GROUP[kind] or columns, columns)
    for start in range(0, columns, group):
        largest = weight[:, start:start + group].abs().amax(1, keepdim=True)
        assert (error[:, start:start + group] <= BOUND[kind] * largest * (1 + 1e-5)).all()
    assert round_trip(weight, kind).shape == weight.shape


@pytest.mark.parametrize("kind", GROUP)
def test_zero_and_idempotence(kind):
    assert torch.equal(round_trip(torch.zeros(3, 70), kind), torch.zeros(3, 70))
    once = round_trip(matrix(), kind)
    assert torch.allclose(round_trip(once, kind), once, rtol=1e-5)
    assert all(len(row[start:start + (GROUP[kind] or 200)].unique()) <= {"int8": 255, "int4": 15, "nf4": 16}[kind]
               for row in once for start in range(0, 200, GROUP[kind] or 200))


def test_representable_weights_are_exact():
    """Integers from −127 to 127, of which each row has the largest, times a power of two."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randint(-127, 128, (5, 300), generator=generator).float()
    weight[:, 0] = 127
    weight *= torch.tensor([1.0, 2, 0.5, 2**-10, 2**7])[:, None]
    assert torch.equal(round_trip(weight, "int8"), weight)
    nibbles = (weight / weight[:, :1] * 7).round() * weight[:, :1].sign() * 0.25
    nibbles[:, ::128] = 7 * 0.25
    assert torch.equal(round_trip(nibbles, "int4"), nibbles)


def test_nf4_is_the_published_table():
    levels = nf4_levels()
    assert len(levels) == 16 and levels[7] == 0 and levels[0] == -1 and levels[-1] == 1
    published = {1: -0.6961928, 2: -0.52507305, 6: -0.09105004, 8: 0.0795803, 9: 0.1609302, 14: 0.72295684}
    assert all(levels[i].item() == pytest.approx(value, abs=1e-6) for i, value in published.items())
    with pytest.raises(attacks.AttackError, match="quantisation to 'fp3'"):
        round_trip(matrix(), "fp3")


def test_pruning_drops_the_smallest():
    weight = matrix()
    for share in (0, 0.3, 1):
        pruned = smallest_dropped(weight, share)
        dropped = pruned == 0
        assert dropped.sum() == round(share * weight.numel()) and torch.equal(pruned[~dropped], weight[~dropped])
        if 0 < share < 1:
            assert weight[dropped].abs().max() <= weight[~dropped].abs().min()
    with pytest.raises(attacks.AttackError, match="share 1.5"):
        smallest_dropped(weight, 1.5)


def test_every_matrix_of_the_blocks_and_nothing_else():
    model, before = cases.known(), small.weights(cases.known())
    with changed(model, everything(model), lambda name, w: round_trip(w, "int8"), "quantise"):
        moved = {name for name, p in model.hf.named_parameters() if not torch.equal(p, before[name])}
        for name in moved:
            assert torch.equal(model.hf.get_parameter(name), round_trip(before[name], "int8"))
    assert moved == set(everything(model).entries) and len(moved) == 21
    assert small.same(model, before)


def readings(rows, **where):
    for name, value in where.items():
        rows = rows[rows[name] == value]
    return rows[rows["group"] == "forget"].set_index("subject")[READINGS]


@pytest.mark.parametrize("share", [None, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_undoing_every_direction_restores_the_original(share, dtype):
    model, given = cases.random_model(dtype=dtype), cases.a_split()
    edit = cases.random_edit(model, share=share)
    plain, edited = (readings(attacks.untouched(model, e, given, formats=("one_shot",))) for e in (None, edit))
    rows = attacks.undo(model, edit, given, ranks=(0, 1, 31, 32, None), **cases.ONE_SHOT, n_retain=3)
    assert not np.allclose(plain, edited, atol=1e-3)
    for setting in ("rank 32, one_shot", "all directions, one_shot"):
        pd.testing.assert_frame_equal(readings(rows, setting=setting), plain, check_exact=True)
    assert np.allclose(readings(rows, rank=0), edited, atol=1e-6)
    assert not np.allclose(readings(rows, rank=1), edited, atol=1e-6)
    distance = {rank: np.abs(readings(rows, rank=rank) - plain).to_numpy().max() for rank in (0, 31)}
    assert distance[31] < distance[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ends_of_the_line_are_the_two_models(dtype):
    model, given = cases.random_model(dtype=dtype), cases.a_split()
    edit = cases.random_edit(model, share=0.5)
    plain, edited = (readings(attacks.untouched(model, e, given, formats=("one_shot",))) for e in (None, edit))
    rows = attacks.interpolate(model, edit, given, amounts=(0, 0.5, 1.0, 2), **cases.ONE_SHOT, n_retain=3)
    pd.testing.assert_frame_equal(readings(rows, amount=0), plain, check_exact=True)
    pd.testing.assert_frame_equal(readings(rows, amount=1), edited, check_exact=True)
    assert not np.allclose(readings(rows, amount=0.5), plain) and not np.allclose(readings(rows, amount=2), edited)


def test_noise_is_drawn_for_each_draw_and_none_is_none():
    model, edit, given = cases.known(), cases.edit(), cases.a_split()
    rows = attacks.noise(model, edit, given, levels=(0, 0.1), draws=2, **cases.ONE_SHOT, n_retain=3)
    edited = readings(attacks.untouched(model, edit, given, formats=("one_shot",)))
    pd.testing.assert_frame_equal(readings(rows, level=0, draw=1), edited, check_exact=True)
    assert not np.allclose(readings(rows, level=0.1, draw=0), readings(rows, level=0.1, draw=1), atol=1e-6)
    other = attacks.noise(model, edit, given, levels=(0.1,), **cases.ONE_SHOT, n_retain=3, seed=1)
    assert not np.allclose(readings(rows, level=0.1, draw=0), readings(other), atol=1e-6)


def test_quantising_the_edited_model_keeps_its_answers():
    """int8 is fine enough for a tiny model; retain stands beside it."""
    rows = attacks.quantise(cases.known(), cases.edit(), cases.a_split(), kinds=("int8",), **cases.ONE_SHOT)
    edited = attacks.untouched(cases.known(), cases.edit(), cases.a_split(), formats=("one_shot",))
    for group in ("forget", "retain"):
        assert cases.mean(rows, "prob_true", group=group) == pytest.approx(cases.mean(edited, "prob_true", group=group), abs=.05)


def test_what_compares_with_the_original_needs_an_edit():
    for attack in (attacks.undo, attacks.interpolate):
        with pytest.raises(attacks.AttackError, match="it needs an edit"):
            attack(cases.known(), None, cases.a_split())
