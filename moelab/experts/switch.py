"""`PartialSwitch`: stands where a model's `SwitchGLU` stood and computes from the bank.

It gets what the block gives its switch, token activations and expert ids, makes sure that those
experts are in slots, and lets the *stock* switch compute with slot numbers for ids. The block
around it, router, weights and shared experts, is untouched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import AttachedError
from .bank import LayerBank
from .event import LayerEvent
from .lossy import LossyEngine

EAGER_BYTES = 1 << 17
"""An output larger than this is evaluated at once, so that the bank need not hold on to it."""

Observer = Callable[[LayerEvent, mx.array], mx.array]
"""Called with what happened and the switch's output; what it returns is given to the block in the
output's place."""


class PartialSwitch(nn.Module):
    """Runs the experts of one layer from C slots.

    Args:
        bank: The layer's slots.
        original: The switch that this one stands for. Attributes that the family reads from its
            switch are answered by it.
    """

    def __init__(self, bank: LayerBank, original: nn.Module) -> None:
        super().__init__()
        # Past nn.Module's own __setattr__: none of these is a part of the model's tree.
        object.__setattr__(self, "_bank", bank)
        object.__setattr__(self, "original", original)
        object.__setattr__(self, "observer", None)
        object.__setattr__(self, "engine", None)
        self["slots"] = bank.switch  # a child: the slots count as the model's memory

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
        if layer.residency.fits(needed):
            if misses:
                layer.load(layer.residency.admit(needed, misses))
            return layer.switch(x, mx.array(layer.slot_table()[ids])), misses
        return self._sweep(x, ids, needed, misses), misses

    def _sweep(
        self, x: mx.array, ids: np.ndarray, needed: list[int], misses: list[int]
    ) -> mx.array:
        """Computes each round's (token, expert) pairs by themselves, then puts them in order."""
        layer: LayerBank = self._bank
        pairs = ids.reshape(-1)
        tokens = x.reshape(-1, x.shape[-1])
        top_k = ids.shape[-1]
        outputs: list[mx.array] = []
        order: list[np.ndarray] = []
        for served in layer.residency.rounds(needed, misses):
            layer.load(served.loads)
            chosen = np.flatnonzero(np.isin(pairs, served.serve))
            slots = layer.slot_table()[pairs[chosen]]
            y = layer.switch(tokens[mx.array(chosen // top_k)], mx.array(slots[:, None]))
            # Before the next round overwrites the slots that this one read.
            mx.eval(y)
            outputs.append(y.squeeze(-2))
            order.append(chosen)
        back = np.argsort(np.concatenate(order))
        y = mx.concatenate(outputs)[mx.array(back)]
        return y.reshape(*ids.shape, y.shape[-1])
