"""General ability: texts by hand, questions through lm_eval (where it is installed) against the model's own logits."""

import json
import math
import sys
import types

import pytest
import small
import torch

from helpers import ability
from helpers.ability import AbilityError


def test_texts_by_hand():
    model = small.model("gemma2")
    found = ability.on_texts(model, small.TEXTS, batch_size=5).set_index("measure")
    losses, right = [], []
    for text in small.TEXTS:
        ids = torch.tensor([model.tokenizer(text)["input_ids"]])
        logits = model.hf(ids, use_cache=False).logits[0, :-1]
        losses += (-logits.log_softmax(-1)[torch.arange(len(logits)), ids[0, 1:]]).tolist()
        right += (logits.argmax(-1) == ids[0, 1:]).tolist()
    assert found.loc["perplexity", "value"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert found.loc["next-token accuracy", "value"] == pytest.approx(sum(right) / len(right))
    assert found["n"].tolist() == [len(small.TEXTS)] * 2


@pytest.mark.parametrize("family", ["gemma2", "neox"])
def test_generation_is_greedy(family):
    model, prompts = small.model(family), ["w5 w6 w7", "w8"]
    for prompt, said in zip(prompts, ability.says(model, prompts, 3)):
        ids = torch.tensor([model.tokenizer(prompt)["input_ids"]])
        for _ in range(3):
            ids = torch.cat([ids, model.hf(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        assert said == model.tokenizer.decode(ids[0, -3:], skip_special_tokens=True).strip()


def test_questions_need_the_harness(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(AbilityError, match=r'need lm_eval, which is not installed .*pip install -e "\.\[ability\]"'):
        ability.on_questions(small.model())


def task(tmp_path, n: int = 12) -> dict:
    """A task of the harness with local questions of one word an option."""
    rows = [{"question": f"w{5 + i} w{20 + i}", "options": ["w40", "w41", "w42", "w43"], "label": i % 4} for i in range(n)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = {"data_files": {"test": str(tmp_path / "rows.jsonl")}}
    return {"task": "own", "dataset_path": "json", "dataset_kwargs": files, "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{options}}", "doc_to_target": "label",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]}


@pytest.mark.parametrize("subset, n", [(None, 12), ({"own": 5}, 5)])
def test_the_harness_sees_this_model(tmp_path, subset, n):
    pytest.importorskip("lm_eval")
    model = small.model("llama")
    row = ability.on_questions(model, [task(tmp_path)], subset).iloc[0]
    right = 0
    for i in range(n):
        ids = torch.tensor([model.tokenizer(f"w{5 + i} w{20 + i}")["input_ids"]])
        logits = model.hf(ids, use_cache=False).logits[0, -1]
        right += int(logits[[40, 41, 42, 43]].argmax()) == i % 4
    assert (row["measure"], row["n"]) == ("own", n) and row["value"] == pytest.approx(right / n)


def test_groups_count_the_questions_of_their_parts(monkeypatch):
    """What the harness answers for a group such as MMLU: the share for the group, numbers for each part."""
    asked = []

    def simple_evaluate(served, tasks, limit, **options):
        asked.append((tasks, limit, options["num_fewshot"]))
        counts = {f"mmlu_{part}": {"original": 100, "effective": limit} for part in ("a", "b", "c")}
        return {"results": {"mmlu": {"acc,none": 2 / 3}, **{part: {"acc,none": 0.5} for part in counts}}, "n-samples": counts}

    monkeypatch.setitem(sys.modules, "lm_eval", types.SimpleNamespace(simple_evaluate=simple_evaluate))
    monkeypatch.setitem(sys.modules, "lm_eval.models", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", types.SimpleNamespace(HFLM=lambda **given: given["pretrained"]))
    row = ability.on_questions(small.model(), ["mmlu"]).iloc[0]
    assert asked == [(["mmlu"], 2, 0)] and (row["measure"], row["n"]) == ("mmlu", 6)
    assert (row["value"], row["stderr"]) == pytest.approx((2 / 3, math.sqrt(2 / 9 / 6)))


def test_unknown_tasks_are_named():
    pytest.importorskip("lm_eval")
    with pytest.raises(AbilityError, match="no_such_task: cannot be asked"):
        ability.on_questions(small.model(), ["no_such_task"])
