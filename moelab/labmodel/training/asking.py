"""Fifty questions on command-line tools whose pages were never trained on."""

from __future__ import annotations

import re
from typing import Any

from moelab import labmodel


def score(model: Any, tokenizer: Any, most_tokens: int = 60) -> dict[str, Any]:
    """Ask both forms of every question, greedily, through the chat template.

    An answer is right if it holds a backquoted command whose first word (after
    `sudo`) is the tool. `..._whole` counts those that begin with the whole title of
    the page: `git branch`, not only `git`.

    Args:
        model: An mlx-lm model.
        tokenizer: Its tokenizer.
        most_tokens: Length of an answer, at most.

    Returns:
        Counts of right answers, and every answer.
    """
    from mlx_lm import generate

    forms = ("named", "described")
    found: dict[str, Any] = {"asked": 0, **{f + end: 0 for f in forms for end in ("", "_whole")}}
    found["answers"] = []
    for asked in labmodel.questions():
        answers = {}
        for form, question in (("named", asked["question"]), ("described", asked["described"])):
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True
            )
            answers[form] = generate(model, tokenizer, prompt, max_tokens=most_tokens)
            found[form] += is_right(answers[form], asked["tool"])
            found[form + "_whole"] += is_right(answers[form], asked["page"])
        found["asked"] += 1
        found["answers"].append({"page": asked["page"], "tool": asked["tool"], **answers})
    return found


def is_right(answer: str, tool: str) -> bool:
    """Say whether an answer's first backquoted command begins with the tool's words."""
    match = re.search(r"`(?:sudo )?([^`]+)`", answer)
    words, wanted = (match.group(1).split() if match else []), tool.split()
    return words[: len(wanted)] == wanted
