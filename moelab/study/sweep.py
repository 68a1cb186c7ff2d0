"""`moelab.sweep`: what capacity, pins, policy, miss action and cache cost, point by point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..display import facts_html, facts_text, size
from ..errors import StudyError
from ..prompt_texts import Prompts
from ..quality.window import documents_of
from .asked import asked
from .bytes import CURVE, at_equal_bytes
from .collect import Collected, Job, exact_runs, row_cost
from .local import Bar, blocks, measured_facts, opened, run_block, widest
from .rows import joined, parts_in, read_manifest, read_part
from .runner import Runner

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from ..lab import Lab

SPLITS = ("calibration", "selection", "test")

GIVEN = "given"
"""What the frame calls prompts of no named split."""


class Sweep:
    """What a sweep found.

    Attributes:
        frame: A row a point and prompt; columns and their meaning: `moelab.study.rows.COLUMNS`.
        settings: Of which model, prompts and settings it is; JSON values.
        path: The folder that it was written to; None if to none.
    """

    def __init__(
        self, frame: pd.DataFrame, settings: Mapping[str, Any], path: Path | None = None
    ) -> None:
        self.frame = frame
        self.settings = dict(settings)
        self.path = path

    @classmethod
    def read(cls, path: str | Path) -> Sweep:
        """Reads a folder that a sweep was written to, as far as it came.

        Raises:
            StudyError: If the folder holds no sweep or no rows, a part is damaged, or two settings
                have the same labels.
            SchemaError: If a part was edited by hand; names the column.
        """
        folder = Path(path).expanduser()
        settings = read_manifest(folder)
        model = settings["identity"].get("fingerprint")
        parts = [read_part(part, model) for part in parts_in(folder)]
        frame = joined(parts)
        if frame is None:
            raise StudyError(f"{folder} holds a sweep without any row yet. Run it first.")
        _check_labels(frame, folder)
        order = ["on_miss", "policy", "pins", "kv_bits", "seed", "capacity", "domain", "prompt"]
        return cls(frame.sort_values(order, kind="stable", ignore_index=True), settings, folder)

    def at_equal_bytes(
        self, metric: str = "kl_mean", budgets: Sequence[int] | None = None
    ) -> pd.DataFrame:
        """Pairs what each action does with the same memory.

        See `moelab.study.bytes.at_equal_bytes`.
        """
        return at_equal_bytes(self.frame, metric, budgets)

    def points(self) -> pd.DataFrame:
        """Returns a row a point: its settings and bytes, and means over prompts.

        Means weigh prompts by their judged tokens; `hit_rate` is hits over routed slots, `ppl`
        exp of the mean negative log-probability.
        """
        import numpy as np

        frame = self.frame
        keys = [*CURVE, "capacity", "bytes"]
        groups = frame.groupby(keys, sort=False, observed=True, dropna=False)
        found = groups[["tokens", "routed", "hits", "loads", "bytes_read", "kl_sum"]].sum()
        weighed = frame[["nll", "nll_reference", "same_top1"]].mul(frame["tokens"], axis=0)
        by = [frame[name] for name in keys]
        means = weighed.groupby(by, sort=False, observed=True, dropna=False).sum()
        means = means.div(found["tokens"], axis=0)
        return found.assign(
            prompts=groups.size(),
            hit_rate=found["hits"] / found["routed"],
            kl_mean=found["kl_sum"] / found["tokens"],
            kl_max=groups["kl_max"].max(),
            ln_ppl_ratio=means["nll"] - means["nll_reference"],
            ppl=np.exp(means["nll"]),
            ppl_reference=np.exp(means["nll_reference"]),
            same_top1=means["same_top1"],
        ).reset_index()

    @property
    def plot(self) -> SweepPlots:
        """Charts; each method returns Axes."""
        return SweepPlots(self.frame)

    def _facts(self) -> dict[str, str]:
        frame, settings = self.frame, self.settings
        counts = frame.drop_duplicates("point")
        lossy = int((counts["source"] == "run").sum())
        low, high = int(frame["bytes"].min()), int(frame["bytes"].max())
        facts = {
            "model": f"{settings.get('model', '?')} ({frame['fingerprint'].iloc[0]})",
            "points": f"{len(counts)}: {lossy} run, {len(counts) - lossy} replayed",
            "prompts": f"{frame['prompt'].nunique()} of split {frame['split'].iloc[0]!r}, "
            f"{frame['domain'].nunique()} domains",
            "tokens": f"{int(frame['tokens'].iloc[0])} judged a prompt, after a prefix of "
            f"{int(frame['prefix'].iloc[0])} that ran exactly",
        }
        for name in ("capacity", *CURVE):
            values = frame[name].unique().tolist()
            if name in ("capacity", "on_miss", "policy") or len(values) > 1:
                facts[name] = _some(values)
        facts["bytes"] = f"{size(low)} to {size(high)}"
        if settings.get("left_out"):
            facts["left out"] = (
                f"{settings['left_out']} points: a policy that knows the future cannot run"
            )
        if self.path is not None:
            facts["folder"] = str(self.path)
        return facts

    def __repr__(self) -> str:
        return facts_text("Sweep", self._facts())

    def _repr_html_(self) -> str:
        return facts_html("Sweep", self._facts())


class SweepPlots:
    """Charts of a sweep's frame."""

    def __init__(self, frame: pd.DataFrame) -> None:
        self._frame = frame

    def frontier(self, metric: str = "kl_mean", **options: Any) -> Axes:
        """Draws a metric against total bytes, a curve an action."""
        from ..plots.quality import frontier

        return frontier(self._frame, metric=metric, **options)

    def capacity(self, metric: str = "kl_mean", **options: Any) -> Axes:
        """Draws a metric against experts in memory, a curve an action."""
        from ..plots.quality import capacity

        return capacity(self._frame, metric=metric, **options)


