"""Probes: the batched fit against scikit-learn, honest folds, and the layer of arrival."""

import families
import numpy as np
import pytest
import torch
from scipy.stats import binom
from sklearn.linear_model import LogisticRegression

from helpers.localization import probes
from helpers.models import Model

LAYERS, N, WIDTH = 4, 240, 12


def data(classes=("a", "b", "c"), n=N, seed=0, layers=LAYERS):
    """Features in which the label can be read the better the higher the layer: not at all in layer 0."""
    generator = torch.Generator().manual_seed(seed)
    number = torch.arange(n) % len(classes)
    centres = torch.randn(len(classes), WIDTH, generator=generator)
    strength = torch.arange(layers, dtype=torch.float32) / 2
    noise = torch.randn(n, layers, WIDTH, generator=generator)
    # scales and offsets of the features differ by orders of magnitude, as in a residual stream
    unit, offset = 10.0 ** torch.linspace(-2, 2, WIDTH), torch.linspace(-50, 50, WIDTH)
    return (noise + strength[None, :, None] * centres[number][:, None]) * unit + offset, [classes[i] for i in number]


# The fit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [0.1, 1.0, 30.0])
def test_fit_is_scikit_learns(penalty):
    features, labels = data(seed=1)
    held, held_labels = data(n=1000, seed=1)
    fitted = probes.fit(features, labels, penalty, tolerance=5e-6)
    standard = lambda x: ((x - features.mean(0)) / features.std(0)).double().numpy()
    x, x_held = standard(features), standard(held)
    accuracy = fitted.accuracy(held, held_labels)
    for layer in range(LAYERS):
        theirs = LogisticRegression(C=1 / penalty, max_iter=5000, tol=1e-8).fit(x[:, layer], labels)
        assert tuple(theirs.classes_) == fitted.classes
        assert accuracy[layer].item() == pytest.approx(theirs.score(x_held[:, layer], held_labels), abs=1.1e-3)
        scale = np.abs(theirs.coef_).max()
        assert fitted.weight[layer].T.numpy() == pytest.approx(theirs.coef_, abs=5e-3 * scale)
        # a constant added to all intercepts changes nothing
        centred = lambda b: b - b.mean()
        assert centred(fitted.bias[layer].numpy()) == pytest.approx(centred(theirs.intercept_), abs=1e-2)
        p = fitted.logits(held).softmax(-1)[layer].numpy()
        assert p == pytest.approx(theirs.predict_proba(x_held[:, layer]), abs=5e-3)


def test_two_classes_are_scikit_learns_at_twice_c():
    """scikit-learn has one weight vector for two classes, we have two: w/2 and -w/2, with half the penalty."""
    features, labels = data(classes=("a", "b"), seed=2)
    fitted = probes.fit(features, labels, 1.0)
    x = ((features - features.mean(0)) / features.std(0)).double().numpy()
    for layer in range(LAYERS):
        theirs = LogisticRegression(C=2.0, max_iter=5000, tol=1e-8).fit(x[:, layer], labels)
        ours = (fitted.weight[layer, :, 1] - fitted.weight[layer, :, 0]).numpy()
        assert ours == pytest.approx(theirs.coef_[0], abs=2e-3 * np.abs(theirs.coef_).max())


def gradient(fitted: probes.Probes, features: torch.Tensor, labels: list[str], penalty: float) -> torch.Tensor:
    """(layer,) largest component of the mean gradient of the objective, in double precision."""
    x = ((features - fitted.mean) / fitted.scale).double()
    weight, bias = fitted.weight.double().requires_grad_(), fitted.bias.double().requires_grad_()
    logits = torch.einsum("nlf,lfc->lnc", x, weight) + bias[:, None]
    y = probes.encode(labels, fitted.classes).repeat(len(logits))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y, reduction="sum") + penalty / 2 * weight.square().sum()
    loss.backward()
    return torch.maximum(weight.grad.abs().amax((1, 2)), bias.grad.abs().amax(1)) / len(labels)


