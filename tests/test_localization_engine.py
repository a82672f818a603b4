"""The fast engine against `tracing.intervene` and against transformers alone, in every supported family."""

import copy

import families
import localization_cases as cases
import pytest
import torch

from helpers import tracing
from helpers.interventions import Intervention, KnockOut
from helpers.localization.engine import Run, flush_right
from helpers.models import Model
from helpers.sites import TracingError

SITES = ("resid_pre", "resid_post", "attn_out", "mlp_out", "head", "neuron")
KEPT = ("attn_out", "mlp_out", "head", "neuron")
POSITIONS = ("last", "subject", "subject_first", "all")


@pytest.fixture(scope="module", params=families.FAMILIES)
def model(request):
    return cases.model(request.param)


@pytest.fixture(scope="module")
def run(model):
    return Run(model, flush_right(families.prompts("right")), KEPT)


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def random_like(value, seed=3):
    return torch.randn(value.shape, generator=torch.Generator().manual_seed(seed)).to(value)


def test_flush_right_moves_padding_and_nothing_else():
    for side in ("left", "right"):
        prompts = families.prompts(side, lengths=(6, 4, 3))
        batch = flush_right(prompts)
        assert batch.last.tolist() == [5, 5, 5] and batch.mask.sum(1).tolist() == [6, 4, 3]
        for row in range(3):
            assert torch.equal(batch.tokens[row][batch.mask[row]], prompts.tokens[row][prompts.mask[row].bool()])
            assert torch.equal(batch.position_ids[row][batch.mask[row]], torch.arange(int(batch.mask[row].sum())))
            (a, b), (c, d) = batch.subject[row].tolist(), prompts.subject[row].tolist()
            assert torch.equal(batch.tokens[row, a:b], prompts.tokens[row, c:d])


def test_columns_of_padding_alone_are_dropped():
    """A chunk of short prompts does not pay for the longest prompt of the set."""
    prompts = families.prompts("right", lengths=(9, 4, 3))
    short = families.Prompts(**{name: value[1:] for name, value in vars(prompts).items()})
    assert flush_right(short).tokens.shape == (2, 4)


def test_logits_and_activations_are_those_of_transformers(model, run):
    prompts = families.prompts("right")
    theirs = model.hf(input_ids=prompts.tokens, attention_mask=prompts.mask, position_ids=prompts.position_ids).logits
    same(run.logits, theirs[torch.arange(5), prompts.last])
    sites = [(site, layer) for layer in range(3) for site in SITES] + [("embed", 0)]
    trace, real = tracing.read(model, run.batch, sites), run.batch.mask
    for site in sites:
        same(run[site][real], trace[site][real])
    same(run.unembed(run["resid_post", 2][:, -1]), run.logits)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("site", ("embed", *SITES))
def test_an_edit_gives_what_intervene_gives(model, run, site, positions):
    for layer in (0, 1, 2) if site != "embed" else (0,):
        value = random_like(run[site, layer])
        for edit in (Intervention(site, layer, positions, value), Intervention(site, layer, positions, value[:, 0], "add")):
            theirs = tracing.intervene(model, run.batch, [edit]).logits
            same(run.edited([edit]), theirs)
            assert layer == 2 or (theirs - run.logits).abs().max() > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
def test_single_heads_and_neurons_at_single_places_of_some_rows(model, side):
    batch = flush_right(families.prompts(side))
    run = Run(model, batch, KEPT)
    where = batch.at("subject_last")
    where[[0, 3]] = False
    for layer in range(3):
        for edit in (
            Intervention("head", layer, where, random_like(run["head", layer][:, :, [3, 1]]), heads=[3, 1]),
            Intervention("neuron", layer, where, op="zero", neurons=[0, 5, 7]),
        ):
            edited = run.edited([edit])
            same(edited, tracing.intervene(model, batch, [edit]).logits)
            assert torch.equal(edited[[0, 3]], run.logits[[0, 3]])


def test_several_edits_meet_as_in_one_pass(model, run):
    """A window of layers, edits on top of each other, and a cut between them."""
    value = {site: random_like(run[site, 1]) for site in SITES}
    edits = [
        Intervention("mlp_out", 2, "all", value["mlp_out"]),
        Intervention("attn_out", 0, "subject", value["attn_out"]),
        Intervention("mlp_out", 1, "subject_last", value["mlp_out"], "add"),
        Intervention("mlp_out", 1, "subject_last", value["attn_out"], "add"),
        KnockOut(1, "last", "subject_first"),
        KnockOut(2, "last", "subject"),
        Intervention("resid_post", 1, "subject_first", value["resid_post"]),
    ]
    for some in (edits, edits[:3], edits[1:5], edits[4:]):
        same(run.edited(some), tracing.intervene(model, run.batch, some).logits)


@pytest.mark.parametrize("queries, keys", [("last", "subject"), ("subject_last", "subject_first"), ("last", "subject_last")])
def test_a_cut_of_attention_gives_what_intervene_gives(model, run, queries, keys):
    for layers in ((0,), (1, 2), (2,), (0, 1, 2)):
        theirs = tracing.knock_out_attention(model, run.batch, layers, queries, keys).logits
        same(run.edited([KnockOut(layer, queries, keys) for layer in layers]), theirs)
    some = [KnockOut(1, "last", "subject", heads=[0, 2])]
    same(run.edited(some), tracing.intervene(model, run.batch, some).logits)


def test_own_values_and_no_edits_change_nothing(model, run):
    assert torch.equal(run.edited([]), run.logits)
    for site in SITES:
        for layer in range(3):
            same(run.edited([Intervention(site, layer, "all", run[site, layer])]), run.logits)
    means = run.edited([Intervention("mlp_out", 1, "all", op="mean")])
    same(means, tracing.intervene(model, run.batch, [Intervention("mlp_out", 1, "all", op="mean")]).logits)


def test_other_embeddings(model, run):
    embeds = run["embed", 0] + random_like(run["embed", 0])
    moved = Run(model, run.batch, ("head",), embeds=embeds)
    trace = tracing.intervene(model, run.batch, [Intervention("embed", 0, "all", embeds)], [("head", 2)])
    same(moved.logits, trace.logits)
    same(moved["head", 2][run.batch.mask], trace["head", 2][run.batch.mask])
    edit = [Intervention("head", 1, "subject", run["head", 1])]
    same(moved.edited(edit), tracing.intervene(model, run.batch, [Intervention("embed", 0, "all", embeds), *edit]).logits)


def test_only_what_changes_is_computed(model, run, monkeypatch):
    """Positions that each block is called with, for edits at the first subject token of an unpadded row."""
    batch = flush_right(families.prompts(lengths=(9,)))
    run, calls = Run(model, batch, KEPT), []
    call = Run._call

    def counted(self, layer, hidden, *rest):
        calls.append((layer, hidden.shape[1]))
        return call(self, layer, hidden, *rest)

    monkeypatch.setattr(Run, "_call", counted)
    first = batch.at("subject_first")  # column 1 of 9
    expected = {
        ("mlp_out", 0): [(0, 1), (1, 8), (2, 7), (2, 1)],
        ("resid_pre", 1): [(1, 8), (2, 7), (2, 1)],
        ("mlp_out", 2): [],  # nothing reads it any more
    }
    for (site, layer), blocks in expected.items():
        calls.clear()
        run.edited([Intervention(site, layer, first, op="zero")])
        assert calls == blocks, site
    calls.clear()
    run.edited([KnockOut(1, "last", "subject")])
    assert calls == [(1, 1), (2, 1)]


def test_double_precision(model):
    """No padding here: transformers fills a padding token's row of the mask with what its float32 softmax takes for −∞."""
    double = Model.of(copy.deepcopy(model.hf).double(), model.tokenizer, model.name)
    batch = flush_right(families.prompts(lengths=(8, 8)))
    run = Run(double, batch, KEPT)
    for site in SITES:
        edits = [Intervention(site, 1, "subject", random_like(run[site, 1]))]
        torch.testing.assert_close(run.edited(edits), tracing.intervene(double, batch, edits).logits, atol=1e-6, rtol=1e-6)
    assert run.logits.dtype == torch.float64


def test_bfloat16(model):
    half = Model.of(copy.deepcopy(model.hf).bfloat16(), model.tokenizer, model.name)
    batch = flush_right(families.prompts("left"))
    run = Run(half, batch, KEPT)
    assert run.logits.dtype == torch.float32 and run["head", 1].dtype == torch.bfloat16
    edits = [Intervention("head", 1, "subject", random_like(run["head", 1]))]
    torch.testing.assert_close(run.edited(edits), tracing.intervene(half, batch, edits).logits, atol=0.1, rtol=0.05)


def test_single_layer(model):
    small = cases.model(model.name, num_hidden_layers=1, **({"layer_types": ["sliding_attention"]} if model.name == "gemma2" else {}))
    run = Run(small, flush_right(families.prompts()), KEPT)
    for site in SITES:
        for edit in (Intervention(site, 0, "all", op="zero"), Intervention(site, 0, "subject", op="zero")):
            same(run.edited([edit]), tracing.intervene(small, run.batch, [edit]).logits)


def test_the_model_is_left_as_it_was(model, run):
    hooks = lambda: [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf.modules()]
    before = hooks()
    run.edited([Intervention("head", 1, "subject", op="zero"), KnockOut(2, "last", "subject")])
    Run(model, run.batch, KEPT)
    assert hooks() == before
    with pytest.raises(TracingError):
        run.edited([Intervention("head", 1, "subject")])
    assert hooks() == before


def test_errors():
    model = cases.model("llama")
    batch = flush_right(families.prompts())
    with pytest.raises(TracingError, match="pass the prompts through flush_right"):
        Run(model, tracing.Batch.of(families.prompts()))
    run = Run(model, batch)
    with pytest.raises(TracingError, match=r"\('head', 1\) was not kept in this run: name the site in keep"):
        run["head", 1]
    with pytest.raises(TracingError, match="resid_pre at layer 3: allowed layers are 0 to 2"):
        run.edited([Intervention("resid_pre", 3, "last", op="zero")])
    with pytest.raises(TracingError, match="site 'q': allowed are"):
        Run(model, batch, ("q",))
    with pytest.raises(TracingError, match=r"position 0 of row 0 would have no key left .*\(position 0 is column 8"):
        run.edited([KnockOut(1, "last", "all")])


def test_a_block_called_in_an_unknown_way_is_refused(monkeypatch):
    model = cases.model("llama")
    block = type(model.block(0))
    forward = block.forward
    monkeypatch.setattr(block, "forward", lambda self, hidden_states, gate=None, **rest: forward(self, hidden_states, **rest))
    gate = {"gate": torch.zeros(1)}
    model.block(0).register_forward_pre_hook(lambda _, args, given: (args, given | gate), with_kwargs=True)
    with pytest.raises(TracingError, match="LlamaDecoderLayer is called with 1 positional arguments and .*gate"):
        Run(model, flush_right(families.prompts()))
