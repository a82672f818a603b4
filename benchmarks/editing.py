"""What an edit costs by mask, against the same edit by a plain loop over the whole model.

    python -m benchmarks.editing                    # the bundled model: seconds and memory, then an edit with its evaluation
    python -m benchmarks.editing --precision        # what updates in pure bf16 lose
    python -m benchmarks.editing --shape gemma-2-9b --modes bf16 --repeats 1     # random weights, on a GPU

The plain loop is what transformers and torch.optim give without more: whole passes with all logits, gradients and optimizer
state for every parameter, transformers' default attention. Batches, loss terms, learning rates and the fused AdamW are the
same, and restricted to a mask it ends at the same weights: that is checked first.

Times are medians of repeats that take turns (`cpu` is nearer to the truth on a machine that does other things too, with one thread).
Memory is by how much the resident set grew at its peak, in a process of its own; on a GPU the most that torch had allocated.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import torch

from benchmarks import measure, plain, real_shapes
from benchmarks.measure import Cost
from benchmarks.report import judge, save
from helpers import facts, metrics, presets
from helpers.masks import Mask, mask
from helpers.models import Model, load_model
from helpers.memory import GIB
from helpers.progress import progress
from helpers.selection import all_mlps, everything
from helpers.splits import Split, split
from helpers.unlearning.edit import Edit
from helpers.unlearning.evaluation import evaluate, summarize
from helpers.unlearning.finetune import finetune
from helpers.unlearning.texts import general_texts
from helpers.unlearning.training import Settings

PLAIN = "plain loop"
# way of computing -> dtype of the weights, whether matrix products are in bf16 over fp32 weights
MODES = {"fp32": (torch.float32, False), "autocast": (torch.float32, True), "bf16": (torch.bfloat16, False)}
# precision -> the mode, whether the optimizer works on fp32 masters
PRECISIONS = {"fp32": ("fp32", True), "fp32 masters over bf16": ("bf16", True), "pure bf16": ("bf16", False)}
LADDER = (1e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3)  # learning rates
CHECKED, TOLERANCE = 5, 0.01  # after so many steps in fp32, the most that weights may differ by, as a share of their change
TIME_BARS = {"lookup": (0.7, 0.5), "late": (0.35, 0.25)}  # share of the plain loop's time: bar, aim
MEMORY_BAR = 0.5  # share of its memory, at the size of a real model
SECONDS_BARS = {"lookup": 75.0, "everything": 120.0}  # an edit of 64 facts of a tiny model and its evaluation, two cores


@dataclass(frozen=True, eq=False)
class Work:
    """One edit to be made, by whatever means."""

    model: Model
    split: Split
    texts: list[str]
    settings: Settings = Settings()


@dataclass(frozen=True)
class Source:
    """A bundled model, local folder or hub id, or random weights of a `shape` in `data/presets.yaml`; the first n athletes."""

    model: str = "tiny-llama3"
    shape: str = ""
    width: float = 1.0
    n: int = 64
    device: str = "cpu"


def prepare(source: Source, mode: str, settings: Settings = Settings()) -> Work:
    dtype, autocast = MODES[mode]
    if source.shape:
        model = real_shapes.build(source.shape, source.width, source.device, dtype)
    else:
        model = load_model(source.model, dtype, source.device)
    given = split(facts.load("athletes"), f"first-{source.n}")
    return Work(model, given, general_texts(), replace(settings, autocast=autocast))


def masks(model: Model) -> dict[str, Mask]:
    """A window of early MLPs, one as large at the end, all MLPs, everything."""
    lookup = presets.likely_lookup(model)
    late = range(model.n_layers - len(lookup.layers), model.n_layers)
    chosen = (lookup, mask(model, [f"mlp {layer}" for layer in late], "late"), all_mlps(model), everything(model))
    return {each.name: each for each in chosen}


def ours(work: Work, chosen: Mask) -> Edit:
    """The edit by `finetune`, which leaves the model as it was."""
    return finetune(work.model, work.split, chosen, "edit", work.settings, work.texts)


def difference(work: Work, chosen: Mask) -> float:
    """Norm of the difference between our masked weights and those of the plain loop, as a share of the norm of their change.

    For a mask of whole matrices: the loop trains all of them.
    """
    edit = ours(work, chosen)
    with plain.lent(work.model):
        plain.train(work.model, work.split, work.texts, work.settings, list(edit.values))
        theirs = {name: work.model.hf.get_parameter(name).detach().cpu() for name in edit.values}
        gaps = [float((theirs[name].double() - value.double()).norm()) for name, value in edit.values.items()]
    return math.hypot(*gaps) / edit.norm


# Seconds and bytes ----------------------------------------------------------------------------------


def cost(work: Work, chosen: Mask | None) -> Cost:
    """What one edit costs with this mask, or by the plain loop over the whole model.

    Where a GPU is too small for it: NaN seconds, and all the memory that the GPU has.
    """
    device = work.model.device
    loop = partial(plain.train, work.model, work.split, work.texts, work.settings)
    call = loop if chosen is None else partial(ours, work, chosen)
    with plain.lent(work.model) if chosen is None else nullcontext():
        if device.type != "cuda":
            return measure.compare({"edit": call}, 1)["edit"]
        try:
            seconds, gib = real_shapes.cost(call, str(device))
            return Cost(seconds, math.nan, gib * GIB)
        except torch.OutOfMemoryError:
            return Cost(math.nan, math.nan, torch.cuda.get_device_properties(device).total_memory)


def warm_up(work: Work, chosen: Mask | None) -> None:
    """One step on two examples a term: what libraries set up at first use is no cost of an edit."""
    cost(replace(work, settings=replace(work.settings, steps=1, batch=2)), chosen)


def _alone(call: Callable, *arguments):
    """What the call returns in a fresh process, whose memory nothing else has used."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(call, *arguments).result()


