"""Local routing consistency, SRP and SCH (arXiv 2505.16056): how far a window shares experts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import StudyError
from . import chance
from .choices import Choices, choices
from .frames import Array, Experts, tidy
from .locality import ROWS, checked_lengths

if TYPE_CHECKING:
    import pandas as pd


def segment_f1(
    routing: Any,
    m: Iterable[int] = (4, 16, 64, 256),
    *,
    phase: str | None = None,
    experts: Experts = None,
) -> pd.DataFrame:
    """SRP(m), segment routing best performance (arXiv 2505.16056, §2.2).

    How well choosing a fixed group of experts for all of m consecutive tokens can stand in for the
    router. An expert is predicted for a whole window if the window's tokens chose it at least α
    times; F1 counts (window, token, expert) triples, over every window of m tokens within one
    sequence of one run and phase and all experts of the layer; one α for all of them, the best.
    This is the paper's figure for a group of experts; F1 is best for such a rule, as it proves.

    Args:
        routing: A recording, its `routing`, or what `labelled` gives.
        m: Lengths of windows, in tokens. Lengths that no stretch of tokens has are left out.
        phase: Only this phase; None for all, each apart.
        experts: Experts of the layers; None for what the recording says, else the highest id + 1.

    Returns:
        A row a domain, phase, layer and m: `m`, `windows` (int64), `srp` (float64), `threshold`
        (int64, α), `size` (float64: experts predicted a window ÷ k), `chance` (uniform routing,
        for many windows).

    Raises:
        SchemaError: If the frame is not as moelab writes it.
        StudyError: If a length is no int from 1 on.
    """
    lengths = checked_lengths("m", m)
    rows = []
    for layer in choices(routing, phase=phase, experts=experts):
        for length in lengths:
            windows, found = _window_counts(layer, length)
            if not windows:
                continue
            times = np.arange(length + 1)
            true = np.cumsum((found * times)[::-1])[::-1]
            predicted = np.cumsum(found[::-1])[::-1] * length
            f1 = 2 * true / (predicted + true[0])
            best = int(f1[1:].argmax()) + 1  # an expert that nobody chose is never predicted
            rows.append(
                {
                    **layer.key,
                    "m": length,
                    "windows": windows,
                    "srp": float(f1[best]),
                    "threshold": best,
                    "size": float(predicted[best] / true[0]),
                    "chance": chance.best_f1(layer.experts, layer.top_k, length),
                }
            )
    columns = ("m", "windows", "srp", "threshold", "size", "chance")
    return tidy(rows, ("domain", "phase", "layer", *columns))


def segment_hits(
    routing: Any,
    m: int = 16,
    ratio: Sequence[float] | float = (1.0, 2.0, 4.0),
    *,
    seed: int = 0,
    phase: str | None = None,
    experts: Experts = None,
) -> pd.DataFrame:
    """SCH(m, ρ), segment cache best hit rate (arXiv 2505.16056, §2.3).

    The hit rate of a cache of ρk experts that knows how often each is used in the next m tokens. A
    token is one event: its hits are judged before anything changes; then all of its experts are in
    the cache, and of the others those stay that the next m tokens choose most often. Of those
    chosen equally often the one that was used more recently stays, and of those used at the same
    time the lower id. The cache begins empty with each sequence of a run and phase, so first uses
    miss. (The paper says no more than which leaves; the rest of the rule is ours.)

    Args:
        routing: As for `segment_f1`.
        m: Tokens that the cache looks ahead.
        ratio: ρ: slots ÷ k, from 1 on; ρk is rounded half up and at most E.
        seed: Of the uniform routing that `chance` is measured on.
        phase: As for `segment_f1`.
        experts: As for `segment_f1`.

    Returns:
        A row a domain, phase, layer and ρ: `m` (int64), `ratio` (float64), `slots`, `tokens`
        (int64), `sch` (float64), `chance` (float64: the same of uniform routing in as many and as
        long sequences; simulated, up to 20,000 tokens).

    Raises:
        SchemaError: As for `segment_f1`.
        StudyError: If m is no int from 1 on, or a ratio is below 1.
    """
    (ahead,) = checked_lengths("m", [m])
    ratios = [float(r) for r in ([ratio] if isinstance(ratio, int | float) else ratio)]
    if not ratios or not all(math.isfinite(r) and r >= 1 for r in ratios):
        raise StudyError(f"ratio= is slots ÷ top-k, from 1 on; got {ratio!r}.")
    layers = choices(routing, phase=phase, experts=experts)
    rates = [{} for _ in layers]  # type: list[dict[int, float]]
    slots = [[min(math.floor(r * c.ids.shape[1] + 0.5), c.experts) for r in ratios] for c in layers]
    # Layers alike are played side by side, which is what makes it quick.
    alike: dict[tuple[int, int], list[int]] = {}
    for i, layer in enumerate(layers):
        for size in set(slots[i]):
            alike.setdefault((layer.experts, size), []).append(i)
    for (number, size), members in alike.items():
        traces = [_Trace(layers[i].ids, layers[i].starts) for i in members]
        for i, hits in zip(members, _play(traces, number, size, ahead), strict=True):
            rates[i][size] = hits
    dealt: dict[tuple[Any, ...], float] = {}
    rows = []
    for layer, found, sizes in zip(layers, rates, slots, strict=True):
        for own, size in zip(ratios, sizes, strict=True):
            rows.append(
                {
                    **layer.key,
                    "m": ahead,
                    "ratio": own,
                    "slots": size,
                    "tokens": len(layer.ids),
                    "sch": found[size],
                    "chance": _uniform_hits(layer, size, ahead, seed, dealt),
                }
            )
    columns = ("m", "ratio", "slots", "tokens", "sch", "chance")
    return tidy(rows, ("domain", "phase", "layer", *columns))


def _window_counts(layer: Choices, length: int) -> tuple[int, Array]:
    """Returns the number of windows, and how many (window, expert) pairs have each count.

    The counts are int64 (length + 1,).
    """
    found = np.zeros(length + 1, np.int64)
    windows = 0
    starts = layer.starts
    for begin, end in itertools.pairwise(starts.tolist()):
        if end - begin < length:
            continue
        for first in range(begin, end - length + 1, ROWS):
            last = min(first + ROWS, end - length + 1)  # windows that begin at first … last - 1
            ids = layer.ids[first : last + length - 1]
            total = np.zeros((len(ids) + 1, layer.experts), np.int32)
            row, rank = np.nonzero(ids >= 0)
            total[row + 1, ids[row, rank]] = 1
            np.cumsum(total, axis=0, out=total)
            counts = total[length:] - total[:-length]
            found += np.bincount(counts.reshape(-1), minlength=length + 1)
            windows += len(counts)
    return windows, found


@dataclass(frozen=True, slots=True, eq=False)
class _Trace:
    """One layer's choices and where its sequences begin."""

    ids: Array
    starts: Array


