"""AlphaEdit: what `down` gives for preserved keys stays, facts written earlier stay, and nothing is remembered between calls."""

import pytest
import small
import torch

from helpers.unlearning.alphaedit import alphaedit
from helpers.unlearning.covariances import CovarianceError, preserved
from helpers.unlearning.edit import EditError
from helpers.unlearning.memit import memit
from helpers.unlearning.values import Values, ask, mean_keys

FAMILIES = ("llama", "gemma", "gemma2", "qwen3", "neox")
QUICK = Values(steps=6, contexts=1)
TEXTS, N_TOKENS = small.TEXTS, 24  # fewer tokens than d_mlp = 48: there is a null space in earnest


def keys_of_text(model, layer: int) -> torch.Tensor:
    """The very keys that are preserved, by plain passes."""
    seen, hook = [], model.part("down", layer).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    for ids in model.tokenizer(TEXTS[:8])["input_ids"]:
        model.hf(input_ids=torch.tensor([ids]), use_cache=False)
    hook.remove()
    return torch.cat(seen)[:N_TOKENS].double()


def change(model, edit, layer: int) -> torch.Tensor:
    name = f"{model.path('down', layer)}.weight"
    return edit.values[name].double() - model.hf.get_parameter(name).double()


@pytest.mark.parametrize("family", FAMILIES)
def test_preserved_keys_give_what_they_gave(family):
    model, given = small.model(family), small.a_split()
    before = small.weights(model)
    edit = alphaedit(model, given, [0, 1], QUICK, TEXTS, share=0.0, names=0.0, n_tokens=N_TOKENS)
    assert small.same(model, before)
    other = memit(model, given, [0, 1], QUICK, TEXTS, preserve=0.1, names=0.0, n_tokens=N_TOKENS)
    for layer in (0, 1):
        text, kept = keys_of_text(model, layer), change(model, edit, layer)
        moved = (kept @ text.T).norm(dim=0).max()
        assert moved < 1e-5 * kept.norm() * text.norm(dim=1).mean()
        assert moved < 0.1 * (change(model, other, layer) @ text.T).norm(dim=0).max()  # MEMIT with the same C
        facts = mean_keys(model, ask(model, given, given.forget, TEXTS, QUICK), 0)[0]
        if layer == 0:
            assert (kept @ facts.T).norm(dim=0).min() > 1e-2
    assert edit.record["missing_after"] < edit.history["missing"][0] and edit.record["loss_after"] < edit.record["loss_before"]
    # so the model's answers on those tokens stay, too
    tokens = torch.tensor([model.tokenizer(TEXTS[0])["input_ids"]])
    clean = model.hf(input_ids=tokens, use_cache=False).logits
    with edit.applied(model):
        torch.testing.assert_close(model.hf(input_ids=tokens, use_cache=False).logits, clean, rtol=1e-3, atol=1e-3)
    assert len(tokens[0]) < N_TOKENS


def test_equals_the_published_formula():
    """R Kᵀ P (K Kᵀ P + K₁ K₁ᵀ P + α I)⁻¹ in full, with keys of earlier facts."""
    model, given = small.model(), small.a_split()
    now, earlier = given.forget[:3], given.forget[3:]
    edit = alphaedit(model, given, [1], QUICK, TEXTS, forget=now, earlier=earlier, share=0.3, ridge=0.2)
    keys, first = (mean_keys(model, ask(model, given, facts, TEXTS, QUICK), 1)[0].T for facts in (now, earlier))
    basis = preserved(model, given, [1], TEXTS)[1].null_space(0.3)
    p = basis @ basis.T
    alpha = 0.2 * (p @ keys).square().sum(0).mean()
    system = (keys @ keys.T + first @ first.T) @ p + alpha * torch.eye(len(p), dtype=torch.float64)
    shape = torch.linalg.solve(system.T, (keys.T @ p).T).T  # KᵀP (…)⁻¹, what R is multiplied by
    residual = torch.linalg.lstsq(shape.T, change(model, edit, 1).T).solution.T
    torch.testing.assert_close(residual @ shape, change(model, edit, 1), rtol=1e-3, atol=1e-4)
    assert residual.norm(dim=0).mean().item() == pytest.approx(edit.history["missing"][0], rel=1e-3)


def test_facts_written_earlier_stay():
    model, given = small.model("gemma"), small.a_split()
    now, earlier = given.forget[:2], given.forget[2:]
    options = dict(values=QUICK, texts=TEXTS, forget=now, share=0.3, ridge=1e-3)
    keys = mean_keys(model, ask(model, given, earlier, TEXTS, QUICK), 1)[0].T
    careless, careful = (change(model, alphaedit(model, given, [1], earlier=facts, **options), 1) @ keys for facts in (None, earlier))
    assert careful.norm() < 0.1 * careless.norm()


def test_independent_edits_share_nothing():
    model, given = small.model(), small.a_split()
    run = lambda facts: alphaedit(model, given, [1], QUICK, TEXTS, forget=facts, share=0.3)
    first = run(given.forget[:2])
    run(given.forget[2:])
    alphaedit(small.model("neox"), given, [1], QUICK, TEXTS, share=0.3)
    again = run(given.forget[:2])
    assert all(torch.equal(first.values[name], again.values[name]) for name in first.values)


def test_refusals():
    model, given = small.model(), small.a_split()
    with pytest.raises(CovarianceError, match="no direction holds as little as 0.0"):
        alphaedit(model, given, [1], QUICK, TEXTS, share=0.0)
    with pytest.raises(EditError, match="ridge=0.0: it must be positive"):
        alphaedit(model, given, [1], QUICK, TEXTS, ridge=0.0)
