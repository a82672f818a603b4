"""Train the tiny models: ``python -m helpers.pretrain tiny-llama3``.

Real architectures (transformers' Llama, Gemma2 and Gemma classes) at 4-5 M parameters, trained from
scratch on `helpers.documents`. A run is a pure function of its `Recipe`: batches follow from the
seed and the batch number, so a killed run resumes from its checkpoint with the batches it missed.

`tiny-llama3-late` is made so that depth and fact lookup point to different layers. It is trained first on text that
names the subjects and states nothing about them; then embeddings and the first blocks stay as they are while the facts are
learned, so that these blocks cannot hold them. The unembedding, tied to the embeddings, stays too: the blocks above must
write an answer in the direction that its word already has.

`tiny-gemma2` puts names together slowly, as large models do. Gemma2 has blocks whose attention is a sliding window; here the first
six of them reach back one token only, so that a name of n tokens is whole after n − 1 blocks, and the end of the prompt learns of it
late. Whether multiple choice is learned under such a limit from the start was not tried: training goes on from `tiny-gemma2-open`,
which has learned it without one.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM

from helpers import facts, splits
from helpers.documents import Corpus
from helpers.vocabulary import build_tokenizer

MODELS = facts.DATA / "models"
FAMILIES = {"llama3": (LlamaConfig, LlamaForCausalLM), "gemma2": (Gemma2Config, Gemma2ForCausalLM), "gemma": (GemmaConfig, GemmaForCausalLM)}
BUCKETS = (24, 40, 80)  # documents are padded to one of these lengths, so that only three shapes are compiled
CHUNK = 4000  # documents drawn together and sorted into batches


@dataclass(frozen=True)
class Recipe:
    """Architecture, data and optimization of one tiny model."""

    family: str
    n_kv_heads: int
    n_layers: int = 12
    d_model: int = 192
    n_heads: int = 6
    d_mlp: int = 448
    n_merges: int = 1600
    steps: int = 3600
    batch_tokens: int = 2304
    answer_weight: float = 8.0  # of a document's last token in the loss
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup: int = 100
    final_rate: float = 0.05  # share of the learning rate left at the last step
    seed: int = 0
    named_steps: int = 0  # before `steps`: on text that names the subjects but states no facts
    frozen_blocks: int = 0  # with the embeddings, fixed after `named_steps`
    without: str = ""  # a split such as first-64: athletes whom no training text mentions
    local_blocks: int = 0  # of Gemma2: the first blocks, whose attention reaches back one token
    start: str = ""  # another tiny model of these sizes and vocabulary, trained before: whose weights to begin with

    def __post_init__(self) -> None:
        if not 0 <= self.frozen_blocks < self.n_layers:
            raise ValueError(f"frozen_blocks={self.frozen_blocks}: of {self.n_layers} blocks at most {self.n_layers - 1} can be frozen")
        if self.frozen_blocks and not self.named_steps:
            raise ValueError(f"frozen_blocks={self.frozen_blocks} without named_steps would freeze random weights")
        if not 0 <= self.local_blocks <= self.n_layers or (self.local_blocks and self.family != "gemma2"):
            raise ValueError(f"local_blocks={self.local_blocks}: only gemma2 has them, and these have {self.n_layers} blocks")


LLAMA3, GEMMA2 = Recipe("llama3", n_kv_heads=2), Recipe("gemma2", n_kv_heads=3)
RECIPES = {
    "tiny-llama3": LLAMA3,
    "tiny-llama3-late": replace(LLAMA3, named_steps=1000, frozen_blocks=4, steps=7000),
    "tiny-llama3-without": replace(LLAMA3, without="first-64"),
    "tiny-gemma2-open": GEMMA2,
    "tiny-gemma2": replace(GEMMA2, local_blocks=6, steps=2400, start="tiny-gemma2-open"),
    "tiny-gemma": Recipe("gemma", n_kv_heads=6, d_mlp=384),
}


def corpus(without: str = "") -> Corpus:
    """The documents about the bundled athletes and world facts; ``without`` leaves out a split of the athletes.

    Raises `FactsError` for a split that is not understood.
    """
    athletes = facts.load("athletes")
    left_out = {f.key for f in splits.split(athletes, without).forget} if without else set()
    return Corpus(athletes.where(lambda f: f.key not in left_out), facts.load("world"))


def tokenizer_for(recipe: Recipe, source: Corpus):
    """The recipe's tokenizer, trained on all subjects and on a fixed sample of general text."""
    rng = random.Random(0)
    general = [source.general(rng) for _ in range(3000)]
    everything = (*source.athletes, *source.world)
    solved = {subject for f in everything for subject, _ in f.relation.examples}
    return build_tokenizer(sorted({f.subject for f in everything} | solved), source.templates() + general, recipe.n_merges)


