"""Runs a sweep's missing points in this process, with one lab.

Points are the outer loop and prompts the inner one: another capacity costs reading a bank, and
another action may cost copies of all experts, while the exact runs of all prompts of a block are
kept beside. So each exact run is made once, and each bank is set up once a block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import StudyError
from ..experts.capacity import fixed_capacities
from ..experts.misses import LowBit
from ..quality.window import Window
from .asked import Asked
from .bytes import ModelFacts, facts_of
from .points import Point
from .rows import window_key
from .runner import Runner, govern, left_as_found

if TYPE_CHECKING:
    import pandas as pd

    from ..lab import Lab

BLOCK = 64
"""Prompts whose exact runs are kept at once: their logits may be files, and open files are few."""

REPLAY_COST = 0.05
"""What replaying a prompt counts on the progress bar, where running it counts 1."""


@dataclass(frozen=True)
class Todo:
    """What is still to be made of one point."""

    point: Point
    windows: tuple[Window, ...]


class Bar:
    """A progress bar over runs of the model, which says what is done now and the time left.

    Args:
        total: Runs in all, as `collect.cost` counts them.
        show: Whether to.
    """

    def __init__(self, total: float, show: bool) -> None:
        from tqdm.auto import tqdm

        # Not {n_fmt}: replays count parts of a run.
        form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left"
        self._bar = tqdm(
            total=total, desc="sweep", disable=not show, leave=False, bar_format=form,
            dynamic_ncols=True,
        )  # fmt: skip

    def at(self, title: str) -> None:
        """Says what is done now."""
        self._bar.set_description_str(f"sweep: {title}")

    def done(self, cost: float) -> None:
        """Says that so much was done."""
        self._bar.update(cost)

    def close(self) -> None:
        """Takes the bar away."""
        self._bar.close()


@contextlib.contextmanager
def opened(model: Lab | str | Path, wanted: Asked, options: Mapping[str, Any]) -> Iterator[Lab]:
    """Gives a lab: one that is left as it was found, or one that is closed afterwards.

    Raises:
        StudyError: If options are given for a lab, or it is being recorded.
    """
    from ..lab import Lab

    if isinstance(model, Lab):
        if options:
            raise StudyError(
                f"{', '.join(options)} cannot be set for a lab that is loaded already. Leave it "
                "out, or give the model's name."
            )
        if model.sessions:
            raise StudyError(
                "The lab is being recorded, and a sweep changes its capacity and miss action. "
                "Leave the `with lab.record()` block first."
            )
        model._check_open()
        with left_as_found(model):
            yield model
        return
    from ..loading import load

    with load(model, wanted.capacities[0], **options) as lab:
        yield lab


def measured_facts(lab: Lab, wanted: Asked) -> ModelFacts:
    """Measures a lab at the smallest capacity of a sweep, so that what it reads can be seen.

    Raises:
        CapacityError: If a capacity is none of this model.
    """
    slots = [fixed_capacities(capacity, lab.sites) for capacity in wanted.capacities]
    govern(lab, "lru", {}, {}, slots=min(slots, key=sum))
    return facts_of(lab)


def widest(points: Sequence[Point]) -> tuple[int, ...]:
    """Returns the most slots that a sweep gives."""
    return max((point.slots for point in points), key=sum)


def blocks(windows: Sequence[Window], size: int = BLOCK) -> list[tuple[Window, ...]]:
    """Cuts prompts into blocks."""
    return [tuple(windows[at : at + size]) for at in range(0, len(windows), size)]


def in_order(todo: Sequence[Todo]) -> list[Todo]:
    """Sorts points so that little is changed from one to the next.

    Replays first, which need no bank. Then the actions without copies at few bits, since another
    action drops those; within them from many slots to few.
    """

    def place(item: Todo) -> tuple[Any, ...]:
        point = item.point
        bits = point.action.bits if isinstance(point.action, LowBit) else 0
        slots = tuple(-count for count in point.slots)
        return (
            point.lossy, bits, slots, point.pins, point.seed, point.policy.name,
            point.on_miss, point.kv_bits or 0,
        )  # fmt: skip

    return sorted(todo, key=place)


def run_block(
    runner: Runner, todo: Sequence[Todo], bar: Bar | None, *, keep: Sequence[Window] = ()
) -> Iterator[pd.DataFrame]:
    """Makes the missing rows of one block of windows; yields each point's, once it is whole.

    Args:
        runner: Of the lab.
        todo: Points, and the windows that each lacks.
        bar: Is told; None for nobody.
        keep: Windows whose exact runs are wanted later as well.
    """
    import pandas as pd

    wanted = {window_key(w): w for w in (*keep, *(w for item in todo for w in item.windows))}
    if bar is not None:
        bar.at("exact runs")
    for _ in runner.prepare(wanted.values()):
        if bar is not None:
            bar.done(1)
    for item in in_order(todo):
        if bar is not None:
            bar.at(item.point.title)
        rows = []
        for row in runner.rows(item.point, item.windows):
            rows.append(row)
            if bar is not None:
                bar.done(1 if item.point.lossy else REPLAY_COST)
        yield pd.DataFrame(rows)
