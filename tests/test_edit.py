"""An edit: applied and taken back bit for bit, saved, exported, and refused where it does not belong."""

import copy
import json

import families
import pytest
import small
import torch
from safetensors.torch import save_file

from helpers.masks import SelectionError, mask
from helpers.models import load_model
from helpers.unlearning.edit import Edit, EditError


@pytest.fixture
def model():
    return small.model()


def an_edit(model, chosen=None, seed=0, size=0.1) -> Edit:
    """Random new values of the masked weights; those outside the mask are given as NaN, and must not matter."""
    chosen = chosen or mask(model, ["mlp 1", "head 2.1"])
    generator = torch.Generator().manual_seed(seed)
    new = {}
    for name, part in chosen.entries.items():
        old = model.hf.get_parameter(name).detach()
        value = old + size * torch.randn(old.shape, generator=generator).to(old.dtype)
        new[name] = value if part is None else torch.where(part, value, torch.full_like(value, float("nan")))
    return Edit.of(model, chosen, new, {"method": "noise"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "neox"])
def test_applied_and_restored_bit_for_bit(family, dtype):
    model = small.model(family, dtype)
    before, clean = small.weights(model), small.logits(model)
    edit = an_edit(model)
    assert small.same(model, before)
    with edit.applied(model) as edited:
        assert edited is model
        assert not torch.equal(small.logits(model), clean)
        for name, parameter in model.hf.named_parameters():
            if name not in edit.values:
                assert torch.equal(parameter, before[name])
            elif edit.parts[name] is not None:
                part = edit.parts[name]
                assert torch.equal(parameter[~part], before[name][~part])
                assert torch.equal(parameter[part], edit.values[name])
            else:
                assert torch.equal(parameter, edit.values[name])
    assert small.same(model, before)
    assert torch.equal(small.logits(model), clean)


def test_special_bits_survive(model):
    """-0.0, NaN payloads and denormals are restored as bits, not as numbers."""
    bits = torch.tensor([-2147483648, 0x7FC12345, 1], dtype=torch.int32)
    with torch.no_grad():
        model.matrix("up", 1)[0].view(-1)[:3] = bits.view(torch.float32)
    before = small.weights(model)
    chosen = mask(model, ["up 1"])
    edit = Edit.of(model, chosen, {name: torch.zeros(model.hf.get_parameter(name).shape) for name in chosen.entries}, {})
    with edit.applied(model):
        assert not model.matrix("up", 1)[0].any()
    assert small.same(model, before)


def test_restored_after_an_exception_and_after_training_inside(model):
    before, edit = small.weights(model), an_edit(model)
    with pytest.raises(ZeroDivisionError), edit.applied(model):
        with torch.no_grad():
            for name in edit.values:
                model.hf.get_parameter(name).add_(1.0)
        1 / 0
    assert small.same(model, before)
    with edit.applied(model):  # what was done inside has not leaked into the edit either
        name = next(name for name, part in edit.parts.items() if part is None)
        assert torch.equal(model.hf.get_parameter(name), edit.values[name])


def test_an_edit_does_not_follow_the_tensors_it_was_made_from(model):
    chosen = mask(model, ["down 0"])
    (name,) = chosen.entries
    new = {name: torch.ones_like(model.hf.get_parameter(name))}
    edit = Edit.of(model, chosen, new, {})
    new[name].zero_()
    assert edit.values[name].all()


def test_changes_are_measured(model):
    chosen = mask(model, ["down 0", "head 1.0"])
    new = {name: model.hf.get_parameter(name).detach() + 2.0 for name in chosen.entries}
    edit = Edit.of(model, chosen, new, {})
    table = edit.changes.set_index("parameter")
    assert edit.n_weights == chosen.n_parameters == table["weights"].sum()
    for name, part in chosen.entries.items():
        old = model.hf.get_parameter(name).detach()
        old = old if part is None else old[part]
        assert table.loc[name, "norm"] == pytest.approx(2 * old.numel() ** 0.5, rel=1e-6)
        assert table.loc[name, "relative"] == pytest.approx(2 * old.numel() ** 0.5 / old.norm().item(), rel=1e-5)
        assert table.loc[name, "largest"] == pytest.approx(2.0, rel=1e-6)
    assert edit.norm == pytest.approx(2 * chosen.n_parameters**0.5, rel=1e-6)


# Several edits --------------------------------------------------------------------------------------


def test_an_edit_on_top_of_an_edit(model):
    before, first = small.weights(model), an_edit(model, mask(model, ["mlp 0"]))
    with first.applied(model):
        middle = small.weights(model)
        second = an_edit(model, mask(model, ["mlp 0", "mlp 2"]), seed=1)
        with second.applied(model):
            assert not small.same(model, middle)
        assert small.same(model, middle)
    assert small.same(model, before)
    with pytest.raises(EditError, match=r"layers\.0\.mlp.*values differ"), second.applied(model):
        pass
    assert small.same(model, before)


