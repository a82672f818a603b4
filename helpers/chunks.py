"""Work through many rows in chunks that fit into memory.

    parts = over_prompts(work, model, prompts, 64)     # at most 64 prompts at a time, fewer where less memory is free
    parts = over_rows(work, 960, 64)                   # the same for rows of any kind, without a look at what is free

Should a chunk be too large all the same, it is halved and the work goes on. (On a CPU nobody may say so: the system ends a process
that takes too much. Hence the look before.)
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from helpers.models import Model
from helpers.promptsets import PromptSet

T = TypeVar("T")

SHARE = 0.5  # of the memory that is free, for a chunk

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


def over_prompts(
    work: Callable[[torch.Tensor], T], model: Model, prompts: PromptSet, batch_size: int, order: torch.Tensor | None = None
) -> list[T]:
    """`over_rows` for work that runs the model on prompts and keeps activations of every layer: as many at a time as fit."""
    return over_rows(work, len(prompts), fitting(model, prompts.tokens.shape[1], batch_size), order)


def fitting(model: Model, tokens: int, most: int) -> int:
    """How many prompts of so many tokens to take at a time: as many as fit into SHARE of what is free, at most `most`, at least one."""
    return min(most, max(1, int(SHARE * free(model.device) // bytes_a_prompt(model, tokens))))


def bytes_a_prompt(model: Model, tokens: int) -> int:
    """What a clean and a corrupted run with all their activations, or gradients through every layer, take for one prompt.

    Numbers a token and layer, rounded up from what PyTorch keeps of the families here: residual, norms and sums, each head's
    query, key, value and output, hidden neurons, and attention before and after the softmax.
    """
    numbers = 12 * model.d_model + 4 * model.n_heads * model.d_head + 3 * model.d_mlp + 4 * model.n_heads * tokens
    return tokens * model.n_layers * numbers * model.dtype.itemsize


def kind(device: str | torch.device) -> str:
    """`cuda`, `cpu` or `mps`: of what kind a device is, or the one that `load_model` takes for `auto` and `split`."""
    if str(device) in ("auto", "split"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device).type


def free(device: str | torch.device) -> int:
    """Bytes that are free on a device now (on the CPU: of main memory; for `split`: on all GPUs together)."""
    if str(device) == "split" and torch.cuda.is_available():
        return sum(free(f"cuda:{index}") for index in range(torch.cuda.device_count()))
    if kind(device) == "cuda":
        device = None if str(device) == "auto" else device
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for what comes next
        return torch.cuda.mem_get_info(device)[0] + kept
    import psutil  # comes with Jupyter; nothing else here needs it

    return psutil.virtual_memory().available


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that an accelerator or the machine ran out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error).lower() for said in _SAID)
