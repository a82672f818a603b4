"""Seconds of every attack on one edit of 64 athletes, and probes of all layers at once against a loop of scikit-learn.

    python -m benchmarks.attacks
    python -m benchmarks.attacks --profiles quick --out runs/benchmarks/quick.json

The probes read the residual stream of the edited model at two positions of every layer. The loop standardises and fits
scikit-learn's LogisticRegression to one of them after the other, as one would without this package; both are judged on facts
that neither was fitted to, and must read as many of them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.report import judge, save
from helpers import attacks, facts
from helpers.attacks.latent import states
from helpers.attacks.rows import applied
from helpers.localization import probes
from helpers.masks import mask
from helpers.models import Model, load_model
from helpers.splits import Split, split
from helpers.unlearning.edit import Edit
from helpers.unlearning.finetune import finetune, questions
from helpers.unlearning.training import Settings

Data = tuple[torch.Tensor, list[str], torch.Tensor, list[str]]

LOOP = "scikit-learn, one by one"
SECONDS_BARS = {"quick": 45.0, "standard": 300.0}  # all attacks of a profile, on two cores
REST = 0.5  # seconds before a measurement: threads of the way before it wait actively for a while, and would take its cores
SHARE_BARS = (1 / 5, 1 / 10)  # of the loop's seconds: bar, aim
EQUAL = 0.01  # the most by which accuracies may differ, on average over layers


def seconds(model: Model, edit: Edit, split: Split, profile: str, seed: int = 0) -> pd.DataFrame:
    """One row an attack of the profile, and one for all together: `seconds`, number of `settings` and of `rows`."""
    table = []
    for name, attack in attacks.ATTACKS.items():
        if getattr(attack, profile) is None:
            continue
        start = time.perf_counter()
        rows = attacks.run(model, edit, split, profile, only=[name], seed=seed)
        spent = time.perf_counter() - start
        table.append({"profile": profile, "attack": name, "seconds": spent, "settings": rows["setting"].nunique(), "rows": len(rows)})
    table = pd.DataFrame(table)
    total = table[["seconds", "settings", "rows"]].sum()
    every = pd.DataFrame([{"profile": profile, "attack": "all", **total, "bar": judge(total["seconds"], SECONDS_BARS.get(profile))}])
    return pd.concat([table, every.astype({"settings": int, "rows": int})], ignore_index=True)


def features(model: Model, edit: Edit | None, split: Split) -> Data:
    """Residual stream of the edited model (n, probe, d_model) and answers of the retain facts: to fit to, and to read."""
    found = []
    with applied(model, edit):
        for kept in (split.retain_train, split.retain_test):
            found += [states(model, questions(model, kept, split, "one_shot")).flatten(1, 2), [f.answer for f in kept]]
    return tuple(found)


def loop(train: torch.Tensor, labels: list[str], held: torch.Tensor, held_labels: list[str]) -> np.ndarray:
    """(probe,) accuracy of scikit-learn's regressions, fitted one after the other."""
    found = []
    for one, other in zip(train.unbind(1), held.unbind(1)):
        fit = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(one.numpy(), labels)
        found.append(fit.score(other.numpy(), held_labels))
    return np.array(found)


def at_once(train: torch.Tensor, labels: list[str], held: torch.Tensor, held_labels: list[str]) -> np.ndarray:
    """(probe,) accuracy of `probes.fit`."""
    return probes.fit(train, labels).accuracy(held, held_labels).numpy()


def compare(data: Data, repeats: int = 3, seed: int = 0) -> pd.DataFrame:
    """One row a set of labels and way of fitting, from `features`; the attack fits the true labels and, as its control, permuted ones.

    `seconds` is the median of repeats that take turns, `share` of the loop's; `accuracy` the mean over probes, `largest` by how much
    one differs from the loop's at most. The bar is for both sets of labels together. Raises AssertionError where mean accuracies differ
    by more than EQUAL.
    """
    train, labels, held, held_labels = data
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
    given = {"true": labels, "shuffled": [labels[i] for i in order]}
    ways = {LOOP: loop, "all at once": at_once}
    accuracy, spent = {}, {(name, way): [] for name in given for way in ways}
    for _ in range(repeats):
        for name, way in spent:
            time.sleep(REST)
            start = time.perf_counter()
            accuracy[name, way] = ways[way](train, given[name], held, held_labels)
            spent[name, way].append(time.perf_counter() - start)
    table = pd.DataFrame([{"labels": name, "probes": way, "seconds": np.median(spent[name, way]), "accuracy": accuracy[name, way].mean(),
                           "largest": np.abs(accuracy[name, way] - accuracy[name, LOOP]).max()} for name, way in spent])
    apart = table.groupby("labels")["accuracy"].agg(lambda values: values.max() - values.min())
    if apart.max() > EQUAL:
        raise AssertionError(f"the two ways of fitting do not read equally well: mean accuracies differ by {apart.to_dict()}")
    both = table.groupby("probes", sort=False)["seconds"].sum().reset_index().assign(labels="both")
    table = pd.concat([table, both], ignore_index=True)
    table["share"] = table["seconds"] / table.groupby("labels")["seconds"].transform("first")
    bars = ((table["labels"] == "both") & (table["probes"] != LOOP)).map({True: SHARE_BARS, False: ()})
    return table.assign(bar=[judge(share, *bar) for share, bar in zip(table["share"], bars)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-llama3", help="bundled name, folder or hub id")
    parser.add_argument("--profiles", nargs="+", choices=attacks.PROFILES, default=["quick", "standard"])
    parser.add_argument("--units", nargs="+", default=["mlp 1", "mlp 2"], help="what the edit trains")
    parser.add_argument("--facts", type=int, default=64, help="how many athletes are edited")
    parser.add_argument("--repeats", type=int, default=3, help="of the probes")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/attacks.json"))
    args = parser.parse_args()
    model, given = load_model(args.model), split(facts.load("athletes"), f"first-{args.facts}")
    edit = finetune(model, given, mask(model, args.units), "edit", Settings())
    tables = {"probes": compare(features(model, edit, given), args.repeats),
              "attacks": pd.concat([seconds(model, edit, given, profile) for profile in args.profiles], ignore_index=True)}
    save(args.out, tables, **{key: str(value) for key, value in vars(args).items()})


if __name__ == "__main__":
    main()
