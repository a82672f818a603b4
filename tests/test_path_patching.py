"""Path patching against a re-run of the patched graph, one whole pass a sender, with ordinary hooks.

The reference never uses the engine: on an untouched copy of the model it freezes every attention and MLP
output at its corrupted value except along the allowed path, and reads the logits.
"""

import copy
from contextlib import ExitStack

import families
import pytest
import torch
from transformers import AutoTokenizer

from helpers.facts import Fact, Relation
from helpers.localization import path_patching
from helpers.localization.counterfactual import Pairs
from helpers.localization.path_patching import head_paths, receiver_paths
from helpers.models import Model
from helpers.prompts import PromptSet
from helpers.sites import TracingError

N_LAYERS, N_HEADS = 3, 4
POST_NORM = {"attn_out": "post_attention_layernorm", "mlp_out": "post_feedforward_layernorm"}


def prompt_set(tokens, prompts, ids, name):
    relation = Relation("likes", "{subject} likes")
    facts = tuple(Fact(f"{name} {row}", relation, "yes", "no") for row in range(len(tokens)))
    texts, options = ("",) * len(tokens), ((((3,), (4,))),) * len(tokens)
    return PromptSet(facts, "cloze", texts, tokens, prompts.mask, prompts.last, prompts.subject, ids, options)


def make_pairs(padding="left", seed=1):
    """Random prompts of unequal length, and the same with other subjects."""
    prompts = families.prompts(padding, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    other = prompts.tokens.clone()
    for row, (start, stop) in enumerate(prompts.subject.tolist()):
        other[row, start:stop] = torch.randint(3, families.VOCABULARY, (stop - start,), generator=generator)
    ids = torch.stack([torch.randperm(60, generator=generator)[:2] + 3 for _ in other])
    return Pairs(prompt_set(prompts.tokens, prompts, ids, "clean"), prompt_set(other, prompts, ids.flip(1), "other"))


@pytest.fixture(scope="module", params=families.FAMILIES)
def built(request):
    """(model, untouched copy of its transformers model)."""
    hf = families.build(request.param)
    return Model.of(copy.deepcopy(hf), families.tokenizer(), request.param), hf


class Reference:
    """Passes with hooks on attention outputs, MLP outputs, head outputs and projections."""

    def __init__(self, hf, pairs):
        self.hf, self.answers = hf, pairs.answers
        self.prompts = {"clean": pairs.clean, "corrupt": pairs.corrupted}
        self.clean, self.corrupt = self.run("clean")[1], self.run("corrupt")[1]
        self.ld_clean, self.ld_corrupt = self.run("clean")[0], self.run("corrupt")[0]

    def modules(self):
        for layer, block in enumerate(self.hf.base_model.layers):
            attention = getattr(block, "attention", None) or block.self_attn
            sandwich = hasattr(block, "post_feedforward_layernorm")
            yield ("z", layer), attention.dense if hasattr(attention, "dense") else attention.o_proj, True
            yield ("attn_out", layer), getattr(block, POST_NORM["attn_out"]) if sandwich else attention, False
            yield ("mlp_out", layer), getattr(block, POST_NORM["mlp_out"]) if sandwich else block.mlp, False
            yield ("resid_pre", layer), block, True
            if hasattr(attention, "query_key_value"):
                yield ("qkv", layer), attention.query_key_value, False
            else:
                for kind in "qkv":
                    yield (kind, layer), getattr(attention, f"{kind}_proj"), False

    def run(self, which="corrupt", **edits):
        """(LD, everything seen) of a pass in which `edits["name_layer"](value)` replaces a value."""
        prompts, seen = self.prompts[which], {}

        def hook(key, is_input):
            def change(value):
                edit = edits.get(f"{key[0]}_{key[1]}")
                value = value if edit is None else edit(value)
                seen[key] = value
                return value

            def on_input(module, args, kwargs):
                if args:
                    return (change(args[0]), *args[1:]), kwargs
                return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}

            def on_output(module, args, output):
                return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

            return on_input if is_input else on_output

        with ExitStack() as stack:
            for key, module, is_input in self.modules():
                function = hook(key, is_input)
                handle = (
                    module.register_forward_pre_hook(function, with_kwargs=True)
                    if is_input else module.register_forward_hook(function)
                )
                stack.callback(handle.remove)
            inputs = dict(input_ids=prompts.tokens, attention_mask=prompts.mask, position_ids=prompts.position_ids)
            logits = self.hf(**inputs, use_cache=False).logits[torch.arange(len(prompts)), prompts.last]
        pair = logits.gather(1, self.answers)
        return pair[:, 0] - pair[:, 1], seen

    def frozen(self, *names, but=()):
        """Edits that hold these outputs at their corrupted values in every layer, but for some."""
        keys = [(name, layer) for name in names for layer in range(N_LAYERS)]
        return {f"{n}_{l}": (lambda _, v=self.corrupt[n, l]: v) for n, l in keys if (n, l) not in but}

    def head(self, layer, heads, source):
        """Edit of z that takes some heads from `source`."""
        def edit(value):
            value = value.unflatten(-1, (N_HEADS, -1)).clone()
            value[:, :, heads] = source.unflatten(-1, (N_HEADS, -1))[:, :, heads]
            return value.flatten(-2)

        return {f"z_{layer}": edit}


