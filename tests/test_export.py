"""Out again: an edited model answers in two lines of transformers, elsewhere, and travels as a small file."""

import subprocess
import sys

import families
import pytest
import small
import torch

from helpers.models import load_model
from helpers.selection import all_mlps
from helpers.unlearning.edit import Edit
from helpers.unlearning.finetune import finetune
from helpers.unlearning.training import Settings

PROMPT = "w5 w6 w7"
TWO_LINES = """
from transformers import pipeline
print(pipeline("text-generation", {folder!r})({prompt!r}, max_new_tokens=4, do_sample=False, return_full_text=False)[0]["generated_text"])
"""


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_generates_elsewhere(family, tmp_path):
    base = families.save(family, tmp_path / "base")
    model = load_model(str(base), device="cpu", check=False)
    chosen = all_mlps(model)
    edit = finetune(model, small.a_split(), chosen, "edit", Settings(steps=20, learning_rate=3e-2, text_tokens=8), small.TEXTS)
    ids = model.tokenizer(PROMPT, return_tensors="pt")["input_ids"]

    def says() -> str:
        tokens = ids
        for _ in range(4):
            tokens = torch.cat([tokens, model.hf(tokens, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        return model.tokenizer.decode(tokens[0, ids.shape[1]:], skip_special_tokens=True)

    before = says()
    with edit.applied(model):
        after = says()
    exported = edit.export(model, tmp_path / "edited")
    assert before != after
    code = TWO_LINES.format(folder=str(exported), prompt=PROMPT)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == after, done.stderr
    edit.save(tmp_path / "edit.safetensors")
    assert (tmp_path / "edit.safetensors").stat().st_size < (exported / "model.safetensors").stat().st_size
    with Edit.load(tmp_path / "edit.safetensors").applied(load_model(str(base), device="cpu", check=False)) as there:
        assert torch.equal(there.hf.get_parameter(next(iter(edit.values))), next(iter(edit.values.values())))
