"""Computes layers under a lossy miss action, and swaps experts between steps.

A step is judged whole against the bank as it was when the step began, and nothing swaps inside
it: which experts are resident is an array in the graph, so nothing waits for ids. When the next
step begins, the last one's ids and weights are read, and at most `swap_budget` experts a layer
enter, those with the highest missed gate mass first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import MissActionError
from ..families import SwitchSite
from .bank import Bank, LayerBank
from .event import LayerEvent, LossyDetail, Weighted, weighted
from .misses import MissAction, Reroute
from .router import Exchanges, RouterRule
from .selection import Selection

NEVER = -1e30
"""A score under all scores, and above -∞."""

KEPT_STEPS = 2
"""Steps whose outputs are remembered as possibly unevaluated where nothing is swapped."""


@dataclass(slots=True)
class Range:
    """The running mean of max − min of a layer's selection scores; lazy."""

    total: mx.array = field(default_factory=lambda: mx.zeros(()))
    count: int = 0

    def advance(self, scores: mx.array, allowed: mx.array | None) -> mx.array:
        """Takes in a step's tokens, in order; returns each one's mean, (…, 1), float32.

        A token's mean includes the token, and those before it in the same step.
        """
        scores = scores.astype(mx.float32)
        high, low = scores, scores
        if allowed is not None:
            high = mx.where(allowed, scores, -mx.inf)
            low = mx.where(allowed, scores, mx.inf)
        spread = (high.max(-1) - low.min(-1)).reshape(-1)
        totals = self.total + mx.cumsum(spread)
        means = totals / (self.count + mx.arange(1, spread.size + 1))
        self.total, self.count = totals[-1], self.count + spread.size
        return means.reshape(*scores.shape[:-1], 1)


class MissLayer:
    """One layer under a lossy action, wherever its experts' outputs come from.

    Args:
        site: The layer.
        rule: How its weights are made.
        action: What happens on a miss.
        low: For `low_bit`, the switch over the copies of all experts.
    """

    def __init__(
        self, site: SwitchSite, rule: RouterRule, action: MissAction, low: nn.Module | None
    ) -> None:
        # Of one expert alone nothing is left that could be renormalised.
        if action.weighs and not rule.shows and rule.normalises is not False and site.top_k > 1:
            raise MissActionError(
                f"{type(site.parent).__name__} does not show where it applies its experts' "
                f"weights, which may be normalised, so {action.name!r} cannot renormalise them. "
                "Take 'load', 'low_bit' or 'wrong_slot' for this family."
            )
        self.site = site
        self.rule = rule
        self.action = action
        self.low = low
        self.selection: Selection | None = None
        self.range = Range()
        self.closes = False
        """Whether this is the last layer of a step."""
        self.missing: frozenset[int] = frozenset()
        """The experts that count as missing."""
        self.resident: mx.array = mx.ones(site.experts, mx.bool_)
        """The others, as bool (experts,)."""
        self.first = -1
        """The expert in slot 0."""

    def outputs(self, x: mx.array, indices: mx.array) -> mx.array:
        """Returns the chosen experts' outputs, (…, top-k, width); what is missing is ignored."""
        raise NotImplementedError

    def prefer(
        self, scores: mx.array, allowed: mx.array | None, chosen: mx.array | None
    ) -> mx.array:
        """The action's say in a selection; see `selection.Prefer`."""
        resident = self.resident
        if scores.shape[-1] > resident.size:  # ids past the experts need no memory (longcat)
            more = mx.ones(scores.shape[-1] - resident.size, mx.bool_)
            resident = mx.concatenate([resident, more])
        favoured = resident if allowed is None else mx.logical_and(resident, allowed)
        if isinstance(self.action, Reroute):
            bonus = self.action.strength * self.range.advance(scores, allowed)
            # Taken from the others, which selects the same: added to the resident ones, it would
            # swallow the differences between small scores.
            return scores.astype(mx.float32) - mx.where(favoured, 0.0, bonus)
        if allowed is not None and chosen is not None:
            # A masked score of 0 can beat a negative one in an allowed group: such a hit stays.
            favoured = mx.put_along_axis(favoured, chosen, resident[chosen], -1)
        # Where too few are favoured, others are selected all the same: those that are not resident,
        # which will be dropped, before those that are and may not be chosen.
        others = mx.where(resident, -mx.inf, NEVER)
        return mx.where(favoured, scores.astype(mx.float32), others)

    def compute(self, x: mx.array, indices: mx.array) -> tuple[mx.array, LayerEvent]:
        """Computes a step's experts, those that are missing as the action says.

        Args:
            x: Activations, as the block gives them to its switch.
            indices: Expert ids, (…, top-k).

        Returns:
            The switch's output, still to be weighed, and the event, whose weights are filled in
            when the block weighs it.
        """
        event = LayerEvent(
            self.site.layer,
            indices,
            self.missing,
            lossy=LossyDetail(self.action.name, self.first, indices),
        )
        if self.selection is not None:
            self._note_selection(self.selection, event)
        y = self.outputs(x, indices)
        here = self.resident[indices]
        if self.low is not None:
            y = mx.where(here[..., None], y, self.low(x, indices))
        elif self.action.weighs:
            y = mx.where(here[..., None], y, mx.zeros((), y.dtype))
        return self._weighed(y, event, here), event

    def _note_selection(self, selection: Selection, event: LayerEvent) -> None:
        assert selection.ids is not None and selection.scores is not None
        assert event.lossy is not None
        event.ids, event.weights = selection.ids, selection.weights
        if selection.scores.shape[-1] > self.site.experts and selection.chosen is not None:
            # Ids past the experts (longcat's identities) reach the switch as 0 at weight 0.
            event.lossy.ids, event.lossy.beside = selection.chosen
            if event.weights is not None:
                past = (event.ids >= self.site.experts)[..., None]
                event.weights = mx.where(past, 0.0, event.weights)
        # Two numbers a slot, so that the scores of all experts need not be held.
        event.lossy.scores = (
            mx.take_along_axis(selection.scores, selection.ids, -1),
            mx.take_along_axis(selection.scores, event.lossy.ids, -1),
        )
        selection.scores = None

    def _weighed(self, y: mx.array, event: LayerEvent, here: mx.array) -> Weighted:
        detail = event.lossy
        assert detail is not None

        def hook(factor: mx.array) -> mx.array:
            if event.weights is None:
                event.weights = factor
                if self.closes:  # as in `LossyEngine.compute`, which came too early for this one
                    mx.async_eval(factor)
            applied = detail.applied = self._applied(factor, detail.ids, here)
            if detail.beside is not None:
                past = (detail.ids >= self.site.experts)[..., None]
                detail.applied = mx.where(past, detail.beside[..., None], applied)
            return applied

        return weighted(y, (*detail.ids.shape, 1), hook)

    def _applied(self, factor: mx.array, ids: mx.array, here: mx.array) -> mx.array:
        if not self.action.weighs:
            return factor
        kept = mx.where(here[..., None], factor, mx.zeros((), factor.dtype))
        if not self.rule.normalises:
            return kept
        whole, part = factor.astype(mx.float32), kept.astype(mx.float32)
        if (scale := self.rule.unit.expert_scale) is not None:
            by = scale.astype(mx.float32)[ids][..., None]
            whole, part = whole / by, part / by
        total, left = whole.sum(-2, keepdims=True), part.sum(-2, keepdims=True)
        ratio = mx.where(left > 0, total / mx.where(left > 0, left, 1.0), 0.0)
        return (kept.astype(mx.float32) * ratio).astype(factor.dtype)