def brute_head_path(ref, layer, head):
    """Attention frozen but for the sender's block, MLPs free."""
    edits = ref.frozen("attn_out", but=[("attn_out", layer)]) | ref.head(layer, [head], ref.clean["z", layer])
    return ref.run(**edits)[0]


def direct(ref, sender):
    """Edits under which a sender's clean output reaches everything along the residual alone."""
    kind, layer = sender[:2]
    if kind == "head":
        return ref.frozen("attn_out", "mlp_out", but=[("attn_out", layer)]) | ref.head(
            layer, [sender[2]], ref.clean["z", layer])
    return ref.frozen("attn_out", "mlp_out") | {f"{kind}_{layer}": lambda _: ref.clean[kind, layer]}


def brute_residual(ref, sender, receiver):
    """All is frozen below the receiver's layer but for the sender, and free from there on."""
    edits = direct(ref, sender)
    return ref.run(**{name: edit for name, edit in edits.items() if int(name[-1]) < receiver})[0]


def brute_received(ref, sender, layer, inputs):
    """z of a layer when only the sender's direct path into these inputs is open."""
    hf = ref.hf
    edits = direct(ref, sender) if sender[1] < layer else ref.frozen("attn_out", "mlp_out")
    width = ref.corrupt["z", layer].shape[-1] // N_HEADS
    for kind in set("qkv") - set(inputs):
        if ("qkv", layer) in ref.corrupt:
            base, number = ref.corrupt["qkv", layer], "qkv".index(kind)

            def keep(value, base=base, number=number, earlier=edits.get(f"qkv_{layer}", lambda v: v)):
                value = earlier(value).unflatten(-1, (N_HEADS, 3, width)).clone()
                value[..., number, :] = base.unflatten(-1, (N_HEADS, 3, width))[..., number, :]
                return value.flatten(-3)

            edits[f"qkv_{layer}"] = keep
        else:
            edits[f"{kind}_{layer}"] = lambda _, v=ref.corrupt[kind, layer]: v
    return ref.run(**edits)[1]["z", layer]


@pytest.mark.parametrize("padding", ["left", "right"])
def test_heads_to_logits_equal_a_rerun(built, padding):
    model, hf = built
    pairs = make_pairs(padding)
    ref, table = Reference(hf, pairs), head_paths(model, pairs, batch_size=3)
    assert len(table) == N_LAYERS * N_HEADS * len(pairs)
    largest = 0
    for name, rows in table.groupby("component"):
        layer, head = map(int, name.split()[1].split("."))
        patched = brute_head_path(ref, layer, head)
        torch.testing.assert_close(torch.tensor(rows["ld_patched"].to_numpy()), patched.double(), atol=1e-5, rtol=0)
        largest = max(largest, (patched - ref.ld_corrupt).abs().max().item())
    assert largest > 0.05  # there was something to find
    first = table[table["component"] == "head 0.0"]
    torch.testing.assert_close(torch.tensor(first["ld_clean"].to_numpy()), ref.ld_clean.double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.tensor(first["ld_corrupt"].to_numpy()), ref.ld_corrupt.double(), atol=1e-5, rtol=0)
    scores = (table["ld_patched"] - table["ld_corrupt"]) / (table["ld_clean"] - table["ld_corrupt"])
    assert ((scores - table["score"]).abs() < 1e-9).all()
    assert first["subject"].tolist() == [f"clean {row}" for row in range(5)]
    assert first["counterfactual"].tolist() == [f"other {row}" for row in range(5)]


