"""One family's trial: a tiny checkpoint is built and run with half of its experts in memory."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...errors import CheckpointError, MissActionError
from ...experts.misses import ACTIONS
from ...families import find_switches
from ...lab import Lab
from ..exact import compare
from .build import QUANT, build, prompt
from .configs import CONFIGS, QUANTS, SEEDS, config_of
from .oracle import NOT_VALID, applied_weights, noted_arguments, recorded_weights

Answer = Literal["yes", "no", "–"]

RUNS = ((72, 4), (5, 6), (1, 2))
"""Tokens of a prompt, long enough to need more experts than half, and decoded tokens after it."""

NO_SWITCH: dict[str, str] = {
    "dbrx": "its experts are separate modules that Python calls one after another: there is no "
    "switch that a bank could stand for",
}
"""Families with experts that moelab does not run, and why."""

NEEDS_METAL: dict[str, str] = {
    "muse_spark": "mlx-lm computes its attention, routing and sum in Metal kernels of its own, "
    "so that stock mlx-lm cannot run it here either",
}
"""Families that run on Apple's GPUs only."""

NO_ACTION: dict[str, tuple[tuple[str, ...], str]] = {
    "phimoe": (
        ("substitute", "reroute"),
        "its router takes the largest score, then the largest of the rest: there is no top k that "
        "a miss action could have a say in",
    ),
    "muse_spark": (
        ("drop", "substitute", "reroute"),
        "its kernels normalise and apply the weights, so that no miss action can change them",
    ),
}
"""Lossy miss actions that a family refuses, and why."""

ACTION_RUN = (8, 16)
"""Tokens of a prompt, and decoded tokens after it, under each lossy miss action. Some of
another group's experts must have entered before a reroute can choose any of them."""

CLOSE = 2e-6
"""Recorded weights may differ from the oracle's by so much, relatively: float32, scaled."""


@dataclass(slots=True)
class Trial:
    """What was found about one family."""

    family: str
    experts: str = "–"
    """MoE layers × experts, top-k."""
    direct: Answer = "–"
    """The bank reads experts from the checkpoint itself."""
    packed: Answer = "–"
    """The bank reads them from a pack file."""
    exact: Answer = "–"
    """Logits equal stock mlx-lm's, every bit, in prefill and decode; and again after closing."""
    weights: Answer = "–"
    """Recorded gate weights are the factors that the block applies."""
    actions: str = "–"
    """Lossy miss actions that run."""
    notes: list[str] = field(default_factory=list)
    failed: bool = False
    """Something is wrong that no list explains."""

    def fail(self, why: str) -> None:
        """Notes a failure."""
        self.failed = True
        self.notes.append(why)


class _Broken(Exception):
    """What a trial found to be wrong."""


def try_family(family: str, folder: Path) -> Trial:
    """Runs a family's trial.

    Args:
        family: mlx-lm's module.
        folder: An empty folder of its own.

    Returns:
        What was found; a failure is noted in it and not raised.
    """
    trial = Trial(family)
    if family not in CONFIGS:
        trial.fail(
            "no tiny configuration: add one to moelab/check/families/configs.py, or, if moelab "
            "cannot run it, say why in trial.py as well"
        )
        return trial
    impossible = NO_SWITCH.get(family)
    if not mx.metal.is_available():
        impossible = impossible or NEEDS_METAL.get(family)
    before = mx.default_device()
    # On a GPU the kernel of a prefill depends on the number of slots, and with it the last bits.
    mx.set_default_device(mx.gpu if family in NEEDS_METAL and impossible is None else mx.cpu)
    try:
        if impossible is None:
            _try(trial, folder)
        else:
            _be_refused(trial, folder, impossible)
    except Exception as error:  # whatever a family does, the table goes on
        trial.fail(str(error) if isinstance(error, _Broken) else f"{error!r}")
    finally:
        mx.set_default_device(before)
    return trial


