"""Where a family chooses its experts, and whether it normalises their weights.

Lossy miss actions must follow the family's own rule, and each family has its own code for it:
softmax before or after the top k, sigmoid with a correction bias and groups, a scaling factor. None
of it is repeated here. The code that selects is found by what it calls (`mx.argpartition`), and
whether weights are normalised is seen by asking: a normalised sum is the same for every input.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..families import SwitchSite, opened_block
from .event import weighted

SELECTS = "argpartition"
"""What code that chooses experts calls."""

SCALES = (0.0, 1.0, 64.0)
"""The router's input is multiplied by these: from all scores equal to one that takes all."""

COMPILED = type(mx.compile(lambda: None))


@dataclass(frozen=True, slots=True)
class RouterUnit:
    """The code that chooses a layer's experts."""

    module: nn.Module
    """The block itself, or a router that returns ids and weights."""
    kind: Literal["block", "router", "unknown"]
    """"unknown": it chooses in a way that is not seen, and `module` is the block."""

    @property
    def expert_scale(self) -> mx.array | None:
        """A factor for each expert that is applied after normalising; gemma4 has one."""
        return self.module.get("per_expert_scale")


@dataclass(frozen=True, slots=True)
class RouterRule:
    """How a layer's weights are made."""

    unit: RouterUnit
    normalises: bool | None
    """The weights of a token's experts always have the same sum; None where they are not seen."""
    shows: bool
    """The block multiplies the switch's output by the weights where that is seen."""


def find_unit(model: nn.Module, site: SwitchSite) -> RouterUnit:
    """Finds the code that chooses the experts of a layer."""
    block = site.parent
    if _selects(type(block)):
        return RouterUnit(block, "block")
    modules = dict(model.named_modules())
    above = modules[site.path.rpartition(".")[0].rpartition(".")[0]]
    # Beneath the block; else beside it, where attention keeps its own selection a level deeper.
    switch = {id(module) for module in site.switch.modules()}
    beneath = [m for m in block.modules() if m is not block and id(m) not in switch]
    for module in [*beneath, *_children(above)]:
        if _selects(type(module)):
            return RouterUnit(module, "router")
    return RouterUnit(block, "unknown")


def ask_rules(model: nn.Module, sites: Sequence[SwitchSite]) -> dict[int, RouterRule]:
    """Finds out how each layer weighs its experts, without computing any expert.

    Args:
        model: mlx-lm's model, its trunk in memory.
        sites: The layers to ask.

    Returns:
        A rule by layer.
    """
    units = {site.layer: find_unit(model, site) for site in sites}
    inputs: dict[int, tuple[Any, ...]] = {}
    switches = {site.layer: site.parent[site.key] for site in sites}
    asked: dict[int, list[mx.array]] = {site.layer: [] for site in sites}
    with Exchanges() as exchanges:
        try:
            for site in sites:
                site.parent[site.key] = _Asked(site.switch, asked[site.layer])
                exchanges.open(site.parent)
                _note_inputs(exchanges, units[site.layer], inputs, site.layer)
            model(mx.arange(1, 9, dtype=mx.int32)[None])
        finally:
            for site in sites:
                site.parent[site.key] = switches[site.layer]
    rules = {}
    for site in sites:
        unit = units[site.layer]
        sums = _sums(site, unit, inputs.get(site.layer, ()))
        normalises = None if sums is None else _constant(sums)
        rules[site.layer] = RouterRule(unit, normalises, shows=bool(asked[site.layer]))
    return rules


