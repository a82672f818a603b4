"""Models: structure read from modules, components, loading, and every way in which loading is refused."""

import shutil

import families
import httpx
import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertLMHeadModel, GPT2Config, GPT2LMHeadModel, GraniteConfig, GraniteForCausalLM

from helpers import checkpoints
from helpers.models import Component, Model, ModelError, load_model
from helpers.selfcheck import self_check
from helpers.sites import TracingError


@pytest.fixture(scope="module", params=families.FAMILIES)
def model(request):
    return Model.of(families.build(request.param), families.tokenizer(), request.param)


@pytest.fixture
def folder(tmp_path):
    return families.save("llama", tmp_path / "model")


# Structure ------------------------------------------------------------------------------------------


def test_sizes_come_from_the_modules(model):
    config = model.hf.config
    assert (model.n_layers, model.n_heads, model.d_model, model.d_mlp) == (3, 4, 32, 48)
    assert model.n_kv_heads == getattr(config, "num_key_value_heads", 4)
    assert model.d_head == {"gemma": 16}.get(model.name, 8)
    assert model.vocab_size == families.VOCABULARY
    assert model.parallel == (model.name == "neox")
    assert model.tied == model.name.startswith("gemma")
    assert model.embed_scale == pytest.approx(32**0.5 if model.name.startswith("gemma") else 1.0)
    assert (model.attn_softcap, model.final_softcap) == ((2.0, 5.0) if model.name == "gemma2" else (None, None))
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)


def test_accessors_return_the_live_modules(model):
    backbone = model.hf.base_model
    for layer in range(3):
        assert model.block(layer) is backbone.layers[layer]
        assert model.attention(layer) in list(model.block(layer).children())
        assert model.mlp(layer) is model.block(layer).mlp
        assert model.attn_norm(layer) is model.block(layer).input_layernorm
        post_norms = (model.attn_post_norm(layer), model.mlp_post_norm(layer))
        if model.name == "gemma2":
            block = model.block(layer)
            assert post_norms == (block.post_attention_layernorm, block.post_feedforward_layernorm)
            assert model.mlp_norm(layer) is block.pre_feedforward_layernorm
        else:
            assert post_norms == (None, None)
            assert model.mlp_norm(layer) is model.block(layer).post_attention_layernorm
    assert model.embed is model.hf.get_input_embeddings()
    assert model.unembed is model.hf.get_output_embeddings()
    assert model.final_norm is getattr(backbone, "final_layer_norm" if model.name == "neox" else "norm")


def test_structure_of_a_half_sequential_neox():
    neox = Model.of(families.build("neox", use_parallel_residual=False), families.tokenizer())
    assert not neox.parallel
    self_check(neox)


def test_matrices_compute_queries_keys_and_values(model):
    """W x + b with the returned rows is what the attention splits into q, k and v."""
    x = torch.randn(5, model.d_model, generator=torch.Generator().manual_seed(0))
    for kind in "qkv":
        (weight, rows), bias = model.matrix(kind, 1), model.bias(kind, 1)
        rows = slice(None) if rows is None else rows
        mine = x @ weight[rows].T + (0 if bias is None else bias[0][rows])
        if model.name == "neox":
            fused = model.attention(1).query_key_value(x).view(5, model.n_heads, 3 * model.d_head)
            theirs = fused.chunk(3, dim=-1)["qkv".index(kind)].flatten(1)
        else:
            theirs = getattr(model.attention(1), f"{kind}_proj")(x)
        torch.testing.assert_close(mine, theirs)
    assert model.matrix("o", 1)[0].shape == (model.d_model, model.n_heads * model.d_head)
    assert model.matrix("down", 1)[0].shape == (model.d_model, model.d_mlp)
    assert (model.bias("o", 1) is not None) == (model.name == "neox")


def test_gate_is_refused_where_there_is_none():
    neox = Model.of(families.build("neox"), families.tokenizer(), "tiny")
    with pytest.raises(ModelError, match="tiny has no 'gate' in its blocks: it has .*qkv"):
        neox.matrix("gate", 0)


