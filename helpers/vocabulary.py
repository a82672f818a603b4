"""The tiny models' tokenizer: names in pieces, template words and answers whole.

Byte-level BPE whose merges are learned on subjects alone; every word of the templates and every
answer is added as one token, which ``ignore_merges`` (Llama-3's rule) returns whole. So answers are
single tokens while a name spans several, as in the large models' vocabularies. How many merges
there are decides how many tokens a name has, and thereby how deep in the model it is put together.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"


def build_tokenizer(subjects: Sequence[str], texts: Sequence[str], n_merges: int) -> PreTrainedTokenizerFast:
    """A tokenizer with ``n_merges`` merges learned on subjects and every word of ``texts`` as one token. Adds BOS."""
    pre = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    base = Tokenizer(models.BPE())
    base.pre_tokenizer = pre
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=3 + len(alphabet) + n_merges, special_tokens=[PAD, BOS, EOS],
                                  initial_alphabet=alphabet, show_progress=False)
    base.train_from_iterator([" " + s for s in subjects], trainer)

    state = json.loads(base.to_str())
    vocab = state["model"]["vocab"]
    for text in texts:
        for word, _ in pre.pre_tokenize_str(text):
            vocab.setdefault(word, len(vocab))
    state["model"]["ignore_merges"] = True
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, vocab[BOS])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS,
                                   clean_up_tokenization_spaces=False)
