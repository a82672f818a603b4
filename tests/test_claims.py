"""Claims: the committed file and the figures it refers to, errors, and verdicts on made-up rows."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from helpers import claims
from helpers.claims import ClaimsError

PUBLISHED = claims.DATA / "published"
FACTS = "athletes first-64"
TRACED = ["causal tracing", "causal tracing MLPs", "attribution", "attribution MLPs"]


@pytest.fixture(scope="module")
def declared():
    return claims.load()


@pytest.fixture(scope="module")
def published():
    return pd.concat([pd.read_csv(file).assign(table=file.stem) for file in PUBLISHED.glob("*.csv")])


def rows(means: dict[str, float], measure: str = "mcq_edit probability", *, model: str = "tiny", facts: str = FACTS, attack: str = "none",
         method: str = "finetune", n: int = 64, seeds: int = 3, sd: float = 0.02, layers: dict | None = None, seed: int = 0) -> pd.DataFrame:
    """Rows of masks with these means: facts differ by .1, seeds by `sd`, and everything else by .1."""
    rng, parts = np.random.default_rng(seed), []
    shared = rng.normal(0, 0.1, (n, 1))
    for mask, mean in means.items():
        values = mean + shared + rng.normal(0, sd, (1, seeds)) + rng.normal(0, 0.1, (n, seeds))
        index = pd.MultiIndex.from_product([[f"name {i} | sport" for i in range(n)], range(seeds)], names=["fact", "seed"])
        part = pd.DataFrame({"value": values.ravel()}, index=index).reset_index()
        parts.append(part.assign(run="r", model=model, facts=facts, n=n, localization=mask, attack=attack, measure=measure,
                                 method="base" if mask == "none" else method, layers=(layers or {}).get(mask)))
    return pd.concat(parts, ignore_index=True)


def working(**means: float) -> pd.DataFrame:
    """Multiple choice on retained facts: the guard of the MCQ claims."""
    return rows({"none": 0.95, "lookup": 0.93} | means, "mcq_retain probability", seed=1)


def only(declared, *ids: str) -> claims.Claims:
    """The file as if these claims were all that it declares."""
    return declared.model_copy(update={"claims": [claim for claim in declared.claims if claim.id in ids]})


def one(declared, table: pd.DataFrame, id: str) -> pd.Series:
    found = claims.verdict(only(declared, id), table)
    assert len(found) == 1
    return found.iloc[0]


# The committed file

def test_committed_claims_are_valid_and_all_references_resolve(declared):
    assert len(declared.claims) > 25
    assert {claim.family for claim in declared.claims} == set(declared.families)
    assert any(claim.origin == "ours" for claim in declared.claims)
    for claim in declared.claims:
        assert claim.statement.endswith(".") and "\n" not in claim.statement
        for table, measures in claim.published.items():
            assert all(np.isfinite(declared.published(table, measure, mask)) for measure in measures for mask in claim.masks)


def test_every_published_figure_is_used_and_well_formed(declared, published):
    used = {(table, measure) for claim in declared.claims for table, measures in claim.published.items() for measure in measures}
    assert set(zip(published["table"], published["measure"])) == used
    assert set(published["method"]) <= set(declared.masks.values())
    assert not published.duplicated(["table", "method", "measure"]).any()
    assert published["value"].between(0, 1).all() and (published["n_runs"] >= 1).all() and published["source"].notna().all()
    assert "recomputed from the authors' repository at commit a36be56" in (PUBLISHED / "README.md").read_text().replace("\n", " ").lower()


def test_published_values_agree_with_the_result_tables(published):
    """Against tables of the authors' runs, in the folder that the variable PAPER_RESULTS names."""
    folder = Path(os.environ.get("PAPER_RESULTS", "no folder"))
    if not folder.is_dir():
        pytest.skip("PAPER_RESULTS names no folder")
    names = {"manual_interp": "FLU", "localized_ct": "CT", "localized_ct_mlps": "CT-MLPs", "localized_ap": "AP", "random": "Random",
             "localized_ap_mlps": "AP-MLPs", "nonlocalized": "Nonlocalized", "all_mlps": "All-MLPs", "random_mlps": "Random-MLPs"}
    sports, world = (pd.read_csv(folder / f"paper_results_{task}.csv") for task in ("sports", "counterfact"))
    probes = pd.read_csv(folder / "paper_probing_sports_athlete.csv")
    depth = probes.groupby("experiment")["hidden_state_index"].transform("max") + 1
    upper = probes[probes["hidden_state_index"] >= depth / 3]
    probes = upper.groupby(["experiment", "localization"], as_index=False)["forget_pred_true_label"].mean()
    in_sequence = world["experiment"].str.contains("sequential")
    whole = sports["experiment"].str.contains("ball_inject_golf$")
    sources = {"athletes": sports[~whole], "whole_sport": sports[whole],
               "world": world[~in_sequence], "sequential": world[in_sequence], "probes": probes}
    columns = {"retain": "t_maintain_sport_accuracy", "mcq_edit": "a_MC_Injected_forget", "mcq_forget": "a_MC_forget", "mcq_retain": "a_MC_maintain",
               "relearn_20": "r20_Normal_forget", "relearn_20_retain": "r20_Normal_maintain", "soft_prompt": "sp_forget_acc",
               "soft_prompt_retain": "sp_maintain_acc", "paraphrase_edit": "a_Paraphrase_Injected_forget",
               "neighborhood_edit": "a_Neighborhood_Injected_forget", "probe_true": "forget_pred_true_label"}
    checked = 0
    for _, row in published[published["table"].isin(sources) & published["measure"].isin(columns)].iterrows():
        source = sources[row["table"]]
        runs = source.loc[source["localization"].map(names) == row["method"], columns[row["measure"]]]
        assert (len(runs), runs.mean()) == (row["n_runs"], pytest.approx(row["value"], abs=0.00051)), row.to_dict()
        checked += 1
    assert checked == 153


# Verdicts

def test_a_clear_advantage_holds(declared):
    table = pd.concat([rows({"lookup": 0.85, **dict.fromkeys(TRACED, 0.2)}), working()])
    found = one(declared, table, "mcq-output-tracing")
    assert (found["verdict"], found["held"], found["of"], found["reason"]) == ("holds", 4, 4, "")
    assert found["low"] > 0.1 and found["p_holm"] <= 0.05 and found["n_facts"] == 64 and found["n_seeds"] == 3
    assert (found["published_mask"], found["published_against"]) == (0.862, declared.published("athletes", "mcq_edit", found["against"]))


def test_two_names_of_one_edit_have_no_interval_rather_than_nan(declared):
    """The loss on text is one value a seed; where mask and rival are the same edit, no difference has a spread."""
    row = pd.Series({"mask": "lookup", "against": "causal tracing MLPs", "value": 0.0, "low": np.nan, "high": np.nan, "n_facts": 1,
                     "n_seeds": 3, "missing": 0, "guard": ""})
    assert claims._reason(row, declared.rule) == "lookup vs causal tracing MLPs: +0.000 [no spread]"
    assert claims._reason(row.replace({np.nan: 0.5}), declared.rule).endswith("[+0.500, +0.500]")


def test_one_rival_that_is_as_good_makes_it_fail(declared):
    means = {"lookup": 0.5, **dict.fromkeys(TRACED, 0.2), "causal tracing MLPs": 0.5}
    found = one(declared, pd.concat([rows(means), working()]), "mcq-output-tracing")
    assert (found["verdict"], found["held"], found["against"]) == ("fails", 3, "causal tracing MLPs")
    assert found["reason"].startswith("lookup vs causal tracing MLPs: ")


def test_an_interval_across_the_margin_is_undecided(declared):
    means = {"lookup": 0.5, **dict.fromkeys(TRACED, 0.2), "attribution": 0.4}
    found = one(declared, pd.concat([rows(means), working()]), "mcq-output-tracing")
    assert found["verdict"] == "undecided" and found["low"] < 0.1 < found["high"]


