"""One number an edit: how much of what was forgotten the worst attack brings back.

    rows = attacks.run(model, edit, split)
    table = by_setting(rows)                # every attack and setting: recovery, retain, what does not count and why
    worst = worst_case(rows, split)         # one row a fact
    summarise(worst)                        # one row
    by_access(rows, split)                  # one row for each thing an attacker may have

A maximum over attacks flatters the attacker, so the setting of each attack is chosen on one half of the facts and read on the
other, both ways. Three floors stand beside the result: guessing the majority class of the forget set; the same maximum for an
answer that is neither the true nor the edit answer; and the edited model left alone.

Attackers differ in what they have (ACCESS), and one maximum over all of them says little: some probe among many positions and layers
reads nearly every fact below the edit, and the original weights hold them all. So there is a worst case for each level, and one
for all attacks that make the model itself give the answer (SPOKEN).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pandas as pd

from helpers import stats
from helpers.attacks.rows import AttackError
from helpers.facts import Facts
from helpers.splits import Split, halves
from helpers.unlearning.evaluation import READINGS

# what an attacker must have → the attacks it allows
ACCESS = {"answers": ("prompt",),
          "training": ("relearn lora", "relearn full", "relearn text", "soft prompt", "soft attention"),
          "weights": ("quantise", "prune", "noise"),
          "activations": ("probe", "logit lens"),
          "original weights": ("patch", "undo", "interpolate")}
NEEDS_ORIGINAL = ACCESS["original weights"]  # whoever has them needs no attack
SPOKEN = "answers, training or weights"
LEVELS = {**ACCESS, SPOKEN: (*ACCESS["answers"], *ACCESS["training"], *ACCESS["weights"])}
RETAIN_LOST = 0.10
FEWEST = 4
SETTING = ["attack", "setting", "control"]
KEY = ["subject", "relation"]
BASE = ("none", "one_shot", "")


def by_setting(rows: pd.DataFrame, reading: str = "top1", lost: float = RETAIN_LOST) -> pd.DataFrame:
    """One row an attack, setting and control: `true` and `edit` (means over the forget group), `retain`, `retain_before`, `n`.

    `collapsed`: retain is more than `lost` below the edited model's own in the training format, `retain_before`: the attack
    wrecked the model, the edit did so in this format, or the probe reads no other fact either. `counts` is the
    format gate, which the rows of `prompt`, where they have the format, decide for all attacks. What is collapsed,
    does not count, or is a control recovers nothing.
    """
    _check(rows, reading)
    column = READINGS[reading]
    mean = lambda part, name: part.groupby(SETTING, sort=False)[name].agg(lambda values: values.mean(skipna=False))
    forget, retain = rows[rows["group"] == "forget"], rows[rows["group"] == "retain"]
    groups = forget.groupby(SETTING, sort=False)
    table = pd.DataFrame({"format": groups["format"].first(), "counts": groups["counts"].all(), "n": groups.size(),
                          "true": mean(forget, f"{column}_true"), "edit": mean(forget, f"{column}_edit")})
    table["retain"] = mean(retain, f"{column}_true").reindex(table.index)
    table["retain_before"] = table["retain"].get(BASE)
    gates = rows[rows["attack"] == "prompt"].groupby("format")["counts"].all().to_dict()
    table["counts"] &= pd.Series([gates.get(format, True) for format in table["format"]], table.index)
    read = table.index.isin(retain.set_index(SETTING).index)
    table["collapsed"] = read & ~(table["retain"] >= table["retain_before"] - lost)
    return table.reset_index()


def worst_case(rows: pd.DataFrame, split: Split, reading: str = "top1", lost: float = RETAIN_LOST,
               attacks: Sequence[str] | None = None, seed: int = 0) -> pd.DataFrame:
    """One row a fact that every attack in the rows was read on (the facts no attack was trained on): what comes back at worst.

    Columns: fact, `half`; `recovered`, the most over attacks, with its `attack` and `setting`; `single`, by the one attack
    (and setting) that recovers most on the other half, `single_attack`; `untouched`, the edited model in the training
    format; `majority`, 1 where the commonest answer of the relation is the true one; `other`, the same maximum for the
    remaining answers, together, of a closed relation (missing for open ones).

    Left out are settings that `by_setting` calls collapsed or not counting, controls, and what needs the original
    weights, unless `attacks` names it. `table.attrs["left_out"]` lists attacks that lost all settings, and the ways of asking that do
    not count. Raises `AttackError` for fewer than 4 common facts, and where all have the same answer, so that recovery could not
    be told from a guess.
    """
    table = by_setting(rows, reading, lost)
    plain = table[table["control"] == ""]
    named = set(plain["attack"]) - set(NEEDS_ORIGINAL) if attacks is None else {*attacks, "none"}
    alone = (plain["attack"] != BASE[0]) | (plain["setting"] == BASE[1])  # left alone in another format, it is prompted
    usable = plain[plain["counts"] & ~plain["collapsed"] & plain["attack"].isin(named) & alone]
    if not ((usable["attack"] == BASE[0]) & (usable["setting"] == BASE[1])).any():
        raise AttackError("headline: the unedited model does not master the training format on these facts, so nothing can be "
                          "said of their recovery; keep the facts it knows (metrics.known)")
    forget = rows[(rows["group"] == "forget") & (rows["control"] == "")]
    facts, chosen = _common(forget, split), forget.merge(usable[["attack", "setting"]])
    true, third = (_by_fact(chosen, values) for values in (chosen[f"{READINGS[reading]}_true"], _third(chosen, facts, reading)))
    guess, parts, found = _commonest(facts, split), halves(facts, seed), []
    for half, (here, there) in enumerate((parts, parts[::-1])):
        keys, choice = [f.key for f in here], [f.key for f in there]
        best = _best(true.loc[choice])
        recovered = true.loc[keys, best]
        first = true.loc[choice, best].mean().idxmax()
        found.append(pd.DataFrame({
            "subject": [f.subject for f in here], "relation": [f.relation.name for f in here], "answer": [f.answer for f in here],
            "edit": [f.edit for f in here], "half": half, "recovered": recovered.max(axis=1).to_numpy(),
            **dict(zip(("attack", "setting"), zip(*recovered.fillna(-1).idxmax(axis=1)))),
            "single": true.loc[keys, [first]].to_numpy()[:, 0], "single_attack": first[0],
            "untouched": true.loc[keys, [BASE[:2]]].to_numpy()[:, 0],
            "majority": [float(guess[f.relation.name] == f.answer) for f in here],
            "other": third.loc[keys, _best(third.loc[choice])].max(axis=1).to_numpy()}))
    worst = pd.concat(found, ignore_index=True)
    worst.attrs["left_out"] = _left_out(plain[plain["attack"].isin(named) & alone], usable)
    return worst


def summarise(worst: pd.DataFrame) -> pd.DataFrame:
    """One row: means of the columns of `worst_case` over `n` facts, `excess` (recovered above the majority guess), the
    attack that most often recovers what the edited model does not say, and the attacks that were left out."""
    means = worst[["recovered", "single", "untouched", "majority", "other"]].mean()
    most = worst.loc[worst["recovered"] > worst["untouched"], "attack"].mode()
    return pd.DataFrame([{"n": len(worst), **means, "excess": means["recovered"] - means["majority"],
                          "most_often": most.get(0, ""), "left_out": ", ".join(worst.attrs.get("left_out", ()))}])


def by_access(rows: pd.DataFrame, split: Split, reading: str = "top1", lost: float = RETAIN_LOST, seed: int = 0) -> pd.DataFrame:
    """`summarise` of the worst case at each of LEVELS that the rows have attacks of, on the same facts: one row an `access`.

    `low`, `high`: 95 % bootstrap interval of `recovered` over facts, one seed. `unfiltered`: `recovered` where settings that wreck the
    model, or formats that the edit wrecked, are not left out. Raises `AttackError` as `worst_case` does.
    """
    made, found = set(rows["attack"]), []
    for access, names in LEVELS.items():
        if made & set(names):
            worst = worst_case(rows, split, reading, lost, names, seed)
            interval = stats.over_facts(worst["recovered"], (0.0, 1.0))
            everything = worst_case(rows, split, reading, float("inf"), names, seed)["recovered"].mean()
            found.append(summarise(worst).assign(access=access, low=interval["low"], high=interval["high"], unfiltered=everything))
    if not found:
        raise AttackError(f"headline: no attack in the rows, only {', '.join(sorted(made)) or 'nothing'}")
    return pd.concat(found, ignore_index=True)[["access", *(c for c in found[0] if c != "access")]]


def majority(facts: Facts, split: Split) -> float:
    """The share of these facts of which the commonest answer of the relation is true: what guessing alone gets right."""
    guess = _commonest(facts, split)
    return sum(guess[f.relation.name] == f.answer for f in facts) / len(facts)


def guessing(facts: Facts, split: Split, format: str) -> float:
    """What guessing gets right in a format: one of four letters in multiple choice, whose options are read in balanced orders, else `majority`."""
    return 0.25 if format == "mcq" else majority(facts, split)


def _left_out(made: pd.DataFrame, usable: pd.DataFrame) -> list[str]:
    """Attacks without a usable setting; of asking, the ways that are not usable."""
    lost = sorted(set(made["attack"]) - set(usable["attack"]))
    ways = set(made.loc[made["attack"] == "prompt", "setting"]) - set(usable.loc[usable["attack"] == "prompt", "setting"])
    return lost if "prompt" in lost or not ways else sorted([*lost, f"prompt: {', '.join(sorted(ways))}"])


def _check(rows: pd.DataFrame, reading: str) -> None:
    if reading not in READINGS:
        raise AttackError(f"headline: reading={reading!r}; there are {', '.join(READINGS)}")
    if not ((rows["attack"] == BASE[0]) & (rows["setting"] == BASE[1])).any():
        raise AttackError("headline: the rows lack the attack 'none' (attacks.untouched), with which the others are compared")


def _common(forget: pd.DataFrame, split: Split) -> Facts:
    """The forgotten facts on which every attack was read, whether it counts or not: the same ones for every choice of attacks."""
    read = [set(zip(part["subject"], part["relation"])) for _, part in forget.groupby("attack")]
    facts = split.forget.where(lambda f: f.key in set.intersection(*read))
    if len(facts) < FEWEST:
        raise AttackError(f"headline: {len(facts)} of {len(split.forget)} facts were read by every attack; {FEWEST} are needed, "
                          "to choose settings on one half and report on the other")
    if len(facts.counts()) == 1:
        raise AttackError(f"headline: all {len(facts)} facts have the answer {facts[0].answer!r}: saying it always would count "
                          "as recovery; take a forget set with several answers")
    return facts


def _by_fact(chosen: pd.DataFrame, values: pd.Series) -> pd.DataFrame:
    """Facts × (attack, setting)."""
    cells = chosen.assign(value=values).groupby([*KEY, "attack", "setting"], sort=False)["value"].mean()
    return cells.unstack(["attack", "setting"])


def _best(values: pd.DataFrame) -> list[tuple[str, str]]:
    """For each attack the setting with the highest mean."""
    means = values.mean().fillna(-1)
    return [part.idxmax() for _, part in means.groupby(level="attack", sort=False)]


def _third(chosen: pd.DataFrame, facts: Facts, reading: str) -> pd.Series:
    """What is left for all answers, together, that are neither true nor edit answer; missing where a relation is not closed."""
    closed = {f.relation.name for f in facts if f.relation.options}
    left = chosen["top_other"] if reading == "top1" else 1 - chosen["prob_true"] - chosen["prob_edit"]
    return left.where(chosen["relation"].isin(closed))


def _commonest(facts: Facts, split: Split) -> dict[str, str]:
    """Relation → its commonest answer: among the facts read, or, where these are of several relations, among all facts."""
    relations = {f.relation.name for f in facts}
    everywhere = facts if len(relations) == 1 else (*split.forget, *split.retain_train, *split.retain_test)
    return {name: Counter(f.answer for f in everywhere if f.relation.name == name).most_common(1)[0][0] for name in relations}
