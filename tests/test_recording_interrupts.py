"""An interrupt keeps what was recorded, leaves tables whole, and lets the recorder go on."""

from __future__ import annotations

import contextlib
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import mlx.core as mx
import numpy as np
import pandas as pd
import pytest

import moelab
from moelab.lab import Lab
from moelab.routing.loop import GENERATED
from moelab.routing.recorder import Recorder
from moelab.routing.recording import Recording
from moelab.routing.steps import Step
from moelab.routing.store import TOKEN, Rows, Store
from tests.support import stock, tiny

PROMPT = tiny.prompt(9)
ROUTING = Path(moelab.routing.__path__[0])
SWITCH = Path(moelab.__path__[0]) / "experts" / "switch.py"
SAME = ["run", "sequence", "step", "position", "token_id", "phase"]


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with moelab.load(stock.folder("qwen3_next"), 6) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def whole(lab: Lab) -> Recording:
    """The recording that no interrupt disturbed."""
    with lab.record() as rec:
        generate(lab, [])
    return rec


def generate(lab: Lab, seen: list[int]) -> None:
    for response in lab.stream(PROMPT, 4, template=False, prefill_step_size=4):
        seen.append(response.token)


@contextlib.contextmanager
def interrupted(line: int, files: Callable[[str], bool]) -> Iterator[list[int]]:
    """Raises KeyboardInterrupt at the so many-th line that runs in some files; -1: counts them."""
    count = [0]

    def local(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            count[0] += 1
            if count[0] == line:
                sys.settrace(None)
                raise KeyboardInterrupt
        return local

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        return local if files(frame.f_code.co_filename) else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield count
    finally:
        sys.settrace(before)


def recorders_lines(name: str) -> bool:
    return name in (str(SWITCH), *(str(ROUTING / f"{n}.py") for n in (
        "loop", "recorder", "steps", "store", "session")))  # fmt: skip


def consistent(rec: Recording, whole: Recording, seen: int) -> int:
    """The first run agrees with the undisturbed one up to where it was cut; returns its tokens."""
    tokens, routing, loads = (f[f["run"] == 0] for f in (rec.tokens, rec.routing, rec.loads))
    count = len(tokens)
    # Each token that was seen had gone through the model once more before.
    assert count >= (len(PROMPT) + seen if seen else 0)
    pd.testing.assert_frame_equal(tokens[SAME], whole.tokens[SAME][:count], check_categorical=False)
    steps = tokens["step"].unique()
    ended = tokens["step"] < (steps[-1] if len(steps) else 0)
    np.testing.assert_array_equal(tokens["logprob"][ended], whole.tokens["logprob"][:count][ended])
    # All steps but the last are there with every layer, the last with those that it reached.
    keys = ["step", "position", "layer", "expert"]
    expected = whole.routing.set_index(keys)
    found = routing.set_index(keys)
    both = expected.loc[found.index]
    assert found.index.is_unique and (found["hit"] == both["hit"]).all()
    known = found["weight"].notna().to_numpy()
    np.testing.assert_array_equal(found["weight"][known], both["weight"][known])
    done = routing["step"] < (steps[-1] if len(steps) else 0)
    assert known[done.to_numpy()].all()
    assert done.sum() == ended.sum() * 4 * 4
    assert (tokens["hits"] + tokens["misses"]).sum() == len(routing)
    assert tokens["bytes_read"].sum() == loads["bytes"].sum()
    return count


def test_at_any_line(lab: Lab, whole: Recording) -> None:
    """Inside a step, the recorder, the store, and the recording's beginning and end."""
    lab.reset()
    with interrupted(-1, recorders_lines) as count, lab.record():
        generate(lab, [])
    assert count[0] > 2000
    counts, model = [], type(lab.model)
    lines = np.unique(np.geomspace(1, count[0], 26).astype(int))
    for line in [*lines, *range(count[0] - 60, count[0], 8)]:
        lab.reset()
        seen: list[int] = []
        rec: Recording | None = None
        try:
            with interrupted(int(line), recorders_lines), lab.record() as rec:
                generate(lab, seen)
        except KeyboardInterrupt:
            pass
        else:
            raise AssertionError("it was not interrupted")
        assert type(lab.model) is model and not lab.watch.listeners and not lab.sessions
        assert not any(vars(s)["observer"] for s in lab.attachment.switches.values())
        assert lab.attachment.bank.watchers == []
        if rec is not None:
            assert rec.run["problems"] == []
            counts.append(consistent(rec, whole, len(seen)))
    assert min(counts) < 5 and max(counts) == len(whole.tokens)
    assert len(set(counts)) > 5, "they were all at one place"


def test_a_recorder_goes_on(lab: Lab, whole: Recording) -> None:
    """After an interrupt inside it, the same recorder records the next run whole."""
    lab.reset()
    with lab.record(), interrupted(-1, recorders_lines) as count:
        generate(lab, [])
    names = ["step", "position", "token_id", "phase"]
    for line in np.linspace(40, count[0] - 1, 8).astype(int):
        lab.reset()
        seen: list[int] = []
        with lab.record() as outer, lab.record() as rec:
            with (
                contextlib.suppress(KeyboardInterrupt),
                interrupted(int(line), recorders_lines),
            ):
                generate(lab, seen)
            generate(lab, [])
        for each in (outer, rec):
            consistent(each, whole, len(seen))
            last = each.tokens["run"].max()
            again = each.tokens[each.tokens["run"] == last].reset_index(drop=True)
            pd.testing.assert_frame_equal(again[names], whole.tokens[names])
            np.testing.assert_array_equal(again["logprob"], whole.tokens["logprob"])
            routing = each.routing[each.routing["run"] == last]
            for name in ("expert", "weight", "rank", "layer"):
                np.testing.assert_array_equal(routing[name], whole.routing[name])


def test_between_rows_and_their_columns(lab: Lab, whole: Recording) -> None:
    """At every line of the store and of settling, in the middle of a generation."""

    def settling(name: str) -> bool:
        return name in (str(ROUTING / "store.py"), str(ROUTING / "recorder.py"))

    with lab.record(), interrupted(-1, settling) as count:
        generate(lab, [])
    middle = count[0] // 2
    for line in range(middle, middle + 130, 7):  # all of one step's lines
        lab.reset()
        seen: list[int] = []
        with lab.record() as rec:
            stream = lab.stream(PROMPT, 4, template=False, prefill_step_size=4)
            with contextlib.suppress(KeyboardInterrupt), interrupted(line, settling):
                seen.extend(r.token for r in stream)
            cut = len(rec.tokens)
        assert consistent(rec, whole, len(seen)) >= cut > 0


@pytest.mark.parametrize("where", ["model", "read"])
def test_inside_a_step(lab: Lab, whole: Recording, monkeypatch: Any, where: str) -> None:
    """In a layer, and in the middle of a read: the step is there with the layers it reached."""
    lab.reset()
    calls = itertools.count()
    if where == "model":
        target: Any = type(lab.model.layers[2].mlp)
        name, stop = "__call__", 4 * 4 + 2
    else:
        target, name, stop = type(lab.attachment.bank.layers[0].loader), "read_one", 150
    own = getattr(target, name)

    def stopping(self: Any, *args: Any) -> Any:
        if next(calls) == stop:
            raise KeyboardInterrupt
        return own(self, *args)

    seen: list[int] = []
    with lab.record() as rec:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(target, name, stopping)
            generate(lab, seen)
        generate(lab, [])
    consistent(rec, whole, len(seen))
    last = rec.tokens[rec.tokens["run"] == 0]["step"].max()
    reached = rec.routing[(rec.routing["run"] == 0) & (rec.routing["step"] == last)]
    assert 0 < reached["layer"].nunique() < 4
    assert (rec.tokens["run"] == 1).sum() == len(whole.tokens)


def test_an_error_in_the_recorder_does_not_stop_the_model(lab: Lab, monkeypatch: Any) -> None:
    expected = [r.token for r in lab.stream(PROMPT, 5, template=False)]

    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    with warnings.catch_warnings(record=True) as said, lab.record() as rec:
        warnings.simplefilter("always")
        calls, own = itertools.count(), Recorder._settle

        def sometimes(self: Recorder, step: Any) -> None:
            broken() if next(calls) == 3 else own(self, step)

        monkeypatch.setattr(Recorder, "_settle", sometimes)
        assert [r.token for r in lab.stream(PROMPT, 5, template=False)] == expected
    assert len(rec.tokens) == len(PROMPT) + 4, "one token was not recorded"
    assert len(rec.run["problems"]) == len(said) == 1
    assert "ZeroDivisionError" in str(said[0].message)


def test_a_step_whose_end_was_cut_off(lab: Lab, whole: Recording) -> None:
    """An interrupt between a step's last line and the note that it is over."""
    with lab.record() as rec:
        lab.watch._current = Step(0, mx.array([PROMPT]), None, None, GENERATED)
        generate(lab, [])
    assert len(rec.tokens) == len(whole.tokens)


def test_a_store_cut_between_columns() -> None:
    """Rows that an interrupt left half-written are overwritten by the next step."""
    store = Store([(0, 1)])

    def rows(token: int) -> Rows:
        tokens, slots = np.zeros(1, TOKEN), np.zeros(1, store.slot)
        tokens["token_id"], tokens["layers"], slots["expert"], slots["weight"] = token, 1, token, 1
        return Rows(tokens, slots)

    store.add(0, rows(5))
    store._buffers[0].extend(b"half of a record")
    store._buffers[1].extend(b"x" * 700)
    assert len(store) == 1 and store.routing()["expert"].tolist() == [5]
    store.add(1, rows(6))
    store.add(1, rows(7))  # was there before
    assert store.tokens()["token_id"].tolist() == [5, 6]
    assert store.routing()["expert"].tolist() == [5, 6] and store.last_step == 1
