"""Watches a lab's model run: one `Step` for each forward pass, for whoever records.

The model's class is exchanged for a subclass while somebody watches, since `nn.Module` looks
`__call__` up on the type. Switches tell of ids and misses; what the block multiplies their
output by is caught by `Weighted`. Nothing here waits for a computation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..experts.residency import Load
from ..families import SwitchSite
from .loop import LoopView, view


@dataclass(slots=True)
class LayerEvent:
    """One layer in one step."""

    layer: int
    ids: np.ndarray | mx.array
    """Expert ids (…, top-k); lazy where the layer is stock."""
    missing: frozenset[int] | None
    """Experts that were not resident; None where all always are."""
    weights: mx.array | None = None
    """What the block multiplied the experts' outputs by, (…, top-k, 1); lazy."""


@dataclass(slots=True)
class Step:
    """One forward pass."""

    serial: int
    inputs: mx.array
    """Token ids, (rows, length)."""
    cache: Any
    """The cache that the pass was given; None without one."""
    offset: int | None
    """Tokens in the cache before the pass, where the cache says."""
    loop: LoopView
    events: list[LayerEvent] = field(default_factory=list)
    loads: list[tuple[int, Sequence[Load], Sequence[float]]] = field(default_factory=list)
    logits: mx.array | None = None
    seconds: float = float("nan")


class StepListener(Protocol):
    """Who is told of steps."""

    def stepped(self, step: Step) -> None:
        """A forward pass ended, or was interrupted (then with the layers that it reached)."""


class Weighted:
    """A switch's output that notices by what it is multiplied.

    Blocks compute `(y * weights[..., None]).sum(-2)`; the factor is exactly what they applied, in
    every family, with no knowledge of how it was made. Everything else is passed on.
    """

    __slots__ = ("_array", "_event")

    def __init__(self, array: mx.array, event: LayerEvent) -> None:
        self._array = array
        self._event = event

    def __mul__(self, factor: Any) -> mx.array:
        self._event.weights = factor
        return self._array * factor

    __rmul__ = __mul__

    def astype(self, dtype: mx.Dtype) -> Weighted:
        """Converts, still watching."""
        return Weighted(self._array.astype(dtype), self._event)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._array, name)


class WatchedSwitch(nn.Module):
    """Stands for a stock switch while its routing is watched."""

    def __init__(self, layer: int, switch: nn.Module, observer: Callable[..., Any]) -> None:
        super().__init__()
        object.__setattr__(self, "layer", layer)
        object.__setattr__(self, "observer", observer)
        object.__setattr__(self, "original", switch)
        self["switch"] = switch

    def __call__(self, x: mx.array, indices: mx.array) -> Any:
        """Computes as the stock switch does, and tells the observer."""
        y = self.original(x, indices)
        return self.observer(self.layer, indices, None, y)

    def __getattr__(self, key: str) -> Any:
        return getattr(self.__dict__["original"], key)


class StepWatch:
    """The watch over one lab's model, shared by all who listen.

    Args:
        model: mlx-lm's model.
        sites: Its MoE layers.
        switches: The replaced switches, by layer.
        bank_watchers: Told of loads; the watch adds itself while it is in place.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[SwitchSite],
        switches: dict[int, Any],
        bank_watchers: list[Any],
    ) -> None:
        self.listeners: list[StepListener] = []
        self._model = model
        self._sites = sites
        self._switches = switches
        self._bank_watchers = bank_watchers
        self._current: Step | None = None
        self._serial = 0
        self._own_class: type | None = None

    def add(self, listener: StepListener) -> None:
        """Adds a listener; the first one puts the watch in place."""
        self.listeners.append(listener)
        if self._own_class is None:
            self._install()

    def remove(self, listener: StepListener) -> None:
        """Removes a listener; the last one takes the watch away."""
        self.listeners = [known for known in self.listeners if known is not listener]
        if not self.listeners and self._own_class is not None:
            self._uninstall()

    def loaded(self, layer: int, loads: Sequence[Load], seconds: Sequence[float]) -> None:
        """Told by the bank."""
        if self._current is not None:
            self._current.loads.append((layer, loads, seconds))

    def _install(self) -> None:
        own, watch = type(self._model), self

        class Watched(own):  # type: ignore[misc, valid-type]
            def __call__(self, *args: Any, **kwargs: Any) -> Any:
                return watch._forward(own.__call__.__get__(self), args, kwargs)

        Watched.__name__, Watched.__qualname__ = own.__name__, own.__qualname__
        Watched.__module__ = own.__module__
        self._own_class = own
        self._model.__class__ = Watched
        for site in self._sites:
            if site.layer in self._switches:
                object.__setattr__(self._switches[site.layer], "observer", self._observe)
            else:
                site.parent[site.key] = WatchedSwitch(site.layer, site.switch, self._observe)
        self._bank_watchers.append(self)

    def _uninstall(self) -> None:
        self._bank_watchers[:] = [w for w in self._bank_watchers if w is not self]
        for site in self._sites:
            if site.layer in self._switches:
                object.__setattr__(self._switches[site.layer], "observer", None)
            else:
                site.parent[site.key] = site.switch
        self._model.__class__ = self._own_class
        self._own_class = None

    def _forward(self, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._current is not None:  # a model that calls itself: part of the step under way
            return call(*args, **kwargs)
        inputs = args[0] if args else kwargs["inputs"]
        cache = kwargs.get("cache", args[1] if len(args) > 1 else None)
        step = Step(self._serial, inputs, cache, tokens_in(cache), view(inputs.shape[1]))
        self._serial += 1
        self._current = step
        begin = time.perf_counter()
        try:
            output = call(*args, **kwargs)
            if step.loop.logits_used or any(getattr(s, "wants_logits", 0) for s in self.listeners):
                step.logits = output
            return output
        finally:
            self._current = None
            if self._switches:
                step.seconds = time.perf_counter() - begin
            for listener in self.listeners:
                listener.stepped(step)

    def _observe(
        self, layer: int, ids: Any, missing: frozenset[int] | None, y: mx.array
    ) -> mx.array | Weighted:
        if self._current is None:
            return y
        event = LayerEvent(layer, ids, missing)
        self._current.events.append(event)
        return Weighted(y, event)


def tokens_in(cache: Any) -> int | None:
    """Returns the tokens in a cache, or None if no part of it counts them (or it is a batch's)."""
    for part in cache or ():
        offset = getattr(part, "offset", None)
        if type(offset) is int:
            return offset
    return None
