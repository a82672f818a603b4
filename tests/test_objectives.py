"""Losses against hand-computed cases, and against each other."""

import math

import pytest
import torch

from helpers.unlearning.objectives import (
    NPO,
    OBJECTIVES,
    RMU,
    EditAnswer,
    GradDiff,
    GradientAscent,
    Objective,
    Relearn,
    SimNPO,
    Targets,
    Unlearn,
    objective,
)

# three tokens with probabilities .5, .3, .2; true answer, edit answer
P = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
LOGITS = P.log() + 1.7  # a shift of all logits changes nothing
TRUE, EDIT = 0, 2


def targets(reference: float | None = None) -> Targets:
    return Targets(torch.tensor([TRUE]), torch.tensor([EDIT]), None if reference is None else torch.tensor([math.log(reference)], dtype=torch.float64))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("loss", "reference", "wanted"),
    [
        (EditAnswer(), None, -math.log(0.2)),
        (Relearn(), None, -math.log(0.5)),
        (Unlearn(), None, -math.log(1 - 0.5)),
        (GradientAscent(), None, math.log(0.5)),
        (GradDiff(), None, math.log(0.5)),
        (NPO(beta=0.1), 0.8, -20 * math.log(sigmoid(-0.1 * math.log(0.5 / 0.8)))),
        (NPO(beta=2.0), 0.1, -math.log(1 / (1 + (0.5 / 0.1) ** 2))),
        (SimNPO(beta=2.5, gamma=0.3), None, -0.8 * math.log(sigmoid(-2.5 * math.log(0.5) - 0.3))),
    ],
)
def test_by_hand(loss, reference, wanted):
    assert loss.loss(LOGITS, targets(reference)).tolist() == pytest.approx([wanted], abs=1e-12)


def gradient(loss: Objective, logits: torch.Tensor, aims: Targets) -> torch.Tensor:
    logits = logits.clone().requires_grad_()
    return torch.autograd.grad(loss.loss(logits, aims).sum(), logits)[0]


def test_unlearning_is_cut_off():
    """log p = −4.99 counts, −5.01 does not; neither its value nor its gradient."""
    for log_p, counts in ((-4.99, True), (-5.01, False)):
        p = math.exp(log_p)
        logits = torch.tensor([[p, 1 - p, 0.0]], dtype=torch.float64).log().clamp(min=-50)
        assert (Unlearn().loss(logits, targets()).item() > 0) is counts
        assert gradient(Unlearn(), logits, targets()).any().item() is counts
    assert Unlearn(cutoff=-6.0).loss(torch.tensor([[math.exp(-5.01), 1.0, 1.0]]).log(), targets()).item() > 0


def test_unlearning_stays_finite_where_the_model_is_certain():
    logits = torch.tensor([[60.0, 0.0, 0.0]])
    assert Unlearn().loss(logits, targets()).item() == pytest.approx(60 - math.log(2), rel=1e-6)
    assert gradient(Unlearn(), logits, targets()).isfinite().all()


def test_unlearning_gradient_by_hand():
    """d −log(1 − p_0) / d logit_0 = p_0; for another token j it is −p_0 p_j / (1 − p_0)."""
    assert gradient(Unlearn(), LOGITS, targets())[0].tolist() == pytest.approx([0.5, -0.5 * 0.3 / 0.5, -0.5 * 0.2 / 0.5])


@pytest.mark.parametrize("reference", [0.9, 0.05])
def test_npo_tends_to_gradient_ascent(reference):
    ascent = gradient(GradientAscent(), LOGITS, targets())
    errors = []
    for beta in (1.0, 0.1, 0.01, 0.001):
        npo = gradient(NPO(beta=beta), LOGITS, targets(reference))
        weight = 2 * 0.5**beta / (0.5**beta + reference**beta)
        assert torch.allclose(npo, weight * ascent)
        errors.append((npo - ascent).norm().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 2e-3 * ascent.norm().item()


def test_at_the_start_npo_is_gradient_ascent_for_every_beta():
    for beta in (0.1, 5.0):
        assert torch.allclose(gradient(NPO(beta=beta), LOGITS, targets(0.5)), gradient(GradientAscent(), LOGITS, targets()))


def test_npo_and_simnpo_lose_interest_in_what_is_forgotten():
    low = torch.tensor([[1e-9, 0.5, 0.5]], dtype=torch.float64).log()
    for loss, aims in ((NPO(beta=1.0), targets(0.5)), (SimNPO(), targets())):
        assert gradient(loss, low, aims).norm() < 1e-6 * gradient(GradientAscent(), low, aims).norm()


def test_rmu_by_hand():
    mask = torch.tensor([[1, 1, 0]])
    base = torch.tensor([[[3.0, 4.0], [0.0, 2.0], [9.0, 9.0]]])
    hidden = base + torch.tensor([[[1.0, 0.0], [0.0, 2.0], [7.0, 7.0]]])
    u = torch.tensor([1.0, 0.0])
    assert RMU(alpha=10).keep(hidden, base, mask).tolist() == pytest.approx([10 * (1 + 4) / 2 / 2])
    # adaptive: each token is steered to 5 ‖h_base‖ u = (25, 0) and (10, 0)
    assert RMU().forget(hidden, base, mask, u).tolist() == pytest.approx([((4 - 25) ** 2 + 4**2 + 10**2 + 4**2) / 2 / 2])
    assert RMU(coefficient=6.5).forget(hidden, base, mask, u).tolist() == pytest.approx([((4 - 6.5) ** 2 + 4**2 + 6.5**2 + 4**2) / 2 / 2])
    direction = RMU().direction(32, seed=3)
    assert direction.norm().item() == pytest.approx(1)
    assert (direction >= 0).all() and torch.equal(direction, RMU().direction(32, seed=3))


def test_objectives_by_name():
    assert objective("npo", beta=0.5) == NPO(beta=0.5)
    assert objective(RMU()) == RMU()
    assert {kind.name for kind in OBJECTIVES.values()} == set(OBJECTIVES)
    with pytest.raises(ValueError, match="unknown objective 'nop'; there are edit, unlearn"):
        objective("nop")
