"""Localization side by side: ours, plain nnsight loops and TransformerLens, on the same model and the same prompts.

    OMP_NUM_THREADS=1 python -m benchmarks.localization --shape tiny --repeats 3 --out runs/benchmarks

For each method first the numbers: every patched logit difference (or attributed effect) of every component and prompt
has to agree within 1e-4, or the benchmark stops. Then the time, in turns, caches included: what a side remembers of
the clean and the corrupted run, it computes within its own time. A row is a method and a rival:

| column | what |
|---|---|
| `ours_s`, `rival_s`, `ratio` | median seconds, and how many times longer the rival takes; `cpu_ratio`: in CPU seconds |
| `ours_passes`, `rival_passes` | the same in units of one forward pass over the prompts |
| `work_ratio` | operations of the rival over ours, counted by PyTorch as they ran |
| `limit`, `reached` | operations of the rival over the least that will do (`benchmarks.arithmetic`); `ratio` / `limit` |
| `ours_MB`, `rival_MB` | largest growth of resident memory |
| `difference`, `spread` | largest disagreement; how much the numbers vary over components |
| `verdict` | whether the ratio asked for at this shape is reached |

Rivals pay for every trace, not only for arithmetic, so `reached` can be above 1. For attribution patching, nnsight takes all
gradients in one trace: a loop would be a straw man. The exit status is 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from benchmarks import arithmetic
from benchmarks.lens_sweeps import Sweeps
from benchmarks.measure import Cost, compare, counted
from benchmarks.nnsight_loops import Loops
from benchmarks.report import judge, save
from benchmarks.shapes import SHAPES, SUBJECT, Shape, build, pairs
from helpers.localization.attribution import attribute
from helpers.localization.causal_tracing import trace_positions
from helpers.localization.counterfactual import Pairs
from helpers.localization.patching import patch
from helpers.localization.path_patching import head_paths, receiver_paths
from helpers.models import Component, Model
from helpers.provenance import write_atomic

TOLERANCE = 1e-4
RIVALS = {"nnsight": Loops, "TransformerLens": Sweeps}


class Ours:
    """Every method returns (components, prompts): logit differences of patched runs, or effects."""

    def __init__(self, model: Model, pairs: Pairs):
        self.model, self.pairs = model, pairs
        self.together = {"batch_size": len(pairs)}  # as the rivals do
        self.after = pairs.clean.tokens.shape[1] - SUBJECT - 1  # every position has a role of its own

    def head_paths(self) -> torch.Tensor:
        return self._values(head_paths(self.model, self.pairs, **self.together))

    def receiver_paths(self, senders: Sequence[Component], receivers: Sequence[Component]) -> torch.Tensor:
        return self._values(receiver_paths(self.model, self.pairs, receivers, "heads", senders=senders, **self.together))

    def direct_paths(self, sender: Component) -> torch.Tensor:
        later = [head for head in self.model.components("head") if head.layer > sender.layer]
        queries = {"receiver": "heads", "inputs": "q", "above": "all", "senders": [sender], "apart": True}
        return self._values(receiver_paths(self.model, self.pairs, later, **queries, **self.together))

    def residual(self) -> torch.Tensor:
        return self._values(patch(self.model, self.pairs, ("resid_pre",), after=self.after, **self.together))

    def heads(self) -> torch.Tensor:
        return self._values(patch(self.model, self.pairs, ("head",), ("all",), **self.together))

    def causal_tracing(self) -> torch.Tensor:
        once = {"samples": 1, "after": self.after} | self.together
        return self._values(trace_positions(self.model, self.pairs.clean, ("resid_pre",), **once))

    def attribution(self) -> torch.Tensor:
        return self._values(attribute(self.model, self.pairs, ("head", "mlp"), direction="denoise", **self.together), "effect")

    def _values(self, table: pd.DataFrame, column: str = "ld_patched") -> torch.Tensor:
        return torch.tensor(table[column].to_numpy()).view(-1, len(self.pairs))


def _below(model: Model) -> tuple[list[Component], list[Component]]:
    """Senders and receivers: two heads, three quarters up and one layer lower, and all heads below the upper one."""
    top = 3 * model.n_layers // 4
    senders = [head for head in model.components("head") if head.layer < top]
    return senders, [Component("head", top - 1, 0), Component("head", top, 1)]


def _middle(model: Model) -> tuple[Component]:
    return (Component("head", model.n_layers // 2, 0),)


@dataclass(frozen=True)
class Method:
    """What the contestants' method of some name computes, its least work, its arguments, and by shape the bar and the aim of its ratios."""

    title: str
    least: Callable[..., int]
    arguments: Callable[[Model], tuple] = lambda model: ()
    bars: dict[str, tuple[float, ...]] = field(default_factory=dict)


PATHS = {"tiny": (12,), "large": (25, 40)}
METHODS = {
    "head_paths": Method("path patching, heads → logits", arithmetic.head_paths, bars=PATHS),
    "receiver_paths": Method("path patching, heads → two heads", arithmetic.receiver_paths, _below, PATHS),
    "direct_paths": Method("path patching, one head → each later query", arithmetic.direct_paths, _middle),
    "residual": Method("residual, layer × position", arithmetic.residual, bars=dict.fromkeys(SHAPES, (2.5,))),
    "heads": Method("heads, all positions", arithmetic.heads, bars=dict.fromkeys(SHAPES, (1.5,))),
    "causal_tracing": Method("causal tracing, layer × position", arithmetic.residual),
    "attribution": Method("attribution patching", arithmetic.attribution),
}


