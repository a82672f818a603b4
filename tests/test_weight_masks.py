"""Weight masks: both parametrisations and both regularisers, exact nested ladders, and edits that zero what they say."""

import itertools
import math
from dataclasses import replace

import pytest
import small
import torch
from torch.nn import functional as F

from helpers import prompts
from helpers.masks import SelectionError, mask
from helpers.unlearning import weight_masks
from helpers.unlearning.deletions import available, by_saliency, candidates, chance, delete, ladder, magnitude, weights_of
from helpers.unlearning.finetune import build_terms
from helpers.unlearning.objectives import EditAnswer
from helpers.unlearning.training import Settings, TrainingError
from helpers.unlearning.weight_masks import Learning, learn

FAMILIES = ("llama", "gemma", "gemma2", "qwen3", "neox")
KINDS = list(itertools.product(weight_masks.PARAMETRISATIONS, weight_masks.REGULARISERS))
QUICK = Settings(learning_rate=0.5, forget_weight=0.5, steps=4, batch=8, text_tokens=8)


def learning(parametrisation="explicit", regulariser="towards", **changes) -> Learning:
    rate = {"learning_rate": {"explicit": 0.5, "clamped": 0.05}[parametrisation]}
    return Learning(parametrisation, regulariser, training=replace(QUICK, **rate | changes))


