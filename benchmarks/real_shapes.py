"""What localizing and editing take at the size of real models: random weights, so that nothing is downloaded.

    python -m benchmarks.real_shapes gemma-2-9b llama-3-8b      # on a GPU of 80 GB or more: some minutes a model
    python -m benchmarks.real_shapes gemma-2-9b --width 0.06    # as many layers and heads, narrow: runs on a laptop

What a pass costs does not depend on what a model has learned. It runs with any torch and transformers that the helpers run with, and
without nnsight, which attribution patching alone needs; without it that row is missing, and a line says so.

The lookup edit is compared with a plain loop of transformers and torch.optim in the same run; localization with the passes that
patching one component at a time would take, times the seconds of one. `share` is that of the card's rate at a large matrix product,
measured here: what the matrices of the model multiplied (attention's products of queries and keys left out), by the seconds. Memory is
what torch had allocated at most, weights included; on a CPU it is not measured. Bars hold for full width on a GPU.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import plain
from benchmarks.report import judge, save
from helpers import facts, memory, presets, prompts, selection
from helpers.checkpoints import locate
from helpers.localization import causal_tracing, fact_lookup, probes
from helpers.localization.counterfactual import Pairs, pairs
from helpers.localization.engine import Run, flush_right
from helpers.models import Model
from helpers.promptsets import PromptSet
from helpers.splits import Split, split
from helpers.unlearning.finetune import finetune
from helpers.unlearning.lora import finetune_lora
from helpers.unlearning.objectives import Relearn
from helpers.unlearning.texts import general_texts
from helpers.unlearning.training import Settings

TOKENIZER = "tiny-llama3"  # bundled; its vocabulary is a part of any real one's
SECONDS = {"fact lookup and attribution": 60.0, "causal tracing": 180.0, "edit, lookup": 90.0}
GIB, SHARE, AIM = 45e9 / 2**30, 0.30, 0.40  # of the edit with the lookup mask
LOOP = "edit, lookup, plain loop"
SAMPLES = 3  # of noise, in causal tracing


def build(name: str, width: float, device: str, dtype: torch.dtype, seed: int = 0) -> Model:
    """A model of this shape with random weights large enough for every part to matter, made where it is used."""
    config = presets.config(name, width)
    with torch.device(device):
        hf = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
    return Model.of(hf.eval().requires_grad_(False), AutoTokenizer.from_pretrained(locate(TOKENIZER)), name)


def texts(n: int, tokens: int = 100) -> list[str]:
    """General texts long enough for the text term to read as many tokens as on a real text."""
    short = general_texts(n)
    return [" ".join(short[(i + k) % n] for k in range(tokens // 4)) for i in range(n)]


class Multiplied:
    """Counts what the model's matrices multiply within the block, forward and backward, at no cost worth mentioning."""

    def __init__(self, model: Model):
        self.model, self.work = model, 0.0

    def __enter__(self) -> Multiplied:
        with ExitStack() as stack:
            for module in self.model.hf.modules():
                if isinstance(module, nn.Linear):
                    stack.callback(module.register_forward_hook(self._note).remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def _note(self, module: nn.Linear, inputs: tuple, output: torch.Tensor) -> None:
        gradients = (inputs[0].requires_grad + module.weight.requires_grad) * torch.is_grad_enabled()
        self.work += 2 * output.numel() * module.in_features * (1 + gradients)


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """Multiplications and additions a second of a large matrix product, the best of some."""
    size = 8192 if device != "cpu" else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = [cost(lambda: left @ right, device)[0] for _ in range(8)]
    return 2 * size**3 / min(times[2:])


def cost(call: Callable[[], object], device: str) -> tuple[float, float]:
    """Seconds, and GiB allocated at most (NaN on a CPU)."""
    gpu = device != "cpu"
    if gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    call()
    if gpu:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, torch.cuda.max_memory_allocated(device) / memory.GIB if gpu else math.nan


def localizations(model: Model, twins: Pairs, probed: PromptSet, batch_size: int) -> dict[str, tuple[Callable[[], object], float]]:
    """What to time, and how many passes over these prompts one component at a time would take."""
    layers, heads = model.n_layers, model.n_layers * model.n_heads
    batch = flush_right(probed)

    def probe() -> None:
        runs = (Run(model, batch[rows]) for rows in batch.chunks(batch_size))
        read = lambda run: torch.stack([run["resid_post", layer][:, -1].float().cpu() for layer in range(layers)], dim=1)
        probes.cross_validate(torch.cat([read(run) for run in runs]), [fact.answer for fact in probed.facts])

    work = {
        "fact lookup": (lambda: fact_lookup.counterfact(model, twins, samples=100, batch_size=batch_size), heads + layers + 2),
        "causal tracing": (
            lambda: causal_tracing.trace_components(model, twins.clean, ("attn", "mlp"), samples=SAMPLES, batch_size=batch_size),
            SAMPLES * (2 * layers + 1) + 1,
        ),
        "probes": (probe, math.nan),
    }
    try:
        from helpers.localization.attribution import attribute
    except ImportError as error:
        print(f"attribution patching is left out: {error}")
        return work
    return {**work, "attribution": (lambda: attribute(model, twins, batch_size=batch_size), 5)}


def edits(model: Model, given: Split, general: list[str], settings: Settings) -> dict[str, Callable[[], object]]:
    """Edits by mask, and relearning."""
    # fp32 copies of most weights of a large model fit no card: pure bf16 there, as published
    masks = {presets.likely_lookup(model): True, selection.all_mlps(model): False, selection.everything(model): False}
    training = {mask.name: partial(finetune, model, given, mask, "edit", replace(settings, masters=masters), general)
                for mask, masters in masks.items()}
    relearning = replace(settings, learning_rate=2e-4, steps=max(1, settings.steps * 2 // 5), batch=32, clip=None)
    again = partial(finetune_lora, model, given, Relearn(), relearning, general)
    return {**{f"edit, {name}": call for name, call in training.items()}, "relearning, LoRA": again}


def measure(name: str, options: argparse.Namespace) -> pd.DataFrame:
    """One row a piece of work on one model."""
    dtype = torch.bfloat16 if options.device != "cpu" else torch.float32
    model = build(name, options.width, options.device, dtype)
    athletes = facts.load("athletes")
    given = split(athletes, f"first-{options.facts}")
    twins = pairs(model, given.forget, "cloze", partners=athletes, minimum=2)
    ready = twins.clean.to(options.device)
    rate = matrix_rate(options.device, dtype)
    forward = lambda: model.hf(input_ids=ready.tokens, attention_mask=ready.mask, position_ids=ready.position_ids, use_cache=False)
    with torch.no_grad():
        one = min(cost(forward, options.device)[0] for _ in range(3))
    rows = []

    def run(work: str, call: Callable[[], object], plain_seconds: float = math.nan) -> None:
        try:
            with Multiplied(model) as counted:
                seconds, gib = cost(call, options.device)
        except (MemoryError, torch.OutOfMemoryError) as error:
            print(f"{name}, {work}: does not fit ({' '.join(str(error).split())[:120]})")
            seconds, gib = math.nan, math.nan
        share = counted.work / seconds / rate
        rows.append({"model": name, "work": work, "seconds": seconds, "plain_seconds": plain_seconds, "gib": gib, "share": share})
        print(f"{name}, {work}: {seconds:.1f} s, {gib:.1f} GiB, {share:.0%} of {rate / 1e12:.3g} TFLOP/s", flush=True)

    probed = prompts.build(model.tokenizer, athletes[: options.probed], "cloze")
    for work, (call, passes) in localizations(model, twins, probed, options.batch).items():
        run(work, call, passes * one)
    settings = Settings(learning_rate=1e-5, steps=options.steps, chunk=options.chunk)
    general = texts(512)
    for work, call in edits(model, given, general, settings).items():
        if options.everything or work != "edit, everything":
            run(work, call)
    with plain.lent(model):  # its copy of all weights is not part of the loop's time
        run(LOOP, lambda: plain.train(model, given, general, settings, list(presets.likely_lookup(model).entries)))
    length = prompts.build(model.tokenizer, given.forget, settings.format).tokens.shape[1]
    told = {"pairs": len(twins), "cloze_tokens": ready.tokens.shape[1], "prompt_tokens": length, "one_pass": one, "tflops": rate / 1e12}
    return pd.DataFrame(rows).assign(**told)


def verdicts(table: pd.DataFrame, full: bool) -> pd.DataFrame:
    """The bars of each model; what was not measured, or at another size, is not judged."""
    rows = []
    for name, part in table.groupby("model", sort=False):
        found = part.set_index("work")
        seconds = found["seconds"].to_dict()
        seconds["fact lookup and attribution"] = seconds["fact lookup"] + seconds.get("attribution", math.nan)
        lines = [(work, "seconds", seconds.get(work, math.nan), bar, None, False) for work, bar in SECONDS.items()]
        lines += [("edit, lookup", "GiB", found["gib"].get("edit, lookup", math.nan), GIB, None, False),
                  ("edit, lookup", "share of the matrix rate", found["share"].get("edit, lookup", math.nan), SHARE, AIM, True)]
        for work, what, value, bar, aim, at_least in lines:
            verdict = judge(value, bar, aim, at_least) if full else "not judged at this size"
            rows.append({"model": name, "work": work, "what": what, "value": value, "verdict": verdict})
    return pd.DataFrame(rows)


def arguments(given: Iterable[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_shapes", description="Localizing and editing at real sizes.")
    parser.add_argument("models", nargs="+", help="names in data/presets.yaml")
    parser.add_argument("--width", type=float, default=1.0, help="of all matrices, 1 for the real one")
    parser.add_argument("--facts", type=int, default=64)
    parser.add_argument("--probed", type=int, default=500, help="facts that probes are fitted on")
    parser.add_argument("--steps", type=int, default=50, help="of an edit")
    parser.add_argument("--chunk", type=int, default=16, help="rows of a training pass")
    parser.add_argument("--batch", type=int, default=16, help="prompts of a localization at a time")
    parser.add_argument("--everything", action="store_true", help="also edit with all weights: 90 GB or more at full width")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/real_shapes.json"))
    return parser.parse_args(given)


if __name__ == "__main__":
    asked = arguments()
    measured = pd.concat([measure(name, asked) for name in asked.models], ignore_index=True)
    judged = verdicts(measured, asked.width == 1.0 and asked.device != "cpu")
    save(asked.out, {"measured": measured, "bars": judged}, **{key: str(value) for key, value in vars(asked).items()})
