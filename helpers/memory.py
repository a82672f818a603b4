"""How much memory an edit or a localization will take, said before any weight is loaded.

    bare = skeleton("google/gemma-2-9b")                       # the architecture without its weights
    chosen = mask(bare, ["mlp 2", "mlp 3", "mlp 4"])
    announce(bare, chosen, Settings(chunk=16), "cuda")

The passes are not guessed from a formula: the very code that will run is run on torch's meta device, where tensors have
shapes and no values, while the bytes that live at once are counted. What a training step multiplies is counted too.

Left out are what the driver and torch's allocator keep for themselves (count on a tenth more) and casts under `autocast`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoModelForCausalLM, PretrainedConfig

from helpers import checkpoints
from helpers.chunks import free, kind
from helpers.localization.engine import Run
from helpers.masks import Mask
from helpers.models import Model
from helpers.sites import Batch
from helpers.unlearning.forward import hidden_states, layer_of, logits_of, only
from helpers.unlearning.training import Settings

GIB = 2**30
GENTLEST_FIRST = ({"chunk": 16}, {"recompute": True}, {"chunk": 4}, {"chunk": 1}, {"masters": False})
KEPT = ("head", "attn_out", "mlp_out")  # what path patching keeps of a run


@dataclass(frozen=True)
class Estimate:
    """Bytes by part, on the device that computes; `host`: bytes of main memory beside it; `work`: multiplications and
    additions of one training step (0 for a localization)."""

    parts: dict[str, int]
    host: int = 0
    work: float = 0.0
    title: str = field(default="", compare=False)

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        unit, name = (GIB, "GiB") if self.total >= GIB else (2**20, "MiB")
        sizes = {**self.parts, "together": self.total} | ({"and in main memory": self.host} if self.host else {})
        return "\n".join([f"{self.title} (estimated)", *(f"{part:<34}{size / unit:>9.2f} {name}" for part, size in sizes.items())])


def skeleton(source: str | PretrainedConfig | Model, dtype: torch.dtype = torch.bfloat16) -> Model:
    """A model on the meta device: all of its structure, none of its weights. For a name only the configuration is read.

    A `Model` keeps its dtype; one that is a skeleton already is given back. Raises `ModelError` as loading does.
    """
    if isinstance(source, Model) and source.device.type == "meta":
        return source
    name = source if isinstance(source, str) else getattr(source, "name", "")
    if isinstance(source, str):
        source = checkpoints.bare(source, checkpoints.locate(source)).config
    elif isinstance(source, Model):
        source, dtype = source.hf.config, source.dtype
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(source, attn_implementation="eager", dtype=dtype)
    return Model.of(hf.eval().requires_grad_(False), None, name or source.model_type)


def of_edit(model: Model, chosen: Mask, settings: Settings = Settings(), prompt_tokens: int = 32, n_facts: int = 1500,
            n_texts: int = 512) -> Estimate:
    """What fine-tuning the masked weights takes, for a loaded model or a skeleton.

    `prompt_tokens`: length of the longest prompt. `n_facts`, `n_texts`: facts and texts whose residual below the lowest
    masked block is remembered, where there is one and `settings.cache` is on. Raises `SelectionError` for a mask of another model.
    """
    bare = skeleton(model)
    chosen.check(bare)
    size, n = bare.dtype.itemsize, chosen.n_parameters
    master = torch.promote_types(bare.dtype, torch.float32).itemsize if settings.masters else size
    # whole parameters in a wide enough dtype are their own masters
    own = 0 if master > size else sum(bare.hf.get_parameter(name).numel() for name, part in chosen.entries.items() if part is None)
    lowest = min(layer_of(bare, name) for name in chosen.entries)
    remembered = lowest > 0 and settings.cache
    start = lowest if remembered else 0
    prompt, text = (_passes(bare, chosen, settings, tokens, at_each, start)
                    for tokens, at_each in ((prompt_tokens, False), (settings.text_tokens, True)))
    drawn = settings.batch * settings.steps
    tokens = min(2 * drawn, n_facts) * prompt_tokens + min(drawn, n_texts) * settings.text_tokens
    parts = {
        "weights": sum(p.numel() for p in bare.hf.parameters()) * size,
        "trained copies": (n - own) * master,
        "gradients": n * master,
        "AdamW's moments": 2 * n * master,
        "the last good weights": n * size,
        f"a pass over {min(settings.chunk, settings.batch)} rows": max(prompt[0], text[0]),
        "remembered residuals": tokens * bare.d_model * size if remembered else 0,
    }
    # two terms on prompts, one on texts
    work = settings.batch / min(settings.chunk, settings.batch) * (2 * prompt[1] + text[1])
    return Estimate(parts, host=2 * n * size, work=work, title=f"{bare.name}: an edit of {n:,} weights")


def of_localization(model: Model, rows: int = 64, tokens: int = 32) -> Estimate:
    """What patching and attribution take in chunks of so many prompts, for a loaded model or a skeleton.

    Chunks are made to fit (`chunks.fitting`), so this says how fast it will be rather than whether it goes.
    """
    bare = skeleton(model)
    ones = torch.ones(rows, tokens, dtype=torch.int64)
    batch = Batch(ones, ones.bool(), torch.arange(tokens).expand(rows, tokens), torch.full((rows,), tokens - 1))
    meta = ones.to("meta")

    def attribute() -> None:
        embeds = bare.embed(meta).requires_grad_()
        logits_of(bare, hidden_states(bare, meta, meta, residual=embeds)[:, -1]).sum().backward()

    kept = []  # a run lives on: its memory is what counts
    run, _ = _count(bare, lambda: kept.append(Run(bare, batch, KEPT)))
    gradients, _ = _count(bare, attribute)
    weights = sum(p.numel() for p in bare.hf.parameters()) * bare.dtype.itemsize
    parts = {"weights": weights, f"a clean and a corrupted run of {rows}": 2 * run}
    return Estimate(parts | {"what attribution adds": max(0, gradients - 2 * run)}, title=f"{bare.name}: localization")


def advice(model: Model, chosen: Mask, settings: Settings, room: int, **sizes: int) -> list[str]:
    """Changes that make an edit fit into `room` bytes, the gentlest first, each on top of those before it.

    Empty where it fits already; the last line says so if nothing here is enough. `sizes` are those of `of_edit`.
    """
    needed = of_edit(model, chosen, settings, **sizes).total
    said = []
    for change in GENTLEST_FIRST:
        if needed <= room:
            return said
        if change.get("chunk", 0) < settings.chunk and replace(settings, **change) != settings:
            settings = replace(settings, **change)
            needed = of_edit(model, chosen, settings, **sizes).total
            said += [f"with {name}={value} it takes {needed / GIB:.1f} GiB" for name, value in change.items()]
    too_much = "which is still too much: take a mask of fewer weights, a smaller model, a narrower dtype or several GPUs"
    return said if needed <= room else [*said, too_much]


def announce(model: Model, chosen: Mask, settings: Settings = Settings(), device: str | torch.device = "cpu", **sizes: int) -> Estimate:
    """Print what an edit takes, whether it fits into what is free on `device`, and what to change if not.

    For a skeleton, before its weights are loaded, or for a loaded model, whose weights take nothing more.
    """
    estimate = of_edit(model, chosen, settings, **sizes)
    print(estimate)
    room = free(device) - (estimate.host if kind(device) == "cpu" else 0)
    if model.device.type != "meta":
        room += estimate.parts["weights"]
    changes = advice(model, chosen, settings, room, **sizes)
    print(f"there is room for {max(room, 0) / GIB:.1f} GiB: it {'does not fit' if changes else 'fits'}")
    for change in changes:
        print(f"  {change}")
    return estimate


def _passes(bare: Model, chosen: Mask, settings: Settings, tokens: int, at_each: bool, start: int) -> tuple[int, float]:
    """Peak bytes and work of one pass over a chunk and back; `at_each`: with a loss at every position, else at the last.

    Blocks of which the same matrices are trained cost the same. One of each kind is run, then one more of a kind for what
    another of it adds.
    """
    lowest = min(layer_of(bare, name) for name in chosen.entries)
    kinds: dict[tuple, list[int]] = {}
    for layer in range(start, bare.n_layers):
        inside = f"{bare.path('block', layer)}."
        trained = tuple(name.removeprefix(inside) for name in chosen.entries if name.startswith(inside))
        kinds.setdefault((trained, layer >= lowest), []).append(layer)
    first = [layers[0] for layers in kinds.values()]
    peak, work = base = _step(bare, chosen, settings, tokens, at_each, start, first)
    for layers in kinds.values():
        if len(layers) > 1:
            more = _step(bare, chosen, settings, tokens, at_each, start, [*first, layers[1]])
            peak, work = (had + (len(layers) - 1) * (new - old) for had, new, old in zip((peak, work), more, base))
    return peak, work


def _step(bare: Model, chosen: Mask, settings: Settings, tokens: int, at_each: bool, start: int, layers: list[int]) -> tuple[int, float]:
    """As `_passes`, with these blocks alone."""
    rows = torch.zeros(min(settings.chunk, settings.batch), tokens, dtype=torch.int64, device="meta")
    residual = torch.zeros(*rows.shape, bare.d_model, dtype=bare.dtype, device="meta") if start else None

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        hidden, answers = (hidden[:, :-1], rows[:, 1:]) if at_each else (hidden[:, -1:], rows[:, -1:])
        # nothing keeps the logits, as in training: they are the largest tensor of all
        return F.cross_entropy(logits_of(bare, hidden.flatten(0, 1)), answers.flatten(), reduction="none").sum()

    def work() -> None:
        loss(hidden_states(bare, rows, torch.ones_like(rows), start, residual, recompute=settings.recompute)).backward()

    def collect(parameter: torch.Tensor) -> None:
        parameter.grad = None  # as soon as it is complete a gradient moves to its master

    with ExitStack() as stack:
        for name in chosen.entries:
            if layer_of(bare, name) in layers:
                parameter = bare.hf.get_parameter(name).requires_grad_(True)
                stack.callback(parameter.requires_grad_, False)
                stack.callback(parameter.register_post_accumulate_grad_hook(collect).remove)
        stack.enter_context(only(bare, layers))
        return _count(bare, work)


def _count(bare: Model, work: Callable[[], object]) -> tuple[int, float]:
    """(peak bytes of new tensors, multiplications and additions) of some work on the meta device."""
    with _Counter(bare.hf.parameters()) as counter:
        work()
    return counter.peak, counter.work


class _Counter(TorchDispatchMode):
    """Counts the bytes of tensors that live at once, beside those that were there before, and what is multiplied."""

    def __init__(self, there: Iterable[torch.Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self.work = 0.0
        self._known = WeakIdKeyDictionary({tensor.untyped_storage(): True for tensor in there})

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        count = flop_registry.get(function._overloadpacket)
        self.work += count(*args, **(kwargs or {}), out_val=result) if count else 0
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._known:
            self._known[storage] = True
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, storage.nbytes())

    def _drop(self, size: int) -> None:
        self.now -= size
