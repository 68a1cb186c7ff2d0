"""Which experts each domain uses, and whether domains differ by more than chance."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from typing import Any

import numpy as np

from moelab import labmodel

#: Random halvings of the texts over which divergences are averaged.
HALVINGS = 20

Counts = dict[str, np.ndarray]
"""Domain to how often each expert was chosen: (text, layer, expert)."""


@contextmanager
def watched(model: Any) -> Iterator[list[Any]]:
    """Note the experts of each layer while the model runs.

    Args:
        model: An mlx-lm model of the `qwen3_next` family.

    Yields:
        A list with the ids of every mixture layer, in the order in which they ran.
    """
    from mlx import nn

    seen: list[Any] = []

    class Watch(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def __call__(self, x: Any, ids: Any) -> Any:
            seen.append(ids)
            return self.inner(x, ids)

    blocks = [layer.mlp for layer in model.layers]
    for block in blocks:
        block.switch_mlp = Watch(block.switch_mlp)
    try:
        yield seen
    finally:
        for block in blocks:
            block.switch_mlp = block.switch_mlp.inner


def read_texts(
    model: Any, tokenizer: Any, seen: list[Any], most: int
) -> tuple[dict[str, float], Counts]:
    """Run the test texts once, for bits per byte and for the experts that they use.

    Args:
        model: A model inside `watched`.
        tokenizer: Its tokenizer.
        seen: What `watched` yielded.
        most: Texts a domain, at most.
    """
    from tqdm.auto import tqdm

    from moelab.labmodel.training.evaluate import losses

    experts = model.args.num_experts
    bits: dict[str, float] = {}
    counts: Counts = {}
    for domain in labmodel.DOMAINS:
        texts = labmodel.texts(domain, "test")[:most]
        nats, used = 0.0, np.zeros((len(texts), len(model.layers), experts), dtype=np.int64)
        for row, text in enumerate(tqdm(texts, desc=domain, mininterval=10)):
            seen.clear()
            nats += float(losses(model, tokenizer.encode(text["text"])).sum())
            for layer, ids in enumerate(seen):
                used[row, layer] = np.bincount(np.array(ids).ravel(), minlength=experts)
        bits[domain] = nats / math.log(2) / sum(len(t["text"].encode()) for t in texts)
        counts[domain] = used
    return bits, counts


def divergence(counts: Counts, seed: int = 0) -> dict[str, Any]:
    """Compare how domains differ with how the halves of one domain do.

    The texts of every domain are halved at random. At each layer, the expert use of
    a half is the share of all choices that each expert got. `between` is the mean
    Jensen-Shannon divergence (bits) of a half of one domain and a half of another,
    over all pairs; `within` that of the two halves of one domain, over all domains;
    both are averaged over `HALVINGS` halvings. The samples that are compared have
    the same number of texts in both, so noise counts against the ratio.

    Args:
        counts: What `read_texts` returned.
        seed: Of the halvings.

    Returns:
        `between`, `within` and `ratio` by layer, and `least_ratio`, the smallest.
    """
    rng = np.random.default_rng(seed)
    layers = next(iter(counts.values())).shape[1]
    between, within = np.zeros(layers), np.zeros(layers)
    for _ in range(HALVINGS):
        halves = {domain: _halve(used, rng) for domain, used in counts.items()}
        pairs = list(combinations(halves, 2))
        between += sum(jensen_shannon(halves[a][0], halves[b][1]) for a, b in pairs) / len(pairs)
        within += sum(jensen_shannon(*h) for h in halves.values()) / len(halves)
    ratio = between / within
    return {
        "between": (between / HALVINGS).round(5).tolist(),
        "within": (within / HALVINGS).round(5).tolist(),
        "ratio": ratio.round(2).tolist(),
        "least_ratio": round(float(ratio.min()), 2),
    }


def jensen_shannon(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence in bits, along the last axis."""

    def entropy(x: np.ndarray) -> np.ndarray:
        total: np.ndarray = -np.where(x > 0, x * np.log2(np.where(x > 0, x, 1)), 0).sum(-1)
        return total

    return entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2


def shares(used: np.ndarray) -> np.ndarray:
    """Counts of several texts to each expert's share: (layer, expert)."""
    total: np.ndarray = used.sum(0)
    return total / total.sum(-1, keepdims=True)


def _halve(used: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    order = rng.permutation(len(used))
    middle = len(used) // 2
    return shares(used[order[:middle]]), shares(used[order[middle : 2 * middle]])
