"""One run of one notebook: its parameters, seeds and provenance, and the rows and figures it leaves on disk.

The second code cell of every notebook reads

    from helpers import runs
    run = runs.start("02_fact_lookup_circuit", globals())

`start` refuses unknown and ill-typed parameters before anything is written (see `parameters.py`), then
opens `<out>/<notebook>/<run id>`:

    parameters.json  provenance.json  rows.parquet  results.parquet  checks.json  figures/<name>.png  done.json

The run id is a hash of the notebook's name and its parameters, so the same parameters always meet in
the same folder: starting again replaces what an earlier run left there, and a sweep finds what is
done. `done.json` is written last, by `run.finish()`, with the content hashes of the code, of the files
behind `model` and `facts`, and of everything passed to `run.uses`; `finished` compares them with what
is there now.

Nothing here touches a global random state: take a `torch.Generator` from `run.generator(purpose)`.
"""

import hashlib
import html
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pandas as pd
from IPython.display import Image, display

from helpers import inputs, parameters, provenance
from helpers.parameters import ParameterError, Parameters
from helpers.progress import HEADLESS_VARIABLE, is_headless, progress  # noqa: F401 - part of this interface

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

T = TypeVar("T")
Digest = Callable[[str], str]

# where results go is not part of what they are
NOT_IDENTITY = {"out", "figures"}
RUN_COLUMNS = ("model", "facts", "profile", "seed")


@dataclass(frozen=True)
class Check:
    """A claim, what was observed, and whether the claim holds. Renders as one readable line."""

    claim: str
    observed: str | int | float | bool
    holds: bool

    def __repr__(self) -> str:
        observed = f"{self.observed:.4g}" if isinstance(self.observed, float) else self.observed
        return f"{'✓ holds' if self.holds else '✗ does not hold'}: {self.claim} (observed: {observed})"

    def _repr_html_(self) -> str:
        # colour-blind safe blue and orange; the mark and the words carry the same information
        colour = "#0072b2" if self.holds else "#d55e00"
        verdict, rest = repr(self).split(":", 1)
        return f'<p><b style="color:{colour}">{verdict}</b>:{html.escape(rest)}</p>'


def start(notebook: str, namespace: Mapping[str, Any]) -> "Run":
    """Open a run from within a notebook; call it in the second code cell with `globals()`.

    Shows one line with the parameters in use, and lets tables show whole texts. Raises ParameterError, with nothing written, for a
    parameter that is unknown, ill-typed or asks for a device that is not there.
    """
    if "In" not in namespace:
        raise ParameterError('runs.start reads a notebook\'s cells: call it in one, as runs.start("name", globals())')
    run = Run(notebook, parameters.from_history(namespace["In"]))
    pd.set_option("display.max_colwidth", None, "display.max_columns", 30)
    in_use = [f"{name} {value}" for name, value in run.params if name not in NOT_IDENTITY]
    print(" · ".join([f"{notebook}: run {run.id}", *in_use]))
    return run


def run_id(notebook: str, params: Parameters) -> str:
    """Twelve hex digits that name a notebook run with these parameters, wherever it is written."""
    identity = params.model_dump(exclude=NOT_IDENTITY)
    return provenance.text_hash(json.dumps([notebook, identity], sort_keys=True))[:12]


def folder(notebook: str, params: Parameters) -> Path:
    """Where a run with these parameters is written."""
    return provenance.project_root() / params.out / notebook / run_id(notebook, params)


def finished(notebook: str, params: Parameters, *, same_code: bool = True, digest: Digest = provenance.content_hash) -> Path | None:
    """The folder of a finished run whose inputs have not changed since, or None.

    Compares the content of every file the run used and, unless `same_code` is off, of the notebook and the helpers it imports.
    """
    path = folder(notebook, params)
    return path if is_current(path, provenance.code_hash(notebook) if same_code else None, digest) else None


