"""Every lossy action on every family, without knowing any family's rule.

A recording says what became of each routed slot. The stock block, given the same input, routes as
the family does by itself; in its switch's place stands one that answers, for each slot that the
router asks for, what the recording says was used instead. What the block makes of that (weights,
scaling, norms and projections after the sum, shared experts) must be what it made under the action.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

import moelab
from moelab.check.families.build import QUANT, build, prompt
from moelab.check.families.configs import CONFIGS, QUANTS, SEEDS, config_of
from moelab.errors import MissActionError
from moelab.experts.router import RouterRule, ask_rules
from moelab.families import SwitchSite, find_switches
from moelab.lab import Lab
from tests.support import muse
from tests.support.lowbit import requantised

ACTIONS = ["drop", "substitute", "reroute", "low_bit", "wrong_slot"]
NOT_SEEN = "chooses its experts in a way that cannot be influenced from outside"
NOT_SHOWN = "does not show where it applies its experts' weights"
REFUSED = {
    ("phimoe", "substitute"): NOT_SEEN,
    ("phimoe", "reroute"): NOT_SEEN,
}
FAMILIES = sorted(set(CONFIGS) - {"dbrx", "muse_spark"})  # no switch; needs Metal
CHUNKS = (9, 1, 1, 1)
GIVEN_THEIR_ROUTING = {"gemma4", "gemma4_text", "deepseek_v41"}
"""Blocks that are called with activations, ids and weights; the router stands beside them."""


@dataclass
class Call:
    """One block in one step."""

    layer: int
    args: tuple[Any, ...]
    y: np.ndarray
    residents: set[int]


class Answers(nn.Module):
    """In a stock switch's place: what was used of each slot, at the factor that it had."""

    def __init__(self, site: SwitchSite, slots: list[dict[int, Any]], low: Any, raw: Any) -> None:
        super().__init__()
        object.__setattr__(self, "parts", (site, slots, low, raw))

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        site, slots, low, raw = self.__dict__["parts"]
        flat, raw = (a.reshape(-1, a.shape[-1]) for a in (x, raw))
        out = np.zeros((indices.size, x.shape[-1]), np.float32)
        for place, expert in enumerate(np.array(indices).ravel().tolist()):
            token = place // indices.shape[-1]
            slot = slots[token].get(expert)
            if slot is None or slot.computed < 0:
                continue  # an identity's place (longcat), which weighs 0; or dropped
            given, factor = flat[token], slot.applied / slot.weight
            if np.isnan(
                slot.weight
            ):  # the block has weighed the input (llama4), for its own choice
                factor = 1.0
                if slot.computed != expert and slot.outcome != "wrong_slot":
                    given = raw[token] * mx.sigmoid(site.parent.router(raw[token])[slot.computed])
            if slot.computed >= site.experts:
                y = given  # an identity came in its place
            else:
                switch = low if slot.outcome == "low_bit" else site.switch
                y = switch(given[None], mx.array([[slot.computed]]))[0, 0]
            out[place] = np.array(y) * factor
        return mx.array(out).reshape(*indices.shape, -1).astype(x.dtype)

    def __getattr__(self, key: str) -> Any:
        return getattr(self.__dict__["parts"][0].switch, key)


@contextmanager
def spied(lab: Lab) -> Iterator[list[Call]]:
    calls: list[Call] = []
    banks = {bank.layer: bank for bank in lab.attachment.bank.layers}
    own = {site.layer: type(site.parent) for site in lab.sites}

    def noting(layer: int) -> type:
        block: Any = own[layer]

        def call(self: Any, *args: Any) -> Any:
            y = block.__call__(self, *args)
            residents = set(banks[layer].residency.slot_of)
            calls.append(Call(layer, args, rows(y), residents))
            return y

        return type(block.__name__, (block,), {"__call__": call})

    try:
        for site in lab.sites:
            site.parent.__class__ = noting(site.layer)
        yield calls
    finally:
        for site in lab.sites:
            site.parent.__class__ = own[site.layer]


def rows(y: Any) -> np.ndarray:
    y = y[0] if isinstance(y, tuple) else y
    return np.array(y.astype(mx.float32)).reshape(-1, y.shape[-1])


def run(lab: Lab) -> None:
    tokens, cache = prompt(sum(CHUNKS), seed=3), make_prompt_cache(lab.model)
    for length in CHUNKS:
        chunk, tokens = tokens[:length], tokens[length:]
        mx.eval(lab.model(mx.array([chunk]), cache=cache))


def check_accounting(action: str, token: list[Any], residents: set[int], experts: int) -> None:
    own = {slot.expert for slot in token}
    used = [slot.computed for slot in token if slot.computed >= 0]
    for slot in token:
        assert slot.hit == (slot.expert in residents)
        assert (slot.outcome == "hit") == slot.hit
        if slot.outcome == "hit":
            assert slot.computed == slot.expert
        elif slot.outcome == "drop":
            assert slot.computed == -1 and slot.applied == 0
            assert action in ("drop", "substitute", "reroute")
        else:
            assert slot.outcome == action
        if slot.outcome in ("substitute", "reroute"):
            assert slot.computed in residents or slot.computed >= experts
            assert slot.computed not in own & residents
        if slot.outcome == "low_bit":
            assert slot.computed == slot.expert
        if slot.outcome == "wrong_slot":
            assert slot.computed in residents
    if action != "wrong_slot":
        assert len(set(used)) == len(used)


