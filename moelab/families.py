"""Where a model keeps its experts.

mlx-lm computes routed experts in one of two modules, `SwitchGLU` and `SwitchMLP`, whatever the
family. moelab looks for them in the instantiated model instead of keeping a list of families, so
a family that inherits another's block is found as well. How many experts a token chooses is not
to be had from the configuration by one name (`num_experts_per_tok`, `moe_topk`, a list with a
value for each layer, …), so it is read off the shapes of one traced forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .errors import CheckpointError


@dataclass(frozen=True, slots=True)
class SwitchSite:
    """One MoE layer's switch and where it hangs in the model."""

    path: str
    """Dotted path of the switch, such as `model.layers.3.mlp.switch_mlp`."""
    layer: int
    """Number of the decoder layer; a second switch in one layer is an error."""
    parent: nn.Module
    """The module that calls the switch."""
    key: str
    """The switch's name in `parent`."""
    switch: nn.Module
    """The stock `SwitchGLU` or `SwitchMLP`."""
    top_k: int
    """Experts that a token chooses in this layer."""

    @property
    def projections(self) -> dict[str, nn.Module]:
        """The switch's linear layers by name; each has tensors of shape (experts, …)."""
        return {k: v for k, v in self.switch.items() if hasattr(v, "num_experts")}

    @property
    def experts(self) -> int:
        """Routed experts of this layer."""
        return next(iter(self.projections.values())).num_experts

    def tensors(self) -> Iterator[tuple[str, str, mx.array]]:
        """Yields projection, name and array of every tensor that belongs to the experts."""
        for name, projection in self.projections.items():
            for key, value in projection.items():
                if isinstance(value, mx.array):
                    yield name, key, value


def find_switches(model: nn.Module, model_type: str) -> list[SwitchSite]:
    """Finds every MoE layer of a model, in layer order.

    Args:
        model: A model built by mlx-lm; its arrays may be lazy and stay so.
        model_type: For messages.

    Raises:
        CheckpointError: If the model has none, so that there is nothing to hold a part of.
    """
    from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

    modules = dict(model.named_modules())
    found = {p: m for p, m in modules.items() if isinstance(m, SwitchGLU | SwitchMLP)}
    if not found and any("experts" in path.split(".") for path in modules):
        raise CheckpointError(
            f"This {model_type} model keeps each expert as a module of its own and calls one after "
            "another (no SwitchGLU or SwitchMLP), so that there is no place for moelab to stand. "
            "Run it with mlx_lm instead."
        )
    if not found:
        raise CheckpointError(
            f"This {model_type} model has no routed experts (no SwitchGLU or SwitchMLP): it is "
            "dense, and all of it is needed for every token. Run it with mlx_lm instead."
        )
    paths = sorted(found, key=_natural)
    try:
        top_k = _trace_top_k(model, {path: _parent(modules, path) for path in paths})
    except RuntimeError as error:  # such as that of a kernel that there is for another device only
        raise CheckpointError(
            f"mlx-lm cannot run this {model_type} model on this machine: {error}"
        ) from error
    # `model.layers.3.mlp.switch_mlp`, `transformer.h.3.moe.switch_mlp`
    layers = [next((int(part) for part in path.split(".") if part.isdigit()), i)
              for i, path in enumerate(paths)]  # fmt: skip
    if len(set(layers)) != len(layers):
        raise CheckpointError(
            f"This {model_type} model has two switches in one layer ({', '.join(paths[:4])} …), "
            "which moelab does not know how to name."
        )
    return [
        SwitchSite(path, layer, *_parent(modules, path), found[path], top_k[path])
        for path, layer in zip(paths, layers, strict=True)
    ]


COMPILED_SUMS = {
    ("mlx_lm.models.bailing_moe", "BailingMoeSparseMoeBlock"): "aggregate_expert_outputs",
}
"""Blocks that hand the experts' outputs and their weights to a compiled function, by module and
class: inside of it an array's own methods are not called, and so nobody sees the weights."""


def opened_block(block: type) -> type | None:
    """Makes a block's class whose compiled weighted sum first shows its factor.

    Args:
        block: The class of a switch's parent.

    Returns:
        A subclass, for exchange with an instance's class. Where the experts' outputs have a method
        `seen`, it is called with the factor, (…, top-k, 1), and what it returns is applied. The
        sum itself stays the family's own. None if nothing hides the factor, or no longer does.
    """
    name = COMPILED_SUMS.get((block.__module__, block.__qualname__))
    if name is None or "shows_factor" in vars(block):
        return None
    own: Any = block.__call__
    compiled = own.__globals__[name]

    def shown(outputs: mx.array, weights: mx.array) -> Any:
        seen = getattr(outputs, "seen", None)
        if seen is not None:
            weights = seen(weights[..., None]).squeeze(-1)
        return compiled(outputs, weights)

    # The same code, reading its globals elsewhere: mlx-lm's module and other models stay as they
    # are.
    call = FunctionType(
        own.__code__, {**own.__globals__, name: shown}, own.__name__, own.__defaults__
    )
    names = {"__call__": call, "__module__": block.__module__, "__doc__": block.__doc__}
    names["shows_factor"] = True
    return type(block.__name__, (block,), {**names, "__qualname__": block.__qualname__})


class _Probe(nn.Module):
    """Stands in for a switch and notes how many experts it is asked for; computes nothing."""

    def __init__(self, switch: nn.Module) -> None:
        super().__init__()
        # Past nn.Module's own __setattr__, so that the switch does not become a child.
        object.__setattr__(self, "stands_for", switch)
        object.__setattr__(self, "top_k", 0)

    def __call__(self, x: mx.array, indices: mx.array, *_: Any) -> mx.array:
        object.__setattr__(self, "top_k", indices.shape[-1])
        return mx.zeros((*indices.shape, x.shape[-1]), x.dtype)

    def __getattr__(self, key: str) -> Any:
        return getattr(self.__dict__["stands_for"], key)  # what a family reads from its switch


def _trace_top_k(model: nn.Module, parents: dict[str, tuple[nn.Module, str]]) -> dict[str, int]:
    """Runs one token through the model without evaluating anything, for the shapes alone."""
    probes = {path: _Probe(parent[key]) for path, (parent, key) in parents.items()}
    originals = {path: parent[key] for path, (parent, key) in parents.items()}
    try:
        for path, (parent, key) in parents.items():
            parent[key] = probes[path]
        model(mx.zeros((1, 1), mx.int32))
    finally:
        for path, (parent, key) in parents.items():
            parent[key] = originals[path]
    return {path: probe.__dict__["top_k"] for path, probe in probes.items()}


def _parent(modules: dict[str, nn.Module], path: str) -> tuple[nn.Module, str]:
    prefix, _, key = path.rpartition(".")
    return modules[prefix], key


def _natural(path: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in path.split(".")]
