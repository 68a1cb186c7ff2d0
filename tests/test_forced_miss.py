"""A forced miss is that one miss, computed as the action says, and nothing else.

The reference is written apart from the code under test: a layer's scores, choice and weights in
plain numpy (`tests/support/rules.py`), each expert's output by the stock switch, and the whole
model by the stock one with a single block answered by that reference.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

import moelab
from moelab.errors import MissActionError, MoelabError, StudyError
from moelab.experts.forced import Forcing
from moelab.experts.misses import LowBit, Reroute
from moelab.lab import Lab
from tests.support import rules, stock, tiny
from tests.test_misses import VARIANTS, Full, close, folder, rows

FAMILIES = ["olmoe", "qwen3_next", "deepseek_v3", "gpt_oss", "mixtral", "olmoe normalised"]
ACTIONS = ["drop", "substitute", "low_bit"]
PREFIX = 12


def capacity_of(variant: str) -> int:
    """A half of the experts, so that the bank loads what is needed."""
    return tiny.experts(VARIANTS[variant][0])[0] // 2


def begun(model: Any, seed: int) -> tuple[Any, mx.array]:
    """A cache after a prefix, and the next token."""
    tokens = tiny.prompt(PREFIX + 1, seed=seed)
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([tokens[:PREFIX]]), cache=cache))
    return cache, mx.array([tokens[PREFIX:]])


def spied(lab: Lab) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """What each block was last given and answered, until the lab is closed."""
    seen: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for site in lab.sites:
        own = type(site.parent)

        def noting(self: Any, x: mx.array, own: type = own, layer: int = site.layer) -> Any:
            y = own.__call__(self, x)
            seen[layer] = rows(x), rows(y)
            return y

        site.parent.__class__ = type(own.__name__, (own,), {"__call__": noting})
    return seen


def reference(
    variant: str, full: Full, layer: int, x: np.ndarray, expert: int, action: Any, config: Any
) -> np.ndarray:
    """What the block answers for one token, (1, width), when one expert is missing."""
    site = full.sites[layer]
    rule = rules.rule_of(VARIANTS[variant][0], site.parent, config)
    scores = rule.scores(x.astype(np.float64))
    outputs = full.outputs(layer, x)
    low = full.outputs(layer, x, action.bits) if isinstance(action, LowBit) else outputs
    others = set(range(site.experts)) - {expert}
    y = full.block(layer, x).astype(np.float64)
    for slot in rules.reference(action.name, rule, scores, 0, site.top_k, others):
        y[0] -= slot.weight * outputs[0, slot.expert]
        if slot.computed >= 0:
            source = low if slot.outcome == "low_bit" else outputs
            y[0] += slot.applied * source[0, slot.computed]
    return y


def with_answer(model: Any, site: Any, y: np.ndarray, run: Any) -> np.ndarray:
    """Runs a stock model in which one block's answer is `y`."""
    own = type(site.parent)

    def answering(self: Any, x: mx.array) -> mx.array:
        return mx.array(y[None].astype(np.float32)).astype(x.dtype)

    site.parent.__class__ = type(own.__name__, (own,), {"__call__": answering})
    try:
        return np.array(run(model).astype(mx.float32))
    finally:
        site.parent.__class__ = own


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("variant", FAMILIES)
def test_equals_the_reference_and_leaves_the_other_layers_exact(variant: str, action: str) -> None:
    path = folder(variant)
    full = Full(path)
    model, _ = stock.stock(path)
    with moelab.load(path, capacity_of(variant)) as lab:
        forcing = Forcing(lab, action)
        for seed, site in enumerate(lab.sites):
            stock_cache, token = begun(model, seed)
            cache, _ = begun(lab.model, seed)
            # The expert of one rank of this token here, by an exact run of the stock model.
            twin, _ = begun(model, seed)
            watched = full.sites[site.layer]
            before = block_input(model, watched, token, twin)
            scores = rules.rule_of(VARIANTS[variant][0], watched.parent, lab.config).scores(before)
            expert = rules.top(scores.selection[0], site.top_k)[seed % site.top_k]
            with forcing.missing({site.layer: [expert]}) as layers:
                blocks = {s.layer: type(s.parent) for s in lab.sites}
                seen = spied(lab)
                logits = np.array(lab.model(token, cache=cache).astype(mx.float32))
                for other in lab.sites:
                    other.parent.__class__ = blocks[other.layer]
            assert layers[site.layer].asked(expert) == 1
            x, y = seen[site.layer]
            expected = reference(variant, full, site.layer, x, expert, forcing.action, lab.config)
            assert close(y, expected)
            assert not close(y, full.block(site.layer, x))
            for number, (given, answered) in seen.items():
                if number != site.layer:
                    assert np.array_equal(answered, full.block(number, given)), number
            whole = with_answer(
                model, watched, expected, lambda m, c=stock_cache, t=token: m(t, cache=c)
            )
            assert close(logits, whole)


