"""Tasks that a program can check: does the constrained model still get them right?

A task says something only where the full model neither gets all of them right nor next to none:
at 98% there is nothing to lose that chance would show, at 5% nothing to lose. Such sets are
reported as uninformative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..display import facts_html, facts_text
from ..errors import StudyError
from ..experts.profile import ALL
from ..prompting import Prompt, Template, to_tokens
from .pairs import (
    SAMPLING,
    Ask,
    checked_run,
    chosen_action,
    interval_text,
    paired_means,
    pairs,
    run_settings,
)

if TYPE_CHECKING:
    import pandas as pd

    from ..experts.misses import MissAction
    from ..lab import Lab

INFORMATIVE = (0.5, 0.95)
"""Shares of right answers of the full model between which a set of tasks is informative."""

ANSWER_TOKENS = 60
"""Tokens of an answer, unless asked otherwise."""


@dataclass(frozen=True, slots=True)
class Task:
    """A prompt whose answer a program can check."""

    prompt: Prompt
    """Text, a list of messages, or token ids; as in `Lab.stream`."""
    check: Callable[[str], bool]
    """Gets the answer's text, without end of text, and says whether it is right."""
    name: str
    """The task's name; no other task of a run has it."""
    domain: str = ALL
    """What it is of: shares are given by domain."""
    document: str = ""
    """What it is about: tasks about one document belong together, and intervals are clustered by
    document. Empty: the task stands alone."""


@dataclass(frozen=True, eq=False, repr=False)
class TaskResult:
    """What `run_tasks` found."""

    frame: pd.DataFrame
    """A row a task and seed: `task`, `domain`, `document` (str), `seed` (int64), `full_right`,
    `constrained_right` (bool), `fork` (Int64: first token that differs, from 0; NA if none does),
    `answer_full`, `answer_constrained` (str)."""
    summary: pd.DataFrame
    """A row a domain, then `domain="all"`: `full`, `constrained` (shares of right answers),
    `difference` (constrained − full) with `low` and `high` (95%, paired, clustered by document),
    `runs`, `documents` (int64), `informative` (bool: `full` is within 50–95%), `verdict` (str)."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What was run."""

    @property
    def informative(self) -> bool:
        """Whether the full model is right on 50 to 95% of all runs."""
        return bool(self._whole()["informative"])

    @property
    def verdict(self) -> str:
        """What the tasks say, in words; that they say nothing, where that is so."""
        return str(self._whole()["verdict"])

    def _whole(self) -> pd.Series:
        return self.summary.iloc[-1]

    def _facts(self) -> dict[str, str]:
        whole, settings = self._whole(), self.settings
        return {
            "model": f"{settings['model']} ({settings['fingerprint']})",
            "constrained": f"on_miss={settings['on_miss']!r} at capacity {settings['capacity']}",
            "runs": f"{whole['runs']} of {self.frame['task'].nunique()} tasks about "
            f"{whole['documents']} documents",
            "right": f"{whole['full']:.0%} full, {whole['constrained']:.0%} constrained: "
            + interval_text(whole, "+.0%"),
            "verdict": self.verdict,
        }

    def __repr__(self) -> str:
        return facts_text("TaskResult", self._facts())

    def _repr_html_(self) -> str:
        return facts_html("TaskResult", self._facts())


