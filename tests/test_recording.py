"""Recording: the weights that blocks apply, and that recording changes nothing."""

from __future__ import annotations

import gc
import inspect
import json
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

import moelab
from moelab.errors import ClosedError
from moelab.families import find_switches
from moelab.lab import Lab
from tests.support import stock, tiny

PROMPT = tiny.prompt(21)
SCALE = 1024.0
"""Of the basis vectors: what a block adds besides its experts rounds away less of the weights."""


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """A recorder that cannot record something says so by a warning: here that is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


class Basis(nn.Module):
    """In a switch's place: expert e answers with basis vector e, so a block's output is weights."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self._scale = scale
        self.asked: list[np.ndarray] = []

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        self.asked.append(np.array(indices).reshape(-1, indices.shape[-1]))
        return (mx.eye(x.shape[-1])[indices] * self._scale).astype(x.dtype)


def block_inputs(lab: Lab) -> dict[int, list[mx.array]]:
    """Notes what each MoE block of a lab is given, from now on."""
    seen: dict[int, list[mx.array]] = {}
    for site in lab.sites:
        own = type(site.parent)
        inputs = seen[site.layer] = []

        def noting(self: Any, x: mx.array, own: type = own, inputs: list = inputs) -> Any:
            inputs.append(x)
            return own.__call__(self, x)

        site.parent.__class__ = type(own.__name__, (own,), {"__call__": noting})
    return seen


