"""Several recordings as one routing frame that says which domain each row is of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import SchemaError, StudyError
from .frames import column, frame_of, known_experts

if TYPE_CHECKING:
    import pandas as pd


def labelled(
    recordings: Mapping[str, Any] | Any,
    domains: Mapping[int, str] | None = None,
    documents: Mapping[int, str] | None = None,
) -> pd.DataFrame:
    """Makes one routing frame of recordings, with a column `domain`.

    Args:
        recordings: Recordings, or routing frames, by domain: `{"prose": first, "code": second}`.
            Or one recording of several texts, with `domains`.
        domains: For one recording: the domain of each run.
        documents: For one recording: the document of each run, where several runs are of one.

    Returns:
        The routing frames one after the other, with `domain` (category), (`document`,) and `run`
        numbered so that no two recordings share one. What the recordings say of the number of
        experts is kept in its `attrs`.

    Raises:
        SchemaError: If a frame is not as moelab writes it.
        StudyError: If there is no recording, runs are not named, or the recordings are of models
            with different numbers of experts.
    """
    import pandas as pd

    if not isinstance(recordings, Mapping):
        frame = frame_of(recordings).copy()
        if domains is None:
            raise StudyError("domains= must say which domain each run of the recording is of.")
        frame["domain"] = pd.Categorical(_named(frame, "domains", domains))
        if documents is not None:
            frame["document"] = pd.Categorical(_named(frame, "documents", documents))
        frame.attrs = {"experts": known_experts(recordings)}
        return frame
    if domains is not None or documents is not None:
        raise StudyError("domains= and documents= are for one recording; here domains are named.")
    if not recordings:
        raise StudyError("There is no recording to put together.")
    parts: list[pd.DataFrame] = []
    experts: dict[int, int] = {}
    runs = 0
    for domain, recording in recordings.items():
        frame = frame_of(recording, f"The recording of {domain!r}")
        run = column(frame, "run", "id")
        parts.append(frame.assign(run=(run + runs).astype(np.int32), domain=str(domain)))
        runs += int(run.max(initial=-1)) + 1
        for layer, number in known_experts(recording).items():
            if experts.setdefault(layer, number) != number:
                raise StudyError(
                    f"Layer {layer} has {experts[layer]} experts in one recording and {number} in "
                    f"that of {domain!r}: they are of different models."
                )
    columns = list(parts[0].columns)
    for part in parts:
        lacking = [name for name in columns if name not in part.columns]
        if lacking:
            raise SchemaError(f"A routing frame has no column {lacking[0]!r} and another has.")
    result = pd.concat([part[columns] for part in parts], ignore_index=True)
    result["domain"] = pd.Categorical(result["domain"], categories=[str(d) for d in recordings])
    if "phase" in result.columns:
        result["phase"] = result["phase"].astype("category")
    result.attrs = {"experts": experts}
    return result


def _named(frame: pd.DataFrame, argument: str, given: Mapping[int, str]) -> list[str]:
    run = column(frame, "run", "id")
    lacking = sorted(set(np.unique(run).tolist()) - set(given))
    if lacking:
        raise StudyError(f"{argument}= says nothing of runs {lacking}; it has {sorted(given)}.")
    numbers, place = np.unique(run, return_inverse=True)
    known = np.array([str(given[int(number)]) for number in numbers], dtype=object)
    return known[place].tolist()
