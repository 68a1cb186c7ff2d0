"""Pin transfer: do pins learned on one kind of text help on another, or do they harm?

Pins are the experts that one domain's calibration texts use most. They are judged on test texts of
every domain, by replaying the full model's recorded routing through the bank's own bookkeeping: the
hits with the pins, less the hits without any at the same capacity, document by document. Pins take
slots away from the replacement policy, so they can also harm, and this says where they do. Sets
drawn at random say what any pins would have done.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import PinsError, StudyError
from ..experts.policies import REPLAY_ONLY, make_policy, placed
from ..experts.residency import Residency
from ..prompt_texts import Prompts
from ..quality.intervals import simultaneous
from ..quality.recorded import RecordedTexts, record_texts
from ..quality.window import documents_of, few_of_each
from ..routing.events import LayerEvents, check_frame, layer_events, steps_of
from .drawn import drawn_pins
from .pin_results import PinSet, PinTransfer

if TYPE_CHECKING:
    import pandas as pd

    from ..lab import Lab

__all__ = ["PinTransfer", "hits_of", "learned_pins", "pin_transfer"]

ALL = "all"
"""What pins learned on all domains together are called."""

DECODE = "decode"
"""The phase that is judged."""


def pin_transfer(
    model: Lab | str | Path | None,
    capacity: int,
    *,
    top: int | None = None,
    policy: Any = "lru",
    calibration: Prompts | RecordedTexts = None,
    test: Prompts | RecordedTexts = None,
    prefix: int = 32,
    tokens: int = 48,
    documents: int = 16,
    random: int = 5,
    seed: int = 0,
) -> PinTransfer:
    """Learns pins on each domain and judges them on all, against no pins and pins drawn at random.

    The full model reads each text once; everything else is replay, which is exact for the steps
    that were recorded: the first `prefix` tokens at once, then one at a time. Each document begins
    with a bank that holds its pins and nothing else, goes through the prefix, and is judged on the
    decoded tokens after it, so that the pins' head start is mostly over.

    Args:
        model: A lab, or what `moelab.load` takes; None where both texts are recorded already.
        capacity: Experts a layer.
        top: Pins a layer, the most used; None for half of what may be pinned, (C − top-k)/2.
        policy: A name of `moelab.policies()` that a model can run with, or a policy.
        calibration: Texts to learn pins on, in several domains, or a recording of them from
            `moelab.record_texts`; None for the shipped ones.
        test: Texts to judge on, others; None for the shipped ones.
        prefix: Tokens of each text in its first step.
        tokens: Tokens after them, one a step.
        documents: Shipped texts of each domain at most, where none are given.
        random: Drawn pin sets.
        seed: Of the first drawn set; each further one has the next. They are the sets that a
            sweep draws for `"random:N"` from these seeds.

    Returns:
        Gains by pair of domains.

    Raises:
        StudyError: If texts are missing, too short, the same in both splits, or of another model;
            or if a domain that is judged has fewer than two documents.
        PinsError: If there are more pins than C − top-k.
        PolicyError: If there is no such policy.

    Warns:
        UserWarning: Where pins are shown to make hits fewer than no pins do.
    """
    learned, judged = _recorded(
        model, calibration, test, capacity, prefix=prefix, tokens=tokens, documents=documents
    )
    run = judged.recording.run
    experts = dict(zip(run["layers"], run["experts"], strict=True))
    top_k = dict(zip(run["layers"], run["top_k"], strict=True))
    _check_numbers(capacity, top, random, experts, top_k)
    pins_top = max(1, (capacity - max(top_k.values())) // 2) if top is None else top
    if isinstance(policy, str) and policy in REPLAY_ONLY:
        raise StudyError(f"{policy!r} knows the future, and pins for it would help nobody.")
    name = make_policy(policy)().name
    pins = learned_pins(learned.routing, experts, pins_top)
    drawn = [_drawn(experts, pins_top, seed + number) for number in range(random)]
    rows = _played(judged, capacity, pins, drawn, policy)
    frame = _pairs(rows, capacity, pins_top, name)
    settings = {
        "model": judged.recording.run["model"], "fingerprint": judged.recording.run["fingerprint"],
        "prefix": prefix, "tokens": tokens, "random": random, "seed": seed,
        "calibration_documents": len(learned.documents), "test_documents": len(judged.documents),
    }  # fmt: skip
    found = PinTransfer(frame, _kinds(rows), rows, pins, settings)
    if found.warning is not None:
        warnings.warn(found.warning, stacklevel=2)
    return found


# -- what is learned -----------------------------------------------------------------------


def learned_pins(routing: pd.DataFrame, experts: Mapping[int, int], top: int) -> dict[str, PinSet]:
    """Returns the most used experts of each domain, and of all domains together.

    Args:
        routing: Rows of routed slots with `domain`, `layer`, `expert`.
        experts: Experts of each layer.
        top: How many a layer; the lowest id first where uses are equal.

    Returns:
        By domain, and for `"all"`: pins by layer, ascending. Each domain counts as much as its
        texts have tokens.
    """
    domains = [str(d) for d in dict.fromkeys(routing["domain"])]
    found = {}
    for domain in [*domains, *([ALL] if len(domains) > 1 else [])]:
        mine = routing if domain == ALL else routing[routing["domain"] == domain]
        found[domain] = {
            layer: sorted(np.argsort(-_counts(mine, layer, size), kind="stable")[:top].tolist())
            for layer, size in experts.items()
        }
    return found


def _drawn(experts: Mapping[int, int], top: int, seed: int) -> PinSet:
    return {layer: sorted(ids) for layer, ids in drawn_pins(experts, top, seed).items()}


def _counts(routing: pd.DataFrame, layer: int, size: int) -> np.ndarray:
    chosen = routing.loc[routing["layer"] == layer, "expert"].to_numpy()
    return np.bincount(chosen, minlength=size)


# -- what is judged ------------------------------------------------------------------------


def _played(
    judged: RecordedTexts,
    capacity: int,
    pins: Mapping[str, PinSet],
    drawn: Sequence[PinSet],
    policy: Any,
) -> pd.DataFrame:
    import pandas as pd
    from tqdm.auto import tqdm

    routing = judged.recording.routing
    check_frame(routing)
    by_run = dict(iter(routing.groupby("run", sort=False)))
    rows = []
    named = list(judged.documents.itertuples())
    for text in tqdm(named, "pins", unit="text", delay=2, leave=False):
        mine = by_run[text.run]
        step, _ = steps_of(mine)
        decoded = np.zeros(int(step.max()) + 1, bool)
        decoded[step[(mine["phase"] == DECODE).to_numpy()]] = True
        if not decoded.any():
            raise StudyError(f"Text {text.document!r} has no decoded token to judge.")
        layers = layer_events(mine, step)
        slots = int(sum(_pair_slots(e, decoded).sum() for e in layers))

        def hits(chosen: PinSet, layers: Any = layers, decoded: np.ndarray = decoded) -> int:
            return sum(
                hits_of(e, capacity, chosen.get(e.layer, []), policy, decoded) for e in layers
            )

        unpinned = hits({})
        by_chance = float(np.mean([hits(one) for one in drawn])) if drawn else float("nan")
        for train, chosen in pins.items():
            rows.append(
                {
                    "train": train, "test": str(text.domain), "document": str(text.document),
                    "slots": slots, "hits": hits(chosen), "hits_unpinned": unpinned,
                    "hits_random": by_chance,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def hits_of(
    events: LayerEvents, capacity: int, pins: Sequence[int], policy: Any, judged: np.ndarray
) -> int:
    """Plays one layer's events to a bank and counts hits.

    Args:
        events: The events.
        capacity: Slots.
        pins: Pinned experts, which are there from the start.
        policy: As for `make_policy`.
        judged: bool (steps,): whether a step counts.

    Returns:
        Routed slots of judged steps whose expert was resident when the step began.
    """
    bank = Residency(capacity, placed(make_policy(policy)(), events.layer), pins)
    for load in bank.fill((), events.top_k):
        bank.arrived(load)
    hit = np.ones(len(events.expert), bool)
    for number, needed in enumerate(events.needed()):
        misses = bank.begin(needed)
        if misses:
            begin = int(events.start[number])
            absent = set(misses)
            hit[[begin + i for i, e in enumerate(needed) if e in absent]] = False
            for part in bank.rounds(needed, misses):
                for load in part.loads:
                    bank.arrived(load)
        bank.end()
    return int((_pair_slots(events, judged) * hit).sum())


def _pair_slots(events: LayerEvents, judged: np.ndarray) -> np.ndarray:
    """Returns the routed slots of each (event, expert); 0 in steps that are not judged."""
    slots = np.bincount(events.pair, minlength=len(events.expert))
    event = np.repeat(np.arange(len(events.step)), np.diff(events.start))
    return np.asarray(slots * judged[events.step[event]])


def _pairs(rows: pd.DataFrame, capacity: int, top: int, policy: str) -> pd.DataFrame:
    """Returns `PinTransfer.frame`."""
    by = ["train", "test"]
    data = rows.assign(
        domain=rows["test"],
        gain=(rows["hits"] - rows["hits_unpinned"]) / rows["slots"],
        over=(rows["hits"] - rows["hits_random"]) / rows["slots"],
    )
    found = _bounds(data, "gain", by)
    sums = rows.groupby(by, sort=False)[["slots", "hits", "hits_unpinned", "hits_random"]].sum(
        min_count=1
    )
    sums = sums.loc[list(zip(found["train"], found["test"], strict=True))]
    slots = sums["slots"].to_numpy()
    found = found.assign(
        capacity=capacity, top=top, policy=policy, slots=slots,
        hit_rate=sums["hits"].to_numpy() / slots,
        hit_rate_unpinned=sums["hits_unpinned"].to_numpy() / slots,
        gain_random=(sums["hits_random"] - sums["hits_unpinned"]).to_numpy() / slots,
        over_random=float("nan"), over_low=float("nan"), over_high=float("nan"),
        worse=found["high"] < 0,
    )  # fmt: skip
    if data["over"].notna().all():
        over = _bounds(data, "over", by)
        found[["over_random", "over_low", "over_high"]] = over[["over", "low", "high"]].to_numpy()
    columns = [
        "train", "test", "capacity", "top", "policy", "documents", "slots", "hit_rate",
        "hit_rate_unpinned", "gain", "low", "high", "gain_random", "over_random", "over_low",
        "over_high", "worse",
    ]  # fmt: skip
    return found[columns]


def _kinds(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns `PinTransfer.summary`."""
    import pandas as pd

    own = rows["train"] == rows["test"]
    together = rows["train"] == ALL
    parts = []
    for name, chosen in (
        ("own domain", own), ("other domains", ~own & ~together), ("all domains", together)
    ):  # fmt: skip
        if chosen.any():
            parts.append(rows[chosen].assign(pins=name))
    if rows["hits_random"].notna().all():
        once = rows.drop_duplicates(["test", "document"])
        parts.append(once.assign(pins="random", hits=once["hits_random"]))
    data = pd.concat(parts, ignore_index=True)
    data["gain"] = (data["hits"] - data["hits_unpinned"]) / data["slots"]
    found = _bounds(data.assign(domain=data["test"]), "gain", ["pins"])
    return found[["pins", "gain", "low", "high", "documents"]]


