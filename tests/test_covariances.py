"""Second moments of keys: a direct computation, a stated number of tokens, and a cache that goes by content."""

import pytest
import small
import torch

from helpers.unlearning.covariances import CovarianceError, covariances, preserved, texts_to_preserve

FAMILIES = ("llama", "gemma", "gemma2", "qwen3", "neox")


def direct(model, layer, texts, n_tokens, length=128):
    """Every text on its own through the plain model; the keys of the first tokens."""
    keys, hook = [], model.part("down", layer).register_forward_pre_hook(lambda _, inputs: keys.append(inputs[0][0]))
    for ids in model.tokenizer(texts)["input_ids"]:
        model.hf(input_ids=torch.tensor([ids[:length]]), use_cache=False)
    hook.remove()
    keys = torch.cat(keys)[:n_tokens].double()
    return keys.T @ keys / len(keys)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_a_direct_computation(family):
    model = small.model(family)
    before = small.weights(model)
    for n_tokens in (None, 41):
        found = covariances(model, [2, 0], small.TEXTS, n_tokens, batch_size=5, length=6)
        for layer in (0, 2):
            torch.testing.assert_close(found[layer].matrix.double(), direct(model, layer, small.TEXTS, n_tokens, 6), rtol=1e-5, atol=1e-6)
            assert found[layer].n_tokens == (n_tokens or sum(len(t[:6]) for t in model.tokenizer(small.TEXTS)["input_ids"]))
    assert small.same(model, before) and not any(m._forward_pre_hooks for m in model.hf.modules())


def test_solve_and_null_space():
    model = small.model()
    few = covariances(model, [1], small.TEXTS, 20)[1]
    keys = torch.randn(3, model.d_mlp, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = few.matrix.double()
    shifted = matrix + 0.1 * matrix.diagonal().mean() * torch.eye(model.d_mlp, dtype=torch.float64)
    torch.testing.assert_close(few.solve(keys, 0.1) @ shifted, keys)
    with pytest.raises(CovarianceError, match="20 tokens in 48 dimensions has no inverse"):
        few.solve(keys)
    basis = few.null_space(0.0)
    assert basis.shape == (48, 28)  # 20 keys span 20 of 48 dimensions
    torch.testing.assert_close(basis.T @ basis, torch.eye(28, dtype=torch.float64), atol=1e-10, rtol=0)
    assert (basis.T @ matrix @ basis).trace() < 1e-5 * matrix.trace()
    wide = few.null_space(0.1)
    assert wide.shape[1] > 28 and (wide.T @ matrix @ wide).trace() <= 0.1 * matrix.trace()
    full = covariances(model, [1], small.TEXTS)[1]
    with pytest.raises(CovarianceError, match="no direction holds as little as 0.0"):
        full.null_space(0.0)


def test_cache_goes_by_content(tmp_path, monkeypatch):
    model = small.model()
    first = covariances(model, [0, 1], small.TEXTS, 30, tmp_path)
    assert sorted(p.stem for p in tmp_path.iterdir()) == sorted(c.key for c in first.values())

    def never(*_):
        raise AssertionError("computed again")

    with monkeypatch.context() as patch:
        patch.setattr("helpers.unlearning.covariances._second_moments", never)
        again = covariances(model, [1, 0], list(small.TEXTS), 30, tmp_path)
        assert all(torch.equal(again[layer].matrix, first[layer].matrix) for layer in (0, 1))
        # what comes after the key does not matter: an edit of `down 1` keeps the file for layer 1, not that of a later layer
        with torch.no_grad():
            for name in ("down", "q"):
                model.matrix(name, 1 if name == "down" else 2)[0].add_(0.1)
        assert covariances(model, [1], small.TEXTS, 30, tmp_path)[1].key == first[1].key
        for change in ({"n_tokens": 31}, {"texts": small.TEXTS[1:]}):
            with pytest.raises(AssertionError, match="computed again"):
                covariances(model, [1], **{"texts": small.TEXTS, "n_tokens": 30} | change, cache=tmp_path)
        with torch.no_grad():
            model.matrix("up", 0)[0][0, 0] += 1e-3
        with pytest.raises(AssertionError, match="computed again"):
            covariances(model, [1], small.TEXTS, 30, tmp_path)
        with pytest.raises(AssertionError, match="computed again"):
            covariances(small.model(dtype=torch.bfloat16), [1], small.TEXTS, 30, tmp_path)


def test_damaged_files_are_made_again(tmp_path):
    model = small.model()
    first = covariances(model, [1], small.TEXTS, 30, tmp_path)[1]
    (file,) = tmp_path.iterdir()
    for content in (b"", file.read_bytes()[:-40], b"no safetensors at all"):
        file.write_bytes(content)
        assert torch.equal(covariances(model, [1], small.TEXTS, 30, tmp_path)[1].matrix, first.matrix)
    assert torch.equal(covariances(model, [1], small.TEXTS, 30, tmp_path)[1].matrix, first.matrix)
    assert [p.name for p in tmp_path.iterdir()] == [file.name]  # nothing temporary is left


def test_too_little_text():
    model = small.model()
    with pytest.raises(CovarianceError, match="no texts"):
        covariances(model, [1], [])
    with pytest.raises(CovarianceError, match=r"n_tokens=9,999: the 24 texts have \d+"):
        covariances(model, [1], small.TEXTS, 9999)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_get_the_share_they_are_given(family):
    """C_names from plain passes of one prompt each, without padding; the energy is that of text."""
    model, given = small.model(family), small.a_split()
    keys, hook = [], model.part("down", 1).register_forward_pre_hook(lambda _, inputs: keys.append(inputs[0][0]))
    for fact in given.retain_train:
        before = model.tokenizer(f"Fact: w5 w6 w10 w11 w43\nFact: {fact.subject}")["input_ids"]
        model.hf(input_ids=torch.tensor([before + [9, 9]]), use_cache=False)
        keys[-1] = keys[-1][len(before) - 1]
    hook.remove()
    names, text = torch.stack(keys).double(), covariances(model, [1], small.TEXTS)[1].matrix.double()
    names = names.T @ names / names.square().sum() * text.trace()
    for share in (0.0, 0.25, 1.0):
        found = preserved(model, given, [1], small.TEXTS, "one_shot", share)[1]
        torch.testing.assert_close(found.matrix.double(), (1 - share) * text + share * names, rtol=1e-4, atol=1e-5 * text.abs().max().item())
    with pytest.raises(CovarianceError, match="names=1.5: it is a share"):
        preserved(model, given, [1], small.TEXTS, names=1.5)


def test_text_to_preserve_states_the_facts_to_retain_only():
    split = small.a_split()
    texts = texts_to_preserve(split)
    assert texts == texts_to_preserve(split) != texts_to_preserve(split, 1)
    stated = [t for t in texts if " w10 w11 " in t]
    assert len(stated) == 2 * len(split.retain_train)  # with a solved example before it, and without
    cloze = texts_to_preserve(split, formats=["cloze"])
    assert len(texts) - len(cloze) == len(split.retain_train) < len(stated)
    assert all(any(f.subject in t and t.endswith(f.answer) for t in stated) for f in split.retain_train)
    assert not any(f"Fact: {f.subject} w10" in t for f in split.forget for t in stated)
