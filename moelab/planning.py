"""`moelab.plan`: whether and how a model would run here, before anything is downloaded."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn

from .checkpoint.headers import read_headers
from .checkpoint.outline import open_outline
from .checkpoint.provenance import load_traced
from .checkpoint.resolve import LAB_MODEL, read_config
from .display import facts_html, facts_text, size
from .errors import CheckpointError
from .experts import capacity as _capacity
from .experts.attach import all_parameters, arrays_in, origins_of
from .experts.budget import MARGIN, Budget, asked, automatic, needs, numbers, within
from .families import SwitchSite, find_switches
from .loading import check_backend


@dataclass(frozen=True, slots=True, repr=False)
class Plan:
    """What a model is and what of it would fit here. Sizes are bytes."""

    name: str
    family: str
    """mlx-lm's name of the family."""
    downloaded: bool
    """The weights are on this machine."""
    disk_bytes: int
    """The weights' files."""
    total_bytes: int
    """The whole model in memory."""
    trunk_bytes: int
    """Of it, everything but the routed experts."""
    layers: tuple[int, ...]
    """Numbers of the decoder layers that have routed experts; empty for a dense model."""
    experts: tuple[int, ...]
    """Routed experts of each."""
    top_k: tuple[int, ...]
    """Experts that a token chooses in each."""
    expert_bytes: tuple[int, ...]
    """One expert of each."""
    shared_expert: bool
    """Some experts work on every token and are part of the trunk."""
    available_bytes: int
    """Memory that there is, or the budget."""
    budget: Budget | None
    """How the capacity follows from it; None for a dense model."""
    not_direct: str | None
    """Why experts cannot be read from the checkpoint's own files; None if they can."""
    disk_needed: int
    """For the download, and for the packed file where one is needed."""
    disk_free: int
    """What there is where these would go."""
    notes: tuple[str, ...]
    """What else stands in the way on this machine."""

    @property
    def dense(self) -> bool:
        """Whether nothing can be left on disk."""
        return not self.layers

    @property
    def capacity(self) -> tuple[int, ...]:
        """Slots that each MoE layer would get; empty for a dense model, 0 if it does not fit."""
        return () if self.budget is None else self.budget.capacities

    @property
    def runs(self) -> bool:
        """Whether moelab can run it here."""
        return bool(self.capacity) and all(self.capacity) and self.disk_needed <= self.disk_free

    @property
    def verdict(self) -> str:
        """The plan in a sentence."""
        if self.budget is None:
            fits = self.total_bytes <= self.available_bytes * (1 - MARGIN)
            return (
                f"dense: it has no routed experts (no SwitchGLU or SwitchMLP), so all "
                f"{size(self.total_bytes)} are needed for every token, which "
                f"{'fits' if fits else 'does not fit'}; run it with mlx_lm instead"
            )
        if not all(self.capacity):
            return (
                f"does not fit: the {max(self.top_k)} experts a layer that a token needs lack "
                f"{size(-self.budget.left)}"
            )
        if self.disk_needed > self.disk_free:
            return (
                f"does not fit on the disk: {size(self.disk_needed)} are needed there and "
                f"{size(self.disk_free)} are free"
            )
        if self.capacity == self.experts:
            return "fits whole"
        share = sum(self.capacity) / sum(self.experts)
        packed = "" if self.not_direct is None else ", from a packed file that is made first"
        return (
            f"runs with {numbers(self.capacity)} of {numbers(self.experts)} experts a layer "
            f"({share:.0%}){packed}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as JSON values; rows of the sum are under `budget`."""
        found = dataclasses.asdict(self)
        found["capacity"] = list(self.capacity)
        found["verdict"] = self.verdict
        return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}

    def _facts(self) -> dict[str, str]:
        facts = {"model": f"{self.name} ({self.family})", "verdict": self.verdict}
        if not self.dense:
            each = sorted(set(self.expert_bytes))
            facts["experts"] = (
                f"{numbers(self.experts)} a layer in {len(self.layers)} layers, top-"
                f"{numbers(self.top_k)}, {'and a' if self.shared_expert else 'no'} shared expert"
            )
            facts["an expert"] = " to ".join(size(n) for n in dict.fromkeys((each[0], each[-1])))
        facts["in memory"] = f"{size(self.total_bytes)} whole, trunk {size(self.trunk_bytes)}"
        where = "here" if self.downloaded else "to be downloaded"
        facts["on disk"] = f"{size(self.disk_bytes)}, {where}"
        if self.disk_needed:
            facts["disk"] = f"{size(self.disk_needed)} needed, {size(self.disk_free)} free"
        if not self.dense:
            facts["reading"] = self.not_direct or "experts are read from the model's own files"
        facts.update({f"note {i}": note for i, note in enumerate(self.notes, 1)})
        if self.budget is not None:
            facts.update(self.budget.facts())
        return facts

    def __repr__(self) -> str:
        return facts_text("Plan", self._facts())

    def _repr_html_(self) -> str:
        return facts_html("Plan", self._facts())


