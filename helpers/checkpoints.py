"""Files of a model: finding them, and refusing what is wrong with them before anything heavy.

A name can be a bundled model, a folder or a hub id; each can fail in its own ways, and each failure
gets a message that says what to do. Code that comes with a checkpoint is never run, and weights are
read from safetensors files only: both could execute anything.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from huggingface_hub import errors as hub_errors
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from helpers import provenance
from helpers.structure import ModelError, read_structure

BUNDLED = Path(__file__).resolve().parent.parent / "data" / "models"


def locate(name: str) -> str:
    """What to hand to transformers for `name`: a folder, or a hub id that can be read."""
    if not name.strip():
        raise ModelError("no model name given")
    bundled = sorted(path.parent.name for path in BUNDLED.glob("*/config.json"))
    if name in bundled:
        return str(BUNDLED / name)
    folder = provenance.given_path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{name}: the folder holds no config.json, so it is no model in transformers' format")
        return str(folder)
    if name.startswith("tiny-"):
        raise ModelError(f"no bundled model {name!r}: there are {', '.join(bundled) or 'none yet (make models)'}")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise ModelError(f"{name}: no such folder")
    _reach_hub(name)
    return name


def is_folder(name: str) -> bool:
    """Whether a name is that of a bundled model or of a folder, and no hub id."""
    return (BUNDLED / name).is_dir() or provenance.given_path(name).is_dir()


def load_checkpoint(
    name: str, source: str, dtype: torch.dtype, device_map: str | dict | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and the tokenizer at `source` (from `locate`); `name` is for messages only.

    What can be refused without reading weights is refused first. `device_map` None means the CPU.
    Raises `ModelError`.
    """
    bare(name, source)
    if Path(source).is_dir():
        _check_weights(Path(source))
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"{name}: no usable tokenizer ({_brief(error)})") from error
    return _weights(name, source, dtype, device_map), tokenizer


def _reach_hub(name: str) -> None:
    """Fetch the configuration of a hub id, or say why it cannot be had."""
    hint = f"Bundled models need no download; or give a folder (there is none called {name!r} here)."
    try:
        hf_hub_download(name, "config.json")
    except hub_errors.HFValidationError as error:
        raise ModelError(f"{name}: neither a folder nor a valid hub id") from error
    except hub_errors.GatedRepoError as error:
        raise ModelError(
            f"{name} is gated: accept its licence on its page at huggingface.co and set HF_TOKEN in the environment."
        ) from error
    except hub_errors.RepositoryNotFoundError as error:
        raise ModelError(f"{name}: no such model on the hub, or it is private (set HF_TOKEN). {hint}") from error
    except hub_errors.RemoteEntryNotFoundError as error:
        raise ModelError(f"{name}: the hub repository holds no config.json. {hint}") from error
    except OSError as error:  # offline mode, no connection, a server that refuses
        raise ModelError(
            f"{name} is not in the local cache, and the hub cannot be reached (offline, or HF_HUB_OFFLINE is set: "
            f"{_brief(error)}). Download it once while online: `hf download {name}`{_owner(name)}; for Gemma and Llama accept the licence "
            f"on the model's page before, and set HF_TOKEN in the environment. {hint}"
        ) from error


def _owner(name: str) -> str:
    return "" if "/" in name else " (if that is its whole id: most have an owner, such as google/gemma-2-9b)"


def bare(name: str, source: str) -> PreTrainedModel:
    """The model at `source` without weights, on the meta device, so that a wrong architecture costs no download.

    Raises `ModelError` for one that transformers cannot build, or that is laid out in a way we do not know.
    """
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{name}: transformers cannot build this model ({_brief(error)})") from error
    try:
        read_structure(skeleton)
    except ModelError as error:
        raise ModelError(f"{name}: {error}") from error
    return skeleton


def _check_weights(folder: Path) -> None:
    """Open every weight file of a local model; a truncated or damaged one is named."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder}: no .safetensors file (pickled weights are not loaded)")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} is damaged: {_brief(error)}. Copy or download it again.") from error


def _weights(name: str, source: str, dtype: torch.dtype, device_map) -> PreTrainedModel:
    try:
        hf, report = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            device_map=device_map,
            attn_implementation="eager",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{name}: the weights could not be loaded ({_brief(error)})") from error
    # transformers fills what a file lacks with random numbers and only warns
    if report["missing_keys"] or report["mismatched_keys"]:
        lacking = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
        raise ModelError(f"{name}: the weight files lack or misfit {len(lacking)} parameters, first {lacking[0]}")
    return hf


def _brief(error: Exception) -> str:
    """An error of a library on one line of bearable length."""
    return " ".join(str(error).split())[:200]
