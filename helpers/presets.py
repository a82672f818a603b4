"""Hyper-parameters by name, and the real models that they are for.

    given = settings("paper", "google/gemma-2-9b", "athletes", "lookup", Settings())     # what the paper trained with
    source("paper", "google/gemma-2-9b", "athletes", "lookup")                           # where that comes from
    files("tuned", "tiny-gemma2", "athletes", "lookup")                                  # which files decide that, for `run.uses`
    layers(model, "athletes", "attribution MLPs")                                        # what the paper trained
    choose(…, given=given("paper", model, "athletes", names))                            # in place of localizing anew
    announce("google/gemma-2-9b", torch.bfloat16, "cuda", names)                         # what memory that will take

A preset is `""` (the defaults), `"paper"` (published; `data/presets.yaml`) or `"tuned"` (found here on practice facts; fields of
`Settings` in `data/tuned/<model>/<task>/<mask>.yaml`, where there is one). Published settings are never stretched: what the
paper did not train raises `PresetError` with a list of what it did. One exception is stated by `source`: a window of MLPs, the control
for depth that the paper lacks, gets the settings of the lookup MLPs where it has none of its own, as the paper gave their rate to every
choice of MLPs.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from itertools import product
from pathlib import Path

import pandas as pd
import torch
import yaml
from transformers import AutoConfig, PretrainedConfig

from helpers import memory, selection
from helpers.facts import DATA
from helpers.masks import Mask, mask
from helpers.models import Model
from helpers.unlearning.training import Settings

NAMES = ("", "paper", "tuned")
WINDOW = r"MLP \d+-\d+"
PUBLISHED, TUNED = DATA / "presets.yaml", DATA / "tuned"
# our names of localizations -> those of the paper
METHODS = {"lookup": "flu", "attribution": "ap", "attribution MLPs": "ap-mlps", "causal tracing": "ct", "causal tracing MLPs": "ct-mlps"}
# what small models are trained with where nothing else is known: half of the paper's examples a step. With a quarter of them the same
# edits cost more retained facts (python -m helpers.tuned tiny-gemma2 --masks lookup --batch 16)
SMALL = Settings(batch=32)
SMALLEST = 256 * 2**20  # bytes of weights from which on memory is worth a word
RATE = 3e14  # multiplications and additions a second that estimated minutes assume


class PresetError(ValueError):
    """A preset that does not exist, or has nothing for this model, task and mask; the message lists what there is."""


def settings(preset: str, model_name: str, task: str, mask_name: str, defaults: Settings) -> Settings:
    """`defaults` with what the preset says for this model, task and mask.

    `model_name`: hub id, folder or bundled name. `task`: see `task_of`. `mask_name`: as in `localization.choices.NAMES`, or a window
    of MLPs. Raises `PresetError`.
    """
    return replace(defaults, **_find(preset, model_name, task, mask_name)[0])


def source(preset: str, model_name: str, task: str, mask_name: str) -> str:
    """Where the settings of a preset come from, in words, for a table or a caption. Raises `PresetError`."""
    return _find(preset, model_name, task, mask_name)[1]


def files(preset: str, model_name: str, task: str, mask_name: str) -> list[Path]:
    """Where the settings of a preset are looked for: in the first of these files that is there. None for defaults.

    Raises `PresetError` for an unknown preset.
    """
    if preset not in NAMES:
        raise PresetError(f"preset {preset!r}: there are {', '.join(map(repr, NAMES))}")
    if preset != "tuned":
        return [PUBLISHED] if preset else []
    window = re.fullmatch(WINDOW, mask_name) is not None
    return [tuned_file(model_name, task, name) for name in (mask_name, *(["lookup"] if window else []))]


def file(preset: str, model_name: str, task: str, mask_name: str) -> Path | None:
    """The file that the settings of a preset stand in, None for defaults. Raises `PresetError` for an unknown preset."""
    return next((place for place in files(preset, model_name, task, mask_name) if place.is_file()), None)


def tuned_file(model_name: str, task: str, mask_name: str, folder: Path | None = None) -> Path:
    """Where tuned settings are kept, if there are any; `folder` in place of `data/tuned`."""
    names = (identify(model_name) or Path(model_name).name, task, f"{mask_name}.yaml")
    return (folder or TUNED).joinpath(*(name.replace(" ", "-") for name in names))


def task_of(facts: str, forget: str, objective: str = "edit") -> str:
    """The task that facts, a forget spec (`first-64`, `answer-golf`) and an objective make; what the paper did not do is named by both.

    `facts`: their name, or what `facts.load` takes (a source with a path after a colon, a CSV file).
    """
    facts, (kind, _, n) = Path(facts.partition(":")[0]).stem, forget.partition("-")
    if facts.startswith(("counterfact", "paper-counterfact")) and forget in ("first-16", "first-64"):
        return f"counterfact-{n}"
    if facts in ("athletes", "paper-athletes") and (kind == "answer" or forget in ("first-16", "first-64")):
        names = ("athletes", "whole-sport") if objective == "edit" else ("unlearn-athletes", "unlearn-sport")
        return names[kind == "answer"]
    return f"{facts} {forget}"


def check(preset: str, model_name: str, tasks: Sequence[str], mask_names: Sequence[str]) -> None:
    """Raises `PresetError` if a preset lacks settings for one of these tasks with one of these masks: before anything is loaded."""
    for task, mask_name in product(tasks, mask_names):
        if mask_name != "windows":  # which go by lookup
            source(preset, model_name, task, mask_name)


def announce(model_name: str, dtype: torch.dtype, device: str, mask_names: Sequence[str] = (), preset: str = "", task: str = "",
             defaults: Settings = SMALL) -> list[memory.Estimate]:
    """Print what localization and edits will take, before a weight is loaded; of a model that is small anyway, nothing of that.

    Before that, of any model, the masks that run with the defaults while others are tuned, windows that go by lookup, and settings
    that come from searches of another extent (`unequal`).

    The masks are not found yet: lookup MLPs are taken to be about where they were published, and whatever is chosen under their budget
    has as many weights. Fine-tuning of `everything` or `all MLPs` is estimated where it is among the masks. `device`: as in
    `load_model`. Raises `PresetError`, and `ModelError` as loading does.
    """
    for line in unequal(preset, model_name, task, mask_names):
        print(line)
    bare = memory.skeleton(model_name, dtype)
    if sum(p.numel() for p in bare.hf.parameters()) * dtype.itemsize < SMALLEST:
        return []
    print(found := memory.of_localization(bare, rows=16))
    estimates, guesses = [found], {"lookup": likely_lookup(bare)} if mask_names else {}
    whole = {"everything": selection.everything, "all MLPs": selection.all_mlps}
    guesses |= {name: whole[name](bare) for name in mask_names if name in whole}
    for name, guess in guesses.items():
        print(f"\n{name}:")
        estimates.append(memory.announce(bare, guess, settings(preset, model_name, task, name, defaults), device))
    return estimates


def unequal(preset: str, model_name: str, task: str, mask_names: Sequence[str]) -> list[str]:
    """How masks of one comparison differ in where their tuned settings come from, a line each; none where one search found all, or none.

    `windows` are not looked at: which there are is not known before fact lookup has chosen, and all of them may go by its settings.
    """
    if preset != "tuned":
        return []
    places = {name: file(preset, model_name, task, name) for name in mask_names if name != "windows"}
    lookup, said = tuned_file(model_name, task, "lookup"), []
    plain = [name for name, place in places.items() if place is None]
    if 0 < len(plain) < len(places):
        said += [f"nothing is tuned for {', '.join(plain)}: trained with the defaults, unlike {', '.join(n for n in places if n not in plain)}"]
    if borrowed := [name for name, place in places.items() if place == lookup and name != "lookup"]:
        said += [f"nothing is tuned for {', '.join(borrowed)}: trained with the settings of lookup"]
    searches: dict[str, list[str]] = {}
    for name, place in places.items():
        if place is not None:
            searches.setdefault(extent(place), []).append(name)
    if len(searches) > 1:
        said += ["tuned by searches that differ: " + "; ".join(f"{', '.join(names)} by {how}" for how, names in searches.items())]
    return said


def extent(place: Path) -> str:
    """The extent of the search behind a file of tuned settings: "12 trials at rates 0.0002 to 0.02"."""
    how = yaml.safe_load(place.read_text(encoding="utf-8")).get("provenance", {})
    rates = " to ".join(f"{rate:g}" for rate in how.get("learning_rates", []))
    return f"{how.get('trials', '?')} trials at rates {rates or 'that are not on record'}"


def identify(model_name: str) -> str | None:
    """The name in `data/presets.yaml` of a hub id or of a folder that is called like one; None for any other model."""
    last = Path(model_name).name.lower()
    for name, entry in _read()["models"].items():
        if last in {name, *(Path(hub).name.lower() for hub in entry["hub"])}:
            return name
    return None


def config(name: str, width: float = 1.0) -> PretrainedConfig:
    """The architecture of a model in `data/presets.yaml`, for a skeleton or for random weights: no hub is needed.

    `width` below 1 makes every matrix and the vocabulary narrower, with as many layers and heads. Raises `PresetError`.
    """
    known = _read()["models"]
    if name not in known:
        raise PresetError(f"no model {name!r} among the presets; there are {', '.join(known)}")
    given = known[name]["config"]
    if width != 1.0:
        part = lambda size, unit: max(1, round(size * width / unit)) * unit
        heads = given["num_attention_heads"]
        narrow = {"hidden_size": part(given["hidden_size"], 8 * heads), "intermediate_size": part(given["intermediate_size"], 8),
                  "vocab_size": max(2048, part(given["vocab_size"], 8))}
        if given["model_type"] != "gpt_neox":  # whose heads follow from the width
            narrow["head_dim"] = part(given.get("head_dim", given["hidden_size"] // heads), 8)
        if "query_pre_attn_scalar" in given:
            narrow["query_pre_attn_scalar"] = narrow["head_dim"]
        given = {**given, **narrow}
    return AutoConfig.for_model(**given)


def layers(model: Model, task: str, mask_name: str) -> Mask:
    """The layers that the paper trained, for a model of the very shape. Raises `PresetError`, or `SelectionError` for another shape."""
    name = _published_name(model.name)
    where = _read()["tasks"].get(task, {}).get("layers")
    if mask_name not in METHODS or where is None:
        raise PresetError(f"no published layers for {name}, task {task!r}, mask {mask_name!r}; there are masks {', '.join(METHODS)} and "
                          f"tasks {', '.join(task for task, entry in _read()['tasks'].items() if 'layers' in entry)}")
    return replace(selection.preset(model, name, where, METHODS[mask_name]), name=mask_name)


def given(preset: str, model: Model, task: str, mask_names: Sequence[str]) -> dict[str, Mask]:
    """The masks that `choices.choose` does not have to find: with the preset `paper` those whose layers are published for the task.

    Lookup is always among them, because it is the budget of the others. Raises as `layers` does.
    """
    if preset != "paper" or "layers" not in _read()["tasks"].get(task, {}):
        return {}
    return {name: layers(model, task, name) for name in dict.fromkeys(["lookup", *mask_names]) if name in METHODS}


def published() -> pd.DataFrame:
    """Every published pair of learning rate and forget weight: columns model, task, masks, learning_rate, forget_weight."""
    data = _read()
    rows = [{"model": model, "task": task, "masks": ", ".join(data["groups"][group]), "learning_rate": rate, "forget_weight": weight}
            for model, tasks in data["published"].items() for task, groups in tasks.items() for group, (rate, weight) in groups.items()]
    return pd.DataFrame(rows)


def models() -> pd.DataFrame:
    """The models of `data/presets.yaml`: access, whether the paper trained them, and what an edit takes, with how that is known."""
    data, rows = _read(), []
    for name, entry in data["models"].items():
        costs = {f"{what}, {chosen} (estimated)": cost[what] for chosen, cost in entry["estimated"].items() for what in cost}
        costs |= {f"{what} (authors)": cost for what, cost in entry.get("reported", {}).items()}
        access = {"hub": entry["hub"][0], "gated": entry["gated"], "dtype": "bfloat16", "chunk": entry["chunk"]}
        rows.append({"model": name, **access, "published settings": name in data["published"], **costs})
    return pd.DataFrame(rows)


def likely_lookup(model: Model) -> Mask:
    """MLPs about where fact lookup was published, for estimates and timings: as deep and as many as in Gemma-2-9B, in proportion."""
    first, count = max(1, model.n_layers // 16), max(2, model.n_layers // 8)
    return mask(model, [f"mlp {layer}" for layer in range(first, first + count)], "lookup")


def expected(name: str, mask_name: str = "lookup") -> memory.Estimate:
    """What an edit of this model takes with a mask (`lookup` or `everything`), counted anew. Raises `PresetError`."""
    if mask_name not in ("lookup", "everything"):
        raise PresetError(f"mask {mask_name!r}: what an edit takes is counted for lookup and everything")
    bare = memory.skeleton(config(name))
    if mask_name == "everything":
        chosen = selection.everything(bare)
    else:
        chosen = selection.preset(bare, name, "sports", "flu") if name in selection.SHAPES else likely_lookup(bare)
    return memory.of_edit(bare, chosen, Settings(chunk=_read()["models"][name]["chunk"]))


def _find(preset: str, model_name: str, task: str, mask_name: str) -> tuple[dict, str]:
    """(fields of `Settings` that differ from the defaults, where they come from)."""
    place = file(preset, model_name, task, mask_name)
    if preset == "paper":
        return _paper(_published_name(model_name), task, mask_name)
    if place is None:
        return {}, f"defaults: nothing is tuned for {identify(model_name) or model_name}, {task}, {mask_name}" if preset else "defaults"
    return _tuned(place, borrowed=place != tuned_file(model_name, task, mask_name))


def _published_name(model_name: str) -> str:
    name, data = identify(model_name), _read()
    if name in data["published"]:
        return name
    known = "is known here, but the paper did not train it" if name else "is not among the presets"
    raise PresetError(f"no published settings for {model_name}: it {known}. There are some for {', '.join(data['published'])}; "
                      "take the preset '' (defaults) or 'tuned'")


def _paper(name: str, task: str, mask_name: str) -> tuple[dict, str]:
    data = _read()
    tasks = data["published"][name]
    window = re.fullmatch(WINDOW, mask_name) is not None
    group = "lookup" if window else next((group for group, members in data["groups"].items() if mask_name in members), None)
    if task not in tasks or group is None:
        masks = [member for members in data["groups"].values() for member in members]
        raise PresetError(f"{name}: nothing published for task {task!r} with mask {mask_name!r}; tasks are {', '.join(tasks)}, "
                          f"masks {', '.join(masks)}")
    rate, weight = tasks[task][group]
    found = {**data["training"], **data["tasks"][task]["settings"], "learning_rate": rate, "forget_weight": weight}
    said = "published (arXiv 2410.12949)" + (": the rate of lookup; the paper has no windows" if window else "")
    return {**found, "chunk": data["models"][name]["chunk"]}, said


def _tuned(place: Path, borrowed: bool) -> tuple[dict, str]:
    named = "/".join(place.parts[-3:])
    found = yaml.safe_load(place.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise PresetError(f"{named} holds {found!r}; expected settings, name: value")
    how = found.pop("provenance", {})  # `helpers.tuned` notes there how the values were found
    if unknown := set(found) - {field.name for field in fields(Settings)}:
        raise PresetError(f"{named} has {', '.join(sorted(unknown))}; fields are {', '.join(asdict(Settings()))}")
    said = "tuned here" + (f": best of {how['trials']} trials" if "trials" in how else "")
    return found, said + (", those of lookup" if borrowed else "")


def _read() -> dict:
    return yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What an edit of each model takes, as data/presets.yaml states it.")
    parser.add_argument("names", nargs="*", help="models; all by default")
    for model in parser.parse_args().names or _read()["models"]:
        for which in ("lookup", "everything"):
            found = expected(model, which)
            minutes = found.work * Settings().steps / RATE / 60
            print(f"{model:14}{which:12}{found.total / memory.GIB:8.1f} GiB{minutes:8.2f} minutes", flush=True)