def _be_refused(trial: Trial, folder: Path, why: str) -> None:
    """Makes sure that what is listed as impossible is refused, and not half done."""
    from ...loading import load

    build(folder, config_of(trial.family), chat_template=True)
    try:
        load(folder, 0.5).close()
    except CheckpointError:
        trial.notes.append(why)
    else:
        raise _Broken(f"moelab loads it, although it is listed as impossible: {why}")


def _try(trial: Trial, folder: Path) -> None:
    from ...checkpoint.pack import pack
    from ...loading import load

    family = trial.family
    build(
        folder,
        config_of(family),
        quant=QUANTS.get(family, QUANT),
        seed=SEEDS.get(family, 0),
        chat_template=True,  # without one mlx-lm looks for muse_spark's, which it lacks
    )
    model = _stock(folder)
    sites = find_switches(model, family)
    top_k = sorted({site.top_k for site in sites})
    trial.experts = f"{len(sites)} × {sites[0].experts}, top-{'/'.join(map(str, top_k))}"
    with noted_arguments(sites) as arguments:
        wanted = logits(model)
    oracle = {}
    if family in NOT_VALID:
        trial.notes.append(NOT_VALID[family])
    else:
        oracle = {
            site.layer: np.concatenate(
                [applied_weights(family, site, args) for args in arguments[site.layer]]
            )
            for site in sites
        }
    try:
        lab = load(folder, 0.5, pack=False)
        trial.direct = "yes"
    except CheckpointError as error:
        trial.direct = "no"
        trial.notes.append(str(error))
        pack(folder, progress=False)
        lab = load(folder, 0.5, pack=True)
        trial.packed = "yes"
    _compare(trial, lab, model, wanted, oracle)
    if trial.packed != "yes":
        _compare_packed(trial, folder, wanted)
    _try_actions(trial, folder)


def _compare_packed(trial: Trial, folder: Path, wanted: list[mx.array]) -> None:
    """Compares once more, with the experts from a pack file."""
    from ...checkpoint.pack import pack
    from ...loading import load

    trial.exact = trial.packed = "no"
    file = pack(folder, progress=False).stat()
    with load(folder, 0.5, pack=True) as lab:
        pieces = [p for bank in lab.attachment.bank.layers for p in bank.loader.pieces(0)]
        if not all(os.path.samestat(os.fstat(fd), file) for fd, _, _ in pieces):
            raise _Broken("there is a pack file, and the experts are read from elsewhere")
        _equal(logits(lab.model), wanted, "with experts from a pack file")
    trial.exact = trial.packed = "yes"


def _compare(
    trial: Trial,
    lab: Lab,
    model: nn.Module,
    wanted: list[mx.array],
    oracle: dict[int, np.ndarray],
) -> None:
    """Compares a lab with the stock model, recorded and not, and after it was closed."""
    trial.exact = "no"  # unless what follows comes to its end
    with lab:
        _equal(logits(lab.model), wanted, "with half of the experts")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with lab.record() as recording:
                _equal(logits(lab.model), wanted, "while it is recorded")
        _check_proof(recording, {bank.layer: bank.capacity for bank in lab.attachment.bank.layers})
    if [type(m) for m in lab.model.modules()] != [type(m) for m in model.modules()]:
        raise _Broken("after closing the model is not made of the same modules")
    _equal(logits(lab.model), wanted, "after closing")
    trial.exact = "yes"
    if not oracle:
        if recording.routing["weight"].notna().any():
            raise _Broken("weights are recorded, although there are said to be none")
        return
    trial.weights = "no"
    if said:
        raise _Broken(str(said[0].message))
    _compare_weights(recording, oracle)
    trial.weights = "yes"


