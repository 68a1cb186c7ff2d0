"""How each tiny family scores, selects and weighs, written again in plain numpy.

Nothing here comes from moelab or from mlx-lm's blocks: the router's weight matrix is read, and the
family's published rule is computed in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

Array = np.ndarray


def softmax(z: Array) -> Array:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sigmoid(z: Array) -> Array:
    return 1 / (1 + np.exp(-z))


def dense(linear: Any) -> Array:
    """The weight matrix of a linear layer, dequantised."""
    if "scales" in linear:
        w = mx.dequantize(
            linear.weight, linear.scales, linear.get("biases"), linear.group_size, linear.bits,
            mode=linear.mode,
        )  # fmt: skip
    else:
        w = linear.weight
    return np.array(w.astype(mx.float32)).astype(np.float64)


def logits_of(linear: Any, x: Array) -> Array:
    z = x @ dense(linear).T
    return z + np.array(linear.bias).astype(np.float64) if "bias" in linear else z


@dataclass
class Scores:
    """One layer's scores of a few tokens, (tokens, experts)."""

    selection: Array
    """By these the top k are chosen."""
    own: Array
    """What an expert carries into the sum, before normalising and scaling."""
    allowed: Array
    """Experts in the groups that a token may choose from."""


@dataclass
class Rule:
    """A family's rule for one block."""

    scores: Callable[[Array], Scores]
    weigh: Callable[[Array], Array]
    """From the chosen experts' own scores, (chosen,), to their weights."""
    normalises: bool

    def weights(self, own: Array) -> Array:
        return self.weigh(own) if len(own) else own


def rule_of(family: str, block: Any, config: dict[str, Any]) -> Rule:
    """The rule of a block of a tiny model, attached or not."""

    def everything(shape: tuple[int, ...]) -> Array:
        return np.ones(shape, bool)

    def from_logits(linear: Any) -> Callable[[Array], Scores]:
        def scores(x: Array) -> Scores:
            z = logits_of(linear, x)
            return Scores(z, z, everything(z.shape))

        return scores

    def from_softmax(linear: Any) -> Callable[[Array], Scores]:
        def scores(x: Array) -> Scores:
            p = softmax(logits_of(linear, x))
            return Scores(p, p, everything(p.shape))

        return scores

    if family == "mixtral":
        return Rule(from_logits(block.gate), softmax, True)
    if family == "gpt_oss":
        return Rule(from_logits(block.router), softmax, True)
    if family == "qwen2_moe":
        return Rule(from_softmax(block.gate), lambda own: own, False)
    if family in ("qwen3_moe", "qwen3_next", "olmoe"):
        if config["norm_topk_prob"]:
            return Rule(from_softmax(block.gate), lambda own: own / own.sum(), True)
        return Rule(from_softmax(block.gate), lambda own: own, False)
    assert family == "deepseek_v3"
    scale = config["routed_scaling_factor"]
    gate = block.gate
    weight = np.array(gate.weight).astype(np.float64)
    bias = np.array(gate.e_score_correction_bias).astype(np.float64)
    groups, kept = config["n_group"], config["topk_group"]

    def grouped(x: Array) -> Scores:
        own = sigmoid(x @ weight.T)
        biased = own + bias
        n, e = biased.shape
        by_group = biased.reshape(n, groups, e // groups)
        best = np.sort(by_group, -1)[..., -2:].sum(-1)
        chosen = np.argsort(-best, -1)[:, :kept]
        allowed = np.zeros((n, groups), bool)
        np.put_along_axis(allowed, chosen, True, -1)
        allowed = np.repeat(allowed, e // groups, axis=1)
        # As published code has it: a masked expert's score is 0, not minus infinity.
        return Scores(np.where(allowed, biased, 0.0), own, allowed)

    if config["norm_topk_prob"]:
        return Rule(grouped, lambda own: scale * own / own.sum(), True)
    return Rule(grouped, lambda own: scale * own, False)


def top(values: Array, k: int) -> list[int]:
    """Indices of the k largest, largest first."""
    return np.argsort(-values, kind="stable")[:k].tolist()


@dataclass
class Slot:
    """What a reference says of one routed slot."""

    expert: int
    weight: float
    outcome: str
    computed: int
    applied: float


def reference(
    action: str,
    rule: Rule,
    scores: Scores,
    token: int,
    top_k: int,
    residents: set[int],
    *,
    bonus: float = 0.0,
    first: int = -1,
) -> list[Slot]:
    """What an action does with one token, by its definition, in the order of the router's ranks.

    Args:
        action: Its name.
        rule: The family's rule.
        scores: The layer's scores.
        token: Row of `scores`.
        top_k: Experts a token.
        residents: Experts in memory.
        bonus: For reroute, λΔ.
        first: For wrong_slot, the expert in slot 0.
    """
    selection, own = scores.selection[token], scores.own[token]
    chosen = top(selection, top_k)
    plain = dict(zip(chosen, rule.weights(own[chosen]), strict=True))
    if action == "reroute":
        biased = selection + [
            bonus if e in residents and scores.allowed[token, e] else 0.0 for e in range(len(own))
        ]
        picked = top(biased, top_k)
    else:
        picked = chosen
    computed: dict[int, tuple[str, int]] = {}
    if action == "reroute":
        came = sorted(set(picked) - set(chosen), key=lambda e: -selection[e])
        gave = [e for e in chosen if e not in picked]
        for e in chosen:
            computed[e] = ("hit", e) if e in residents else ("drop", -1)
        for e, new in zip(gave, came, strict=True):
            computed[e] = ("reroute", new) if new in residents else ("drop", -1)
    elif action == "substitute":
        free = [
            e for e in top(selection, len(own))
            if e in residents and e not in chosen and scores.allowed[token, e]
        ]  # fmt: skip
        for e in chosen:
            if e in residents:
                computed[e] = ("hit", e)
            else:
                computed[e] = ("substitute", free.pop(0)) if free else ("drop", -1)
    else:
        other = {"drop": -1, "wrong_slot": first}
        for e in chosen:
            here = e in residents
            computed[e] = ("hit", e) if here else (action, other.get(action, e))
    if action in ("drop", "substitute", "reroute"):
        used = [c for _, c in computed.values() if c >= 0]
        applied = dict(zip(used, rule.weights(own[used]), strict=True))
    else:
        applied = {}
    return [
        Slot(e, plain[e], outcome, c, applied.get(c, 0.0) if applied or c < 0 else plain[e])
        for e, (outcome, c) in computed.items()
    ]