def run(model, chosen=None, how=None, **options):
    where = candidates(model, chosen or mask(model, ["mlp 1", "head 2.1"]))
    return where, learn(model, small.a_split(), where, "edit", how or learning(), small.TEXTS, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_masks_stay_in_range_and_deletions_are_exact(family, kind):
    model = small.model(family)
    before, clean = small.weights(model), small.logits(model)
    where, learned = run(model, how=learning(*kind))
    assert small.same(model, before) and not any(p.requires_grad or p.grad is not None for p in model.hf.parameters())
    assert learned.values.keys() == where.entries.keys() and not any("gate" in name for name in where.entries)
    for name, m in learned.values.items():
        assert m.shape == before[name].shape and (m >= 0).all() and (m <= 1).all()
        if where.entries[name] is not None:
            assert (m[~where.entries[name]] == 1).all() and (m < 1).any()
    ns = [1, 7, 60, 200]
    masks = ladder(model, learned.importance, ns, "learned")
    for n, chosen in zip(ns, masks):
        assert chosen.n_parameters == chosen.budget == n
        edit = delete(model, chosen, learned.record)
        assert edit.n_weights == n and edit.record["deleted"] == n and edit.record["method"] == f"weight mask {' '.join(kind)}"
        with edit.applied(model):
            assert not torch.equal(small.logits(model), clean) or n == 1
            for name, parameter in model.hf.named_parameters():
                part = chosen.entries.get(name, torch.zeros_like(parameter, dtype=torch.bool))
                assert (parameter[part] == 0).all() and torch.equal(parameter[~part], before[name][~part])
        assert small.same(model, before)
    for few, more in itertools.pairwise(masks):  # nested
        assert all((more.entries[name] & part).sum() == part.sum() for name, part in few.entries.items())
    # n smallest: no kept candidate has a smaller m than a deleted one
    flat = torch.cat([m.flatten() for m in learned.values.values()])
    deleted = torch.cat([masks[-1].entries.get(name, torch.zeros_like(m, dtype=torch.bool)).flatten() for name, m in learned.values.items()])
    assert flat[deleted].max() <= flat[~deleted].min()


def plain(model, where, how: Learning) -> dict[str, torch.Tensor]:
    """The same learning by plain autograd through m · w0, or w, and torch.optim.SGD; only the drawn rows are shared."""
    given, settings, explicit = small.a_split(), how.training, how.parametrisation == "explicit"
    terms = build_terms(model, given, given.forget, EditAnswer(), settings, small.TEXTS, 0, where)
    w0 = {name: model.hf.get_parameter(name).detach().clone() for name in where.entries}
    part = {name: torch.ones_like(w, dtype=torch.bool) if where.entries[name] is None else where.entries[name] for name, w in w0.items()}
    free = {name: (torch.ones_like(w) if explicit else w.clone()).requires_grad_() for name, w in w0.items()}
    published = how.regulariser == "published"
    decay = how.decay if published else 0.0
    optimizer = torch.optim.SGD(free.values(), lr=1.0, momentum=how.momentum, weight_decay=decay)
    labels = {"forget": prompts.build(model.tokenizer, given.forget, "one_shot", pool=given.retain_train).edit_ids,
              "retain": prompts.build(model.tokenizer, given.retain_train, "one_shot", pool=given.retain_train).answer_ids}
    for step in range(settings.steps):
        optimizer.zero_grad()
        used = {name: f * w0[name] if explicit else f for name, f in free.items()}
        if how.hard:  # straight-through: the value is cut, the gradient is not
            cut = {name: w0[name] * ((f if explicit else f / w0[name]) >= 0.5) for name, f in free.items()}
            used = {name: w + (cut[name] - w).detach() for name, w in used.items()}
        new = {name: torch.where(part[name], w, w0[name]) for name, w in used.items()}
        total = 0.0
        for term in terms:
            rows = term.draws[step][0].repeat_interleave(term.draws[step][1])
            tokens, mask_ = term.sequences.tokens[rows], term.sequences.mask[rows]
            inputs = dict(input_ids=tokens, attention_mask=mask_, position_ids=(mask_.cumsum(1) - 1).clamp(min=0), use_cache=False)
            out = torch.func.functional_call(model.hf, new, kwargs=inputs).logits
            if term.name == "text":
                loss = F.cross_entropy(out[:, :-1].flatten(0, 1), tokens[:, 1:].masked_fill(mask_[:, 1:] == 0, -100).flatten())
            else:
                loss = F.cross_entropy(out[torch.arange(len(rows)), mask_.sum(1) - 1], labels[term.name][rows])
            total = total + term.weight * loss
        c, beta = how.coefficient(step), how.strength
        size = sum(int(p.sum()) for p in part.values()) if explicit else sum(w.abs()[part[name]].sum() for name, w in w0.items())
        assert c == (min(beta * (step - 15), beta) if explicit and published else beta)
        # towards: the same as |f − w0| where f may be, between 0 and w0, and with a slope at w0 itself
        distance = lambda f, w: ((f - 1).abs() if published else 1 - f) if explicit else f.abs() if published else (w - f) * w.sign()
        total = total + c / size * sum(distance(f, w0[name])[part[name]].sum() for name, f in free.items())
        total.backward()
        torch.nn.utils.clip_grad_norm_(free.values(), settings.clip)
        if not published:
            for name, f in free.items():
                f.grad += how.decay * (f - (1.0 if explicit else w0[name])).detach()
        optimizer.param_groups[0]["lr"] = settings.rate(step)
        optimizer.step()
        with torch.no_grad():
            for name, f in free.items():
                low, high = (0.0 * f, 0.0 * f + 1) if explicit else (w0[name].clamp(max=0), w0[name].clamp(min=0))
                f.copy_(torch.where(part[name], torch.minimum(torch.maximum(f, low), high), 1.0 if explicit else w0[name]))
    return {name: f.detach() if explicit else f.detach() / w0[name] for name, f in free.items()}


@pytest.mark.parametrize("kind, hard", [*((kind, False) for kind in KINDS), (("explicit", "towards"), True), (("clamped", "towards"), True)])
def test_equals_plain_learning(kind, hard):
    model = small.model("gemma2")
    how = replace(learning(*kind, **{"learning_rate": 0.1 * 100**(kind[0] == "explicit")} if hard else {}), hard=hard)
    where, learned = run(model, how=replace(how, training=replace(how.training, chunk=3)))
    wanted = plain(model, where, how)
    for name, m in learned.values.items():
        torch.testing.assert_close(m, wanted[name], rtol=1e-3, atol=1e-3 * (1 - m).max().item())


def test_learned_hard_what_is_learned_is_what_is_deleted():
    """As many deletions as masks below ½ are the model that was trained: the facts gain by them."""
    model, given = small.model(), small.a_split()
    where, learned = run(model, how=replace(learning(learning_rate=10.0, steps=8), hard=True, strength=0.1))
    n = sum(int((m < 0.5).sum()) for m in learned.values.values())
    assert 0 < n < where.n_parameters / 4 and learned.history["deleted"].iloc[-1] == pytest.approx(n / where.n_parameters)
    (cut,) = ladder(model, learned.importance, [n], "hard")
    asked = prompts.build(model.tokenizer, given.forget, "one_shot", pool=given.retain_train)
    with delete(model, cut).applied(model):
        out = model.hf(input_ids=asked.tokens, attention_mask=asked.mask, position_ids=asked.position_ids).logits[torch.arange(len(asked)), asked.last]
    assert F.cross_entropy(out, asked.edit_ids).item() < learned.history["forget"].iloc[0] - 0.1


def test_what_the_regularisers_push_for():
    """Published: away from w0, in `explicit` for the first fifteen steps. Towards: only as far as the facts gain from it."""
    model, means = small.model(), {}
    for kind in KINDS:
        how = replace(learning(*kind, steps=14, learning_rate=0.2 if kind[0] == "explicit" else 0.02), strength=30.0)
        log = run(model, how=how)[1].history
        means[kind] = log["mean"].iloc[-1]
        assert log["forget"].iloc[-1] < log["forget"].iloc[0] and log["deleted"].iloc[-1] <= 1
    assert means["clamped", "published"] < means["clamped", "towards"] - 0.01
    assert means["explicit", "published"] < means["explicit", "towards"] - 0.01
    ramp = [Learning("explicit", "published", 2.0).coefficient(step) for step in (0, 14, 15, 16, 40)]
    assert ramp == [-30.0, -2.0, 0.0, 2.0, 2.0]
    assert all(Learning(*kind, 2.0).coefficient(0) == 2.0 for kind in KINDS if kind != ("explicit", "published"))


@pytest.mark.parametrize("parametrisation", weight_masks.PARAMETRISATIONS)
def test_towards_a_price_above_every_gain_keeps_all_weights(parametrisation):
    """And below it, only weights that gain more than the price leave; published, next to none stays whole."""
    model = small.model()
    whole = {}
    for regulariser, strength in (("towards", 1e6), ("towards", 30.0), ("published", 30.0)):
        how = replace(learning(parametrisation, regulariser, clip=None), strength=strength)
        values = torch.cat([m.flatten() for m in run(model, how=how)[1].values.values()])
        whole[regulariser, strength] = (values == 1).float().mean().item()
    assert whole["towards", 1e6] == 1.0 > whole["towards", 30.0] > whole["published", 30.0] + 0.2


@pytest.mark.parametrize("family", ["llama", "neox"])
def test_candidates(family):
    model = small.model(family)
    chosen = mask(model, ["mlp 1", "head 0.2"])
    where, all_of_it = candidates(model, chosen), candidates(model, chosen, gate=True)
    assert where.counts["gate"] == 0 and where.counts["up"] == where.counts["down"] == model.d_mlp * model.d_model
    assert where.counts["o"] == chosen.counts["o"] and all_of_it.digest == chosen.digest
    assert where.n_parameters == chosen.n_parameters - chosen.counts["gate"]
    with pytest.raises(SelectionError, match="made for another model"):
        candidates(small.model("llama" if family == "neox" else "neox"), chosen)


def test_magnitude_and_saliency_at_equal_n():
    model, given = small.model("gemma2"), small.a_split()
    where = candidates(model, mask(model, ["mlp 1", "head 2.1"]))
    (small_ones,) = ladder(model, magnitude(model, where), [100], "magnitude")
    weights = torch.cat([model.hf.get_parameter(n)[... if p is None else p].flatten().abs() for n, p in where.entries.items()])
    assert delete(model, small_ones).norm == pytest.approx(weights.sort().values[:100].norm().item(), rel=1e-5)
    assert torch.equal(weights_of(model, small_ones).abs().sort().values, weights.sort().values[:100])
    (salient,) = ladder(model, by_saliency(model, given, where), [100], "saliency")
    (contrast,) = ladder(model, by_saliency(model, given, where, contrast=True), [100], "contrast")
    (fisher,) = ladder(model, by_saliency(model, given, where, "fisher"), [100], "fisher")
    assert salient.n_parameters == contrast.n_parameters == fisher.n_parameters == 100
    assert len({m.digest for m in (small_ones, salient, contrast, fisher)}) == 4
    for chosen in (small_ones, salient, contrast, fisher):  # candidates only
        assert all((p & ~torch.ones_like(p) if where.entries[n] is None else p & ~where.entries[n]).sum() == 0 for n, p in chosen.entries.items())
    # gradient × weight is the first-order change of the loss when a weight goes: deleting salient weights moves it most
    asked = prompts.build(model.tokenizer, given.forget, "one_shot", pool=given.retain_train)

    def loss() -> float:
        out = model.hf(input_ids=asked.tokens, attention_mask=asked.mask, position_ids=asked.position_ids).logits
        return F.cross_entropy(out[torch.arange(len(asked)), asked.last], asked.answer_ids, reduction="none")

    base = loss()
    moved = {}
    for name, chosen in {"magnitude": small_ones, "saliency": salient}.items():
        with delete(model, chosen).applied(model):
            moved[name] = (loss() - base).abs().mean().item()
    assert moved["saliency"] > 10 * moved["magnitude"]


def test_ladder_refuses_what_it_cannot_serve():
    model = small.model()
    values = {"model.layers.1.mlp.up_proj.weight": torch.full((48, 32), -math.inf)}
    values["model.layers.1.mlp.up_proj.weight"][3, :5] = torch.tensor([1.0, 0.0, 1.0, 2.0, 1.0])
    masks = ladder(model, values, [1, 4, 5], "x")
    assert [sorted(m.entries["model.layers.1.mlp.up_proj.weight"].nonzero()[:, 1].tolist()) for m in masks] == [[3], [0, 2, 3, 4], [0, 1, 2, 3, 4]]
    for ns, said in (([6], "6 weights are to be deleted; 5 may be"), ([0, 2], "0, 2 weights"), ([], "no weights")):
        with pytest.raises(SelectionError, match=said):
            ladder(model, values, ns, "x")
    ties = {name: torch.zeros(48, 32) for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight")}
    assert available(values) == 5
    (drawn,) = ladder(model, ties, [1000], "ties")
    assert drawn.layers == (0, 2) and 400 < drawn.entries["model.layers.0.mlp.up_proj.weight"].sum() < 600  # no preference for low layers


def test_chance_draws_candidates_only_and_by_its_generator():
    model = small.model()
    where = candidates(model, mask(model, ["mlp 1", "head 2.1"]))
    draws = [chance(where, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    one, same, other = (ladder(model, drawn, [500], "random")[0].digest for drawn in draws)
    assert one == same != other and available(draws[0]) == where.n_parameters


def test_deterministic_and_seeded():
    model = small.model()
    (_, one), (_, same), (_, other) = (run(model, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(one.values[n], same.values[n]) for n in one.values) and one.history.equals(same.history)
    assert not all(torch.equal(one.values[n], other.values[n]) for n in one.values)


def test_bad_input_and_losses_that_are_no_numbers(monkeypatch):
    model, given = small.model("llama", torch.bfloat16), small.a_split()
    before = small.weights(model)
    run(model)
    assert small.same(model, before)
    with pytest.raises(TrainingError, match="parametrisation 'soft'; allowed are clamped and explicit"):
        Learning("soft")
    with pytest.raises(TrainingError, match="forget set is empty"):
        run(model, forget=given.forget[:0])
    calls, real = [], weight_masks.gradients

    def gradients(*arguments):
        calls.append(1)
        losses, settings = real(*arguments)
        return {**losses, "retain": math.nan if len(calls) > failing else 1.0}, settings

    monkeypatch.setattr(weight_masks, "gradients", gradients)
    failing = 2
    with pytest.warns(UserWarning, match="training stopped: retain not finite at step 2"):
        _, learned = run(model)
    assert len(learned.history) == 2 and "retain" in learned.record["stopped"]
    assert all(m.isfinite().all() for m in learned.values.values()) and small.same(model, before)
    calls.clear()
    failing = 0
    with pytest.raises(TrainingError, match="retain not finite before the first step"):
        run(model)
    assert small.same(model, before)


def test_weights_that_are_zero_already_are_not_deleted():
    model = small.model()
    with torch.no_grad():
        model.matrix("up", 1)[0][:10] = 0
    _, learned = run(model, mask(model, ["up 1"]), learning("clamped", "published"))
    (m,) = learned.values.values()
    assert (m[:10] == 1).all() and (m[10:] < 1).any() and m.isfinite().all()
