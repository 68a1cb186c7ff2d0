"""Runs a text in mlx-lm's own loop, its next tokens forced, and takes the time of each pass."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..lab import PREFILL_STEP, Lab

if TYPE_CHECKING:
    import mlx.core as mx

    from ..experts.residency import Load


class Live:
    """A prompt and forced tokens after it in mlx-lm's own loop, timed; nothing else listens.

    Args:
        lab: The model; its bank stays as it is.
        tokens: The text, at least `prompt + decoded + 2` tokens.
        prompt: Tokens of the prompt.
        decoded: Tokens after the first.

    Attributes:
        chunks: Of each chunk of the prompt: seconds, tokens, and loads by layer.
        first: Seconds to the first token.
        first_loads: Loads until then, in all layers.
        steps: Of each later token: seconds, layers with a load, loads.
    """

    def __init__(self, lab: Lab, tokens: Sequence[int], prompt: int, decoded: int) -> None:
        import mlx.core as mx
        from mlx_lm.generate import generate_step, generation_stream

        self.chunks: list[tuple[float, int, Counter[int]]] = []
        self.steps: list[tuple[float, int, int]] = []
        self._loads: Counter[int] = Counter()
        self._done, self._at = 0, 0.0
        self.first_loads = 0
        forced = iter(tokens[prompt:])

        def sampler(logprobs: mx.array) -> mx.array:
            # Hangs on the logits, as a token that the model chose: the loop must wait for them.
            return mx.argmax(logprobs, axis=-1) * 0 + next(forced)

        watchers = lab.attachment.bank.watchers
        watchers.append(self)
        try:
            # The loop is one pass ahead: what an earlier run left under way is not this one's.
            mx.synchronize()
            mx.synchronize(generation_stream)
            begin = time.perf_counter()
            steps = generate_step(
                mx.array(list(tokens[:prompt])), lab.model, max_tokens=decoded + 1,
                sampler=sampler, prefill_step_size=PREFILL_STEP,
                prompt_progress_callback=self._progress,
            )  # fmt: skip
            next(steps)
            last = time.perf_counter()
            self.first = last - begin
            self.first_loads += self._loads.total()
            self._loads.clear()
            for _ in range(decoded):
                next(steps)
                now = time.perf_counter()
                self.steps.append((now - last, len(self._loads), self._loads.total()))
                self._loads.clear()
                last = now
            steps.close()
        finally:
            watchers.remove(self)

    @property
    def decode_seconds(self) -> float:
        """Seconds of all tokens after the first."""
        return sum(seconds for seconds, _, _ in self.steps)

    def loaded(self, layer: int, loads: Sequence[Load], seconds: Sequence[float]) -> None:
        """See `experts.bank.Watcher`."""
        self._loads[layer] += len(loads)

    def _progress(self, done: int, total: int) -> None:
        now = time.perf_counter()
        if done > self._done and done < total:
            self.chunks.append((now - self._at, done - self._done, Counter(self._loads)))
        self.first_loads += self._loads.total()
        self._loads.clear()
        self._done, self._at = done, time.perf_counter()