def block_input(model: Any, site: Any, token: mx.array, cache: Any) -> np.ndarray:
    own = type(site.parent)
    seen: list[np.ndarray] = []

    def noting(self: Any, x: mx.array) -> Any:
        seen.append(rows(x).astype(np.float64))
        return own.__call__(self, x)

    site.parent.__class__ = type(own.__name__, (own,), {"__call__": noting})
    try:
        mx.eval(model(token, cache=cache))
    finally:
        site.parent.__class__ = own
    return seen[0]


@pytest.mark.parametrize("action", [*ACTIONS, "reroute"])
@pytest.mark.parametrize("variant", ["olmoe", "deepseek_v3", "gpt_oss"])
def test_forcing_nothing_changes_no_bit(variant: str, action: str) -> None:
    path = folder(variant)
    model, _ = stock.stock(path)
    stock_cache, token = begun(model, 3)
    wanted = model(token, cache=stock_cache)
    for capacity in (capacity_of(variant), 1.0):
        with moelab.load(path, capacity) as lab:
            if action == "reroute":
                forcing = Forcing(lab, Reroute(0.0))
            else:
                forcing = Forcing(lab, action)
            cache, _ = begun(lab.model, 3)
            everywhere: dict[int, list[int]] = {site.layer: [] for site in lab.sites}
            with forcing.missing(everywhere) as layers:
                assert stock.equal(lab.model(token, cache=cache), wanted)
            assert all(len(layer.events) == 1 for layer in layers.values())
            # And an expert that nobody chose is not missed.
            chosen = set(np.array(layers[lab.sites[0].layer].events[0].ids).reshape(-1).tolist())
            idle = next(e for e in range(lab.sites[0].experts) if e not in chosen)
            cache, _ = begun(lab.model, 3)
            with forcing.missing({lab.sites[0].layer: [idle]}) as layers:
                got = lab.model(token, cache=cache)
            assert layers[lab.sites[0].layer].asked(idle) == 0
            if action != "reroute":
                assert stock.equal(got, wanted)


@pytest.mark.parametrize("action", [*ACTIONS, "reroute"])
def test_capacity_does_not_matter(action: str) -> None:
    """At top-k + 1 experts, at all but one, and with all layers stock: the same bits."""
    path = folder("olmoe")
    experts, top_k = tiny.experts("olmoe")
    found = []
    for capacity in (top_k + 1, experts - 1, experts):
        with moelab.load(path, capacity) as lab:
            forcing = Forcing(lab, action)
            cache, token = begun(lab.model, 5)
            first, last = lab.sites[0].layer, lab.sites[-1].layer
            with forcing.missing({first: range(experts // 2), last: [0, 1]}):
                found.append(lab.model(token, cache=cache))
                mx.eval(found)
    assert stock.equal(found[0], found[1]) and stock.equal(found[0], found[2])


def test_the_model_is_left_as_it_was() -> None:
    path = folder("olmoe")
    model, _ = stock.stock(path)
    tokens = mx.array([tiny.prompt(8)])
    wanted = model(tokens)
    with moelab.load(path, 6) as lab:
        site = lab.sites[0]
        before = [(type(s.parent), type(s.parent.gate), s.parent[s.key]) for s in lab.sites]
        for action in ("substitute", "drop"):
            forcing = Forcing(lab, action)
            with pytest.raises(KeyError), forcing.missing({site.layer: [0]}):
                raise KeyError("half-way")
            after = [(type(s.parent), type(s.parent.gate), s.parent[s.key]) for s in lab.sites]
            assert all(
                x is y
                for a, b in zip(after, before, strict=True)
                for x, y in zip(a, b, strict=True)
            )
            assert stock.equal(lab.model(tokens), wanted)


def test_bad_input() -> None:
    with moelab.load(folder("olmoe"), 6) as lab:
        for action in ("load", "wrong_slot"):
            with pytest.raises(StudyError, match=action):
                Forcing(lab, action)
        with pytest.raises(MissActionError, match="must be one of"):
            Forcing(lab, "skip")
        forcing = Forcing(lab, "drop")
        for experts, told in (({99: [0]}, "layer 99"), ({lab.sites[0].layer: [999]}, "999")):
            with pytest.raises(StudyError, match=told), forcing.missing(experts):
                pass
        with (
            lab.record(),
            pytest.raises(MoelabError, match="recorded"),
            forcing.missing({lab.sites[0].layer: [0]}),
        ):
            pass
        lab.on_miss = "drop"
        with pytest.raises(MoelabError, match="load"):
            Forcing(lab, "drop")
