"""Whole models in a lab's place: at fewer bits, or with experts removed for good.

What a bank of C experts saves, a reader would ask to see beside what the same bytes buy otherwise:
every expert at fewer bits, or a model from which experts were cut, its router's rows with them, as
published pruned models are made (REAP, arXiv 2510.13999). Both run in the lab's own model while a
`with` block lasts: the trunk is the same arrays, only experts and, where some are cut, the
router's rows are others. Beside the lab's own memory there is that of the comparator's experts
meanwhile.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import MissActionError, MoelabError, StudyError
from ..experts.attach import arrays_in
from ..experts.bank import LayerBank
from ..experts.copies import Copies
from ..experts.lowbit import copies_in_memory
from ..experts.misses import Load
from ..experts.residency import Load as ExpertLoad
from ..experts.router import RouterUnit, find_unit
from ..families import SwitchSite
from ..lab import Lab
from ..quality.judge import as_before, put_action

BITS = (2, 3, 4, 5, 6, 8)
"""Bits that MLX quantises to."""

PROBED = 64
"""Tokens that are run, without experts, to see what a cut router chooses."""


@dataclass(frozen=True, slots=True)
class Whole:
    """What stands in the lab's place."""

    kind: str
    """`"whole_2bit"` and the like, or `"pruned"`."""
    experts: tuple[int, ...]
    """Experts of each MoE layer."""
    expert_bytes: int
    """Bytes of all of them."""
    trunk_bytes: int
    """Bytes of everything else."""


@contextlib.contextmanager
def fewer_bits(lab: Lab, bits: int) -> Iterator[Whole]:
    """Puts all experts, at fewer bits, in the bank's place while the block runs.

    Each is dequantised from the checkpoint and quantised again, affine in groups of 64. Attention,
    embeddings, shared experts and routers stay as they are in the checkpoint.

    Args:
        lab: The model. Afterwards it is as it was, its bank reset, also after an error.
        bits: 2, 3, 4, 5, 6 or 8.

    Raises:
        StudyError: If there are no such bits, or the experts' width is no multiple of 64.
        MoelabError: While the lab is being recorded.
    """
    if isinstance(bits, bool) or bits not in BITS:
        raise StudyError(f"bits must be one of {', '.join(map(str, BITS))}, got {bits!r}.")
    banks = _banks(lab)
    trunk = lab.memory().trunk
    try:
        copies = Copies(lambda: lab.fingerprint).of(list(banks.values()), bits, {})
        for site in lab.sites:
            if site.layer not in banks:
                copies[site.layer] = copies_in_memory(site, bits)
    except MissActionError as error:
        raise StudyError(f"The experts cannot be had at {bits} bits: {error}") from error
    with _in_place(lab, copies):
        yield Whole(
            f"whole_{bits}bit",
            tuple(site.experts for site in lab.sites),
            _nbytes(copies.values()),
            trunk,
        )


@contextlib.contextmanager
def pruned(lab: Lab, kept: Mapping[int, Sequence[int]]) -> Iterator[Whole]:
    """Takes all but some experts out of the model while the block runs, out of its routers too.

    The router's rows of the others are gone, which is as if their logits were −∞: it chooses its
    top-k among those that are left, and weighs them by the family's own rule over these alone.

    Args:
        lab: The model. Afterwards it is as it was, its bank reset, also after an error.
        kept: The experts that stay, by layer; at least the layer's top-k.

    Raises:
        StudyError: If a layer is missing, ids are none of the layer's, too few stay, the family
            chooses by groups of experts, or its router is not understood.
        MoelabError: While the lab is being recorded.
    """
    left = {site.layer: _checked(site, kept) for site in lab.sites}
    banks = _banks(lab)
    trunk = lab.memory().trunk
    switches = {}
    rows: dict[int, list[_Rows]] = {}
    for site in lab.sites:
        unit = find_unit(lab.model, site)
        rows[site.layer] = _router_rows(unit, site)
        switches[site.layer] = _cut(site, left[site.layer], banks.get(site.layer))
    with _in_place(lab, switches), contextlib.ExitStack() as undo:
        saved = 0
        for site in lab.sites:
            ids = mx.array(left[site.layer], mx.uint32)
            for row in rows[site.layer]:
                undo.callback(row.put, row.array)
                cut = row.array[ids]
                mx.eval(cut)
                saved += row.array.nbytes - cut.nbytes
                row.put(cut)
            for module, name in _counts(find_unit(lab.model, site), site):
                undo.callback(setattr, module, name, site.experts)
                setattr(module, name, len(left[site.layer]))
        _probe(lab, {site.layer: len(left[site.layer]) for site in lab.sites})
        yield Whole(
            "pruned",
            tuple(len(left[site.layer]) for site in lab.sites),
            _nbytes(switches.values()),
            trunk - saved,
        )


def _banks(lab: Lab) -> dict[int, LayerBank]:
    return {layer.layer: layer for layer in lab.attachment.bank.layers}


@contextlib.contextmanager
def _in_place(lab: Lab, switches: Mapping[int, nn.Module]) -> Iterator[None]:
    """Lets other switches stand where the lab's stand, with all else exact."""
    if lab.sessions:
        raise MoelabError(
            "The lab is being recorded, and what is compared here is not the lab's own routing. "
            "Leave the `with lab.record()` block first."
        )
    with as_before(lab):
        # A lossy action changes blocks and routers; it must be gone before they are changed here.
        put_action(lab, Load(), None)
        own = [(site, site.parent[site.key]) for site in lab.sites]
        try:
            for site in lab.sites:
                site.parent[site.key] = switches[site.layer]
            yield
        finally:
            for site, switch in own:
                site.parent[site.key] = switch


