"""Forced misses: an exact pass in which a few named experts count as missing.

What a miss costs is measured one miss at a time. Everything is computed as in the full model,
except that in the layers that are named the named experts are treated as a lossy miss action
treats what is not resident. All other experts of those layers count as resident, whatever the bank
holds: it loads them, exactly, when they are needed. So one forced miss is one (layer, expert) and
nothing else, at every capacity, and layers that stayed stock can have one too.

The rule of each action is `lossy.MissLayer`'s own; only where the outputs come from differs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import MoelabError, StudyError
from ..families import SwitchSite
from .copies import Copies
from .event import LayerEvent
from .lossy import MissLayer
from .lowbit import copies_in_memory
from .misses import LowBit, MissAction, WrongSlot, resolve_action
from .router import Exchanges, RouterRule, ask_rules
from .selection import Selection

if TYPE_CHECKING:
    from ..lab import Lab


class ForcedLayer(MissLayer):
    """One layer in which some experts count as missing and all others are to be had.

    Args:
        site: The layer.
        rule: How its weights are made.
        action: What happens on a miss.
        low: For `low_bit`, the switch over the copies of all experts.
        exact: What computes any expert exactly: the layer's bank, or its stock switch.
        missing: Experts that count as missing.
    """

    def __init__(
        self,
        site: SwitchSite,
        rule: RouterRule,
        action: MissAction,
        low: nn.Module | None,
        exact: nn.Module,
        missing: frozenset[int],
    ) -> None:
        super().__init__(site, rule, action, low)
        resident = np.ones(site.experts, np.bool_)
        resident[list(missing)] = False
        self.missing, self.resident = missing, mx.array(resident)
        self.events: list[LayerEvent] = []
        """What happened, a forward pass each."""
        self.scores: list[tuple[mx.array, mx.array | None]] = []
        """Selection scores, (…, experts), and the experts that each token may choose from, a pass
        each; empty where the action leaves the selection alone."""
        self._exact = exact

    def outputs(self, x: mx.array, indices: mx.array) -> mx.array:
        """See `MissLayer.outputs`."""
        y: mx.array = self._exact(x, indices)
        return y

    def prefer(
        self, scores: mx.array, allowed: mx.array | None, chosen: mx.array | None
    ) -> mx.array:
        """See `selection.Prefer`."""
        self.scores.append((scores, allowed))
        return super().prefer(scores, allowed, chosen)

    def call(self, x: mx.array, indices: mx.array) -> mx.array:
        """Answers in the switch's place."""
        if self.selection is not None and self.selection.plain:
            return self.selection.stub(x, indices)
        y, event = self.compute(x, indices)
        self.events.append(event)
        return y

    def asked(self, expert: int) -> int:
        """Returns how many (token, rank) pairs chose an expert by the router's own choice."""
        return sum(int((event.ids == expert).sum()) for event in self.events)


class _ForcedSwitch(nn.Module):
    """Stands where the bank's switch, or the stock one, stood."""

    def __init__(self, layer: ForcedLayer, stands_for: nn.Module) -> None:
        super().__init__()
        # Past nn.Module's own __setattr__: neither is a part of the model's tree.
        object.__setattr__(self, "layer", layer)
        object.__setattr__(self, "stands_for", stands_for)

    def __call__(self, x: mx.array, indices: mx.array, *_: Any) -> mx.array:
        answer: mx.array = self.__dict__["layer"].call(x, indices)
        return answer

    def __getattr__(self, key: str) -> Any:
        return getattr(self.__dict__["stands_for"], key)  # what a family reads from its switch