def plan(
    name_or_path: str | Path = LAB_MODEL,
    *,
    context: int | None = None,
    budget_gb: float | None = None,
    kv_bits: int | None = None,
    revision: str | None = None,
) -> Plan:
    """Says whether and how a model would run on this machine, without its weights.

    `config.json` and the shards' headers are enough, and of a model on the hub nothing else is
    fetched. The sum is the one that `moelab.load` makes for `capacity="auto"` or a budget.

    Args:
        name_or_path: `"lab"` (the shipped model), a folder, or a name on the Hugging Face hub.
        context: Tokens of prompt and answer to leave room for; see `moelab.load`.
        budget_gb: Memory to take, in units of 10⁹ bytes, instead of what there is.
        kv_bits: Bits of the key-value cache: 8, 4 or None.
        revision: Branch, tag or commit on the hub.

    Raises:
        CheckpointError: If there is no such model, the hub cannot be reached, its files are
            damaged, or mlx-lm does not know the family.
        CapacityError: If an argument is out of range. A model that does not fit is no error here.
    """
    with open_outline(name_or_path, revision) as outline:
        read_config(outline.folder)
        spans = read_headers(outline.folder)
        try:
            model, config, trace = load_traced(outline.folder)
        except CheckpointError as error:
            text = str(error).replace(str(outline.folder), str(name_or_path))
            raise CheckpointError(text) from error
        total = sum(array.nbytes for array in arrays_in(all_parameters(model)))
        on_disk = sum(span.nbytes for span in spans.values())
        sites = find_switches(model, config["model_type"]) if _has_switches(model) else []
        there_is = _capacity.available_memory() if budget_gb is None else asked(budget_gb)
        budget: Budget | None = None
        not_direct, notes = None, []
        if sites:
            need = needs(model, sites, config, context=context, kv_bits=kv_bits)
            if budget_gb is None:
                budget = automatic(there_is, sites, need)
            else:
                budget = within(budget_gb, sites, need, whole=context is not None)
            not_direct = _not_direct(sites, trace, spans)
            try:
                check_backend(sites, None)
            except CheckpointError as error:
                notes.append(str(error))
        each = budget.need.experts if budget is not None else ()
        routed = sum(n * site.experts for n, site in zip(each, sites, strict=True))
        partial = budget is not None and any(
            0 < c < s.experts for c, s in zip(budget.capacities, sites, strict=True)
        )
        return Plan(
            name=str(name_or_path),
            family=str(config["model_type"]),
            downloaded=outline.local,
            disk_bytes=on_disk,
            total_bytes=total,
            trunk_bytes=total - routed,
            layers=tuple(site.layer for site in sites),
            experts=tuple(site.experts for site in sites),
            top_k=tuple(site.top_k for site in sites),
            expert_bytes=tuple(each),
            shared_expert=_has_shared_expert(model),
            available_bytes=there_is.nbytes,
            budget=budget,
            not_direct=not_direct,
            disk_needed=(0 if outline.local else on_disk)
            + (routed if not_direct is not None and partial else 0),
            disk_free=_free(outline.folder if outline.local else None),
            notes=tuple(notes),
        )


def _has_switches(model: nn.Module) -> bool:
    from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

    return any(isinstance(module, SwitchGLU | SwitchMLP) for module in model.modules())


def _has_shared_expert(model: nn.Module) -> bool:
    names = (path.rpartition(".")[2] for path, _ in model.named_modules())
    return any(re.fullmatch(r"shared_(experts?|mlp)", name) for name in names)


def _not_direct(sites: Sequence[SwitchSite], trace: Any, spans: Any) -> str | None:
    """Returns why experts cannot be read from the checkpoint's own files; None if they can."""
    try:
        for site in sites:
            origins_of(site, trace, spans)
    except CheckpointError:
        return (
            "mlx-lm computes the experts' tensors while it loads this checkpoint, so that they "
            "cannot be read one at a time from its files: a packed file is needed"
        )
    return None


def _free(folder: Path | None) -> int:
    """Returns the free bytes on the disk that a model's files are on, or would be."""
    if folder is None:
        from huggingface_hub.constants import HF_HUB_CACHE

        folder = Path(HF_HUB_CACHE).expanduser()
    folder = folder.resolve()
    while not folder.exists():  # a cache that was never used
        folder = folder.parent
    return shutil.disk_usage(folder).free