def _bounds(data: pd.DataFrame, value: str, by: list[str]) -> pd.DataFrame:
    return simultaneous(data, value, by, weights="slots").rename(columns={"mean": value})


# -- what is given -------------------------------------------------------------------------


def _recorded(
    model: Lab | str | Path | None,
    calibration: Any,
    test: Any,
    capacity: int,
    *,
    prefix: int,
    tokens: int,
    documents: int,
) -> tuple[RecordedTexts, RecordedTexts]:
    """Returns the recordings of both splits, made where they are not given."""
    given = (calibration, test)
    if all(isinstance(texts, RecordedTexts) for texts in given):
        return _checked(calibration, test)
    if model is None:
        raise StudyError(
            "Without a model both calibration= and test= must be recordings of moelab.record_texts."
        )
    from ..lab import Lab

    if not isinstance(model, Lab):
        from ..loading import load

        with load(model, capacity) as lab:
            return _recorded(
                lab, calibration, test, capacity, prefix=prefix, tokens=tokens, documents=documents
            )
    found = []
    for texts, split in zip(given, ("calibration", "test"), strict=True):
        if not isinstance(texts, RecordedTexts):
            if texts is None:
                few = few_of_each(
                    model.tokenizer, documents_of(None, split=split)[0],
                    least=prefix + tokens + 1, each=documents,
                )  # fmt: skip
                texts = [{"id": d.name, "domain": d.domain, "text": d.text} for d in few]
            texts = record_texts(model, texts, prefix=prefix, tokens=tokens)
        found.append(texts)
    return _checked(found[0], found[1])


