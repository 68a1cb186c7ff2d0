"""What stock mlx-lm answers, and what a lab's bank did meanwhile.

Checkpoints and stock models are built once a test session and kept; nothing here changes them.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np

from moelab.experts.bank import LayerBank
from moelab.experts.residency import Load
from moelab.lab import Lab
from tests.support import tiny

QUANTS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "affine2": {"group_size": 32, "bits": 2},
    "affine3": {"group_size": 64, "bits": 3},
    "affine4": {"group_size": 32, "bits": 4},
    "affine8": {"group_size": 32, "bits": 8},
    "mxfp4": {"mode": "mxfp4"},
    "mxfp8": {"mode": "mxfp8"},
    "nvfp4": {"mode": "nvfp4"},
}

Steps = list[tuple[int, np.ndarray]]
"""Token and the bits of its log-probabilities, for each step of a generation."""


@functools.cache
def _root() -> Path:
    root = Path(tempfile.mkdtemp(prefix="moelab-tests-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


@functools.cache
def folder(family: str, quant: str = "affine4", **options: Any) -> Path:
    """A tiny checkpoint that is never changed; see `tiny.build` for the options."""
    name = "-".join(["x", family, quant, *(f"{k}_{v}" for k, v in sorted(options.items()))])
    return tiny.build(_root() / name, family, quant=QUANTS[quant], **options)


@functools.cache
def stock(path: Path) -> tuple[Any, Any]:
    """Stock mlx-lm's model and tokenizer, all weights in memory."""
    return mlx_lm.load(str(path))[:2]


def layouts(family: str, quant: str) -> list[dict[str, Any]]:
    """The layouts that mlx-lm reads for a family: stacked, in shards, and an expert a tensor."""
    found: list[dict[str, Any]] = [{}, {"shards": 3}]
    kinds = tiny.PER_EXPERT.get(family, ())
    if kinds and (quant == "none" or "scales" in kinds):
        found.append({"layout": "per_expert", "shards": 2})
    return found


def bits(array: mx.array) -> np.ndarray:
    """An array's memory, so that equality is bit for bit; -0 and 0 differ."""
    shape = {2: mx.uint16, 4: mx.uint32}[array.dtype.size]
    return np.array(array.view(shape))


def equal(a: mx.array, b: mx.array) -> bool:
    """Whether two arrays are equal bit for bit, of the same type, and finite."""
    return a.dtype == b.dtype and bool(mx.isfinite(a).all()) and np.array_equal(bits(a), bits(b))


def steps(responses: Iterable[Any]) -> Steps:
    """Runs a generation and keeps what can be compared."""
    return [(r.token, bits(r.logprobs)) for r in responses]


def stock_steps(path: Path, prompt: Sequence[int], max_tokens: int, **options: Any) -> Steps:
    """Stock mlx-lm's greedy generation."""
    model, tokenizer = stock(path)
    return steps(
        mlx_lm.stream_generate(model, tokenizer, list(prompt), max_tokens=max_tokens, **options)
    )


def same_steps(a: Steps, b: Steps) -> bool:
    """Whether two generations agree in every token and every bit of every distribution."""
    return (
        len(a) == len(b) > 0
        and [token for token, _ in a] == [token for token, _ in b]
        and all(np.array_equal(x, y) for (_, x), (_, y) in zip(a, b, strict=True))
    )


@dataclass
class Event:
    """One step at one layer."""

    layer: LayerBank
    needed: list[int]
    before: frozenset[int]
    misses: list[int] = field(default_factory=list)
    rounds: list[list[Load]] = field(default_factory=list)
    after: frozenset[int] | None = None

    @property
    def swept(self) -> bool:
        """Whether it chose more experts than there are slots."""
        return len(self.needed) > self.layer.capacity


class Tally:
    """Watches a lab's bank from outside and checks its rules at every event.

    Args:
        lab: The lab; it is watched until it is closed.
        slot_bytes: Also compare every slot with the disk after every event.
    """

    def __init__(self, lab: Lab, *, slot_bytes: bool = False) -> None:
        self.events: list[Event] = []
        self.slot_bytes = slot_bytes
        for layer in lab.attachment.bank.layers:
            self._watch(layer)

    def _watch(self, layer: LayerBank) -> None:
        begin, load, end = layer.begin, layer.load, layer.end

        def watched_begin(needed: Sequence[int]) -> list[int]:
            self.events.append(Event(layer, list(needed), frozenset(layer.residency.slot_of)))
            self.events[-1].misses = list(begin(needed))
            return self.events[-1].misses

        def watched_load(loads: Sequence[Load]) -> None:
            load(loads)
            self.events[-1].rounds.append(list(loads))
            check_slots(layer)

        def watched_end() -> None:
            end()
            self.events[-1].after = frozenset(layer.residency.slot_of)
            check_slots(layer)
            if self.slot_bytes:
                check_slot_bytes(layer)

        # Attributes of the instance hide the class's methods.
        layer.__dict__.update(begin=watched_begin, load=watched_load, end=watched_end)

    @property
    def loads(self) -> list[Load]:
        """Every load, in order."""
        return [load for event in self.events for loads in event.rounds for load in loads]

    @property
    def evictions(self) -> int:
        """Loads that made another expert leave."""
        return sum(load.evicted is not None for load in self.loads)

    @property
    def sweeps(self) -> int:
        """Events that were served in rounds."""
        return sum(event.swept and len(event.rounds) > 1 for event in self.events)


def check_slots(layer: LayerBank) -> None:
    """The capacity is not exceeded and no two experts share a slot."""
    slots = list(layer.residency.slot_of.values())
    assert len(slots) == len(set(slots)) <= layer.capacity
    assert set(slots) <= set(range(layer.capacity))


def check_slot_bytes(layer: LayerBank) -> None:
    """Every resident expert's slot holds exactly the bytes that the checkpoint has for it."""
    for tensor in layer.loader._tensors:
        assert not tensor.widen
        for expert, slot in layer.residency.slot_of.items():
            path, offset = tensor.place(expert)
            disk = np.fromfile(path, np.uint8, count=tensor.disk_bytes, offset=offset)
            assert np.array_equal(disk, tensor.slots[slot]), (tensor.name, expert, slot)