@dataclass(frozen=True)
class Side:
    """What a contestant found with a method, in how many operations, and at what cost."""

    values: torch.Tensor
    operations: int
    cost: Cost


def rows(shape: Shape, methods: Sequence[str], repeats: int) -> Iterator[list[dict]]:
    """Each method's rows, one a rival, as soon as it is timed. Raises `AssertionError` where numbers disagree."""
    model, prompts = build(shape), pairs(shape)
    contestants = {"ours": Ours(model, prompts)} | {name: rival(model, prompts) for name, rival in RIVALS.items()}
    forward = partial(_forward, model, prompts)
    forward()
    one_pass = compare({"pass": forward}, repeats)["pass"]
    for name in methods:
        method = METHODS[name]
        arguments = method.arguments(model)
        runs = {who: partial(getattr(contestant, name), *arguments) for who, contestant in contestants.items()}
        warm = {who: counted(run) for who, run in runs.items()}
        agree({who: values for who, (values, _) in warm.items()}, f"{method.title}, {shape.name}")
        costs = compare(runs, repeats)
        sides = {who: Side(*warm[who], costs[who]) for who in runs}
        ours, least, bars = sides.pop("ours"), method.least(shape, *arguments), method.bars.get(shape.name, ())
        about = {"shape": shape.name, "prompts": len(prompts), "repeats": repeats}
        about |= {"method": method.title, "components": len(ours.values)}
        yield [about | {"rival": rival} | row(ours, side, one_pass, least, bars) for rival, side in sides.items()]


def agree(values: dict[str, torch.Tensor], label: str) -> None:
    """Raise `AssertionError` unless all contestants have the same numbers, up to `TOLERANCE`, and these vary."""
    ours = values["ours"]
    for who, found in values.items():
        off = (found - ours).abs().max().item() if found.shape == ours.shape else float("nan")
        if not off <= TOLERANCE:
            raise AssertionError(f"{label}: {who} {tuple(found.shape)} is off ours {tuple(ours.shape)} by {off:.2g}, allowed is {TOLERANCE}")
    if not ours.std(0).min() > 10 * TOLERANCE:
        raise AssertionError(f"{label}: the numbers hardly vary over components, so it means nothing that they agree")


def row(ours: Side, rival: Side, one_pass: Cost, least: int, bars: tuple[float, ...] = ()) -> dict:
    """The columns that compare two contestants; `least` operations would do, and `one_pass` is a unit of time."""
    ratio, limit = rival.cost.seconds / ours.cost.seconds, rival.operations / least
    ours_peak, rival_peak = (None if side.cost.peak_bytes is None else side.cost.peak_bytes / 1e6 for side in (ours, rival))
    return {
        "ours_s": ours.cost.seconds,
        "rival_s": rival.cost.seconds,
        "ratio": ratio,
        "cpu_ratio": rival.cost.cpu_seconds / ours.cost.cpu_seconds,
        "ours_passes": ours.cost.seconds / one_pass.seconds,
        "rival_passes": rival.cost.seconds / one_pass.seconds,
        "work_ratio": rival.operations / ours.operations,
        "limit": limit,
        "reached": ratio / limit,
        "ours_MB": ours_peak,
        "rival_MB": rival_peak,
        "difference": (rival.values - ours.values).abs().max().item(),
        "spread": ours.values.std(0).mean().item(),
        "verdict": judge(ratio, *bars, at_least=True),
    }


@torch.no_grad()
def _forward(model: Model, prompts: Pairs) -> None:
    clean = prompts.clean
    model.hf(input_ids=clean.tokens, attention_mask=clean.mask, position_ids=clean.position_ids, use_cache=False, logits_to_keep=1)


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.localization", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=[*SHAPES, "both"], default="tiny")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each contestant; the median counts")
    parser.add_argument("--prompts", type=int, help="pairs of prompts (default: what the shape says)")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder for localization.csv and .json")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status (1: a bar is missed)."""
    parser = _arguments()
    options = parser.parse_args(arguments)
    for name in ("repeats", "prompts"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: at least 1 is needed")
    shapes = [replace(shape, prompts=options.prompts or shape.prompts) for name, shape in SHAPES.items() if options.shape in (name, "both")]
    found: list[dict] = []
    for shape in shapes:
        for more in rows(shape, options.methods, options.repeats):
            found += more
            for row in more:
                print(f"{row['shape']}, {row['method']}: {row['ratio']:.3g} × {row['rival']} {row['verdict']}", flush=True)
            # what is there stays, should a later method be stopped
            write_atomic(options.out / "localization.csv", partial(pd.DataFrame(found).to_csv, index=False))
    tables = {title: rows.dropna(axis="columns", how="all") for title, rows in pd.DataFrame(found).groupby("shape", sort=False)}
    save(options.out / "localization.json", tables, shapes=[asdict(shape) for shape in shapes], tolerance=TOLERANCE)
    return int(any(row["verdict"].startswith("FAIL") for row in found))


if __name__ == "__main__":
    sys.exit(main())