def _checked(learned: RecordedTexts, judged: RecordedTexts) -> tuple[RecordedTexts, RecordedTexts]:
    a, b = learned.recording.run, judged.recording.run
    if a["fingerprint"] != b["fingerprint"]:
        raise StudyError(
            f"The texts were recorded with two models ({a['fingerprint']} and "
            f"{b['fingerprint']}), whose experts are others."
        )
    shared = sorted(set(learned.documents["document"]) & set(judged.documents["document"]))
    if shared:
        raise StudyError(
            f"{len(shared)} texts are in both splits, such as {shared[0]!r}: pins are judged on "
            "texts that they were not learned on. Give texts with names of their own."
        )
    counts = judged.documents["domain"].value_counts()
    if (counts < 2).any():
        raise StudyError(
            f"Domain {counts.idxmin()!r} has {counts.min()} test document, which cannot say how "
            "documents differ. Give at least two of each domain."
        )
    if ALL in set(learned.documents["domain"]) and learned.documents["domain"].nunique() > 1:
        raise StudyError(f"A domain may not be called {ALL!r} where there are others.")
    return learned, judged


def _check_numbers(
    capacity: int,
    top: int | None,
    random: int,
    experts: Mapping[int, int],
    top_k: Mapping[int, int],
) -> None:
    least, most = max(top_k.values()), min(experts.values())
    if isinstance(capacity, bool) or not isinstance(capacity, int | np.integer):
        raise StudyError(f"capacity counts experts a layer, an int, got {capacity!r}.")
    if not least < capacity < most:
        raise StudyError(
            f"capacity must be above {least} (top-k, so that something can be pinned) and below "
            f"{most} (all experts, where pins change nothing), got {capacity}."
        )
    if top is not None and (isinstance(top, bool) or not isinstance(top, int) or top < 1):
        raise PinsError(f"top counts pins a layer, an int from 1 on, got {top!r}.")
    if top is not None and top > capacity - least:
        raise PinsError(
            f"{top} pins a layer are {top - capacity + least} too many: of {capacity} slots "
            f"{least} must stay free for a token's other experts (its top-k)."
        )
    if isinstance(random, bool) or not isinstance(random, int) or random < 0:
        raise StudyError(f"random is a number of drawn pin sets, an int from 0 on, got {random!r}.")