def is_current(path: Path, code: str | None, digest: Digest = provenance.content_hash) -> bool:
    """Whether the run in a folder has finished, with `code` (None: any) and inputs that are what they are now.

    A sweep over large weights passes a memoised `digest`.
    """
    try:
        done = json.loads((path / "done.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # the latter after a crash of the machine
        return False
    return code in (None, done["code"]) and not provenance.changed(done["uses"], digest)


class Run:
    """An open run. `params` holds the validated parameters; the folder exists once it is created.

    Raises ParameterError when the device asked for is not there.
    """

    def __init__(self, notebook: str, params: Parameters) -> None:
        _require_device(params.device)
        self.notebook = notebook
        self.params = params
        self.seed = params.seed
        self.id = run_id(notebook, params)
        self.folder = folder(notebook, params)
        self.checks: list[Check] = []
        self._batches: list[pd.DataFrame] = []
        self._results: list[pd.DataFrame] = []
        self._uses: dict[str, str] = {}
        self._started = time.monotonic()
        # a killed run must not be taken for the finished one whose folder it shares
        for old in ("done.json", "rows.parquet", "results.parquet", "checks.json"):
            (self.folder / old).unlink(missing_ok=True)
        shutil.rmtree(self.folder / "figures", ignore_errors=True)
        provenance.write_json(self.folder / "parameters.json", params.model_dump())
        self.provenance = {
            "notebook": notebook,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "git": provenance.git_state(provenance.project_root()),
            "code": provenance.code_hash(notebook),
            **provenance.describe_machine(),
        }
        self._use_inputs()

    @property
    def device(self) -> "torch.device":
        """The device to compute on; `auto` is the GPU where there is one, `split` the first of all. MPS has to be asked for."""
        import torch

        if self.params.device not in ("auto", "split"):
            return torch.device(self.params.device)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def dtype(self) -> "torch.dtype":
        """The weights' type; `auto` is bfloat16 on a GPU and float32, the reference, elsewhere."""
        import torch

        if self.params.dtype != "auto":
            return getattr(torch, self.params.dtype)
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def rows(self) -> pd.DataFrame:
        """All rows recorded so far."""
        return pd.concat(self._batches, ignore_index=True) if self._batches else pd.DataFrame()

    def pick(self, *, quick: T, standard: T, full: T, smoke: T | None = None) -> T:
        """The value that belongs to the run's profile; in the smoke profile that of quick, where nothing else is given."""
        return {"smoke": quick if smoke is None else smoke, "quick": quick, "standard": standard, "full": full}[self.params.profile]

    def seed_for(self, purpose: str) -> int:
        """A seed below 2**32 that depends on the run's seed and the purpose only, for NumPy and scikit-learn."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}:{purpose}".encode()).digest()[:4], "big")

    def generator(self, purpose: str, device: str = "cpu") -> "torch.Generator":
        """A fresh generator for one purpose. Drawing for one purpose never shifts another.

        On the CPU by default, so that a seed means the same numbers on every machine.
        """
        import torch

        return torch.Generator(device).manual_seed(self.seed_for(purpose))

    def uses(self, path: Path | str, optional: bool = False) -> Path:
        """Note that the run depends on the content of a file or folder (data, weights); returns the path.

        An `optional` one may be missing: what is not there is noted as well, and the run is stale once it is there. Raises
        FileNotFoundError when there is nothing at `path` otherwise.
        """
        path = Path(path)
        there = path.exists() or not optional
        self._uses[provenance.short_path(path)] = provenance.content_hash(path) if there else provenance.MISSING
        self._write_provenance()
        return path

    def record(self, rows: pd.DataFrame | list[dict[str, Any]], **columns: Any) -> None:
        """Append tidy rows, with constant `columns`, to `rows.parquet`.

        The run's own columns (run, notebook, model, facts, profile, seed) are added, unless the rows
        have one of that name: a notebook may loop over seeds. Recording the very same rows again, as
        re-running a cell does, changes nothing. Raises pyarrow.ArrowException, and keeps the rows
        out, when a column mixes types.
        """
        given = self.params.model_dump()
        own = {"run": self.id, "notebook": self.notebook} | {name: given[name] for name in RUN_COLUMNS if name in given}
        self._batches = self._append("rows.parquet", self._batches, rows, columns, own)

    def result(self, rows: pd.DataFrame, **columns: Any) -> None:
        """Append rows of `helpers.results`, one value a row, to `results.parquet`: what sweeps collect and claims judge.

        `run` and `model` are added. Otherwise as `record`.
        """
        self._results = self._append("results.parquet", self._results, rows, columns, {"run": self.id, "model": self.params.model})

    def _append(self, file: str, batches: list[pd.DataFrame], rows: Any, columns: dict, own: dict) -> list[pd.DataFrame]:
        batch = pd.DataFrame(rows).assign(**columns)
        batch = batch.assign(**{name: value for name, value in own.items() if name not in batch})
        batch = batch[[*own, *(name for name in batch if name not in own)]]
        if batch.empty or any(batch.equals(known) for known in batches):
            return batches
        table = pd.concat([*batches, batch], ignore_index=True)
        provenance.write_atomic(self.folder / file, lambda path: table.to_parquet(path, index=False))
        return [*batches, batch]

    def figure(self, fig: "Figure", name: str) -> None:
        """Show a figure and save it as `figures/<name>.png`; a copy goes to the `figures` parameter's folder if there is one.

        Raises ValueError for a name that is not made of letters, digits, `-` and `_`.
        """
        if not re.fullmatch(r"[\w-]+", name):
            raise ValueError(f"a figure's name is made of letters, digits, - and _, not {name!r}")
        targets = [self.folder / "figures" / f"{name}.png"]
        if self.params.figures:
            targets.append(provenance.project_root() / self.params.figures / f"{self.notebook}_{name}.png")
        for target in targets:
            # without the version stamp an unchanged picture stays the same file
            save = {"format": "png", "dpi": 120, "bbox_inches": "tight", "metadata": {"Software": None}}
            provenance.write_atomic(target, lambda path, save=save: fig.savefig(path, **save))
        display(Image(targets[0].read_bytes(), width=int(90 * fig.get_figwidth())))

    def check(self, claim: str, observed: Any, holds: bool) -> None:
        """Show and store whether a claim holds. A claim that fails is a result, never an exception."""
        if isinstance(observed, Real) and not isinstance(observed, int):
            observed = float(observed)  # NumPy's own scalars are not JSON
        check = Check(claim, observed if isinstance(observed, int | float) else str(observed), bool(holds))
        # running the cell again replaces its verdict
        self.checks = [old for old in self.checks if old.claim != claim] + [check]
        provenance.write_json(self.folder / "checks.json", [asdict(each) for each in self.checks])
        display(check)

    def finish(self) -> None:
        """Mark the run as finished and list its checks."""
        self._use_inputs()
        held = sum(check.holds for check in self.checks)
        done = {
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "minutes": round((time.monotonic() - self._started) / 60, 2),
            "held": held,
            "failed": len(self.checks) - held,
            "memory_gb": provenance.peak_memory(),
            "code": self.provenance["code"],
            "uses": self._uses,
        }
        provenance.write_json(self.folder / "done.json", done)
        where = provenance.short_path(self.folder)
        print(f"{held} of {len(self.checks)} checks hold, {len(self.rows)} rows in {where}")
        if self.checks:
            table = pd.DataFrame([asdict(check) for check in self.checks])
            display(table.assign(holds=table["holds"].map({True: "✓", False: "✗"})))

    def _use_inputs(self) -> None:
        # again at the end: a model from the hub may have come in between
        new = [path for path in inputs.files(self.params) if provenance.short_path(path) not in self._uses]
        self._uses |= {provenance.short_path(path): provenance.content_hash(path) for path in new}
        self._write_provenance()

    def _write_provenance(self) -> None:
        # the machine is described again: by now the notebook may have imported torch
        self.provenance |= provenance.describe_machine() | {"uses": self._uses}
        chosen = self if "torch" in sys.modules else self.params
        self.provenance |= {"device": str(chosen.device), "dtype": str(chosen.dtype).removeprefix("torch.")}
        provenance.write_json(self.folder / "provenance.json", self.provenance)


def _require_device(device: str) -> None:
    """Raise ParameterError when `device` is named and not there."""
    if device in ("auto", "cpu", "split"):
        return
    import torch

    kind, _, index = device.partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else int(torch.backends.mps.is_available())
    if int(index or 0) >= count:
        raise ParameterError(f"parameter `device`: `{device}` is not available here; use `auto` or `cpu`")
