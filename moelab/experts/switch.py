"""`PartialSwitch`: stands where a model's `SwitchGLU` stood and computes from the bank.

It gets what the block gives its switch, token activations and expert ids, makes sure that those
experts are in slots, and lets the *stock* switch compute with slot numbers for ids. The block
around it, router, weights and shared experts, is untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..backend import openblas_in_use
from ..errors import AttachedError
from .bank import LayerBank
from .event import LayerEvent
from .lossy import LossyEngine
from .residency import Load

EAGER_BYTES = 1 << 17
"""An output larger than this is evaluated at once, so that the bank need not hold on to it."""

Observer = Callable[[LayerEvent, mx.array], mx.array]
"""Called with what happened and the switch's output; what it returns is given to the block in the
output's place."""

STOCK_SORTS = 64
"""From so many (token, expert) pairs on, the stock switch sorts them by expert."""


class PartialSwitch(nn.Module):
    """Runs the experts of one layer from C slots.

    Args:
        bank: The layer's slots.
        original: The switch that this one stands for. Attributes that the family reads from its
            switch are answered by it.

    Attributes:
        observer: Told of every event, or None.
        unread: For the model's last layer: says whether nobody will read this pass's output, so
            that a prompt's chunk loads its experts and computes nothing. None: always read.
    """

    def __init__(self, bank: LayerBank, original: nn.Module) -> None:
        super().__init__()
        # Past nn.Module's own __setattr__: none of these is a part of the model's tree.
        object.__setattr__(self, "_bank", bank)
        object.__setattr__(self, "original", original)
        object.__setattr__(self, "observer", None)
        object.__setattr__(self, "engine", None)
        object.__setattr__(self, "unread", None)
        self["slots"] = bank.switch  # a child: the slots count as the model's memory

    def rebind(self, bank: LayerBank) -> None:
        """Computes from other slots of the same layer from now on."""
        object.__setattr__(self, "_bank", bank)
        self["slots"] = bank.switch

    def set_engine(self, engine: LossyEngine | None, low: nn.Module | None) -> None:
        """Computes by a lossy action from now on, or exactly.

        Args:
            engine: Computes the layer in this switch's place; None for exact.
            low: Copies at few bits, which count as the model's memory.
        """
        object.__setattr__(self, "engine", engine)
        if low is not None:
            self["low"] = low
        else:
            self.pop("low", None)

    def __getattr__(self, key: str) -> Any:
        if "original" not in self.__dict__:
            raise AttributeError(key)
        return getattr(self.__dict__["original"], key)  # what a family reads from its switch

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise AttachedError(
            "A model whose bank is attached cannot be copied or pickled: its slots are filled "
            "from open files. Close the lab first, or load the model a second time."
        )

    def __call__(self, x: mx.array, indices: mx.array) -> Any:
        """Computes each token's chosen experts.

        Args:
            x: Activations, (…, width).
            indices: Expert ids, integer, (…, top-k).

        Returns:
            Outputs, (…, top-k, width), equal to the stock switch's unless an action is lossy.
        """
        layer: LayerBank = self._bank
        if self.engine is not None:
            y, event = self.engine.compute(layer.layer, x, indices)
            return y if self.observer is None or event is None else self.observer(event, y)
        pending = layer.bank.pending
        # The one synchronisation of this design: the ids must be known to know what is missing.
        # What earlier calls computed from slots is evaluated along with them, since a slot may
        # be overwritten below; in ordinary decoding it has been evaluated long since.
        mx.eval(indices, pending)
        pending.clear()
        if indices.size == indices.shape[-1]:
            y, misses = self._one_token(x, indices)
        else:
            y, misses = self._many_tokens(x, indices)
        # Started now, so that it runs while Python builds what follows up to the next read-back.
        mx.async_eval(y)
        layer.end()
        if y.nbytes > EAGER_BYTES:
            mx.eval(y)
        else:
            pending.append(y)
        if self.observer is None:
            return y
        ids = np.array(indices, copy=False)
        return self.observer(LayerEvent(layer.layer, ids, frozenset(misses)), y)

    def _one_token(self, x: mx.array, indices: mx.array) -> tuple[mx.array, list[int]]:
        """A decoded token: so few ids that plain Python is faster than numpy."""
        layer: LayerBank = self._bank
        ids: Any = indices.tolist()
        for _ in range(indices.ndim - 1):
            ids = ids[0]
        needed = sorted(set(ids))
        misses = layer.begin(needed)
        if misses:
            layer.load(layer.residency.admit(needed, misses))
        slot_of = layer.residency.slot_of
        slots: Any = [slot_of[expert] for expert in ids]
        for _ in range(indices.ndim - 1):
            slots = [slots]
        return layer.switch(x, mx.array(slots, mx.uint32)), misses

    def _many_tokens(self, x: mx.array, indices: mx.array) -> tuple[mx.array, list[int]]:
        """A prefill chunk or a batch; swept if it needs more experts than there are slots."""
        layer: LayerBank = self._bank
        ids = np.array(indices, copy=False)
        needed = np.unique(ids).tolist()
        misses = layer.begin(needed)
        if self.unread is not None and self.observer is None and self.unread():
            # Stock never computes this: it is lazy. Should anybody read it after all, it shows.
            for served in layer.residency.rounds(needed, misses):
                layer.load(served.loads)
            nothing = mx.broadcast_to(mx.array(float("nan"), x.dtype), (*ids.shape, x.shape[-1]))
            return nothing, misses
        if layer.residency.fits(needed):
            if misses:
                layer.load(layer.residency.admit(needed, misses))
            return layer.switch(x, mx.array(layer.slot_table()[ids])), misses
        return self._sweep(x, ids, needed, misses), misses

    def _sweep(
        self, x: mx.array, ids: np.ndarray, needed: list[int], misses: list[int]
    ) -> mx.array:
        """Computes the experts in batches, each as soon as it was read, then orders the outputs.

        While a batch computes the next is read: a read waits only for the batches that use the
        slots which it overwrites. Who is read when, and who stays, is the residency's to say.
        """
        layer: LayerBank = self._bank
        pairs = ids.reshape(-1)
        tokens = x.reshape(-1, x.shape[-1])
        top_k = ids.shape[-1]
        # Of each expert: where its (token, rank) pairs are in `pairs`.
        grouped = np.argsort(pairs, kind="stable")
        where = dict(zip(needed, np.split(grouped, np.flatnonzero(np.diff(pairs[grouped])) + 1),
                         strict=True))  # fmt: skip
        outputs: list[mx.array] = []
        order: list[np.ndarray] = []
        batch_using: dict[int, mx.array] = {}

        least = STOCK_SORTS if pairs.size >= STOCK_SORTS and _bits_differ(self.original) else 0

        def compute(experts: Sequence[int]) -> None:
            chosen = np.concatenate([where[expert] for expert in experts])
            count = len(chosen)
            if count < least:
                chosen = np.pad(chosen, (0, least - count), mode="edge")
            slots = layer.slot_table()[pairs[chosen]]
            y = layer.switch(tokens[mx.array(chosen // top_k)], mx.array(slots[:, None]))
            mx.async_eval(y)
            batch_using.update((layer.residency.slot_of[expert], y) for expert in experts)
            outputs.append(y.squeeze(-2)[:count] if count < least else y.squeeze(-2))
            order.append(chosen[:count])

        for served in layer.residency.rounds(needed, misses):
            read = {load.expert for load in served.loads}
            resident = [expert for expert in served.serve if expert not in read]
            if resident:
                compute(resident)
            for batch in _halves(served.loads):
                mx.eval([batch_using[slot] for _, slot, _ in batch if slot in batch_using])
                layer.load(batch)
                if batch:
                    compute([load.expert for load in batch])
        back = np.argsort(np.concatenate(order))
        y = mx.concatenate(outputs)[mx.array(back)]
        return y.reshape(*ids.shape, y.shape[-1])


def _bits_differ(switch: nn.Module) -> bool:
    """Whether the stock switch gives other bits for few pairs, unsorted, than for many.

    So it is with unquantised experts and OpenBLAS: the rows of sorted and of unsorted pairs have
    other strides, for which OpenBLAS has other kernels. A batch of few pairs of an event of many
    is then filled up with pairs that nobody needs.
    """
    return openblas_in_use() and any(
        hasattr(projection, "num_experts") and "scales" not in projection
        for projection in switch.values()
    )


def _halves(loads: Sequence[Load]) -> list[Sequence[Load]]:
    """Splits a round's loads in two, so that one half computes while the other is read."""
    half = (len(loads) + 1) // 2
    return [loads[:half], loads[half:]] if len(loads) > 1 else [loads]
