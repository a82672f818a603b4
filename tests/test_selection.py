"""Masks against hand counts, the paper's published parameter counts, and the budget rule on a made-up case."""

import copy

import families
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GemmaConfig, LlamaConfig

from helpers.masks import MATRICES, SelectionError, from_weights, mask, matrices, parse, size
from helpers.models import Model
from helpers.selection import (
    PUBLISHED, all_mlps, everything, greedy, preset, random_mlps, random_units, top_weights, whole_units, windows,
)

REAL = {
    "gemma-7b": GemmaConfig(num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=16, hidden_size=3072,
                            intermediate_size=24576, head_dim=256),
    "gemma-2-9b": Gemma2Config(num_hidden_layers=42, num_attention_heads=16, num_key_value_heads=8, hidden_size=3584,
                               intermediate_size=14336, head_dim=256),
    "llama-3-8b": LlamaConfig(num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, hidden_size=4096,
                              intermediate_size=14336, vocab_size=128256),
}
COUNTED = {"gemma-7b": 7_751_073_792, "gemma-2-9b": 8_323_596_288, "llama-3-8b": 6_979_321_856}
# from the logs of the paper's runs
TRAINED = {
    "gemma-7b sports flu": 1_358_954_496, "gemma-7b sports ap": 1_384_120_320, "gemma-7b sports ct": 1_484_783_616,
    "gemma-7b sports ap-mlps": 1_358_954_496, "gemma-7b sports ct-mlps": 1_358_954_496,
    "gemma-2-9b sports flu": 770_703_360, "gemma-2-9b sports ap": 858_783_744, "gemma-2-9b sports ct": 792_723_456,
    "gemma-2-9b sports ap-mlps": 770_703_360, "gemma-2-9b sports ct-mlps": 770_703_360,
    "llama-3-8b sports flu": 704_643_072, "llama-3-8b sports ap": 830_472_192, "llama-3-8b sports ct": 713_031_680,
    "llama-3-8b sports ap-mlps": 704_643_072, "llama-3-8b sports ct-mlps": 704_643_072,
    "gemma-7b counterfact-16 flu": 1_811_939_328, "gemma-7b counterfact-16 ap": 1_887_436_800,
    "gemma-7b counterfact-16 ct": 1_937_768_448, "gemma-7b counterfact-64 flu": 1_132_462_080,
    "gemma-7b counterfact-64 ap": 1_157_627_904, "gemma-7b counterfact-64 ct": 1_157_627_904,
    "gemma-2-9b counterfact-16 flu": 770_703_360, "gemma-2-9b counterfact-16 ap": 902_823_936,
    "gemma-2-9b counterfact-16 ct": 792_723_456, "gemma-2-9b counterfact-64 flu": 1_233_125_376,
    "gemma-2-9b counterfact-64 ap": 1_255_145_472, "gemma-2-9b counterfact-64 ct": 1_233_125_376,
    "llama-3-8b counterfact-16 flu": 704_643_072, "llama-3-8b counterfact-16 ap": 780_140_544,
    "llama-3-8b counterfact-16 ct": 713_031_680, "llama-3-8b counterfact-64 flu": 704_643_072,
    "llama-3-8b counterfact-64 ap": 738_197_504, "llama-3-8b counterfact-64 ct": 721_420_288,
}


@pytest.fixture(scope="module")
def model():
    return Model.of(families.build("llama"), families.tokenizer(), "llama")


@pytest.fixture(scope="module")
def real():
    """The paper's models by their shapes alone: no weight is allocated."""
    with torch.device("meta"):
        return {
            name: Model.of(AutoModelForCausalLM.from_config(config, attn_implementation="eager"), None, name)
            for name, config in REAL.items()
        }


def ones(chosen):
    """Selected weights, counted from the entries themselves."""
    return sum(
        chosen.shapes[name][0] * chosen.shapes[name][1] if part is None else int(part.sum())
        for name, part in chosen.entries.items()
    )


def dense(chosen):
    return {
        name: torch.ones(chosen.shapes[name], dtype=torch.bool) if part is None else part
        for name, part in chosen.entries.items()
    }