def oracle(model: nn.Module, family: str, layer: int, x: mx.array) -> tuple[np.ndarray, np.ndarray]:
    """Weights of all experts (tokens, experts) and the ids that the router asked for."""
    site = {s.layer: s for s in find_switches(model, family)}[layer]
    try:
        site.parent[site.key] = basis = Basis(SCALE)
        both = site.parent(x).astype(mx.float32)
        site.parent[site.key] = Basis(0.0)
        others = site.parent(x).astype(mx.float32)  # shared experts
    finally:
        site.parent[site.key] = site.switch
    weights = np.array((both - others) / SCALE).reshape(-1, x.shape[-1])
    return weights[:, : site.experts], basis.asked[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_weights_are_what_the_block_applied(family: str, dtype: str) -> None:
    path = stock.folder(family, dtype=dtype)
    model, _ = stock.stock(path)
    with moelab.load(path, 0.5) as lab:
        seen = block_inputs(lab)
        with lab.record() as rec:
            lab.generate(PROMPT, 5, template=False, prefill_step_size=9)
    routing = rec.routing
    # The last token's block may not have run: mlx-lm looks ahead only where it goes on.
    assert set(rec.tokens["phase"]) == {"prefill", "decode"}
    top_k = tiny.experts(family)[1]
    assert sorted(routing["layer"].unique()) == tiny.moe_layers(family)
    for layer, rows in routing.groupby("layer"):
        experts = rows["expert"].to_numpy().reshape(-1, top_k)
        recorded = rows["weight"].to_numpy().reshape(-1, top_k)
        assert np.array_equal(rows["rank"], np.tile(np.arange(top_k), len(experts)))
        assert (np.diff(recorded, axis=1) <= 0).all(), "rank 0 has the highest weight"
        answers = [oracle(model, family, layer, x) for x in seen[layer]]
        asked = np.concatenate([ids for _, ids in answers])
        assert np.array_equal(np.sort(experts), np.sort(asked)), "the router's own choice"
        weights = np.concatenate([w for w, _ in answers])
        assert len(weights) == len(experts) == len(rec.tokens)
        expected = np.take_along_axis(weights, experts, axis=1)
        close = 2e-6 if dtype == "float32" else 2.0**-7
        np.testing.assert_allclose(recorded, expected, rtol=close, atol=close / 4)
        # And nothing else has a weight.
        np.put_along_axis(weights, experts, 0, axis=1)
        assert np.abs(weights).max() < close


class Reversed(nn.Module):
    """A block that multiplies the other way round, as gemma4 does."""

    weigh: Callable[[mx.array, mx.array], mx.array] = staticmethod(
        lambda y, w: (w[..., None] * y).sum(axis=-2)
    )

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block

    def __call__(self, x: mx.array) -> mx.array:
        inds, scores = self.block.gate(x)
        return self.weigh(self.block.switch_mlp(x, inds), scores)


class Squared(Reversed):
    """A block that hands the outputs to a function, where the factor cannot be seen."""

    weigh = staticmethod(mx.compile(lambda y, w: (y * w[..., None]).sum(axis=-2)))


class Scaled(Reversed):
    """A block that first multiplies by something that is no weight."""

    weigh = staticmethod(lambda y, w: ((y * 2.0) * w[..., None]).sum(axis=-2))


class Before(Reversed):
    """A block that weighs before the experts compute, as llama4 does."""

    weigh = staticmethod(lambda y, w: y.sum(axis=-2))


@pytest.mark.parametrize("block", [Reversed, Squared, Scaled, Before])
@pytest.mark.parametrize("capacity", [4, 16])
def test_other_ways_to_weigh(block: type[Reversed], capacity: int) -> None:
    """Recording neither breaks nor changes a block that it does not understand."""
    x = mx.array([PROMPT])
    with moelab.load(stock.folder("deepseek_v3"), capacity) as lab:
        for site in lab.sites:
            layer = lab.model.layers[site.layer]
            dict.__setitem__(layer, "mlp", block(site.parent))
        expected = lab.model(x)
        mx.eval(expected)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with lab.record() as rec:
                assert stock.equal(lab.model(x), expected)
    assert len(rec.routing) == len(PROMPT) * 2 * len(lab.sites)
    if block is Reversed:
        assert not rec.run["problems"]
        sums = rec.routing.groupby(["position", "layer"])["weight"].sum()
        np.testing.assert_allclose(sums, 2.5, rtol=1e-5)  # its routed_scaling_factor
    else:
        assert rec.routing["weight"].isna().all(), "never a wrong weight"
        assert [str(w.message) for w in said] == rec.run["problems"]
        assert "weights of layers [1, 2]" in rec.run["problems"][0]


def test_identity_experts_are_not_routed() -> None:
    """As longcat does, which sends its identity experts to expert 0 with a weight of zero."""
    with moelab.load(stock.folder("mixtral"), 4) as lab:
        for site in lab.sites:
            own = type(site.parent)

            def masked(self: Any, x: mx.array) -> mx.array:
                inds = mx.broadcast_to(mx.array([3, 0]), (*x.shape[:-1], 2))
                weights = mx.broadcast_to(mx.array([0.0, 0.25]), inds.shape)
                return (self.switch_mlp(x, inds) * weights[..., None]).sum(axis=-2)

            site.parent.__class__ = type(own.__name__, (own,), {"__call__": masked})
        with lab.record() as rec:
            lab.model(mx.array([PROMPT]))
    assert len(rec.routing) == len(PROMPT) * len(lab.sites)
    assert set(rec.routing["expert"]) == {0} and set(rec.routing["rank"]) == {0}
    assert ((rec.tokens["hits"] + rec.tokens["misses"]) == len(lab.sites)).all()


# Promise 4: recording changes nothing.


def outputs(lab: Lab) -> list[Any]:
    """All that can be compared: generation, and 30 outputs held lazily and evaluated at the end."""
    lab.reset()
    generated = stock.steps(lab.stream(PROMPT, 6, template=False, prefill_step_size=9))
    cache = make_prompt_cache(lab.model)
    held = [lab.model(mx.array([tiny.prompt(3, seed=i)]), cache=cache) for i in range(15)]
    held += [lab.model(mx.array([tiny.prompt(4, seed=i)])) for i in range(15)]
    mx.eval(held)
    return [generated, [stock.bits(h) for h in held]]


def same(a: list[Any], b: list[Any]) -> bool:
    return stock.same_steps(a[0], b[0]) and all(map(np.array_equal, a[1], b[1]))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_recording_changes_nothing(family: str) -> None:
    for capacity in tiny.capacities(family)[1::2]:  # a part, and another part or all
        with moelab.load(stock.folder(family), capacity) as lab:
            before = outputs(lab)
            with lab.record(), lab.record(prompt_logprobs=True):
                during = outputs(lab)
            assert same(before, during)
            assert same(before, outputs(lab))


def snapshot(lab: Lab) -> list[Any]:
    """Classes, identities and own attributes of all modules."""
    modules = dict(lab.model.named_modules())
    bank = lab.attachment.bank
    own = {name: {k: id(v) for k, v in vars(m).items()} for name, m in modules.items()}
    return [
        {name: (type(m), id(m)) for name, m in modules.items()},
        own,
        sorted(name for name, _ in nn.utils.tree_flatten(nn.Module.parameters(lab.model))),
        list(bank.watchers),
        {layer: vars(switch)["observer"] for layer, switch in lab.attachment.switches.items()},
        list(lab.watch.listeners),
        list(lab.sessions),
    ]


@pytest.mark.parametrize("capacity", [4, 16])
@pytest.mark.parametrize("first", ["inner", "outer"])
def test_nested_recorders_remove_only_themselves(capacity: int, first: str) -> None:
    with moelab.load(stock.folder("qwen2_moe"), capacity) as lab:
        found = snapshot(lab)
        sessions = [lab.record(), lab.record()]
        x = mx.array([PROMPT])
        a = sessions[0].__enter__()
        lab.model(x)
        b = sessions[1].__enter__()
        lab.model(x[:, :5])
        ends, stays = (1, 0) if first == "inner" else (0, 1)
        sessions[ends].__exit__(None, None, None)
        assert type(lab.model) is not found[0][""][0], "somebody still watches"
        lab.model(x[:, :7])
        sessions[stays].__exit__(None, None, None)
        assert snapshot(lab) == found
        lab.model(x)
        lengths = [list(rec.tokens.groupby("run").size()) for rec in (a, b)]
        whole, part = [21, 5, 7], [5]
        assert lengths == ([whole, part] if first == "inner" else [[21, 5], [5, 7]])
        with pytest.raises(ClosedError):
            sessions[0].__enter__()


def test_an_exception_in_the_block() -> None:
    with moelab.load(stock.folder("qwen3_next"), 0.25) as lab:
        found = snapshot(lab)
        with pytest.raises(ZeroDivisionError), lab.record() as rec:
            lab.model(mx.array([PROMPT]))
            raise ZeroDivisionError
        assert snapshot(lab) == found
        assert len(rec.tokens) == len(PROMPT)


def test_the_model_looks_as_it_did() -> None:
    """To mlx-lm's own questions, parameters' names included, nothing is different meanwhile."""
    with moelab.load(stock.folder("olmoe"), 16) as lab:
        names = [name for name, _ in nn.utils.tree_flatten(lab.model.parameters())]
        signature, shown = inspect.signature(lab.model.__call__), repr(lab.model)
        with lab.record():
            assert [n for n, _ in nn.utils.tree_flatten(lab.model.parameters())] == names
            assert inspect.signature(lab.model.__call__) == signature
            assert repr(lab.model) == shown
            assert isinstance(lab.sites[0].switch, type(stock.stock(lab.path)[0].layers[0].mlp
                                                        .switch_mlp))  # fmt: skip


def test_a_lab_closed_inside() -> None:
    lab = moelab.load(stock.folder("olmoe"), 4)
    with lab.record() as rec:
        lab.generate(PROMPT, 3, template=False)
        lab.close()
    assert type(lab.model).__module__ == "mlx_lm.models.olmoe"
    assert stock.equal(lab.model(mx.array([PROMPT])), stock.stock(lab.path)[0](mx.array([PROMPT])))
    assert rec.loads["bytes"].sum() == rec.tokens["bytes_read"].sum() > 0


def test_a_finished_recording_holds_neither_cache_nor_model() -> None:
    lab = moelab.load(stock.folder("qwen3_next"), 8)
    cache = make_prompt_cache(lab.model)
    session = lab.record(prompt_logprobs=True)
    with session as rec:
        mlx_lm.generate(lab.model, lab.tokenizer, PROMPT, max_tokens=4, prompt_cache=cache)
    gone = [weakref.ref(part) for part in cache]
    del cache, session
    gc.collect()
    assert not any(ref() for ref in gone)
    model, bank = weakref.ref(lab.model), weakref.ref(lab.attachment.bank)
    lab.close()
    del lab
    gc.collect()
    assert model() is None and bank() is None
    assert len(rec.routing) and len(rec.tokens) == 25


def test_a_recording_under_way_keeps_no_cache_alive() -> None:
    with moelab.load(stock.folder("qwen3_next"), 8) as lab, lab.record() as rec:
        cache = make_prompt_cache(lab.model)
        lab.model(mx.array([PROMPT]), cache=cache)
        gone = [weakref.ref(part) for part in cache]
        del cache
        lab.model(mx.array([PROMPT]))
        lab.model(mx.array([PROMPT]))
        gc.collect()
        assert not any(ref() for ref in gone)
    assert rec.tokens["run"].nunique() == 3


def test_the_manifest_names_all_that_matters() -> None:
    with moelab.load(stock.folder("qwen2_moe", chat_template=True), 5) as lab:
        lab.generate(PROMPT, 2, template=False)
        # Most recently used first, which is how the policy ranks them.
        before = {
            layer.layer: list(layer.residency.policy._order)[::-1]  # type: ignore[attr-defined]
            for layer in lab.attachment.bank.layers
        }
        held = {b.layer: set(b.residency.slot_of) for b in lab.attachment.bank.layers}
        assert {layer: set(order) for layer, order in before.items()} == held
        with lab.record() as rec:
            lab.generate("the router", 3, template=False, seed=7, temperature=0.5)
            lab.generate("the router", 3, prefill_step_size=4, top_p=np.float64(0.9))
        fingerprint = lab.fingerprint
    run = json.loads(json.dumps(rec.run, default=float))
    assert run["fingerprint"] == fingerprint and run["model_type"] == "qwen2_moe"
    assert (run["capacity"], run["policy"], run["on_miss"]) == (5, "lru", "load")
    assert (run["layers"], run["experts"], run["top_k"]) == ([0, 1, 2], [16] * 3, [2] * 3)
    assert run["initial_bank"] == {str(k): v for k, v in before.items()}
    assert any(before.values())
    first, second = run["generations"]
    assert first["template"] is False and first["sampling"]["seed"] == 7
    assert first["sampling"]["temperature"] == 0.5 and first["prefill_step_size"] == 2048
    assert second["template"] == "auto" and second["prefill_step_size"] == 4
    assert second["prompt_tokens"] > first["prompt_tokens"] and second["sampling"]["seed"] is None
    assert {"moelab", "mlx", "mlx-lm"} <= set(run["versions"])
    assert run["machine"]["system"] and run["started"] and run["problems"] == []
    assert run["prompt_logprobs"] is False
