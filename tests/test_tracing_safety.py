"""What tracing must not do, what it says of faults, and TransformerLens as a second opinion."""

import copy

import families
import pytest
import torch
from tracing_cases import at, forward, hook, pair, prompts
from transformers import AutoTokenizer

from helpers import tracing
from helpers.models import Model
from helpers.tracing import Intervention, KnockOut, TracingError, gradients, intervene, knock_out_attention, read

# What must not happen -----------------------------------------------------------------------------


def test_model_prompts_and_tokenizer_stay_as_they_were(pair, prompts):
    model, hf = pair
    before = copy.deepcopy(vars(prompts))
    side = model.tokenizer.padding_side
    intervene(model, prompts, [Intervention("resid_post", 0, "all", op="zero"), KnockOut(1, "last", "subject")])
    gradients(model, prompts, [("head", 0)], lambda logits, rows: logits[:, 0])
    for name, value in hf.state_dict().items():
        assert torch.equal(model.hf.state_dict()[name], value), name
    assert all(torch.equal(vars(prompts)[name], value) for name, value in before.items())
    assert model.tokenizer.padding_side == side
    assert torch.equal(forward(model.hf, prompts), forward(hf, prompts))


def test_a_copy_made_after_tracing_is_a_model_of_its_own(pair, prompts, tmp_path):
    model, _ = pair
    clean = read(model, prompts)
    twin = Model.of(copy.deepcopy(model.hf), model.tokenizer)
    twin.matrix("down", 1)[0].zero_()
    without_mlp = intervene(model, prompts, [Intervention("neuron", 1, "all", op="zero")])
    torch.testing.assert_close(read(twin, prompts).logits, without_mlp.logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(read(model, prompts).logits, clean.logits)
    model.hf.save_pretrained(tmp_path)


def test_bfloat16(pair, prompts):
    _, hf = pair
    model = Model.of(copy.deepcopy(hf).bfloat16(), families.tokenizer())
    sites = [("resid_post", 1), ("head", 1), ("neuron", 1)]
    clean = read(model, prompts, sites)
    assert clean.logits.dtype == torch.float32 and clean["head", 1].dtype == torch.bfloat16
    patched = intervene(model, prompts, [Intervention(*site, "all", clean[site].float()) for site in sites])
    assert torch.equal(patched.logits, clean.logits)
    cut = knock_out_attention(model, prompts, [0, 1, 2], "last", "subject", read=[("attn_pattern", 2)])
    where = at(prompts, "last")[:, :, None] & at(prompts, "subject")[:, None, :]
    assert not cut["attn_pattern", 2].masked_select(where[:, None]).any()
    means = [Intervention("mlp_out", 1, "all", op="mean")]
    means += [Intervention("head", 0, "last", torch.arange(5), "resample")]
    assert intervene(model, prompts, means).changed[1] == 0
    assert gradients(model, prompts, [("embed", 0)], lambda logits, rows: logits[:, 3])[1]["embed", 0][1].any()


def test_a_module_that_returns_one_row_is_noticed():
    """What an unchecked `output[0]` would silently accept."""
    model = Model.of(families.build("llama"), families.tokenizer())
    block, original = model.block(1), model.block(1).forward
    block.forward = lambda *args, **kwargs: original(*args, **kwargs)[0]
    with pytest.raises(TracingError, match=r"resid_post at layer 1: found \(9, 32\) in the model, expected \(5, 9, 32"):
        read(model, families.prompts(), [("resid_post", 1)])


@pytest.mark.parametrize("damage", ["ignored", "one row only", "everywhere"])
def test_an_edit_that_does_not_take_effect_is_noticed(monkeypatch, damage):
    put = tracing._Tap.put

    def broken(self, tensor):
        if damage == "one row only":
            value = self.fetch().clone()
            value[0] = tensor[0]
            put(self, value)
        elif damage == "everywhere":
            put(self, torch.zeros_like(tensor))

    monkeypatch.setattr(tracing._Tap, "put", broken)
    model = Model.of(families.build("llama"), families.tokenizer())
    with pytest.raises(TracingError, match=r"zero head at layer 1: did not take effect .* \(5, 9, 4, 8\)"):
        intervene(model, families.prompts(), [Intervention("head", 1, "last", op="zero")])


ROW = torch.zeros(32)
ERRORS = [
    (Intervention("residual", 1, "last", ROW), "site 'residual': allowed are embed, resid_pre"),
    (Intervention("resid_pre", 3, "last", ROW), "resid_pre at layer 3: allowed layers are 0 to 2"),
    (Intervention("resid_pre", -1, "last", ROW), "resid_pre at layer -1: allowed layers are 0 to 2"),
    (Intervention("embed", 1, "last", ROW), "embed at layer 1: allowed layers are 0"),
    (Intervention("attn_pattern", 1, "last", ROW), "attn_pattern is read only; use a KnockOut"),
    (Intervention("resid_pre", 1, "first", ROW), "positions 'first': allowed are last, subject"),
    (Intervention("resid_pre", 1, torch.zeros(5, 9), ROW), r"must be boolean and \(n, length\) = \(5, 9\)"),
    (Intervention("resid_pre", 1, torch.zeros(5, 9).bool(), ROW), "selects nothing"),
    (Intervention("resid_pre", 1, "last", op="swap"), "op 'swap': allowed are replace, add"),
    (Intervention("resid_pre", 1, "last"), "replace resid_pre at layer 1: op 'replace' needs a value"),
    (
        Intervention("head", 1, "last", torch.zeros(8), heads=[1]),
        r"replace head at layer 1: value is \(8,\), allowed are \(1, 8\) or \(5, 1, 8\) or \(5, 9, 1, 8\)",
    ),
    (Intervention("head", 1, "last", op="zero", heads=[4]), r"heads or neurons \[4\]: allowed are 0 to 3"),
    (Intervention("resid_pre", 1, "last", op="zero", heads=[1]), "heads go with site 'head' only"),
    (Intervention("head", 1, "last", op="zero", neurons=[1]), "neurons go with site 'neuron' only"),
    (Intervention("resid_pre", 1, "last", op="resample"), r"one row number for each of the 5 rows"),
    (Intervention("resid_pre", 1, "last", torch.tensor([0, 1, 2, 3, 5]), "resample"), "lies outside 0 to 4"),
    (
        Intervention("resid_pre", 1, "all", torch.tensor([1, 0, 2, 3, 4]), "resample"),
        "row 0 has 9 positions and row 1, from which it should take, has 6; use a single position",
    ),
    (KnockOut(3, "last", "subject"), "at layer 3: allowed layers are 0 to 2"),
    (KnockOut(1, "last", "subject", heads=[4]), r"knock-out at layer 1: heads \[4\]: allowed are 0 to 3"),
]


@pytest.mark.parametrize("edit, message", ERRORS, ids=[message[:40] for _, message in ERRORS])
def test_errors_name_layer_site_and_what_is_allowed(edit, message):
    model = Model.of(families.build("llama"), families.tokenizer())
    with pytest.raises(TracingError, match=message):
        intervene(model, families.prompts(), [edit])


def test_errors_of_reading():
    model = Model.of(families.build("llama"), families.tokenizer())
    prompts = families.prompts()
    with pytest.raises(TracingError, match="'subject' are several a row; to read them, read all"):
        read(model, prompts, [("resid_pre", 1)], positions="subject")
    with pytest.raises(TracingError, match="one index a row"):
        read(model, prompts, [("resid_pre", 1)], positions=torch.zeros(4, dtype=torch.int64))
    with pytest.raises(TracingError, match=r"\('mlp_out', 1\) was not read; there are \[\('resid_pre', 1\)\]"):
        read(model, prompts, [("resid_pre", 1)])["mlp_out", 1]
    with pytest.raises(TracingError, match=r"one value a row is \(5,\)"):
        gradients(model, prompts, [("resid_pre", 1)], lambda logits, rows: logits)
    no_subject = families.Prompts(**vars(prompts) | dict(subject=prompts.subject * 0))
    with pytest.raises(TracingError, match=r"no subject tokens in row 0 \(5 such rows\)"):
        read(model, no_subject, [("resid_pre", 1)], positions="subject_last")
    padded_last = families.Prompts(**vars(prompts) | dict(last=prompts.last * 0 + 8))
    with pytest.raises(TracingError, match="the last token of some row is padding"):
        read(model, padded_last)


# Second opinion -----------------------------------------------------------------------------------


def test_transformer_lens_agrees(tmp_path):
    """Residuals, head outputs, patterns, contributions, and the effect of silencing one head."""
    lens = pytest.importorskip("transformer_lens.model_bridge")
    hf = families.build("llama")
    families.tokenizer().save_pretrained(tmp_path)
    hf.config.save_pretrained(tmp_path)
    bridge = lens.TransformerBridge.boot_transformers(
        str(tmp_path), hf_model=copy.deepcopy(hf), tokenizer=AutoTokenizer.from_pretrained(tmp_path)
    )
    model = Model.of(hf, families.tokenizer())
    prompts = families.prompts(lengths=(7, 7, 7))
    names = dict(resid_post="hook_resid_post", resid_pre="hook_resid_pre", head="attn.hook_z")
    names |= dict(attn_out="hook_attn_out", mlp_out="hook_mlp_out", attn_pattern="attn.hook_pattern")
    trace = read(model, prompts, [(site, layer) for site in names for layer in range(3)])
    logits, cache = bridge.run_with_cache(prompts.tokens)
    torch.testing.assert_close(trace.logits, logits[:, -1], atol=1e-5, rtol=1e-5)
    for site, name in names.items():
        for layer in range(3):
            theirs = cache[f"blocks.{layer}.{name}"].view(trace[site, layer].shape)
            torch.testing.assert_close(trace[site, layer], theirs, atol=1e-5, rtol=1e-5)

    def silence(z, hook):
        z = z.clone()
        z.view(3, 7, model.n_heads, model.d_head)[:, -1, 2] = 0
        return z

    theirs = bridge.run_with_hooks(prompts.tokens, fwd_hooks=[("blocks.1.attn.hook_z", silence)])[:, -1]
    ours = intervene(model, prompts, [Intervention("head", 1, "last", op="zero", heads=[2])])
    torch.testing.assert_close(ours.logits, theirs, atol=1e-5, rtol=1e-5)
    assert (ours.logits - trace.logits).abs().max() > 1e-3
