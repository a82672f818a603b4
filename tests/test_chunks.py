"""Work in chunks that shrink when memory runs out."""

import pytest
import torch

from helpers.chunks import is_out_of_memory, over_rows

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