class LossyLayer(MissLayer):
    """One layer under a lossy action, computed from what is resident.

    Args:
        bank: Its slots.
        site: The layer.
        rule: How its weights are made.
        action: What happens on a miss.
        low: For `low_bit`, the switch over the copies of all experts.
    """

    def __init__(
        self,
        bank: LayerBank,
        site: SwitchSite,
        rule: RouterRule,
        action: MissAction,
        low: nn.Module | None,
    ) -> None:
        super().__init__(site, rule, action, low)
        self.bank = bank
        self.seen = -1
        """The bank's count of changes that was taken over last."""
        self.refresh()

    def refresh(self) -> None:
        """Takes over from the bank what is resident."""
        seen, slot_of = self.bank.changes, self.bank.residency.slot_of
        resident = np.zeros(self.bank.experts, np.bool_)
        resident[list(slot_of)] = True
        self.missing = frozenset(np.flatnonzero(~resident).tolist())
        self.first = next((e for e, slot in slot_of.items() if slot == 0), -1)
        self.table = mx.array(self.bank.slot_table())
        self.resident = mx.array(resident)
        mx.eval(self.table, self.resident)  # small; and another thread may run the next step
        self.seen = seen

    def outputs(self, x: mx.array, indices: mx.array) -> mx.array:
        """See `MissLayer.outputs`: a missing expert's is what slot 0 gives."""
        return self.bank.switch(x, self.table[indices])


