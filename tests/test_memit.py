"""MEMIT: ROME in the limit, least squares over layers, and a post-norm taken into account."""

import pytest
import small
import torch

from helpers.masks import mask
from helpers.unlearning.covariances import preserved
from helpers.unlearning.edit import EditError
from helpers.unlearning.memit import memit, through
from helpers.unlearning.rome import rome
from helpers.unlearning.values import Values, ask, mean_keys, optimise, sizes

FAMILIES = ("llama", "gemma", "gemma2", "qwen3", "neox")
QUICK = Values(steps=6, contexts=0)


def change(model, edit, layer: int = 1) -> torch.Tensor:
    name = f"{model.path('down', layer)}.weight"
    return edit.values[name].double() - model.hf.get_parameter(name).double()


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma2"])
def test_one_fact_and_one_layer_is_rome_in_the_limit(family):
    """ΔW = ΔW_ROME · kᵀC⁻¹k / (λ + kᵀC⁻¹k): all of it as λ → 0, and kᵀC⁻¹k / λ of it as λ → ∞."""
    model, given = small.model(family), small.a_split()
    options = dict(values=QUICK, texts=small.TEXTS, forget=given.forget[:1], ridge=0.05)
    wanted = change(model, rome(model, given, 1, **options))
    requests = ask(model, given, given.forget[:1], small.TEXTS, QUICK)
    key = mean_keys(model, requests, 1)[0]
    gram = (key @ preserved(model, given, [1], small.TEXTS)[1].solve(key, 0.05).T).item()
    near = lambda scale: dict(rtol=1e-3, atol=2e-4 * scale * wanted.abs().max().item())
    for preserve in (1e-9, 1.0, 1e4):
        found = change(model, memit(model, given, [1], preserve=preserve, **options))
        share = gram / (preserve * model.d_mlp + gram)
        torch.testing.assert_close(found, share * wanted, **near(max(share, 1e-2)))


def test_under_a_post_norm_the_value_is_found_in_the_residual():
    """There no norm bounds it. Of its one layer MEMIT then asks, as λ → 0, for what comes nearest behind the norm."""
    model, given = small.model("gemma2"), small.a_split()
    one = given.forget[:1]
    edit = memit(model, given, [1], QUICK, small.TEXTS, forget=one, ridge=0.05, preserve=1e-9)
    requests = ask(model, given, one, small.TEXTS, QUICK)
    key, residual = mean_keys(model, requests, 1)
    delta, _ = optimise(model, requests, 1, sizes(model, requests, 1, behind=True), QUICK, behind=True)
    _, goal = mean_keys(model, requests, 1, delta=delta, behind=True)
    torch.testing.assert_close(goal - residual, delta, rtol=1e-4, atol=1e-4 * delta.abs().max().item())
    old = key @ model.matrix("down", 1)[0].double().T
    wanted = through(model.mlp_post_norm(1), old, delta)
    torch.testing.assert_close(key @ change(model, edit).T, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())


@pytest.mark.parametrize("family", FAMILIES)
def test_several_layers_and_facts(family):
    model, given = small.model(family), small.a_split()
    before = small.weights(model)
    values = Values(steps=6, contexts=2)
    edit = memit(model, given, mask(model, ["mlp 0", "mlp 1"]), values, small.TEXTS, preserve=0.0)
    assert small.same(model, before) and not any(p.requires_grad for p in model.hf.parameters())
    assert sorted(edit.values) == [f"{model.path('down', layer)}.weight" for layer in (0, 1)]
    missing = [*edit.history["missing"], edit.record["missing_after"]]
    assert missing[0] > missing[1] > missing[2] and edit.record["loss_after"] < edit.record["loss_before"]
    if model.mlp_post_norm(0) is None:
        assert missing[2] < 1e-4 * missing[0]  # with λ = 0 and more directions than facts, nothing is left
    kept = memit(model, given, [0, 1], values, small.TEXTS, preserve=50.0)
    assert kept.norm < edit.norm and kept.record["missing_after"] > missing[2]
    again = memit(model, given, [1, 0], values, small.TEXTS, preserve=50.0)
    assert all(torch.equal(again.values[name], kept.values[name]) for name in kept.values)


def test_solves_the_stated_least_squares_problem():
    model, given = small.model("gemma"), small.a_split()
    edit = memit(model, given, [1], QUICK, small.TEXTS, preserve=2.0, ridge=0.1)
    keys = mean_keys(model, ask(model, given, given.forget, small.TEXTS, QUICK), 1)[0]
    c = preserved(model, given, [1], small.TEXTS)[1].matrix.double()
    c.diagonal().add_(0.1 * c.diagonal().mean())
    system = 2.0 * model.d_mlp * c + keys.T @ keys
    # ΔW (λC + KKᵀ) = R Kᵀ lies in the span of the keys, and R is what explains it
    right = change(model, edit) @ system
    residual = torch.linalg.lstsq(keys.T, right.T).solution.T
    torch.testing.assert_close(residual @ keys, right, rtol=1e-3, atol=1e-3 * right.abs().max().item())
    assert residual.norm(dim=0).mean().item() == pytest.approx(edit.history["missing"][0], rel=1e-3)


def test_through_a_post_norm():
    model = small.model("gemma2")
    norm = model.mlp_post_norm(1)
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(5, model.d_model, generator=generator, dtype=torch.float64)
    after = lambda x: norm(x.float()).double()
    assert through(norm, output, torch.zeros_like(output)).abs().max() < 1e-4
    other = torch.randn(5, model.d_model, generator=generator, dtype=torch.float64)
    reached = through(norm, output, after(other) - after(output))
    torch.testing.assert_close(after(output + reached), after(other), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close((output + reached).norm(dim=1), output.norm(dim=1))
    wish = torch.randn(5, model.d_model, generator=generator, dtype=torch.float64) * 3  # out of reach: as near as can be
    best = (after(output + through(norm, output, wish)) - after(output) - wish).norm(dim=1)
    for _ in range(50):
        step = output + through(norm, output, wish) + 0.1 * torch.randn(5, model.d_model, generator=generator, dtype=torch.float64)
        assert ((after(step) - after(output) - wish).norm(dim=1) >= best - 1e-4).all()
    with pytest.raises(EditError, match="does not ignore the length of its input"):
        through(torch.nn.Tanh(), output, wish)


def test_refusals():
    model, given = small.model(), small.a_split()
    with pytest.raises(EditError, match="preserve=-1.0"):
        memit(model, given, [1], texts=small.TEXTS, preserve=-1.0)
    edit = memit(small.model("llama", torch.bfloat16), given, [1], QUICK, small.TEXTS)
    assert all(value.dtype == torch.bfloat16 for value in edit.values.values())