@pytest.mark.parametrize("lowest", [1, 2])
def test_mlps_to_the_residual_equal_a_rerun(built, lowest):
    model, hf = built
    pairs = make_pairs()
    ref = Reference(hf, pairs)
    senders = ["mlp 0", "mlp 1", "mlp 2", "attn 0", "head 0.3"]
    table = receiver_paths(model, pairs, [f"head {lowest}.1", "head 2.0"], senders=senders, batch_size=2)
    for name, sender in zip(senders, [("mlp_out", 0), ("mlp_out", 1), ("mlp_out", 2), ("attn_out", 0), ("head", 0, 3)]):
        rows = table[table["component"] == name]
        expected = brute_residual(ref, sender, lowest) if sender[1] < lowest else ref.ld_corrupt
        torch.testing.assert_close(torch.tensor(rows["ld_patched"].to_numpy()), expected.double(), atol=1e-5, rtol=0)
        assert (sender[1] >= lowest) == (rows["score"] == 0).all()


@pytest.mark.parametrize("inputs", ["qkv", "q", "kv"])
@pytest.mark.parametrize("above", ["mlps", "all"])
def test_mlps_to_heads_equal_a_rerun(built, inputs, above):
    model, hf = built
    pairs = make_pairs()
    ref, receivers = Reference(hf, pairs), {1: [1, 3], 2: [0]}
    names = [f"head {layer}.{head}" for layer, heads in receivers.items() for head in heads]
    table = receiver_paths(model, pairs, names, "heads", inputs, above, senders=["mlp 0", "mlp 1", "head 0.2"])
    for name, sender in {"mlp 0": ("mlp_out", 0), "mlp 1": ("mlp_out", 1), "head 0.2": ("head", 0, 2)}.items():
        edits = {} if above == "all" else ref.frozen("attn_out", but=[("attn_out", layer) for layer in receivers])
        for layer, heads in receivers.items():
            z = brute_received(ref, sender, layer, inputs)
            if above == "mlps":  # the other heads of the block are frozen too, and only the last token matters
                base = ref.corrupt["z", layer].unflatten(-1, (N_HEADS, -1)).clone()
                base[:, :, heads] = z.unflatten(-1, (N_HEADS, -1))[:, :, heads]
                edits[f"z_{layer}"] = lambda _, v=base.flatten(-2): v
            else:
                edits |= ref.head(layer, heads, z)
        patched = torch.tensor(table.loc[table["component"] == name, "ld_patched"].to_numpy())
        torch.testing.assert_close(patched, ref.run(**edits)[0].double(), atol=1e-5, rtol=0)
        if "v" in inputs:
            assert (patched - ref.ld_corrupt).abs().max() > 1e-3


def test_change_at_the_receiver(built):
    """At the residual the shares of everything below add up to one: it is their sum."""
    model, hf = built
    pairs = make_pairs()
    ref = Reference(hf, pairs)
    below = ["attn 0", "mlp 0", "attn 1", "mlp 1"]
    table = receiver_paths(model, pairs, ["head 2.1"], above="nothing", senders=[*below, "mlp 2"])
    parts = table.pivot(index="subject", columns="component", values="effect")
    whole = table.groupby("subject")["total"].first()
    full = (ref.clean["resid_pre", 2] - ref.corrupt["resid_pre", 2]) * pairs.clean.mask[..., None]
    torch.testing.assert_close(torch.tensor(whole.to_numpy()), full.double().square().sum((1, 2)), atol=1e-4, rtol=1e-4)
    embedded = (ref.clean["resid_pre", 0] - ref.corrupt["resid_pre", 0]) * full
    left = whole.to_numpy() - parts[below].sum(axis=1).to_numpy()
    torch.testing.assert_close(torch.tensor(left), embedded.double().sum((1, 2)), atol=1e-3, rtol=1e-3)
    assert (parts["mlp 2"] == 0).all()
    at_heads = receiver_paths(model, pairs, ["head 2.1", "head 1.0"], "heads", above="nothing", senders=["mlp 0"])
    moved, wanted = [], []
    last = (torch.arange(5), pairs.clean.last)
    for layer, head in ((1, 0), (2, 1)):
        z = brute_received(ref, ("mlp_out", 0), layer, "qkv")
        base, clean = ref.corrupt["z", layer], ref.clean["z", layer]
        moved.append((z - base).unflatten(-1, (N_HEADS, -1))[last][:, head])
        wanted.append((clean - base).unflatten(-1, (N_HEADS, -1))[last][:, head])
    moved, wanted = torch.cat(moved, -1).double(), torch.cat(wanted, -1).double()
    expected = (moved * wanted).sum(-1) / wanted.square().sum(-1)
    torch.testing.assert_close(torch.tensor(at_heads["score"].to_numpy()), expected, atol=1e-4, rtol=1e-4)


