"""Runs or replays one point of a sweep for one prompt.

An exact point's quality is the full model's, by construction, and what it hits and loads follows
from the routing of one recorded exact run: it is replayed, with the same step boundaries (the
prefix as chunks, then token by token) and the bank reset before the prompt. After a miss that is
not loaded the model goes on from other activations, so a lossy point runs. A quantised cache
changes the routing as well: points with one have an exact run of their own with that cache, which
is what their exact points are replayed from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ..errors import StudyError
from ..experts.misses import Load, LowBit, MissAction
from ..experts.policies import LRU, make_policy
from ..experts.residency import Load as ExpertLoad
from ..lab import PREFILL_STEP, Lab
from ..quality.divergence import diverge
from ..quality.judge import Reference, judge, judged, put_action
from ..quality.window import Window
from .bytes import ModelFacts, cache_bytes
from .points import Point, initial_contents
from .rows import COLUMNS, window_key

if TYPE_CHECKING:
    import pandas as pd

    from ..experts.event import LayerEvent
    from ..routing.steps import Step

ROUTED = ("run", "step", "layer", "rank", "expert", "counts")
"""What a replay needs of a routing frame; and whether the slot counts, 1 or 0. One of weight 0 is
not routed: a family with identity experts sends them to the bank under the id of a real one."""

PREFIX, JUDGED = 0, 1
"""Runs of the frames that are replayed here."""


@dataclass
class Known:
    """What the exact runs of a window told."""

    window: Window
    reference: Reference
    quality: Mapping[str, float]
    """The full model's own figures, against itself."""
    routing: pd.DataFrame
    """`ROUTED` of prefix and judged tokens, with the model's own cache."""
    cache_bytes: int
    quantised: dict[int, Quantised] = field(default_factory=dict)
    """By bits of the cache."""


@dataclass(frozen=True)
class Quantised:
    """What an exact run with a quantised cache told."""

    quality: Mapping[str, float]
    """Against the run with the model's own cache."""
    routing: pd.DataFrame
    cache_bytes: int


