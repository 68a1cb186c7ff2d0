"""Promise 2: each lossy miss action is what it says, and nothing like running a wrong expert.

A model runs under an action; what each block was given and answered is noted, with the residents
of that moment. The answer is then computed again: scores, selection and weights in plain numpy
(`tests/support/rules.py`), each expert's output by the stock switch that has all experts.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

import moelab
from moelab.errors import MissActionError, MoelabError
from moelab.experts import copies, lowbit
from moelab.experts.misses import ACTIONS, LowBit, MissAction, Reroute
from moelab.lab import Lab
from tests.support import rules, stock, tiny
from tests.support.lowbit import requantised

LOSSY = [name for name in ACTIONS if name != "load"]
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in tiny.FAMILIES},
    "olmoe normalised": ("olmoe", {"norm_topk_prob": True}),
    "qwen3_moe not normalised": ("qwen3_moe", {"norm_topk_prob": False}),
    "deepseek_v3 not normalised": ("deepseek_v3", {"norm_topk_prob": False}),
    "deepseek_v3 without groups": ("deepseek_v3", {"n_group": 1, "topk_group": 1}),
    "deepseek_v3 two groups of four": ("deepseek_v3", {"n_group": 4, "topk_group": 2}),
    "qwen3_next top-6": ("qwen3_next", {"num_experts_per_tok": 6}),
}
"""Softmax before and after the top k, sigmoid with bias and groups, scaled, normalised or not."""


@dataclass
class Call:
    """One block in one step."""

    layer: int
    x: np.ndarray
    y: np.ndarray
    residents: set[int]
    first: int


def folder(variant: str, quant: str = "affine4") -> Path:
    family, overrides = VARIANTS[variant]
    if not overrides:
        return stock.folder(family, quant)
    return variant_folder(variant, quant)


_made: dict[tuple[str, str], Path] = {}


def variant_folder(variant: str, quant: str) -> Path:
    if (variant, quant) not in _made:
        family, overrides = VARIANTS[variant]
        root = stock.folder(family, quant).parent / f"{variant.replace(' ', '-')}-{quant}"
        _made[variant, quant] = tiny.build(
            root, family, quant=stock.QUANTS[quant], overrides=overrides
        )
    return _made[variant, quant]


def spied(lab: Lab) -> list[Call]:
    """Notes every block's calls, until the lab is closed."""
    calls: list[Call] = []
    for site in lab.sites:
        own = type(site.parent)
        layer = next(b for b in lab.attachment.bank.layers if b.layer == site.layer)

        def noting(self: Any, x: mx.array, own: type = own, layer: Any = layer) -> Any:
            y = own.__call__(self, x)
            slot_of = dict(layer.residency.slot_of)
            first = next((e for e, slot in slot_of.items() if slot == 0), -1)
            calls.append(Call(layer.layer, rows(x), rows(y), set(slot_of), first))
            return y

        site.parent.__class__ = type(own.__name__, (own,), {"__call__": noting})
    return calls


def rows(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).reshape(-1, array.shape[-1])