def test_positions_of_the_sender(built):
    model, _ = built
    pairs = make_pairs()
    everywhere, subject, last, end = (
        receiver_paths(model, pairs, ["head 2.1"], positions=positions)["ld_patched"]
        for positions in ("all", "subject", "subject_last", "last")
    )
    assert not (everywhere == subject).all() and not (subject == last).all() and not (last == end).all()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("inputs, n_kv_heads", [("q", 4), ("k", 4), ("v", 4), ("q", 2)])
def test_transformer_lens_agrees(tmp_path, inputs, n_kv_heads):
    """Its direct paths between heads; keys and values only without grouped heads, which it refuses."""
    bridge_module = pytest.importorskip("transformer_lens.model_bridge")
    from transformer_lens import patching

    hf = families.build("llama", num_key_value_heads=n_kv_heads)
    families.tokenizer().save_pretrained(tmp_path)
    hf.save_pretrained(tmp_path)
    prompts = families.prompts("left", lengths=(9, 9, 9))
    generator = torch.Generator().manual_seed(3)
    other = prompts.tokens.clone()
    other[:, 1:3] = torch.randint(3, families.VOCABULARY, (3, 2), generator=generator)
    ids = torch.tensor([[5, 9], [11, 4], [30, 6]])
    pairs = Pairs(prompt_set(prompts.tokens, prompts, ids, "clean"), prompt_set(other, prompts, ids, "other"))
    model = Model.of(copy.deepcopy(hf), families.tokenizer(), "llama")
    bridge = bridge_module.TransformerBridge.boot_transformers(
        str(tmp_path), hf_model=hf, tokenizer=AutoTokenizer.from_pretrained(tmp_path), device="cpu"
    )
    _, clean = bridge.run_with_cache(prompts.tokens)
    _, corrupt = bridge.run_with_cache(other)

    def metric(logits):
        pair = logits[:, -1].gather(1, ids)
        return (pair[:, 0] - pair[:, 1]).mean()

    theirs = patching.get_act_patch_direct_path(
        bridge, other, clean, corrupt, metric, src_layer=0, src_head=2, component=inputs, verbose=False
    )
    for layer, head in ((1, 0), (1, 3), (2, 2)):
        table = receiver_paths(model, pairs, [f"head {layer}.{head}"], "heads", inputs, "all", senders=["head 0.2"])
        assert table["ld_patched"].mean() == pytest.approx(theirs[layer, head].item(), abs=1e-4)


def test_bfloat16_and_memory(built, monkeypatch):
    _, hf = built
    pairs = make_pairs()
    exact = head_paths(Model.of(copy.deepcopy(hf), families.tokenizer()), pairs)
    rough = head_paths(Model.of(copy.deepcopy(hf).bfloat16(), families.tokenizer()), pairs)
    effect, other = (table["ld_patched"] - table["ld_corrupt"] for table in (exact, rough))
    assert effect.corr(other) > 0.95
    monkeypatch.setattr(path_patching, "MLP_ELEMENTS", 1)  # token by token
    again = head_paths(Model.of(copy.deepcopy(hf), families.tokenizer()), pairs)
    assert (again["ld_patched"] - exact["ld_patched"]).abs().max() < 1e-5


def test_an_unknown_block_is_noticed():
    """Blocks that scale the residual, as some that copy Llama's layout do."""
    model = Model.of(families.build("llama"), families.tokenizer(), "scaled")
    original = model.block(1).forward
    model.block(1).forward = lambda *args, **kwargs: original(*args, **kwargs) * 0.7
    with pytest.raises(TracingError, match="scaled: a path that changes nothing moves the logit difference by"):
        head_paths(model, make_pairs())


ERRORS = [
    (dict(heads=[]), "receivers none: name heads of the model"),
    (dict(heads=["mlp 1"]), "receivers mlp 1: name heads of the model"),
    (dict(heads=["head 3.0"]), "receivers head 3.0: name heads"),
    (dict(heads=["head 1.0"], receiver="logits"), "receiver 'logits'"),
    (dict(heads=["head 1.0"], above="mlps"), "receiver 'residual', above 'mlps'"),
    (dict(heads=["head 1.0"], receiver="heads", inputs="o"), "inputs 'o'"),
    (dict(heads=["head 1.0"], positions="first"), "positions 'first'"),
]


@pytest.mark.parametrize("arguments, message", ERRORS)
def test_errors(arguments, message):
    model = Model.of(families.build("llama"), families.tokenizer())
    with pytest.raises(TracingError, match=message):
        receiver_paths(model, make_pairs(), **arguments)