def test_seeds_that_disagree_leave_it_undecided(declared):
    table = pd.concat([rows({"lookup": 0.6, **dict.fromkeys(TRACED, 0.3)}, sd=0.2), working()])
    found = claims.comparisons(only(declared, "mcq-output-tracing"), table)
    assert (found["verdict"] == "undecided").any()
    assert (found["seeds_high"] - found["seeds_low"] > found["facts_high"] - found["facts_low"]).all()


def test_too_few_seeds_decide_nothing(declared):
    table = pd.concat([rows({"lookup": 0.85, **dict.fromkeys(TRACED, 0.2)}, seeds=2), working()])
    found = one(declared, table, "mcq-output-tracing")
    assert found["verdict"] == "undecided" and "2 of 3 seeds" in found["reason"]


def test_facts_that_differ_between_seeds_decide_nothing(declared):
    table = pd.concat([rows({"lookup": 0.85, **dict.fromkeys(TRACED, 0.2)}), working()])
    apart = table[table["fact"].str.extract(r"(\d+)")[0].astype(int) % 3 != table["seed"]]
    found = one(declared, apart, "mcq-output-tracing")
    assert found["verdict"] == "undecided" and "64 of 64 facts lack a value in some seed" in found["reason"]
    some = table[~((table["seed"] == 1) & table["fact"].str.contains(r"^name [1-3]?5 "))]
    assert one(declared, some, "mcq-output-tracing")[["verdict", "n_facts", "missing"]].tolist() == ["holds", 60, 4]
    many = table[~((table["seed"] == 1) & table["fact"].str.contains(r"^name \d?[56] "))]
    found = one(declared, many, "mcq-output-tracing")
    assert found["verdict"] == "undecided" and "12 of 64 facts lack a value in some seed" in found["reason"]


def test_what_was_not_run_is_named(declared):
    table = pd.concat([rows({"lookup": 0.85, **dict.fromkeys(TRACED[:3], 0.2)}), working()])
    found = one(declared, table, "mcq-output-tracing")
    assert (found["verdict"], found["held"]) == ("undecided", 3) and found["reason"] == "lookup vs attribution MLPs: not run"
    assert one(declared, table, "world-mcq")["verdict"] == "undecided"
    assert claims.verdict(declared, table.iloc[:0]).empty


def test_lost_format_keeps_a_claim_from_holding(declared):
    table = pd.concat([rows({"lookup": 0.85, **dict.fromkeys(TRACED, 0.2)}), working(lookup=0.6)])
    found = one(declared, table, "mcq-output-tracing")
    assert found["verdict"] == "undecided" and "but mcq_retain 0." in found["reason"]
    unguarded = one(declared, table[table["measure"] != "mcq_retain probability"], "mcq-output-tracing")
    assert unguarded["verdict"] == "undecided" and "mcq_retain nan" in unguarded["reason"]


@pytest.mark.parametrize("kept, verdict", [(0.9, "holds"), (0.6, "undecided")])
def test_lower_is_better_after_relearning_unless_the_model_is_damaged(declared, kept, verdict):
    attacked = {"attack": "relearn lora"}
    table = pd.concat([rows({"lookup": 0.2, **dict.fromkeys(TRACED, 0.8)}, "forget probability", n=32, **attacked),
                       rows({"lookup": kept, **dict.fromkeys(TRACED, 0.9)}, "retain probability", **attacked)])
    found = one(declared, table, "relearning-output-tracing")
    assert (found["verdict"], found["margin"]) == (verdict, -0.1) and found["high"] < -0.1


def test_lower_fails_when_it_is_higher(declared):
    table = rows({"lookup": 0.8, **dict.fromkeys(TRACED, 0.3)}, "forget probability", n=32, attack="relearn lora")
    assert one(declared, table, "relearning-output-tracing")["verdict"] == "fails"


