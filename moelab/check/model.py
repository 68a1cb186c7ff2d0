"""A model opened for checking: every weight still on disk, one layer's experts in memory at most.

The check must work for a model that does not fit, so it does not load one. mlx-lm builds the
model with lazy arrays, and the arrays of one layer's experts are evaluated when that layer is
checked and given up afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..checkpoint.fingerprint import fingerprint
from ..checkpoint.headers import TensorSpan, read_headers
from ..checkpoint.provenance import load_traced
from ..checkpoint.resolve import read_config, resolve
from ..experts.attach import all_parameters
from ..experts.budget import Need, needs
from ..experts.source import find_origins
from ..families import SwitchSite, find_switches
from ..loading import check_backend

Origins = Mapping[tuple[str, str], tuple[TensorSpan, ...]]
"""Where each tensor of a layer's experts is on disk, by projection and name."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a report says of the model."""

    name: str
    """Its name on the hub, or the last part of its folder's path."""
    fingerprint: str
    """16 hexadecimal digits made from the checkpoint's headers, sizes and samples."""
    family: str
    """mlx-lm's name of the family."""
    layers: int
    """Layers that have experts."""
    experts: int
    """Experts a layer; the most where layers differ."""
    top_k: int
    """Experts that a token chooses in a layer; the most where layers differ."""
    expert_bytes: int
    """Bytes of one expert on disk; the most where layers differ."""
    trunk_bytes: int
    """Bytes in memory of everything but the routed experts."""
    total_bytes: int
    """Bytes in memory of the whole model."""
    precision: str
    """How the experts are stored, such as "4-bit affine, groups of 64"."""


@dataclass(frozen=True, slots=True)
class LayerInput:
    """What a block gives its switch."""

    width: int
    dtype: Any
    """MLX's dtype of the activations."""


@dataclass(frozen=True, slots=True)
class OpenLayer:
    """One MoE layer of an opened model."""

    site: SwitchSite
    origins: Origins
    """Where its experts are on disk."""
    given: LayerInput
    """Shape and type of what reaches its switch."""
    experts: int
    expert_bytes: int
    """Bytes of one expert on disk."""

    @contextmanager
    def resident(self) -> Iterator[nn.Module]:
        """Lends the stock switch with all its experts in memory, and frees them at the end.

        A layer can be lent once: an MLX array that was evaluated cannot become lazy again, so the
        switch is stripped of its arrays afterwards.
        """
        projections = self.site.projections
        held = [(projections[name], key) for name, key, _ in self.site.tensors()]
        try:
            mx.eval([array for _, _, array in self.site.tensors()])
            yield self.site.switch
        finally:
            for projection, key in held:
                del projection[key]
            mx.clear_cache()


@dataclass(frozen=True, slots=True)
class OpenModel:
    """An opened model."""

    folder: Path
    facts: ModelFacts
    layers: list[OpenLayer]
    need: Need
    """What running it takes."""


def open_model(name_or_path: str | Path) -> OpenModel:
    """Opens a model without loading it.

    Args:
        name_or_path: See `moelab.load`.

    Raises:
        CheckpointError: As `moelab.load`.
    """
    folder = resolve(name_or_path)
    read_config(folder)
    spans = read_headers(folder)
    model, config, trace = load_traced(folder)
    sites = find_switches(model, config["model_type"])
    check_backend(sites, None)
    given = _inputs(model, sites)
    need = needs(model, sites, config)
    layers = []
    # The trace keeps every array of the checkpoint alive, so it is not kept itself.
    found = find_origins(folder, sites, trace, spans)
    for site, entry, origins in zip(sites, given, found, strict=True):
        nbytes = sum(array.nbytes // site.experts for _, _, array in site.tensors())
        layers.append(OpenLayer(site, origins, entry, site.experts, nbytes))
    total = sum(a.nbytes for _, a in tree_flatten(all_parameters(model)))
    routed = sum(layer.experts * layer.expert_bytes for layer in layers)
    given_as = Path(name_or_path).expanduser()
    facts = ModelFacts(
        name=given_as.resolve().name if given_as.exists() else str(name_or_path),
        fingerprint=fingerprint(folder, spans),
        family=str(config["model_type"]),
        layers=len(layers),
        experts=max(layer.experts for layer in layers),
        top_k=max(site.top_k for site in sites),
        expert_bytes=max(layer.expert_bytes for layer in layers),
        trunk_bytes=total - routed,
        total_bytes=total,
        precision=_precision(sites[0]),
    )
    return OpenModel(folder, facts, layers, need)


def _precision(site: SwitchSite) -> str:
    projection: Any = next(iter(site.projections.values()))
    if "scales" in projection:
        return f"{projection.bits}-bit {projection.mode}, groups of {projection.group_size}"
    return f"unquantised {str(projection['weight'].dtype).removeprefix('mlx.core.')}"


class _Probe(nn.Module):
    """Stands in for a switch and notes what it is given; computes nothing."""

    def __init__(self, switch: nn.Module) -> None:
        super().__init__()
        # Past nn.Module's own __setattr__, so that the switch does not become a child.
        object.__setattr__(self, "stands_for", switch)
        object.__setattr__(self, "given", None)

    def __call__(self, x: mx.array, indices: mx.array, *_: Any) -> mx.array:
        object.__setattr__(self, "given", LayerInput(x.shape[-1], x.dtype))
        return mx.zeros((*indices.shape, x.shape[-1]), x.dtype)

    def __getattr__(self, key: str) -> Any:
        return getattr(self.__dict__["stands_for"], key)  # what a family reads from its switch


def _inputs(model: nn.Module, sites: list[SwitchSite]) -> list[LayerInput]:
    """Runs one token through the model, for shapes and types alone: nothing is evaluated."""
    probes = [_Probe(site.switch) for site in sites]
    try:
        for site, probe in zip(sites, probes, strict=True):
            site.parent[site.key] = probe
        model(mx.zeros((1, 1), mx.int32))
    finally:
        for site in sites:
            site.parent[site.key] = site.switch
    return [probe.__dict__["given"] for probe in probes]
