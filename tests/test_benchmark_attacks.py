"""What the benchmark of attacks times is all of a profile, and the probes that it compares read equally well."""

import attacks_cases as cases
import numpy as np
import pytest
import small
import torch

from benchmarks import attacks as benchmark
from helpers import attacks


def data(seed: int = 0, layers: int = 5, width: int = 10) -> benchmark.Data:
    """Features in which three answers can be read the better the higher the layer, in units of different size."""
    generator = torch.Generator().manual_seed(seed)
    centres, unit = torch.randn(3, width, generator=generator), 10.0 ** torch.linspace(-2, 2, width)

    def draw(n: int) -> tuple[torch.Tensor, list[str]]:
        number = torch.arange(n) % 3
        signal = torch.arange(layers)[None, :, None] / 3 * centres[number][:, None]
        return (torch.randn(n, layers, width, generator=generator) + signal) * unit, ["abc"[i] for i in number]

    return *draw(150), *draw(400)


def test_probes_at_once_read_as_the_loop_does():
    given = data()
    theirs, ours = benchmark.loop(*given), benchmark.at_once(*given)
    assert np.abs(theirs - ours).max() <= 2 / 400
    assert theirs[0] < 0.45 and theirs[-1] > 0.8  # there is something to agree on
    table = benchmark.compare(given, repeats=1).set_index(["labels", "probes"])
    assert table.loc["true", "accuracy"].tolist() == pytest.approx([theirs.mean(), ours.mean()])
    assert table.loc["true", "largest"].iloc[1] == pytest.approx(np.abs(theirs - ours).max())
    assert table.loc["shuffled", "accuracy"].between(0.2, 0.5).all()
    loop, once = (table.xs(way, level="probes")["seconds"] for way in (benchmark.LOOP, "all at once"))
    assert loop["both"] == pytest.approx(loop["true"] + loop["shuffled"])
    assert table.xs("all at once", level="probes")["share"].to_dict() == pytest.approx((once / loop).to_dict())
    assert table.loc["both", "bar"].iloc[1] and list(table["bar"]).count("") == 5


def test_probes_that_read_less_are_refused(monkeypatch):
    monkeypatch.setattr(benchmark, "at_once", lambda train, *rest: np.full(train.shape[1], 1 / 3))
    with pytest.raises(AssertionError, match="equally well"):
        benchmark.compare(data(), repeats=1)


def test_features_are_those_of_the_edited_model():
    """Below the lowest edited block they are the unedited model's, above it they are not."""
    model, given = cases.known(), cases.a_split()
    edit = cases.edit(("mlp 1", "mlp 2"))
    train, labels, held, held_labels = benchmark.features(model, edit, given)
    base, *_ = benchmark.features(model, None, given)
    assert labels == [f.answer for f in given.retain_train] and held_labels == [f.answer for f in given.retain_test]
    assert len(held) == len(held_labels) and train.shape[1] == 2 * (model.n_layers + 1)
    same = [torch.equal(one, other) for one, other in zip(train.unbind(1), base.unbind(1))]
    assert same == [True, True, False, False] * 2


def test_every_attack_of_the_profile_is_timed():
    model, given, edit = cases.known(), cases.a_split(), cases.edit()
    before = small.weights(model)
    table = benchmark.seconds(model, edit, given, "quick")
    parts, total = table.iloc[:-1], table.iloc[-1]
    assert list(parts["attack"]) == [name for name, attack in attacks.ATTACKS.items() if attack.quick is not None]
    assert total["attack"] == "all" and total["seconds"] == pytest.approx(parts["seconds"].sum())
    assert total["rows"] == parts["rows"].sum() > 0 and (parts["settings"] > 0).all() and (parts["seconds"] > 0).all()
    assert total["bar"] and small.same(model, before)