def _grown(source: Source, mode: str, settings: Settings, variant: str) -> float:
    """Bytes by which a process grows for one edit on the CPU; to be called in a fresh one. NaN where the system does not tell."""
    work = prepare(source, mode, settings)
    chosen = masks(work.model).get(variant)
    warm_up(work, chosen)
    size = cost(work, chosen).peak_bytes
    return math.nan if size is None else size


def compare(source: Source, modes: Sequence[str], settings: Settings = Settings(), repeats: int = 2) -> pd.DataFrame:
    """One row a mode, variant (the plain loop or a mask) and repeat: `seconds`, `cpu_seconds`, and `bytes` of the first."""
    rows = []
    for mode in modes:
        work = prepare(source, mode, settings)
        variants = {PLAIN: None, **masks(work.model)}
        for chosen in (None, variants["lookup"]):
            warm_up(work, chosen)
        for repeat, variant in [(repeat, variant) for repeat in range(repeats) for variant in variants]:
            found = cost(work, variants[variant])
            size = found.peak_bytes
            if work.model.device.type != "cuda":
                size = _alone(_grown, source, mode, settings, variant) if repeat == 0 else math.nan
            rows.append({"mode": mode, "variant": variant, "repeat": repeat, "seconds": found.seconds,
                         "cpu_seconds": found.cpu_seconds, "bytes": size})
            print(f"{mode}, {variant}: {found.seconds:.1f} s", flush=True)
    return pd.DataFrame(rows)


def check(work: Work) -> pd.DataFrame:
    """One row a mask: `difference` after CHECKED steps in fp32. Raises AssertionError if one is above TOLERANCE."""
    work = replace(work, settings=replace(work.settings, steps=CHECKED))
    table = pd.DataFrame([{"variant": name, "difference": difference(work, chosen)} for name, chosen in masks(work.model).items()])
    wrong = table[~(table["difference"] <= TOLERANCE)]
    if len(wrong):
        raise AssertionError(f"the plain loop ends elsewhere: {dict(wrong.to_numpy().tolist())}, allowed {TOLERANCE}")
    return table


def shares(rows: pd.DataFrame, memory_bar: float | None = None) -> pd.DataFrame:
    """Rows of `compare` by mode and variant: medians, their shares of the plain loop's (`time`, `cpu`, `memory`), and the bars."""
    columns = {"time": "seconds", "cpu": "cpu_seconds", "memory": "bytes"}
    table = rows.groupby(["mode", "variant"], sort=False)[list(columns.values())].median().reset_index()
    base = table[table["variant"] == PLAIN].set_index("mode")
    table = table.assign(**{share: table[column] / table["mode"].map(base[column]) for share, column in columns.items()})
    table["time bar"] = [judge(time, *TIME_BARS.get(variant, ())) for time, variant in zip(table["time"], table["variant"])]
    masked = [memory_bar if variant in TIME_BARS else None for variant in table["variant"]]
    table["memory bar"] = [judge(memory, bar) for memory, bar in zip(table["memory"], masked)]
    return table


