"""Lets a miss action have a say in which experts a family's own code selects.

The code that selects is run as it is, with one difference: the module that it knows as `mx` is one
whose `argpartition` may be told to prefer some experts. Everything after it (weights from the
unbiased scores, normalisation, scaling) is the family's own. Functions that mlx compiles would keep
the first answer for ever, so those that take part are run uncompiled.

Each selection is made twice: as the family would, which says what missed and at what weight, and
with the preference. The first costs a router's product; no expert is computed for it.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import MissActionError
from ..families import SwitchSite
from .event import Weighted, weighted
from .router import COMPILED, Exchanges, RouterUnit, code_of, ids_and_weights

Prefer = Callable[[mx.array, mx.array | None, mx.array | None], mx.array]
"""Gets selection scores (…, experts), higher is better; the experts that the token may choose from
(bool, same shape; None for all); and those that the family chose by itself (…, top-k). Returns the
scores to select by."""


class _Enough(Exception):
    """The first pass through a block has shown what it is run for."""


class Selection:
    """One layer's selection while a miss action has a say in it.

    Args:
        site: The layer.
        unit: The code that selects.
        prefer: The action's say.
        begins: Called before each selection.

    Attributes:
        plain: Whether the family is selecting as it would by itself.
        ids: What it selected by itself, (…, top-k).
        weights: The factors of `ids`, (…, top-k, 1); None where the block shows none.
        scores: The selection scores, (…, experts), higher is better.
        chosen: Ids and weights, (…, top-k), that a router gave with the preference; None where the
            block itself selects.
    """

    def __init__(
        self, site: SwitchSite, unit: RouterUnit, prefer: Prefer, begins: Callable[[], None]
    ) -> None:
        if unit.kind == "unknown":
            raise MissActionError(
                f"{type(site.parent).__name__} chooses its experts in a way that cannot be "
                "influenced from outside (no argpartition over their scores), so 'substitute' and "
                "'reroute' cannot be had for this family. Take 'load', 'drop' or 'low_bit'."
            )
        self.plain = False
        self.ids: mx.array | None = None
        self.weights: mx.array | None = None
        self.scores: mx.array | None = None
        self.chosen: tuple[mx.array, mx.array] | None = None
        self._site = site
        self._unit = unit
        self._prefer = prefer
        self._begins = begins
        self._allowed: mx.array | None = None
        self._exchanges = Exchanges()
        self._running = False

    def install(self) -> None:
        """Puts the say in place; `remove` takes it away."""
        function = self._around_block if self._unit.kind == "block" else self._around_router
        own = type(self._unit.module)
        self._exchanges.around(self._unit.module, function, _with_proxy(own, _Proxy(self)))

    def remove(self) -> None:
        """Gives the family its own code back. Calling it again does nothing."""
        self._exchanges.undo()

    def stub(self, x: mx.array, indices: mx.array) -> Weighted:
        """Answers in the switch's place while the family selects by itself."""
        self.ids, self.weights = indices, None

        def caught(factor: mx.array) -> mx.array:
            self.weights = factor
            raise _Enough

        zeros = mx.zeros((*indices.shape, x.shape[-1]), x.dtype)
        return weighted(zeros, (*indices.shape, 1), caught)

    def _around_block(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._begins()
        self.plain = True
        try:
            call(*args, **kwargs)
        except _Enough:
            pass
        finally:
            self.plain = False
        return self._preferring(call, *args, **kwargs)

    def _around_router(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._begins()
        self.ids, weights = ids_and_weights(call(*args, **kwargs))
        self.weights = weights[..., None]
        answer = self._preferring(call, *args, **kwargs)
        self.chosen = ids_and_weights(answer)
        return answer

    def _preferring(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._running, self.scores, self._allowed = True, None, None
        try:
            return call(*args, **kwargs)
        finally:
            self._running = False

    def mask(self, masked: mx.array) -> None:
        """Told which experts are in groups that the token may choose from, (…, groups, n)."""
        self._allowed = masked.flatten(-2, -1)

    def select(self, a: mx.array, kth: int, axis: int) -> mx.array | None:
        """Returns what to select in place of `argpartition(a, kth, axis)`; None: as it says."""
        top_k = self._site.top_k
        if not self._running or axis not in (-1, a.ndim - 1) or a.shape[-1] < self._site.experts:
            return None
        if kth not in (top_k - 1, -top_k):
            return None
        # The smallest are taken of negated scores, the largest of plain ones.
        sign = -1 if kth == top_k - 1 else 1
        self.scores = a if sign > 0 else -a
        preferred = self._prefer(self.scores, self._allowed, self.ids)
        return mx.argpartition(sign * preferred, kth, axis)

    @property
    def running(self) -> bool:
        """Whether the family is selecting with the preference."""
        return self._running


class _Proxy:
    """What the selecting code knows as `mx`."""

    def __init__(self, selection: Selection) -> None:
        self._selection = selection

    def __getattr__(self, name: str) -> Any:
        return getattr(mx, name)

    def argpartition(self, a: mx.array, kth: int, axis: int = -1, **kwargs: Any) -> mx.array:
        """As `mx.argpartition`, with the preference."""
        chosen = self._selection.select(a, kth, axis)
        return mx.argpartition(a, kth, axis, **kwargs) if chosen is None else chosen

    def put_along_axis(
        self, a: mx.array, indices: mx.array, values: mx.array, axis: int | None = None, **kw: Any
    ) -> mx.array:
        """As `mx.put_along_axis`; this is how families mask groups of experts."""
        if self._selection.running and axis == -2:
            ones = mx.ones(a.shape, mx.bool_)
            self._selection.mask(mx.put_along_axis(ones, indices, mx.array(False), axis=-2))
        return mx.put_along_axis(a, indices, values, axis=axis, **kw)


def _with_proxy(cls: type, proxy: _Proxy) -> type:
    """Returns a subclass whose code, and the family's functions that it uses, see `proxy`."""
    scopes: dict[int, dict[str, Any]] = {}
    used = {name for code in code_of(cls) for name in code.co_names}

    def scope_of(scope: dict[str, Any]) -> dict[str, Any]:
        if id(scope) in scopes:
            return scopes[id(scope)]
        copied = scopes[id(scope)] = dict(scope)
        for name, value in scope.items():
            if value is mx:
                copied[name] = proxy
            elif name in used and isinstance(value, types.FunctionType | COMPILED):
                own = value.__globals__
                if str(own.get("__name__")).startswith("mlx."):
                    continue
                copied[name] = _copy(value, scope_of(own))
        return copied

    methods = {
        name: _copy(value, scope_of(value.__globals__))
        for base in reversed(cls.__mro__)
        if issubclass(base, nn.Module) and base is not nn.Module
        for name, value in vars(base).items()
        if isinstance(value, types.FunctionType) and name != "__init__"
    }
    return type(cls.__name__, (cls,), {**methods, "__module__": cls.__module__})


def _copy(function: Any, scope: dict[str, Any]) -> types.FunctionType:
    copied = types.FunctionType(
        function.__code__, scope, function.__name__, function.__defaults__, function.__closure__
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied
