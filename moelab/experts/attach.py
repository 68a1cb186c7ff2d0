"""Puts a bank into a model and takes it out again, leaving the model as it was found.

mlx's `nn.Module` looks `__call__` up on the type, so a function set on an instance is never
called; the child module itself is replaced. While a bank is attached, what would silently lose
the experts on disk (saving, quantising, adapting) raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..checkpoint.headers import TensorSpan
from ..checkpoint.provenance import Trace
from ..errors import AttachedError, CheckpointError
from ..families import SwitchSite
from .bank import Bank, LayerBank
from .copies import Copies
from .lossy import LossyEngine, LossyLayer, initial_order
from .misses import Load, LowBit, MissAction
from .policies import PolicyMaker, placed
from .residency import Residency
from .router import RouterRule, ask_rules
from .switch import PartialSwitch

GUARDED = (
    "parameters", "trainable_parameters", "save_weights", "load_weights", "update",
    "update_modules", "freeze", "unfreeze", "set_dtype",
)  # fmt: skip
"""Methods of `nn.Module` that read or change all weights; none is needed to run a model."""


Spans = Mapping[tuple[str, str], tuple[TensorSpan, ...]]
"""Where each tensor of a layer is, by projection and name."""

Reopen = Callable[[Sequence[SwitchSite]], Mapping[int, Spans]]
"""Makes the arrays of stock layers lazy again and says where they are on disk, by layer."""


class Attachment:
    """A bank in a model.

    Args:
        model: mlx-lm's model.
        sites: Its MoE layers.
        capacities: Slots for each of `sites`. A layer with as many slots as experts stays stock.
        origins: For each site, the spans of each tensor, by projection and name.
        make_policy: Called once for each layer.
        pins: Experts that never leave, by layer.
        orders: Experts by layer, in the order in which they fill an empty bank after the pins.
        fingerprint: Names the model, for what is kept of it on disk.
        widen: Read 16-bit floats into float32 slots.

    Attributes:
        action: What happens on a miss.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[SwitchSite],
        capacities: Sequence[int],
        origins: Sequence[Spans],
        make_policy: PolicyMaker,
        *,
        pins: Mapping[int, Iterable[int]] | None = None,
        orders: Mapping[int, Sequence[int]] | None = None,
        fingerprint: Callable[[], str] = str,
        widen: bool = False,
    ) -> None:
        self.bank = Bank()
        self.action: MissAction = Load()
        self.switches: dict[int, PartialSwitch] = {}
        """The replaced switches by layer."""
        self._model = model
        self._sites = {site.layer: site for site in sites}
        self._pins = {layer: frozenset(experts) for layer, experts in (pins or {}).items()}
        self._orders = orders or {}
        self._make_policy = make_policy
        self._copies = Copies(fingerprint)
        self._widen = widen
        self._engine: LossyEngine | None = None
        self._rules: dict[int, RouterRule] | None = None
        self._guarded: list[tuple[nn.Module, str]] = []
        try:
            for site, capacity, spans in zip(sites, capacities, origins, strict=True):
                if capacity < site.experts:
                    self._open(site, capacity, spans)
            self._guard()
        except BaseException:
            self.detach()
            raise

    def capacities(self) -> list[int]:
        """Returns the slots of every MoE layer, in order; all experts where a layer is stock."""
        slots = {layer.layer: layer.capacity for layer in self.bank.layers}
        return [slots.get(site.layer, site.experts) for site in self._sites.values()]

    def resize(self, capacities: Sequence[int], reopen: Reopen) -> None:
        """Gives layers another number of slots, keeping what is most worth keeping.

        One layer at a time: beside the model there is one layer's slots more in memory at most.

        Args:
            capacities: Slots of every MoE layer.
            reopen: Opens layers that are to hold a part of their experts from now on.

        After an interrupt each layer has the old or the new number of slots, and misses are read.
        """
        action, engine = self.action, self._engine
        self.bank.finish()
        try:
            self._put(Load(), None, keep_copies=True)
            self._resize(dict(zip(self._sites, capacities, strict=True)), reopen)
            self._unguard()
            self._guard()
            if engine is not None:
                self._rules = None
                self._put(action, self._make_engine(action, engine.swap_budget))
                for layer in self.bank.layers:
                    layer.fill(initial_order(layer.site, (), self._orders.get(layer.layer)), 0)
        except BaseException:
            self._reconcile()
            raise

    def _resize(self, wanted: Mapping[int, int], reopen: Reopen) -> None:
        stock = [s for s in self._sites.values() if s.layer not in self.switches]
        opened = [site for site in stock if wanted[site.layer] < site.experts]
        spans = reopen(opened) if opened else {}
        # Those that shrink first, to make room for the others.
        for layer in sorted(self.bank.layers, key=lambda b: wanted[b.layer] - b.capacity):
            if wanted[layer.layer] == layer.experts:
                self._make_stock(layer)
            elif wanted[layer.layer] != layer.capacity:
                other = layer.resized(wanted[layer.layer])
                self.bank.layers = [other if b is layer else b for b in self.bank.layers]
                self.switches[layer.layer].rebind(other)
        for site in opened:
            self._open(site, wanted[site.layer], spans[site.layer])

    def _reconcile(self) -> None:
        """Makes bank, switches and model agree after a change that was cut off."""
        self._put(Load(), None)
        banks = {layer.layer: layer for layer in self.bank.layers}
        for layer, switch in list(self.switches.items()):
            site = self._sites[layer]
            if layer in banks:
                switch.rebind(banks[layer])
                site.parent[site.key] = switch
            else:
                site.parent[site.key] = site.switch
                del self.switches[layer]
        self.bank.layers = [b for b in self.bank.layers if b.layer in self.switches]
        self._unguard()
        self._guard()

    def _open(self, site: SwitchSite, capacity: int, spans: Spans) -> None:
        layer = LayerBank(
            self.bank, site, capacity, placed(self._make_policy(), site.layer), spans,
            pinned=self._pins.get(site.layer, ()), widen=self._widen,
        )  # fmt: skip
        order = list(self._sites)
        self.bank.layers = sorted(
            [*self.bank.layers, layer], key=lambda bank: order.index(bank.layer)
        )
        self.switches[site.layer] = PartialSwitch(layer, site.switch)
        site.parent[site.key] = self.switches[site.layer]

    def _make_stock(self, layer: LayerBank) -> None:
        site = layer.site
        for name, key, array in site.tensors():
            if self._widen and array.dtype in (mx.bfloat16, mx.float16):
                site.switch[name][key] = array.astype(mx.float32)
        mx.eval(arrays_in(site.switch))
        site.parent[site.key] = site.switch
        del self.switches[site.layer]
        self.bank.layers = [b for b in self.bank.layers if b is not layer]

    @property
    def low_bit_bytes(self) -> int:
        """Bytes of the copies at few bits; 0 without any."""
        held = [switch["low"] for switch in self.switches.values() if "low" in switch]
        return sum(array.nbytes for low in held for array in arrays_in(low))

    def set_action(
        self, action: MissAction, swap_budget: int | None = None, *, keep_copies: bool = False
    ) -> None:
        """Says what happens on a miss from now on, and resets the bank.

        Args:
            action: What.
            swap_budget: Experts a layer that may enter after a step of a lossy action; None for
                the layer's top-k.
            keep_copies: Leave copies at few bits in memory, for an action that comes back soon.

        Raises:
            MissActionError: If the action cannot be had for this model; all is as it was then.
                After an interrupt the bank is exact, whatever it was before.
        """
        engine = self._make_engine(action, swap_budget) if action.lossy else None
        try:
            self._put(action, engine, keep_copies=keep_copies)
            self.reset()
        except BaseException:
            # Cut off half-way, an action must not be in place here and not there.
            self._put(Load(), None)
            raise

    def _put(
        self, action: MissAction, engine: LossyEngine | None, *, keep_copies: bool = False
    ) -> None:
        if self._engine is not None:
            self._engine.remove()
        self.action, self._engine = action, engine
        for layer, switch in self.switches.items():
            low = switch.get("low") if keep_copies else None
            switch.set_engine(engine, low if engine is None else engine.layers[layer].low)
        if engine is not None:
            engine.install()

    def reset(self) -> None:
        """Brings the bank to its initial contents.

        The pins; and for a lossy action, or a policy that admits nothing, what else there is room
        for: the profile's order, then the lowest ids.
        """
        self.bank.clear()
        for layer in self.bank.layers:
            residency, site = layer.residency, layer.site
            order: list[int] = []
            if self.action.lossy or not residency.policy.admits:
                order = initial_order(site, residency.pinned, self._orders.get(site.layer))
            # A lossy action computes misses in no slot, so none need stay free for them.
            layer.fill(order, 0 if self.action.lossy else site.top_k)
        if self._engine is not None:
            self._engine.restart()

    def govern(
        self,
        make_policy: PolicyMaker,
        pins: Mapping[int, Iterable[int]],
        orders: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        """Gives every layer another policy, other pins and other initial contents; resets the bank.

        The slots and the miss action stay, so that many banks can be tried in one loaded model.

        Args:
            make_policy: Called once for each layer.
            pins: Experts that never leave, by layer; the caller has checked that there is room.
            orders: Experts by layer, in the order in which they fill an empty bank after the pins.
        """
        self.bank.finish()
        self._make_policy, self._orders = make_policy, orders or {}
        self._pins = {layer: frozenset(experts) for layer, experts in pins.items()}
        for layer in self.bank.layers:
            layer.clear()
            pinned = self._pins.get(layer.layer, ())
            policy = placed(make_policy(), layer.layer)
            layer.residency = Residency(layer.capacity, policy, pinned)
        self.reset()

    @property
    def governed(
        self,
    ) -> tuple[PolicyMaker, Mapping[int, frozenset[int]], Mapping[int, Sequence[int]]]:
        """What `govern` takes, as it is now."""
        return self._make_policy, self._pins, self._orders

    def begin_run(self) -> None:
        """Told when a generation begins that goes on from no other."""
        if self._engine is not None:
            self._engine.begin_run()

    def _make_engine(self, action: MissAction, swap_budget: int | None) -> LossyEngine:
        if self._rules is None:
            partial = [self._sites[layer] for layer in self.switches]
            self._rules = ask_rules(self._model, partial) if partial else {}
        copies: dict[int, nn.Module] = {}
        if isinstance(action, LowBit):
            have = {n: s["low"] for n, s in self.switches.items() if _bits(s) == action.bits}
            copies = self._copies.of(self.bank.layers, action.bits, have)
        layers = [
            LossyLayer(layer, layer.site, self._rules[layer.layer], action, copies.get(layer.layer))
            for layer in self.bank.layers
        ]
        return LossyEngine(self.bank, action, layers, swap_budget)

    def detach(self) -> None:
        """Puts the stock switches back and closes the bank. Calling it again does nothing."""
        if self._engine is not None:
            self._engine.remove()
            self._engine = None
        self._unguard()
        for layer in self.switches:
            site = self._sites[layer]
            site.parent[site.key] = site.switch
        self.switches.clear()
        self.bank.close()
        self.bank.layers.clear()

    def _unguard(self) -> None:
        for module, name in self._guarded:
            module.__dict__.pop(name, None)
        self._guarded.clear()

    def _guard(self) -> None:
        if not self.switches:
            return
        replaced = {id(switch) for switch in self.switches.values()}
        for module in _ancestors(self._model, replaced):
            # The root is where saving and training start; LoRA swaps modules layer by layer.
            names = GUARDED if module is self._model else ("update", "update_modules")
            for name in names:
                module.__dict__[name] = _refusal(name)
                self._guarded.append((module, name))


def origins_of(
    site: SwitchSite, trace: Trace, spans: Mapping[str, TensorSpan]
) -> dict[tuple[str, str], tuple[TensorSpan, ...]]:
    """Finds the bytes on disk of each of a layer's expert tensors.

    Args:
        site: The layer.
        trace: How the model was loaded.
        spans: Every tensor of the checkpoint.

    Raises:
        CheckpointError: If a tensor was computed while loading, so that no byte range holds it.
    """
    found: dict[tuple[str, str], tuple[TensorSpan, ...]] = {}
    for projection, key, array in site.tensors():
        origin = trace.origin(array)
        names = (origin,) if isinstance(origin, str) else origin
        if names is None or not all(name in spans for name in names):
            raise CheckpointError(
                f"{site.path}.{projection}.{key} is computed by mlx-lm while it loads this "
                "checkpoint, so its experts cannot be read one at a time. Write them to a pack "
                "file with `moelab pack`, which is what `moelab.load` does unless pack=False."
            )
        found[projection, key] = tuple(spans[name] for name in names)
        _check_size(site, projection, key, array, found[projection, key])
    return found


def _check_size(
    site: SwitchSite, projection: str, key: str, array: mx.array, spans: tuple[TensorSpan, ...]
) -> None:
    rows = site.experts if len(spans) == 1 else 1
    row_bytes = array.nbytes // site.experts
    if any(span.nbytes != row_bytes * rows for span in spans):
        raise CheckpointError(
            f"{site.path}.{projection}.{key} is {array.dtype} {array.shape} in the model and "
            f"{spans[0].dtype} {spans[0].shape} on disk, which is not the same number of bytes."
        )


def _bits(switch: PartialSwitch) -> int | None:
    """Returns the bits of a layer's copies; None without any."""
    return next(iter(switch["low"].children().values())).bits if "low" in switch else None


def all_parameters(model: nn.Module) -> dict[str, Any]:
    """Returns a model's parameters, also while a bank is attached (slots, not all experts)."""
    return nn.Module.parameters(model)


def arrays_in(tree: Any) -> list[mx.array]:
    """Returns the arrays in a tree of parameters or modules."""
    return [array for _, array in tree_flatten(tree) if isinstance(array, mx.array)]


def _ancestors(root: nn.Module, replaced: set[int]) -> list[nn.Module]:
    """Returns every module that has one of `replaced` below it."""
    found: list[nn.Module] = []
    _holds(root, replaced, found)
    return found


# Not a function within `_ancestors`: one that calls itself is a cycle, which would keep `found`,
# and with it the model's memory, until the garbage collector comes by.
def _holds(value: Any, replaced: set[int], found: list[nn.Module]) -> bool:
    """Whether `value` is, or has below it, a replaced switch; visits all that is below."""
    if id(value) in replaced:
        return True
    if isinstance(value, dict):  # modules are dicts too
        below = sum(_holds(child, replaced, found) for child in value.values())
    elif isinstance(value, list | tuple):
        below = sum(_holds(child, replaced, found) for child in value)
    else:
        return False
    if below and isinstance(value, nn.Module):
        found.append(value)
    return below > 0


def _refusal(name: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AttachedError(
            f"model.{name}() needs every expert, and moelab holds only some of them in memory. "
            "Close the lab first (lab.close()), or load the model with mlx_lm.load to save, "
            "quantise or train it."
        )

    return refuse
