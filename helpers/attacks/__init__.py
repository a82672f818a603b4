"""Attacks on an edit: one file an attack, polite to brutal.

    rows = attacks.run(model, edit, split, "standard")                       # everything below, one tidy table
    rows = attacks.relearn(model, edit, split, how="full", steps=(0, 5, 20)) # or one of them
    attacks.by_setting(rows), attacks.summarise(attacks.worst_case(rows, split))

The convention, the same for every attack:

- **It takes the original model and the edit**, `attack(model, edit, split, *, …, seed=0)`, applies the edit itself and
  takes it off again. Whatever happens, the model has the weights it came with, bit for bit. `edit=None` attacks the
  model as it is.
- **It returns one row a fact**, setting and group: `attack`, `setting`, `group`, `subject`, `relation`, `answer`, `edit`,
  `prob_true`, `prob_edit`, `top_true`, `top_edit` (as `helpers.unlearning.evaluation` reads them), `top_other` (1 where
  the choice among the options is another one), `format`, `counts` (False where the unedited model does not master
  the format), `control` (empty, or what this row controls for), then the attack's own columns.
- **Groups**: `forget` holds facts that the attack was not trained on; `shown` those that it was; `retain` facts that
  neither edit nor attack trained on, to tell recovery from a wrecked model.
- **Of long forget sets a part is read**: `n_retain` and `n_forget` say how many facts of the groups are asked, a fixed draw; None
  is all. Attacks that train still train on the whole of `attack_train`.
- Same seed, same rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import pandas as pd

from helpers.attacks.depth import depth_score, patch
from helpers.attacks.headline import ACCESS, by_access, by_setting, guessing, majority, summarise, worst_case
from helpers.attacks.latent import probe, upper_layers
from helpers.attacks.prompting import gate, prompt, questions
from helpers.attacks.relearning import PUBLISHED, curves, dose_response, gains, relearn, relearn_text
from helpers.attacks.rows import AttackError, swapped, untouched
from helpers.attacks.soft_prompts import SETTINGS as SOFT
from helpers.attacks.soft_prompts import soft_prompt
from helpers.attacks.weights import interpolate, noise, prune, quantise, undo
from helpers.models import Model
from helpers.prompts import ORDERS
from helpers.splits import Split
from helpers.unlearning.edit import Edit

__all__ = ["ACCESS", "ATTACKS", "PROFILES", "READ", "Attack", "AttackError", "by_access", "by_setting", "curves", "depth_score", "dose_response",
           "gains", "gate", "guessing", "interpolate", "majority", "noise", "patch", "probe", "prompt", "prune", "quantise", "questions",
           "relearn", "relearn_text", "run", "soft_prompt", "summarise", "swapped", "undo", "untouched", "upper_layers", "worst_case"]

PROFILES = ("smoke", "quick", "standard", "full")
READ = {"smoke": 16, "quick": 64, "standard": 64, "full": None}  # forgotten facts that an attack is read on, at most


@dataclass(frozen=True)
class Attack:
    """What to call, and its options in each profile: None leaves it out, several are taken one after the other; `smoke` changes quick.

    What an attacker needs for it is in `headline.ACCESS`.
    """

    call: Callable[..., pd.DataFrame]
    quick: dict | None = None
    standard: dict | tuple[dict, ...] | None = field(default_factory=dict)
    full: dict | tuple[dict, ...] | None = field(default_factory=dict)
    smoke: dict = field(default_factory=dict)

    def options(self, profile: str) -> tuple[dict, ...]:
        given = getattr(self, "quick" if profile == "smoke" else profile)
        if profile == "smoke" and given is not None:
            return ({**given, **self.smoke},)
        return () if given is None else given if isinstance(given, tuple) else (given,)


_ALL, _PLAIN, _FEW = {"orders": tuple(range(len(ORDERS)))}, {"formats": ("one_shot",)}, {"n_retain": 8}
_DOSES = {"rates": (2e-4, 1e-3, 5e-3), "shown": (0, 4, 8, 16, None), "steps": (0, 1, 2, 5, 10, 20, 50, 100)}
_LIGHT, _LIGHTEST = replace(PUBLISHED, batch=16, text_tokens=50), replace(PUBLISHED, batch=4, text_tokens=16)
# at the published rate a tiny model learns next to nothing, so that there is nothing to control for
_PUBLISHED, _LORA, _FULL = {"rates": (2e-4,), "n_retain": 40}, {"rates": (2e-3,), "invented": True, "n_retain": 40}, {"rates": (1e-3,), "n_retain": 40}
_POLITE = ("few-shot, forgotten facts", "paraphrase 1", "QA", "MCQ", "league")

ATTACKS: dict[str, Attack] = {
    "none": Attack(untouched, {"n_retain": 40}, {}, _ALL, _FEW),
    "prompt": Attack(prompt, {"asked": _POLITE, "n_retain": 40}, {}, _ALL, _FEW),
    "relearn lora": Attack(partial(relearn, how="lora"),
                           {"rates": (2e-3,), "steps": (0, 10), "settings": _LIGHT, "invented": True, "n_retain": 40, **_PLAIN},
                           (_PUBLISHED, _LORA), (_PUBLISHED, _LORA, {"invented": True, **_DOSES}), {"steps": (0, 4), "settings": _LIGHTEST, **_FEW}),
    "relearn full": Attack(partial(relearn, how="full"), None, _FULL, (_FULL, {"invented": True, **_DOSES})),
    "relearn text": Attack(relearn_text, None, {"rates": (1e-3,), **_PLAIN},
                           {"rates": _DOSES["rates"], "steps": _DOSES["steps"]}),
    "probe": Attack(probe, {"n_train": 200, "n_retain": 40}, smoke={"n_train": 100, **_FEW}),
    "patch": Attack(patch, {"positions": ("subject_last", "last")}),
    "soft prompt": Attack(partial(soft_prompt, kind="prompt"), None, {}, ({}, {"restarts": 4, "steps": (0, 20, 60, 120)})),
    "soft attention": Attack(partial(soft_prompt, kind="attention"), None, None,
                             {"size": 15, "restarts": 4, "steps": (0, 20, 60, 120),
                              "settings": replace(SOFT, learning_rate=0.03)}),
    "quantise": Attack(quantise, {"n_retain": 40, **_PLAIN}, smoke=_FEW),
    "prune": Attack(prune, None, _PLAIN, {"shares": (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)}),
    "noise": Attack(noise, None, _PLAIN, {"levels": (0.02, 0.05, 0.1, 0.2, 0.4), "draws": 3}),
    "undo": Attack(undo, None, _PLAIN, {"ranks": (1, 2, 4, 8, 16, 32, 64, None)}),
    "interpolate": Attack(interpolate, None, _PLAIN, {"amounts": tuple(i / 8 for i in range(11))}),
}


def run(model: Model, edit: Edit | None, split: Split, profile: str = "standard", *, only: Sequence[str] | None = None,
        texts: Sequence[str] | None = None, counts: Mapping[str, bool] | None = None, seed: int = 0) -> pd.DataFrame:
    """All attacks of a profile (`smoke`, `quick`, `standard`, `full`), or those named in `only`, in one table.

    `texts` goes to relearning, `counts` (from `gate`) to prompting. An attack that cannot be made on these facts is left
    out with a warning, a format that they cannot have without; `rows.attrs["left_out"]` says why. Raises `AttackError`
    for an unknown profile or attack.
    """
    if profile not in PROFILES:
        raise AttackError(f"attacks: profile {profile!r}; there are {', '.join(PROFILES)}")
    unknown = sorted(set(only or ()) - set(ATTACKS))
    if unknown:
        raise AttackError(f"attacks: {', '.join(unknown)}; there are {', '.join(ATTACKS)}")
    chosen = [(name, attack.call, options) for name, attack in ATTACKS.items() if only is None or name in only
              for options in attack.options(profile)]
    tables, left_out = [], {}
    for name, call, options in chosen:
        try:
            table = call(model, edit, split, **_completed(name, options, split, texts, counts, READ[profile]), seed=seed)
        except AttackError as error:
            left_out[name] = str(error)
            warnings.warn(f"attack {name} left out: {error}", stacklevel=2)
            continue
        left_out |= {f"{name}, {label}": reason for label, reason in table.attrs.get("refused", {}).items()}
        table.attrs = {}
        tables.append(table)
    if not tables:
        raise AttackError(f"attacks: none could be made: {'; '.join(left_out.values())}")
    rows = pd.concat(tables, ignore_index=True)
    rows.attrs = {"left_out": left_out}
    return rows


def _completed(name: str, options: dict, split: Split, texts: Sequence[str] | None, counts: Mapping[str, bool] | None,
               n_forget: int | None) -> dict:
    """The options with what these facts allow, and what was passed to `run`."""
    given = {"prompt": {"counts": counts}}.get(name, {"texts": texts} if name.startswith("relearn") else {}) | {"n_forget": n_forget}
    if "shown" in options:
        given["shown"] = [n for n in options["shown"] if n is None or n < len(split.attack_train)]
    if "asked" in options:
        given["asked"] = [question for question in questions(split) if question.label in options["asked"]]
    return {**options, **given}
