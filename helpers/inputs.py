"""The files behind a run's parameters `model`, `dissociating`, `facts` and `texts`: weights and tokenizer, the table of facts and its templates, text."""

from pathlib import Path

from helpers.facts import BUNDLED, DATA
from helpers.parameters import Parameters

# what decides how a model in transformers' format answers; cards and curves beside it do not
MODEL_FILES = "config.json *.safetensors tokenizer* *.model vocab.* merges.txt special_tokens_map.json added_tokens.json".split()


def files(params: Parameters) -> list[Path]:
    """The files that exist here now. Of a hub id, the file that names the commit in the local cache: its content stands for the weights.

    Empty for parameters that name nothing known; loading them says what is wrong.
    """
    text = Path(getattr(params, "texts", ""))
    models = [file for name in ("model", "dissociating") for file in of_model(getattr(params, name, ""))]
    return [*models, *_facts(getattr(params, "facts", "")), *([text] if text.is_file() else [])]


def of_model(name: str) -> list[Path]:
    """What decides how a model answers: weights, configuration and tokenizer."""
    folder = next((path for path in (DATA / "models" / name, Path(name).expanduser()) if name and path.is_dir()), None)
    if folder:
        return sorted({file for pattern in MODEL_FILES for file in folder.glob(pattern)})
    from huggingface_hub.constants import HF_HUB_CACHE  # slow to import, and seldom needed

    commit = Path(HF_HUB_CACHE, f"models--{name.replace('/', '--')}", "refs", "main")
    return [commit] if commit.is_file() else []


def _facts(source: str) -> list[Path]:
    table = BUNDLED.get(source, Path(source.rpartition(":")[2]))  # "counterfact:<path>" reads a local copy
    beside = table.with_suffix(".yaml") if source else table
    templates = beside if beside.is_file() else DATA / "relations.yaml"
    return [table, templates] if table.is_file() else []