# An edit with its evaluation, and what bf16 loses -----------------------------------------------------


def evaluated(works: Mapping[str, Work]) -> pd.DataFrame:
    """One row a mode and mask: seconds of one edit and of its evaluation, and what came of it.

    `edit`, `forget` and `retain` are the paper's probabilities in the training format, `text_loss` in nats a token.
    """
    rows = []
    for mode, work in works.items():
        base = evaluate(work.model, work.split)
        for variant, bar in SECONDS_BARS.items():
            chosen, start = masks(work.model)[variant], time.perf_counter()
            edit = ours(work, chosen)
            middle = time.perf_counter()
            with edit.applied(work.model):
                answers = evaluate(work.model, work.split)
            end = time.perf_counter()
            found = summarize(answers, base).iloc[0]
            rows.append({"mode": mode, "variant": variant, "edit s": middle - start, "evaluation s": end - middle, "total s": end - start,
                         "bar": judge(end - start, bar), **found[["edit", "forget", "retain", "text_loss"]]})
    return pd.DataFrame(rows)


def precision(works: Mapping[str, Work], ladder: Sequence[float] = LADDER) -> pd.DataFrame:
    """One row a learning rate and precision, for the lookup mask; `works` by mode, fp32 and bf16.

    `moved`: share of the masked weights that changed at all, as the model holds them; `norm` of their change; `edit`, `top1`:
    probability among the options, and share of facts, with the edit answer; `retain`: the share of retain facts kept.
    """
    rows = []
    for rate, (name, (mode, masters)) in progress([(rate, item) for rate in ladder for item in PRECISIONS.items()], "precision"):
        work = works[mode]
        work = replace(work, settings=replace(work.settings, learning_rate=rate, masters=masters))
        edit = ours(work, masks(work.model)["lookup"])
        moved = sum(int((value != work.model.hf.get_parameter(path).cpu()).sum()) for path, value in edit.values.items())
        with edit.applied(work.model):
            ask = lambda some: metrics.ask(work.model, some, work.settings.format, pool=work.split.retain_train).mean(numeric_only=True)
            new, kept = ask(work.split.forget), ask(work.split.retain_test)
        rows.append({"rate": rate, "precision": name, "moved": moved / edit.n_weights, "norm": edit.norm, "edit": new["q_edit"],
                     "top1": new["top_edit"], "retain": kept["top_true"]})
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=Source.model, help="bundled name, folder or hub id")
    parser.add_argument("--shape", default="", help="random weights of this model of data/presets.yaml instead")
    parser.add_argument("--width", type=float, default=1.0, help="of the shape's matrices, 1 for the real one")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["fp32", "autocast"])
    parser.add_argument("--steps", type=int, default=10, help="of the edits that are compared; the evaluated one takes the published 50")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--facts", type=int, default=64, help="how many athletes are edited")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--chunk", type=int, default=64, help="examples worked off at a time, by both")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", action="store_true", help="compare precisions over learning rates instead")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/editing.json"))
    args = parser.parse_args()
    settings = Settings(learning_rate=args.rate, steps=args.steps, chunk=args.chunk)
    whole = replace(settings, steps=Settings.steps)
    source = Source(args.model, args.shape, args.width, args.facts, args.device)
    tables = {}
    if args.precision:
        tables["precision"] = precision({mode: prepare(source, mode, whole) for mode in ("fp32", "bf16")})
    else:
        if "fp32" in args.modes:
            tables["difference from the plain loop restricted to the mask"] = check(prepare(source, "fp32", settings))
        rows = compare(source, args.modes, settings, args.repeats)
        tables |= {"cost of an edit": shares(rows, MEMORY_BAR if args.shape and args.width == 1 else None), "repeats": rows}
        if not args.shape:
            tables["an edit with its evaluation"] = evaluated({mode: prepare(source, mode, whole) for mode in args.modes})
    save(args.out, tables, **{key: str(value) for key, value in vars(args).items()})


if __name__ == "__main__":
    main()
