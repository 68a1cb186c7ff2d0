"""Watches a lab's model run: one `Step` for each forward pass, for whoever records.

While somebody watches, the classes of the model and of its stock switches are exchanged for
subclasses, since `nn.Module` looks `__call__` up on the type; names, parameters and identity of
the modules stay. Switches tell of ids and misses; what the block multiplies their output by is
caught by `experts.event.Weighted`. Nothing here waits for a computation.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from ..experts.event import LayerEvent, noting
from ..experts.residency import Load
from ..experts.router import Exchanges
from ..families import SwitchSite
from .loop import LoopView, view


@dataclass(slots=True)
class Step:
    """One forward pass."""

    serial: int
    inputs: mx.array
    """Token ids, (rows, length)."""
    cache: Any
    """The cache that the pass was given; None without one."""
    offset: int | mx.array | None
    """Tokens in the cache before the pass, where the cache says; an array has one a row."""
    loop: LoopView
    events: list[LayerEvent] = field(default_factory=list)
    loads: list[tuple[int, Sequence[Load], Sequence[float]]] = field(default_factory=list)
    logits: mx.array | None = None
    seconds: float = float("nan")
    ended: bool = False
    """False while it runs, and for good if it was interrupted."""


class StepListener(Protocol):
    """Who is told of steps."""

    def begins(self, step: Step) -> None:
        """A forward pass begins.

        The step fills up while it runs and stays as it is once the next one begins; an
        interrupted one has the layers that it reached. Telling at the beginning means that no
        interrupt can come between a step and its listeners, and that what is done here is done
        while MLX still works on the step before.
        """


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
        self._exchanges = Exchanges()

    def add(self, listener: StepListener) -> None:
        """Adds a listener; the first one puts the watch in place."""
        self.listeners = [*self.listeners, listener]
        if not self._exchanges:
            try:
                self._install()
            except BaseException:
                self.remove(listener)
                raise

    def remove(self, listener: StepListener) -> None:
        """Removes a listener; the last one takes the watch away."""
        self.listeners = [known for known in self.listeners if known is not listener]
        if not self.listeners:
            self._uninstall()

    def loaded(self, layer: int, loads: Sequence[Load], seconds: Sequence[float]) -> None:
        """Told by the bank."""
        if self._current is not None:
            self._current.loads.append((layer, loads, seconds))

    def _install(self) -> None:
        self._bank_watchers.append(self)
        for site in self._sites:
            if site.layer in self._switches:
                object.__setattr__(self._switches[site.layer], "observer", self._observe)
            else:
                self._exchanges.around(site.switch, functools.partial(self._stock, site.layer))
            self._exchanges.open(site.parent)
        self._exchanges.around(self._model, self._forward)

    def _uninstall(self) -> None:
        self._bank_watchers[:] = [w for w in self._bank_watchers if w is not self]
        for switch in self._switches.values():
            object.__setattr__(switch, "observer", None)
        self._exchanges.undo()
        self._current = None

    def _forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._current is not None:
            if _is_under_way(self._current):  # a model that calls itself: part of the same step
                return call(*args, **kwargs)
            self._current = None  # its end was cut off by an interrupt
        inputs = _token_ids(args, kwargs)
        if inputs is None:
            return call(*args, **kwargs)
        cache = kwargs.get("cache", args[1] if len(args) > 1 else None)
        step = Step(self._serial, inputs, cache, tokens_in(cache), view(inputs.shape[1]))
        self._serial += 1
        for listener in self.listeners:
            listener.begins(step)
        self._current = step
        begin = time.perf_counter()
        try:
            output = call(*args, **kwargs)
            if step.loop.logits_used or any(getattr(s, "wants_logits", 0) for s in self.listeners):
                step.logits = output
            if self._switches:
                step.seconds = time.perf_counter() - begin
            step.ended = True
            return output
        finally:
            self._current = None

    def _stock(self, layer: int, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stands around the call of a switch that has all its experts."""
        indices = args[1] if len(args) > 1 else kwargs["indices"]
        return self._observe(LayerEvent(layer, indices, None), call(*args, **kwargs))

    def _observe(self, event: LayerEvent, y: mx.array) -> mx.array:
        if self._current is None:
            return y
        self._current.events.append(event)
        # A lossy action watches the weights itself, since it changes them.
        return noting(y, event) if event.lossy is None else y


def tokens_in(cache: Any) -> int | mx.array | None:
    """Returns the tokens in a cache, one number a row for a batch's, None if no part counts."""
    for part in parts_of(cache):
        for inner in getattr(part, "caches", (part,)):
            offset = getattr(inner, "offset", None)
            if type(offset) is int or isinstance(offset, mx.array):
                return offset
    return None


def parts_of(cache: Any) -> list[Any]:
    """Returns a cache's parts, usually one a layer, without the empty ones."""
    if cache is None:
        return []
    return [p for p in (cache if isinstance(cache, list | tuple) else [cache]) if p is not None]


def _token_ids(args: Any, kwargs: Any) -> mx.array | None:
    """Returns a forward pass's token ids, (rows, length); -1 where embeddings stand for them.

    None if the pass is none over tokens.
    """
    inputs = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
    embedded = kwargs.get("input_embeddings")
    if isinstance(embedded, mx.array) and (inputs is None or inputs.shape != embedded.shape[:-1]):
        inputs = mx.full(embedded.shape[:-1], -1, mx.int32)
    if isinstance(inputs, mx.array) and inputs.ndim == 2 and inputs.size:
        return inputs
    return None


def _is_under_way(step: Step) -> bool:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code is StepWatch._forward.__code__ and frame.f_locals.get("step") is step:
            return True
        frame = frame.f_back
    return False