def test_published_counts(real):
    for key, line in PUBLISHED.items():
        published, task, method = key.split()
        chosen = preset(real[published], published, task, method)
        if key in TRAINED:
            assert chosen.n_parameters == TRAINED[key], (key, line)
        else:  # MLP-only variants have as many layers as fact lookup
            assert chosen.n_parameters == TRAINED[f"{published} {task} flu"], (key, line)
    for name, model in real.items():
        assert everything(model).n_parameters == COUNTED[name]
        assert ones(everything(model)) == COUNTED[name] and everything(model).share == 1


def test_published_budgets_overshoot_as_published(real):
    flu = preset(real["gemma-7b"], "gemma-7b", "sports", "flu")
    scores = {f"attn {layer}": 10 - i for i, layer in enumerate((18, 20, 22, 25, 27))}
    scores |= {f"mlp {layer}": 5 - i for i, layer in enumerate((21, 23, 25, 26, 27, 1))}
    chosen = greedy(real["gemma-7b"], scores, flu.n_parameters)
    assert chosen.n_parameters == 1_384_120_320 and chosen.overshoot == pytest.approx(0.0185, abs=1e-4)
    assert chosen.digest == preset(real["gemma-7b"], "gemma-7b", "sports", "ap").digest


@pytest.mark.parametrize("family", families.FAMILIES)
def test_counts_by_hand(family):
    model = Model.of(families.build(family), families.tokenizer(), family)
    d_head, n_kv = {"llama": (8, 2), "gemma": (16, 1), "gemma2": (8, 2), "qwen3": (8, 2), "neox": (8, 4)}[family]
    q, k, matrix = 4 * d_head * 32, n_kv * d_head * 32, 48 * 32
    n_mlp = 2 if family == "neox" else 3
    assert size(model, "attn 1") == 2 * q + 2 * k and size(model, "mlp 1") == n_mlp * matrix
    assert size(model, "head 1.2") == 2 * 32 * d_head * (2 if n_kv == 4 else 1)
    for units in (["attn 1"], ["mlp 0", "mlp 2"], ["head 1.2"], ["q 0", "down 1"], ["head 0.0", "head 0.1", "v 2"]):
        chosen = mask(model, units)
        assert chosen.n_parameters == ones(chosen) == size(model, units)
        parameters = dict(model.hf.named_parameters())
        assert all(parameters[name].shape == chosen.shapes[name] for name in chosen.entries)
    assert everything(model).n_parameters == 3 * (2 * q + 2 * k + n_mlp * matrix)
    assert everything(model).counts["q"] == 3 * q and sum(everything(model).counts.values()) == ones(everything(model))


@pytest.mark.parametrize("family", families.FAMILIES)
def test_heads_are_disjoint_and_fill_their_block(family):
    model = Model.of(families.build(family), families.tokenizer(), family)
    heads = [mask(model, [f"head 1.{head}"]) for head in range(4)]
    for one in heads:
        assert all(one.overlap(other) == (one is other) for other in heads)
    together, block = mask(model, [f"head 1.{head}" for head in range(4)]), mask(model, ["attn 1"])
    assert together.digest == block.digest and together.counts == block.counts
    if model.n_kv_heads == 2:  # the first group is complete, the second is not
        part = mask(model, ["head 1.0", "head 1.1", "head 1.2"])
        rows = part.entries["model.layers.1.self_attn.k_proj.weight"].any(1)
        assert rows[:8].all() and not rows[8:].any() and part.counts["k"] == 8 * 32


def test_a_head_is_its_rows_of_q_and_columns_of_o(model):
    """Zeroing what a mask selects in o silences exactly that head."""
    chosen, other = mask(model, ["head 1.2"]), copy.deepcopy(model.hf)
    assert set(chosen.entries) == {"model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.o_proj.weight"}
    weight = other.get_parameter("model.layers.1.self_attn.o_proj.weight")
    weight.masked_fill_(chosen.entries["model.layers.1.self_attn.o_proj.weight"], 0)
    prompts = families.prompts()
    inputs = dict(input_ids=prompts.tokens, attention_mask=prompts.mask, position_ids=prompts.position_ids)

    def silence(module, args):
        z = args[0].clone()
        z[..., 16:24] = 0
        return (z,)

    handle = model.hf.model.layers[1].self_attn.o_proj.register_forward_pre_hook(silence)
    expected = model.hf(**inputs).logits
    handle.remove()
    torch.testing.assert_close(other(**inputs).logits, expected)


