"""Puts a bank into a model and takes it out again, leaving the model as it was found.

mlx's `nn.Module` looks `__call__` up on the type, so a function set on an instance is never
called; the child module itself is replaced. While a bank is attached, what would silently lose
the experts on disk (saving, quantising, adapting) raises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..checkpoint.headers import TensorSpan
from ..checkpoint.provenance import Trace
from ..errors import AttachedError, CheckpointError
from ..families import SwitchSite
from .bank import Bank, LayerBank, PolicyMaker
from .switch import PartialSwitch

GUARDED = (
    "parameters", "trainable_parameters", "save_weights", "load_weights", "update",
    "update_modules", "freeze", "unfreeze", "set_dtype",
)  # fmt: skip
"""Methods of `nn.Module` that read or change all weights; none is needed to run a model."""


class Attachment:
    """A bank in a model.

    Args:
        model: mlx-lm's model.
        sites: Its MoE layers.
        capacities: Slots for each of `sites`. A layer with as many slots as experts stays stock.
        origins: For each site, the spans of each tensor, by projection and name.
        make_policy: Called once for each layer.
        widen: Read 16-bit floats into float32 slots.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[SwitchSite],
        capacities: Sequence[int],
        origins: Sequence[Mapping[tuple[str, str], tuple[TensorSpan, ...]]],
        make_policy: PolicyMaker,
        *,
        widen: bool = False,
    ) -> None:
        self.bank = Bank()
        self.switches: dict[int, PartialSwitch] = {}
        """The replaced switches by layer."""
        self._model = model
        self._sites = {site.layer: site for site in sites}
        self._guarded: list[tuple[nn.Module, str]] = []
        try:
            for site, capacity, spans in zip(sites, capacities, origins, strict=True):
                if capacity == site.experts:
                    continue
                layer = LayerBank(self.bank, site, capacity, make_policy(), spans, widen=widen)
                self.bank.layers.append(layer)
                self.switches[site.layer] = PartialSwitch(layer, site.switch)
                site.parent[site.key] = self.switches[site.layer]
            self._guard()
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Puts the stock switches back and closes the bank. Calling it again does nothing."""
        for module, name in self._guarded:
            module.__dict__.pop(name, None)
        self._guarded.clear()
        for layer in self.switches:
            site = self._sites[layer]
            site.parent[site.key] = site.switch
        self.switches.clear()
        self.bank.close()
        self.bank.layers.clear()

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
