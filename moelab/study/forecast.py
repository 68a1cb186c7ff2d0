"""`moelab.forecast`: seconds before anything has run at that capacity.

What a bank would load follows from a recorded routing, which is played to it (`moelab.replay`);
what loads, tokens and chunks cost follows from a calibration of this machine and this model.

The routing is of texts; another text of the same kind has another one, and so its own seconds.
Nothing known of another model is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import StudyError
from ..experts.capacity import fixed_capacities
from ..experts.pins import resolve_pins
from ..lab import PREFILL_STEP, Lab
from ..prompt_texts import Prompts, texts_of
from .bytes import ModelFacts, facts_of
from .calibration import LENGTHS, calibrate, opened
from .calibration_results import Calibration
from .calibration_runs import DECODED as CALIBRATED
from .forecast_passes import steps_of_prompt
from .forecast_results import Forecast, forecast_from
from .runner import govern, left_as_found

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Forecast", "calibration_texts", "forecast"]

DECODED = 64
"""Decoded tokens that a forecast is of, unless told."""

TEXTS = 6
"""Texts that are recorded where no recording is given: one of each shipped domain."""

LONGEST_CALIBRATED = 1024
"""A prompt is calibrated at its own length up to here; longer ones are extrapolated."""


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
        PolicyError: If it is no policy.
        PinsError: If pins leave too little room.
    """
    for name, value in (("prompt", prompt), ("tokens", tokens)):
        if isinstance(value, bool) or (isinstance(value, int | float) and not (
            isinstance(value, int) and value >= 1
        )):  # fmt: skip
            raise StudyError(f"{name} counts tokens, an int from 1 on; got {value!r}.")
    if page_cache not in ("warm", "cold"):
        raise StudyError(f"page_cache is 'warm' or 'cold', got {page_cache!r}.")
    named = _name(policy)  # refuses what is no policy before anything is measured
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
    context, measured = length + int(runs["tokens"].max()), calibration.longest + 1 + CALIBRATED
    if context > 2 * measured:
        extrapolated.append(
            f"tokens are decoded after up to {context} others, and at most {measured} were "
            "calibrated"
        )
    if calibration.warm_share is not None and calibration.warm_share < 0.9:
        extrapolated.append(
            f"only {calibration.warm_share:.0%} of the files were in memory when calibrated"
        )
    settings = {
        "model": f"{facts.name} ({facts.fingerprint})", "capacity": capacity,
        "slots": _said(slots), "experts": _said([x.experts for x in facts.layers]),
        "top_k": _said(top_k), "policy": named,
        "on_miss": "load", "pinned": sum(map(len, pinned.values())), "prompt": length,
        "tokens": int(runs["tokens"].max()), "page_cache": page_cache, "routing": called,
        "chunk": PREFILL_STEP, "extrapolated": extrapolated,
        "machine": calibration.machine.get("chip"),
    }  # fmt: skip
    return forecast_from(
        stepped, facts, slots, policy, pinned, calibration, page_cache=page_cache,
        settings=settings,
    )  # fmt: skip


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
            lab, calibration_texts(lab, length + tokens + 2), prefix=length, tokens=tokens + 1,
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


def calibration_texts(lab: Lab, least: int) -> list[dict[str, str]]:
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
    from ..experts.policies import REPLAY_ONLY, make_policy

    if isinstance(policy, str):
        if policy not in REPLAY_ONLY:
            make_policy(policy)
        return policy
    return make_policy(policy)().name


def _said(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"