def _note_inputs(
    exchanges: Exchanges, unit: RouterUnit, inputs: dict[int, tuple[Any, ...]], layer: int
) -> None:
    def note(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        inputs[layer] = args
        return call(*args, **kwargs)

    exchanges.around(unit.module, note)


def _sums(site: SwitchSite, unit: RouterUnit, args: tuple[Any, ...]) -> mx.array | None:
    """Returns the sums of the weights over the top k for inputs of several sizes."""
    if not args:
        return None
    factors: list[mx.array] = []
    own = site.parent[site.key]
    for scale in SCALES:
        x = args[0]
        noise = mx.random.normal(x.shape, key=mx.random.key(site.layer)).astype(x.dtype)
        try:
            if unit.kind == "router":
                ids, weights = ids_and_weights(unit.module(noise * scale, *args[1:]))
                if unit.expert_scale is not None:
                    weights = weights / unit.expert_scale[ids]
                factors.append(weights)
            else:
                site.parent[site.key] = _Asked(site.switch, factors)
                unit.module(noise * scale, *args[1:])
        finally:
            site.parent[site.key] = own
    if len(factors) != len(SCALES) or factors[0].size == 0:
        return None
    return mx.stack([f.astype(mx.float32).reshape(-1, site.top_k).sum(-1) for f in factors])


def _constant(sums: mx.array) -> bool:
    # Weights may be made in 16 bits; sums that are not normalised differ many times more.
    values = np.array(sums)
    low, high = float(values.min()), float(values.max())
    return bool(high > 0 and high - low <= 0.02 * high)


def ids_and_weights(answer: Any) -> tuple[mx.array, mx.array]:
    """Tells a router's expert ids from their weights."""
    a, b = answer
    return (a, b) if mx.issubdtype(a.dtype, mx.integer) else (b, a)


class _Asked(nn.Module):
    """Stands in for a switch and notes the factor that its output is multiplied by."""

    def __init__(self, switch: nn.Module, factors: list[mx.array]) -> None:
        super().__init__()
        # Past nn.Module's own __setattr__: neither is a part of the model's tree.
        object.__setattr__(self, "stands_for", switch)
        object.__setattr__(self, "factors", factors)

    def __call__(self, x: mx.array, indices: mx.array, *_: Any) -> mx.array:
        factors = self.__dict__["factors"]

        def note(factor: mx.array) -> mx.array:
            factors.append(factor)
            return factor

        zeros = mx.zeros((*indices.shape, x.shape[-1]), x.dtype)
        return weighted(zeros, (*indices.shape, 1), note)

    def __getattr__(self, key: str) -> Any:
        return getattr(self.__dict__["stands_for"], key)


class Exchanges:
    """Puts functions around modules' calls by exchanging their classes, and takes them away.

    `nn.Module` looks `__call__` up on the type, so a function set on an instance is never called.
    """

    def __init__(self) -> None:
        self._exchanged: list[tuple[nn.Module, type, type]] = []

    def __bool__(self) -> bool:
        """Whether a module has another class than its own."""
        return bool(self._exchanged)

    def around(
        self, module: nn.Module, function: Callable[..., Any], base: type | None = None
    ) -> None:
        """Lets `function(call, *args, **kwargs)` stand around a module's call.

        Args:
            module: The module.
            function: Gets the bound call and its arguments.
            base: The class to call in place of the module's own; a subclass of it.
        """
        own = type(module)
        inner = base or own

        class Around(inner):  # type: ignore[misc, valid-type]
            @functools.wraps(inner.__call__)  # mlx-lm asks for the signature
            def __call__(self, *args: Any, **kwargs: Any) -> Any:
                return function(inner.__call__.__get__(self), *args, **kwargs)

        Around.__name__, Around.__qualname__ = own.__name__, own.__qualname__
        Around.__module__, Around.__doc__ = own.__module__, own.__doc__
        self._put(module, Around)

    def open(self, block: nn.Module) -> None:
        """Lets a block show the factor that a compiled sum of its family hides."""
        opened = opened_block(type(block))
        if opened is not None:
            self._put(block, opened)

    def _put(self, module: nn.Module, other: type) -> None:
        self._exchanged.append((module, type(module), other))
        module.__class__ = other

    def undo(self) -> None:
        """Gives every module its own class back. Calling it again does nothing."""
        while self._exchanged:
            module, own, other = self._exchanged[-1]
            module.__class__ = own
            if "__call__" in vars(other):
                # A class lives until garbage collection, and its function may hold the model.
                del other.__call__
            self._exchanged.pop()

    def __enter__(self) -> Exchanges:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def _children(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children().values():
        if isinstance(child, nn.Module):
            yield child


def _selects(cls: type) -> bool:
    """Whether a module's own code, with the functions that it calls, chooses among experts."""
    return any(SELECTS in code.co_names for code in code_of(cls))


def code_of(cls: type) -> Iterator[types.CodeType]:
    """Yields the code of a module's call and of its family's functions that it uses."""
    call = cls.__call__
    if not isinstance(call, types.FunctionType):
        return
    waiting, seen = [(call.__code__, call.__globals__)], set()
    while waiting:
        code, scope = waiting.pop()
        if code in seen:
            continue
        seen.add(code)
        yield code
        for name in code.co_names:
            method = getattr(cls, name, None)
            value = method if isinstance(method, types.FunctionType) else scope.get(name)
            if isinstance(value, types.FunctionType | COMPILED) and _is_familys(value):
                waiting.append((value.__code__, value.__globals__))


def _is_familys(function: Any) -> bool:
    return str(function.__module__).startswith("mlx_lm.models.") or not str(
        function.__module__
    ).startswith(("mlx.", "mlx_lm."))
