"""Positions by role, so that prompts about names of different length line up.

| role | tokens |
|---|---|
| `before subject` | all before the subject; the same in a clean and a corrupted prompt, so a patch there does nothing |
| `subject first` | the first token of a subject of two tokens or more |
| `subject middle` | all tokens between its first and its last, together |
| `subject last` | its last token, which is also the only one of a one-token subject |
| `after subject 1`, `2` … | the first, second … token after the subject |
| `later` | all tokens from there to the one before the last, together |
| `last` | the last token, where the answer is predicted, even if it is the subject's |

Every real token has one role; several tokens of one role are patched together. Two groups go by a name
as well: `subject`, all its tokens, and `all`, every token from the subject on (what comes before is
untouched by any change of the subject).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from helpers.sites import Batch

BEFORE, FIRST, MIDDLE, LAST_OF_SUBJECT = "before subject", "subject first", "subject middle", "subject last"
AFTER, LATER, LAST = "after subject", "later", "last"
GROUPS = ("subject", "all")


def roles(prompts, after: int = 3) -> dict[str, torch.Tensor]:
    """Role → booleans (n, length), in reading order; `after` is how many tokens after the subject get a role each.

    `prompts` is a `PromptSet` or a `Batch`. A role may be empty in some rows, or in all.
    """
    batch = Batch.of(prompts)
    column = torch.arange(batch.tokens.shape[1])
    subject = batch.at("subject")
    start, stop = (bound[:, None] for bound in batch.subject.unbind(-1))
    last = column == batch.last[:, None]
    beyond = column - stop + 1  # 1 on the first token after the subject
    found = {
        BEFORE: column < start,
        FIRST: (column == start) & (stop - start > 1),
        MIDDLE: (column > start) & (column < stop - 1),
        LAST_OF_SUBJECT: subject & (column == stop - 1),
        **{f"{AFTER} {k}": beyond == k for k in range(1, after + 1)},
        LATER: beyond > after,
    }
    return {name: where & batch.mask & ~last for name, where in found.items()} | {LAST: last}


def locate(prompts, after: int = 3) -> dict[str, torch.Tensor]:
    """Name → booleans (n, length): every role, and the two groups."""
    batch, found = Batch.of(prompts), roles(prompts, after)
    return found | {"subject": batch.at("subject"), "all": batch.mask & ~found[BEFORE]}


def choose(prompts, names: Sequence[str] | None = None, after: int = 3) -> list[str]:
    """The names asked for, or every role that some row has, except what comes before the subject.

    Raises `ValueError` for a name that is neither a role nor a group, or that no row has.
    """
    found = locate(prompts, after)
    if names is None:
        return [name for name, where in found.items() if name not in (BEFORE, *GROUPS) and where.any()]
    unknown = [name for name in names if name not in found]
    if unknown or not len(names):
        raise ValueError(f"positions {unknown or list(names)}: allowed are {', '.join(found)}")
    missing = [name for name in names if not found[name].any()]
    if missing:
        raise ValueError(f"positions {missing}: none of the {len(prompts)} prompts has such a token")
    return list(names)
