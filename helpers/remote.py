"""Reading and patching a model that runs on other people's machines (NDIF, ndif.us). UNTESTED against the service.

    remote.run("meta-llama/Meta-Llama-3-8B", prompts, read=[("resid_post", 12)], agreed=True)

What was tested is nnsight's simulation of the way there and back (`where="local"`). The prompts, and the values put into the model, leave
this machine; nothing does before `agreed=True`, and what goes where is printed. The service wants an account's key in the environment
(NDIF_API_KEY) and has models of its own choice loaded. Editing weights is not possible there.

Beside `helpers.tracing` the only file that speaks nnsight: here the model is a name, and no module of it is in memory.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from nnsight import CONFIG, TransformersModel
from transformers import AutoTokenizer

from helpers import checkpoints, memory
from helpers.interventions import Intervention
from helpers.sites import Batch, Step, TracingError, feature_shape, place
from helpers.tracing import Trace

INPUTS = (Step.BLOCK_IN, Step.HEADS, Step.NEURONS)
PLACES = {"ndif": True, "local": "local"}  # ours -> nnsight's


def run(name: str, prompts, interventions: Sequence[Intervention] = (), read: Sequence[tuple[str, int]] = (), agreed: bool = False,
        where: str = "ndif") -> Trace:
    """Logits, and the activations named in `read` at every position, of one pass over there; as `tracing.intervene`.

    `interventions` put given values, or zero, in place of others or add to them. `where="local"` goes the same way without a server,
    on weights that are here. Raises `TracingError` without `agreed=True`, for cuts of attention, `mean`, `resample` and attention
    patterns; for NDIF without a key, or with a model that lies here; `ModelError` as loading does.
    """
    if where not in PLACES:
        raise TracingError(f"where={where!r}: there are {', '.join(PLACES)}")
    batch = Batch.of(prompts)
    if not agreed:
        raise TracingError(f"this would send {len(batch)} prompts and {len(interventions)} interventions to NDIF, other people's machines: "
                           "pass agreed=True if they may leave")
    for edit in interventions:
        if not isinstance(edit, Intervention) or edit.needs_clean:
            raise TracingError(f"{edit}: only given values can be set or added over there")
    if where == "ndif":
        _ready(name)
    model = memory.skeleton(name)
    agenda = [_edit(model, batch, edit) for edit in interventions] + [_read(model, *pair) for pair in read]
    agenda.sort(key=lambda entry: entry[0])
    steps = [entry[1:] for entry in agenda]
    source = checkpoints.locate(name)
    view = TransformersModel(source, task="text-generation", tokenizer=AutoTokenizer.from_pretrained(source), attn_implementation="eager")
    inputs = dict(input_ids=batch.tokens, attention_mask=batch.mask.long(), position_ids=batch.position_ids, use_cache=False)
    print(f"{len(batch)} prompts and {len(interventions)} interventions go to {'NDIF' if where == 'ndif' else 'a simulation of NDIF'}")
    # The block is sent as source text: it may use torch, nnsight and plain values, and nothing of ours.
    with view.trace(inputs, remote=PLACES[where]):
        kept = list().save()
        for path, is_input, touched, value, adds in steps:
            module = view.get(path)
            found = module.input if is_input else module.output
            activation = found[0] if isinstance(found, tuple) else found
            if touched is None:
                kept.append(activation.clone())
                continue
            there = value.to(activation.device, activation.dtype)
            changed = torch.where(touched.to(activation.device), activation + there if adds else there, activation)
            if is_input:
                module.input = changed
            else:
                module.output = (changed, *found[1:]) if isinstance(found, tuple) else changed
        logits = view.output.logits.save()
    rows = torch.arange(len(batch))
    last = logits.cpu()[rows, batch.last]
    values = iter(kept)
    found = {key: next(values).cpu() for key in (entry[0][3] for entry in agenda) if key}
    shaped = {(site, layer): value.reshape(*batch.tokens.shape, *feature_shape(model, site)) for (site, layer), value in found.items()}
    return Trace(last.to(torch.promote_types(last.dtype, torch.float32)), shaped)


def _ready(name: str) -> None:
    """Refuses what NDIF would: models that are no hub id, and nobody's account."""
    if checkpoints.is_folder(name):
        raise TracingError(f"{name} lies on this machine: NDIF serves models by hub id, such as meta-llama/Meta-Llama-3-8B")
    if not (os.environ.get("NDIF_API_KEY") or CONFIG.API.APIKEY):
        raise TracingError("no key of an NDIF account: set NDIF_API_KEY in the environment")


def _read(model, site: str, layer: int) -> tuple:
    """((layer, step, after edits, site and layer), path, whether the input is meant, no edit)."""
    if site == "attn_pattern":
        raise TracingError("attn_pattern cannot be read over there")
    step, role = place(model, site, layer)
    return (layer, step, 1, (site, layer)), model.path(role, layer), step in INPUTS, None, None, False


def _edit(model, batch: Batch, edit: Intervention) -> tuple:
    """The same, with what is touched and the values as plain tensors (n, length, width)."""
    step, role = place(model, edit.site, edit.layer)
    ready, rows = edit.prepare(model, batch, None), torch.arange(len(batch))
    nothing = torch.zeros(*batch.tokens.shape, *feature_shape(model, edit.site))
    touched, value = (part.flatten(2) for part in (ready.touches(nothing, rows), ready.apply(nothing, rows)))
    return (edit.layer, step, 0, ()), model.path(role, edit.layer), step in INPUTS, touched, value, edit.op == "add"
