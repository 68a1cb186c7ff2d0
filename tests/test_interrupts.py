"""Promise 9: an interrupt at any point loses no rows and leaves a lab that is right."""

from __future__ import annotations

import functools
import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import mlx.core as mx
import numpy as np
import pandas as pd
import pytest

import moelab
from moelab.experts import loader
from moelab.experts.bank import LayerBank
from moelab.experts.loader import ExpertLoader
from moelab.experts.policies import LRU
from moelab.experts.readers import Batch
from moelab.experts.residency import Residency
from moelab.lab import Lab
from tests.support import stock, tiny

PROMPT = tiny.prompt(6, seed=4)
TOKENS = 3
HOME = Path(moelab.__file__).parent

Point = Callable[[], None]


@functools.cache
def wanted(path: Path) -> stock.Steps:
    return stock.stock_steps(path, PROMPT, TOKENS)


def right(lab: Lab, path: Path) -> bool:
    """The lab's greedy output is a fresh one's, and its slots hold what they say."""
    good = stock.same_steps(stock.steps(lab.stream(PROMPT, TOKENS)), wanted(path))
    for layer in lab.attachment.bank.layers:
        stock.check_slots(layer)
        stock.check_slot_bytes(layer)
    return good


def interrupted(lab: Lab) -> bool:
    """Runs a generation; whether it was interrupted."""
    try:
        lab.generate(PROMPT, TOKENS)
    except KeyboardInterrupt:
        return True
    return False


class Trip:
    """Raises KeyboardInterrupt at one call of a function, before or after it has done its work."""

    def __init__(self, function: Callable[..., Any], *, after: bool) -> None:
        self.function, self.after = function, after
        self.left = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left == 0 and not self.after:
            raise KeyboardInterrupt
        result = self.function(*args, **kwargs)
        if self.left == 0:
            raise KeyboardInterrupt
        return result