def test_greedy_by_hand(model):
    """attn has 3072 weights, an MLP 4608: |scores| 5, 4, 3, 2, 1 take mlp 1, attn 2, mlp 0 for a budget of 9000."""
    scores = pd.Series({"mlp 0": 3.0, "mlp 1": -5.0, "attn 2": 4.0, "mlp 2": 1.0, "attn 0": -2.0})
    chosen = greedy(model, scores, 9000)
    assert chosen.units == ("mlp 1", "attn 2", "mlp 0") and chosen.n_parameters == 12288
    assert chosen.budget == 9000 and chosen.overshoot == pytest.approx(12288 / 9000 - 1) and chosen.layers == (0, 1, 2)
    assert greedy(model, scores, 12288).units == chosen.units  # reached exactly: nothing more is added
    assert greedy(model, scores, 12289).units == (*chosen.units, "attn 0")
    assert greedy(model, scores, 9000, kinds=("mlp",)).units == ("mlp 1", "mlp 0")
    assert greedy(model, {"mlp 2": 1.0, "mlp 0": 1.0}, 1).units == ("mlp 2",)
    heads = {f"head 0.{head}": 1.0 for head in range(4)}
    assert greedy(model, heads, 1025, kinds=("head",)).n_parameters == 1536  # the group's k and v come along


def test_whole_units():
    scores = pd.Series({"head 0.0": 2.0, "head 0.1": -2.5, "mlp 0": -2.0})
    assert whole_units(scores).to_dict() == {"attn 0": 4.5, "mlp 0": -2.0}
    assert whole_units(scores, combine="signed").to_dict() == {"attn 0": 0.5, "mlp 0": -2.0}
    with pytest.raises(SelectionError, match="layer 0 has scores of its attention and of its heads"):
        whole_units(pd.concat([scores, pd.Series({"attn 0": 1.0})]))
    with pytest.raises(SelectionError, match="combine='sum'"):
        whole_units(scores, combine="sum")


def test_controls(model):
    drawn = random_units(model, 9000, seed=3)
    assert drawn.digest == random_units(model, 9000, seed=3).digest != random_units(model, 9000, seed=4).digest
    assert 9000 <= drawn.n_parameters < 9000 + 48 * 32 and all(parse(unit).kind in MATRICES for unit in drawn.units)
    kinds = {parse(unit).kind for seed in range(20) for unit in random_units(model, 9000, seed).units}
    assert kinds == set(MATRICES)
    assert random_mlps(model, 2, 0).units == random_mlps(model, 2, 0).units
    assert len({random_mlps(model, 1, seed).units for seed in range(20)}) == 3
    assert all_mlps(model).counts == {"q": 0, "k": 0, "v": 0, "o": 0, "gate": 4608, "up": 4608, "down": 4608}
    assert all_mlps(model).layers == (0, 1, 2) and everything(model).share == 1


def test_windows_have_equal_counts(model):
    found = windows(model, 2)
    assert [window.layers for window in found] == [(0, 1), (1, 2)]
    assert {window.n_parameters for window in found} == {2 * 4608}
    assert found[0].overlap(found[1]) == pytest.approx(1 / 3)


@pytest.mark.parametrize("family", ["llama", "neox"])
def test_single_weights(family):
    model = Model.of(families.build(family), families.tokenizer(), family)
    generator = torch.Generator().manual_seed(0)
    whole = mask(model, ["attn 1", "mlp 2"])
    importance = {name: torch.rand(whole.shapes[name], generator=generator) for name in whole.entries}
    chosen = top_weights(model, importance, 1000)
    assert chosen.n_parameters == ones(chosen) == 1000 and chosen.layers == (1, 2) and chosen.overshoot == 0
    kept = torch.cat([importance[name][part] for name, part in chosen.entries.items()])
    left = torch.cat([importance[name][~part] for name, part in chosen.entries.items()])
    assert kept.min() >= left.max()
    assert sum(chosen.counts[kind] for kind in "qkvo") == sum(
        int(part.sum()) for name, part in chosen.entries.items() if "attention" in name or "self_attn" in name
    )
    assert top_weights(model, importance, whole.n_parameters).digest == whole.digest
    with pytest.raises(SelectionError, match="0 weights are to be chosen out of"):
        top_weights(model, importance, 0)
    with pytest.raises(SelectionError, match=r"embed.* expected one of the model's matrices"):
        from_weights(model, {model.embed_path + ".weight": torch.ones(64, 32, dtype=torch.bool)}, "x")
    name = next(iter(importance))
    with pytest.raises(SelectionError, match=r"is torch.bool \(2, 2\), expected booleans"):
        from_weights(model, {name: torch.ones(2, 2, dtype=torch.bool)}, "x")
    with pytest.raises(SelectionError, match="empty selection"):
        from_weights(model, {name: torch.zeros(whole.shapes[name], dtype=torch.bool)}, "x")


