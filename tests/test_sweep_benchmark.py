"""What the benchmark of sweeps times is the same computation, and overhead is what is beyond it."""

import json

import pytest

from benchmarks import sweep
from helpers.sweep.pool import WARM


@pytest.mark.slow
def test_overhead_is_what_a_run_takes_beyond_its_computation(tmp_path, capsys):
    sweep.main(["--runs", "1", "--repeats", "1", "--workers", "1", "--out", str(tmp_path / "sweep.json")])
    rows = json.loads((tmp_path / "sweep.json").read_text())["tables"]["what a run costs"]
    assert [row["kernels"] for row in rows] == (["forked", "new"] if WARM else ["new"])
    for row in rows:
        assert row["overhead"] == pytest.approx(row["seconds a run"] - row["bare"])
        assert row["overhead"] > 0 and row["runs an hour"] == pytest.approx(3600 / row["seconds a run"])
    # a new kernel imports what a forked one finds there
    assert rows[-1]["overhead"] > rows[0]["overhead"] or not WARM


def test_a_sweep_that_computes_something_else_is_not_timed(monkeypatch):
    monkeypatch.setattr(sweep, "bare", lambda given: (1.0, 0.25))
    monkeypatch.setattr(sweep, "timed", lambda *a: (1.0, {0.25, 0.26}))
    with pytest.raises(RuntimeError, match="the bare computation 0.25"):
        sweep.measure({}, [1], 1)