def _checked(site: SwitchSite, kept: Mapping[int, Sequence[int]]) -> list[int]:
    if site.layer not in kept:
        raise StudyError(
            f"kept says nothing of layer {site.layer}. Name the experts that stay in every layer."
        )
    ids = sorted({int(expert) for expert in kept[site.layer]})
    if ids and not 0 <= ids[0] <= ids[-1] < site.experts:
        raise StudyError(
            f"Layer {site.layer} has experts 0 to {site.experts - 1}, and kept names {ids[0]} to "
            f"{ids[-1]}."
        )
    if len(ids) < site.top_k:
        raise StudyError(
            f"Layer {site.layer} keeps {len(ids)} experts, and a token chooses {site.top_k}: "
            f"keep at least {site.top_k}."
        )
    return ids


def _cut(site: SwitchSite, ids: Sequence[int], bank: LayerBank | None) -> nn.Module:
    """Returns a switch with these experts only, read from disk where the bank reads them."""
    if bank is not None:
        scratch = bank.scratch(len(ids))
        scratch.loader.read([ExpertLoad(expert, slot, None) for slot, expert in enumerate(ids)])
        return scratch.switch
    switch, chosen = copy.copy(site.switch), mx.array(list(ids), mx.uint32)
    for name, projection in site.projections.items():
        switch[name] = copy.copy(projection)
    for name, key, array in site.tensors():
        switch[name][key] = array[chosen]
    mx.eval(arrays_in(switch))
    return switch


# -- routers -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Rows:
    """An array of a router with a row an expert."""

    module: nn.Module
    key: str
    array: mx.array

    def put(self, array: mx.array) -> None:
        """Puts another array in its place."""
        self.module[self.key] = array


def _router_rows(unit: RouterUnit, site: SwitchSite) -> list[_Rows]:
    """Finds a router's arrays that have a row an expert: its weights, biases and factors."""
    for module in _parts(unit, site):
        if _groups(module) > 1:
            raise StudyError(
                f"{type(site.parent).__name__} chooses experts by groups, and a model that lacks "
                "some would have uneven ones, which no checkpoint can have. There is no pruned "
                "comparator for this model; compare it with fewer bits."
            )
    found = [
        _Rows(module, key, value)
        for module in _parts(unit, site)
        for key, value in module.items()
        if isinstance(value, mx.array) and value.ndim and value.shape[0] == site.experts
    ]
    if not found:
        raise _not_understood(site)
    return found


def _parts(unit: RouterUnit, site: SwitchSite) -> list[nn.Module]:
    """Returns the modules that a layer's router consists of."""
    if unit.kind == "router":
        return [m for m in unit.module.modules() if not isinstance(m, nn.Dropout)]
    block = site.parent
    found = [block]
    for key, child in block.children().items():
        if key == site.key or not isinstance(child, nn.Module):
            continue
        linear = [m for m in child.modules() if isinstance(m, nn.Linear | nn.QuantizedLinear)]
        # A shared expert may have as many rows somewhere, but leads back to the model's width.
        if linear and all(m["weight"].shape[0] == site.experts for m in linear):
            found += child.modules()
    return found


def _groups(module: nn.Module) -> int:
    found = [1]
    for holder in (module, getattr(module, "args", None), getattr(module, "config", None)):
        for name in ("n_group", "num_expert_group"):
            value = getattr(holder, name, None) if holder is not None else None
            found += [value] if isinstance(value, int) else []
    return max(found)


def _counts(unit: RouterUnit, site: SwitchSite) -> list[tuple[nn.Module, str]]:
    """Finds where a router's modules note how many experts there are."""
    return [
        (module, name)
        for module in {id(m): m for m in [site.parent, *_parts(unit, site)]}.values()
        for name, value in vars(module).items()
        if type(value) is int and value == site.experts and "experts" in name
        and "per_tok" not in name and "top" not in name
    ]  # fmt: skip


class _Probe(nn.Module):
    """Stands in for a switch and notes the ids that it is asked for; computes nothing."""

    def __init__(self, switch: nn.Module) -> None:
        super().__init__()
        # Past nn.Module's own __setattr__: neither is a part of the model's tree.
        object.__setattr__(self, "stands_for", switch)
        object.__setattr__(self, "asked", [])

    def __call__(self, x: mx.array, indices: mx.array, *_: Any) -> mx.array:
        self.__dict__["asked"].append(indices.max())
        return mx.zeros((*indices.shape, x.shape[-1]), x.dtype)

    def __getattr__(self, key: str) -> Any:
        return getattr(self.__dict__["stands_for"], key)


def _probe(lab: Lab, experts: Mapping[int, int]) -> None:
    """Sees that cut routers choose among what is left, by running some tokens without experts."""
    probes = {site.layer: _Probe(site.parent[site.key]) for site in lab.sites}
    try:
        for site in lab.sites:
            site.parent[site.key] = probes[site.layer]
        try:
            mx.eval(lab.model(mx.arange(1, 1 + PROBED, dtype=mx.int32)[None]))
        except (ValueError, RuntimeError) as error:
            raise _not_understood(lab.sites[0]) from error
        for site in lab.sites:
            asked = [int(most.item()) for most in probes[site.layer].__dict__["asked"]]
            if not asked or max(asked) >= experts[site.layer]:
                raise _not_understood(site)
    finally:
        for site in lab.sites:
            site.parent[site.key] = probes[site.layer].__dict__["stands_for"]


def _not_understood(site: SwitchSite) -> StudyError:
    return StudyError(
        f"The router of {type(site.parent).__name__} (layer {site.layer}) has not one row an "
        "expert in a place that is known, so experts cannot be taken out of it. There is no "
        "pruned comparator for this model; compare it with fewer bits."
    )


def _nbytes(switches: Any) -> int:
    return sum(array.nbytes for switch in switches for array in arrays_in(switch))