class LossyEngine:
    """The layers of one model under a lossy action.

    Args:
        bank: The model's bank.
        action: What happens on a miss.
        layers: The partially resident layers, in the order in which they run.
        swap_budget: Experts a layer that may enter after a step; None for the layer's top-k.
    """

    def __init__(
        self, bank: Bank, action: MissAction, layers: Sequence[LossyLayer], swap_budget: int | None
    ) -> None:
        self.action = action
        self.layers = {layer.site.layer: layer for layer in layers}
        self.swap_budget = swap_budget
        if layers:
            layers[-1].closes = True
        self._bank = bank
        self._order = {layer.site.layer: place for place, layer in enumerate(layers)}
        self._last = len(layers)  # so that the first layer to run begins a step
        self._step: list[LayerEvent] = []
        self._exchanges = Exchanges()

    def install(self) -> None:
        """Lets blocks show their factor, and the action have its say in the selection."""
        try:
            for number, layer in self.layers.items():
                self._exchanges.open(layer.site.parent)
                if not self.action.selects:
                    continue

                def begins(number: int = number) -> None:
                    self._enter(number)

                layer.selection = Selection(layer.site, layer.rule.unit, layer.prefer, begins)
                layer.selection.install()
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Gives the family its own selection back. Calling it again does nothing."""
        for layer in self.layers.values():
            if layer.selection is not None:
                layer.selection.remove()
        self._exchanges.undo()

    def compute(
        self, number: int, x: mx.array, indices: mx.array
    ) -> tuple[mx.array, LayerEvent | None]:
        """Computes one layer's step; see `LossyLayer.compute`.

        The event is None while a selection asks what the family would choose by itself.
        """
        layer = self.layers[number]
        if layer.selection is None:
            self._enter(number)
        elif layer.selection.plain:
            return layer.selection.stub(x, indices), None
        y, event = layer.compute(x, indices)
        self._step.append(event)
        # A part of the output that holds nothing: evaluated, it says that the slots were read.
        read = mx.stop_gradient(y).reshape(-1)[:1]
        if indices.size > layer.site.top_k:
            # A chunk: begun, not waited for, so that its outputs and scores are let go.
            mx.async_eval(read, *(event.lossy.scores or ()) if event.lossy else ())
        self._bank.pending.append(read)
        if layer.closes:
            self._start()
        return y, event

    def _start(self) -> None:
        """Begins to compute, and does not wait for, all that the next step asks of this one.

        The next step may run on another thread, which cannot evaluate what this one left lazy.
        """
        known = [a for e in self._step for a in (e.ids, e.weights) if isinstance(a, mx.array)]
        means = [layer.range.total for layer in self.layers.values()]
        mx.async_eval(known, means, self._bank.pending)

    def begin_run(self) -> None:
        """Begins a run: the running means start anew."""
        for layer in self.layers.values():
            layer.range = Range()

    def restart(self) -> None:
        """Forgets the last step, after the bank was reset."""
        self._step, self._last = [], len(self._order)
        self.begin_run()
        for layer in self.layers.values():
            layer.refresh()

    def settle(self) -> None:
        """Reads the last step and swaps. Called when the next one begins."""
        step, self._step = self._step, []
        pending = self._bank.pending
        if (
            not step
            or self.swap_budget == 0
            or not all(layer.bank.residency.policy.admits for layer in self.layers.values())
        ):
            if len(pending) > KEPT_STEPS * len(self.layers):
                self._bank.finish()
            return
        if not self._bank.finish():
            return  # a step that was cut off on another thread: nobody can read what it asked for
        mx.eval([e.ids for e in step], [e.weights for e in step if e.weights is not None])
        for event in step:
            self._swap(event)

    def _swap(self, event: LayerEvent) -> None:
        layer = self.layers[event.layer]
        ids = np.array(event.ids, copy=False).reshape(-1)
        needed = np.unique(ids[ids < layer.bank.experts])
        mass = missed_mass(ids, event, layer.bank.experts)
        wanted = [e for e in needed.tolist() if e in layer.missing]
        wanted.sort(key=lambda e: (-mass[e], e))
        budget = layer.site.top_k if self.swap_budget is None else self.swap_budget
        layer.bank.exchange(needed.tolist(), wanted, budget)

    def _enter(self, number: int) -> None:
        place = self._order[number]
        if place <= self._last:
            self._last = place
            self.settle()
        self._last = place
        layer = self.layers[number]
        layer.bank.mend()  # an interrupted swap
        if layer.seen != layer.bank.changes:
            layer.refresh()


def missed_mass(ids: np.ndarray, event: LayerEvent, experts: int) -> np.ndarray:
    """Returns float64 (experts,): the gate weight of each expert's slots in a step.

    Where weights are not known every slot counts 1.
    """
    if event.weights is None:
        return np.bincount(ids, minlength=experts).astype(np.float64)
    weights = np.array(event.weights.astype(mx.float32)).reshape(-1)
    return np.bincount(ids, weights.astype(np.float64), experts)


def initial_order(
    site: SwitchSite, pins: Iterable[int], profile: Sequence[int] | None
) -> list[int]:
    """Returns a layer's experts in the order in which they fill an empty bank.

    Pins first, then the profile's order, then the lowest ids.
    """
    return list(dict.fromkeys([*sorted(pins), *(profile or ()), *range(site.experts)]))
