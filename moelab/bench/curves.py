"""`moelab bench curves`: how long miss-ratio curves of a long trace take, and in how much memory.

A made-up trace is written as a file (`moelab.routing.trace`): 100,000 decoded tokens, 48 layers,
top-10 of 512 experts. Its choices are skewed (each layer has favourites) and local (favourites
drift, and a token often keeps experts of the one before), so that the stacks are walked as they are
for a model. Then a process of its own reads the file and gives all curves with their bounds, and
counts its time and memory. What numba compiles is compiled before that, for a tiny trace, and
stated apart: with an empty cache, so that it is what the first use on a machine costs. Writing the
trace counts as nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import StudyError
from ..machine import Machine, this_machine

TOKENS, LAYERS, EXPERTS, TOP_K = 100_000, 48, 512, 10

CHILD = """
import json, resource, sys, time
def now():
    return time.process_time(), time.perf_counter()
def peak():
    try:  # of this program alone; what getrusage says includes who started it
        lines = open("/proc/self/status").read().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except OSError:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most * (1 if sys.platform == "darwin" else 1024)
begin = now()
from moelab.routing.curves import curves
import pandas, pyarrow.parquet, tqdm.auto
from moelab.routing import stacks, streams, trace
told = {"import": [b - a for a, b in zip(begin, now())]}
told["base"] = peak()
begin = now()
small = curves(sys.argv[2])
told["compile"] = [b - a for a, b in zip(begin, now())]
begin = now()
result = curves(sys.argv[1])
told["curves"] = [b - a for a, b in zip(begin, now())]
told["peak"] = peak()
begin = now()
lru = curves(sys.argv[1], bounds=False)
told["lru"] = [b - a for a, b in zip(begin, now())]
rows = result.overall
told["rows"] = len(result.frame)
told["misses"] = {
    str(policy): {
        str(c): float(r)
        for c, r in zip(mine["capacity"], mine["miss_ratio"])
        if c in (64, 128, 256)
    }
    for policy, mine in rows.groupby("policy", observed=True)
}
print(json.dumps(told))
"""


@dataclass(frozen=True, slots=True)
class CurvesResult:
    """What `bench_curves` measured. Times are (process, wall) seconds."""

    tokens: int
    layers: int
    experts: int
    top_k: int
    seed: int
    file_bytes: int
    curves: tuple[float, float]
    """All four curves, every capacity, every layer."""
    lru: tuple[float, float]
    """LRU alone."""
    compile: tuple[float, float]
    """A tiny trace before that, with nothing compiled yet."""
    imports: tuple[float, float]
    peak_bytes: int
    """Most memory that the process held, everything that it imported included."""
    base_bytes: int
    """That after the imports alone."""
    rows: int
    misses: dict[str, dict[str, float]]
    """Miss ratios by policy and capacity, all layers together."""
    machine: Machine

    def page(self) -> str:
        """Returns the result as Markdown."""
        m = self.machine
        lines = [
            f"# Miss-ratio curves: {self.tokens:,} tokens, {self.layers} layers, "
            f"top-{self.top_k} of {self.experts}",
            "",
            f"A made-up trace of {self.tokens * self.layers * self.top_k:,} routed slots (seed "
            f"{self.seed}), {self.file_bytes / 1e6:,.0f} MB as a file. One process with one thread "
            "reads it a layer at a time and gives LRU, the best fixed set, forced MIN and MIN at "
            f"every capacity: {self.rows:,} rows. {m.chip}, {m.cores} cores, {m.system}; other "
            f"programs used {m.busy:.0%} of the processor just before.",
            "",
            "| what | processor seconds | wall seconds |",
            "|---|---|---|",
        ]
        for name, (process, wall) in (
            ("all curves", self.curves),
            ("LRU alone", self.lru),
            ("compiling, the first time on a machine", self.compile),
            ("imports", self.imports),
        ):
            lines.append(f"| {name} | {process:.1f} | {wall:.1f} |")
        lines += [
            "",
            f"Most memory: {self.peak_bytes / 1e6:,.0f} MB, of which {self.base_bytes / 1e6:,.0f} "
            "MB were there after the imports.",
            "",
            "| policy | " + " | ".join(f"misses at {c}" for c in self._capacities()) + " |",
            "|---" * (len(self._capacities()) + 1) + "|",
        ]
        for policy, ratios in self.misses.items():
            shares = (f"{ratios[c]:.1%}" for c in self._capacities())
            lines.append(f"| {policy} | " + " | ".join(shares) + " |")
        return "\n".join(lines)

    def save(self, folder: Path) -> None:
        """Writes `bench-curves.md` and `bench-curves.json`, each whole or not at all."""
        from .pages import save

        save(self, "bench-curves", folder)

    def _capacities(self) -> list[str]:
        return list(next(iter(self.misses.values())))


def bench_curves(
    *,
    tokens: int = TOKENS,
    layers: int = LAYERS,
    experts: int = EXPERTS,
    top_k: int = TOP_K,
    seed: int = 0,
    progress: bool = True,
) -> CurvesResult:
    """Measures the time and memory of miss-ratio curves; see the module.

    Args:
        tokens: Decoded tokens.
        layers: MoE layers.
        experts: Experts a layer, at least 256.
        top_k: Experts a token.
        seed: Of the trace.
        progress: Show a bar while the trace is made.

    Raises:
        StudyError: If the sizes do not fit together, or the measuring process failed.
    """
    if experts < 256 or not 0 < top_k < 64 or tokens < 1 or layers < 1:
        raise StudyError(
            "The bench needs tokens and layers, at least 256 experts and top-k between 1 and 63, "
            f"got {tokens=}, {layers=}, {experts=}, {top_k=}."
        )
    machine = this_machine()
    with tempfile.TemporaryDirectory(prefix="moelab-curves-") as folder:
        path, small = Path(folder) / "trace.parquet", Path(folder) / "small.parquet"
        write_made_up(path, tokens, layers, experts, top_k, seed, progress)
        write_made_up(small, 20, 1, experts, top_k, seed, False)
        size = path.stat().st_size
        told = _measured(path, small)
    return CurvesResult(
        tokens=tokens,
        layers=layers,
        experts=experts,
        top_k=top_k,
        seed=seed,
        file_bytes=size,
        curves=tuple(told["curves"]),
        lru=tuple(told["lru"]),
        compile=tuple(told["compile"]),
        imports=tuple(told["import"]),
        peak_bytes=told["peak"],
        base_bytes=told["base"],
        rows=told["rows"],
        misses=told["misses"],
        machine=machine,
    )


def _measured(path: Path, small: Path) -> dict[str, Any]:
    # One thread each for whatever has a pool, so that processor seconds are those of one core.
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    one |= {"NUMBA_CACHE_DIR": str(path.parent / "compiled"), "TQDM_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), str(small)],
        capture_output=True,
        text=True,
        env={**os.environ, **one},
        check=False,
    )
    if done.returncode:
        raise StudyError(f"The measuring process failed: {done.stderr.strip()[-500:]}")
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def write_made_up(
    path: Path, tokens: int, layers: int, experts: int, top_k: int, seed: int, progress: bool
) -> None:
    """Writes a made-up trace, a layer at a time."""
    import pyarrow as pa

    from ..routing.trace_writing import write_tables

    rows = tokens * top_k
    count = np.repeat(np.arange(tokens, dtype=np.int32), top_k)
    nothing = pa.array(np.zeros(rows, np.int32))
    rank = pa.array(np.tile(np.arange(top_k, dtype=np.int16), tokens))

    def same(text: str) -> Any:
        return pa.DictionaryArray.from_arrays(nothing, pa.array([text]))

    def tables() -> Iterator[Any]:
        from tqdm.auto import tqdm

        for layer in tqdm(range(layers), desc="made-up trace", unit="layer", disable=not progress):
            chosen = choices(tokens, experts, top_k, seed * 1000 + layer)
            yield pa.table(
                {
                    "token": pa.array(count),
                    "run": nothing,
                    "sequence": nothing,
                    "step": pa.array(count),
                    "position": pa.array(count),
                    "phase": same("decode"),
                    "document": same("made up"),
                    "domain": same(""),
                    "layer": pa.array(np.full(rows, layer, np.int16)),
                    "rank": rank,
                    "expert": pa.array(chosen.ravel()),
                    "weight": pa.array(np.full(rows, 1 / top_k, np.float32)),
                }
            )

    about = {
        "model": "made up", "model_type": None, "fingerprint": f"made up {seed}",
        "layers": list(range(layers)), "experts": [experts] * layers, "top_k": [top_k] * layers,
        "provenance": "generated", "template": None, "domains": [""],
        "documents": [[0, "made up", ""]], "tokens": tokens, "slots": rows * layers,
        "vocabulary": None, "tokenizer": None, "licence": None, "recorded": None,
    }  # fmt: skip
    write_tables(path, about, tables())


def choices(tokens: int, experts: int, top_k: int, seed: int) -> np.ndarray:
    """Draws experts that are skewed, drift and repeat: int32 (tokens, top_k), distinct in a row."""
    from ..routing.compiled import compiled

    draw = compiled(_draw)
    chosen: np.ndarray = draw(tokens, experts, top_k, seed)
    return chosen


def _draw(tokens: int, experts: int, top_k: int, seed: int) -> np.ndarray:
    np.random.seed(seed)  # noqa: NPY002 numba's own generator
    names = np.random.permutation(experts)  # noqa: NPY002
    found = np.empty((tokens, top_k), np.int32)
    taken = np.full(experts, -1, np.int64)
    for token in range(tokens):
        if token % 256 == 0:  # another subject: some favourites change places
            for _ in range(experts // 8):
                a, b = np.random.randint(experts), np.random.randint(experts)  # noqa: NPY002
                names[a], names[b] = names[b], names[a]
        for rank in range(top_k):
            while True:
                if token and np.random.random() < 0.3:  # noqa: NPY002
                    one = found[token - 1, np.random.randint(top_k)]  # noqa: NPY002
                else:  # the density falls with the place
                    one = names[int(experts * np.random.random() ** 1.7)]  # noqa: NPY002
                if taken[one] != token:
                    break
            taken[one] = token
            found[token, rank] = one
    return found
