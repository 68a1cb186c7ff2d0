"""Recorded routing as mlx-lm's loop would meet it: cut into its passes, and played to a bank.

The steps are those of that loop: all of the prompt but its last token in chunks, then token by
token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import SchemaError, StudyError
from ..lab import PREFILL_STEP

if TYPE_CHECKING:
    import pandas as pd

NEEDED = ("run", "position", "layer", "rank", "expert")


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


def played_steps(
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