class Watched:
    """Listens to forward passes: what their routers chose, what they read, and their cache.

    Beside what `Lab.record` does, since judging resets the bank and refuses to be recorded.
    """

    def __init__(self) -> None:
        self.loads: list[list[tuple[int, Sequence[ExpertLoad], Sequence[float]]]] = []
        """By step, as `Step.loads`; what fills the bank between steps is in none."""
        self.events: list[list[LayerEvent]] = []
        """By step, as `Step.events`."""
        self.cache: Any = None

    def begins(self, step: Step) -> None:
        """See `StepListener`. The step itself is not kept, since it holds on to its logits."""
        self.loads.append(step.loads)
        self.events.append(step.events)
        self.cache = step.cache

    def experts_read(self) -> dict[int, int]:
        """Returns how many experts were read, by layer."""
        found: dict[int, int] = {}
        for step in self.loads:
            for layer, loads, _ in step:
                found[layer] = found.get(layer, 0) + len(loads)
        return found

    def routing(self, window: Window, *, prefix: bool = True) -> pd.DataFrame:
        """Returns what was routed, as `ROUTED`; the rank is the place in the router's answer.

        Args:
            window: What ran.
            prefix: Whether its prefix did, or the tokens after it alone.

        Raises:
            StudyError: If that is not what ran.
        """
        import pandas as pd

        chunks = -(-window.prefix // PREFILL_STEP) if prefix else 0
        if len(self.events) != chunks + len(window.fed):
            raise StudyError(
                f"{len(self.events)} forward passes of {window.document!r} were seen where "
                f"{chunks + len(window.fed)} should be, so that its routing cannot be replayed. "
                "Please report this with the model's family."
            )
        parts = []
        for place, events in enumerate(self.events):
            run, step = (PREFIX, place) if place < chunks else (JUDGED, place - chunks)
            for event in events:
                ids = np.array(event.ids)
                flat = ids.reshape(-1, ids.shape[-1])
                ranks = np.broadcast_to(np.arange(flat.shape[1]), flat.shape)
                same = [np.full(flat.size, value) for value in (run, step, event.layer)]
                parts.append(np.stack([*same, ranks.ravel(), flat.ravel(), _counts(event)]))
        columns = dict(zip(ROUTED, np.concatenate(parts, axis=1), strict=True))
        return pd.DataFrame(columns).astype("int32")


def _counts(event: LayerEvent) -> np.ndarray:
    """Returns 1 for each slot that is routed and 0 for those of weight 0; unknown weights count."""
    if event.weights is None:
        return np.ones(np.array(event.ids).size, np.int32)
    return (np.array(event.weights.astype(mx.float32)).ravel() != 0).astype(np.int32)


@contextlib.contextmanager
def watching(lab: Lab) -> Iterator[Watched]:
    """Listens while the block runs."""
    listener = Watched()
    lab.watch.add(listener)
    try:
        yield listener
    finally:
        lab.watch.remove(listener)


class Runner:
    """Makes rows with one lab, whose capacity, policy, pins and miss action it changes.

    Args:
        lab: The model.
        facts: Of the model.
        widest: Slots of each layer for the exact runs, which any number gives alike; the most
            that the sweep allows, since they read the least then.
        split: What the frame says of the prompts.
    """

    def __init__(
        self, lab: Lab, facts: ModelFacts, widest: Sequence[int], *, split: str = "given"
    ) -> None:
        self.lab = lab
        self.facts = facts
        self.split = split
        self._widest = list(widest)
        self._known: dict[str, Known] = {}
        self._settled: tuple[Any, ...] | None = None

    def prepare(self, windows: Iterable[Window]) -> Iterator[Window]:
        """Makes the exact run of each window that has none yet, and forgets those of others.

        Yields:
            Each window, when its run is there.
        """
        wanted = {window_key(window): window for window in windows}
        self._known = {key: known for key, known in self._known.items() if key in wanted}
        for key, window in wanted.items():
            if key not in self._known:
                self._exactly()
                self._known[key] = self._run_exactly(window)
            yield window

    def rows(self, point: Point, windows: Iterable[Window]) -> Iterator[dict[str, Any]]:
        """Makes a point's row for each window; see `rows.COLUMNS`.

        Args:
            point: The point.
            windows: Windows that were prepared.
        """
        for window in windows:
            known = self._known[window_key(window)]
            yield self._lossy(point, known) if point.lossy else self._replayed(point, known)

    # -- exact runs --------------------------------------------------------------------------

    def _run_exactly(self, window: Window) -> Known:
        with watching(self.lab) as seen:
            reference = Reference(self.lab, window)
        logits = reference.logits(0, window.judged)
        # The same arithmetic as where the other side is lossy, so that equal means equal.
        own = diverge(logits, logits, np.array(window.wanted))
        quality = measured(own.kl, own.logprob, own.logprob_reference, own.same_top1)
        return Known(window, reference, quality, seen.routing(window), cache_bytes(seen.cache))

    def _quantised(self, known: Known, bits: int) -> Quantised:
        if bits not in known.quantised:
            import pandas as pd

            self._exactly()
            with watching(self.lab) as seen:
                tokens = judge(self.lab, known.window, known.reference, Load(), kv_bits=bits)
            # The prefix ran with the model's own cache, which is quantised after it.
            before = known.routing[known.routing["run"] == PREFIX]
            after = seen.routing(known.window, prefix=False)
            whole = pd.concat([before, after], ignore_index=True)
            held = cache_bytes(seen.cache)
            known.quantised[bits] = Quantised(_measured(tokens), whole, held)
        return known.quantised[bits]

    # -- points ------------------------------------------------------------------------------

    def _replayed(self, point: Point, known: Known) -> dict[str, Any]:
        """A row of an exact point, from the recorded exact run with the same cache."""
        from ..routing.replay import replay

        window = known.window
        if point.kv_bits is None:
            quality, routing, held = known.quality, known.routing, known.cache_bytes
        else:
            own = self._quantised(known, point.kv_bits)
            quality, routing, held = own.quality, own.routing, own.cache_bytes
        layers = self.facts.layers
        played = replay(
            routing,
            point.policy.given,
            capacity={layer.layer: c for layer, c in zip(layers, point.slots, strict=True)},
            pins=point.pinned,
            initial=initial_contents(point, layers),
            experts={layer.layer: layer.experts for layer in layers},
        )
        judged_slots = played.routing["run"].eq(JUDGED) & played.routing["counts"].eq(1)
        hit = played.routing.loc[judged_slots, "hit"]
        loads = played.loads[played.loads["run"] == JUDGED]
        read = loads.groupby("layer").size().to_dict()
        return self._row(
            point, window, quality, read,
            routed=len(hit), hits=int(hit.sum()),
            slots=self.facts.slots_bytes(point.slots), low_bit=0, cache=held,
        )  # fmt: skip

    def _lossy(self, point: Point, known: Known) -> dict[str, Any]:
        """A row of a lossy point: the model runs."""
        self.settle(point)
        window = known.window
        with watching(self.lab) as seen:
            tokens, routing = judged(
                self.lab, window, known.reference, point.action,
                swap_budget=point.swap_budget, kv_bits=point.kv_bits, record=True,
            )  # fmt: skip
        assert routing is not None
        memory = self.lab.memory()
        return self._row(
            point, window, _measured(tokens), seen.experts_read(),
            routed=len(routing), hits=int(routing["hit"].sum()),
            slots=memory.slots + memory.resident_experts, low_bit=memory.low_bit,
            cache=cache_bytes(seen.cache),
        )  # fmt: skip

    def _row(
        self,
        point: Point,
        window: Window,
        quality: Mapping[str, float],
        read: Mapping[int, int],
        *,
        routed: int,
        hits: int,
        slots: int,
        low_bit: int,
        cache: int,
    ) -> dict[str, Any]:
        each = {layer.layer: layer.disk_bytes for layer in self.facts.layers}
        budget = -1 if point.swap_budget is None else point.swap_budget
        bits = float("nan") if point.kv_bits is None else float(point.kv_bits)
        trunk = self.facts.trunk
        row = {
            "capacity": point.capacity, "policy": point.policy.name, "on_miss": point.on_miss,
            "pins": point.pins, "kv_bits": bits, "seed": point.seed,
            "domain": window.domain, "prompt": window.document, "tokens": window.judged,
            "prefix": window.prefix, "initial": point.initial,
            "swap_budget": budget if point.lossy else 0,
            "bytes": slots + low_bit + trunk + cache, "bytes_slots": slots,
            "bytes_low_bit": low_bit, "bytes_trunk": trunk, "bytes_cache": cache,
            "routed": routed, "hits": hits, "hit_rate": hits / max(routed, 1),
            "loads": sum(read.values()),
            "bytes_read": sum(each[layer] * count for layer, count in read.items()),
            **quality,
            "source": "run" if point.lossy else "replay", "split": self.split,
            "fingerprint": self.facts.fingerprint, "point": point.key,
            "window": window_key(window),
        }  # fmt: skip
        return {name: row[name] for name in COLUMNS}

    # -- the lab's state ---------------------------------------------------------------------

    def settle(self, point: Point) -> None:
        """Gives the lab a point's capacity, policy, pins, first contents and miss action."""
        # Pins first: copies at few bits are not lost by what follows, unlike by another action.
        self._put(point.slots, (point.policy.given, point.pinned, point.orders), point.key)
        put = (self.lab.miss_action, self.lab.swap_budget)
        if put != (point.action, point.swap_budget):
            put_action(self.lab, point.action, point.swap_budget)

    def _exactly(self) -> None:
        """Makes the lab exact, with as many slots as the sweep allows."""
        lab = self.lab
        if lab.miss_action.lossy or lab.swap_budget is not None:
            put_action(lab, Load(), None)
        if lab.capacities != self._widest:
            self._put(self._widest, ("lru", {}, {}), None)

    def _put(self, slots: Sequence[int], held: tuple[Any, Any, Any], key: str | None) -> None:
        wanted = (tuple(slots), key)
        if self._settled == wanted and self.lab.capacities == list(slots):
            return
        self._settled = None
        govern(self.lab, *held, slots=slots)
        self._settled = wanted


def govern(
    lab: Lab,
    policy: Any,
    pins: Mapping[int, frozenset[int]],
    orders: Mapping[int, Sequence[int]],
    *,
    slots: Sequence[int],
) -> None:
    """Gives a lab other slots, policy, pins and first contents; its miss action stays."""
    attachment = lab.attachment
    if lab.capacities != list(slots):
        if any(lab.pins.values()):  # which the new number of slots may have no room for
            attachment.govern(LRU, {})
            lab.pins = {}
        lab.resize(list(slots))
    maker = make_policy(policy)
    attachment.govern(maker, pins, orders)
    lab.policy, lab.pins = maker().name, dict(pins)


@contextlib.contextmanager
def left_as_found(lab: Lab) -> Iterator[None]:
    """Gives a lab its slots, policy, pins, miss action and swap budget back; resets its bank."""
    slots, budget = list(lab.capacities), lab.budget
    policy, pins = lab.policy, dict(lab.pins)
    maker, held, orders = lab.attachment.governed
    action: MissAction = lab.miss_action
    swaps = lab.swap_budget
    try:
        yield
    finally:
        if not lab._closed:
            if not isinstance(action, LowBit) or lab.miss_action != action:
                put_action(lab, Load(), None)
            govern(lab, maker, held, orders, slots=slots)
            put_action(lab, action, swaps)
            lab.policy, lab.pins, lab.budget = policy, pins, budget


def measured(
    kl: np.ndarray, logprob: np.ndarray, reference: np.ndarray, same: np.ndarray
) -> dict[str, float]:
    """Returns the quality columns of one prompt, from values of its judged tokens."""
    nll, full = -float(np.mean(logprob)), -float(np.mean(reference))
    total = float(np.sum(kl))
    return {
        "kl_mean": total / len(kl), "kl_sum": total,
        "kl_p99": float(np.quantile(kl, 0.99)), "kl_max": float(np.max(kl)),
        "nll": nll, "nll_reference": full, "ln_ppl_ratio": nll - full,
        "ppl": float(np.exp(nll)), "ppl_reference": float(np.exp(full)),
        "same_top1": float(np.mean(same)),
    }  # fmt: skip


def _measured(tokens: pd.DataFrame) -> dict[str, float]:
    columns = ("kl", "logprob", "logprob_reference", "same_top1")
    kl, logprob, reference, same = (tokens[name].to_numpy() for name in columns)
    return measured(kl, logprob, reference, same)