PLACES: list[tuple[Any, str]] = [
    (os, "preadv"), (mx, "eval"), (mx, "async_eval"), (Residency, "arrived"),
    (Residency, "begin"), (Residency, "_place"), (LRU, "used"), (LRU, "evict"),
    (LRU, "sweep_order"), (ExpertLoader, "read"), (LayerBank, "begin"), (LayerBank, "load"),
    (LayerBank, "end"),
]  # fmt: skip


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("owner", "name"), PLACES, ids=[name for _, name in PLACES])
def test_at_every_call(owner: Any, name: str, after: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every read, read-back, slot assignment and choice of the policy, one after another."""
    path = stock.folder("olmoe", "none")
    trip = Trip(getattr(owner, name), after=after)
    # A function, not the object itself: a class binds only functions to their instances.
    monkeypatch.setattr(owner, name, lambda *a, **k: trip(*a, **k))
    with moelab.load(path, 4) as lab:
        for number in range(1, 10_000):
            # Sometimes from an empty bank, where slots are free, and mostly from a full one.
            if number % 3 == 1:
                lab.reset()
            trip.left = number
            if not interrupted(lab):
                break
            trip.left = 0
            assert right(lab, path), number
        assert number > 2


def test_a_read_that_was_cut_in_half(monkeypatch: pytest.MonkeyPatch) -> None:
    path = stock.folder("qwen2_moe")
    read = os.preadv
    left = 0

    def torn(fd: int, buffers: Any, offset: int, *flags: int) -> int:
        nonlocal left
        left -= 1
        if left == 0:
            row = memoryview(buffers[0]).cast("B")
            read(fd, [row[: len(row) // 2]], offset)
            raise KeyboardInterrupt
        return read(fd, buffers, offset, *flags)

    monkeypatch.setattr(os, "preadv", torn)
    with moelab.load(path, 4) as lab:
        for number in range(5, 200, 23):
            left = number
            assert interrupted(lab)
            assert right(lab, path), number


# At any line of moelab's own: the interpreter raises between two of them, as a signal would.


@contextmanager
def lines(folders: tuple[str, ...], seen: Callable[[str, int], None]) -> Iterator[None]:
    """Calls `seen` with file and line, at every line that runs in these folders of moelab."""
    inside = tuple(str(HOME / folder) + os.sep for folder in folders)

    def local(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            seen(frame.f_code.co_filename, frame.f_lineno)
        return local

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        return local if frame.f_code.co_filename.startswith(inside) else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def moments(run: Callable[[], Any], folders: tuple[str, ...]) -> list[int]:
    """When to interrupt `run`: at each line's first visit and one in the middle."""
    visits: dict[tuple[str, int], list[int]] = {}
    count = 0

    def seen(file: str, line: int) -> None:
        nonlocal count
        count += 1
        visits.setdefault((file, line), []).append(count)

    with lines(folders, seen):
        run()
    chosen = {v[i] for v in visits.values() for i in (0, len(v) // 2)}
    assert len(visits) > 40
    return sorted(chosen)


def stop_at(moment: int, folders: tuple[str, ...], run: Callable[[], Any]) -> bool:
    """Runs `run` and interrupts it at the given line event; whether it came that far."""
    count = 0

    def seen(*_: Any) -> None:
        nonlocal count
        count += 1
        if count == moment:
            raise KeyboardInterrupt

    try:
        with lines(folders, seen):
            run()
    except KeyboardInterrupt:
        return True
    return False


@pytest.mark.parametrize("layout", [{}, {"layout": "per_expert", "shards": 2}])
def test_at_every_line_of_the_bank(layout: dict[str, Any]) -> None:
    path = stock.folder("olmoe", "none", **layout)
    with moelab.load(path, 4) as lab:

        def run() -> None:
            lab.reset()
            lab.generate(PROMPT, TOKENS)

        stops = 0
        for moment in moments(run, ("experts",))[:: 1 + len(layout)]:
            stops += stop_at(moment, ("experts",), run)
            assert right(lab, path), moment
        assert stops > 40


def rows(rec: Any) -> tuple[pd.DataFrame, pd.DataFrame]:
    routing = rec.routing[["step", "position", "token_id", "layer", "rank", "expert", "weight"]]
    return rec.tokens[["step", "position", "token_id", "phase"]], routing


def test_a_recording_keeps_its_rows() -> None:
    """Whatever line is interrupted: every step that was over is there, whole and unchanged."""
    path = stock.folder("olmoe", "none")
    folders = ("experts", "routing")
    with moelab.load(path, 4) as lab:
        with lab.record() as rec:
            lab.generate(PROMPT, TOKENS)
        all_tokens, all_routing = rows(rec)
        chosen = moments(lambda: _recorded(lab, []), folders)
        for moment in chosen[::3]:
            kept: list[Any] = []
            stop_at(moment, folders, lambda kept=kept: _recorded(lab, kept))  # type: ignore[misc]
            if not kept or len(kept) == 1:
                continue  # interrupted while the recording itself was put in place
            rec, yielded = kept[0], sum(r is not kept[0] for r in kept)
            tokens, routing = rows(rec)
            if yielded < TOKENS:  # else the recording's own end was interrupted
                assert len(tokens) >= len(PROMPT) + yielded - 1
            pd.testing.assert_frame_equal(tokens, all_tokens.iloc[: len(tokens)])
            # The step that was interrupted may lack layers and weights; those before do not.
            over = min(len(tokens), len(PROMPT) - 1 + yielded)
            pd.testing.assert_frame_equal(routing.iloc[: over * 4], all_routing.iloc[: over * 4])
            assert not rec.tokens["seconds"].iloc[:over].isna().any()
            assert right(lab, path), moment


def _recorded(lab: Lab, kept: list[Any]) -> None:
    """A recorded generation; `kept` gets the recording, then each response."""
    with lab.record() as rec:
        kept.append(rec)
        for response in lab.stream(PROMPT, TOKENS):
            kept.append(response)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("owner", "name"), [(Batch, "wait"), (ExpertLoader, "_perform")], ids=["waiting", "reading"]
)
def test_readers_that_are_still_at_work(
    owner: Any, name: str, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reading thread that an interrupt left behind writes into no slot that was given away."""
    path = stock.folder("qwen2_moe")
    monkeypatch.setattr(loader, "PARALLEL_BYTES", 1)
    read = os.preadv
    late = False

    def slow(fd: int, buffers: Any, offset: int, *flags: int) -> int:
        if late and threading.current_thread() is not threading.main_thread():
            time.sleep(0.001)
        return read(fd, buffers, offset, *flags)

    function = getattr(owner, name)
    trip = Trip(function, after=after)

    def tripping(*args: Any) -> Any:
        here = threading.current_thread() is threading.main_thread()
        return (trip if here else function)(*args)

    monkeypatch.setattr(os, "preadv", slow)
    monkeypatch.setattr(owner, name, tripping)
    with moelab.load(path, 4) as lab:
        for number in range(1, 200, 1 if owner is Batch else 3):
            lab.reset()
            trip.left, late = number, True
            came_so_far = interrupted(lab)
            trip.left, late = 0, False
            if not came_so_far:
                break
            assert right(lab, path), number
        assert number > 9


def test_a_reader_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in one reading thread comes out, and the others are waited for."""
    path = stock.folder("qwen2_moe")
    monkeypatch.setattr(loader, "PARALLEL_BYTES", 1)
    read = os.preadv
    left = 0

    def failing(*args: Any) -> int:
        nonlocal left
        left -= 1
        if -3 < left <= 0:  # the direct path and the one after it
            raise OSError(5, "Input/output error")
        return read(*args)

    monkeypatch.setattr(os, "preadv", failing)
    with moelab.load(path, 4) as lab:
        for number in (1, 8, 30):
            left = number
            with pytest.raises(moelab.CheckpointError, match="Input/output error"):
                lab.generate(PROMPT, TOKENS)
            assert right(lab, path)


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_a_generation_that_is_given_up(taken: int) -> None:
    """The caller closes the generator, or an error of the caller's own comes between tokens."""
    path = stock.folder("qwen3_next")
    with moelab.load(path, 4) as lab:
        running: Any = lab.stream(PROMPT, 8)
        for _ in range(taken):
            next(running)
        running.close()
        assert right(lab, path)
        running = lab.stream(PROMPT, 8)
        with pytest.raises(ZeroDivisionError):
            for number, _ in enumerate(running):
                if number == taken:
                    raise ZeroDivisionError
        assert right(lab, path)
        del running
        assert right(lab, path)


def test_a_chat_goes_on_after_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The turn that was cut off never was; the conversation goes on from the one before."""
    path = stock.folder("qwen3_next", chat_template=True)
    turns = ("the router", "an expert", "and the rest")
    with moelab.load(path, 8) as lab:
        calm = lab.chat(temperature=0.0)
        want = [calm.say(turn, 4) for turn in turns]
        trip = Trip(Residency.begin, after=False)
        monkeypatch.setattr(Residency, "begin", lambda *a: trip(*a))
        for number in (1, 3, 6, 14):
            chat = lab.chat(temperature=0.0)
            assert chat.say(turns[0], 4) == want[0]
            before = list(chat.messages)
            trip.left = number
            with pytest.raises(KeyboardInterrupt):
                chat.say(turns[1], 4)
            trip.left = 0
            assert chat.messages == before
            # The cache was in between and is made anew: close, not equal, so the text of a new
            # conversation with the same messages is what to compare with.
            other = lab.chat(temperature=0.0)
            other.messages = list(before)
            assert chat.say(turns[1], 4) == other.say(turns[1], 4)
            assert chat.messages == other.messages
            assert len(chat.messages) == 4


def test_interrupts_do_not_pile_up_memory() -> None:
    path = stock.folder("qwen2_moe")
    with moelab.load(path, 4) as lab:

        def run() -> None:
            lab.generate(PROMPT, TOKENS)

        chosen = moments(run, ("experts",))
        sizes = []
        for moment in chosen[:: len(chosen) // 15]:
            stop_at(moment, ("experts",), run)
            run()
            gc.collect()
            mx.clear_cache()
            sizes.append(mx.get_active_memory())
        assert np.ptp(sizes[3:]) < 20_000