def test_mask_states_what_it_is(model):
    chosen = mask(model, ["mlp 1", "mlp 1", "head 0.3"], "mine")
    assert chosen.units == ("mlp 1", "head 0.3") and chosen.name == "mine" and chosen.overshoot is None
    assert chosen.covers("model.layers.1.mlp.up_proj.weight")
    assert not chosen.covers("model.layers.0.mlp.up_proj.weight")
    assert not chosen.covers("model.layers.1.input_layernorm.weight")
    assert chosen.digest == mask(model, ["head 0.3", "gate 1", "up 1", "down 1"]).digest
    assert chosen.digest != mask(model, ["head 0.2", "mlp 1"]).digest
    chosen.check(Model.of(families.build("llama", seed=5), families.tokenizer()))
    assert len(matrices(model)) == 21
    for part in dense(chosen).values():
        assert part.dtype == torch.bool


ERRORS = [
    (lambda m: mask(m, []), "empty selection"),
    (lambda m: mask(m, ["mlp 3"]), "mlp 3: llama has 3 layers of 4 heads"),
    (lambda m: mask(m, ["head 0.4"]), "head 0.4: llama has 3 layers of 4 heads"),
    (lambda m: mask(m, ["ffn 2"]), "'ffn 2' is no unit: write 'mlp 3'"),
    (lambda m: greedy(m, {"mlp 0": 1.0}, 4609), "4,609 weights is larger than all 1 units it may take, 4,608"),
    (lambda m: random_units(m, 10**9, 0), "budget of 1,000,000,000 weights is larger than all 21 units"),
    (lambda m: greedy(m, {"mlp 0": 1.0}, 0), "a budget of 0 weights selects nothing"),
    (lambda m: greedy(m, {"mlp 0": float("nan")}, 10), r"no score \(NaN\) for mlp 0"),
    (lambda m: windows(m, 4), "4 MLPs: llama has 3"),
    (lambda m: random_mlps(m, 0, 0), "0 MLPs: llama has 3"),
    (lambda m: preset(m, "gpt-2", "sports", "flu"), "no published choices for 'gpt-2'; there are gemma-7b"),
    (lambda m: preset(m, "gemma-7b", "sports", "best"), "no choice sports best; there are sports flu"),
    (lambda m: preset(m, "gemma-7b", "sports", "flu"), r"llama is no gemma-7b: .* \(3, 32, 48\), not \(28, 3072"),
]


@pytest.mark.parametrize("call, message", ERRORS)
def test_errors(model, call, message):
    with pytest.raises(SelectionError, match=message):
        call(model)


def test_a_mask_of_another_model_is_refused(model):
    wide = Model.of(families.build("llama", intermediate_size=40), families.tokenizer(), "wide")
    deep = Model.of(families.build("llama", num_hidden_layers=4), families.tokenizer(), "deep")
    chosen = mask(model, ["mlp 1"])
    with pytest.raises(SelectionError, match=r"than wide: .*gate_proj.weight is \(48, 32\) there and \(40"):
        chosen.check(wide)
    with pytest.raises(SelectionError, match=r"another model than deep: model.layers.3.* is absent there"):
        chosen.check(deep)
    with pytest.raises(SelectionError, match="belong to different models"):
        chosen.overlap(mask(wide, ["mlp 1"]))
    neox = Model.of(families.build("neox"), families.tokenizer(), "neox")
    with pytest.raises(SelectionError, match="gate 1: the MLPs of neox have no gate"):
        mask(neox, ["gate 1"])
