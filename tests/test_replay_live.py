"""The live bank, the replay of its recording, and brute force: event for event the same."""

from __future__ import annotations

from typing import Any

import pytest

import moelab
from moelab.errors import CapacityError
from moelab.experts.policies import REPLAY_ONLY
from moelab.lab import Lab
from moelab.routing.recording import Recording
from tests.support import banks, brute, stock, tiny

LIVE = [name for name in brute.RULES if name not in REPLAY_ONLY]


def record(lab: Lab, prompts: list[Any], tokens: int, chunk: int) -> tuple[Recording, stock.Tally]:
    """Generates from prompts, each a run, with prefill in chunks that sweep, and looks on."""
    tally = stock.Tally(lab)
    with lab.record() as rec:
        for prompt in prompts:
            lab.generate(prompt, tokens, template=False, temperature=0, prefill_step_size=chunk)
    return rec, tally


def agree(lab: Lab, rec: Recording, tally: stock.Tally, policy: str, **contents: Any) -> None:
    """Compares what the bank did with the replay of the recording, and both with brute force."""
    experts = {site.layer: site.experts for site in lab.sites}
    top_k = {site.layer: site.top_k for site in lab.sites}
    capacity = dict(zip(experts, lab.capacities, strict=True))
    result = moelab.replay(rec.routing, policy, capacity=capacity, experts=experts, **contents)
    assert result.routing["hit"].equals(rec.routing["hit"])
    keys = ["run", "step", "layer", "expert"]
    assert result.loads[keys].equals(rec.loads[keys])
    assert result.misses().equals(rec.misses())
    pins, first = contents.get("pins") or {}, contents.get("initial") or ()
    swept = 0
    for layer in lab.attachment.bank.layers:
        number = layer.layer
        live = [event for event in tally.events if event.layer is layer]
        told = result.events[result.events["layer"] == number]
        assert len(told) == len(live)
        assert told["needed"].tolist() == [len(event.needed) for event in live]
        assert told["missed"].tolist() == [len(event.misses) for event in live]
        loads = result.loads[result.loads["layer"] == number]
        assert list(zip(loads["expert"], loads["evicted"], strict=True)) == [
            (load.expert, -1 if load.evicted is None else load.evicted)
            for event in live for loads in event.rounds for load in loads
        ]  # fmt: skip
        bank = brute.Bank(policy, capacity[number], pins.get(number, ()), first, top_k[number])
        sweeps = []
        for event in live:
            assert set(event.before) == bank.inside
            misses, parts = bank.event(event.needed)
            assert event.misses == misses
            # One after another: the live bank reads a round in two halves.
            assert [(load.expert, load.evicted) for r in event.rounds for load in r] == [
                load for part in parts for load in part.loads
            ]
            sweeps.append(len(parts) > 1)
            assert set(event.after or ()) == bank.inside
        assert told["swept"].tolist() == sweeps
        swept += sum(sweeps)
    assert swept > 0


@pytest.mark.parametrize("pinned", [False, True], ids=["free", "pinned"])
@pytest.mark.parametrize("policy", LIVE)
def test_tiny(policy: str, pinned: bool) -> None:
    family = "olmoe" if pinned else "qwen3_moe"
    path = stock.folder(family)
    layers = tiny.moe_layers(family)
    pins = {layers[0]: [15, 3], layers[-1]: [7]} if pinned else None
    first = [4, 3, 9] if policy in ("static", "lfu", "sieve") else []
    with banks.lab_with(path, 6, policy, pins, first) as lab:
        prompts = [tiny.prompt(30, seed=1), tiny.prompt(11, seed=2), tiny.prompt(30, seed=1)]
        rec, tally = record(lab, prompts, 12, chunk=13)
        assert len(tally.loads) > 50
        assert (tally.evictions > 20) == (policy != "static")
        agree(lab, rec, tally, policy, pins=pins, initial=first)


@pytest.mark.parametrize("policy", LIVE)
def test_the_lab_model(policy: str) -> None:
    pins = {0: [5, 40], 3: [63]} if LIVE.index(policy) % 2 else None
    with banks.lab_with("lab", 0.25, policy, pins) as lab:
        prompts = ["The experts of a model", "def main():\n    return"]
        rec, tally = record(lab, prompts, 12, chunk=64)
        agree(lab, rec, tally, policy, pins=pins)


def test_the_output_is_the_same_under_every_policy() -> None:
    """Exact whoever leaves: bit for bit what stock mlx-lm gives."""
    path, prompt = stock.folder("gpt_oss"), tiny.prompt(25)
    want = stock.stock_steps(path, prompt, 8)
    for policy in LIVE:
        with banks.lab_with(path, 4, policy, {0: [5], 2: [11, 12]}) as lab:
            got = lab.stream(prompt, 8, template=False, temperature=0)
            assert stock.same_steps(stock.steps(got), want), policy


def test_a_policy_that_is_not_the_one_that_ran_differs() -> None:
    """So that agreement means something."""
    with banks.lab_with(stock.folder("olmoe"), 6, "lru") as lab:
        rec, _ = record(lab, [tiny.prompt(30, seed=1)], 20, chunk=13)
    loads = {name: moelab.replay(rec.routing, name, capacity=6, experts=16).loads for name in LIVE}
    keys = ["run", "step", "layer", "expert"]
    assert loads["lru"][keys].equals(rec.loads[keys])
    others = [name for name in LIVE if name != "lru" and loads[name].equals(loads["lru"])]
    assert not others


def test_a_recording_says_how_it_was_made() -> None:
    path = stock.folder("olmoe")
    layers = tiny.moe_layers("olmoe")
    capacity = [6] * (len(layers) - 1) + [8]
    pins = {layers[0]: [15, 3], layers[-1]: [7]}
    with moelab.load(path, capacity, pins=pins) as lab:
        rec, _ = record(lab, [tiny.prompt(30, seed=1)], 8, chunk=13)
    result = moelab.replay(rec)
    assert list(result.capacity.values()) == capacity
    assert result.pins[layers[0]] == [3, 15]
    keys = ["run", "step", "layer", "expert"]
    assert result.loads[keys].equals(rec.loads[keys])
    assert result.routing["hit"].equals(rec.routing["hit"])
    assert set(moelab.replay(rec, capacity=10).capacity.values()) == {10}
    with pytest.raises(CapacityError, match="Give capacity="):
        moelab.replay(rec.routing)


def test_a_warm_recording() -> None:
    """A bank that was used before: its residents' recency is in the manifest."""
    with moelab.load(stock.folder("olmoe"), 6, pins=[3]) as lab:
        lab.generate(tiny.prompt(30, seed=5), 10, template=False, temperature=0)
        rec, tally = record(lab, [tiny.prompt(9, seed=1)], 20, chunk=4)
        assert len(tally.loads) > 20
    replayed = moelab.replay(rec)
    keys = ["run", "step", "layer", "expert"]
    assert replayed.loads[keys].equals(rec.loads[keys])
    assert replayed.routing["hit"].equals(rec.routing["hit"])
