"""General ability: what an edit costs beside the facts.

    before = ability.on_texts(model, texts)
    with edit.applied(model):
        after = ability.on_texts(model, texts)
    ability.says(model, ["Fact: LeBron James plays the sport of"])
    ability.on_questions(model)                      # MMLU and SciQ by lm_eval: pip install -e ".[ability]"

`on_texts` needs nothing but texts and says the same thing about a tiny model as about a large one. Multiple-choice benchmarks (spec
section 5.1) are for models of a billion parameters and more; smaller ones are at chance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd

from helpers import metrics
from helpers.models import Model
from helpers.unlearning.scores import text_accuracy

TASKS = ("mmlu", "sciq")
SUBSET = {"mmlu": 2, "sciq": 100}  # the first questions of each: MMLU has 57 subjects, so 114
COLUMNS = ["measure", "value", "stderr", "n"]


class AbilityError(ValueError):
    """A benchmark that cannot be run; the message says what is missing."""


def says(model: Model, prompts: Sequence[str], n_tokens: int = 2) -> list[str]:
    """What the model goes on with, by its own greedy generation: at most `n_tokens` tokens, without the spaces around them."""
    said = []
    for prompt in prompts:
        encoded = model.tokenizer(prompt, return_tensors="pt").to(model.device)
        ids, mask = encoded["input_ids"], encoded["attention_mask"]
        made = model.hf.generate(input_ids=ids, attention_mask=mask, max_new_tokens=n_tokens, do_sample=False)
        said.append(model.tokenizer.decode(made[0, ids.shape[1]:], skip_special_tokens=True).strip())
    return said


def on_texts(model: Model, texts: Sequence[str], batch_size: int = 16) -> pd.DataFrame:
    """`perplexity` (exp of the mean next-token loss over all tokens) and `next-token accuracy` on texts.

    Columns measure, value, stderr (none), n (texts).
    """
    values = {"perplexity": math.exp(metrics.text_loss(model, texts, batch_size)),
              "next-token accuracy": text_accuracy(model, texts, batch_size=batch_size)}
    rows = [{"measure": name, "value": value, "stderr": math.nan, "n": len(texts)} for name, value in values.items()]
    return pd.DataFrame(rows)[COLUMNS]


def on_questions(model: Model, tasks: Sequence[str | dict] = TASKS, subset: Mapping[str, int] | None = SUBSET,
                 batch_size: int = 8) -> pd.DataFrame:
    """Accuracy on tasks of lm_eval, without examples in the prompt; columns measure (the task), value, stderr (binomial), n (questions).

    Args:
        tasks: names of tasks or groups, or the harness's own configurations as dicts.
        subset: how many questions of each task, or of each part of a group, the first ones; None for all of them
            (MMLU: 14,042). Tasks it does not name are asked whole.

    The model is used as it is, edited or not. Raises `AbilityError` where lm_eval is not installed, and for tasks whose questions
    cannot be had.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise AbilityError(f"benchmarks need lm_eval, which is not installed ({error}): pip install -e \".[ability]\"") from error
    served = HFLM(pretrained=model.hf, tokenizer=model.tokenizer, batch_size=batch_size)
    rows = []
    for task in tasks:
        name = task["task"] if isinstance(task, dict) else task
        try:
            found = simple_evaluate(served, tasks=[task], num_fewshot=0, limit=(subset or {}).get(name), bootstrap_iters=0,
                                    log_samples=False)
        except (OSError, ValueError, KeyError) as error:  # offline, no such task, a data set that is gone
            raise AbilityError(f"{name}: cannot be asked ({' '.join(str(error).split())[:300]})") from error
        share, n = found["results"][name]["acc,none"], sum(part["effective"] for part in found["n-samples"].values())
        rows.append({"measure": name, "value": share, "stderr": math.sqrt(share * (1 - share) / n), "n": n})
    return pd.DataFrame(rows)[COLUMNS]