@pytest.mark.parametrize("layer", [-1, 3])
def test_layers_are_not_wrapped_around(model, layer):
    with pytest.raises(ModelError, match=f"layer {layer}: {model.name} has layers 0 to 2"):
        model.block(layer)


# Components -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["mlp 3", "attn 5", "head 5.2"])
def test_components_are_written_and_parsed(text):
    assert str(Component.parse(text)) == text


@pytest.mark.parametrize("text", ["mlp3", "head 5", "attn 5.2", "neuron 3", "mlp -1", "mlp 3 ", ""])
def test_what_is_no_component(text):
    with pytest.raises(ValueError, match="write 'mlp 3', 'attn 5' or 'head 5.2'"):
        Component.parse(text)


def test_components_are_checked():
    for wrong in (("layer", 1, None), ("head", 1, None), ("mlp", 1, 2), ("mlp", -1, None)):
        with pytest.raises(ValueError, match="component"):
            Component(*wrong)


def test_every_parameter_of_a_block_belongs_to_its_mlp_or_attention(model):
    owned = [*model.parameters(Component("mlp", 1)), *model.parameters(Component("attn", 1))]
    norms = {name for name, _ in model.hf.named_parameters() if "norm" in name}
    prefix = model.path("block", 1) + "."
    every = {name for name, _ in model.hf.named_parameters() if name.startswith(prefix)}
    assert len(set(owned)) == len(owned)
    assert set(owned) == every - norms


def test_heads_tile_their_matrices(model):
    """Together the heads cover q and o exactly once; k and v only where each head has its own."""
    covered = {name: torch.zeros_like(value) for name, value in model.hf.named_parameters()}
    for component in model.components("head"):
        for name, index in model.parameters(component).items():
            covered[name][index] += 1
    own_kv = model.n_kv_heads == model.n_heads
    for layer in range(3):
        for kind in ("q", "o") + (("k", "v") if own_kv else ()):
            rows = model.matrix(kind, layer)[1]
            count = covered[f"{model.path(kind, layer)}.weight"]
            assert (count if rows is None else count[rows]).eq(1).all()
        if not own_kv:
            assert not covered[f"{model.path('k', layer)}.weight"].any()


def test_head_out_of_range(model):
    with pytest.raises(ModelError, match="heads 0 to 3"):
        model.parameters(Component("head", 0, 4))


# Loading --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_loads_from_a_folder(family, tmp_path):
    folder = families.save(family, tmp_path)
    model = load_model(str(folder), device="cpu")
    assert model.dtype == torch.float32 and not model.hf.training
    assert not any(parameter.requires_grad for parameter in model.hf.parameters())
    for name, value in families.build(family).state_dict().items():
        assert torch.equal(model.hf.state_dict()[name], value)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_self_check_holds_in_bfloat16(family, tmp_path):
    model = load_model(str(families.save(family, tmp_path)), dtype="bfloat16", device="cpu")
    assert model.dtype == torch.bfloat16