def run_tasks(
    lab: Lab,
    tasks: Iterable[Task],
    *,
    on_miss: str | MissAction | None = None,
    swap_budget: int | None = None,
    max_tokens: int = ANSWER_TOKENS,
    seeds: Iterable[int] = (0,),
    temperature: float | None = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    template: Template = "auto",
    progress: bool = True,
) -> TaskResult:
    """Lets the full and the constrained model answer tasks, and checks the answers.

    Each answer is written as in `compare_generation`: the prompt but its last token runs exactly,
    and the constrained run begins from the bank's declared initial contents.

    Args:
        lab: The model. Afterwards it has its own miss action again, also after an error.
        tasks: The tasks; `moelab.labmodel.tasks.shell_tasks()` has some for the lab model.
        on_miss: The constrained run's action; None for the lab's own, with its swap budget.
        swap_budget: Experts a layer that may enter after a step; None for the layer's top-k.
        max_tokens: Tokens of an answer, at most.
        seeds: Each gives an answer a task.
        temperature: 0, the default, takes the most likely token; None takes what the model
            recommends, as it does for the next four.
        top_p: See `Lab.stream`.
        top_k: See `Lab.stream`.
        min_p: See `Lab.stream`.
        repetition_penalty: See `Lab.stream`.
        template: See `Lab.stream`.
        progress: Show a progress bar.

    Returns:
        The answers in `.frame`, shares with intervals in `.summary`, and in `.informative` whether
        these tasks can tell anything.

    Raises:
        StudyError: If there is no task, two have one name, a check fails or answers neither True
            nor False, or a number is out of range.
        MissActionError: If the action cannot be had for this model.
        MoelabError: While the lab is being recorded.
    """
    import pandas as pd

    listed = _checked(tasks)
    action, budget = chosen_action(lab, on_miss, swap_budget)
    asked = dict(zip(SAMPLING, (temperature, top_p, top_k, min_p, repetition_penalty), strict=True))
    seeds = checked_run(lab, seeds, max_tokens, asked)
    asks = [
        Ask(task.name, task.domain, tuple(to_tokens(lab.tokenizer, task.prompt, template)))
        for task in listed
    ]
    found, said = pairs(
        lab, asks, action, swap_budget=budget, max_tokens=max_tokens, seeds=seeds,
        sampling=asked, scored=False, progress=progress,
    )  # fmt: skip
    by_name = {task.name: task for task in listed}
    done = [(by_name[pair.ask.name], pair) for pair in found]
    frame = pd.DataFrame(
        {
            "task": [task.name for task, _ in done],
            "domain": [task.domain for task, _ in done],
            "document": [task.document or task.name for task, _ in done],
            "seed": np.array([pair.seed for _, pair in done], np.int64),
            "full_right": [_right(task, pair.full.text) for task, pair in done],
            "constrained_right": [_right(task, pair.constrained.text) for task, pair in done],
            "fork": pd.array([pair.fork for _, pair in done], dtype="Int64"),
            "answer_full": [pair.full.text for _, pair in done],
            "answer_constrained": [pair.constrained.text for _, pair in done],
        }
    )
    settings = run_settings(lab, said, max_tokens, seeds, asked)
    return TaskResult(frame, _summary(frame), {**settings, "template": template})


def _checked(tasks: Iterable[Task]) -> list[Task]:
    listed = list(tasks) if isinstance(tasks, Iterable) else [tasks]
    for place, task in enumerate(listed):
        if not isinstance(task, Task):
            raise StudyError(
                f"Task {place} is no moelab.Task, got {task!r:.80}. Make one with "
                "Task(prompt, check, name)."
            )
    if not listed:
        raise StudyError("There is no task. Give at least one moelab.Task.")
    names = [task.name for task in listed]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise StudyError(
            f"Several tasks are called {', '.join(map(repr, twice[:3]))}. Give each task a name "
            "of its own; `document` says which belong together."
        )
    return listed


def _right(task: Task, answer: str) -> bool:
    try:
        verdict = task.check(answer)
    except Exception as error:
        raise StudyError(
            f"The check of task {task.name!r} failed on the answer {answer!r:.80}: {error!r}. A "
            "check must take any text and return True or False."
        ) from error
    if not isinstance(verdict, bool | np.bool_):
        raise StudyError(
            f"The check of task {task.name!r} must return True or False, got {verdict!r:.80}."
        )
    return bool(verdict)


def _summary(frame: pd.DataFrame) -> pd.DataFrame:
    table = paired_means(
        frame["document"],
        frame["domain"],
        frame["full_right"].astype(float),
        frame["constrained_right"].astype(float),
        share=True,
    )
    table = table.rename(columns={"pairs": "runs", "clusters": "documents"})
    low, high = INFORMATIVE
    table["informative"] = table["full"].between(low, high)
    table["verdict"] = [_verdict(row) for row in table.to_dict("records")]
    return table


def _verdict(row: Mapping[str, Any]) -> str:
    low, high = INFORMATIVE
    full = f"the full model is right on {row['full']:.0%}, outside {low:.0%} to {high:.0%}"
    if row["full"] < low:
        return f"uninformative: {full}, so that most answers have nothing to lose"
    if row["full"] > high:
        return f"uninformative: {full}, so that these tasks are too easy to tell"
    if np.isnan(row["low"]):
        return "undecided: one document gives no interval"
    if row["high"] < 0:
        return "worse: the interval of the difference lies below 0"
    if row["low"] > 0:
        return "better: the interval of the difference lies above 0"
    return "undecided: the interval of the difference holds 0"