@pytest.mark.parametrize("width", [5, 60, 150])
@pytest.mark.parametrize("penalty", [1e-2, 1.0, 100.0])
def test_the_gradient_vanishes_on_hard_data_too(width, penalty):
    """Features that depend on each other almost exactly, outliers, seven classes of unequal size, labels at random or separable;
    fewer rows than features."""
    generator = torch.Generator().manual_seed(width)
    n, layers = 100, 3
    mixing = torch.randn(layers, width, width, generator=generator) * 10.0 ** torch.linspace(-4, 1, width)
    features = torch.einsum("nlf,lfg->nlg", torch.randn(n, layers, width, generator=generator), mixing)
    features[:3] *= 100
    labels = ["abcdefg"[min(i % 10, 6)] for i in range(n)]
    features[:, 2, 0] += 1000 * probes.encode(labels, "abcdefg")
    assert gradient(probes.fit(features, labels, penalty), features, labels, penalty).max() < 1.5 * probes.TOLERANCE


def test_more_features_than_rows_are_scikit_learns_too():
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(60, 2, 200, generator=generator), ["abc"[i % 3] for i in range(60)]
    fitted = probes.fit(features, labels)
    x = ((features - features.mean(0)) / features.std(0)).double().numpy()
    for layer in range(2):
        theirs = LogisticRegression(max_iter=5000, tol=1e-8).fit(x[:, layer], labels)
        assert fitted.weight[layer].T.numpy() == pytest.approx(theirs.coef_, abs=5e-3 * np.abs(theirs.coef_).max())


def test_layers_are_fitted_independently():
    features, labels = data()
    together = probes.fit(features, labels)
    for layer in range(LAYERS):
        alone = probes.fit(features[:, [layer]], labels)
        assert together.weight[layer].numpy() == pytest.approx(alone.weight[0].numpy(), abs=2e-3 * alone.weight.abs().max().item())


def test_units_do_not_matter():
    features, labels = data()
    one, two = probes.fit(features, labels), probes.fit(features * 1000 - 7, labels)
    torch.testing.assert_close(one.logits(features), two.logits(features * 1000 - 7), atol=2e-2, rtol=0)


def test_a_feature_that_is_constant_up_to_rounding_is_ignored():
    """Constant at the last position of layer 0, say; its rounding errors must not become a feature."""
    features, labels = data()
    constant = torch.full((N, LAYERS, 1), 100.0)
    rounding = constant * (1 + 1e-7 * torch.randn(N, LAYERS, 1, generator=torch.Generator().manual_seed(0)))
    plain = probes.fit(features, labels).logits(features)
    for extra in (constant, rounding, torch.zeros_like(constant)):
        wider = torch.cat([features, extra], dim=2)
        assert torch.isfinite(probes.fit(wider, labels).logits(wider)).all()
        torch.testing.assert_close(probes.fit(wider, labels).logits(wider), plain, atol=1e-2, rtol=0)


def test_accuracy_counts_labels_never_seen_as_missed():
    features, labels = data()
    fitted = probes.fit(features, labels)
    assert torch.equal(fitted.accuracy(features, ["unheard"] * N), torch.zeros(LAYERS))
    half = fitted.accuracy(features[:2], [labels[0], "unheard"])
    assert set(half.tolist()) <= {0.0, 0.5}


@pytest.mark.parametrize("labels, message", [
    (["a"] * N, "two classes or more"),
    (["a"] * (N - 1) + ["b"], "two examples or more each"),
    (["a", "b"], f"{N} rows of features have 2 labels"),
])
def test_what_cannot_be_fitted(labels, message):
    with pytest.raises(ValueError, match=message):
        probes.fit(data()[0], labels)
    with pytest.raises(ValueError, match="penalty 0: it must be positive"):
        probes.fit(*data(), penalty=0)


# Cross-validation -----------------------------------------------------------------------------------


def interval(n: int, p: float) -> tuple[float, float]:
    """The middle 99.9 % of a binomial proportion."""
    return tuple(q / n for q in binom.interval(0.999, n, p))


@pytest.mark.parametrize("seed", range(2))
def test_shuffled_labels_are_at_chance(seed):
    features, labels = data(n=300)
    table = probes.cross_validate(features, labels, seed=seed, shuffled=True)
    low, high = interval(300, 1 / 3)
    assert table.groupby("layer")["accuracy"].mean().between(low, high).all()
    true = probes.cross_validate(features, labels, seed=seed).groupby("layer")["accuracy"].mean()
    assert true[0] < high  # layer 0 holds nothing
    assert true[3] > 0.75 and true.is_monotonic_increasing


