"""Second moments of what `down` reads: the directions in which text lies, and which an edit should leave alone.

    found = covariances(model, [3, 4], texts, n_tokens=20_000, cache="runs/covariances")
    found[3].matrix                     # C = mean of k kᵀ over 20,000 tokens, k the input of `down 3`
    found[3].solve(keys)                # C⁻¹ k
    found[3].null_space(0.005)          # directions that together hold half a per cent of the keys' energy
    preserved(model, split, [3, 4], texts)          # the same, and half of it for the names of facts to retain

Nothing is centred, and the token at the beginning of a text counts like any other: where models keep an outsized
activation there, it is a direction to leave alone. A file in the cache is named by all that decides about its
content: the weights on the way to the key (not `down` itself, so one file serves every edit of `down 3`), the model's
configuration, and the token ids.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from helpers import prompts, provenance
from helpers.chunks import over_rows
from helpers.models import Model
from helpers.prompts import PromptSet
from helpers.splits import Split
from helpers.unlearning.finetune import questions
from helpers.unlearning.forward import hidden_states, layer_of
from helpers.unlearning.terms import Sequences
from helpers.unlearning.texts import general_texts

FORMAT = "covariance 1"
NO_CONTENT = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
ROUNDING = 1e-6  # share of the energy that float32 cannot tell from none


class CovarianceError(ValueError):
    """A second moment that cannot be computed from these texts, or cannot be used as asked."""


@dataclass(frozen=True, eq=False)
class Covariance:
    """C = mean of k kᵀ (d_mlp, d_mlp), float32 on the CPU, over `n_tokens` inputs k of `down` at a layer."""

    matrix: torch.Tensor = field(repr=False)
    layer: int
    n_tokens: int
    key: str

    def solve(self, keys: torch.Tensor, ridge: float = 0.0) -> torch.Tensor:
        """(C + ridge · mean eigenvalue · I)⁻¹ k for keys (n, d_mlp), in float64 where the keys are.

        With fewer tokens than d_mlp, C alone has no inverse. Raises `CovarianceError`.
        """
        matrix = self.matrix.to(keys.device, torch.float64)
        matrix.diagonal().add_(ridge * matrix.diagonal().mean())
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if failed:
            raise CovarianceError(f"layer {self.layer}: the second moment of {self.n_tokens:,} tokens in "
                                  f"{len(matrix):,} dimensions has no inverse with ridge={ridge}; give more text, "
                                  "or a larger ridge")
        return torch.cholesky_solve(keys.double().T, factor).T

    def null_space(self, share: float, device: torch.device | str = "cpu") -> torch.Tensor:
        """(d_mlp, r) orthonormal directions: as many as together hold at most `share` of the keys' mean square.

        Raises `CovarianceError` if there is none.
        """
        values, vectors = torch.linalg.eigh(self.matrix.to(device, torch.float64))
        values = values.clamp(min=0)
        width = int((values.cumsum(0) <= max(share, ROUNDING) * values.sum()).sum())
        if not width:
            raise CovarianceError(f"layer {self.layer}: no direction holds as little as {share} of the keys' energy "
                                  f"over {self.n_tokens:,} tokens")
        return vectors[:, :width]


def covariances(model: Model, layers: Sequence[int], texts: Sequence[str], n_tokens: int | None = None,
                cache: Path | str | None = None, *, length: int = 128, batch_size: int = 64) -> dict[int, Covariance]:
    """Second moments at several layers, of the first `n_tokens` tokens of the texts; None takes all there are.

    Of each text the first `length` tokens are used, and every text is read on its own. `cache`: a folder; a file that
    is there for just this content is read, and damaged ones are made again. Raises `CovarianceError` for too little
    text.
    """
    sequences = _first_tokens(model, texts, n_tokens, length)
    keys = _keys(model, layers, sequences)
    files = {} if cache is None else {layer: Path(cache) / f"{key}.safetensors" for layer, key in keys.items()}
    found = {layer: matrix for layer, path in files.items() if (matrix := _read(path, keys[layer])) is not None}
    missing = [layer for layer in keys if layer not in found]
    if missing:
        found |= _second_moments(model, missing, sequences, batch_size)
    n_tokens = int(sequences.mask.sum())
    for layer in missing:
        if files:
            meta = {"format": FORMAT, "key": keys[layer], "layer": str(layer), "n_tokens": str(n_tokens)}
            provenance.write_atomic(files[layer], partial(save_file, {"matrix": found[layer]}, metadata=meta))
    return {layer: Covariance(found[layer], layer, n_tokens, key) for layer, key in keys.items()}


def preserved(model: Model, split: Split, layers: Sequence[int], texts: Sequence[str], format: str = "one_shot", names: float = 0.5,
              n_tokens: int | None = None, cache: Path | str | None = None) -> dict[int, Covariance]:
    """C = (1 − names) · C_text + names · C_names: second moments in which names have a say.

    Facts are looked up at the last token of a name. Among the tokens of text these are so few that an edit which goes by
    C_text pays next to nothing for moving them. C_names is over the keys of `split.retain_train` there, asked in
    `format`, and scaled to the energy of C_text. `texts`, `n_tokens` and `cache` are those of `covariances`. Raises
    `CovarianceError` for a share outside 0 to 1.
    """
    if not 0 <= names <= 1:
        raise CovarianceError(f"names={names}: it is a share, from 0 to 1")
    found = covariances(model, layers, texts, n_tokens, cache)
    if not names:
        return found
    keys = keys_of_names(model, questions(model, split.retain_train, split, format), layers)
    mixed = {}
    for layer, text in found.items():
        own = (keys[layer].T @ keys[layer]).cpu()
        if not own.isfinite().all():
            raise CovarianceError(f"layer {layer}: what `down` reads is not a finite number at every name to retain; nothing was changed")
        own *= text.matrix.diagonal().sum() / own.diagonal().sum()
        mixed[layer] = replace(text, matrix=(1 - names) * text.matrix + names * own)
    return mixed


@torch.no_grad()
def keys_of_names(model: Model, asked: PromptSet, layers: Sequence[int], batch_size: int = 64) -> dict[int, torch.Tensor]:
    """Layer → (n, d_mlp) what `down` reads at the last token of each prompt's subject, float32 or more."""
    def work(rows: torch.Tensor) -> dict[int, torch.Tensor]:
        part = asked[rows].to(model.device)
        with reading(model, layers) as seen:
            hidden_states(model, part.tokens, part.mask, stop=max(layers) + 1)
        at = torch.arange(len(part)), part.subject[:, 1].cpu() - 1
        return {layer: keys[at].to(torch.promote_types(keys.dtype, torch.float32)) for layer, keys in seen.items()}

    parts = over_rows(work, len(asked), batch_size)
    return {layer: torch.cat([part[layer] for part in parts]) for layer in layers}


