"""Every declared claim can be decided by what the notebooks and the sweeps run: parameters only, nothing is executed."""

import re
from collections import defaultdict
from fnmatch import fnmatchcase

import nbformat
import pytest
from notebook_cases import FOLDER

from helpers import claims, parameters
from helpers.provenance import project_root
from helpers.sweep import plan

DECLARED = claims.load()
MANY = {"06_attacks": ["none", "probe", "relearn lora", "soft prompt", "worst"], "09_mechanism_or_depth": ["none", "relearn lora"]}
WINDOWS = "MLP *"


def declared(notebook: str, params: dict) -> set[tuple[str, str, str, str, str, int]]:
    """(model, facts, method, mask, attack, seed) of a run's results. Every window of a model is called "MLP *"."""
    forget, number = params.get("forget") or "first-64", notebook[:2]
    masks = [name.strip() for name in (params.get("masks") or by_default(notebook)).split(",")]
    edits = {
        "04": [(forget, "finetune", masks)],
        "05": [(f"answer-{params.get('answer')}", method, masks) for method in ("unlearn", "finetune")] + [("first-64", "sequential", [masks[0], masks[-1]])],
        "06": [(forget, params.get("method"), masks)],
        "07": [(forget, "weight mask", ["lookup", *masks])],
        "09": [(forget, "finetune", ["windows"])],
    }.get(number, [])
    found = {(params["model"], f"{params['facts']} {spec}", method, {"windows": WINDOWS}.get(mask, mask), attack, seed)
             for spec, method, named in edits for mask in named for attack in MANY.get(notebook, ["none"])
             for seed in range(params["seed"], params["seed"] + (params.get("n_seeds") or 1))}
    if late := params.get("dissociating"):
        found |= {(late, *row[1:3], mask, *row[4:]) for row in found for mask in ("lookup", "MLP 0-*")}
    return found


def by_default(notebook: str) -> str:
    """The masks that a notebook compares in the standard profile."""
    cells = nbformat.read(FOLDER / f"{notebook}.ipynb", 4).cells
    found = re.search(r'standard="((?:lookup|causal tracing)[\w ,]*)"', "\n".join(cell.source for cell in cells))
    return found[1] if found else ""


@pytest.fixture(scope="module")
def runs():
    """All that the committed notebooks and the sweeps make: seeds by (model, facts, method, mask, attack)."""
    own = [(path.stem, parameters.from_notebook(path, {}).model_dump()) for path in sorted(FOLDER.glob("*.ipynb"))]
    swept = [(task.notebook.stem, task.params) for file in sorted((project_root() / "sweeps").glob("*.yaml")) for task in plan.load(file)]
    seeds = defaultdict(set)
    for notebook, params in (*own, *swept):
        if params["profile"] != "quick":
            for *what, seed in declared(notebook, params):
                seeds[tuple(what)].add(seed)
    return seeds


@pytest.mark.parametrize("claim", DECLARED.claims, ids=lambda claim: claim.id)
def test_every_claim_is_run_with_enough_seeds_on_some_model(claim, runs):
    wanted = [*claim.masks, *DECLARED.rivals(claim)]
    lacks = {}
    for model in {key[0] for key in runs if any(fnmatchcase(key[0], pattern) for pattern in claim.models)}:
        here = {mask: found for (name, facts, method, mask, attack), found in runs.items()
                if (name, method, attack) == (model, claim.method, claim.attack) and fnmatchcase(facts, claim.facts)}
        lacks[model] = [mask for mask in wanted if not enough(mask, here)]
    assert lacks and [] in lacks.values(), f"no model has all of these masks: {lacks}"


def enough(mask: str, here: dict[str, set[int]]) -> bool:
    """Claims name windows by patterns: "MLP *" is every one, "MLP 0-*" the first."""
    fits = lambda name: name == mask or mask.startswith("MLP") and name == WINDOWS or mask != WINDOWS and fnmatchcase(name, mask)
    return any(len(seeds) >= DECLARED.rule.min_seeds for name, seeds in here.items() if fits(name))


def test_too_few_seeds_or_windows_would_be_noticed():
    assert not enough("random", {"lookup": {0, 1, 2}}) and not enough("lookup", {"lookup": {0, 1}})
    assert not enough("MLP *", {"MLP 0-1": {0, 1, 2}}) and not enough("MLP 0-*", {"MLP 1-2": {0, 1, 2}})
    assert enough("MLP 0-*", {"MLP 0-1": {0, 1, 2}}) and enough("MLP 0-*", {"MLP *": {0, 1, 2}})