@pytest.mark.skipif(torch.cuda.is_available(), reason="'auto' would choose the GPU, where the default is bfloat16")
def test_device_map(folder):
    model = load_model(str(folder), device_map="auto")
    assert (model.device.type, model.dtype) == ("cpu", torch.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it would be the GPU, where the default is bfloat16")
@pytest.mark.parametrize("device", ["auto", "split"])
def test_devices_by_name(folder, device):
    model = load_model(str(folder), device=device)
    assert (model.device.type, model.dtype) == ("cpu", torch.float32)


def test_bundled_models_go_by_name(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "BUNDLED", tmp_path)
    shutil.copytree(folder, tmp_path / "tiny-one")
    assert load_model("tiny-one", device="cpu").name == "tiny-one"
    with pytest.raises(ModelError, match="no bundled model 'tiny-two': there are model, tiny-one"):
        load_model("tiny-two")


def test_no_name():
    with pytest.raises(ModelError, match="no model name given"):
        load_model(" ")


def test_folder_without_a_model(tmp_path):
    with pytest.raises(ModelError, match="holds no config.json"):
        load_model(str(tmp_path))


def test_a_relative_folder_counts_from_the_project_too(monkeypatch, folder, tmp_path):
    """A kernel works in notebooks/, and `make run MODEL=…` is typed above it."""
    from helpers import provenance

    monkeypatch.setattr(provenance, "project_root", lambda: folder.parent)
    monkeypatch.chdir(tmp_path)
    assert load_model(folder.name).name == folder.name
    with pytest.raises(ModelError, match="no such folder"):
        load_model(f"{folder.name}/not/there")


def test_folder_that_is_not_there(tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        load_model(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("keep", [0, 4, 1000])
def test_truncated_weights_are_named(folder, keep):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ModelError, match="model.safetensors is damaged"):
        load_model(str(folder))


def test_pickled_weights_are_not_loaded(folder):
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no .safetensors file"):
        load_model(str(folder))


def test_a_missing_parameter_is_not_replaced_by_random_numbers(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lack or misfit 1 parameters, first model.layers.1.mlp.up_proj.weight"):
        load_model(str(folder))


def test_a_parameter_of_another_shape(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(7)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="the weights could not be loaded"):
        load_model(str(folder))


def test_missing_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="no usable tokenizer"):
        load_model(str(folder))


def test_hub_id_while_offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="nobody/nothing is not in the local cache.*hf download nobody/nothing"):
        load_model("nobody/nothing")


@pytest.mark.parametrize(
    "error, message",
    [
        (huggingface_hub.errors.GatedRepoError, "is gated: accept its licence .* set HF_TOKEN"),
        (huggingface_hub.errors.RepositoryNotFoundError, "no such model on the hub"),
        (huggingface_hub.errors.RemoteEntryNotFoundError, "holds no config.json"),
    ],
)
def test_what_the_hub_refuses(monkeypatch, error, message):
    def refuse(*_):
        raise error("refused", response=httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co")))

    monkeypatch.setattr(checkpoints, "hf_hub_download", refuse)
    with pytest.raises(ModelError, match=message):
        load_model("somebody/something")


@pytest.mark.parametrize(
    "other, message",
    [
        (
            lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2)),
            r"one list of blocks that hold self_attn or attention, found .*h \(ModuleList\)",
        ),
        (
            lambda: BertLMHeadModel(
                BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, is_decoder=True)
            ),
            r"found embeddings \(BertEmbeddings\), encoder \(BertEncoder\)",
        ),
    ],
)
def test_unsupported_architectures_are_listed_before_weights_are_read(tmp_path, other, message):
    other().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"never opened")
    with pytest.raises(ModelError, match=message):
        load_model(str(tmp_path))


def test_a_missing_part_is_named():
    hf = families.build("llama")
    del hf.model.layers[1].mlp.gate_proj
    with pytest.raises(ModelError, match=r"looked in LlamaMLP for gate \(gate_proj\), found up_proj \(Linear\)"):
        Model.of(hf, families.tokenizer())


def test_self_check_refuses_an_unknown_residual():
    """Granite has Llama's module names, and multiplies what a block adds to the residual."""
    sizes = families.COMMON | dict(num_key_value_heads=2, residual_multiplier=0.5)
    granite = GraniteForCausalLM._from_config(GraniteConfig(**sizes), attn_implementation="eager").eval()
    with pytest.raises(TracingError, match="do not add up to the final residual"):
        self_check(Model.of(granite.requires_grad_(False), families.tokenizer(), "granite"))


def test_arguments_that_contradict(folder):
    with pytest.raises(ModelError, match="device or device_map, not both"):
        load_model(str(folder), device="cpu", device_map="auto")
    with pytest.raises(ModelError, match="dtype 'half-ish'"):
        load_model(str(folder), dtype="half-ish")


def test_fused_attention_is_refused():
    hf = families.build("llama")
    hf.set_attn_implementation("sdpa")
    with pytest.raises(ModelError, match="uses sdpa attention: load it with attn_implementation='eager'"):
        Model.of(hf, families.tokenizer())
