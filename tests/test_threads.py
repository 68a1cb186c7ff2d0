"""Another thread than the one that loaded a lab may run its model."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import pytest

import moelab
from tests.support import stock, tiny

PROMPT = tiny.prompt(30)


def elsewhere(work: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result(timeout=60)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_loaded_here_run_there(family: str) -> None:
    """Every array is evaluated: gpt_oss and deepseek_v3 keep RoPE frequencies in private ones."""
    path = stock.folder(family)
    want = stock.stock_steps(path, PROMPT, 6)
    with moelab.load(path, tiny.capacities(family)[0]) as lab:
        for _ in range(2):
            got = elsewhere(lambda: stock.steps(lab.stream(PROMPT, 6)))
            assert stock.same_steps(got, want)
        assert stock.same_steps(stock.steps(lab.stream(PROMPT, 6)), want)


def test_loaded_and_run_there() -> None:
    path = stock.folder("gpt_oss")
    lab = elsewhere(lambda: moelab.load(path, 4))
    got = elsewhere(lambda: stock.steps(lab.stream(PROMPT, 6)))
    assert stock.same_steps(got, stock.stock_steps(path, PROMPT, 6))
    elsewhere(lab.close)
    assert not lab.attachment.switches


@pytest.mark.parametrize("evaluated", [True, False])
def test_outputs_that_another_thread_left(evaluated: bool) -> None:
    """The bank's unevaluated outputs of one thread do not stop the next."""
    path = stock.folder("olmoe")
    tokens = mx.array([PROMPT])
    mx.eval(tokens)
    with moelab.load(path, 4) as lab:
        held = lab.model(tokens)
        if evaluated:
            mx.eval(held)
        got = elsewhere(lambda: stock.steps(lab.stream(PROMPT, 6)))
        assert stock.same_steps(got, stock.stock_steps(path, PROMPT, 6))
        assert stock.equal(held, stock.stock(path)[0](tokens))


def test_a_generation_given_up_in_another_thread() -> None:
    path = stock.folder("deepseek_v3")
    with moelab.load(path, 4) as lab:

        def begun() -> None:
            running: Any = lab.stream(PROMPT, 8, prefill_step_size=8)
            next(running)
            running.close()

        elsewhere(begun)
        got = stock.steps(lab.stream(PROMPT, 6))
        assert stock.same_steps(got, stock.stock_steps(path, PROMPT, 6))
        begun()
        elsewhere(lab.reset)
        got = elsewhere(lambda: stock.steps(lab.stream(PROMPT, 6)))
        assert stock.same_steps(got, stock.stock_steps(path, PROMPT, 6))


def test_recorded_in_another_thread() -> None:
    path = stock.folder("gpt_oss")
    with moelab.load(path, 4) as lab:
        with lab.record() as rec:
            elsewhere(lambda: lab.generate(PROMPT, 6))
        tokens = len(rec.tokens)
        with lab.record() as again:
            lab.generate(PROMPT, 6)
        assert tokens == len(again.tokens) >= len(PROMPT)
        keys = ["token_id", "layer", "rank", "expert", "weight"]
        assert rec.routing[keys].equals(again.routing[keys])


@pytest.mark.parametrize("swap_budget", [None, 0])
@pytest.mark.parametrize("action", ["drop", "substitute", "reroute", "low_bit"])
def test_a_lossy_lab_goes_on_in_another_thread(action: str, swap_budget: int | None) -> None:
    """A lossy step is settled when the next one begins, which may be on another thread."""

    def run(lab: moelab.Lab) -> Any:
        return stock.steps(lab.stream(PROMPT, 6, temperature=0.0, prefill_step_size=8))

    with moelab.load(stock.folder("qwen3_moe"), 4, on_miss=action, swap_budget=swap_budget) as lab:
        want = [run(lab) for _ in range(4)]
        lab.reset()
        got = [run(lab), elsewhere(lambda: run(lab)), run(lab), elsewhere(lambda: run(lab))]
        for one, other in zip(got, want, strict=True):
            assert stock.same_steps(one, other)
        given_up: Any = lab.stream(PROMPT, 6)
        next(given_up)
        given_up.close()
        elsewhere(lambda: lab.model(mx.array([PROMPT])))  # nobody evaluates its output
        lab.set_on_miss(action)
        assert stock.same_steps(run(lab), want[0]) or swap_budget == 0


def test_a_lossy_pass_cut_off_in_another_thread() -> None:
    """What it left lazy can be evaluated by no other thread, and does not stop the lab."""
    with moelab.load(stock.folder("qwen3_moe"), 4, on_miss="drop") as lab:
        want = stock.steps(lab.stream(PROMPT, 6, temperature=0.0))
        lab.reset()
        last = max(lab.attachment.switches)
        site = next(s for s in lab.sites if s.layer == last)
        inner = site.parent[site.key]

        def cut_off() -> None:
            site.parent[site.key] = None
            try:
                lab.model(mx.array([PROMPT[:1]]))
            finally:
                site.parent[site.key] = inner

        with pytest.raises(AttributeError):
            elsewhere(cut_off)
        stock.steps(lab.stream(PROMPT, 6, temperature=0.0))
        lab.reset()
        assert stock.same_steps(stock.steps(lab.stream(PROMPT, 6, temperature=0.0)), want)