def test_an_edit_made_on_top_of_another_is_refused_without_it(model):
    """Also where they share no weight: the second would not do what it did."""
    before, first = small.weights(model), an_edit(model, mask(model, ["mlp 0"]))
    with first.applied(model):
        second = an_edit(model, mask(model, ["mlp 2"]), seed=1)
    with pytest.raises(EditError, match=r"layers\.0\.mlp.*made on top of another"), second.applied(model):
        pass
    assert small.same(model, before)
    with pytest.raises(EditError), first.applied(model), first.applied(model):
        pass
    assert small.same(model, before)


def test_edits_are_closed_in_reverse_order(model):
    before, first = small.weights(model), an_edit(model, mask(model, ["mlp 0"]))
    outer = first.applied(model)
    outer.__enter__()
    inner = an_edit(model, mask(model, ["mlp 0"]), seed=1).applied(model)
    inner.__enter__()
    with pytest.raises(EditError, match="reverse"):
        outer.__exit__(None, None, None)
    inner.__exit__(None, None, None)
    outer.__exit__(None, None, None)
    assert small.same(model, before)


def test_a_copy_made_inside_stays_edited(model):
    clean = small.logits(model)
    with an_edit(model).applied(model):
        edited = small.logits(model)
        twin = type(model)(**{**vars(model), "hf": copy.deepcopy(model.hf)})
    assert torch.equal(small.logits(model), clean)
    assert torch.equal(small.logits(twin), edited)


# Files ----------------------------------------------------------------------------------------------


def test_saved_and_loaded(model, tmp_path):
    edit = an_edit(model)
    edit.save(tmp_path / "deep" / "edit.safetensors")
    again = Edit.load(tmp_path / "deep" / "edit.safetensors")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["edit.safetensors"]
    assert again.changes.equals(edit.changes)
    assert again.record.items() >= edit.record.items()
    assert {"python", "packages"} <= set(again.record["provenance"])
    with edit.applied(model):
        wanted = small.logits(model)
    with again.applied(model):
        assert torch.equal(small.logits(model), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exported_as_an_ordinary_checkpoint(tmp_path, dtype):
    model = load_model(str(families.save("gemma2", tmp_path / "base")), dtype=dtype)
    before, edit = small.weights(model), an_edit(model)
    folder = edit.export(model, tmp_path / "edited")
    assert small.same(model, before)
    assert json.loads((folder / "edit.json").read_text())["method"] == "noise"
    assert not list(tmp_path.glob(".*"))
    exported = load_model(str(folder), dtype=dtype)
    with edit.applied(model):
        assert torch.equal(small.logits(exported), small.logits(model))
    with pytest.raises(EditError, match="something already"):
        edit.export(model, tmp_path / "edited")


def test_files_that_hold_no_edit(model, tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    an_edit(model).save(tmp_path / "edit.safetensors")
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "edit.safetensors").read_bytes()[:1000])
    for name, says in {"other": "holds no edit", "torn": "no readable edit", "absent": "no readable edit"}.items():
        with pytest.raises(EditError, match=says):
            Edit.load(tmp_path / f"{name}.safetensors")


# Another model --------------------------------------------------------------------------------------


def test_another_model_is_refused_by_name(model):
    edit = an_edit(model)
    others = {
        "values differ": small.model(seed=1),
        "float32 there and": small.model(dtype=torch.bfloat16),
        "absent": small.model("neox"),
        r"48x32 float32 there and 64x32": small.model(intermediate_size=64),
    }
    for says, other in others.items():
        before = small.weights(other)
        with pytest.raises(EditError, match=rf"\.mlp\.\w+\.weight|layers.*{says}") as error, edit.applied(other):
            pass
        assert says.split()[-1] in str(error.value)
        assert small.same(other, before)
    with torch.no_grad():
        model.final_norm.weight[0] += 1
    with pytest.raises(EditError, match="norm.weight.*leaves it alone"), edit.applied(model):
        pass


def test_new_values_must_fit(model):
    chosen = mask(model, ["down 0"])
    (name,) = chosen.entries
    old = model.hf.get_parameter(name).detach()
    with pytest.raises(EditError, match=f"{name}.*needed, got none"):
        Edit.of(model, chosen, {}, {})
    with pytest.raises(EditError, match="needed, got"):
        Edit.of(model, chosen, {name: old.T}, {})
    with pytest.raises(EditError, match="not finite"):
        Edit.of(model, chosen, {name: old / 0}, {})
    with pytest.raises(SelectionError, match="another model"):
        Edit.of(small.model("neox"), chosen, {name: old}, {})
