"""Work through many rows in chunks that fit into memory: on out-of-memory the chunk is halved and the work goes on."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")

# What allocators say, in lower case, where they raise a plain RuntimeError.
_SAID = ("out of memory", "defaultcpuallocator: can't allocate memory", "not enough memory")


def over_rows(
    work: Callable[[torch.Tensor], T], n: int, batch_size: int, order: torch.Tensor | None = None
) -> list[T]:
    """`work(rows)` for every chunk of the row numbers 0 … n − 1, at most `batch_size` at a time.

    `rows` is an int64 tensor; `order`, a permutation of the row numbers, says in which order they come
    (rows of similar length share a chunk best). When `work` runs out of memory its chunk is cut in half
    and done again, and later chunks keep the smaller size, so `work` must have no effect but its result.
    Raises `MemoryError` if a single row does not fit, `ValueError` for a batch size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: at least one row a chunk is needed")
    rows = torch.arange(n) if order is None else order
    results, start, size = [], 0, batch_size
    while start < n:
        try:
            results.append(work(rows[start : start + size]))
            start += size
            continue
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if min(size, n - start) == 1:
                raise MemoryError(
                    "a single prompt does not fit into memory: take a smaller model or dtype, a shorter prompt "
                    "format, or fewer layers, sites or positions at a time"
                ) from error
        # out here the exception, and the tensors its frames held, are gone
        size = min(size, n - start) // 2
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return results


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that an accelerator or the machine ran out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error).lower() for said in _SAID)
