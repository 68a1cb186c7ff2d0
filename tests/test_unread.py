"""The last layer of a prompt's chunks: stock leaves it uncomputed, and so does a lab."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest

import moelab
from moelab.lab import Lab
from tests.support import stock, tiny

PROMPT = tiny.prompt(50, seed=3)


def last_layer(lab: Lab) -> Any:
    return lab.attachment.bank.layers[-1]


def computed(lab: Lab, run: Callable[[], Any]) -> list[int]:
    """Tokens of each of the last layer's computations while `run` runs."""
    layer = last_layer(lab)
    compute, seen = layer.switch, []

    def watched(x: mx.array, ids: mx.array) -> Any:
        seen.append(ids.size // ids.shape[-1])
        return compute(x, ids)

    layer.switch = watched
    try:
        run()
    finally:
        layer.switch = compute
    return seen


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_nothing_is_computed_and_nothing_changes(family: str) -> None:
    """The same tokens and bits, loads and residents as with every layer computed."""
    path = stock.folder(family)
    seen = []
    for skip in (True, False):
        with moelab.load(path, tiny.capacities(family)[1]) as lab:
            switch = lab.attachment.switches[last_layer(lab).layer]
            assert switch.unread is not None
            if not skip:
                object.__setattr__(switch, "unread", None)
            tally = stock.Tally(lab, slot_bytes=True)
            steps: stock.Steps = []
            run = lambda steps=steps: steps.extend(  # noqa: E731
                stock.steps(lab.stream(PROMPT, 6, prefill_step_size=20))
            )
            sizes = computed(lab, run)
            assert stock.same_steps(steps, stock.stock_steps(path, PROMPT, 6, prefill_step_size=20))
            seen.append([(e.needed, [x for r in e.rounds for x in r], e.after)
                         for e in tally.events])  # fmt: skip
            assert (max(sizes) == 1) == skip
    assert seen[0] == seen[1]


def test_batches_and_drafts_are_exact() -> None:
    path = stock.folder("qwen3_moe")
    prompts = [tiny.prompt(n, seed=n) for n in (40, 7, 23)]
    options: dict[str, Any] = {"max_tokens": 6, "return_token_ids": True, "prefill_step_size": 16}
    theirs = mlx_lm.batch_generate(*stock.stock(path), prompts, **options).token_ids
    draft, _ = stock.stock(stock.folder("dense"))
    drafted = {"draft_model": draft, "num_draft_tokens": 2}
    want = stock.stock_steps(path, PROMPT, 8, **drafted)
    with moelab.load(path, 4) as lab:
        batch = lambda: mlx_lm.batch_generate(lab.model, lab.tokenizer, prompts, **options)  # noqa: E731
        assert batch().token_ids == theirs
        assert max(computed(lab, batch)) < 16
        assert stock.same_steps(stock.steps(lab.stream(PROMPT, 8, **drafted)), want)


def test_a_pass_by_itself_is_read() -> None:
    path = stock.folder("qwen3_next")
    model, _ = stock.stock(path)
    with moelab.load(path, 8) as lab:
        tokens = mx.array([PROMPT])
        assert stock.equal(lab.model(tokens), model(tokens))


def test_a_pass_of_a_callback_is_read() -> None:
    """Called while a prompt goes through, but not by the loop."""
    path = stock.folder("qwen3_next")
    model, _ = stock.stock(path)
    tokens = mx.array([PROMPT])
    with moelab.load(path, 8) as lab:
        got: list[mx.array] = []

        def callback(done: int, total: int) -> None:
            got.append(lab.model(tokens))
            mx.eval(got[-1])

        list(lab.stream(PROMPT, 2, prompt_progress_callback=callback))
        assert len(got) > 1 and all(stock.equal(y, model(tokens)) for y in got)


def test_a_module_in_between_may_look() -> None:
    """A user's own module around a layer sees what it would see in the stock model."""
    path = stock.folder("qwen3_moe")

    class Looking(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer
            self.seen: list[mx.array] = []

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            y = self.layer(*args, **kwargs)
            self.seen.append(y)
            return y

    seen = []
    for load in (lambda: mlx_lm.load(str(path))[0], lambda: moelab.load(path, 4)):
        loaded = load()
        model = loaded.model if isinstance(loaded, Lab) else loaded
        looking = Looking(model.model.layers[-1])
        model.model.layers[-1] = looking
        list(mlx_lm.stream_generate(model, stock.stock(path)[1], PROMPT, max_tokens=2))
        seen.append(looking.seen)
    assert len(seen[0]) == len(seen[1]) > 1
    assert all(stock.equal(a, b) for a, b in zip(*seen, strict=True))


def test_a_recording_reads_it() -> None:
    path = stock.folder("qwen3_next")
    with moelab.load(path, 8) as lab:
        frames = []
        for skip in (True, False):
            lab.reset()
            if not skip:
                object.__setattr__(lab.attachment.switches[3], "unread", None)
            with lab.record(prompt_logprobs=True) as rec:
                list(lab.stream(PROMPT, 4))
            frames.append((rec.tokens.drop(columns="seconds"), rec.routing))
        assert not frames[0][0]["logprob"].iloc[1:].isna().any()
        for a, b in zip(*frames, strict=True):
            assert a.equals(b)


def test_a_dense_last_layer_needs_it(tmp_path: Path) -> None:
    """The last layer with experts is not the model's last: its output goes on."""
    path = tiny.build(tmp_path, "qwen3_moe", overrides={"mlp_only_layers": [2]})
    with moelab.load(path, 4) as lab:
        assert sorted(lab.attachment.switches) == [0, 1]
        assert all(s.unread is None for s in lab.attachment.switches.values())
        ours = stock.steps(lab.stream(PROMPT, 6, prefill_step_size=20))
    assert stock.same_steps(ours, stock.stock_steps(path, PROMPT, 6, prefill_step_size=20))


def test_what_is_left_out_shows() -> None:
    """If an output that should be unread is read, it is not a number."""
    path = stock.folder("olmoe")
    with moelab.load(path, 4) as lab:
        switch = lab.attachment.switches[last_layer(lab).layer]
        object.__setattr__(switch, "unread", lambda: True)
        assert mx.isnan(lab.model(mx.array([PROMPT]))).all()
