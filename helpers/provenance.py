"""Where a result comes from: commit, package versions, machine, and the content of its inputs."""

import ast
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import subprocess
import sys
import tokenize
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch transformers nnsight transformer_lens tokenizers safetensors datasets numpy pandas scipy "
    "scikit-learn matplotlib pydantic papermill"
).split()
READERS = ("plots", "claims.py", "progress.py")  # of `helpers`: what draws, judges or announces rows, and makes none
MISSING = "missing"  # in place of the hash of a file that was looked for and was not there
MAGICS = ("%", "!")  # lines of a cell that are IPython's and not Python's


def project_root() -> Path:
    """The folder that holds `helpers/` in a checkout, else (installed as a package) the working directory."""
    root = Path(__file__).resolve().parents[1]
    return root if (root / "pyproject.toml").exists() else Path.cwd()


def short_path(path: Path | str) -> str:
    """A path inside the project relative to its root, any other one as it is."""
    path = Path(path).absolute()
    root = project_root()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def given_path(path: Path | str) -> Path:
    """A path that a user gives, `~` written out: one that is not in the working directory (a kernel's is notebooks/) counts from the project's root."""
    path = Path(path).expanduser()
    return path if path.exists() or not (project_root() / path).exists() else project_root() / path


def content_hash(path: Path | str) -> str:
    """sha256 of a file, or of a folder's file names and contents.

    Raises FileNotFoundError when there is nothing at `path`.
    """
    path = Path(path)
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir():
        raise FileNotFoundError(f"nothing to hash at {path}")
    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    return text_hash("".join(f"{file.relative_to(path).as_posix()}\0{content_hash(file)}\n" for file in files))


def code_hash(notebook: str, folder: Path | None = None) -> str:
    """sha256 of all that computes a notebook's rows: its code cells and the modules of `helpers` they import, through one another.

    READERS do not count: rows stay what they are when a figure is drawn in another way. Nor do comments and docstrings.
    The notebook is looked for in `folder` (default: the working directory, which a kernel shares with its notebook), then
    in `notebooks/`. Where it is in neither, every module counts.
    """
    package = Path(__file__).parent
    places = [(folder or Path.cwd()) / f"{notebook}.ipynb", project_root() / "notebooks" / f"{notebook}.ipynb"]
    path = next((place for place in places if place.is_file()), None)
    if path:
        # outputs are left out: executing a notebook does not change its code
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        files = [file for file in modules(code) if file.relative_to(package).parts[0] not in READERS]
    else:
        code, files = [], sorted(package.rglob("*.py"))
    return text_hash("\n".join([*_named_hashes(files), *map(essence, code)]))


def package_hash(name: str) -> str:
    """sha256 of a package of `helpers`, such as unlearning, and of the modules it imports, through one another; READERS do not count."""
    package = Path(__file__).parent
    own = sorted((package / name).rglob("*.py"))
    read = modules(file.read_text(encoding="utf-8") for file in own)
    return text_hash("\n".join(_named_hashes(file for file in sorted({*own, *read}) if file.relative_to(package).parts[0] not in READERS)))


def _named_hashes(files: Iterable[Path]) -> list[str]:
    return [f"{file.relative_to(Path(__file__).parent).as_posix()}\0{module_hash(file)}" for file in files]


def module_hash(file: Path) -> str:
    """sha256 of what a module does: comments and docstrings do not count."""
    return text_hash(essence(file.read_text(encoding="utf-8")))


@cache  # the notebooks share most of their modules
def essence(source: str) -> str:
    """A piece of Python without comments and docstrings; as it is where it is no plain Python."""
    try:
        tree = ast.parse(source)
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (SyntaxError, tokenize.TokenError):  # IPython may know what to do with it
        return source
    original = source.split("\n")
    lines: list[str | None] = list(original)
    for token in tokens:
        if token.type == tokenize.COMMENT:
            row, column = token.start[0] - 1, token.start[1]
            lines[row] = lines[row][:column].rstrip() or None
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node) is not None:
            said, rest = node.body[0], node.body[1:]
            if not original[said.lineno - 1][: said.col_offset].strip() and (not rest or rest[0].lineno > said.end_lineno):
                lines[said.lineno - 1 : said.end_lineno] = [None] * (said.end_lineno - said.lineno + 1)
    return "\n".join(line for line in lines if line is not None)


def modules(sources: Iterable[str]) -> list[Path]:
    """Files of the modules of `helpers` that pieces of code import, directly or through one another, inside functions too.

    Read from the text, so a sweep knows them before anything runs; importing by name (importlib) would escape it.
    """
    package = Path(__file__).parent
    there = {_dotted(file): file for file in package.rglob("*.py")}
    found: set[str] = set()
    waiting = list(sources)
    while waiting:
        names = _names(waiting.pop())
        new = (there.keys() if names is None else names & there.keys()) - found  # of what is no plain Python, any
        found |= new
        waiting += [there[name].read_text(encoding="utf-8") for name in new]
    return sorted(there[name] for name in found)


def _dotted(file: Path) -> str:
    """What the import statement calls a module of `helpers`: a package by its folder's name."""
    return ".".join((file.parent if file.name == "__init__.py" else file.with_suffix("")).relative_to(Path(__file__).parent.parent).parts)


@cache
def _names(source: str) -> frozenset[str] | None:
    """The dotted names that a piece of code imports, and those of the packages they lie in; None where it is no plain Python (IPython may know what to do with it)."""
    try:
        tree = ast.parse("\n".join(line for line in source.split("\n") if not line.lstrip().startswith(MAGICS)))
    except SyntaxError:
        return None
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    # importing a.b.c runs a and a.b as well
    return frozenset(".".join(parts[:depth]) for parts in (name.split(".") for name in names) for depth in range(1, len(parts) + 1))


def changed(uses: Mapping[str, str], digest: Callable[[str], str] = content_hash) -> list[str]:
    """Those of the files that a run used, path to content hash, that are no longer what they were: other, gone, or there where they were MISSING."""
    now = lambda place: digest(str(place)) if place.exists() else MISSING
    return [path for path, old in uses.items() if now(project_root() / path) != old]


def text_hash(text: str) -> str:
    """sha256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def git_state(root: Path) -> dict[str, Any] | None:
    """Commit and dirty flag of the repository whose top folder is `root`; None where there is none."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # a copy that lies inside somebody else's repository must not borrow that commit
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return None
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def describe_machine() -> dict[str, Any]:
    """Python, platform, threads, and the versions of the packages that produce numbers."""
    # torch is asked only where a notebook has imported it already: importing takes seconds
    torch = sys.modules.get("torch")
    wanted = os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count())
    threads = torch.get_num_threads() if torch else int(wanted.split(",")[0])
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": threads,
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def peak_memory() -> float | None:
    """The most main memory this process has held, in GB; None where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def write_atomic(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary neighbour of `path`, then move it into place in one step.

    A reader, or a run that is killed half way, sees the old file or the new one, never a torn one. Neither does who comes after a crash of
    the machine: systems may keep a name that was given last and lose the content behind it, unless that was on the disk before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(temporary)
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step."""
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file in one step."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
