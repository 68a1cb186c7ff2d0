"""Judges a lossy run of a window against the exact run of the same window.

The exact run, `on_miss="load"`, is the full model, so it works where the full model does not fit:
one model is in memory, and the full run's distributions wait in memory or, where they are large,
in a file without a name. Both runs begin from the same exactly run prefix, and the bank begins
from its declared initial contents.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import mlx.core as mx
import numpy as np

from ..errors import MoelabError, StudyError
from ..experts.misses import Load, MissAction, resolve_action
from ..lab import PREFILL_STEP, Lab
from .divergence import CONSTRAINED, REFERENCE, check_finite, diverge
from .imposed import RouterInputs
from .snapshots import Snapshots
from .store import ArrayStore, Rows, mapped
from .window import Window

if TYPE_CHECKING:
    import pandas as pd

Arm = Literal["constrained", "imposed", "own"]
"""A run under the action; the same with the full model's routing imposed; the same with the full
model's past. See `moelab.quality.arms`."""


@dataclass(frozen=True)
class Stock:
    """A model that mlx-lm loaded, all its experts in memory, as a reference."""

    model: Any
    tokenizer: Any


class Reference:
    """The exact run of a window: what a constrained run is judged against.

    Args:
        lab: The model. It runs exactly, whatever its own miss action is; afterwards it has its own
            action again, and its bank its initial contents.
        window: What to run.
        chunk: Tokens a forward pass after the prefix; None for one at a time, as in decoding. A
            run that is judged against this has the same passes.
        record: Keep what the routers chose.
        arms: Keep what the other arms need: see `moelab.quality.arms`.
        kept_bytes: Logits are held in memory up to this size; None for `store.KEPT_BYTES`.

    Attributes:
        lab: The model.
        window: The window.
        chunk: As given.
        routing: With `record`, the run's routing frame; else None.
        inputs: With `arms`, what the routers saw; else None.
        snapshots: With `arms`, the cache after each pass; else None.

    Raises:
        StudyError: If a logit is NaN or infinite, or arms cannot be had for this family.
        MoelabError: While the lab is being recorded.
    """

    def __init__(
        self,
        lab: Lab | Stock,
        window: Window,
        *,
        chunk: int | None = None,
        record: bool = False,
        arms: bool = False,
        kept_bytes: int | None = None,
    ) -> None:
        self.lab = lab
        self.window = window
        self.chunk = checked_chunk(chunk)
        self.routing: pd.DataFrame | None = None
        self.inputs: RouterInputs | None = None
        self.snapshots: Snapshots | None = None
        self._rows: Rows | None = None
        self._kept_bytes = kept_bytes
        if arms:
            if not isinstance(lab, Lab):
                raise StudyError(
                    "Arms need the full run of the model that is judged: leave reference out."
                )
            store = ArrayStore()
            self.snapshots = Snapshots(store)
            self.inputs = RouterInputs(lab.model, lab.sites, store)
        with exactly(lab):
            self._cache = run_prefix(lab.model, window)
            if isinstance(lab, Lab):
                lab.reset()
            noting = self.inputs.noting() if self.inputs else contextlib.nullcontext()
            with noting, recorded(lab, record) as recording:
                self._run(lab.model)
            if recording is not None:
                self.routing = recording.routing

    def _run(self, model: Any) -> None:
        for at, logits in passes(
            model, self.window, self.cache(), self.chunk, REFERENCE, self._keep
        ):
            if self._rows is None:
                self._rows = Rows(self.window.judged, logits.shape[-1], self._kept_bytes)
            self._rows.put(at, logits)

    def _keep(self, cache: list[Any], number: int, tokens: int) -> None:
        if self.snapshots is not None and self.inputs is not None:
            self.snapshots.note(cache, tokens)
            self.inputs.next()

    def cache(self) -> list[Any]:
        """Returns a copy of the cache after the prefix, to go on from."""
        return copied(self._cache)

    def logits(self, start: int, stop: int) -> np.ndarray:
        """Returns the full model's logits of some judged tokens, (rows, vocabulary), float32."""
        assert self._rows is not None
        return self._rows.get(start, stop)