def new_model(recipe: Recipe, tokenizer):
    """A freshly initialised model. Ties embeddings as Gemma does; sizes follow from the recipe, not from class defaults."""
    config_class, model_class = FAMILIES[recipe.family]
    special = {"query_pre_attn_scalar": recipe.d_model // recipe.n_heads, "sliding_window": 128} if recipe.family == "gemma2" else {}
    if recipe.local_blocks:
        kinds = ["sliding_attention"] * recipe.local_blocks + ["full_attention"] * (recipe.n_layers - recipe.local_blocks)
        special |= {"sliding_window": 2, "layer_types": kinds}  # the window holds the token itself and the one before
    config = config_class(
        vocab_size=len(tokenizer), hidden_size=recipe.d_model, intermediate_size=recipe.d_mlp, num_hidden_layers=recipe.n_layers,
        num_attention_heads=recipe.n_heads, num_key_value_heads=recipe.n_kv_heads, head_dim=recipe.d_model // recipe.n_heads,
        max_position_embeddings=512, tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, attn_implementation="eager", **special)
    torch.manual_seed(recipe.seed)
    return model_class(config)


def batches(source: Corpus, tokenizer, recipe: Recipe, start: int = 0, named: bool = False) -> Iterator[torch.Tensor]:
    """Endless (rows, length) token batches, padded with PAD, from batch number ``start`` on; ``named``: of text without facts.

    Chunks of documents are drawn from (seed, chunk number) and sorted by length into full batches
    of about ``batch_tokens``; the few left over in a chunk are dropped.
    """
    number, chunk = 0, 0
    while True:
        rng = random.Random(f"{'named' if named else 'documents'}-{recipe.seed}-{chunk}")
        chunk += 1
        documents = [source.named(rng) if named else source.document(rng) for _ in range(CHUNK)]
        queues, ready = {b: [] for b in BUCKETS}, []
        for ids in tokenizer(documents)["input_ids"]:
            ids = ids + [tokenizer.eos_token_id]
            bucket = next((b for b in BUCKETS if len(ids) <= b), None)
            if bucket is None:
                continue
            queues[bucket].append(ids + [tokenizer.pad_token_id] * (bucket - len(ids)))
            if len(queues[bucket]) == recipe.batch_tokens // bucket:
                ready.append(queues.pop(bucket))
                queues[bucket] = []
        rng.shuffle(ready)
        for rows in ready:
            if number >= start:
                yield torch.tensor(rows)
            number += 1


def course(source: Corpus, tokenizer, recipe: Recipe, start: int = 0) -> Iterator[torch.Tensor]:
    """The batches of a whole run from step ``start`` on: ``named_steps`` without facts, then ``steps`` with them."""
    yield from islice(batches(source, tokenizer, recipe, start, named=True), max(0, recipe.named_steps - start))
    learned = max(0, start - recipe.named_steps)
    yield from islice(batches(source, tokenizer, recipe, learned), recipe.steps - learned)


def frozen(model, recipe: Recipe) -> list[torch.nn.Parameter]:
    """What the facts may not change: embeddings (and the unembedding tied to them) and the first blocks."""
    parts = [model.model.embed_tokens, *model.model.layers[:recipe.frozen_blocks]] if recipe.frozen_blocks else []
    return [p for part in parts for p in part.parameters()]


def loss_of(model, tokens: torch.Tensor, pad: int, eos: int, answer_weight: float) -> torch.Tensor:
    """Weighted mean next-token loss in nats over real tokens; the last token before EOS counts ``answer_weight`` times.

    That token is the answer. In a multiple choice it is one token of some forty, most of which are
    names and options that nothing predicts: unweighted, their noise drowns it. Padding is on the
    right, so a causal model needs no mask.
    """
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    labels = tokens[:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    closing = F.pad(labels[:, 1:] == eos, (0, 1))
    weights = (labels != pad) * (1 + (answer_weight - 1) * closing)
    return (losses * weights).sum() / weights.sum()


def rate_at(step: int, recipe: Recipe) -> float:
    """Learning rate: linear warm-up, then a cosine down to ``final_rate``; once without facts and once with them."""
    step, steps = (step, recipe.named_steps) if step < recipe.named_steps else (step - recipe.named_steps, recipe.steps)
    warm = min(1.0, (step + 1) / recipe.warmup)
    cosine = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / steps)).item())
    return recipe.learning_rate * warm * (recipe.final_rate + (1 - recipe.final_rate) * cosine)


