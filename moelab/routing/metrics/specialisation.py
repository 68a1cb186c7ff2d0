"""What experts are for: domains, tokens, and how much a domain tells beyond the token itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import StudyError
from .choices import Choices, choices
from .frames import Array, Experts, tidy

if TYPE_CHECKING:
    import pandas as pd


def domain_specialisation(
    routing: Any, *, phase: str | None = None, experts: Experts = None
) -> pd.DataFrame:
    """Gives the share of a domain's tokens that choose each expert (OLMoE, 2409.02060, eq. 7).

    Args:
        routing: A recording, its `routing`, or what `labelled` gives.
        phase: Only this phase; None for all, each apart.
        experts: Experts of the layers; None for what the recording says, else the highest id + 1.

    Returns:
        A row a domain, phase, layer and expert: `expert`, `tokens` (int64: of the domain),
        `share` (float64), `chance` (uniform routing: k/E).

    Raises:
        SchemaError: If the frame is not as moelab writes it.
    """
    import pandas as pd

    columns = ["domain", "phase", "layer", "expert", "tokens", "share", "chance"]
    parts = []
    for layer in choices(routing, phase=phase, experts=experts):
        found = np.bincount(layer.slots()[1], minlength=layer.experts)
        parts.append(
            pd.DataFrame(
                {
                    **layer.key,
                    "expert": np.arange(layer.experts),
                    "tokens": len(layer.ids),
                    "share": found / len(layer.ids),
                    "chance": layer.top_k / layer.experts,
                }
            )
        )
    return pd.concat(parts, ignore_index=True)[columns] if parts else tidy([], columns)


def token_shares(
    routing: Any, *, least: int = 1, phase: str | None = None, experts: Experts = None
) -> pd.DataFrame:
    """Gives the share of a token id's occurrences that choose each expert (OLMoE, eq. 8).

    Args:
        routing: As for `domain_specialisation`.
        least: Token ids that occur less often are left out.
        phase: As for `domain_specialisation`.
        experts: As for `domain_specialisation`.

    Returns:
        A row a domain, phase, layer, token id and expert that it chose: `token_id`, `expert`,
        `occurrences` (int64), `share` (float64), `chance` (uniform routing: k/E).

    Raises:
        SchemaError: As for `domain_specialisation`.
        StudyError: If `least` is no int from 1 on.
    """
    import pandas as pd

    columns = ["domain", "phase", "layer", "token_id", "expert", "occurrences", "share", "chance"]
    _check_count("least", least)
    parts = []
    for layer in choices(routing, phase=phase, experts=experts, extra=("token_id",)):
        ids, place, often = _vocabulary(layer)
        row, expert = layer.slots()
        pair, count = np.unique(place[row] * layer.experts + expert, return_counts=True)
        number, chosen = np.divmod(pair, layer.experts)
        keep = often[number] >= least
        number, chosen, count = number[keep], chosen[keep], count[keep]
        parts.append(
            pd.DataFrame(
                {
                    **layer.key,
                    "token_id": ids[number],
                    "expert": chosen,
                    "occurrences": often[number],
                    "share": count / often[number],
                    "chance": layer.top_k / layer.experts,
                }
            )
        )
    return pd.concat(parts, ignore_index=True)[columns] if parts else tidy([], columns)


def vocabulary_specialisation(
    routing: Any,
    *,
    least: int = 1,
    permutations: int = 20,
    seed: int = 0,
    phase: str | None = None,
    experts: Experts = None,
) -> pd.DataFrame:
    """Says how far a layer routes by the token alone (OLMoE, eq. 8 and code).

    For each token id, the share of its occurrences that choose an expert, at its most chosen
    expert; averaged over ids. An id that occurs once has the share 1 whatever the router does, so
    the figure means little without its null: the same after the tokens' choices were dealt out
    anew among all tokens of the domain, so that ids keep their frequencies and experts theirs.

    Args:
        routing: As for `domain_specialisation`.
        least: Token ids that occur less often are left out of the average.
        permutations: How often choices are dealt out anew.
        seed: Of that.
        phase: As for `domain_specialisation`.
        experts: As for `domain_specialisation`.

    Returns:
        A row a domain, phase and layer: `ids`, `tokens` (int64, those that were averaged over),
        `share` (float64), `null_mean` and `null_95` (of the permutations; the second is the 95th
        percentile), `chance` (uniform routing of ids that occur very often: k/E).

    Raises:
        SchemaError: As for `domain_specialisation`.
        StudyError: If no id occurs that often, or an argument is no int from 1 on.
    """
    _check_count("least", least)
    _check_count("permutations", permutations)
    columns = ("ids", "tokens", "share", "null_mean", "null_95", "chance")
    rows = []
    for layer in choices(routing, phase=phase, experts=experts, extra=("token_id",)):
        _, place, often = _vocabulary(layer)
        keep = often >= least
        if not keep.any():
            raise StudyError(
                f"No token id of {layer.domain}, {layer.phase} occurs {least} times; the most "
                f"frequent one does {int(often.max(initial=0))} times. Ask for less (least=)."
            )
        row, expert = layer.slots()
        rng = np.random.default_rng(seed)
        null = [
            _most_chosen(rng.permutation(place)[row], expert, often, layer.experts)[keep].mean()
            for _ in range(permutations)
        ]
        rows.append(
            {
                **layer.key,
                "ids": int(keep.sum()),
                "tokens": int(often[keep].sum()),
                "share": _most_chosen(place[row], expert, often, layer.experts)[keep].mean(),
                "null_mean": float(np.mean(null)),
                "null_95": float(np.quantile(null, 0.95)),
                "chance": layer.top_k / layer.experts,
            }
        )
    return tidy(rows, ("domain", "phase", "layer", *columns))


def domain_information(
    routing: Any,
    *,
    permutations: int = 200,
    seed: int = 0,
    phase: str | None = None,
    experts: Experts = None,
) -> pd.DataFrame:
    """Says how much the domain of a text tells of the expert beyond the token itself, in bits.

    The conditional mutual information I(expert; domain | token id) of a routed slot drawn at
    random, from the slots' frequencies; and for comparison I(expert; domain), which counts what
    domains say only because they use other words. Frequencies overstate information, so each
    stands beside what it is where there is none, by permutation:

    - `null = "token"`: tokens (of the same id, for the conditional one) change domains one by one.
      It takes tokens as independent, which tokens of one text are not, and so finds too much.
    - `null = "document"`: whole documents change domains, so that all that tokens of a document
      share stays together. This is the test to cite. Documents bring their words along, and with
      other words the overstatement is another; so what is compared is the information above one
      change of tokens within the permuted domains, and it is given as bits above `null_mean` of
      the other null.

    A document is named by a column `document`, else it is a sequence of a run.

    Args:
        routing: What `labelled` gives, of two domains at least.
        permutations: How many.
        seed: Of them.
        phase: As for `domain_specialisation`.
        experts: As for `domain_specialisation`.

    Returns:
        A row a phase, layer, `given` (`"nothing"`, `"token"`) and `null`: `documents`, `tokens`
        (int64), `bits` (float64), `null_mean`, `null_95` (the 95th percentile), `excess` (`bits`
        − `null_mean`), `p` (share of the permutations, with the data, that reach `bits`), `of`
        (bits of H(expert) or H(expert | token id), of which this is a part; log₂k of it is only
        that the slot is one of the token's k).

    Raises:
        SchemaError: As for `domain_specialisation`.
        StudyError: If there are fewer than two domains, or one document in each.
    """
    _check_count("permutations", permutations)
    groups: dict[tuple[str, int], list[Choices]] = {}
    for layer in choices(routing, phase=phase, experts=experts, extra=("token_id",)):
        groups.setdefault((layer.phase, layer.layer), []).append(layer)
    columns = ("given", "null", "documents", "tokens", "bits", "null_mean", "null_95", "excess",
               "p", "of")  # fmt: skip
    rows = []
    for (own, number), layers in groups.items():
        slots = _Slots.of(layers)
        for given in ("nothing", "token"):
            counted = _Information(slots, by_token=given == "token")
            bits = counted.bits(slots.domain)
            for null, found in counted.nulls(permutations, seed).items():
                rows.append(
                    {
                        "phase": own,
                        "layer": number,
                        "given": given,
                        "null": null,
                        "documents": len(slots.domain_of),
                        "tokens": len(slots.token),
                        "bits": bits,
                        "null_mean": float(found.mean()),
                        "null_95": float(np.quantile(found, 0.95)),
                        "excess": bits - float(found.mean()),
                        # Equal up to rounding counts as reaching it.
                        "p": float((found >= bits - 1e-9).sum() + 1) / (permutations + 1),
                        "of": counted.entropy,
                    }
                )
    return tidy(rows, ("phase", "layer", *columns))


@dataclass(frozen=True, slots=True, eq=False)
class _Slots:
    """The routed slots of one layer and phase, all domains together."""

    token: Array
    """(tokens,): number of the token id."""
    text: Array
    """(tokens,): number of the document, from 0."""
    domain: Array
    """(tokens,): number of the domain."""
    domain_of: Array
    """(documents,)."""
    row: Array
    """(slots,): its token."""
    expert: Array
    """(slots,)."""

    @staticmethod
    def of(layers: list[Choices]) -> _Slots:
        where = f"layer {layers[0].layer}, {layers[0].phase}"
        if len(layers) < 2:
            raise StudyError(
                f"Domains are compared, and {where} has only {layers[0].domain!r}. Put recordings "
                "of several domains together with moelab.metrics.labelled."
            )
        domain = np.repeat(np.arange(len(layers)), [len(c.ids) for c in layers])
        text = np.unique(np.concatenate([c.text for c in layers]), return_inverse=True)[1]
        token = np.concatenate([c.token_id for c in layers if c.token_id is not None])
        token = np.unique(token, return_inverse=True)[1]
        domain_of = np.zeros(int(text.max()) + 1, np.int64)
        domain_of[text] = domain
        if len(domain_of) == len(layers):
            raise StudyError(
                f"Each domain of {where} has one document, so documents cannot change domains and "
                "nothing can be said of domains. Record at least two documents a domain."
            )
        slots = [c.slots() for c in layers]
        offsets = np.cumsum([0, *(len(c.ids) for c in layers)])
        row = np.concatenate([r + o for (r, _), o in zip(slots, offsets[:-1], strict=True)])
        expert = np.concatenate([e for _, e in slots]).astype(np.int64)
        return _Slots(token, text, domain, domain_of, row, expert)


class _Information:
    """I(expert; domain), or that given the token id, for any labelling of tokens with domains."""

    def __init__(self, slots: _Slots, *, by_token: bool) -> None:
        self._slots = slots
        self._domains = len(np.unique(slots.domain))
        self._of_token = slots.token if by_token else np.zeros_like(slots.token)
        self._token = self._of_token[slots.row]
        pair = self._token * (int(slots.expert.max()) + 1) + slots.expert
        self._pair = np.unique(pair, return_inverse=True)[1].astype(np.int64)
        n = np.arange(len(pair) + 1, dtype=np.float64)
        self._n_log_n = n * np.log2(np.maximum(n, 1))
        self._fixed = self._sum(np.bincount(self._token)) - self._sum(np.bincount(self._pair))
        self.entropy = self._fixed / len(pair)
        """Bits of the expert, given the token id where that is asked for."""

    def bits(self, domain: Array) -> float:
        """Returns bits, for the domain of each token."""
        own = domain[self._slots.row]
        joint = np.bincount(self._pair * self._domains + own)
        given = np.bincount(self._token * self._domains + own)
        # Never below 0, but for rounding.
        return max((self._fixed + self._sum(joint) - self._sum(given)) / len(own), 0.0)

    def nulls(self, permutations: int, seed: int) -> dict[str, Array]:
        """Returns bits where domains tell nothing, (permutations,), by the name of the null."""
        rng = np.random.default_rng(seed)
        slots, order = self._slots, np.argsort(self._of_token, kind="stable")

        def dealt(domain: Array) -> Array:
            """Returns the domains dealt out anew among tokens of the same id."""
            labels = np.empty_like(domain)
            labels[order] = domain[np.lexsort((rng.random(len(domain)), self._of_token))]
            return labels

        tokens = np.array([self.bits(dealt(slots.domain)) for _ in range(permutations)])
        above = np.empty(permutations)
        for i in range(permutations):
            domain = rng.permutation(slots.domain_of)[slots.text]
            above[i] = self.bits(domain) - self.bits(dealt(domain))
        return {"document": tokens.mean() + above, "token": tokens}

    def _sum(self, counts: Array) -> float:
        return float(self._n_log_n[counts].sum())


def _vocabulary(layer: Choices) -> tuple[Array, Array, Array]:
    """Returns the token ids, the place of each token's id among them, and how often each occurs."""
    assert layer.token_id is not None
    ids, place, often = np.unique(layer.token_id, return_inverse=True, return_counts=True)
    return ids, place.astype(np.int64), often


def _most_chosen(number: Array, expert: Array, often: Array, experts: int) -> Array:
    """Returns (ids,): the share of an id's occurrences that choose its most chosen expert."""
    pair, count = np.unique(number * experts + expert, return_counts=True)
    most = np.zeros(len(often), np.int64)
    np.maximum.at(most, pair // experts, count)
    return most / often


def _check_count(argument: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise StudyError(f"{argument}= must be an int from 1 on, got {value!r}.")