def judge(
    lab: Lab,
    window: Window,
    reference: Reference,
    on_miss: str | MissAction,
    *,
    swap_budget: int | None = None,
    kv_bits: int | None = None,
) -> pd.DataFrame:
    """Runs a window under a miss action and compares each prediction with the full model's.

    The prefix is the exact run's. Then the bank is reset to its initial contents, and the tokens
    after the prefix go through the action. Afterwards the lab has the action and swap budget that
    it had, and its bank its initial contents, also after an error or an interrupt.

    Args:
        lab: The model; it may have been resized since the reference was made.
        window: What to run; the reference's.
        reference: The exact run of the same window.
        on_miss: What happens on a miss.
        swap_budget: Experts a layer that may enter after a step; None for the layer's top-k.
        kv_bits: Bits of the key-value cache after the prefix: 8, 4 or None for the model's own.

    Returns:
        A row a judged token: `document`, `domain`, `position` (int32, the token's place in the
        text), `phase` ("decode"; "chunk" where several tokens share a forward pass), `token_id`
        (int32), `logprob` and `logprob_reference` (float64, nats, of the true token), `kl`
        (float64, nats, KL(full ‖ constrained)), `same_top1` (bool), `entropy` and
        `entropy_reference` (float64, nats).

    Raises:
        StudyError: If the reference is of another window, or a logit is NaN or infinite.
        MissActionError: If the action cannot be had for this model.
        MoelabError: While the lab is being recorded.
    """
    return judged(lab, window, reference, on_miss, swap_budget=swap_budget, kv_bits=kv_bits)[0]


def judged(
    lab: Lab,
    window: Window,
    reference: Reference,
    on_miss: str | MissAction,
    *,
    swap_budget: int | None = None,
    kv_bits: int | None = None,
    arm: Arm = "constrained",
    record: bool = False,
) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    """As `judge`, in one of the arms; also returns the run's routing frame, if `record`."""
    if reference.window != window:
        raise StudyError(
            f"The reference is of another window ({reference.window.document!r}, "
            f"{len(reference.window.tokens)} tokens) than the one to judge ({window.document!r}, "
            f"{len(window.tokens)} tokens). Make a Reference for each window."
        )
    inputs, snapshots = reference.inputs, reference.snapshots
    if arm != "constrained" and (inputs is None or snapshots is None or reference.lab is not lab):
        raise StudyError(
            f"The arm {arm!r} needs the same lab's full run with what its routers saw and its "
            "caches: make it with Reference(lab, window, arms=True)."
        )
    parts = []

    def after(cache: list[Any], number: int, tokens: int) -> None:
        if arm == "imposed" and inputs is not None:
            inputs.next()
        if arm == "own" and snapshots is not None:
            snapshots.restore(cache, number, tokens)

    with as_before(lab):
        if reference.lab is lab:
            cache = reference.cache()
        else:
            put_action(lab, Load(), None)
            cache = run_prefix(lab.model, window)
        cache = quantised(cache, kv_bits)
        put_action(lab, on_miss, swap_budget)
        # After the action, whose say in the selection then is inside of what is imposed.
        imposing = inputs.imposing() if arm == "imposed" and inputs else contextlib.nullcontext()
        with imposing, recorded(lab, record) as recording:
            for at, logits in passes(lab.model, window, cache, reference.chunk, CONSTRAINED, after):
                count = len(logits)
                wanted = np.array(window.wanted[at : at + count])
                parts.append(diverge(reference.logits(at, at + count), logits, wanted))
        routing = None if recording is None else recording.routing
    columns = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in (
            "logprob", "logprob_reference", "kl", "same_top1", "entropy", "entropy_reference"
        )
    }  # fmt: skip
    return frame_of(window, phase_of(reference.chunk), columns), routing


def frame_of(window: Window, phase: str, columns: dict[str, np.ndarray]) -> pd.DataFrame:
    """Returns a row a judged token of a window, with these columns after the keys."""
    import pandas as pd

    return pd.DataFrame(
        {
            "document": window.document,
            "domain": window.domain,
            "position": np.array(window.positions, np.int32),
            "phase": phase,
            "token_id": np.array(window.wanted, np.int32),
            **columns,
        }
    )


def phase_of(chunk: int | None) -> str:
    """Returns what the tokens' phase is called."""
    return "decode" if chunk is None else "chunk"


def checked_chunk(chunk: int | None) -> int | None:
    """Returns a chunk size that is one.

    Raises:
        StudyError: If it is no int from 1 on, nor None.
    """
    if chunk is None or (isinstance(chunk, int) and not isinstance(chunk, bool) and chunk > 0):
        return chunk
    raise StudyError(
        f"chunk is how many tokens share a forward pass, an int from 1 on, or None for one at a "
        f"time as in decoding, got {chunk!r}."
    )


# -- running -------------------------------------------------------------------------------


def run_prefix(model: Any, window: Window) -> list[Any]:
    """Runs a window's prefix, as one chunk of a prompt, and returns the cache after it."""
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    for start in range(0, window.prefix, PREFILL_STEP):
        stop = min(start + PREFILL_STEP, window.prefix)
        mx.eval(model(mx.array([window.tokens[start:stop]]), cache=cache))
        mx.eval([part.state for part in cache])
    return cache