def train(recipe: Recipe, folder: Path, device: str = "cpu", compiled: bool = True, every: int = 200) -> None:
    """Train to the last step, checkpointing into ``folder``; continue from a checkpoint found there.

    Writes ``curve.csv`` (step, tokens, loss, seconds) and, at the end, the model and tokenizer in
    transformers' format with bf16 weights. bf16 autocast over fp32 weights.
    """
    begin = _weights_of(recipe.start, folder.parent) if recipe.start else {}
    source = corpus(recipe.without)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer_for(recipe, corpus())  # that of all subjects, so that activations can be compared between models
    model = new_model(recipe, tokenizer)
    if begin:
        model.load_state_dict(begin)
    model.to(device).train()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}],
                                  lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True)
    step, tokens, log = _resume(folder, recipe, model, optimizer)
    loss_function = torch.compile(loss_of, dynamic=False) if compiled else loss_of
    began = time.time() - (log[-1]["seconds"] if log else 0)
    last = recipe.named_steps + recipe.steps
    bar = tqdm(total=last, initial=step, desc=folder.name, mininterval=10)
    losses, fixed = [], frozen(model, recipe)
    for batch in course(source, tokenizer, recipe, start=step):
        for p in fixed:
            p.requires_grad_(step < recipe.named_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, recipe)
        batch = batch.to(device)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            loss = loss_function(model, batch, tokenizer.pad_token_id, tokenizer.eos_token_id, recipe.answer_weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        tokens += int((batch != tokenizer.pad_token_id).sum())
        losses.append(loss.item())
        bar.update()
        if step % 50 == 0 or step == last:
            seconds = time.time() - began
            log.append({"step": step, "tokens": tokens, "loss": round(sum(losses) / len(losses), 4), "seconds": round(seconds, 1)})
            bar.set_postfix(loss=log[-1]["loss"], tokens_per_s=int(tokens / seconds))
            losses = []
        if step % every == 0:
            _checkpoint(folder, recipe, model, optimizer, step, tokens, log)
    bar.close()
    export(model, tokenizer, folder, recipe, log)


def _weights_of(name: str, folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a trained tiny model, in fp32, from a folder or among the bundled ones."""
    found = next((place / name for place in (folder, MODELS) if (place / name / "model.safetensors").is_file()), None)
    if found is None:
        raise ValueError(f"training begins with {name}, which is not there: train it first (python -m helpers.pretrain {name})")
    return AutoModelForCausalLM.from_pretrained(found, dtype=torch.float32).state_dict()


def export(model, tokenizer, folder: Path, recipe: Recipe, log: list[dict]) -> None:
    """Save bf16 weights, tokenizer, recipe and curve; drop the checkpoint."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    written = folder / "tokenizer.json"
    content = json.loads(written.read_text(encoding="utf-8"))
    written.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")  # unindented: half the size
    (folder / "recipe.json").write_text(json.dumps(asdict(recipe), indent=1) + "\n")
    with open(folder / "curve.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(log[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(log)
    (folder / "checkpoint.safetensors").unlink(missing_ok=True)


def _checkpoint(folder: Path, recipe: Recipe, model, optimizer, step: int, tokens: int, log: list[dict]) -> None:
    """Weights and both Adam moments, written beside and moved into place: a kill leaves the old checkpoint whole."""
    named = dict(model.named_parameters())
    arrays = {f"weight.{n}": p.detach() for n, p in named.items()}
    for moment in ("exp_avg", "exp_avg_sq"):
        arrays |= {f"{moment}.{n}": optimizer.state[p][moment] for n, p in named.items()}
    state = {"step": str(step), "tokens": str(tokens), "log": json.dumps(log), "recipe": json.dumps(asdict(recipe))}
    temporary = folder / "checkpoint.part"
    save_file({k: v.contiguous().cpu() for k, v in arrays.items()}, temporary, metadata=state)
    os.replace(temporary, folder / "checkpoint.safetensors")


def _resume(folder: Path, recipe: Recipe, model, optimizer) -> tuple[int, int, list[dict]]:
    """Load a checkpoint of the same recipe into model and optimizer; (step, tokens, log), or zeros without one."""
    path = folder / "checkpoint.safetensors"
    if not path.is_file():
        return 0, 0, []
    with safe_open(path, "pt") as file:
        state = file.metadata()
        if Recipe(**json.loads(state["recipe"])) != recipe:
            raise ValueError(f"{path} belongs to another recipe; delete it, or train into another folder")
        step = int(state["step"])
        for name, p in model.named_parameters():
            p.data.copy_(file.get_tensor(f"weight.{name}"))
            optimizer.state[p] = {"step": torch.tensor(float(step), device=p.device), **{m: file.get_tensor(f"{m}.{name}").to(p.device) for m in ("exp_avg", "exp_avg_sq")}}
    return step, int(state["tokens"]), json.loads(state["log"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", choices=sorted(RECIPES), help="which tiny models to train, one after the other")
    parser.add_argument("--out", type=Path, default=MODELS, help="folder that receives one folder a model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: torch's default)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    for name in args.models:
        # Compiling the loss takes a minute and saves a third of the time; it needs a C++ compiler.
        compiled = args.device != "cpu" or shutil.which("g++") is not None or shutil.which("clang++") is not None
        try:
            train(RECIPES[name], args.out / name, args.device, compiled)
        except ValueError as error:
            raise SystemExit(f"{name}: {error}") from None


if __name__ == "__main__":
    main()