def test_at_most_a_little_worse(declared):
    others = [name for name in declared.masks if name != "lookup"]
    close = rows({"lookup": 0.95, **dict.fromkeys(others, 0.95)}, "mcq_retain probability", n=200, sd=0.001)
    worse = rows({"lookup": 0.8, **dict.fromkeys(others, 0.95)}, "mcq_retain probability", n=200, sd=0.001)
    assert one(declared, close, "mcq-retain")["verdict"] == "holds"
    assert one(declared, worse, "mcq-retain")["verdict"] == "fails"


def test_a_measure_of_the_whole_set(declared):
    others = [name for name in declared.masks if name != "lookup"]
    table = rows({"lookup": 2.0, **dict.fromkeys(others, 2.0)}, "text_loss", n=1, seeds=5, sd=0).assign(fact="")
    table["value"] = np.random.default_rng(0).normal(2, 0.002, len(table))
    found = one(declared, table, "text-loss")
    assert (found["verdict"], found["test"], found["n_seeds"]) == ("holds", "t over seeds", 5)


def test_a_level_is_compared_with_the_margin_itself(declared):
    masks = next(claim.masks for claim in declared.claims if claim.id == "sport-relearns")
    parts = []
    for sport in ("football", "baseball"):
        kind = {"facts": f"athletes answer-{sport}", "n": 40}
        parts += [rows(dict.fromkeys(masks, 0.97), "forget probability", attack="relearn lora", **kind),
                  rows(dict.fromkeys(masks, 0.95), "retain probability", attack="relearn lora", **kind),
                  rows({"none": 0.96}, "retain probability", **kind)]
    found = one(declared, pd.concat(parts), "sport-relearns")
    assert (found["verdict"], found["of"], found["n_facts"]) == ("holds", 6, 80)
    low = pd.concat(parts)
    low.loc[(low["localization"] == "lookup") & (low["measure"] == "forget probability"), "value"] -= 0.5
    found = one(declared, low, "sport-relearns")
    assert (found["verdict"], found["mask"], found["published_mask"]) == ("fails", "lookup", 0.958)


LAYERS = {"lookup": "1 2 3", **{f"MLP {s}-{s + 2}": f"{s} {s + 1} {s + 2}" for s in range(8)}, "MLP 1-4": "1 2 3 4"}


def windows(best: float = 0.4) -> pd.DataFrame:
    means = {"lookup": 0.8, "attribution": 0.9, "MLP 1-3": 0.8, "MLP 1-4": 0.9, **{f"MLP {s}-{s + 2}": 0.4 for s in (0, 2, 4, 6)}, "MLP 5-7": best}
    retain = rows({"none": 0.95, "lookup": 0.93}, "mcq_retain top1", seed=1)
    return pd.concat([rows(means, "mcq_edit top1", layers=LAYERS), retain])


def test_windows_are_those_of_the_same_size_at_another_place(declared):
    declared = only(declared, "window-anywhere", "window-same-depth", "window-first")
    table = claims.comparisons(declared, windows(), ["window-anywhere"])
    assert sorted(table["against"]) == ["MLP 0-2", "MLP 2-4", "MLP 4-6", "MLP 5-7", "MLP 6-8"]
    assert set(table["verdict"]) == {"holds"}
    assert sorted(claims.comparisons(declared, windows(), ["window-same-depth"])["against"]) == ["MLP 0-2", "MLP 2-4"]
    assert list(claims.comparisons(declared, windows(), ["window-first"])["against"]) == ["MLP 0-2"]


def test_a_better_window_decides_against_lookup(declared):
    found = one(declared, windows(best=0.95), "window-anywhere")
    assert (found["verdict"], found["against"]) == ("fails", "MLP 5-7")


def test_windows_need_their_layers(declared):
    with pytest.raises(ClaimsError, match="rows of lookup need the column `layers`"):
        claims.verdict(declared, windows().drop(columns="layers"))
    table = windows()
    table.loc[table["localization"] == "MLP 4-6", "layers"] = None
    with pytest.raises(ClaimsError, match="rows of MLP 4-6 need"):
        claims.verdict(declared, table)


