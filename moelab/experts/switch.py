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

from .bank import LayerBank
from .residency import Round

EAGER_BYTES = 1 << 20
"""An output larger than this is evaluated at once, so that the bank need not hold on to it."""

Observer = Callable[[int, np.ndarray, frozenset[int] | None, mx.array], Any]
"""Called with layer, ids (tokens, top-k), the missing experts (None: all are always resident) and
the switch's output; what it returns is given to the block in the output's place."""


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
        self["slots"] = bank.switch  # a child: the slots count as the model's memory

    def __getattr__(self, key: str) -> Any:
        return getattr(self.__dict__["original"], key)  # what a family reads from its switch

    def __call__(self, x: mx.array, indices: mx.array) -> Any:
        """Computes each token's chosen experts.

        Args:
            x: Activations, (…, width).
            indices: Expert ids, integer, (…, top-k).

        Returns:
            Outputs, (…, top-k, width), equal to the stock switch's.
        """
        layer: LayerBank = self._bank
        pending = layer.bank.pending
        # The one synchronisation of this design: the ids must be known to know what is missing.
        # What earlier calls computed from slots is evaluated along with them, since a slot may
        # be overwritten below; in ordinary decoding it has been evaluated long since.
        mx.eval(indices, pending)
        pending.clear()
        ids = np.array(indices, copy=False)
        needed = sorted(set(ids.ravel().tolist()))
        misses = layer.begin(needed)
        if misses:
            y = self._serve(x, ids, needed, misses)
        else:
            y = layer.switch(x, _remapped(layer, ids))
        layer.end()
        if y.nbytes > EAGER_BYTES:
            mx.eval(y)
        else:
            pending.append(y)
        if self.observer is None:
            return y
        return self.observer(layer.layer, ids, frozenset(misses), y)

    def _serve(
        self, x: mx.array, ids: np.ndarray, needed: list[int], misses: list[int]
    ) -> mx.array:
        layer: LayerBank = self._bank
        rounds = layer.residency.rounds(needed, misses)
        first = next(rounds)
        layer.load(first.loads)
        if len(first.serve) == len(needed):
            return layer.switch(x, _remapped(layer, ids))
        # A sweep: the (token, expert) pairs of each round by themselves, put in order at the end.
        pairs = ids.reshape(-1)
        tokens = x.reshape(-1, x.shape[-1])
        top_k = ids.shape[-1]
        outputs: list[mx.array] = []
        order: list[np.ndarray] = []
        served: Round | None = first
        while served is not None:
            chosen = np.flatnonzero(np.isin(pairs, served.serve))
            slots = layer.slot_table()[pairs[chosen]]
            y = layer.switch(tokens[mx.array(chosen // top_k)], mx.array(slots[:, None]))
            # Before the next round overwrites the slots that this one read.
            mx.eval(y)
            outputs.append(y.squeeze(-2))
            order.append(chosen)
            served = next(rounds, None)
            if served is not None:
                layer.load(served.loads)
        back = np.argsort(np.concatenate(order))
        y = mx.concatenate(outputs)[mx.array(back)]
        return y.reshape(*ids.shape, y.shape[-1])


def _remapped(layer: LayerBank, ids: np.ndarray) -> mx.array:
    """Returns `ids` with slots in place of experts, all of which are resident."""
    if ids.size <= 64:
        slot_of = layer.residency.slot_of
        slots = np.array([slot_of[e] for e in ids.ravel().tolist()], np.uint32)
        return mx.array(slots.reshape(ids.shape))
    return mx.array(layer.slot_table()[ids])