def _try_actions(trial: Trial, folder: Path) -> None:
    """Runs under each lossy miss action; those that are listed must be refused, and no others."""
    from ...loading import load

    listed, why = NO_ACTION.get(trial.family, ((), ""))
    lossy = [name for name, action in ACTIONS.items() if action.lossy]
    with load(folder, 0.5) as lab:
        run = [name for name in lossy if _runs(lab, name)]
    refused = [name for name in lossy if name not in run]
    trial.actions = ", ".join(run) if refused else "all"
    if refused != list(listed):
        raise _Broken(
            f"it refuses {', '.join(refused) or 'no miss action'}, and "
            f"{', '.join(listed) or 'none'} is listed"
        )
    if why:
        trial.notes.append(why)


def _runs(lab: Lab, action: str) -> bool:
    """Runs under a lossy miss action; False if it is refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what wrong_slot is, and of weights that are not seen
        try:
            lab.on_miss = action
        except MissActionError:
            return False
        with lab.record() as recording:
            got = logits(lab.model, (ACTION_RUN,))
    if not all(mx.isfinite(array).all().item() for array in got):
        raise _Broken(f"logits are not finite under {action!r}")
    routing = recording.routing
    if not {"hit", action} <= set(routing["outcome"]):
        raise _Broken(f"nothing came of {action!r}: {sorted(set(routing['outcome']))}")
    if list(routing["step"].unique()) != list(range(1 + ACTION_RUN[1])):
        raise _Broken(f"a recording under {action!r} lacks steps")
    return True


def logits(model: Any, runs: Sequence[tuple[int, int]] | None = None) -> list[mx.array]:
    """Runs prompts, each on a cache of its own, and returns what every forward pass gave.

    Args:
        model: The model.
        runs: Tokens of each prompt, and decoded tokens after it; None for `RUNS`.
    """
    from mlx_lm.models.cache import make_prompt_cache

    found = []
    for seed, (length, decoded) in enumerate(RUNS if runs is None else runs):
        tokens = prompt(length + decoded, seed)
        cache = make_prompt_cache(model)
        for chunk in [tokens[:length], *([t] for t in tokens[length:])]:
            found.append(model(mx.array([chunk]), cache=cache))
            mx.eval(found)
    return found


def _stock(folder: Path) -> nn.Module:
    from mlx_lm.utils import load_model

    model: nn.Module = load_model(folder)[0]
    return model


def _equal(got: list[mx.array], wanted: list[mx.array], when: str) -> None:
    if not all(mx.isfinite(array).all().item() for array in wanted):
        raise _Broken("stock mlx-lm's logits are not finite: the tiny checkpoint is no good")
    difference = compare(got, wanted)
    if not difference.equal:
        raise _Broken(f"logits {when} differ from stock mlx-lm's by {difference.max_rel}")


def _check_proof(recording: Any, capacities: dict[int, int]) -> None:
    """Makes sure that a run proves something: a prefill was swept, and experts left in decode."""
    routing = recording.routing
    first = routing[(routing["run"] == 0) & (routing["step"] == 0)]
    for layer, capacity in capacities.items():
        needed = first.loc[first["layer"] == layer, "expert"].nunique()
        if needed <= capacity:
            raise _Broken(f"layer {layer}'s prefill needs {needed} experts only: nothing is swept")
    # The sweep has filled every slot, so that each of these made another expert leave.
    if routing.loc[routing["phase"] == "decode", "hit"].all():
        raise _Broken("nothing was missing in decoding: no expert had to leave")
    runs = [rows.tolist() for _, rows in recording.tokens.groupby("run")["position"]]
    if runs != [list(range(length + decoded)) for length, decoded in RUNS]:
        raise _Broken("recorded positions are not those of the tokens")


def _compare_weights(recording: Any, oracle: dict[int, np.ndarray]) -> None:
    for layer, expected in oracle.items():
        got = recorded_weights(recording.routing, recording.tokens, layer, expected.shape[1])
        if got.shape != expected.shape:
            raise _Broken(f"layer {layer}: weights of {len(got)} tokens, not {len(expected)}")
        if not np.allclose(got, expected, rtol=CLOSE, atol=CLOSE / 4):
            worst = float(np.abs(got - expected).max())
            raise _Broken(f"layer {layer}: recorded weights differ from the block's by {worst}")