def passes(
    model: Any,
    window: Window,
    cache: list[Any],
    chunk: int | None,
    run: str,
    after: Callable[[list[Any], int, int], None],
) -> Iterator[tuple[int, np.ndarray]]:
    """Runs the tokens after the prefix; yields each pass's place and finite logits, float32.

    Args:
        model: mlx-lm's model.
        window: What to run.
        cache: The cache after the prefix; it is changed.
        chunk: Tokens a pass; None for one.
        run: What an error calls the run.
        after: Called with the cache, the pass's number and its tokens when it was evaluated.
    """
    fed, step = window.fed, chunk or 1
    for number, at in enumerate(range(0, len(fed), step)):
        tokens = fed[at : at + step]
        logits = one_pass(model, tokens, cache)
        check_finite(
            logits, document=window.document, first_position=window.prefix + 1 + at, run=run
        )
        after(cache, number, len(tokens))
        yield at, logits


def one_pass(model: Any, tokens: Sequence[int], cache: list[Any]) -> np.ndarray:
    """Runs some tokens and returns their logits, (tokens, vocabulary), float32."""
    logits = model(mx.array([list(tokens)]), cache=cache)[0].astype(mx.float32)
    mx.eval(logits, [part.state for part in cache])
    return np.array(logits)


def copied(cache: list[Any]) -> list[Any]:
    """Returns a cache with the same contents, which going on from does not change the first."""
    # Caches write into their arrays in place, so the arrays must be others too.
    twin: list[Any] = mapped(cache, mx.array, mx.array)
    return twin


def quantised(cache: list[Any], bits: int | None) -> list[Any]:
    """Returns the cache with keys and values at few bits, as mlx-lm's `kv_bits` does.

    Raises:
        StudyError: If bits are none that mlx-lm takes, a layer's cache has no such form, or the
            model would go on with the cache as it is.
    """
    from mlx_lm.models.cache import CacheList

    if bits is None:
        return cache
    if bits not in (4, 8):
        raise StudyError(f"kv_bits must be 8, 4 or None, got {bits!r}.")
    found = []
    for part in cache:
        if isinstance(part, CacheList):
            # mlx-lm would leave it as it is, and say nothing.
            raise StudyError(
                f"This model's CacheList cannot be held at {bits} bits. Leave kv_bits out."
            )
        if not hasattr(part, "to_quantized"):  # recurrent states stay, as in mlx-lm
            found.append(part)
            continue
        try:
            found.append(part.to_quantized(group_size=64, bits=bits))
        except (NotImplementedError, ValueError) as error:
            raise StudyError(
                f"This model's {type(part).__name__} cannot be held at {bits} bits: {error}. "
                "Leave kv_bits out."
            ) from error
    if not any(hasattr(part, "to_quantized") for part in cache):
        raise StudyError(
            f"This model's cache has no keys and values, and nothing to hold at {bits} bits. Leave "
            "kv_bits out."
        )
    return found


# -- the lab's state -----------------------------------------------------------------------


@contextlib.contextmanager
def as_before(lab: Lab) -> Iterator[None]:
    """Gives the lab its action and swap budget back, and its bank its initial contents."""
    lab._check_open()
    if lab.sessions:
        raise MoelabError(
            "The lab is being recorded, and judging resets its bank. Leave the "
            "`with lab.record()` block first."
        )
    action, budget = lab.miss_action, lab.swap_budget
    try:
        yield
    finally:
        if not lab._closed:
            put_action(lab, action, budget)


@contextlib.contextmanager
def exactly(lab: Lab | Stock) -> Iterator[None]:
    """Runs exactly while the block runs."""
    if isinstance(lab, Stock):
        yield
        return
    with as_before(lab):
        # Copies at few bits stay: the lab's own action comes back, and for a large model they are
        # gigabytes to read again.
        lab.attachment.set_action(Load(), None, keep_copies=True)
        yield


def put_action(lab: Lab, on_miss: str | MissAction, swap_budget: int | None) -> None:
    """Gives the lab an action, and its bank the initial contents."""
    action = resolve_action(on_miss)
    if lab.miss_action == action and lab.swap_budget == swap_budget:
        lab.reset()
        return
    with warnings.catch_warnings():
        # Who asked for wrong_slot has been told; not once more for each text.
        warnings.filterwarnings("ignore", message="on_miss='wrong_slot'")
        lab.set_on_miss(action, swap_budget=swap_budget)


@contextlib.contextmanager
def recorded(lab: Lab | Stock, record: bool) -> Iterator[Any]:
    """Records the block if asked to; gives the recording or None."""
    if not record or isinstance(lab, Stock):
        yield None
        return
    with lab.record() as recording:
        yield recording
