"""The bank of one model: slots in memory, filled from disk as the router asks.

One `LayerBank` a layer; the `Bank` holds what they share. A layer's slots are MLX arrays of
shape (slots, …), and the stock switch computes over them with expert ids replaced by slot
numbers, so the arithmetic is mlx-lm's own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..checkpoint.headers import TensorSpan
from ..errors import MoelabError
from ..families import SwitchSite
from .loader import ExpertLoader, TensorRows
from .policies import LRU, Policy
from .readers import Files
from .residency import Load, Residency


class Watcher(Protocol):
    """Who is told what happens in the bank. Calls come from the thread that runs the model."""

    def loaded(self, layer: int, loads: Sequence[Load], seconds: Sequence[float]) -> None:
        """Experts were read from disk."""


class Bank:
    """What the layers of one model share.

    Attributes:
        layers: The partially resident layers, in order.
        files: The open shards.
        pending: Outputs that were computed from slots and may not be evaluated yet.
        watchers: Told of every load.
    """

    def __init__(self) -> None:
        self.layers: list[LayerBank] = []
        self.files = Files()
        self.pending: list[mx.array] = []
        self.watchers: list[Watcher] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(layer.nbytes for layer in self.layers)

    def finish(self) -> bool:
        """Evaluates what was computed from slots, so that these may be overwritten.

        Returns:
            False if some of it was left lazy by a forward pass that was cut off on another thread:
            no other thread can evaluate it, and it has no reader, since the pass gave no output.
        """
        whole = True
        for lazy in self.pending:  # one by one: those that can be evaluated must be
            try:
                mx.eval(lazy)
            except RuntimeError as error:
                if "Stream" not in str(error):
                    raise
                whole = False
        self.pending.clear()
        return whole

    def clear(self) -> None:
        """Empties every slot, as after loading; the memory stays."""
        self.finish()
        for layer in self.layers:
            layer.clear()

    def close(self) -> None:
        """Closes the files."""
        self.pending.clear()
        for layer in self.layers:
            layer.loader.settle()
        self.files.close()


class LayerBank:
    """The slots of one layer.

    Args:
        bank: The model's bank.
        site: The layer's switch, whose own arrays are lazy and are not touched.
        capacity: Slots.
        policy: Who leaves.
        spans: Origin of each tensor, by projection and name.
        pinned: Experts that never leave once they are in.
        widen: Read 16-bit floats into float32 slots.

    Attributes:
        changes: Grows with every change of what sits in the slots.
    """

    def __init__(
        self,
        bank: Bank,
        site: SwitchSite,
        capacity: int,
        policy: Policy,
        spans: Mapping[tuple[str, str], tuple[TensorSpan, ...]],
        *,
        pinned: Iterable[int] = (),
        widen: bool = False,
    ) -> None:
        self.bank = bank
        self.layer = site.layer
        self.experts = site.experts
        self.site = site
        self.changes = 0
        self._spans = spans
        self._widen = widen
        self.residency = Residency(capacity, policy, pinned)
        self.switch, arrays = _with_slots(site, capacity, widen)
        self.nbytes = sum(array.nbytes for array in arrays.values())
        self.loader = ExpertLoader(
            bank.files,
            {
                key: TensorRows(
                    ".".join(key),
                    spans[key],
                    _byte_view(array),
                    widen=widen and spans[key][0].dtype in ("BF16", "F16"),
                )
                for key, array in arrays.items()
            },
        )
        self._in_event = False

    @property
    def capacity(self) -> int:
        """Slots of this layer."""
        return self.residency.capacity

    @property
    def paths(self) -> set[Path]:
        """The files that its experts are read from."""
        return {span.path for spans in self._spans.values() for span in spans}

    def begin(self, needed: Sequence[int]) -> list[int]:
        """Starts an event; returns the misses. Mends what an interrupted event left behind."""
        if self._in_event:
            self.mend()
        self._in_event = True
        return self.residency.begin(needed)

    def mend(self) -> None:
        """Makes the slots consistent after an event that was interrupted, if one was."""
        if self._in_event:
            self.changes += 1
            self.loader.settle()
            self.residency.recover()
            self._in_event = False

    def exchange(self, needed: Sequence[int], wanted: Sequence[int], budget: int) -> None:
        """Ends a lossy step; see `Residency.exchange`.

        Nothing in flight may read the slots, as with `load`.
        """
        self.mend()
        self._in_event = True
        self.load(self.residency.exchange(needed, wanted, budget))
        self._in_event = False

    def fill(self, experts: Sequence[int], top_k: int) -> None:
        """Reads experts into empty slots; see `Residency.fill`."""
        self._in_event = True
        self.load(self.residency.fill(experts, top_k))
        self._in_event = False

    def scratch(self, slots: int) -> LayerBank:
        """Returns a bank of the same layer with slots of its own, that the model does not use."""
        return LayerBank(self.bank, self.site, slots, LRU(), self._spans, widen=self._widen)

    def end(self) -> None:
        """Ends the event that `begin` started."""
        self.residency.end()
        self._in_event = False

    def clear(self) -> None:
        """Empties every slot."""
        self.loader.settle()
        self._in_event = True  # so that the next event mends it if this is interrupted
        self.changes += 1
        self.residency.clear()
        self._in_event = False

    def load(self, loads: Sequence[Load]) -> None:
        """Reads experts into slots.

        Nothing in flight may read those slots: the caller has evaluated all that was computed
        from them.
        """
        if not loads:
            return
        self.changes += 1
        seconds = self.loader.read(loads)
        for load in loads:
            self.residency.arrived(load)
        for watcher in self.bank.watchers:
            watcher.loaded(self.layer, loads, seconds)

    def resized(self, capacity: int) -> LayerBank:
        """Returns a bank of the same layer with so many slots and what is most worth keeping.

        This one stays as it is. Nothing in flight may read its slots.
        """
        self.mend()
        other = LayerBank(self.bank, self.site, capacity, LRU(), self._spans, widen=self._widen)
        other.residency = self.residency.resized(capacity, self.site.top_k)
        here, there = self.residency.slot_of, other.residency.slot_of
        other.loader.take(self.loader, [(here[expert], slot) for expert, slot in there.items()])
        return other

    def slot_table(self) -> np.ndarray:
        """Returns uint32 (experts,): the slot of each resident expert, 0 for the others."""
        table = np.zeros(self.experts, np.uint32)
        for expert, slot in self.residency.slot_of.items():
            table[expert] = slot
        return table


def _with_slots(
    site: SwitchSite, capacity: int, widen: bool
) -> tuple[nn.Module, dict[tuple[str, str], mx.array]]:
    """Copies a switch, with (slots, …) arrays in place of its (experts, …) ones."""
    switch = copy.copy(site.switch)
    arrays: dict[tuple[str, str], mx.array] = {}
    for name, projection in site.projections.items():
        switch[name] = copy.copy(projection)
    for name, key, array in site.tensors():
        narrow = array.dtype in (mx.bfloat16, mx.float16)
        dtype = mx.float32 if widen and narrow else array.dtype
        slots = mx.zeros((capacity, *array.shape[1:]), dtype)
        switch[name][key] = arrays[name, key] = slots
    mx.eval(arrays)
    return switch, arrays


def _byte_view(array: mx.array) -> np.ndarray:
    """Returns a writable uint8 (slots, bytes) view of an evaluated array's memory."""
    # numpy has no bfloat16; another type of the same size sees the same memory.
    plain = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    mx.eval(plain)
    view = np.array(plain, copy=False).reshape(array.shape[0], -1).view(np.uint8)
    # Proven, not assumed: a byte written through the view must be seen by MLX.
    view[-1, -1] = 0xA5
    seen = array.view(mx.uint8).reshape(array.shape[0], -1)[-1, -1].item()
    view[-1, -1] = 0
    if seen != 0xA5:
        raise MoelabError(
            f"MLX on {mx.default_device()} gives no writable view of an array's memory, which the "
            "bank needs to read experts into it. Please report this with your MLX version."
        )
    return view
