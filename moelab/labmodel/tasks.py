"""The lab model's shell commands as tasks that a program can check.

The model card scores 50 held-out questions on command-line tools: an answer is right if its first
backquoted command runs the right tool. Where the question names the tool the full model is right
on 39 of 50, so the set is informative; where it only describes the tool, on 13 of 50, which is
too few to tell what a miss costs.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

from ..quality.tasks import Task
from . import questions
from .training.asking import is_right

DOMAIN = "shell"


def shell_tasks(
    form: Literal["named", "described"] = "named", *, whole: bool = False
) -> list[Task]:
    """Returns the 50 questions as tasks, one a page.

    Args:
        form: `"named"`: the question names the tool. `"described"`: it says what the tool does.
        whole: The command must begin with the page's whole title, `git branch` and not only `git`.

    Returns:
        Tasks for `moelab.run_tasks`, to be asked as chat turns (its default).

    Raises:
        ValueError: If the form is none of the two.
    """
    if form not in ("named", "described"):
        raise ValueError(f"form must be 'named' or 'described', got {form!r}.")
    return [
        Task(
            prompt=asked["question" if form == "named" else "described"],
            check=partial(_runs, tool=asked["page" if whole else "tool"]),
            name=f"{asked['page']} ({form})",
            domain=DOMAIN,
            document=asked["page"],
        )
        for asked in questions()
    ]


def _runs(answer: str, *, tool: str) -> bool:
    return is_right(answer, tool)
