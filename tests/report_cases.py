"""Stored rows for tests of the report, made up: edits with their evaluation and attacks, under the names that results have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers import claims, provenance, results, store
from helpers.attacks.headline import SPOKEN
from helpers.facts import load

FACTS, NOTEBOOK = "athletes first-64", "06_attacks"
NAMES = [f"{fact.subject} | sport" for fact in load("athletes")[:12]]
KEPT = ("mcq-unlocalized", "worst-case", "text-loss", "dissociation-mcq")
EVALUATED = ["edit", "forget", "mcq_edit", "mcq_forget", "mcq_retain", "retain", "paraphrase_edit", "paraphrase_forget"]
RELEARN = "all facts, lr 0.002, step {} of 20, one_shot"
SOFT = "10 vectors, restart 0, step {} of 60, one_shot"


@pytest.fixture(scope="module")
def declared() -> claims.Claims:
    return few_claims()


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    return four_edits()


def values(rng: np.random.Generator, mean: float, reading: str, count: int) -> np.ndarray:
    p = np.clip(mean + rng.normal(0, 0.08, count), 0, 1)
    return p if reading == "probability" else (rng.random(count) < mean).astype(float)


def edit(mask: str, *, model: str = "tiny-llama3", method: str = "finetune", facts: str = FACTS, n: int = 64, seeds: int = 3, shift: float = 0.0,
         layers: str = "", attacked: bool = True, profile: str = "standard") -> pd.DataFrame:
    """Rows of one edit, or with the mask "none" of the unedited model, for every seed: the better a mask, the larger `shift`."""
    rng, found = np.random.default_rng(len(mask) + 100 * len(method)), []
    own = {"model": model, "facts": facts, "n": n, "localization": mask, "method": "base" if mask == "none" else method, "layers": layers,
           "profile": profile}

    def add(attack: str, setting: str, measure: str, mean: float, seed: int, readings=("probability", "top1"), names=NAMES) -> None:
        for reading in readings:
            value = values(rng, min(max(mean, 0), 1), reading, len(names))
            found.append(pd.DataFrame({**own, "seed": seed, "run": f"{mask} {method} {seed}", "attack": attack, "setting": setting,
                                       "fact": names, "measure": f"{measure} {reading}", "value": value}))

    for seed in range(seeds):
        for measure in EVALUATED:
            kept = measure.endswith("retain")
            good = 1.0 if measure == "edit" else 0.95 if kept else 0.6 + shift if measure.endswith("edit") else 0.3 - shift  # every edit takes
            add("none", "", measure, good if mask != "none" or kept else 0.02 if measure.endswith("edit") else 0.95, seed)
        found.append(pd.DataFrame({**own, "seed": seed, "run": f"{mask} {method} {seed}", "attack": "none", "setting": "", "fact": [""],
                                   "measure": "text_loss", "value": [2.0 + 0.01 * rng.random()]}))
        if attacked and mask != "none":
            _attacks(add, seed, shift)
    return pd.concat(found, ignore_index=True)


def _attacks(add, seed: int, shift: float) -> None:
    half = NAMES[::2]
    for step in (0, 10, 20):
        name = "relearn lora" if step == 20 else f"relearn lora: {RELEARN.format(step).removesuffix(', one_shot')}"
        control = f"relearn lora: {RELEARN.format(step).removesuffix(', one_shot')} (invented names)"
        add(name, RELEARN.format(step), "forget", 0.1 + step / 30 - shift / 2, seed, names=half)
        add(name, RELEARN.format(step), "retain", 0.95 - step / 200, seed)
        add(control, RELEARN.format(step), "forget", 0.1 + step / 80, seed, names=[f"nobody {seed} {i} | sport" for i in range(6)])
        add(control, RELEARN.format(step), "retain", 0.93, seed)
    for step in (0, 60):
        name = "soft prompt" if step == 60 else f"soft prompt: {SOFT.format(step).removesuffix(', one_shot')}"
        add(name, SOFT.format(step), "forget", 0.1 + step / 200, seed, names=half)
        add(name, SOFT.format(step), "retain", 0.9, seed)
    for asked, measure in {"MCQ": "mcq", "QA": "qa", "league": "league"}.items():
        add(f"prompt: {asked}", asked, f"{measure}_forget", 0.4 - shift, seed, names=half)
        add(f"prompt: {asked}", asked, f"{measure}_retain", 0.9, seed)
    for layer in range(5):
        for place in ("last", "subject_last"):
            add(f"probe: {place}, layer {layer}", f"{place}, layer {layer}", "forget", 0.3 + layer / 8, seed, ("top1",), half)
            add(f"probe: {place}, layer {layer} (shuffled labels)", f"{place}, layer {layer}", "forget", 0.3, seed, ("top1",), half)
    for access, mean in {"answers": 0.4, "training": 0.7, SPOKEN: 0.75}.items():
        add(f"worst: {access}", "relearn lora: " + RELEARN.format(20), "forget", mean - shift, seed, names=half)
    add("worst", "probe: last, layer 3", "forget", 0.9, seed, names=half)


def four_edits() -> pd.DataFrame:
    """The unedited model and three masks, all attacked."""
    parts = {"none": 0.0, "lookup": 0.3, "all MLPs": 0.0, "everything": -0.1}
    return pd.concat([edit(mask, shift=shift, layers="1 2" if mask == "lookup" else "") for mask, shift in parts.items()], ignore_index=True)


def few_claims() -> claims.Claims:
    """The file as if a few claims were all that it declares: statistics of all take a minute."""
    everything = claims.load()
    return everything.model_copy(update={"claims": [claim for claim in everything.claims if claim.id in KEPT]})


def rungs() -> pd.DataFrame:
    """Ladders of two ways of deleting weights."""
    return pd.concat([edit("lookup", method=f"weight mask, {way}, n = {n}", attacked=False, shift=0.02 * i)
                      for way in ("learned, hard", "random") for i, n in enumerate((10, 100, 1000))], ignore_index=True)


def sizes() -> pd.DataFrame:
    return pd.concat([edit(mask, method=f"finetune, equal {effort}", facts=f"athletes first-{n}", n=n, attacked=False)
                      for mask in ("lookup", "everything") for effort in ("steps", "passes") for n in (16, 64, 256)], ignore_index=True)


def windows() -> pd.DataFrame:
    return pd.concat([edit(f"MLP {first}-{first + 1}", shift=0.1 - 0.02 * first, layers=f"{first} {first + 1}", attacked=False)
                      for first in range(4)], ignore_index=True)


def localized(seeds: int = 3) -> pd.DataFrame:
    """Two choices; the second takes other units in the last seed."""
    found = []
    for seed in range(seeds):
        regions = pd.DataFrame({"choice": ["fact lookup", "causal tracing"], "lookup": [1.0, 0.25], "extraction": [0.0, 0.5 + 0.1 * seed]})
        units = {"fact lookup": "mlp 0, mlp 1", "causal tracing": "attn 6, mlp 8" if seed < seeds - 1 else "attn 7, mlp 8"}
        found.append(results.of_localization(regions, units, {"causal tracing": 0.9}, {"causal tracing": 0.05, "random": 0.3},
                                             facts="athletes, 96 facts", n=96, seed=seed))
        found[-1] = found[-1].assign(model="tiny-llama3", run=f"03 {seed}", profile="standard")
    return pd.concat(found, ignore_index=True)


def pack(rows: pd.DataFrame, file: Path, stale: bool = False, notebook: str = NOTEBOOK) -> Path:
    """A packed file as `store.pack` writes it, of runs that this code made, or older code."""
    code = "0" * 64 if stale else provenance.code_hash(notebook)
    origin = {"notebook": notebook, "commit": "c0ffee", "code": code, "started": "2026-01-02T03:04:05+00:00", "machine": "m",
              "profile": "quick", "minutes": 1.5, "memory_gb": 0.5, "parameters": "{}", "uses": "{}"}
    table = rows.assign(**{name: value for name, value in origin.items() if name not in rows})[store.PACKED]
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pandas(table, preserve_index=False), file)
    return file
