"""`check`: the parts in their order."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from ..errors import CapacityError
from ..experts.capacity import Capacity, resolve_capacity
from ..machine import this_machine
from .bandwidth import THREADS, expert_pieces, measure_bandwidth
from .exact import check_exactness
from .model import OpenModel, open_model
from .pagecache import Piece
from .report import CheckReport
from .speed import SPEED_PARTS, measure_speed

SAMPLE = 256
"""Experts about which the page cache is asked before speeds are measured."""


def check(
    name_or_path: str | Path = "lab",
    *,
    capacity: Capacity | None = None,
    tokens: int = 64,
    out: Path | None = None,
    progress: bool = True,
) -> CheckReport:
    """Checks on this machine what moelab promises of a model.

    Compares every MoE layer with the bank bit for bit, one layer in memory at a time, so that it
    works for a model that does not fit; then measures disk, memory and speed.

    Args:
        name_or_path: `"lab"` (the shipped model), a folder, or a name on the Hugging Face hub.
        capacity: Experts a layer to run with, see `moelab.load`. None takes what `"auto"` takes,
            or half the experts if all of them would fit, so that there is something to check.
        tokens: New tokens in each round of the speed measurement.
        out: A folder for the report; None writes nothing.
        progress: Whether to show a progress bar.

    Returns:
        The report. `print(report.page())`, or show it in a notebook.

    Raises:
        CheckpointError: If there is no such model or its files are damaged; see `moelab.load`.
        CapacityError: If the capacity that was asked for is not possible.
        ValueError: If `tokens` is less than 2.
    """
    if tokens < 2:
        raise ValueError(f"tokens must be at least 2, to time the second one, got {tokens}.")
    begin = time.perf_counter()
    machine = this_machine()
    model = open_model(name_or_path)
    plan = _plan(model, capacity)
    sample = _sample(model)
    parts = len(THREADS) + 1 + len(model.layers) + (0 if isinstance(plan, str) else SPEED_PARTS)
    with tqdm(total=parts, disable=not progress, desc="reading experts", unit="part") as bar:

        def step() -> None:
            bar.update()

        bandwidth = measure_bandwidth(model, step)
        bar.set_description("comparing layers")
        slots = [None] * len(model.layers) if isinstance(plan, str) else plan.slots
        exactness = check_exactness(model, slots, step)
        memory = speed = None
        if not isinstance(plan, str):
            bar.set_description("generating")
            memory, speed = measure_speed(
                name_or_path,
                plan.ask,
                plan.why,
                tokens=tokens,
                full_bytes=model.facts.total_bytes,
                sample=sample,
                progress=step,
            )
    report = CheckReport(
        machine=machine,
        model=model.facts,
        exactness=exactness,
        bandwidth=bandwidth,
        memory=memory,
        speed=speed,
        not_run=plan if isinstance(plan, str) else None,
        seconds=time.perf_counter() - begin,
    )
    if out is not None:
        report.save(out)
    return report


@dataclass(frozen=True, slots=True)
class _Plan:
    """How the model will be run."""

    ask: Capacity
    """What `moelab.load` is asked for."""
    slots: list[int]
    """What that is in each layer."""
    why: str


def _plan(model: OpenModel, capacity: Capacity | None) -> _Plan | str:
    """Returns how to run the model, or why it cannot be run at all on this machine."""
    sites = [layer.site for layer in model.layers]

    def slots(ask: Capacity) -> list[int]:
        return resolve_capacity(ask, sites, lambda: model.need).capacities

    if capacity is not None:
        # Settled now: what "auto" means may change while the layers are compared.
        found = slots(capacity)
        same = capacity == "auto" and len(set(found)) == 1
        return _Plan(found[0] if same else capacity, found, "what you asked for")
    try:
        found = slots("auto")
    except CapacityError as error:
        return str(error)
    if any(c < layer.experts for c, layer in zip(found, model.layers, strict=True)):
        uniform = len(set(found)) == 1
        return _Plan(found[0] if uniform else "auto", found, "what fits in this machine's memory")
    why = "half of them; all would fit in this machine's memory, and then nothing would be missing"
    try:
        return _Plan(0.5, slots(0.5), why)
    except CapacityError:  # a token needs more than half of a layer's experts
        return _Plan(1.0, slots(1.0), "all of them, since a token needs more than half")


def _sample(model: OpenModel) -> list[Piece]:
    every = [(layer, e) for layer in model.layers for e in range(layer.experts)]
    stride = max(1, len(every) // SAMPLE)
    return [piece for layer, e in every[::stride] for piece in expert_pieces(layer, e)]
