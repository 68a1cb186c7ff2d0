"""Spreads a sweep over the workers of a dask cluster: the same rows as in one process.

Prompts are dealt out to the workers, so that each exact run is made by one of them and kept there
for all points; a task is one point for one worker's prompts, and its rows are written here as they
come back. Each worker keeps one lab until the sweep is done. dask is imported only here.
"""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import StudyError
from ..quality.window import Window
from .bytes import ModelFacts
from .collect import Collected, Job, exact_runs, row_cost
from .local import BLOCK, Bar, Todo, blocks, in_order, measured_facts, run_block, widest
from .runner import Runner

if TYPE_CHECKING:
    import pandas as pd

_HELD: dict[str, Any] = {}
"""In a worker: the lab that it keeps, its runner, and the sweep that they are for."""


def spread_out(
    client: Any, model: Any, job: Job, *, out: str | Path | None, progress: bool
) -> Collected:
    """Runs a sweep's missing points on a cluster.

    Args:
        client: A `dask.distributed.Client`.
        model: What the workers' `moelab.load` takes.
        job: What to do.
        out: As for `moelab.sweep`; a folder of this process.
        progress: Show a progress bar.

    Raises:
        StudyError: If `client` is no client of dask, its workers cannot each hold one model, or
            `model` cannot be sent to them.
    """
    distributed = _imported(client)
    if not isinstance(model, str | Path):
        raise StudyError(
            f"A {type(model).__name__} cannot be sent to other processes. With client= give the "
            "model's name or folder, which each worker opens by itself."
        )
    workers = _workers(client)
    name = uuid.uuid4().hex
    where = str(model)
    try:
        first = client.submit(_describe, name, where, job, workers=workers[:1], pure=False)
        facts, windows = first.result()
        collected = Collected(job, facts, windows, out)
        tasks = _tasks(collected, windows, len(workers))
        bar = Bar(sum(exact_runs(todo) + row_cost(todo) for todo in tasks), progress)
        futures: dict[Any, float] = {}
        try:
            bar.at(f"{len(workers)} workers")
            top = widest(collected.points)
            for number, todo in enumerate(tasks):
                own = tuple({w: None for item in todo for w in item.windows})
                exact: float = exact_runs(todo)
                for part in _parts(todo):
                    # Earlier points first; another worker only where this one is lost or late.
                    future = client.submit(
                        _run, name, where, job, facts, top, own, part, pure=False,
                        workers=[workers[number % len(workers)]], allow_other_workers=True,
                        priority=-len(futures),
                    )  # fmt: skip
                    futures[future] = row_cost(part) + exact
                    exact = 0  # a worker makes them with its first task
            for future, frames in distributed.as_completed(list(futures), with_results=True):
                for rows in frames:
                    collected.add(rows)
                    bar.at(_title(rows))
                bar.done(futures.pop(future))
                future.release()
        finally:
            client.cancel(list(futures))
            bar.close()
    finally:
        # Tasks, and not client.run: a model is let go on the thread that ran it.
        left = [
            client.submit(_release, name, workers=[address], pure=False)
            for address in _addresses(client)
            if address in workers
        ]
        client.gather(left, errors="skip")
    return collected


def _tasks(collected: Collected, windows: Sequence[Window], workers: int) -> list[list[Todo]]:
    """Deals the prompts out: for each part of them the points that lack rows."""
    size = min(BLOCK, -(-len(windows) // workers))
    return [todo for block in blocks(windows, size) if (todo := collected.todo(block))]


def _parts(todo: Sequence[Todo]) -> list[list[Todo]]:
    """Cuts a worker's points into tasks: one for all replays, which are quick, one a lossy."""
    ordered = in_order(todo)
    replays = [item for item in ordered if not item.point.lossy]
    return [*([replays] if replays else []), *([item] for item in ordered if item.point.lossy)]


def _title(rows: pd.DataFrame) -> str:
    first = rows.iloc[0]
    return f"C={first['capacity']} {first['on_miss']} {first['policy']} is done"


def _imported(client: Any) -> Any:
    try:
        import distributed
    except ImportError as error:
        raise StudyError(
            "client= needs dask.distributed, which is not installed. Install it with "
            "pip install 'moelab[distributed]', or leave client away to run in this process."
        ) from error
    if not isinstance(client, distributed.Client):
        raise StudyError(
            f"client is a dask.distributed.Client, got {type(client).__name__}. Make one with "
            "Client(LocalCluster(n_workers=2, threads_per_worker=1, processes=True))."
        )
    return distributed


def _addresses(client: Any) -> list[str]:
    return sorted(client.scheduler_info(n_workers=-1)["workers"])


def _workers(client: Any) -> list[str]:
    """Returns the workers' addresses; each must be a process of its own with one thread."""
    told: Mapping[str, Any] = client.scheduler_info(n_workers=-1)["workers"]
    advice = (
        "MLX's work belongs to threads, and a process holds one model: make workers with "
        "threads_per_worker=1, processes=True."
    )
    if not told:
        raise StudyError("The cluster has no worker. Start some, or leave client away.")
    many = {address: w["nthreads"] for address, w in told.items() if w["nthreads"] != 1}
    if many:
        address, threads = next(iter(many.items()))
        raise StudyError(
            f"{len(many)} of {len(told)} workers have more than one thread ({address}: "
            f"{threads}). {advice}"
        )
    places = list(client.run(_place).values())
    if len(set(places)) < len(places) or _place() in places:
        raise StudyError(f"Some workers share a process with others or with this one. {advice}")
    return sorted(told)


def _place() -> tuple[str, int]:
    return socket.gethostname(), os.getpid()


# -- in a worker ---------------------------------------------------------------------------


def _lab(name: str, model: str, job: Job) -> Any:
    """Returns this worker's lab for a sweep; it is loaded once."""
    if _HELD.get("name") != name:
        _let_go()
        from ..loading import load

        lab = load(model, job.wanted.capacities[0], **job.options)
        _HELD.update(name=name, lab=lab)
    return _HELD["lab"]


def _describe(name: str, model: str, job: Job) -> tuple[ModelFacts, list[Window]]:
    """Says what a sweep must know of the model, and cuts the prompts."""
    lab = _lab(name, model, job)
    windows = job.windows(lab.tokenizer)
    return measured_facts(lab, job.wanted), windows


def _run(
    name: str,
    model: str,
    job: Job,
    facts: ModelFacts,
    top: Sequence[int],
    own: Sequence[Window],
    todo: Sequence[Todo],
) -> list[pd.DataFrame]:
    """Makes the rows of some points, for prompts whose exact runs this worker keeps."""
    lab = _lab(name, model, job)
    if lab.fingerprint != facts.fingerprint:
        raise StudyError(
            f"{model} is another model on this worker ({lab.fingerprint}) than on the first "
            f"({facts.fingerprint}). All workers must open the same files."
        )
    if "runner" not in _HELD:
        _HELD["runner"] = Runner(lab, facts, top, split=job.split)
    return list(run_block(_HELD["runner"], todo, None, keep=own))


def _release(name: str) -> None:
    if _HELD.get("name") == name:
        _let_go()


def _let_go() -> None:
    lab = _HELD.pop("lab", None)
    _HELD.clear()
    if lab is not None:
        lab.close()
