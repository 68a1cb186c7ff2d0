"""Lets routers see what the full model's routers saw, whatever the layers before them computed.

Under a miss action a layer's input differs from the full model's, so its router may choose other
experts, and those may be missing in turn. If the routers are given what they saw in the full run,
ids and weights are the full model's, and what is left is the damage of the misses alone.

Where the code that selects is a router module of its own, its input is imposed; where the block
itself selects, the output of the gate beneath it. Everything after that is the family's own code,
the miss action's say in it included.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.nn as nn

from ..errors import StudyError
from ..experts.router import Exchanges, find_unit
from ..families import SwitchSite
from .store import ArrayStore

GATES = ("gate", "router")
"""What blocks call the module that scores experts."""


class RouterInputs:
    """What the routers of one run of a window saw, by layer and pass.

    Args:
        model: mlx-lm's model.
        sites: Its MoE layers.
        store: Keeps the arrays.

    Raises:
        StudyError: If a layer's scores are made in a way that is not seen.
    """

    def __init__(self, model: nn.Module, sites: Sequence[SwitchSite], store: ArrayStore) -> None:
        self._points = [(site.layer, *find_point(model, site)) for site in sites]
        self._store = store
        self._at = 0
        self._noted: dict[int, Any] = {}
        self._passes: list[dict[int, Any]] = []

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Notes what the routers see while the block runs; `next` ends each pass."""
        self._at, self._noted, self._passes = 0, {}, []
        with Exchanges() as exchanges:
            for layer, module, is_input in self._points:
                exchanges.around(module, _note(self, layer, is_input))
            yield

    @contextlib.contextmanager
    def imposing(self) -> Iterator[None]:
        """Gives the routers what they saw in the noted run; `next` ends each pass."""
        self._at = 0
        with Exchanges() as exchanges:
            for layer, module, is_input in self._points:
                exchanges.around(module, _impose(self, layer, is_input))
            yield

    def note(self, layer: int, value: Any) -> None:
        """Keeps a reference to what a layer's router sees in this pass, which evaluates it."""
        self._noted[layer] = value

    def next(self) -> None:
        """Told when a pass has been evaluated.

        Raises:
            StudyError: If a router was not called as a module in a pass to note.
        """
        if self._at == len(self._passes):
            unseen = sorted({layer for layer, *_ in self._points} - set(self._noted))
            if unseen:
                raise StudyError(
                    f"The routers of layers {unseen} are not called as modules, so what they see "
                    "in the full run cannot be imposed. Arms cannot be had for this family: "
                    "compare without them (arms=False)."
                )
            self._passes.append(self._store.put(self._noted))
            self._noted = {}
        self._at += 1

    def seen(self, layer: int) -> Any:
        """Returns what a layer's router saw in this pass of the noted run."""
        return self._store.get(self._passes[self._at][layer])


def find_point(model: nn.Module, site: SwitchSite) -> tuple[nn.Module, bool]:
    """Finds the module at which to impose, and whether its input is imposed or its output.

    Raises:
        StudyError: If the block selects and has no gate that is seen.
    """
    unit = find_unit(model, site)
    if unit.kind == "router":
        return unit.module, True
    block = site.parent
    children = {
        name: child
        for name, child in block.children().items()
        if isinstance(child, nn.Module) and name != site.key
    }
    for name in GATES:
        if name in children:
            return children[name], False
    for child in children.values():
        if "weight" in child and child.weight.shape[0] == site.experts and child.weight.ndim == 2:
            return child, False
    raise StudyError(
        f"{type(block).__name__} scores its experts in a way that is not seen (no gate beneath "
        "it), so the full model's routing cannot be imposed. Compare without arms (arms=False)."
    )


def _note(inputs: RouterInputs, layer: int, is_input: bool) -> Callable[..., Any]:
    def note(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        answer = call(*args, **kwargs)
        inputs.note(layer, args[0] if is_input else answer)
        return answer

    return note


def _impose(inputs: RouterInputs, layer: int, is_input: bool) -> Callable[..., Any]:
    def impose(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if is_input:
            return call(inputs.seen(layer), *args[1:], **kwargs)
        return inputs.seen(layer)

    return impose
