"""Work in chunks that fit, and shrink when memory runs out."""

import families
import pytest
import small
import torch
from localization_cases import facts, prompts
from localization_cases import model as known_model

from helpers import chunks, memory, presets
from helpers.chunks import bytes_a_prompt, fitting, is_out_of_memory, over_prompts, over_rows
from helpers.localization.attribution import attribute
from helpers.localization.counterfactual import pairs

SAID = [
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
]


def test_every_row_comes_once_and_in_order():
    assert torch.cat(over_rows(lambda rows: rows, 10, 4)).tolist() == list(range(10))
    assert [len(rows) for rows in over_rows(lambda rows: rows, 10, 4)] == [4, 4, 2]
    order = torch.tensor([3, 0, 2, 1])
    assert torch.cat(over_rows(lambda rows: rows, 4, 3, order)).tolist() == order.tolist()
    assert over_rows(lambda rows: rows, 0, 4) == []


@pytest.mark.parametrize("error", SAID, ids=lambda error: type(error).__name__)
def test_a_chunk_that_does_not_fit_is_halved_and_the_run_goes_on(error):
    asked = []

    def work(rows):
        asked.append(len(rows))
        if len(rows) > 3:
            raise error
        return rows

    assert torch.cat(over_rows(work, 7, 6)).tolist() == list(range(7))
    assert asked == [6, 3, 3, 1]
    assert is_out_of_memory(error)


def test_it_halves_as_often_as_it_takes():
    asked = []

    def work(rows):
        asked.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return rows

    assert torch.cat(over_rows(work, 7, 8)).tolist() == list(range(7))
    assert asked == [7, 3, 1] + [1] * 6


def test_the_failed_attempt_lets_go_of_what_it_held():
    held = []

    def work(rows):
        big = torch.zeros(10)
        held.append(torch.utils.weak.WeakTensorKeyDictionary({big: None}))
        if len(rows) > 1:
            raise torch.OutOfMemoryError("out of memory")
        assert not len(held[0])  # the first attempt's tensor is gone before the second
        return rows

    assert len(over_rows(work, 2, 2)) == 2


def test_one_row_that_does_not_fit_is_an_error_that_says_what_to_do():
    def work(rows):
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(MemoryError, match="a single prompt does not fit .* smaller model or dtype"):
        over_rows(work, 5, 1)


def test_other_errors_pass_through():
    def work(rows):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        over_rows(work, 5, 4)
    with pytest.raises(ValueError, match="batch_size 0: at least one row"):
        over_rows(lambda rows: rows, 5, 0)


# As many prompts as fit -----------------------------------------------------------------------------


def counted(bare, tokens: int) -> int:
    """What one more prompt takes, counted while the code runs without values."""
    one, two = (sum(memory.of_localization(bare, n, tokens).parts.values()) for n in (1, 2))
    return two - one


@pytest.mark.parametrize("tokens", [12, 96])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_what_a_prompt_is_said_to_take_is_enough_on_every_family(family, tokens):
    bare = memory.skeleton(small.model(family, max_position_embeddings=128))
    assert counted(bare, tokens) <= bytes_a_prompt(bare, tokens)


@pytest.mark.parametrize("name", ["gemma-2-9b", "llama-3-8b"])
def test_and_not_three_times_too_much_on_real_shapes(name):
    bare = memory.skeleton(presets.config(name))
    assert counted(bare, 40) <= bytes_a_prompt(bare, 40) <= 3 * counted(bare, 40)


def test_chunks_are_what_fits_into_half_of_the_memory_that_is_free(monkeypatch):
    model = small.model("llama")
    for room, expected in ((0, 1), (1, 1), (6.9, 3), (1000, 64)):
        monkeypatch.setattr(chunks, "free", lambda device, room=room: room * bytes_a_prompt(model, 9))
        assert fitting(model, 9, 64) == expected
    assert fitting(model, 9, 2) == 2
    with pytest.raises(ValueError, match="batch_size 0"):
        over_prompts(lambda rows: rows, model, prompts(), 0)


def test_with_little_memory_a_localization_gives_the_same_numbers(monkeypatch):
    model = known_model("llama")
    both, sizes, before = pairs(model, facts(16), "cloze"), [], chunks.over_rows
    whole = attribute(model, both)
    monkeypatch.setattr(chunks, "free", lambda device: 10 * bytes_a_prompt(model, both.clean.tokens.shape[1]))
    monkeypatch.setattr(chunks, "over_rows", lambda work, n, size, order=None: sizes.append(size) or before(work, n, size, order))
    parts = attribute(model, both)
    assert sizes == [5] and parts["component"].tolist() == whole["component"].tolist()
    assert (parts["effect"] - whole["effect"]).abs().max() < 1e-4
