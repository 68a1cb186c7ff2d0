"""What mlx-lm's generation loops know of the forward pass that they are making.

A forward pass sees token ids and a cache. Whether a single token is the prompt's last or the
first generated one, which row of a batch is which sequence, and which rows are padding, only the
loop knows. It tells nobody, and wrapping each of mlx-lm's loops would miss those that were
imported by name; so the callers' frames are read. Every loop that this knows is named here, and
`tests/test_recording_runs.py` runs each of them: a change in mlx-lm shows there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

DEPTH = 12
"""Frames to look up; mlx-lm's loops are two to four above the model's call."""

OURS = ("mlx.nn.", "mlx_lm.models.", "moelab.")
"""Modules that keep none of a layer's output for themselves."""

PADDING, PREFILL, DECODE = 0, 1, 2
PHASES = ("padding", "prefill", "decode")
"""Names of the phases, by code."""


@dataclass(frozen=True, slots=True)
class LoopView:
    """One forward pass as its loop sees it."""

    first_phase: int
    """Phase of each row's first token."""
    rest_phase: int
    """Phase of the tokens after it."""
    logits_used: bool = True
    """False for a chunk of a prompt of which only the cache is kept."""
    all_rows: bool = False
    """The loop uses the logits of every token, not only of the last."""
    batch: Any = None
    """The `BatchGenerator` that owns the rows; None outside of one."""
    sequences: Sequence[int] | None = None
    """The rows' own numbers in that batch."""
    lengths: Sequence[int] | None = None
    """Real tokens in each row of this pass; the others are padding at the right."""


CHUNK = LoopView(PREFILL, PREFILL, logits_used=False)
LAST_OF_PROMPT = LoopView(PREFILL, PREFILL)
GENERATED = LoopView(DECODE, DECODE)


def view(length: int) -> LoopView:
    """Describes the forward pass from which this is called.

    Args:
        length: Tokens a row; decides the phase where no loop of mlx-lm is found.
    """
    module = sys.modules.get("mlx_lm.generate")
    known = None if module is None else vars(module)
    frame: FrameType | None = sys._getframe(2)
    for _ in range(DEPTH):
        if frame is None:
            break
        if frame.f_globals is known:
            found = _in_mlx_lm(frame, length)
            if found is not None:
                return found
        frame = frame.f_back
    return GENERATED if length == 1 else LAST_OF_PROMPT


def output_unread() -> bool:
    """Returns whether nobody will read the output of the forward pass that calls this.

    So it is for a prompt's chunks, of which mlx-lm's loops keep only the cache. True only if
    nothing but mlx's, mlx-lm's and moelab's own code stands between the loop and the caller: a
    function or module of the user's may look at what passes through it.
    """
    module = sys.modules.get("mlx_lm.generate")
    known = None if module is None else vars(module)
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals is known:
            found = _in_mlx_lm(frame, 2)
            if found is not None:
                return not found.logits_used
        elif not frame.f_globals.get("__name__", "").startswith(OURS):
            return False
        frame = frame.f_back
    return False


def _in_mlx_lm(frame: FrameType, length: int) -> LoopView | None:
    name, caller = frame.f_code.co_qualname, frame.f_back
    if name == "generate_step.<locals>._step":
        # `n` counts generated tokens and is set once the prompt's last token has gone through.
        started = caller is not None and "n" in caller.f_locals
        return GENERATED if started else LAST_OF_PROMPT
    if name in ("generate_step", "speculative_generate_step.<locals>._prefill"):
        return CHUNK  # generate_step's other passes go through its _step, which is met first
    if name == "speculative_generate_step.<locals>._step":
        return _speculative(caller)
    if name == "PromptProcessingBatch.prompt":
        batch, local = frame.f_locals["self"], frame.f_locals
        done = local["max_length"] - local["tokens"].shape[1]
        lengths = [min(max(n - done, 0), length) for n in local["lengths"]]
        return LoopView(
            PREFILL, PREFILL, logits_used=False, batch=_owner(frame), sequences=list(batch.uids),
            lengths=lengths,
        )  # fmt: skip
    if name == "GenerationBatch._step":
        batch = frame.f_locals["self"]
        # The first pass of a new batch takes the prompts' last tokens and has no logprobs yet.
        phase = DECODE if len(batch._current_logprobs) else PREFILL
        return LoopView(phase, phase, batch=_owner(frame), sequences=list(batch.uids))
    return None


def _speculative(caller: FrameType | None) -> LoopView:
    """Describes a pass of speculative decoding; its first begins with the prompt's last token."""
    drafted: list[Any] | None = None
    if caller is not None and caller.f_code.co_name == "_draft_generate":
        drafted, caller = caller.f_locals.get("ys", []), caller.f_back
    started = caller is None or caller.f_locals.get("ntoks", 0) > 0
    if drafted is not None:  # the draft model: one token at a time
        return GENERATED if started or drafted else LAST_OF_PROMPT
    # The model itself: one certain token and some drafts.
    return LoopView(DECODE if started else PREFILL, DECODE, all_rows=True)


def _owner(frame: FrameType | None) -> Any:
    """Returns the `BatchGenerator` above `frame`."""
    for _ in range(DEPTH):
        if frame is None:
            return None
        if frame.f_code.co_qualname.startswith("BatchGenerator."):
            return frame.f_locals.get("self")
        frame = frame.f_back
    return None
