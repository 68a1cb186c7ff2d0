"""`moelab.calibrate`: what a token, a chunk of a prompt and a load cost, here and for this model.

Prompts from the shipped calibration texts run in mlx-lm's own loop at a few capacities, and after
each prompt the text's next tokens are decoded, whatever the model would have said. A linear model
of the seconds is then fitted to what the bank did: a least absolute deviation fit of relative
errors, none of whose parts may be negative. Layers that hold all their experts are stock and wait
for nothing, so that they are measured by themselves.

Nothing in here is known beforehand: every figure is from this machine and this checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..display import facts_html, facts_text
from ..errors import StudyError
from ..lab import PREFILL_STEP, Lab
from .runner import govern, left_as_found

if TYPE_CHECKING:
    import mlx.core as mx

    from ..experts.residency import Load

FORMAT = 1

DECODE = ("base", "context", "missing", "load")
"""Seconds of a decoded token: itself, for each token before it, for each layer with a miss, and
for each load."""
PREFILL = ("base", "token", "distinct", "load", "swept")
"""Seconds of a chunk: itself, for each of its tokens, for each expert of a layer that it uses, for
each load, and for each layer that uses more experts than it has slots."""
WHOLE_DECODE = ("base", "context")
WHOLE_PREFILL = ("base", "token")
"""The same where all experts are resident."""

PARTS = {
    "decode": DECODE,
    "prefill": PREFILL,
    "whole_decode": WHOLE_DECODE,
    "whole_prefill": WHOLE_PREFILL,
}

LENGTHS = (16, 64, 256)
SHARES = (0.25, 0.5)
ROUNDS = 3
DECODED = 32
STRETCH = 8
"""Decoded tokens that are one observation: a single token's time is mostly noise."""
RESAMPLES = 30
COLD_LAYERS = 4
HELD = 0.95
"""From this share in memory on, files count as warm."""


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` measured. Seconds throughout.

    Attributes:
        model: The model's name.
        fingerprint: The checkpoint's; a forecast for another is refused.
        layers: MoE layers.
        decode: By `DECODE`; None where no capacity leaves a layer partial.
        prefill: By `PREFILL`; likewise.
        whole_decode: By `WHOLE_DECODE`, all experts resident; None where that was not measured.
        whole_prefill: By `WHOLE_PREFILL`.
        cold_load: What a load takes longer if the page cache does not hold it; None where pages
            cannot be dropped here.
        warm_share: How much of the experts' files the page cache held while the rest was measured,
            0 to 1; None where the system does not say.
        spread: Of each part its 5% and 95% quantile over resampled observations, by
            `"decode.base"` and so on.
        residuals: Median relative deviation of the observations from the fit, by phase.
        longest: Tokens of the longest chunk that was measured.
        observations: How many, by phase.
        took: How long it took.
        machine: As `moelab.machine.Machine` has it, versions with it.
    """

    model: str
    fingerprint: str
    layers: int
    decode: dict[str, float] | None
    prefill: dict[str, float] | None
    whole_decode: dict[str, float] | None
    whole_prefill: dict[str, float] | None
    cold_load: float | None
    warm_share: float | None
    longest: int
    spread: dict[str, list[float]] = field(default_factory=dict)
    residuals: dict[str, float] = field(default_factory=dict)
    observations: dict[str, int] = field(default_factory=dict)
    took: float = 0.0
    machine: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Writes JSON."""
        target = Path(path).expanduser()
        target.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=1)
        target.write_text(text + "\n", encoding="utf-8")
        return target

    @classmethod
    def read(cls, path: str | Path) -> Calibration:
        """Reads what `save` wrote.

        Raises:
            StudyError: If it is no calibration, or one of another format.
        """
        source = Path(path).expanduser()
        try:
            told = json.loads(source.read_text(encoding="utf-8"))
            version = told.pop("format")
            if version != FORMAT:
                raise StudyError(
                    f"{source} has format {version!r}, and this moelab reads {FORMAT}. Calibrate "
                    "again."
                )
            found = cls(**told)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, StudyError):
                raise
            raise StudyError(f"{source} holds no calibration ({error!r}).") from error
        found._check(source)
        return found

    def _check(self, source: Path) -> None:
        for phase, names in PARTS.items():
            parts = getattr(self, phase)
            if parts is None:
                continue
            if not isinstance(parts, dict) or set(parts) != set(names):
                raise StudyError(f"{source} holds no calibration: {phase} must have {names}.")
            for name, value in parts.items():
                if not isinstance(value, int | float) or not 0 <= value < math.inf:
                    raise StudyError(
                        f"{source}: {phase}.{name} is {value!r}, and must be seconds from 0 on. "
                        "Calibrate again."
                    )

    def require(self, fingerprint: str, page_cache: str = "warm") -> None:
        """Refuses to be used for another model or an unknown state of the page cache.

        Raises:
            StudyError: If so.
        """
        if self.fingerprint != fingerprint:
            raise StudyError(
                f"This calibration is of {self.model} ({self.fingerprint}), and the model is "
                f"{fingerprint}. What a token costs is another: calibrate the model itself."
            )
        if page_cache not in ("warm", "cold"):
            raise StudyError(f"page_cache is 'warm' or 'cold', got {page_cache!r}.")
        if page_cache == "cold" and self.cold_load is None:
            raise StudyError(
                "This calibration has no cold loads: the system did not let go of the files' "
                "pages, so that a first read from the disk could not be measured. Forecast with "
                "page_cache='warm'."
            )

    def decode_seconds(
        self, context: Any, missing: Any, loads: Any, *, partial: float = 1.0
    ) -> tuple[Any, Any]:
        """Seconds of a decoded token: compute, and loads.

        Args:
            context: Tokens before it.
            missing: Layers with a miss.
            loads: Loads in all layers.
            partial: Share of the MoE layers that do not hold all their experts.

        Raises:
            StudyError: If a kind of layer was not measured.
        """
        whole, parts = self._kinds("decode", partial)
        compute = (1 - partial) * (whole["base"] + whole["context"] * context)
        compute = compute + partial * (parts["base"] + parts["context"] * context)
        return compute, parts["missing"] * missing + parts["load"] * loads

    def prefill_seconds(
        self, tokens: Any, distinct: Any, loads: Any, swept: Any, *, partial: float = 1.0
    ) -> tuple[Any, Any]:
        """Seconds of a prompt's chunk: compute, and loads.

        Args:
            tokens: Tokens of the chunk.
            distinct: Different experts that it uses, summed over the partial layers.
            loads: Loads in all layers.
            swept: Layers that use more experts than they have slots.
            partial: As in `decode_seconds`.

        Raises:
            StudyError: If a kind of layer was not measured.
        """
        whole, parts = self._kinds("prefill", partial)
        compute = (1 - partial) * (whole["base"] + whole["token"] * tokens)
        compute = compute + partial * (parts["base"] + parts["token"] * tokens)
        compute = compute + parts["distinct"] * distinct + parts["swept"] * swept
        return compute, parts["load"] * loads

    def _kinds(self, phase: str, partial: float) -> tuple[Mapping[str, float], Mapping[str, float]]:
        """Returns the parts of stock and of partial layers; zeros for a kind that there is not."""
        names = DECODE if phase == "decode" else PREFILL
        nothing = dict.fromkeys((*names, "context", "token"), 0.0)
        whole, parts = getattr(self, f"whole_{phase}"), getattr(self, phase)
        if partial < 1 and whole is None:
            raise StudyError(
                "Layers with all their experts resident were not measured, since they did not "
                "fit in memory or in the time. Forecast a capacity under all experts, or "
                "calibrate with a longer limit_seconds=."
            )
        if partial > 0 and parts is None:
            raise StudyError("Layers with a part of their experts were not measured.")
        return (whole if partial < 1 else nothing), (parts if partial > 0 else nothing)

    def _facts(self) -> dict[str, str]:
        def told(phase: str, name: str, unit: str) -> str:
            parts = getattr(self, phase)
            if parts is None:
                return "not measured"
            low, high = self.spread.get(f"{phase}.{name}", [parts[name]] * 2)
            return f"{parts[name] * 1e3:.3f} ms {unit} [{low * 1e3:.3f}, {high * 1e3:.3f}]"

        cold = "cannot be measured here" if self.cold_load is None else (
            f"{self.cold_load * 1e3:.3f} ms more a load")  # fmt: skip
        held = "not known" if self.warm_share is None else f"{self.warm_share:.0%} of the files"
        off = ", ".join(f"{k} {v:.1%}" for k, v in self.residuals.items())
        m = self.machine
        return {
            "model": f"{self.model} ({self.fingerprint})",
            "machine": f"{m.get('chip', '?')}, {m.get('cores', '?')} cores, "
            f"{m.get('busy', float('nan')):.0%} busy before",
            "decode": told("decode", "base", "a token"),
            "decode, a load": f"{told('decode', 'load', '')}; layer with a miss "
            f"{told('decode', 'missing', '')}",
            "prompt": told("prefill", "token", "a token"),
            "prompt, a load": told("prefill", "load", ""),
            "all resident": f"{told('whole_decode', 'base', 'a decoded token')}",
            "page cache": f"warm: {held}; cold: {cold}",
            "deviation": off or "none",
            "took": f"{self.took:.1f} s",
        }

    def __repr__(self) -> str:
        return facts_text("Calibration", self._facts())

    def _repr_html_(self) -> str:
        return facts_html("Calibration", self._facts())


def calibrate(
    model: Lab | str | Path,
    *,
    lengths: Sequence[int] = LENGTHS,
    progress: bool = True,
    limit_seconds: float = 60,
) -> Calibration:
    """Measures what tokens, chunks and loads cost on this machine with this model.

    Args:
        model: A lab, which is left as it was found, or what `moelab.load` takes.
        lengths: Tokens of the prompts.
        progress: Show a bar.
        limit_seconds: No further point is begun that is expected to end later than this; the least
            that a fit needs is measured in any case. Loading a model is not counted.

    Returns:
        The calibration. Save it to use it again on the same machine.

    Raises:
        StudyError: If lengths or limit are out of range, or the lab is being recorded.
    """
    for length in lengths:
        if isinstance(length, bool) or not isinstance(length, int) or length < 2:
            raise StudyError(f"lengths are ints from 2 on, got {length!r}.")
    if len(set(lengths)) < 2:
        raise StudyError(f"lengths must be two or more, to tell tokens apart; got {lengths!r}.")
    if not limit_seconds > 0:
        raise StudyError(f"limit_seconds must be above 0, got {limit_seconds!r}.")
    with opened(model, SHARES[0]) as lab, left_as_found(lab):
        from ..machine import this_machine

        machine = asdict(this_machine())
        begin = time.perf_counter()
        lab.set_on_miss("load", swap_budget=None)
        seen = _Seen()
        sizes = [site.experts for site in lab.sites]
        for slots in dict.fromkeys(
            tuple(max(s.top_k, math.ceil(share * s.experts)) for s in lab.sites)
            for share in SHARES
        ):  # fmt: skip
            seen.capacities.append(list(slots))
        seen.capacities = [c for c in seen.capacities if all(np.less(c, sizes))]
        share = cold = None
        if seen.capacities:
            govern(lab, "lru", {}, {}, slots=seen.capacities[0])
            share = _warm(lab, limit_seconds / 6)
        whole = sum(
            sum(array.nbytes for _, _, array in site.tensors()) for site in lab.sites
        ) - lab.memory().slots  # fmt: skip
        if not seen.capacities or 1.5 * whole < machine["available_bytes"]:
            seen.capacities.append(sizes)
        _measure(lab, seen, sorted(set(lengths)), begin + limit_seconds, progress)
        if seen.capacities[0] != sizes:
            govern(lab, "lru", {}, {}, slots=seen.capacities[0])
            cold = _cold(lab)
        parts: dict[str, dict[str, float] | None] = {}
        spread: dict[str, list[float]] = {}
        residuals: dict[str, float] = {}
        for phase, names in PARTS.items():
            rows = np.array(seen.rows[phase], float)
            if not len(rows):
                parts[phase] = None
                continue
            runs = np.array(seen.runs[phase])
            fitted, ranges, residuals[phase] = fitted_parts(rows[:, 1:], rows[:, 0], runs)
            parts[phase] = dict(zip(names, fitted.tolist(), strict=True))
            for name, pair in zip(names, ranges.tolist(), strict=True):
                spread[f"{phase}.{name}"] = pair
        return Calibration(
            model=lab.name, fingerprint=lab.fingerprint, layers=len(lab.sites),
            **parts, cold_load=cold, warm_share=share, longest=seen.longest, spread=spread,
            residuals=residuals, observations={k: len(v) for k, v in seen.rows.items()},
            took=time.perf_counter() - begin, machine=machine,
        )  # fmt: skip


def fitted_parts(
    x: np.ndarray, y: np.ndarray, run: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, float]:
    """Fits parts, none negative, by least absolute relative deviations.

    Deviations are taken relative to the fit, not to what was observed, which would favour the
    quick observations. Then all parts are multiplied by the median over runs of a run's seconds
    over its fitted ones: interruptions are in every long run, and a sum of medians has none.

    Args:
        x: What there was of each part, float64 (observations, parts).
        y: Seconds, float64 (observations,), above 0.
        run: Which run each observation is of, int64 (observations,); None for one each.

    Returns:
        The parts, float64 (parts,); their 5% and 95% quantiles over resampled observations,
        (parts, 2); the median of |fit − y| / y.
    """
    groups = np.arange(len(y)) if run is None else np.unique(run, return_inverse=True)[1]
    found = _fitted(x, y, groups)
    random = np.random.default_rng(0)
    draws = random.integers(0, len(y), (RESAMPLES, len(y)))
    again = np.stack([_fitted(x[d], y[d], groups[d]) for d in draws])
    ranges = np.quantile(again, [0.05, 0.95], axis=0).T
    return found, ranges, float(np.median(np.abs(x @ found - y) / y))


def _fitted(x: np.ndarray, y: np.ndarray, groups: np.ndarray) -> np.ndarray:
    found = _least_deviations(x, y, y)
    for _ in range(2):
        found = _least_deviations(x, y, np.maximum(x @ found, y / 100))
    there = np.unique(groups)
    took = np.bincount(groups, y)[there]
    told = np.bincount(groups, x @ found)[there]
    return found * float(np.median(took / np.maximum(told, took / 100)))


def _least_deviations(x: np.ndarray, y: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """Minimises Σ |x·parts − y| / unit, no part negative."""
    from scipy.optimize import linprog

    scale = np.maximum(np.abs(x).max(axis=0), 1e-12)
    a = x / scale / unit[:, None]
    n, k = a.shape
    # min Σ (u + v) with a·b + u − v = y / unit and b, u, v ≥ 0.
    eye = np.eye(n)
    cost = np.concatenate([np.zeros(k), np.ones(2 * n)])
    done = linprog(cost, A_eq=np.hstack([a, eye, -eye]), b_eq=y / unit, method="highs")
    if done.x is None:
        raise StudyError(f"The seconds could not be fitted: {done.message}")
    parts: np.ndarray = np.maximum(done.x[:k], 0) / scale
    return parts


@contextlib.contextmanager
def opened(model: Lab | str | Path, capacity: Any) -> Iterator[Lab]:
    """Gives the lab, or loads the model.

    Raises:
        StudyError: If the lab is being recorded.
    """
    if isinstance(model, Lab):
        model._check_open()
        if model.sessions:
            raise StudyError(
                "The lab is being recorded, and measuring changes its capacity. Leave the "
                "`with lab.record()` block first."
            )
        yield model
        return
    from ..loading import load

    with load(model, capacity) as lab:
        yield lab


# -- live runs -------------------------------------------------------------------------------


class Live:
    """A prompt and forced tokens after it in mlx-lm's own loop, timed; nothing else listens.

    Args:
        lab: The model; its bank stays as it is.
        tokens: The text, at least `prompt + decoded + 2` tokens.
        prompt: Tokens of the prompt.
        decoded: Tokens after the first.

    Attributes:
        chunks: Of each chunk of the prompt: seconds, tokens, and loads by layer.
        first: Seconds to the first token.
        first_loads: Loads until then, in all layers.
        steps: Of each later token: seconds, layers with a load, loads.
    """

    def __init__(self, lab: Lab, tokens: Sequence[int], prompt: int, decoded: int) -> None:
        import mlx.core as mx
        from mlx_lm.generate import generate_step

        self.chunks: list[tuple[float, int, Counter[int]]] = []
        self.steps: list[tuple[float, int, int]] = []
        self._loads: Counter[int] = Counter()
        self._done, self._at = 0, 0.0
        self.first_loads = 0
        forced = iter(tokens[prompt:])

        def sampler(logprobs: mx.array) -> mx.array:
            return mx.array([next(forced)], mx.uint32)

        watchers = lab.attachment.bank.watchers
        watchers.append(self)
        try:
            begin = time.perf_counter()
            steps = generate_step(
                mx.array(list(tokens[:prompt])), lab.model, max_tokens=decoded + 1,
                sampler=sampler, prefill_step_size=PREFILL_STEP,
                prompt_progress_callback=self._progress,
            )  # fmt: skip
            next(steps)
            last = time.perf_counter()
            self.first = last - begin
            self.first_loads += self._loads.total()
            self._loads.clear()
            for _ in range(decoded):
                next(steps)
                now = time.perf_counter()
                self.steps.append((now - last, len(self._loads), self._loads.total()))
                self._loads.clear()
                last = now
            steps.close()
        finally:
            watchers.remove(self)

    @property
    def decode_seconds(self) -> float:
        """Seconds of all tokens after the first."""
        return sum(seconds for seconds, _, _ in self.steps)

    def loaded(self, layer: int, loads: Sequence[Load], seconds: Sequence[float]) -> None:
        """See `experts.bank.Watcher`."""
        self._loads[layer] += len(loads)

    def _progress(self, done: int, total: int) -> None:
        now = time.perf_counter()
        if done > self._done and done < total:
            self.chunks.append((now - self._at, done - self._done, Counter(self._loads)))
        self.first_loads += self._loads.total()
        self._loads.clear()
        self._done, self._at = done, time.perf_counter()


@dataclass
class _Seen:
    """Observations: seconds, then what there was of each part."""

    capacities: list[list[int]] = field(default_factory=list)
    rows: dict[str, list[list[float]]] = field(default_factory=lambda: {p: [] for p in PARTS})
    runs: dict[str, list[int]] = field(default_factory=lambda: {p: [] for p in PARTS})
    """Which run each observation is of."""
    longest: int = 0

    def note(self, phase: str, run: int, row: list[float]) -> None:
        """Adds an observation."""
        self.rows[phase].append(row)
        self.runs[phase].append(run)


def _measure(
    lab: Lab, seen: _Seen, lengths: list[int], end: float, progress: bool
) -> None:  # fmt: skip
    from tqdm.auto import tqdm

    texts = _streams(lab, max(lengths) + DECODED + 2)
    costs: dict[int, float] = {}
    number = 0
    bar = tqdm(
        total=ROUNDS * len(seen.capacities) * len(lengths),
        desc="calibrate", unit="run", disable=not progress, leave=False,
    )  # fmt: skip
    sizes = [site.experts for site in lab.sites]
    with bar:
        for turn in range(ROUNDS):
            for slots in seen.capacities:
                if turn and time.perf_counter() > end:
                    return
                govern(lab, "lru", {}, {}, slots=slots)
                whole = slots == sizes
                # The first pass after a change of slots is slow, and does not count.
                Live(lab, texts[0], lengths[0], 1)
                for place, length in enumerate(lengths):
                    bar.update()
                    # Before it is known, a prompt's time is taken to grow as its tokens do.
                    known = costs.get(length) or max(
                        (c * length / n for n, c in costs.items()), default=0.0
                    )
                    late = time.perf_counter() + known > end
                    if late and (turn or place > 1):
                        continue
                    text = texts[number % len(texts)]
                    number += 1
                    begin = time.perf_counter()
                    lab.reset()
                    first = Live(lab, text, length, DECODED)
                    # The same routing with a bank that is full of it: fewer loads.
                    second = None if whole else Live(lab, text, length, 1)
                    costs[length] = time.perf_counter() - begin
                    _note(seen, lab, length, first, second, whole)


def _note(
    seen: _Seen, lab: Lab, length: int, first: Live, second: Live | None, whole: bool
) -> None:
    """Adds observations of one prompt, from an empty bank and perhaps once more."""
    prefix = "whole_" if whole else ""
    number = len(set(seen.runs[f"{prefix}decode"]))
    slots = {site.layer: c for site, c in zip(lab.sites, lab.capacities, strict=True)}
    for at in range(0, len(first.steps) - STRETCH + 1, STRETCH):
        part = first.steps[at : at + STRETCH]
        seconds = sum(s for s, _, _ in part)
        context = sum(length + 1 + at + i for i in range(STRETCH))
        row = [seconds, STRETCH, context]
        if not whole:
            row += [sum(m for _, m, _ in part), sum(n for _, _, n in part)]
        seen.note(f"{prefix}decode", number, row)
    for run in (first, second):
        # Of one chunk that began with an empty bank, every expert was loaded, once.
        if run is None or len(run.chunks) != 1:
            continue
        seconds, tokens, loads = run.chunks[0]
        seen.longest = max(seen.longest, tokens)
        row = [seconds, 1, tokens]
        if not whole:
            needed = first.chunks[0][2]
            swept = sum(n > slots[layer] for layer, n in needed.items())
            row += [needed.total(), loads.total(), swept]
        seen.note(f"{prefix}prefill", len(seen.rows[f"{prefix}prefill"]), row)


def _streams(lab: Lab, length: int) -> list[list[int]]:
    """Returns token streams of the shipped calibration texts, a few a domain."""
    from ..labmodel import DOMAINS, texts

    random = np.random.default_rng(0)
    found: list[list[int]] = []
    for domain in DOMAINS * 2:
        pool = texts(domain=domain, split="calibration")
        tokens: list[int] = []
        for i in random.permutation(len(pool)).tolist():
            tokens += lab.tokenizer.encode(pool[i]["text"])
            if len(tokens) >= length:
                break
        while len(tokens) < length:
            tokens = tokens + tokens
        found.append(tokens[:length])
    return found


# -- the page cache --------------------------------------------------------------------------


def _pieces(lab: Lab, layer: Any, experts: Sequence[int]) -> list[Any]:
    from ..check.pagecache import Piece

    return [
        Piece(path, offset, tensor.disk_bytes)
        for tensor in layer.loader.tensors
        for path, offset in map(tensor.place, experts)
    ]


def _warm(lab: Lab, limit: float) -> float | None:
    """Reads the experts' files unless they are in memory, for so long; says how much is."""
    from ..check.pagecache import cached_share

    def held() -> float | None:
        layers = lab.attachment.bank.layers
        return cached_share(p for la in layers for p in _pieces(lab, la, range(la.experts)))

    share = held()
    if share is not None and share >= HELD:
        return share
    end = time.perf_counter() + limit
    for path in lab.shards:
        with path.open("rb") as file:
            while time.perf_counter() < end and file.read(1 << 24):
                pass
    return held()


def _cold(lab: Lab) -> float | None:
    """How much longer a load takes from the disk than from memory; None if that is not to be had.

    The median over events of top-k experts, first with their pages dropped, then once more.
    """
    from ..check.pagecache import cached_share, drop
    from ..experts.residency import Load

    random = np.random.default_rng(0)
    more = []
    try:
        lab.attachment.bank.finish()
        for layer in lab.attachment.bank.layers[:: max(1, len(lab.sites) // COLD_LAYERS)]:
            top_k = layer.site.top_k
            for _ in range(2):
                chosen = random.permutation(layer.experts)[:top_k].tolist()
                loads = [Load(expert, slot, None) for slot, expert in enumerate(chosen)]
                pieces = _pieces(lab, layer, chosen)
                drop(pieces)
                share = cached_share(pieces)
                if share is None or share > 0.1:
                    return None
                times = []
                for _ in range(2):
                    begin = time.perf_counter()
                    layer.loader.read(loads)
                    times.append(time.perf_counter() - begin)
                more.append((times[0] - times[1]) / top_k)
    finally:
        lab.reset()
    return max(0.0, float(np.median(more))) if more else None