def _play(traces: Sequence[_Trace], experts: int, size: int, ahead: int) -> list[float]:
    """Returns the hit rate of each trace, all sequences of all traces played side by side."""
    begins = np.concatenate([t.starts[:-1] for t in traces])
    lengths = np.concatenate([np.diff(t.starts) for t in traces])
    owner = np.repeat(np.arange(len(traces)), [len(t.starts) - 1 for t in traces])
    base = np.cumsum([0, *(len(t.ids) for t in traces)])
    width = max(t.ids.shape[1] for t in traces)
    # A column more, where what stands for no expert goes.
    ids = np.full((int(base[-1]), width), experts, np.int64)
    for trace, at in zip(traces, base[:-1], strict=True):
        ids[at : at + len(trace.ids), : trace.ids.shape[1]] = np.where(
            trace.ids < 0, experts, trace.ids
        )
    order = np.argsort(-lengths, kind="stable")  # so that those that still run lie at the front
    begins, lengths, owner = (begins + base[owner])[order], lengths[order], owner[order]
    count = len(lengths)
    future = np.zeros((count, experts + 1), np.int64)
    for t in range(min(ahead, int(lengths[0]))):
        live = int(np.searchsorted(-lengths, -t, side="left"))
        future[np.arange(live)[:, None], ids[begins[:live] + t]] += 1
    used = np.full((count, experts + 1), -1, np.int64)
    cached = np.zeros((count, experts + 1), np.bool_)
    hits = np.zeros(count, np.int64)
    lower = np.arange(experts, 0, -1) - 1
    longest = int(lengths[0])
    for t in range(longest):
        live = int(np.searchsorted(-lengths, -t, side="left"))
        own = np.arange(live)[:, None]
        now = ids[begins[:live] + t]
        hits[:live] += (cached[own, now] & (now < experts)).sum(1)
        future[own, now] -= 1
        if t + ahead < longest:
            more = int(np.searchsorted(-lengths, -(t + ahead), side="left"))
            future[np.arange(more)[:, None], ids[begins[:more] + t + ahead]] += 1
        used[own, now] = t
        cached[own, now] = True
        if size >= experts:
            continue
        worth = (future[:live, :experts] * (longest + 1) + used[:live, :experts]) * experts + lower
        worth[~cached[:live, :experts]] = -1
        worth[used[:live, :experts] == t] += np.int64(1) << 61
        leave = np.argpartition(worth, experts - size, axis=1)[:, : experts - size]
        cached[own, leave] = False
    routed = np.array([(t.ids >= 0).sum() for t in traces])
    return (np.bincount(owner, hits, len(traces)) / routed).tolist()


def _uniform_hits(
    layer: Choices, size: int, ahead: int, seed: int, dealt: dict[tuple[Any, ...], float]
) -> float:
    """Returns the hit rate of uniform routing in sequences as many and as long."""
    lengths = np.diff(layer.starts)
    keep = max(int((np.cumsum(lengths) <= 20_000).sum()), 1)
    lengths = np.minimum(lengths[:keep], 20_000)
    k = layer.ids.shape[1]
    key = (layer.experts, k, size, ahead, lengths.tobytes())
    if key not in dealt:
        rng = np.random.default_rng(seed)
        scores = rng.random((int(lengths.sum()), layer.experts), dtype=np.float32)
        ids = (
            np.argpartition(scores, k - 1, axis=1)[:, :k]
            if k < layer.experts
            else (np.argsort(scores, axis=1))
        )
        trace = _Trace(ids.astype(np.int32), np.cumsum([0, *lengths]))
        dealt[key] = _play([trace], layer.experts, size, ahead)[0]
    return dealt[key]
