"""The layers of whatever the curves take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .recording import Recording
from .streams import LayerStream, frame_streams
from .trace import read_trace


def streams_of(
    source: Any, experts: int | Mapping[int, int] | None = None
) -> Iterable[LayerStream]:
    """Returns the layers of anything that `curves` takes."""
    if isinstance(source, str | Path):
        source = read_trace(source)
    if isinstance(source, Recording):
        run = source.run
        known = dict(zip(run["layers"], run["experts"], strict=True)) if "experts" in run else None
        return frame_streams(source.routing, known if experts is None else experts)
    if hasattr(source, "streams"):
        found: Iterable[LayerStream] = source.streams(experts)
        return found
    if not hasattr(source, "columns") and isinstance(source, Iterable):
        return source
    return frame_streams(source, experts)
