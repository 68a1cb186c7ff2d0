"""Tasks that a program checks: shares, intervals, and sets that cannot tell anything."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import moelab
from moelab import labmodel
from moelab.errors import StudyError
from moelab.lab import Lab
from moelab.labmodel.tasks import shell_tasks
from moelab.quality.generation import compare_generation
from moelab.quality.tasks import Task, _summary, run_tasks
from tests.support import stock, tiny

QUIET: dict[str, Any] = {"progress": False, "max_tokens": 4, "template": False}


def lab(**options: Any) -> Lab:
    return moelab.load(stock.folder("olmoe"), 4, **options)


def task(name: str, check: Any = lambda _: True, **options: Any) -> Task:
    return Task(f"This is about {name}.", check, name, **options)


def test_answers_are_those_of_free_generation() -> None:
    tasks = [task("cats"), task("dogs", domain="d"), Task(tiny.prompt(9), lambda _: True, "ids")]
    seen: list[str] = []

    def notes(answer: str) -> bool:
        seen.append(answer)
        return True

    tasks.append(task("seen", notes))
    with lab(on_miss="drop", swap_budget=0) as own:
        found = run_tasks(own, tasks, **QUIET)
        assert (own.on_miss, own.swap_budget) == ("drop", 0)
        texts = [
            {"text": f"This is about {name}.", "id": name} for name in ("cats", "dogs", "seen")
        ]
        free = compare_generation(
            own, texts, max_tokens=4, temperature=0, template=False, progress=False
        ).frame.set_index("prompt")
    frame = found.frame.set_index("task")
    assert frame.index.tolist() == ["cats", "dogs", "ids", "seen"]
    for name in ("cats", "dogs", "seen"):
        for side in ("full", "constrained"):
            assert frame.loc[name, f"answer_{side}"] == free.loc[name, f"text_{side}"]
    assert seen == [frame.loc["seen", "answer_full"], frame.loc["seen", "answer_constrained"]]
    assert found.settings["swap_budget"] == 0 and found.settings["on_miss"] == "drop"
    assert (found.frame["fork"].notna()).any(), "dropping every miss changed no answer"


def test_checks_decide_and_shares_follow() -> None:
    with lab() as own:
        answers = run_tasks(own, [task("cats"), task("dogs")], on_miss="drop", **QUIET).frame
        wanted = answers["answer_full"].tolist()
        # Right: what the full model says of cats, so the full model is right on one of two.
        tasks = [task(name, lambda a: a == wanted[0]) for name in ("cats", "dogs")]
        found = run_tasks(own, tasks, on_miss="drop", **QUIET)
    frame, whole = found.frame, found.summary.iloc[-1]
    assert frame["full_right"].tolist() == [True, wanted[1] == wanted[0]]
    assert frame["constrained_right"].tolist() == [
        a == wanted[0] for a in frame["answer_constrained"]
    ]
    assert whole["full"] == frame["full_right"].mean()
    assert whole["difference"] == pytest.approx(
        frame["constrained_right"].mean() - frame["full_right"].mean()
    )
    assert frame["full_right"].dtype == np.bool_ and whole["runs"] == 2


def result(full: int, constrained: int, of: int = 40) -> Any:
    import pandas as pd

    right = np.arange(of)
    return _summary(
        pd.DataFrame(
            {
                "document": [f"page {i}" for i in range(of)], "domain": "shell",
                "full_right": right < full, "constrained_right": right < constrained,
            }
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("full", "constrained", "informative", "said"),
    [
        (40, 40, False, "too easy"),
        (39, 10, False, "uninformative: the full model is right on 98%, outside 50% to 95%"),
        (38, 10, True, "worse"),
        (30, 12, True, "worse"),
        (30, 29, True, "undecided"),
        (30, 30, True, "undecided"),
        (20, 38, True, "better"),
        (19, 1, False, "nothing to lose"),
        (0, 0, False, "nothing to lose"),
    ],
)
def test_verdicts(full: int, constrained: int, informative: bool, said: str) -> None:
    table = result(full, constrained)
    assert table["domain"].tolist() == ["shell", "all"]
    assert table["informative"].tolist() == [informative] * 2
    assert said in table["verdict"].iloc[-1]
    low, high = table[["low", "high"]].iloc[-1]
    assert -1 <= low <= (constrained - full) / 40 <= high <= 1 and low < high


def test_answers_about_one_page_count_once() -> None:
    import pandas as pd

    frame = pd.DataFrame(
        {
            "document": np.repeat([f"page {i}" for i in range(10)], 4), "domain": "shell",
            "full_right": np.repeat(np.arange(10) < 8, 4),
            "constrained_right": np.repeat(np.arange(10) < 5, 4),
        }
    )  # fmt: skip
    pages = _summary(frame).iloc[-1]
    alone = _summary(frame.assign(document=[str(i) for i in range(40)])).iloc[-1]
    assert pages["documents"] == 10 and alone["documents"] == 40
    wide, narrow = pages["high"] - pages["low"], alone["high"] - alone["low"]
    assert wide > 1.8 * narrow  # √4, and a little more for few pages


def test_one_document_has_no_interval() -> None:
    table = result(1, 1, of=1)
    assert not table["informative"].iloc[-1]
    with lab() as own:
        found = run_tasks(own, [task("cats", lambda _: False)], on_miss="drop", **QUIET)
    assert not found.informative and "uninformative" in repr(found)
    assert found.verdict.startswith("uninformative") and "<table" in found._repr_html_()


def broken(_: str) -> bool:
    raise KeyError("a key that the check lacks")


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([], "no task"),
        (["question"], r"no moelab\.Task"),
        ([task("a"), task("a")], "Several tasks are called 'a'"),
        ([task("a", lambda _: 1)], "must return True or False, got 1"),
        ([task("a", lambda _: None)], "must return True or False"),
        ([task("a", broken)], "check of task 'a' failed on the answer"),
    ],
)
def test_bad_tasks(tasks: list[Any], message: str) -> None:
    with lab(on_miss="drop") as own:
        with pytest.raises(StudyError, match=message):
            run_tasks(own, tasks, **QUIET)
        assert own.on_miss == "drop"


def test_numpy_answers_are_answers() -> None:
    with lab() as own:
        found = run_tasks(
            own, [task("a", lambda a: np.bool_(len(a) >= 0))], on_miss="drop", **QUIET
        )
    assert found.frame["full_right"].tolist() == [True]


# -- the lab model's ---------------------------------------------------------------------------


def test_shell_tasks_take_the_pages_own_commands() -> None:
    tasks = shell_tasks()
    asked = labmodel.questions()
    assert len(tasks) == len({t.name for t in tasks}) == len({t.document for t in tasks}) == 50
    for one, question in zip(tasks, asked, strict=True):
        assert one.prompt == question["question"] and one.domain == "shell"
        assert one.check(f"Run `{question['reference']}`.") is True
        assert one.check(f"Run `sudo {question['tool']} --help`, not `other`.") is True
        for wrong in ("", question["reference"], "`other`", f"`other` or `{question['tool']}`"):
            assert one.check(wrong) is False
    whole = {t.document: t for t in shell_tasks(whole=True)}
    assert whole["aws s3 ls"].check("`aws s3 ls help`") is True
    assert whole["aws s3 ls"].check("`aws s3 rm x`") is False
    assert {t.name for t in shell_tasks("described")}.isdisjoint({t.name for t in tasks})
    with pytest.raises(ValueError, match="'named' or 'described'"):
        shell_tasks("other")  # type: ignore[arg-type]


def test_the_lab_model_answers_as_its_card_was_scored(lab_path: Any) -> None:
    """The same greedy answers as plain mlx-lm's, through the chat template."""
    import mlx_lm

    model, tokenizer = mlx_lm.load(str(lab_path))[:2]
    tasks = shell_tasks()[1:3]
    with moelab.load("lab", 32) as own:
        found = run_tasks(own, tasks, on_miss="drop", max_tokens=12, progress=False)
    for one, answer in zip(tasks, found.frame["answer_full"], strict=True):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": one.prompt}], add_generation_prompt=True
        )
        assert answer == mlx_lm.generate(model, tokenizer, prompt, max_tokens=12)
    assert found.frame["full_right"].all() and not math.isnan(found.summary["full"].iloc[-1])
