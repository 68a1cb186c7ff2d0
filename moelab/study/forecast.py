"""`moelab.forecast`: seconds before anything has run at that capacity.

What a bank would load follows from a recorded routing, which is played to it (`moelab.replay`);
what loads, tokens and chunks cost follows from a calibration of this machine and this model. The
steps are those of mlx-lm's loop: all of the prompt but its last token in chunks, then token by
token. That loop makes the next pass before it gives a token, so that the first token waits for two
passes where a layer is partial, since such a pass waits for its own ids.

The routing is of texts; another text of the same kind has another one, and so its own seconds.
Nothing known of another model is used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..display import facts_html, facts_text, size
from ..errors import SchemaError, StudyError
from ..experts.capacity import fixed_capacities
from ..experts.pins import resolve_pins
from ..lab import PREFILL_STEP, Lab
from ..prompt_texts import Prompts, texts_of
from .bytes import ModelFacts, facts_of
from .calibration import LENGTHS, Calibration, calibrate, opened
from .runner import govern, left_as_found

if TYPE_CHECKING:
    import pandas as pd

DECODED = 64
"""Decoded tokens that a forecast is of, unless told."""

TEXTS = 6
"""Texts that are recorded where no recording is given: one of each shipped domain."""

LONGEST_CALIBRATED = 1024
"""A prompt is calibrated at its own length up to here; longer ones are extrapolated."""

NEEDED = ("run", "position", "layer", "rank", "expert")


@dataclass(frozen=True)
class Forecast:
    """What `forecast` foretells: means over the runs of the recording.

    Attributes:
        first_token_seconds: Until the first token is given, bank at its first contents.
        tokens_per_second: Of the tokens after it.
        bytes_per_token: Read from the files for each of them.
        prompt_bytes: Read until the first token.
        hit_rate: Share of routed slots while decoding whose expert was resident.
        bytes: Memory of the weights: trunk and slots. Key-value cache and buffers come on top.
        loads_per_token: Experts read for each decoded token, in all layers.
        prompt_loads: Experts read until the first token, in all layers.
        by_run: A row a run of the recording: `run`, `first_token_seconds`, `tokens_per_second`,
            `prompt_loads`, `loads`, `tokens`.
        frame: A row a phase ("first token", "decode") and part ("compute", "loads"): `phase`,
            `part`, `seconds` (of the first token; of one decoded token), `loads`, `bytes`.
        settings: What was assumed.
        calibration: What the seconds are from.
    """

    first_token_seconds: float
    tokens_per_second: float
    bytes_per_token: float
    prompt_bytes: float
    hit_rate: float
    bytes: int
    loads_per_token: float
    prompt_loads: float
    by_run: pd.DataFrame = field(repr=False)
    frame: pd.DataFrame = field(repr=False)
    settings: dict[str, Any] = field(repr=False)
    calibration: Calibration = field(repr=False)

    def _facts(self) -> dict[str, str]:
        told = self.settings
        seconds = self.frame.set_index(["phase", "part"])["seconds"]
        ends = [self.by_run[n].agg(["min", "max"]) for n in ("first_token_seconds",
                                                             "tokens_per_second")]  # fmt: skip
        pinned = f", {told['pinned']} pinned" if told["pinned"] else ""
        return {
            "model": told["model"],
            "bank": f"{told['slots']} of {told['experts']} experts a layer, {told['policy']}"
            f"{pinned}, page cache {told['page_cache']}",
            "memory": f"{size(self.bytes)} of weights",
            "first token": f"{self.first_token_seconds:.3f} s for {told['prompt']} tokens "
            f"(texts: {ends[0]['min']:.3f} to {ends[0]['max']:.3f}), of it "
            f"{seconds['first token', 'loads']:.3f} s for {self.prompt_loads:.0f} loads, "
            f"{size(round(self.prompt_bytes))}",
            "decoding": f"{self.tokens_per_second:.1f} tokens/s "
            f"(texts: {ends[1]['min']:.1f} to {ends[1]['max']:.1f}); "
            f"{seconds['decode', 'compute'] * 1e3:.2f} ms compute and "
            f"{seconds['decode', 'loads'] * 1e3:.2f} ms loads a token",
            "read a token": f"{size(round(self.bytes_per_token))} in {self.loads_per_token:.1f} "
            f"loads, {self.hit_rate:.1%} hits",
            "routing": f"{told['routing']}, {len(self.by_run)} texts",
            **({"beware": "; ".join(told["extrapolated"])} if told["extrapolated"] else {}),
        }

    def __repr__(self) -> str:
        return facts_text("Forecast", self._facts())

    def _repr_html_(self) -> str:
        return facts_html("Forecast", self._facts())


def forecast(
    model: Lab | str | Path,
    capacity: Any,
    policy: Any = "lru",
    *,
    prompt: int | Prompts = 64,
    tokens: int = DECODED,
    recording: Any = None,
    pins: Any = None,
    calibration: Calibration | None = None,
    page_cache: str = "warm",
    limit_seconds: float = 60,
    progress: bool = True,
) -> Forecast:
    """Foretells seconds, bytes and hits of a model at a capacity.

    Args:
        model: A lab, which is left as it was found, or what `moelab.load` takes.
        capacity: As in `moelab.load`, but not `"auto"`. A miss is loaded, which is exact.
        policy: As in `moelab.replay`; `"min"` gives a bound that no run reaches.
        prompt: Tokens of the prompt; or a text, or several, of whose tokens the mean number is
            taken (their routing is not known without running them).
        tokens: Decoded tokens after the first, at most; fewer where the recording ends.
        recording: The full model's routing: a recording, what `moelab.record_texts` or
            `moelab.read_trace` gives, or a frame as `rec.routing`. None records shipped
            calibration texts. Runs that are no longer than the prompt are left out.
        pins: As in `moelab.load`; resident from the start.
        calibration: From `moelab.calibrate`; None calibrates now.
        page_cache: `"warm"`: the files are in memory. `"cold"`: the first read of each expert comes
            from the disk, later ones from memory.
        limit_seconds: For the calibration, if one is made.
        progress: Show bars.

    Returns:
        The forecast.

    Raises:
        StudyError: If the prompt is empty or longer than every run of the recording, recording or
            calibration are another model's, or the calibration lacks what is asked for.
        CapacityError: If it is no capacity of this model.
        PinsError: If pins leave too little room.
    """
    for name, value in (("prompt", prompt), ("tokens", tokens)):
        if isinstance(value, bool) or (isinstance(value, int | float) and not (
            isinstance(value, int) and value >= 1
        )):  # fmt: skip
            raise StudyError(f"{name} counts tokens, an int from 1 on; got {value!r}.")
    if page_cache not in ("warm", "cold"):
        raise StudyError(f"page_cache is 'warm' or 'cold', got {page_cache!r}.")
    with opened(model, capacity) as lab:
        slots = fixed_capacities(capacity, lab.sites)
        if calibration is not None:
            calibration.require(lab.fingerprint, page_cache)
        pinned = resolve_pins(pins, lab.sites, slots, fingerprint=lab.fingerprint)
        length = _length(lab, prompt)
        routing, called = _routing(lab, recording, length, tokens, progress)
        stepped, runs = steps_of_prompt(routing, length, tokens)
        if calibration is None:
            more = (length,) if 256 < length <= LONGEST_CALIBRATED else ()
            calibration = calibrate(
                lab, lengths=(*LENGTHS, *more), progress=progress, limit_seconds=limit_seconds
            )
            calibration.require(lab.fingerprint, page_cache)
        facts = _facts(lab, slots)
        top_k = [site.top_k for site in lab.sites]
    extrapolated = []
    if length - 1 > calibration.longest and length > 1:
        extrapolated.append(
            f"the prompt is longer than any that was calibrated ({calibration.longest} tokens)"
        )
    if calibration.warm_share is not None and calibration.warm_share < 0.9:
        extrapolated.append(
            f"only {calibration.warm_share:.0%} of the files were in memory when calibrated"
        )
    settings = {
        "model": f"{facts.name} ({facts.fingerprint})", "capacity": capacity,
        "slots": _said(slots), "experts": _said([x.experts for x in facts.layers]),
        "top_k": _said(top_k), "policy": policy if isinstance(policy, str) else _name(policy),
        "on_miss": "load", "pinned": sum(map(len, pinned.values())), "prompt": length,
        "tokens": int(runs["tokens"].max()), "page_cache": page_cache, "routing": called,
        "chunk": PREFILL_STEP, "extrapolated": extrapolated,
        "machine": calibration.machine.get("chip"),
    }  # fmt: skip
    return forecast_from(
        stepped, facts, slots, policy, pinned, calibration, page_cache=page_cache,
        settings=settings,
    )  # fmt: skip


def steps_of_prompt(
    routing: pd.DataFrame, prompt: int, tokens: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Cuts a recorded routing into the passes that mlx-lm's loop would make.

    An exact model's routing does not depend on how its tokens are cut into passes, so that any
    recording serves.

    Args:
        routing: A frame with `NEEDED`, perhaps `sequence`, `step` and `phase`.
        prompt: Tokens of the prompt, n.
        tokens: Decoded tokens after the first, at most.

    Returns:
        The frame, positions 0 to n + tokens of each run that has at least n + 2, with `run`
        numbered anew, `step` as the loop has it and `prompt` (positions up to the second pass of a
        single token); and a row a run: `run`, `tokens` (decoded after the first).

    Raises:
        SchemaError: If a column is missing.
        StudyError: If no run is long enough.
    """
    import pandas as pd

    for name in NEEDED:
        if name not in routing.columns:
            raise SchemaError(
                f"The frame has no column {name!r}, which a forecast needs beside "
                f"{', '.join(n for n in NEEDED if n != name)}, as in rec.routing."
            )
    if "phase" in routing.columns:
        routing = routing[routing["phase"].astype(str) != "padding"]
    if "outcome" in routing.columns:
        lossy = set(routing["outcome"].dropna().astype(str)) - {"hit", "load"}
        if lossy:
            raise StudyError(
                f"The recording was made with a lossy miss action ({', '.join(sorted(lossy))}), "
                "so that its routing is not the full model's. Record with on_miss='load'."
            )
    by = ["run", "sequence"] if "sequence" in routing.columns else ["run"]
    found: list[pd.DataFrame] = []
    runs: list[dict[str, int]] = []
    longest = 0
    for _, rows in routing.groupby(by, sort=True, observed=True):
        if "step" in rows.columns:  # of a position that was run twice the last stands
            last = rows.groupby("position", observed=True)["step"].transform("max")
            rows = rows[rows["step"] == last]
        position = rows["position"].to_numpy().astype(np.int64)
        seen = np.unique(position)
        # Tokens without a gap from the start: a recording that began later has no prompt.
        there = int(np.argmax(np.append(seen, -1) != np.arange(len(seen) + 1)))
        longest = max(longest, there)
        if there < prompt + 2:
            continue
        stop = min(there, prompt + 1 + tokens)
        chunks = -(-(prompt - 1) // PREFILL_STEP)
        step = np.where(
            position < prompt - 1, position // PREFILL_STEP, chunks + position - (prompt - 1)
        )
        kept = rows[list(NEEDED)].assign(run=len(runs), step=step)[position < stop]
        kept = kept.assign(prompt=kept["position"] <= prompt)
        found.append(kept.sort_values(["step", "layer", "position", "rank"], kind="stable"))
        runs.append({"run": len(runs), "tokens": stop - prompt - 1})
    if not found:
        raise StudyError(
            f"A prompt of {prompt} tokens and one decoded after its first need {prompt + 2} tokens "
            f"of a text, and the recording's longest run has {longest} from its beginning. Record "
            "longer texts, or forecast a shorter prompt."
        )
    return pd.concat(found, ignore_index=True), pd.DataFrame(runs)


def forecast_from(
    stepped: pd.DataFrame,
    facts: ModelFacts,
    slots: Sequence[int],
    policy: Any,
    pinned: Mapping[int, Sequence[int] | frozenset[int]],
    calibration: Calibration,
    *,
    page_cache: str = "warm",
    settings: Mapping[str, Any] | None = None,
) -> Forecast:
    """The arithmetic of a forecast; see `forecast`.

    Args:
        stepped: From `steps_of_prompt`.
        facts: Of the model.
        slots: Of each layer.
        policy: As in `moelab.replay`.
        pinned: Experts by layer.
        calibration: The seconds.
        page_cache: As in `forecast`.
        settings: What the result says of itself.
    """
    import pandas as pd

    banks = dict(zip((x.layer for x in facts.layers), slots, strict=True))
    experts = {x.layer: x.experts for x in facts.layers}
    partial = {layer for layer, c in banks.items() if c < experts[layer]}
    share = len(partial) / len(banks)
    # A model without partial layers does not wait for the pass after the one that is asked for.
    passes = 2 if partial else 1
    nbytes = {x.layer: x.disk_bytes for x in facts.layers}
    rows, sums = [], []
    for run, part in stepped.groupby("run", sort=True):
        steps = _played(part, policy, banks, pinned, experts, partial, nbytes)
        chunks, alone = steps[steps["chunk"]], steps[~steps["chunk"]]
        lead, later = alone.iloc[:passes], alone.iloc[2:]
        cold = (calibration.cold_load or 0.0) if page_cache == "cold" else 0.0
        parts = {}
        chunk = calibration.prefill_seconds(
            chunks["tokens"].to_numpy(), chunks["needed"].to_numpy(), chunks["loads"].to_numpy(),
            chunks["swept"].to_numpy(), partial=share,
        ) if len(chunks) else (np.zeros(0), np.zeros(0))  # fmt: skip
        for name, group in (("first", lead), ("decode", later)):
            parts[name] = calibration.decode_seconds(
                group["context"].to_numpy(), group["missing"].to_numpy(),
                group["loads"].to_numpy(), partial=share,
            )  # fmt: skip
        before = pd.concat([chunks, lead])
        compute = float(np.sum(chunk[0]) + np.sum(parts["first"][0]))
        loads = float(np.sum(chunk[1]) + np.sum(parts["first"][1]) + cold * before["new"].sum())
        decode = float(np.sum(parts["decode"][0]))
        reading = float(np.sum(parts["decode"][1]) + cold * later["new"].sum())
        count = len(later)
        rows.append({
            "run": run, "first_token_seconds": compute + loads,
            "tokens_per_second": count / (decode + reading) if decode + reading else math.inf,
            "prompt_loads": int(before["loads"].sum()), "loads": int(later["loads"].sum()),
            "tokens": count,
        })  # fmt: skip
        sums.append({
            "first_compute": compute, "first_loads": loads, "decode_compute": decode,
            "decode_loads": reading, "prompt_bytes": before["bytes"].sum(),
            "bytes": later["bytes"].sum(), "routed": later["routed"].sum(),
            "hits": later["hits"].sum(),
        })  # fmt: skip
    by_run, total = pd.DataFrame(rows), pd.DataFrame(sums)
    count, runs = int(by_run["tokens"].sum()), len(by_run)
    seconds = float(total["decode_compute"].sum() + total["decode_loads"].sum())
    prompt_loads, loads = float(by_run["prompt_loads"].mean()), float(by_run["loads"].sum())
    prompt_bytes, read = float(total["prompt_bytes"].mean()), float(total["bytes"].sum())
    table = [
        ("first token", "compute", total["first_compute"].sum() / runs, 0.0, 0.0),
        ("first token", "loads", total["first_loads"].sum() / runs, prompt_loads, prompt_bytes),
        ("decode", "compute", total["decode_compute"].sum() / count, 0.0, 0.0),
        ("decode", "loads", total["decode_loads"].sum() / count, loads / count, read / count),
    ]
    return Forecast(
        first_token_seconds=float(by_run["first_token_seconds"].mean()),
        tokens_per_second=count / seconds if seconds else math.inf,
        bytes_per_token=read / count,
        prompt_bytes=prompt_bytes,
        hit_rate=float(total["hits"].sum() / total["routed"].sum()),
        bytes=facts.slots_bytes(slots) + facts.trunk,
        loads_per_token=loads / count,
        prompt_loads=prompt_loads,
        by_run=by_run,
        frame=pd.DataFrame(table, columns=["phase", "part", "seconds", "loads", "bytes"]),
        settings=dict(settings or {}),
        calibration=calibration,
    )


def _played(
    part: pd.DataFrame,
    policy: Any,
    slots: Mapping[int, int],
    pinned: Mapping[int, Any],
    experts: Mapping[int, int],
    partial: set[int],
    nbytes: Mapping[int, int],
) -> pd.DataFrame:
    """Plays one run to a bank that holds its pins; returns a row a step, in order.

    `chunk`, `tokens`, `context` (tokens before it), `needed` (distinct experts of the partial
    layers), `missing` (layers with a load), `loads`, `new` (loads of experts that were not read
    before), `swept` (layers), `bytes`, `routed`, `hits`.
    """
    from ..experts.policies import make_policy
    from ..routing.replay import replay

    initial = None
    if policy not in ("min", "min_forced") and not make_policy(policy)().admits:
        # As `Attachment.reset`: what is never replaced is filled up at first.
        initial = {layer: range(count) for layer, count in experts.items()}
    played = replay(part, policy, capacity=slots, pins=pinned, initial=initial, experts=experts)
    tokens = part.groupby("step")["position"].agg(["min", "nunique"])
    events = played.events
    steps = events.groupby("step")[["slots", "hits"]].sum().rename(columns={"slots": "routed"})
    some = events[events["layer"].isin(partial)]
    steps["needed"] = some.groupby("step")["needed"].sum()
    over = some[some["needed"] > some["layer"].map(slots)]
    steps["swept"] = over.groupby("step").size()
    loads = played.loads
    steps["loads"] = loads.groupby("step").size()
    steps["missing"] = loads.groupby("step")["layer"].nunique()
    steps["bytes"] = loads["layer"].map(nbytes).groupby(loads["step"]).sum()
    first = loads[~loads.duplicated(["layer", "expert"])]
    steps["new"] = first.groupby("step").size()
    steps = steps.fillna(0)
    steps["tokens"], steps["context"] = tokens["nunique"], tokens["min"]
    # Chunks are all before the prompt's last token, which is a step of its own.
    last = int(part.loc[part["prompt"], "step"].max()) - 1
    steps["chunk"] = steps.index < last
    return steps.sort_index()


def _length(lab: Lab, prompt: int | Prompts) -> int:
    """Returns the prompt's tokens."""
    if isinstance(prompt, int):
        return prompt
    texts = [prompt] if isinstance(prompt, str) else [t.text for t in texts_of(prompt)[0]]
    lengths = [len(lab.tokenizer.encode(text)) if text.strip() else 0 for text in texts]
    if not min(lengths):
        raise StudyError("The prompt is empty. Give a text, or a number of tokens.")
    return round(sum(lengths) / len(lengths))


def _routing(
    lab: Lab, recording: Any, length: int, tokens: int, progress: bool
) -> tuple[pd.DataFrame, str]:
    """Returns a routing frame and what to call it."""
    import pandas as pd

    if recording is None:
        from ..quality.recorded import record_texts

        found = record_texts(
            lab, _calibration_texts(lab, length + tokens + 2), prefix=length, tokens=tokens + 1,
            progress=progress,
        )  # fmt: skip
        return found.recording.routing, "recorded from shipped calibration texts"
    if isinstance(recording, pd.DataFrame):
        return recording, "a frame that was given"
    held = getattr(recording, "recording", recording)
    about = getattr(held, "run", None) or getattr(held, "about", None)
    if not isinstance(about, dict) or not hasattr(held, "routing"):
        raise StudyError(
            "recording= is a Recording, what record_texts or read_trace gives, or a routing frame; "
            f"got {type(recording).__name__}."
        )
    if about.get("fingerprint") != lab.fingerprint:
        raise StudyError(
            f"The recording is of {about.get('model')} ({about.get('fingerprint')}), and the model "
            f"is {lab.name} ({lab.fingerprint}). Record the model itself."
        )
    return held.routing, "a recording that was given"


def _calibration_texts(lab: Lab, least: int) -> list[dict[str, str]]:
    """Returns a text of each shipped domain with so many tokens, joined where they are short."""
    from ..labmodel import DOMAINS, texts

    found = []
    for domain in DOMAINS[:TEXTS]:
        pool = [text["text"] for text in texts(domain=domain, split="calibration")]
        joined, at = pool[0], 1
        while len(lab.tokenizer.encode(joined)) < least:
            joined += "\n\n" + pool[at % len(pool)]
            at += 1
        found.append({"text": joined, "domain": domain, "id": f"{domain} joined"})
    return found


def _facts(lab: Lab, slots: Sequence[int]) -> ModelFacts:
    """Measures the model; a layer that is to be partial must be so for what a load reads."""
    sizes = [site.experts for site in lab.sites]
    pairs = zip(lab.capacities, slots, sizes, strict=True)
    if all(now < n or asked == n for now, asked, n in pairs):
        return facts_of(lab)
    with left_as_found(lab):
        govern(lab, "lru", {}, {}, slots=list(slots))
        return facts_of(lab)


def _name(policy: Any) -> str:
    from ..experts.policies import make_policy

    return make_policy(policy)().name


def _said(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"