def test_held_out_rows_are_never_trained_on(monkeypatch):
    """Rows carry their number; fit and accuracy are watched."""
    features, labels = data()
    features[:, :, 0] = torch.arange(N)[:, None]
    trained, tested = [], []
    fit, accuracy = probes.fit, probes.Probes.accuracy
    monkeypatch.setattr(probes, "fit", lambda x, *args: trained.append(set(x[:, 0, 0].tolist())) or fit(x, *args))
    monkeypatch.setattr(probes.Probes, "accuracy", lambda self, x, y: tested.append(set(x[:, 0, 0].tolist())) or accuracy(self, x, y))
    probes.cross_validate(features, labels, folds=5)
    assert len(trained) == len(tested) == 5
    assert all(not a & b and len(a | b) == N for a, b in zip(trained, tested))
    assert sorted(i for fold in tested for i in fold) == list(range(N))  # each row is tested once


def test_memorising_does_not_help():
    """Every row is a feature of its own: a probe can learn the training rows by heart, and nothing else."""
    n = 150
    features = torch.eye(n)[:, None]
    labels = ["a", "b", "c"] * (n // 3)
    assert probes.fit(features, labels).accuracy(features, labels).item() == 1.0
    found = probes.cross_validate(features, labels)["accuracy"].mean()
    assert found <= interval(n, 1 / 3)[1]


def test_folds_are_stratified_and_seeded():
    features, _ = data(n=60, layers=1)
    labels = ["common"] * 56 + ["rare"] * 4  # unstratified, a fold often takes three of the four
    for seed in range(4):
        assert len(probes.cross_validate(features, labels, seed=seed)) == 5
    same = lambda seed: probes.cross_validate(*data(n=60, layers=2), seed=seed)
    assert same(1).equals(same(1))
    assert not same(1).equals(same(2))


def test_chance_is_the_majority_of_the_held_out_rows():
    features, _ = data()
    labels = ["a"] * 120 + ["b"] * 80 + ["c"] * 40
    table = probes.cross_validate(features, labels, folds=4)
    assert table["chance"].to_numpy() == pytest.approx(0.5)
    assert list(table["layer"].unique()) == list(range(LAYERS)) and list(table["fold"].unique()) == list(range(4))


@pytest.mark.parametrize("folds", [1, N + 1])
def test_impossible_folds(folds):
    with pytest.raises(ValueError, match=f"{N} rows cannot be cut into {folds} folds"):
        probes.cross_validate(*data(), folds=folds)


# Features -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_residuals_are_the_hidden_states(family, padding):
    model = Model.of(families.build(family), families.tokenizer(), family)
    prompts = families.prompts(padding)
    last_block = []
    hook = model.block(model.n_layers - 1).register_forward_hook(lambda module, args, output: last_block.append(output))
    states = model.hf(input_ids=prompts.tokens, attention_mask=prompts.mask, position_ids=prompts.position_ids, output_hidden_states=True)
    hook.remove()
    # transformers puts the final norm on the last of its hidden states
    expected = torch.stack([*states.hidden_states[:-1], last_block[0]], dim=2)
    rows = torch.arange(len(prompts.last))
    for position, where in (("last", prompts.last), ("subject_last", prompts.subject[:, 1] - 1)):
        found = probes.residuals(model, prompts, position, batch_size=2)
        assert found.shape == (len(rows), model.n_layers + 1, model.d_model)
        torch.testing.assert_close(found, expected[rows, where], atol=1e-5, rtol=0)


# Arrival --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accuracy, chance, share, layer", [
    ([0.33, 0.40, 0.90, 0.95, 1.00], 1 / 3, 0.9, 3),  # (.95 − .33) / .67 = .925; .90 gives .85
    ([0.33, 0.40, 0.90, 0.95, 1.00], 1 / 3, 0.8, 2),
    ([0.33, 0.40, 0.90, 0.95, 1.00], 1 / 3, 1.0, 4),
    ([0.9, 0.5, 0.4], 0.3, 0.9, 0),  # read at once, and lost again
    ([0.2, 0.8, 0.3, 0.8], 0.25, 0.9, 1),  # the first of two maxima
    ([0.0, 0.1, 0.34], 1 / 3, 0.9, 2),  # below chance does not count
    ([0.95], 0.5, 0.9, 0),
])
def test_arrival(accuracy, chance, share, layer):
    assert probes.arrival(accuracy, chance, share) == layer


@pytest.mark.parametrize("accuracy", [[0.3, 0.2], [1 / 3, 1 / 3], [], [float("nan")]])
def test_nothing_arrives(accuracy):
    with pytest.raises(ValueError, match="no layer is read above chance"):
        probes.arrival(accuracy, 1 / 3)