def run(lab: Lab, seed: int, prompt: int = 16, decode: int = 4) -> None:
    tokens = tiny.prompt(prompt + decode, seed=seed)
    cache = make_prompt_cache(lab.model)
    for chunk in (
        tokens[: prompt // 2],
        tokens[prompt // 2 : prompt],
        *([t] for t in tokens[prompt:]),
    ):
        mx.eval(lab.model(mx.array([chunk]), cache=cache))


class Full:
    """The stock model's blocks: any expert's output for any input."""

    def __init__(self, path: Path) -> None:
        model, _ = stock.stock(path)
        from moelab.families import find_switches

        self.sites = {site.layer: site for site in find_switches(model, "stock")}

    def outputs(self, layer: int, x: np.ndarray, low_bits: int | None = None) -> np.ndarray:
        """(tokens, experts, width) of all experts."""
        site = self.sites[layer]
        switch = site.switch
        if low_bits is not None:
            switch = requantised(switch, low_bits)
        ids = mx.broadcast_to(mx.arange(site.experts, dtype=mx.uint32), (len(x), site.experts))
        return np.array(switch(mx.array(x), ids))

    def block(self, layer: int, x: np.ndarray) -> np.ndarray:
        return np.array(self.sites[layer].parent(mx.array(x)[None])[0])


class Ranges:
    """Δ of each layer: the mean over tokens so far of max − min of the allowed scores."""

    def __init__(self) -> None:
        self.seen: dict[int, list[float]] = {}

    def next(self, layer: int, scores: rules.Scores, token: int) -> float:
        mine = scores.selection[token][scores.allowed[token]]
        self.seen.setdefault(layer, []).append(float(mine.max() - mine.min()))
        return float(np.mean(self.seen[layer]))


def expected(
    call: Call, action: Any, variant: str, full: Full, ranges: Ranges, config: dict[str, Any]
) -> tuple[np.ndarray, list[list[rules.Slot]]]:
    """What the block should have answered, and what became of each routed slot."""
    family, _ = VARIANTS[variant]
    site = full.sites[call.layer]
    rule = rules.rule_of(family, site.parent, config)
    scores = rule.scores(call.x.astype(np.float64))
    outputs = full.outputs(call.layer, call.x)
    low = full.outputs(call.layer, call.x, action.bits) if isinstance(action, LowBit) else outputs
    y = full.block(call.layer, call.x).astype(np.float64)
    slots = []
    for t in range(len(call.x)):
        bonus = 0.0
        if isinstance(action, Reroute):
            bonus = action.strength * ranges.next(call.layer, scores, t)
        mine = rules.reference(
            action.name, rule, scores, t, site.top_k, call.residents, bonus=bonus, first=call.first
        )
        slots.append(mine)
        for slot in mine:
            y[t] -= slot.weight * outputs[t, slot.expert]
            if slot.computed >= 0:
                source = low if slot.outcome == "low_bit" else outputs
                y[t] += slot.applied * source[t, slot.computed]
    return y, slots


@pytest.fixture(autouse=True)
def no_baseline_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="on_miss='wrong_slot'")
        yield


def close(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.abs(a - b).max() <= 2e-4 * (1 + np.abs(b).max()))


def capacities(variant: str) -> list[int]:
    """Top-k, a half, and all but one."""
    family, overrides = VARIANTS[variant]
    experts, top_k = tiny.experts(family)
    top_k = overrides.get("num_experts_per_tok", top_k)
    return sorted({top_k, experts // 2, experts - 1})


@pytest.mark.parametrize("action", LOSSY)
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_reference_and_is_recorded(variant: str, action: str) -> None:
    path = folder(variant)
    full = Full(path)
    outcomes = set()
    for seed, capacity in enumerate(capacities(variant)):
        with moelab.load(path, capacity, on_miss=action, swap_budget=seed or None) as lab:
            calls = spied(lab)
            with lab.record() as rec:
                run(lab, seed)
            ranges, differs = Ranges(), False
            routing = rec.routing
            by_step = routing.groupby(["step", "layer"], sort=False)
            frames = dict(iter(by_step))
            step = -1
            for call in calls:
                step += call.layer == calls[0].layer
                y, slots = expected(call, lab.miss_action, variant, full, ranges, lab.config)
                assert close(call.y, y), (step, call.layer)
                outcomes |= {slot.outcome for mine in slots for slot in mine}
                differs |= not close(full.block(call.layer, call.x), call.y)
                check_recorded(frames[step, call.layer], slots, call.residents)
            assert differs or capacity > lab.sites[0].experts // 2
    assert {"hit", action} <= outcomes <= {"hit", action, "drop"}


def check_recorded(frame: Any, slots: list[list[rules.Slot]], residents: set[int]) -> None:
    rows = frame.sort_values(["position", "rank"], kind="stable")
    got = {
        (row.position, row.expert): (row.outcome, row.computed, row.weight, row.applied, row.hit)
        for row in rows.itertuples()
    }
    positions = sorted(rows["position"].unique())
    assert len(positions) == len(slots) and len(got) == sum(map(len, slots))
    for position, mine in zip(positions, slots, strict=True):
        for slot in mine:
            outcome, computed, weight, applied, hit = got[position, slot.expert]
            assert (outcome, computed) == (slot.outcome, slot.computed)
            assert hit == (slot.expert in residents)
            np.testing.assert_allclose([weight, applied], [slot.weight, slot.applied], atol=2e-5)


@pytest.mark.parametrize("variant", ["qwen3_next", "olmoe", "deepseek_v3", "gpt_oss"])
def test_differs_from_the_wrong_slot(variant: str) -> None:
    """What mlx-moe does on a miss is none of the actions."""
    path, tokens = folder(variant), mx.array([tiny.prompt(20)])
    capacity = capacities(variant)[1]
    found = {}
    for action in ACTIONS:
        with moelab.load(path, capacity, on_miss=action, swap_budget=0) as lab:
            found[action] = np.array(lab.model(tokens).astype(mx.float32))
    for action, logits in found.items():
        if action != "wrong_slot":
            assert np.abs(logits - found["wrong_slot"]).max() > 1e-2, action
    model, _ = stock.stock(path)
    assert np.array_equal(found["load"], np.array(model(tokens)))


class Swaps:
    """LRU and the rule of what enters after a step, written again from the rules of the bank."""

    def __init__(self, capacity: int, budget: int, initial: list[int]) -> None:
        self.capacity, self.budget = capacity, budget
        self.residents = set(initial[:capacity])
        # The most worth keeping first, so the last is the first to leave.
        self.used = {e: (-1, -place) for place, e in enumerate(initial[:capacity])}
        self.clock = 0

    def step(self, slots: list[list[rules.Slot]]) -> None:
        needed = sorted({slot.expert for mine in slots for slot in mine})
        mass = dict.fromkeys(needed, 0.0)
        for mine in slots:
            for slot in mine:
                mass[slot.expert] += slot.weight
        for place, e in enumerate(needed):
            self.used[e] = (self.clock, place)
        self.clock += 1
        kept = set(needed) if len(needed) <= self.capacity else set()
        wanted = sorted(set(needed) - self.residents, key=lambda e: (-mass[e], e))
        for e in wanted[: self.budget]:
            if len(self.residents) >= self.capacity:
                leaving = sorted(self.residents - kept, key=self.used.__getitem__)
                leaving = [x for x in leaving if x not in self.entered_now(wanted)]
                if not leaving:
                    break
                self.residents.remove(leaving[0])
            self.residents.add(e)

    def entered_now(self, wanted: list[int]) -> set[int]:
        return set(wanted[: self.budget])


@pytest.mark.parametrize("action", ["drop", "substitute", "reroute"])
@pytest.mark.parametrize("budget", [0, 1, 3, None])
@pytest.mark.parametrize("variant", ["qwen3_next", "deepseek_v3"])
def test_what_enters_between_steps(variant: str, budget: int | None, action: str) -> None:
    path = folder(variant)
    full = Full(path)
    for capacity in capacities(variant):
        with moelab.load(path, capacity, on_miss=action, swap_budget=budget) as lab:
            calls = spied(lab)
            run(lab, seed=3, decode=8)
            ranges, changed = Ranges(), False
            banks = {
                site.layer: Swaps(
                    capacity, site.top_k if budget is None else budget, list(range(site.experts))
                )
                for site in lab.sites
            }
            for call in calls:
                assert call.residents == banks[call.layer].residents
                _, slots = expected(call, lab.miss_action, variant, full, ranges, lab.config)
                banks[call.layer].step(slots)
                changed |= banks[call.layer].residents != set(range(capacity))
            assert changed == (budget != 0)


def test_the_action_changes_without_loading_again() -> None:
    path = folder("qwen3_next")
    tokens = mx.array([tiny.prompt(30)])
    fresh = {}
    for action in ACTIONS:
        with moelab.load(path, 8, on_miss=action) as lab:
            fresh[action] = lab.model(tokens)
            mx.eval(fresh[action])
    with moelab.load(path, 8) as lab:
        for action in [*ACTIONS, *reversed(ACTIONS)]:
            lab.on_miss = action
            assert lab.on_miss == action
            assert stock.equal(lab.model(tokens), fresh[action]), action
        before = lab.memory()
    assert before.low_bit == 0


def test_low_bit_copies_count_as_memory() -> None:
    with moelab.load(folder("qwen3_next"), 8) as lab:
        plain = lab.memory()
        lab.set_on_miss(LowBit(bits=2))
        two = lab.memory()
        lab.set_on_miss(LowBit(bits=3))
        three = lab.memory()
        # 3 projections of 64 × 64, 32 experts, 4 layers: bits, a float32 scale and bias a group.
        assert two.low_bit == 3 * 4 * 32 * (64 * 64 * 2 // 8 + 64 * 8)
        assert three.low_bit == 3 * 4 * 32 * (64 * 64 * 3 // 8 + 64 * 8)
        assert two.total - two.low_bit == plain.total == three.total - three.low_bit
        lab.on_miss = "load"
        assert lab.memory() == plain


def test_low_bit_copies_are_made_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOELAB_CACHE", str(tmp_path))
    monkeypatch.setattr("moelab.experts.copies.KEEP_FROM_SECONDS", 0.0)
    path, tokens = folder("gpt_oss"), mx.array([tiny.prompt(20)])

    def logits(capacity: int | list[int]) -> mx.array:
        with moelab.load(path, capacity, on_miss="low_bit") as lab:
            y = lab.model(tokens)
            mx.eval(y)
            return y

    made: list[int] = []
    real = lowbit.low_bit_copies

    def counted(layer: Any, bits: int) -> Any:
        made.append(layer.layer)
        return real(layer, bits)

    monkeypatch.setattr(copies, "low_bit_copies", counted)
    some = logits([8, 8, 16, 16])
    assert made == [0, 1]
    first = logits(8)
    assert made == [0, 1, 2, 3], "those on disk are taken, the others made"
    again, other = logits(8), logits([8, 8, 16, 16])
    assert made == [0, 1, 2, 3]
    assert stock.equal(first, again) and stock.equal(some, other)
    (kept,) = (tmp_path / "copies").iterdir()
    kept.write_bytes(kept.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="cannot be read"):
        assert stock.equal(logits(8), first)
    assert made == [0, 1, 2, 3] * 2
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(mx, "save_safetensors", lambda *a, **k: (_ for _ in ()).throw(full))
    kept.unlink()
    with pytest.warns(UserWarning, match="could not be kept.*No space"):
        assert stock.equal(logits(8), first)
    assert list((tmp_path / "copies").iterdir()) == []


def test_reroute_strength() -> None:
    path, tokens = folder("qwen3_moe"), mx.array([tiny.prompt(20)])
    answers = {}
    actions: dict[str, str | MissAction] = {
        "0": Reroute(0.0), "drop": "drop", "9": Reroute(9.0), "substitute": "substitute",
    }  # fmt: skip
    for name, action in actions.items():
        with moelab.load(path, 8, on_miss=action, swap_budget=0) as lab:
            answers[name] = np.array(lab.model(tokens))
    np.testing.assert_allclose(answers["0"], answers["drop"], atol=1e-5)
    np.testing.assert_allclose(answers["9"], answers["substitute"], atol=1e-5)
    assert np.abs(answers["0"] - answers["9"]).max() > 1e-2


def test_an_empty_cache_begins_a_run() -> None:
    """As a chat's first turn does: Δ is a mean from the run's start, not from another's."""
    from mlx_lm.models.cache import make_prompt_cache

    with moelab.load(folder("qwen3_moe"), 4, on_miss=Reroute(), swap_budget=0) as lab:

        def passed(cache: list[Any]) -> int:
            for _ in lab.stream(list(range(5, 25)), 3, temperature=0.0, prompt_cache=cache):
                pass
            engine = lab.attachment._engine
            assert engine is not None
            return next(iter(engine.layers.values())).range.count

        cache = make_prompt_cache(lab.model)
        first = passed(cache)
        assert first > 20
        assert passed(cache) == 2 * first  # the conversation goes on
        assert passed(make_prompt_cache(lab.model)) == first


def test_nothing_waits_inside_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a lossy action a forward pass waits for nothing; only between two does one wait."""
    waits: list[str] = []
    for name in ("eval", "async_eval"):
        real = getattr(mx, name)

        def noted(*arrays: Any, name: str = name, real: Any = real) -> None:
            waits.append(name)
            real(*arrays)

        monkeypatch.setattr(mx, name, noted)
    for action in LOSSY:
        with moelab.load(folder("qwen3_next"), 8, on_miss=action, swap_budget=0) as lab:
            cache = make_prompt_cache(lab.model)
            mx.eval(lab.model(mx.array([[5, 6]]), cache=cache))
            waits.clear()
            lab.model(mx.array([[7]]), cache=cache)
            # Begun at the last layer and not waited for, so that any thread may take the next step.
            assert "eval" not in waits and len(waits) <= 2, action


def test_wrong_slot_warns() -> None:
    with moelab.load(folder("olmoe"), 4) as lab, pytest.warns(UserWarning, match="a baseline"):
        lab.on_miss = "wrong_slot"


def test_bad_actions() -> None:
    path = folder("olmoe")
    with pytest.raises(MissActionError, match=r"'load', 'drop', .*'wrong_slot'.*got 'skip'"):
        moelab.load(path, 4, on_miss="skip")
    for budget in (-1, 1.5, True, "2"):
        with pytest.raises(MissActionError, match="swap_budget"):
            moelab.load(path, 4, on_miss="drop", swap_budget=budget)  # type: ignore[arg-type]
    with pytest.raises(MissActionError, match="2 or 3 bits, got bits=4"):
        LowBit(bits=4)
    for strength in (-0.1, float("nan"), float("inf")):
        with pytest.raises(MissActionError, match="strength"):
            Reroute(strength)
    with moelab.load(path, 4) as lab:
        with pytest.raises(MissActionError):
            lab.on_miss = "skip"
        assert lab.on_miss == "load"
        with lab.record(), pytest.raises(MoelabError, match="recorded"):
            lab.on_miss = "drop"
