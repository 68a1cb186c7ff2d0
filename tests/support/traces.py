"""Routing frames with everything that a recording may hold, and what they mean, in plain Python."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

PHASES = ("padding", "prefill", "decode")


@dataclass
class Token:
    """One token at one layer."""

    run: int
    sequence: int
    position: int
    token_id: int
    ids: list[int]
    weights: list[float]
    hits: list[bool]
    document: Any = None


@dataclass
class Group:
    """One layer in one domain and phase."""

    domain: str
    phase: str
    layer: int
    tokens: list[Token] = field(default_factory=list)

    def stretches(self) -> list[list[Token]]:
        """Consecutive tokens of one sequence."""
        found: list[list[Token]] = []
        for token in self.tokens:
            last = found[-1][-1] if found else None
            same = last is not None and (token.run, token.sequence, token.position) == (
                last.run, last.sequence, last.position + 1
            )  # fmt: skip
            if same:
                found[-1].append(token)
            else:
                found.append([token])
        return found


def groups(frame: pd.DataFrame) -> dict[tuple[str, str, int], Group]:
    """Reads a frame row by row: padding left out, and of a position the last step alone."""
    cells: dict[tuple[int, int, int, int], dict[int, list[dict[str, Any]]]] = {}
    for row in frame.to_dict("records"):
        if row["phase"] == "padding":
            continue
        cell = (row["layer"], row["run"], row["sequence"], row["position"])
        cells.setdefault(cell, {}).setdefault(row["step"], []).append(row)
    found: dict[tuple[str, str, int], Group] = {}
    for (layer, run, sequence, position), steps in sorted(cells.items()):
        rows = sorted(steps[max(steps)], key=lambda r: r["rank"])
        domain, phase = str(rows[0].get("domain", "all")), str(rows[0]["phase"])
        group = found.setdefault((domain, phase, layer), Group(domain, phase, layer))
        document = rows[0].get("document", (run, sequence))
        group.tokens.append(
            Token(
                run, sequence, position, rows[0]["token_id"], [r["expert"] for r in rows],
                [r["weight"] for r in rows], [r["hit"] for r in rows], document,
            )
        )  # fmt: skip
    return found


def rows_of(group: Group) -> Iterator[tuple[int, int]]:
    """Pairs of token number and expert."""
    for number, token in enumerate(group.tokens):
        for expert in token.ids:
            yield number, expert


def random_trace(
    seed: int,
    *,
    experts: int = 6,
    top_k: int = 2,
    layers: tuple[int, ...] = (0, 3),
    runs: int = 3,
    tokens: int = 20,
    vocabulary: int = 5,
    domains: int = 0,
    varied: bool = True,
    sticky: float = 0.4,
) -> pd.DataFrame:
    """A frame of several runs: prefill, decode, drafts that were rejected, padding, a batch.

    Args:
        seed: Of everything.
        experts: Experts a layer.
        top_k: Experts a token.
        layers: Layers.
        runs: Runs; the last one has two sequences.
        tokens: About so many a sequence.
        vocabulary: Different token ids.
        domains: So many domains, a run each in turn; 0 for no such column.
        varied: Some tokens choose fewer experts.
        sticky: Chance that a token keeps an expert of the one before it.
    """
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []

    def token(run: int, sequence: int, step: int, position: int, phase: str) -> None:
        token_id = int(rng.integers(vocabulary))
        for layer in layers:
            before = [r["expert"] for r in rows[-200:] if r["layer"] == layer][-top_k:]
            ids = [e for e in dict.fromkeys(before) if rng.random() < sticky]
            others = [e for e in rng.permutation(experts).tolist() if e not in ids]
            count = int(rng.integers(1, top_k + 1)) if varied and rng.random() < 0.2 else top_k
            ids = [*ids, *others][:count]
            rng.shuffle(ids)
            weights = np.sort(rng.random(len(ids)).astype(np.float32))[::-1]
            for rank, (expert, weight) in enumerate(zip(ids, weights, strict=True)):
                rows.append(
                    {
                        "run": run, "sequence": sequence, "step": step, "position": position,
                        "token_id": token_id, "phase": phase, "layer": layer, "rank": rank,
                        "expert": expert, "weight": float(weight),
                        "hit": bool(rng.random() < 0.6),
                        **({"domain": f"d{run % domains}"} if domains else {}),
                    }
                )  # fmt: skip

    for run in range(runs):
        for sequence in range(2 if run == runs - 1 else 1):
            count = max(2, int(rng.integers(tokens // 2, tokens + 1)))
            prompt = int(rng.integers(1, count))
            step = position = 0
            if rng.random() < 0.5:
                token(run, sequence, 0, 10_000 + sequence, "padding")
            for _ in range(prompt):  # one chunk
                token(run, sequence, step, position, "prefill")
                position += 1
            # Speculative decoding: the prompt's last pass may carry the first drafts.
            step -= int(rng.random() < 0.5)
            while position < count:
                step += 1
                drafts = int(rng.integers(1, 4))
                for i in range(drafts):
                    token(run, sequence, step, position + i, "decode")
                position += int(rng.integers(1, drafts + 1))  # the others are rejected
    frame = pd.DataFrame(rows)
    dtypes = {"layer": "int16", "rank": "int16", "weight": "float32"}
    dtypes |= dict.fromkeys(("run", "sequence", "step", "position", "token_id", "expert"), "int32")
    frame = frame.astype(dtypes)
    frame["phase"] = pd.Categorical(frame["phase"], categories=PHASES)
    # In no order: metrics must find it themselves.
    return frame.sample(frac=1, random_state=seed, ignore_index=True)


def uniform_trace(
    experts: int, top_k: int, tokens: int, seed: int = 0, *, length: int | None = None
) -> pd.DataFrame:
    """One layer; every token chooses uniformly and by itself; runs of `length` tokens."""
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((tokens, experts), dtype=np.float32), axis=1)[:, :top_k]
    token = np.repeat(np.arange(tokens), top_k)
    size = length or tokens
    return pd.DataFrame(
        {
            "run": (token // size).astype(np.int32),
            "sequence": np.int32(0),
            "step": (token % size).astype(np.int32),
            "position": (token % size).astype(np.int32),
            "token_id": rng.integers(0, 50, tokens)[token].astype(np.int32),
            "phase": pd.Categorical(["decode"] * len(token), categories=PHASES),
            "layer": np.int16(0),
            "rank": np.tile(np.arange(top_k), tokens).astype(np.int16),
            "expert": ids.reshape(-1).astype(np.int32),
            "weight": np.float32(1 / top_k),
            "hit": rng.random(len(token)) < 0.5,
        }
    )