class Forcing:
    """Forces misses of one action in a lab that is exact otherwise.

    Args:
        lab: The model, with `on_miss="load"`, at any capacity.
        on_miss: `"drop"`, `"substitute"`, `"low_bit"` or `"reroute"`, or such an action. Under
            `substitute` the miss takes the best-scored of all other experts that the token does
            not use; under `reroute` all other experts get the bonus, with Δ from the tokens of
            the forced pass alone.
        rules: How the layers weigh, from another `Forcing` of the same model: saves asking again.

    Raises:
        StudyError: If the action is exact, or `"wrong_slot"`, which says nothing where all others
            are resident.
        MissActionError: If the action cannot be had for this model.
        MoelabError: If the lab is lossy itself.
    """

    def __init__(
        self,
        lab: Lab,
        on_miss: str | MissAction,
        *,
        rules: Mapping[int, RouterRule] | None = None,
    ) -> None:
        action = resolve_action(on_miss)
        if not action.lossy or isinstance(action, WrongSlot):
            raise StudyError(
                "A forced miss is met by 'drop', 'substitute', 'low_bit' or 'reroute', got "
                f"{action.name!r}, "
                + ("which is exact." if not action.lossy else "which depends on what slot 0 holds.")
            )
        _check_exact(lab)
        self.action = action
        self.rules = dict(ask_rules(lab.model, lab.sites) if rules is None else rules)
        """By layer."""
        self._lab = lab
        self._sites = {site.layer: site for site in lab.sites}
        self._low = self._copies(action.bits) if isinstance(action, LowBit) else {}
        for site in lab.sites:  # refused here rather than at the first miss
            self._layer(site, frozenset())

    @contextmanager
    def missing(self, experts: Mapping[int, Iterable[int]]) -> Iterator[dict[int, ForcedLayer]]:
        """Forces misses in every forward pass that is made, and evaluated, in the `with` block.

        A miss is forced for each token of such a pass, so a pass of one token has one miss for each
        (layer, expert). Layers that are not named are untouched. An expert that the router does not
        choose is not missed.

        Args:
            experts: Experts by layer. A layer with none is computed as the others, and gives the
                full model's output.

        Yields:
            The layers, by number; their `events` say what was chosen and applied.

        Raises:
            StudyError: If a layer or an expert is not there.
            MoelabError: If the lab is lossy meanwhile, or is being recorded.
        """
        _check_exact(self._lab)
        wanted = self._checked(experts)
        layers: dict[int, ForcedLayer] = {}
        exchanges = Exchanges()
        stood: list[tuple[SwitchSite, nn.Module]] = []
        try:
            for number, ids in wanted.items():
                site = self._sites[number]
                layer = layers[number] = self._layer(site, ids)
                exchanges.open(site.parent)
                if self.action.selects:
                    selection = Selection(site, layer.rule.unit, layer.prefer, _nothing)
                    layer.selection = selection
                    selection.install()
                stood.append((site, site.parent[site.key]))
                site.parent[site.key] = _ForcedSwitch(layer, site.parent[site.key])
            yield layers
        finally:
            for site, switch in reversed(stood):
                site.parent[site.key] = switch
            for layer in reversed(list(layers.values())):
                if layer.selection is not None:
                    layer.selection.remove()
            exchanges.undo()

    def _layer(self, site: SwitchSite, missing: frozenset[int]) -> ForcedLayer:
        low, exact = self._low.get(site.layer), site.parent[site.key]
        rule = self.rules[site.layer]
        if self.action.selects and rule.unit.kind == "unknown":
            Selection(site, rule.unit, _as_is, _nothing)  # raises, with the reason
        return ForcedLayer(site, rule, self.action, low, exact, missing)

    def _copies(self, bits: int) -> dict[int, nn.Module]:
        lab = self._lab
        banks = lab.attachment.bank.layers
        found = Copies(lambda: lab.fingerprint).of(banks, bits, {}) if banks else {}
        for site in lab.sites:
            if site.layer not in found:
                found[site.layer] = copies_in_memory(site, bits)
        return found

    def _checked(self, experts: Mapping[int, Iterable[int]]) -> dict[int, frozenset[int]]:
        wanted = {}
        for layer, ids in experts.items():
            site = self._sites.get(layer)
            if site is None:
                raise StudyError(
                    f"A miss was to be forced in layer {layer!r}, and the model's MoE layers are "
                    f"{list(self._sites)}."
                )
            wanted[layer] = frozenset(int(expert) for expert in ids)
            wrong = sorted(e for e in wanted[layer] if not 0 <= e < site.experts)
            if wrong:
                raise StudyError(
                    f"A miss of expert {wrong[0]} was to be forced in layer {layer}, which has "
                    f"experts 0 to {site.experts - 1}."
                )
        # In the order in which they run.
        return {layer: wanted[layer] for layer in self._sites if layer in wanted}


def _check_exact(lab: Lab) -> None:
    if lab.miss_action.lossy:
        raise MoelabError(
            f"The lab has on_miss={lab.on_miss!r}, and a miss is forced in a run that is exact "
            "otherwise. Set lab.on_miss = 'load' first."
        )
    if lab.sessions:
        raise MoelabError(
            "The lab is being recorded, and a recording of forced misses would name none of them. "
            "Leave the `with lab.record()` block first."
        )


def _nothing() -> None:
    pass


def _as_is(scores: mx.array, allowed: mx.array | None, chosen: mx.array | None) -> mx.array:
    return scores
