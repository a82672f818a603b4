"""The benchmark at the size of real models: what it counts, what it judges, and that it needs no nnsight."""

import subprocess
import sys

import families
import pandas as pd
import pytest
import small
import torch

from benchmarks.measure import counted
from benchmarks.real_shapes import LOOP, Multiplied, arguments, build, measure, texts, verdicts


@pytest.mark.parametrize("family", families.FAMILIES)
def test_work_is_that_of_the_matrices(family):
    """What torch itself counts, but for the products of queries, keys and values."""
    model, prompts = small.model(family), families.prompts(lengths=(9,) * 5)
    parameter = model.hf.get_parameter(f"{model.path('down', 1)}.weight").requires_grad_(True)

    def train() -> None:
        model.hf(input_ids=prompts.tokens, attention_mask=prompts.mask).logits.square().sum().backward()

    with Multiplied(model) as found:
        _, every = counted(train)
    parameter.requires_grad_(False)
    attention = 2 * 2 * 5 * 9 * 9 * model.n_heads * model.d_head
    # forward in three layers; from the trained matrix on the layer above it is differentiated, both products for both inputs
    assert found.work == pytest.approx(every - 3 * attention - 2 * attention)


def test_bars_are_judged_at_full_size_only():
    rows = [("fact lookup", 20.0, 30.0, 0.1), ("attribution", 30.0, 30.0, 0.1), ("causal tracing", 200.0, 30.0, 0.1),
            ("edit, lookup", 80.0, 40.0, 0.35)]
    table = pd.DataFrame([{"model": "m", "work": w, "seconds": s, "gib": g, "share": r} for w, s, g, r in rows])
    found = verdicts(table, True).set_index(["work", "what"])["verdict"]
    assert found["fact lookup and attribution", "seconds"] == "pass (bar 60)"
    assert found["causal tracing", "seconds"] == "FAIL (bar 180)"
    assert found["edit, lookup", "share of the matrix rate"] == "pass (bar 0.3)"
    assert set(verdicts(table, False)["verdict"]) == {"not judged at this size"}
    without = verdicts(table[table["work"] != "attribution"], True).set_index("work")["verdict"]
    assert without["fact lookup and attribution"].startswith("not measured")


def test_the_whole_of_it_on_a_narrow_model():
    """Every line of the report, made; the plain loop gives the weights back."""
    options = arguments(["qwen3-0.6b", "--width", "0.02", "--facts", "8", "--steps", "1", "--probed", "40", "--everything", "--device", "cpu"])
    table = measure("qwen3-0.6b", options)
    assert table["work"].tolist() == ["fact lookup", "causal tracing", "probes", "attribution", "edit, lookup", "edit, all MLPs", "edit, everything",
                                      "relearning, LoRA", LOOP]
    assert (table["seconds"] > 0).all() and table["gib"].isna().all() and (table.set_index("work")["share"].drop("probes") > 0).all()
    assert set(verdicts(table, False)["verdict"]) == {"not judged at this size"}


def test_texts_are_as_long_as_training_reads():
    model = build("qwen3-0.6b", 0.02, "cpu", torch.float32)
    assert all(len(ids) >= 100 for ids in model.tokenizer(texts(20))["input_ids"])
    assert (model.n_layers, model.n_heads) == (28, 16) and not any(p.requires_grad for p in model.hf.parameters())


def test_it_runs_without_nnsight_and_notebook_packages():
    block = "import sys; sys.modules.update(dict.fromkeys(('nnsight', 'IPython', 'pydantic', 'datasets', 'papermill', 'transformer_lens')))"
    code = f"{block}; import benchmarks.real_shapes as b; print(b.arguments(['gemma-2-9b', '--width', '0.1']).width)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "0.1", done.stderr
    assert arguments(["llama-3-8b"]).steps == 50