def check_weights(action: str, token: list[Any], rule: RouterRule) -> None:
    if action in ("low_bit", "wrong_slot"):
        assert all(slot.applied == slot.weight for slot in token)
        return
    used = [slot for slot in token if slot.computed >= 0]
    if not rule.normalises:
        for slot in used:
            if slot.outcome == "hit":
                np.testing.assert_allclose(slot.applied, slot.weight, rtol=1e-6)
        return
    by = rule.unit.expert_scale
    scale = np.ones(4096) if by is None else np.array(by.astype(mx.float32))
    if any(slot.applied for slot in used):
        np.testing.assert_allclose(
            sum(slot.applied / scale[slot.computed] for slot in used),
            sum(slot.weight / scale[slot.expert] for slot in token),
            rtol=1e-4,
        )


def reference(family: str, site: SwitchSite, call: Call, tokens: list[list[Any]], low: Any) -> Any:
    """What the stock block says, by itself and with what was used in its experts' place."""
    args = call.args
    if family in GIVEN_THEIR_ROUTING:
        shape, kinds = args[1].shape, [a.dtype for a in args[1:]]
        ids = np.array([[slot.expert for slot in token] for token in tokens])
        weights = np.array([[slot.weight for slot in token] for token in tokens])
        given = [ids, weights] if mx.issubdtype(kinds[0], mx.integer) else [weights, ids]
        pairs = zip(given, kinds, strict=True)
        args = (args[0], *(mx.array(g).reshape(shape).astype(k) for g, k in pairs))
    stock = rows(site.parent(*args))
    slots = [{slot.expert: slot for slot in token} for token in tokens]
    site.parent[site.key] = Answers(site, slots, low, args[0])
    try:
        return stock, rows(site.parent(*args))
    finally:
        site.parent[site.key] = site.switch


def checked(family: str, action: str, lab: Lab, sites: dict[int, SwitchSite], rules: Any) -> None:
    with spied(lab) as calls, lab.record() as recording:
        run(lab)
    frames = dict(iter(recording.routing.groupby(["step", "layer"], sort=False)))
    weighed = family != "llama4"
    step, seen, whole, changed = -1, set(), 0, 0
    for call in calls:
        step += call.layer == calls[0].layer
        site = sites[call.layer]
        by_token = frames[step, call.layer].groupby("position")
        tokens = [list(frame.itertuples()) for _, frame in by_token]
        assert len(tokens) == len(call.y) or family.startswith("longcat")
        if family.startswith("longcat"):  # a token may choose identities only
            found = {token[0].position: token for token in tokens}
            first = sum(CHUNKS[:step])
            tokens = [found.get(first + i, []) for i in range(len(call.y))]
        low = requantised(site.switch, 2) if action == "low_bit" else None
        for token in tokens:
            seen |= {slot.outcome for slot in token}
            check_accounting(action, token, call.residents, site.experts)
            if weighed:
                check_weights(action, token, rules[call.layer])
        stock, wanted = reference(family, site, call, tokens, low)
        for t, token in enumerate(tokens):
            size = 1 + np.abs(wanted).max()
            assert np.abs(call.y[t] - wanted[t]).max() <= 2e-4 * size, (step, call.layer, t)
            if all(slot.hit for slot in token):
                whole += 1
                assert np.abs(call.y[t] - stock[t]).max() <= 1e-5 * size, (step, call.layer, t)
            else:
                changed += np.abs(call.y[t] - stock[t]).max() > 1e-3 * size
    assert {"hit", action} <= seen <= {"hit", action, "drop"}
    assert whole and changed
    if family.startswith("longcat") and action == "substitute":
        assert (recording.routing["computed"] >= 16).any(), "an identity in an expert's place"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_action(tmp_path: Path, family: str) -> None:
    folder = made(tmp_path, family)
    model: Any = load_model(folder)[0]
    sites = {site.layer: site for site in find_switches(model, family)}
    rules = ask_rules(model, list(sites.values()))
    with moelab.load(folder, 0.5) as lab, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="on_miss='wrong_slot'|The weights of layers")
        before = [type(module) for module in lab.model.modules()]
        for action in ACTIONS:
            if (family, action) in REFUSED:
                with pytest.raises(MissActionError, match=REFUSED[family, action]):
                    lab.on_miss = action
                assert [type(module) for module in lab.model.modules()] == before
                continue
            lab.on_miss = action
            checked(family, action, lab, sites, rules)
            lab.on_miss = "load"
            assert [type(module) for module in lab.model.modules()] == before


def made(folder: Path, family: str) -> Path:
    quant, seed = QUANTS.get(family, QUANT), SEEDS.get(family, 0)
    return build(folder / "x", config_of(family), quant=quant, seed=seed, chat_template=True)


@pytest.mark.parametrize("action", ["drop", "substitute", "reroute"])
def test_weights_that_nobody_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    """muse_spark normalises and weighs in kernels, so that nothing can be renormalised."""
    from mlx_lm.models import muse_spark

    for kernel in muse.KERNELS:
        monkeypatch.setattr(muse_spark, kernel.__name__, kernel)
    with moelab.load(made(tmp_path, "muse_spark"), 0.5) as lab:
        with pytest.raises(MissActionError, match=NOT_SHOWN):
            lab.on_miss = action
        lab.on_miss = "low_bit"
        run(lab)
