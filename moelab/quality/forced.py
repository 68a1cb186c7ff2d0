"""Log-probabilities of a given text, token by token, after a prefix that runs exactly.

A lossy action judged from a text's first token on is judged mostly by its prefill: a chunk is one
step, so hundreds of tokens meet the same initial bank. Here the prefix is exact, and each token
after it is one step, as in decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import mlx.core as mx

from ..errors import MoelabError
from ..experts.misses import resolve_action
from .judge import copied

if TYPE_CHECKING:
    import pandas as pd

    from ..experts.misses import MissAction
    from ..lab import Lab


class ForcedText:
    """A text whose prefix was run exactly, to be gone on from under any miss action.

    Args:
        lab: The model. Its miss action is set to `"load"`.
        tokens: The text's token ids.
        prefix: Tokens of it that run exactly, in one chunk; at least 1.

    Raises:
        MoelabError: If the text has not two tokens more than the prefix: the first one after it
            is predicted by the exact run.
    """

    def __init__(self, lab: Lab, tokens: Sequence[int], *, prefix: int) -> None:
        from mlx_lm.models.cache import make_prompt_cache

        if prefix < 1 or len(tokens) < prefix + 2:
            raise MoelabError(
                f"The text has {len(tokens)} tokens and its prefix {prefix}: the prefix needs at "
                "least one token, and the text at least two more. Take a longer text or a "
                "shorter prefix."
            )
        self.tokens = list(tokens)
        self.prefix = prefix
        self._lab = lab
        lab.on_miss = "load"
        self._cache = make_prompt_cache(lab.model)
        mx.eval(lab.model(mx.array([self.tokens[:prefix]]), cache=self._cache))
        mx.eval([part.state for part in self._cache])

    def score(
        self, on_miss: str | MissAction = "load", *, swap_budget: int | None = None
    ) -> pd.DataFrame:
        """Goes on under a miss action, from the bank's initial contents.

        Args:
            on_miss: What happens on a miss.
            swap_budget: See `moelab.load`.

        Returns:
            A row a token from the second one after the prefix on: `position` (int32), `token_id`
            (int32), `logprob` (float64, natural logarithm, of this token given those before it).
        """
        import pandas as pd

        lab = self._lab
        if (lab.miss_action, lab.swap_budget) == (resolve_action(on_miss), swap_budget):
            lab.reset()
        else:
            lab.set_on_miss(on_miss, swap_budget=swap_budget)
        cache = copied(self._cache)
        picked = []
        for given, wanted in zip(
            self.tokens[self.prefix : -1], self.tokens[self.prefix + 1 :], strict=True
        ):
            logits = lab.model(mx.array([[given]]), cache=cache)[0, -1].astype(mx.float32)
            picked.append(logits[wanted] - mx.logsumexp(logits))
            mx.async_eval(picked[-1])
        positions = range(self.prefix + 1, len(self.tokens))
        return pd.DataFrame(
            {
                "position": pd.Series(positions, dtype="int32"),
                "token_id": pd.Series(self.tokens[self.prefix + 1 :], dtype="int32"),
                "logprob": pd.Series([float(p.item()) for p in picked], dtype="float64"),
            }
        )