def sweep(
    model: Lab | str | Path,
    capacity: Any,
    pins: Any = None,
    policy: Any = "lru",
    on_miss: Any = "load",
    kv_bits: Any = None,
    prompts: Prompts = None,
    seeds: Any = 0,
    *,
    prefix: int = 48,
    tokens: int = 40,
    swap_budget: int | None = None,
    profile: Any = None,
    out: str | Path | None = None,
    split: str | None = None,
    client: Any = None,
    progress: bool = True,
    **load_options: Any,
) -> Sweep:
    """Measures every combination of some settings on the same prompts, against the full model.

    Each prompt's first `prefix` tokens run exactly, and the `tokens` predictions after them are
    judged, a token at a time, as `moelab.quality.judge.judge` does. The bank is reset before every
    prompt; where misses are loaded it goes through the prefix as well, and for a lossy action it
    begins from its initial contents after it. Hits, loads and bytes are the judged tokens'.

    Where misses are loaded the output is the full model's, so quality is exact by construction,
    and hits and loads are replayed from one recorded exact run with the same steps. Lossy points
    run. With a quantised cache (`kv_bits`) there is an exact run of its own, from which its exact
    points are replayed; what all points are judged against is the run without.

    Args:
        model: A lab, which is left as it was found but for a reset bank, or what `moelab.load`
            takes. One model is in memory.
        capacity: Experts a layer: ints, or floats for shares. This and the next five take a list
            or a single value.
        pins: None, `moelab.Pins(…)`, a profile, a mapping from layer to ids, `"random:8"` for 8
            drawn experts a layer, or a (label, pins) pair.
        policy: Names of `moelab.policies()`, or policies of your own, which are known by their
            name, and by their attribute `digest` if they have one. Those that know the future have
            points for `"load"` only.
        on_miss: Names or objects of miss actions.
        kv_bits: Bits of the key-value cache: 8, 4 or None for the model's own type.
        prompts: A file, or texts; see `moelab.quality.window.documents_of`. None for the shipped
            texts of a split that are long enough.
        seeds: For drawn pins: a point for each seed. Points where nothing is drawn have seed 0.
        prefix: Tokens that run exactly.
        tokens: Judged tokens a prompt.
        swap_budget: For lossy actions: experts a layer that may enter after a step; None for the
            layer's top-k.
        profile: A profile or its path: its order fills a bank that begins full where the pins
            bring no profile. None for the lowest ids.
        out: A folder. Rows are written there as they come, and a call with the same settings goes
            on where another was cut off; more capacities, pins, policies, actions and seeds may
            be added later.
        split: What the prompts are of: "calibration", "selection" or "test". For the shipped texts
            "selection" unless given, since a sweep is mostly to choose by.
        client: A `dask.distributed.Client` whose workers run the points: processes with one thread
            each. `model` must be a name or folder that they can open.
        progress: Show a progress bar.
        **load_options: More of `moelab.load`.

    Returns:
        The sweep.

    Raises:
        StudyError: If a list is empty or names a point twice, prompts are empty or shorter than
            prefix and tokens, `out` holds something else, or it cannot be written.
        PolicyError: If there is no such policy.
        MissActionError: If there is no such action, or this model does not allow it.
        CapacityError: If a capacity is none of this model.
        PinsError: If pins name what is not there, or leave too little room at a capacity.
        SchemaError: If rows in `out` were edited by hand.
    """
    wanted = asked(
        capacity=capacity, pins=pins, policy=policy, on_miss=on_miss, kv_bits=kv_bits,
        seeds=seeds, swap_budget=swap_budget, profile=profile,
    )  # fmt: skip
    if split is not None and split not in SPLITS:
        raise StudyError(f"split must be one of {', '.join(SPLITS)} or None, got {split!r:.60}.")
    for name, value in (("prefix", prefix), ("tokens", tokens)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise StudyError(f"{name} is a number of tokens, an int from 1 on, got {value!r:.60}.")
    documents, called = documents_of(prompts, split=split or "selection")
    named = split or ("selection" if prompts is None else GIVEN)
    job = Job(wanted, documents, called, prefix, tokens, named, prompts is None, load_options)
    if client is not None:
        from .distributed import spread_out

        collected = spread_out(client, model, job, out=out, progress=progress)
    else:
        collected = _run_here(model, job, out=out, progress=progress)
    path = None if collected.folder is None else collected.folder.path
    return Sweep(collected.frame(), collected.settings, path)


def _run_here(
    model: Lab | str | Path, job: Job, *, out: str | Path | None, progress: bool
) -> Collected:
    with opened(model, job.wanted, job.options) as lab:
        windows = job.windows(lab.tokenizer)
        facts = measured_facts(lab, job.wanted)
        collected = Collected(job, facts, windows, out)
        runner = Runner(lab, facts, widest(collected.points), split=job.split)
        parts = [collected.todo(block) for block in blocks(windows)]
        bar = Bar(sum(exact_runs(todo) + row_cost(todo) for todo in parts), progress)
        try:
            for todo in parts:
                for rows in run_block(runner, todo, bar):
                    collected.add(rows)
        finally:
            bar.close()
    return collected


def _check_labels(frame: pd.DataFrame, folder: Path) -> None:
    """Refuses rows of two settings that a frame cannot tell apart: figures would be over both."""
    names = [*CURVE, "capacity", "bytes_slots"]
    points = frame.drop_duplicates("point")
    twice = points[points.duplicated(names, keep=False)]
    if len(twice):
        told = ", ".join(f"{name}={twice[name].tolist()[0]!r}" for name in names[:-1])
        raise StudyError(
            f"{folder} holds rows of two settings with the same labels ({told}), such as pins of "
            "one label that name other experts. Call moelab.sweep again with the one that you "
            "mean, which reads its rows alone, and give each setting a label of its own."
        )


def _some(values: Sequence[Any]) -> str:
    said = ["the model's own" if value != value else f"{value:g}" if isinstance(value, float)
            else str(value) for value in values]  # fmt: skip
    return ", ".join(said if len(said) <= 8 else [*said[:4], "…", *said[-2:]])