def test_no_window_is_not_run(declared):
    table = windows()
    found = one(declared, table[~table["localization"].str.startswith("MLP")], "window-anywhere")
    assert (found["verdict"], found["reason"]) == ("undecided", "lookup vs MLP *: not run")


def test_claims_about_one_model_ask_no_other(declared):
    declared = only(declared, "dissociation-mcq", "window-anywhere")
    table = pd.concat([windows(), windows().assign(model="tiny-late")])
    assert claims.verdict(declared, table, ["dissociation-mcq"])["model"].tolist() == ["tiny-late"]
    assert claims.verdict(declared, table, ["window-anywhere"])["model"].tolist() == ["tiny", "tiny-late"]


def test_holm_covers_the_whole_family(declared):
    table = pd.concat([rows({"lookup": 0.85, **dict.fromkeys(TRACED, 0.2)}), working()])
    found = claims.comparisons(declared, table)
    family = found[found["family"] == "generalisation"]
    tested = family[family["p"].notna()]
    assert len(family) > 30 and len(tested) == 4
    assert tested["p_holm"].min() == pytest.approx(tested["p"].min() * len(family))
    picked = claims.comparisons(declared, table, ["mcq-output-tracing"])
    assert picked["p_holm"].tolist() == tested["p_holm"].tolist()


# Errors

def changed(tmp_path, declared, **fields) -> Path:
    """The committed file with fields of its first claim replaced."""
    raw = yaml.safe_load((claims.DATA / "claims.yaml").read_text())
    raw["claims"][0] |= fields
    path = tmp_path / "claims.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


@pytest.mark.parametrize("fields, message", [
    ({"direction": "hihger"}, r"claim `mcq-output-tracing`, direction: input should be 'higher' or 'lower' \(got 'hihger'\)"),
    ({"margn": 0.1}, r"claim `mcq-output-tracing`, margn: extra inputs are not permitted"),
    ({"margin": "wide"}, r"claim `mcq-output-tracing`, margin: .*number"),
    ({"id": "mcq-forget"}, r"claim `mcq-forget`: the id is used twice"),
    ({"measure": "mcq"}, r"measure `mcq` is not declared; there are forget, retain"),
    ({"against": ["output trace"]}, r"mask `output trace` is not declared"),
    ({"attack": "relearning"}, r"attack `relearning` is not declared; there are none, relearn lora"),
    ({"family": "hope"}, r"family `hope` is not declared; there are generalisation"),
    ({"against": ["lookup"]}, r"compared with itself"),
    ({"published": {"athletes": ["mcq_edits"]}}, r"data/published/athletes.csv has no `mcq_edits` of FLU"),
    ({"published": {"athlete": ["mcq_edit"]}}, r"data/published/athlete.csv has no `mcq_edit`"),
    ({"published": {}}, r"published claims, and only they, name published figures"),
    ({"against": [], "guards": [{"measure": "retain", "relative_to": "against", "margin": 0.1}]}, r"needs something to compare with"),
])
def test_mistakes_in_the_file_are_named(tmp_path, declared, fields, message):
    with pytest.raises(ClaimsError, match=message):
        claims.load(changed(tmp_path, declared, **fields))


def test_a_file_that_is_no_yaml_or_no_claims(tmp_path):
    path = tmp_path / "claims.yaml"
    path.write_text("claims: [unclosed")
    with pytest.raises(ClaimsError, match="claims.yaml is no YAML"):
        claims.load(path)
    path.write_text("- just a list")
    with pytest.raises(ClaimsError, match="the file: "):
        claims.load(path)


def test_rows_that_cannot_be_judged(declared):
    table = rows({"lookup": 0.8})
    with pytest.raises(ClaimsError, match="rows lack the columns seed, measure"):
        claims.verdict(declared, table.drop(columns=["seed", "measure"]))
    with pytest.raises(ClaimsError, match="no claim is called mcq-everything; there are mcq-output-tracing"):
        claims.verdict(declared, table, ["mcq-everything"])
    with pytest.raises(ValueError, match="differ in run"):
        claims.verdict(declared, pd.concat([table, table.assign(run="again")]))
