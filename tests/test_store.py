"""The store: one schema from many files, read while it is written, flagged where it is old."""

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sweep_cases import FINISH, PARAMETERS, notebook

from helpers import claims, parameters, provenance, runs, store
from helpers.store import StoreError

DECLARED = parameters.from_cell(PARAMETERS)
STEM = "60_stored"


def stored(out: Path, seed: int = 0, finish: bool = True, rows: pd.DataFrame | None = None, **given) -> runs.Run:
    """A run through the same door as in a notebook."""
    run = runs.Run(STEM, parameters.validate(DECLARED, {"seed": seed, "out": str(out), "model": "m", **given}))
    run.result(values(seed) if rows is None else rows)
    if finish:
        run.finish()
    return run


def values(seed: int, count: int = 3) -> pd.DataFrame:
    where = {"facts": "athletes first-64", "n": 64, "seed": seed, "localization": "lookup", "layers": "2 3", "method": "finetune"}
    return pd.DataFrame({**where, "attack": "none", "setting": "", "fact": [f"fact {i}" for i in range(count)],
                         "measure": "forget_edit top1", "value": seed + np.arange(count) / 10})


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with the notebook, from which runs are made."""
    notebook(tmp_path, STEM, FINISH)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def quick(monkeypatch):
    """Runs that do not ask who they are: a thousand times git and package versions would be a test of those."""
    machine = {"platform": "p", "threads": 1, "packages": {}}
    for name, value in {"git_state": None, "code_hash": "c", "describe_machine": machine}.items():
        monkeypatch.setattr(provenance, name, lambda *a, value=value: value)


def read(home: Path, *sources: Path, **where) -> pd.DataFrame:
    return store.read(*(sources or [home / "out"]), notebooks=home, **where)


def test_rows_come_back_as_they_were_with_their_origin(home):
    made = [stored(home / "out", seed) for seed in range(3)]
    rows = read(home)
    assert list(rows.columns) == list(store.SCHEMA) and set(claims.COLUMNS) <= set(rows.columns)
    in_order = sorted(made, key=lambda run: run.id)
    expected = pd.concat([values(run.seed).assign(run=run.id, model="m") for run in in_order], ignore_index=True)
    pd.testing.assert_frame_equal(rows[expected.columns], expected, check_dtype=False)
    git = made[0].provenance["git"]
    assert rows["commit"].unique().tolist() == [git["commit"] + "-dirty" * git["dirty"] if git else ""]
    assert set(rows["code"]) == {provenance.code_hash(STEM, home)} and not rows["stale"].any()
    assert set(rows["notebook"]) == {STEM} and rows["machine"].str.contains("cpu, ").all()


def test_types_do_not_depend_on_what_a_run_left_out(home):
    stored(home / "out", 0, rows=pd.DataFrame({"n": [64.0], "value": [1], "fact": [7], "extra": ["x"]}))
    stored(home / "out", 1)
    rows = read(home)
    kinds = {name: str(rows[name].dtype) for name in ("n", "value", "stale")}
    assert kinds == {"n": "int64", "value": "float64", "stale": "bool"}
    short = rows[rows["fact"] == "7"]
    assert len(short) == 1 and short[["method", "setting", "seed"]].isna().all(axis=None)
    assert "extra" not in rows


def test_the_profile_of_a_run_is_a_column(home):
    for seed, profile in enumerate(("quick", "full")):
        stored(home / "out", seed, profile=profile)
    assert read(home).groupby("seed")["profile"].unique().map(list).to_dict() == {0: ["quick"], 1: ["full"]}
    assert set(read(home, profile="full")["seed"]) == {1}
    table = store.runs(home / "out", home)
    assert sorted(table["profile"]) == ["full", "quick"] and set(table["model"]) == {"m"}


def test_only_finished_runs_are_read_and_all_are_listed(home):
    stored(home / "out", 0)
    stored(home / "out", 1, finish=False)
    failed = stored(home / "out", 2, finish=False)
    provenance.write_json(failed.folder / "failed.json", {"error": "ValueError: no", "code": "c"})
    assert read(home)["seed"].unique().tolist() == [0]
    table = store.runs(home / "out", home)
    seeds = [json.loads(text)["seed"] for text in table["parameters"]]
    assert dict(zip(seeds, table["state"])) == {0: "finished", 1: "unfinished", 2: "failed"}
    assert dict(zip(seeds, table["error"]))[2] == "ValueError: no"
    finished = table[table["state"] == "finished"].iloc[0]
    assert finished["memory_gb"] > 0 and finished["minutes"] >= 0


def test_filters(home):
    for seed in range(3):
        stored(home / "out", seed)
    whole = read(home)
    pd.testing.assert_frame_equal(read(home, seed=[0, 2], fact="fact 1"),
                                  whole[whole["seed"].isin([0, 2]) & (whole["fact"] == "fact 1")].reset_index(drop=True))
    assert read(home, attack="relearn full").empty and read(home, stale=True).empty
    with pytest.raises(StoreError, match="no column atack; there are run, model, facts"):
        read(home, atack="none")


@pytest.mark.parametrize("several", [{0, 2}, np.array([0, 2]), pd.Series([0, 2]), (0, 2), range(0, 3, 2), iter([0, 2])], ids=type)
def test_a_filter_takes_values_in_any_form(home, several):
    for seed in range(3):
        stored(home / "out", seed)
    assert set(read(home, seed=several)["seed"]) == {0, 2}
    assert set(read(home, seed=np.int64(1))["seed"]) == {1}
    assert read(home, seed=[]).empty


def test_a_relation_is_for_sql(home):
    for seed in range(2):
        stored(home / "out", seed)
    means = store.relation(home / "out", notebooks=home).aggregate("seed, avg(value) AS mean").order("seed").df()
    assert means["mean"].round(6).tolist() == [0.1, 1.1]


def test_nothing_there(home):
    with pytest.raises(StoreError, match="no runs at"):
        read(home, home / "nowhere")
    (home / "out").mkdir()
    empty = read(home)
    assert empty.empty and list(empty.columns) == list(store.SCHEMA)
    assert store.runs(home / "out", home).empty


def test_other_code_or_inputs_make_rows_stale(home):
    table = home / "facts.csv"
    table.write_text("one")
    stored(home / "out", 0, facts=str(table))
    stored(home / "out", 1)
    flags = lambda: read(home).groupby("seed")["stale"].unique().map(list).to_dict()
    assert flags() == {0: [False], 1: [False]}
    table.write_text("two")
    assert flags() == {0: [True], 1: [False]}
    # an input that is not on this machine says nothing
    table.unlink()
    assert flags() == {0: [False], 1: [False]}
    notebook(home, STEM, "1 + 1", FINISH)
    assert flags() == {0: [True], 1: [True]}
    assert store.runs(home / "out", home)["stale"].all()


def test_a_packed_file_reads_as_its_runs_do(home, capsys):
    for seed in range(3):
        stored(home / "out", seed)
    assert store.main(["pack", str(home / "out"), str(home / "all.parquet")]) == 0
    assert "9 rows" in capsys.readouterr().out
    pd.testing.assert_frame_equal(read(home, home / "all.parquet"), read(home))
    pd.testing.assert_frame_equal(read(home, home), read(home))  # the folder it lies in
    notebook(home, STEM, "1 + 1", FINISH)
    assert read(home, home / "all.parquet")["stale"].all()
    # of a run in two places the newer one counts, and no row twice
    time.sleep(1.1)
    stored(home / "out", 1, rows=values(1).assign(value=9.0))
    both = read(home, home / "all.parquet", home / "out")
    assert len(both) == 9
    assert both.groupby("seed")["value"].max().to_dict() == {0: 0.2, 1: 9.0, 2: 2.2}
    assert both.groupby("seed")["stale"].any().to_dict() == {0: True, 1: False, 2: True}


def test_packed_runs_say_what_they_took(home):
    for seed, profile in enumerate(("quick", "full")):
        stored(home / "out", seed, profile=profile)
    store.pack([home / "out"], home / "packs" / "all.parquet", home)
    columns = ["run", "model", "profile", "notebook", "started", "machine", "state", "minutes", "memory_gb", "uses", "stale"]
    made = store.runs(home / "out", home)[columns]
    for place in (home / "packs" / "all.parquet", home / "packs"):
        pd.testing.assert_frame_equal(store.runs(place, home)[columns], made)
    # packed again
    store.pack([home / "packs"], home / "again.parquet", home)
    pd.testing.assert_frame_equal(store.runs(home / "again.parquet", home)[columns], made)
    assert set(read(home, home / "again.parquet")["profile"]) == {"quick", "full"}


def test_files_that_were_packed_before_a_column_was_are_read(home):
    stored(home / "out", 0)
    store.pack([home / "out"], home / "new.parquet", home)
    pd.read_parquet(home / "new.parquet").drop(columns=["profile", "minutes", "memory_gb"]).to_parquet(home / "old.parquet", index=False)
    rows = read(home, home / "old.parquet")
    assert len(rows) == 3 and set(rows["profile"]) == {""}
    (run,) = store.runs(home / "old.parquet", home).to_dict("records")
    assert run["state"] == "finished" and run["profile"] == "" and np.isnan(run["minutes"]) and np.isnan(run["memory_gb"])


TORN = {
    "results.parquet": [lambda whole: b"", lambda whole: whole[: len(whole) // 2], lambda whole: bytes(len(whole))],
    "provenance.json": [lambda whole: b"{}", lambda whole: b"[]", lambda whole: b"", lambda whole: b"\xff\x00"],
    "done.json": [lambda whole: b"{}", lambda whole: b"", lambda whole: b"\xff\x00"],
    "parameters.json": [lambda whole: b"3"],
}


@pytest.mark.parametrize(("name", "tear"), [(name, tear) for name, ways in TORN.items() for tear in ways])
def test_a_torn_file_costs_its_run_alone(home, name, tear):
    made = [stored(home / "out", seed) for seed in range(3)]
    file = made[1].folder / name
    file.write_bytes(tear(file.read_bytes()))
    with pytest.warns(UserWarning, match=f"left out, as they cannot be read: .*{made[1].id}.*{name}: ") as said:
        rows = read(home)
    assert len(said) == 1 and Path(said[0].filename).name == Path(__file__).name
    assert set(rows["seed"]) == {0, 2} and len(rows) == 6
    table = store.runs(home / "out", home).set_index("run")
    assert table["state"].to_dict() == {made[0].id: "finished", made[1].id: "unreadable", made[2].id: "finished"}
    assert table.loc[made[1].id, "error"].startswith(f"{name}: ") and table.loc[made[1].id, "notebook"] == STEM
    stored(home / "out", 1)
    assert len(read(home)) == 9


def test_what_is_written_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    happened = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name: (happened.append((name, os.stat(a[0]).st_ino)), real(*a))[1])
    provenance.write_text(tmp_path / "file", "text")
    inode = (tmp_path / "file").stat().st_ino
    assert happened == [("fsync", inode), ("replace", inode)]


def test_packed_values_have_three_decimals(home):
    stored(home / "out", 0, rows=values(0).assign(value=0.12345))
    store.pack([home / "out"], home / "all.parquet", home)
    assert read(home, home / "all.parquet")["value"].eq(0.123).all() and read(home)["value"].eq(0.12345).all()


@pytest.mark.parametrize("largest", [999_999.9989, 999_999.9996, -2e7, np.inf, np.nan])
def test_packed_values_may_be_large_or_none(home, largest):
    given = [0.0006, -1.5, largest]
    stored(home / "out", 0, rows=values(0, 3).assign(value=given))
    # packed again, nothing changes any more
    for source, target in (("out", "once"), ("once.parquet", "twice")):
        store.pack([home / source], home / f"{target}.parquet", home)
        assert read(home, home / f"{target}.parquet")["value"].tolist() == pytest.approx(np.round(given, 3).tolist(), rel=1e-15, nan_ok=True)


def test_what_runs_have_in_common_is_packed_once(home):
    rows = values(0, 30_000).assign(value=np.random.default_rng(0).integers(0, 1000, 30_000) / 1000)
    for seed in range(4):
        stored(home / "out", seed, rows=rows.assign(seed=seed))
        store.pack([home / "out"], home / f"{seed}.parquet", home)
    one, four = ((home / f"{seed}.parquet").stat().st_size for seed in (0, 3))
    assert four < 1.2 * one


def test_what_is_no_packed_file_is_refused(home, capsys):
    (home / "notes.txt").write_text("hello")
    values(0).to_parquet(home / "bare.parquet")
    for name in ("notes.txt", "bare.parquet"):
        with pytest.raises(StoreError, match=f"{name} is no file made by pack"):
            read(home, home / name)
    assert store.main(["pack", str(home / "nowhere"), str(home / "all.parquet")]) == 2
    assert "no runs at" in capsys.readouterr().err and not (home / "all.parquet").exists()


def test_a_thousand_writers_and_a_reader(home, quick):
    seen, stop = [], threading.Event()

    def look():
        while not stop.is_set():
            if (home / "out").exists():
                rows = read(home)
                seen.append(rows.groupby("run")["value"].agg(["size", "nunique"]))

    reader = ThreadPoolExecutor(1).submit(look)
    try:
        with ThreadPoolExecutor(1000) as writers:
            list(writers.map(lambda seed: stored(home / "out", seed), range(1000)))
    finally:
        stop.set()
    reader.result()
    rows = read(home)
    assert rows.groupby("seed").size().to_dict() == dict.fromkeys(range(1000), 3)
    assert sorted(rows["value"]) == sorted(x for seed in range(1000) for x in values(seed)["value"])
    # whoever looked in between saw whole runs, and never fewer than before
    assert seen and all((counts == 3).all(axis=None) for counts in seen)
    assert all(len(a) <= len(b) for a, b in zip(seen, seen[1:]))


def test_reading_while_runs_start_anew(home, quick):
    for seed in range(20):
        stored(home / "out", seed)
    stop = threading.Event()

    def again():
        while not stop.is_set():
            for seed in range(10, 20):
                stored(home / "out", seed)

    writer = ThreadPoolExecutor(1).submit(again)
    try:
        for _ in range(12):
            sizes = read(home).groupby("seed").size()
            # the ten that rest are always there; of the others those that are finished, whole
            assert set(range(10)) <= set(sizes.index) and (sizes == 3).all()
    finally:
        stop.set()
    writer.result()


def test_a_million_rows_load_in_under_three_seconds(home):
    rng, text = np.random.default_rng(0), {"code": "c", "uses": {}}
    for number in range(160):
        folder = home / "out" / STEM / f"{number:012x}"
        rows = values(number % 3, 6250).assign(run=folder.name, model="m", value=rng.random(6250))
        folder.mkdir(parents=True)
        rows.to_parquet(folder / "results.parquet", index=False)
        made = {"notebook": STEM, "started": "2025", "git": None, "platform": "p", "device": "cpu", "threads": 1}
        provenance.write_json(folder / "provenance.json", made | text)
        provenance.write_json(folder / "done.json", text)
    wall, processor = [], []
    for _ in range(3):  # the best of three: another process may take the cores for a while
        began, worked = time.perf_counter(), time.process_time()
        rows = read(home)
        wall.append(time.perf_counter() - began)
        processor.append(time.process_time() - worked)  # of all threads, which a busy machine does not stretch
        if wall[-1] < 3:
            break
    assert min(wall) < 3 and min(processor) < 3
    assert len(rows) == 1_000_000 and rows["run"].nunique() == 160