def texts_to_preserve(split: Split, seed: int = 0, formats: Sequence[str] = ("cloze", "one_shot")) -> list[str]:
    """Text for the tiny models: general text, and the facts to retain with their true answers in these formats.

    A large model's covariance comes from an encyclopedia, full of names; general text alone would leave the keys of
    names unprotected here. The facts are those that other methods see as retain set, `retain_train`.
    """
    kept = split.retain_train
    options = {"one_shot": {"pool": kept}}
    asked = [prompt for name in formats for prompt in prompts.FORMATS[name](kept, **options.get(name, {}))]
    texts = [*general_texts(), *(f"{prompt.text} {prompt.options[0]}" for prompt in asked)]
    random.Random(f"preserve-{seed}").shuffle(texts)
    return texts


@contextmanager
def reading(model: Model, layers: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Within the block: layer → what `down` read in the last pass, (b, length, d_mlp)."""
    seen: dict[int, torch.Tensor] = {}

    def note(layer: int, _, inputs: tuple) -> None:
        seen[layer] = inputs[0].detach()

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(model.part("down", layer).register_forward_pre_hook(partial(note, layer)).remove)
        yield seen


@torch.no_grad()
def _second_moments(model: Model, layers: Sequence[int], sequences: Sequences,
                    batch_size: int) -> dict[int, torch.Tensor]:
    device = {layer: model.part("down", layer).weight.device for layer in layers}
    sums = {layer: torch.zeros(model.d_mlp, model.d_mlp, dtype=torch.float64, device=device[layer]) for layer in layers}

    def add(rows: torch.Tensor) -> None:
        tokens, mask = sequences.batch(rows, model.device)
        with reading(model, layers) as seen:
            hidden_states(model, tokens, mask, stop=max(layers) + 1)
        products = {}
        for layer, keys in seen.items():
            keys = keys[mask.bool().to(keys.device)]
            keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
            products[layer] = keys.T @ keys
        for layer, product in products.items():  # last: a pass that ran out of memory is done again
            sums[layer] += product

    over_rows(add, len(sequences), batch_size, sequences.lengths.argsort(stable=True))
    for layer, total in sums.items():
        if not total.isfinite().all():
            raise CovarianceError(f"layer {layer}: what `down` reads is not a finite number for every token of the "
                                  "texts; nothing was changed")
    return {layer: (total / int(sequences.mask.sum())).float().cpu() for layer, total in sums.items()}


def _first_tokens(model: Model, texts: Sequence[str], n_tokens: int | None, length: int) -> Sequences:
    if not len(texts):
        raise CovarianceError("no texts: a second moment needs some")
    sequences = Sequences.of_texts(model.tokenizer, texts, length)
    there = int(sequences.mask.sum())
    if n_tokens is None:
        return sequences
    if not 0 < n_tokens <= there:
        raise CovarianceError(f"n_tokens={n_tokens:,}: the {len(texts):,} texts have {there:,} "
                              f"(of each its first {length} tokens)")
    mask = sequences.mask * (sequences.mask.flatten().cumsum(0) <= n_tokens).view(sequences.mask.shape)
    rows = mask.any(1)
    return Sequences(sequences.tokens[rows], mask[rows])


def _keys(model: Model, layers: Sequence[int], sequences: Sequences) -> dict[int, str]:
    """Layer → name of the content: weights that the input of `down` depends on, configuration, tokens."""
    config = {name: value for name, value in model.hf.config.to_dict().items() if name not in NO_CONTENT}
    tokens = digest(sequences.tokens * sequences.mask) + digest(sequences.mask)
    layer_named = {name: layer_of(model, name) for name, _ in model.hf.named_parameters()}
    weights = {name: digest(p.detach()) for name, p in model.hf.named_parameters() if layer_named[name] <= max(layers)}
    keys = {}
    for layer in sorted(set(layers)):
        after = tuple(f"{model.path(role, layer)}." for role in ("down", "mlp_post_norm") if role in model.roles)
        used = [item for item in weights.items() if layer_named[item[0]] <= layer and not item[0].startswith(after)]
        content = json.dumps([FORMAT, layer, config, tokens, used], sort_keys=True, default=str)
        keys[layer] = provenance.text_hash(content)
    return keys


def digest(tensor: torch.Tensor) -> str:
    """sha256 of dtype, shape and bits."""
    bits = tensor.contiguous().cpu().view(-1).view(torch.uint8).numpy()
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(bits).hexdigest()}"


def _read(path: Path, key: str) -> torch.Tensor | None:
    """The matrix in a file of the cache; None if there is no such file, or a damaged one."""
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor("matrix") if (file.metadata() or {}).get("key") == key else None
    except (OSError, SafetensorError):
        return None
