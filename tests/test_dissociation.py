"""Blocks that cannot hold facts: read from the recipe, scored by hand-made choices, edited beside lookup."""

import json

import pytest
import small

from helpers.dissociation import BY_CHANCE, DissociationError, frozen_blocks, middle, places, score
from helpers.masks import mask


def folder(path, recipe: dict | None):
    path.mkdir()
    (path / "config.json").write_text("{}")
    if recipe is not None:
        (path / "recipe.json").write_text(json.dumps(recipe))
    return str(path)


def test_frozen_blocks_come_from_the_recipe(tmp_path):
    assert frozen_blocks(folder(tmp_path / "late", {"frozen_blocks": 3})) == 3


@pytest.mark.parametrize("recipe, said", [(None, "no recipe.json"), ({}, "froze no blocks"), ({"frozen_blocks": 0}, "froze no blocks")])
def test_a_model_of_which_nothing_is_known_is_refused(recipe, said, tmp_path):
    with pytest.raises(DissociationError, match=said):
        frozen_blocks(folder(tmp_path / "m", recipe))


def test_what_is_not_there_is_named_with_what_is():
    with pytest.raises(DissociationError, match="no model 'tiny-nowhere' here .bundled: .*tiny-llama3.*pretrain tiny-nowhere"):
        frozen_blocks("tiny-nowhere")
    with pytest.raises(DissociationError, match="no model ''"):
        frozen_blocks("")
    with pytest.raises(DissociationError, match="tiny-llama3: its recipe froze no blocks"):
        frozen_blocks("tiny-llama3")


@pytest.fixture(scope="module")
def model():
    return small.model("llama", num_hidden_layers=6)


def test_shares_of_choices_by_hand(model):
    choices = {"early": mask(model, ["mlp 0"]), "right": mask(model, ["mlp 2", "mlp 3"]), "half": mask(model, ["mlp 1", "mlp 3"]),
               "mostly": mask(model, ["mlp 2", "mlp 3", "mlp 5"]), "late": mask(model, ["mlp 4", "mlp 5"])}
    table = score(model, choices, 2, (4, 5)).set_index("choice")
    expected = {"early": (1, 0, 0), "right": (0, 1, 0), "half": (0.5, 0.5, 0), "mostly": (0, 2 / 3, 1 / 3), "late": (0, 0, 1),
                BY_CHANCE: (1 / 3,) * 3}
    for name, shares in expected.items():
        assert tuple(table.loc[name, ["frozen", "middle", "late"]]) == pytest.approx(shares)
    assert list(table.index[table["found"]]) == ["right", "mostly"]


def test_attention_counts_by_its_weights(model):
    table = score(model, {"both": mask(model, ["attn 0", "mlp 2"])}, 2, (4,)).set_index("choice")
    attention, mlp = (mask(model, [unit]).n_parameters for unit in ("attn 0", "mlp 2"))
    assert table.loc["both", "frozen"] == pytest.approx(attention / (attention + mlp))


def test_without_heads_above_everything_that_learned_is_middle(model):
    assert middle(model, 2, ()) == [2, 3, 4, 5] and middle(model, 2, (5, 3)) == [2] and middle(model, 2, (0, 2, 4)) == [2, 3]
    table = score(model, {"any": mask(model, ["mlp 2", "mlp 4"])}, 2, (0, 3))
    assert table["middle"].tolist() == [0.5, 1 / 6]


def test_places_hold_equally_many_mlps_and_none_comes_twice(model):
    found = places(model, 2, 2, (3, 4))
    assert {name: m.layers for name, m in found.items()} == {"lookup": (3, 4), "MLP 0-1": (0, 1), "MLP 2-3": (2, 3), "MLP 4-5": (4, 5)}
    assert list(places(model, 2, 2, (2, 3))) == ["lookup", "MLP 0-1", "MLP 4-5"]
    assert list(places(model, 2, 2, ())) == ["MLP 0-1", "MLP 2-3", "MLP 4-5"]
    assert list(places(model, 2, 5, ())) == ["MLP 0-1", "MLP 4-5"]
