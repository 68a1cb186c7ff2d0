"""`Profile`: how a model's experts were used on some prompts.

A profile is what pins and first contents of the bank are chosen from. It counts three things for
every expert: how often it was routed to, with how much gate weight, and in how many prompts. The
last depends on how long the prompts were (in a long enough one every expert is used), so all
prompts of a profile have the same number of tokens, and the level that uniform routing would
reach at that length is given beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..display import facts_html, facts_text
from ..errors import ProfileError

if TYPE_CHECKING:
    import pandas as pd

    from ..routing.recording import Recording

THRESHOLD = 0.5
"""Prompt share from which an expert counts as universal, as in mlx-moe."""

PROMPT_TOKENS = 64
"""Tokens a prompt, unless asked otherwise. Short, since the longer a prompt the fewer experts it
leaves unused: of 64 experts with top-6, uniform routing uses all but .2% in 64 tokens."""

ALL = "all"
"""The domain of prompts that name none."""


class Layer(Protocol):
    """What a profile must know of an MoE layer; `families.SwitchSite` is one."""

    @property
    def layer(self) -> int:
        """Number of the decoder layer."""

    @property
    def experts(self) -> int:
        """Its routed experts."""

    @property
    def top_k(self) -> int:
        """Experts that a token chooses."""


@dataclass(frozen=True, eq=False, slots=True)
class Use:
    """How experts were used in one domain and phase. Arrays are (experts,), by layer."""

    domain: str
    phase: str
    """`"prefill"`: tokens of the prompt; `"decode"`: generated ones."""
    prompts: int
    """Stretches of equal length that `in_prompts` counts among."""
    tokens: int
    """Tokens that were routed."""
    counts: Mapping[int, np.ndarray]
    """int64: tokens that chose the expert."""
    mass: Mapping[int, np.ndarray]
    """float64: gate weight, summed over those tokens; NaN where the weights are not known."""
    in_prompts: Mapping[int, np.ndarray]
    """int64: prompts with at least one token that chose the expert."""


@dataclass(frozen=True, eq=False, repr=False)
class Profile:
    """How a model's experts were used; made by `moelab.profile`, `moelab.discover` or read.

    A profile that mlx-moe wrote has `activations` only: no fingerprint, no top-k, no `uses`.
    """

    model: str
    """What the model was called."""
    fingerprint: str | None
    """Names the checkpoint, see `Lab.fingerprint`; None in mlx-moe's files."""
    experts: Mapping[int, int]
    """Routed experts of each MoE layer, by number of the decoder layer, ascending."""
    top_k: Mapping[int, int] | None
    """Experts a token, by layer."""
    prompt_tokens: int | None
    """Tokens of each prompt that `activations` counts; None where it is not known."""
    phase_tokens: Mapping[str, int]
    """Tokens of each stretch that `Use.in_prompts` counts, by phase."""
    num_prompts: int
    """Prompts that `activations` counts among."""
    activations: Mapping[int, np.ndarray]
    """int64 (experts,) by layer: prompts in which the expert was used, in whatever phase."""
    uses: tuple[Use, ...] = ()
    """By domain and phase."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """What made it, from what, with which settings; JSON values."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the MoE layers."""
        return tuple(self.experts)

    @property
    def predicted(self) -> bool:
        """Whether no expert ran, so that this is what a router-only pass expects."""
        return bool(self.provenance.get("predicted", False))

    @property
    def domains(self) -> dict[str, int]:
        """Prompts by domain."""
        found: dict[str, int] = {}
        for use in self.uses:
            found[use.domain] = max(found.get(use.domain, 0), use.prompts)
        return found

    @property
    def usage(self) -> pd.DataFrame:
        """A row a (domain, phase, layer, expert), also for experts that were never used.

        - `count`: tokens that chose the expert; `share`: of all tokens; `uniform_share`: what
          uniform routing would give, k/E;
        - `mass`: summed gate weight; `mass_share`: of the layer's, uniform 1/E;
        - `prompts`: prompts in which it was used; `prompt_share`: of all; `uniform_prompt_share`:
          1 − (1 − k/E)ⁿ for prompts of n tokens (independent uniform routing).

        In a profile that mlx-moe wrote domain and phase are `"all"`, and what is not known is NaN.
        """
        import pandas as pd

        parts = []
        if not self.uses:
            for layer, found in self.activations.items():
                nan = np.full(len(found), np.nan)
                parts.append(self._rows(ALL, ALL, layer, nan, None, nan, found, self.num_prompts))
        for use in self.uses:
            for layer, counts in use.counts.items():
                parts.append(
                    self._rows(
                        use.domain, use.phase, layer, counts, use.tokens, use.mass[layer],
                        use.in_prompts[layer], use.prompts,
                    )
                )  # fmt: skip
        frame = pd.concat(parts, ignore_index=True)
        for name in ("domain", "phase"):
            frame[name] = pd.Categorical(frame[name], list(dict.fromkeys(frame[name])))
        return frame

    def shares(self, layer: int) -> np.ndarray:
        """Returns float64 (experts,): the share of prompts in which each expert was used."""
        return self._of(layer) / self.num_prompts

    def uniform_prompt_share(self, layer: int, phase: str | None = None) -> float:
        """Returns the prompt share of every expert if routing were uniform.

        1 − (1 − k/E)ⁿ: each of a prompt's n tokens chooses k of E experts, independently.

        Args:
            layer: The layer.
            phase: Whose stretches; None for whole prompts.

        Returns:
            The share; NaN where top-k or the prompts' length is not known.
        """
        tokens = self.prompt_tokens if phase is None else self.phase_tokens.get(phase)
        if self.top_k is None or tokens is None:
            return math.nan
        return 1.0 - (1.0 - self.top_k[layer] / self.experts[layer]) ** tokens

    def universal(self, threshold: float = THRESHOLD) -> dict[int, tuple[int, ...]]:
        """Returns, by layer, the experts that were used in at least this share of the prompts.

        Args:
            threshold: Between 0 and 1. Compare it with `uniform_prompt_share`: below that, most
                experts are universal even if the router has no preference.

        Raises:
            ProfileError: If the threshold is out of range.
        """
        if isinstance(threshold, bool) or not 0 <= threshold <= 1:
            raise ProfileError(
                f"The threshold is a share of prompts between 0 and 1, got {threshold!r}."
            )
        return {
            layer: tuple(np.flatnonzero(self.shares(layer) >= threshold).tolist())
            for layer in self.layers
        }

    def counts(self, layer: int) -> np.ndarray | None:
        """Returns int64 (experts,): tokens that chose each expert, all domains and phases.

        None where a profile does not know.
        """
        self._of(layer)
        if not self.uses:
            return None
        return np.sum([use.counts[layer] for use in self.uses], axis=0)

    def order(self, layer: int) -> list[int]:
        """Returns all the layer's experts, most used first.

        By tokens that chose them where that is known, else by prompts; then by prompts, by id.
        """
        prompts, counts = self._of(layer), self.counts(layer)
        keys = np.arange(len(prompts)), -prompts, -(prompts if counts is None else counts)
        return np.lexsort(keys).tolist()

    def orders(self) -> dict[int, list[int]]:
        """Returns `order` of every layer: what an empty bank is filled with first."""
        return {layer: self.order(layer) for layer in self.layers}

    def check(self, fingerprint: str, sites: Iterable[Layer]) -> None:
        """Raises unless this is a profile of that model.

        A profile without a fingerprint is taken, with a warning, if its layers and experts fit.

        Args:
            fingerprint: The model's.
            sites: The model's MoE layers.

        Raises:
            ProfileError: If it is of another model, or names layers or experts that the model
                lacks.
        """
        if self.fingerprint is not None and self.fingerprint != fingerprint:
            raise ProfileError(
                f"This profile was made from {self.model} (fingerprint {self.fingerprint}), and "
                f"the model that is loaded has fingerprint {fingerprint}: the same ids name other "
                "experts there. Make a profile of this model with `moelab profile`."
            )
        known = {site.layer: site.experts for site in sites}
        lacking = [layer for layer in self.layers if layer not in known]
        if lacking:
            raise ProfileError(
                f"This profile of {self.model} counts experts of layer {_some(lacking)}, and the "
                f"model's MoE layers are {_some(sorted(known))}. It is of another model."
            )
        for layer, experts in self.experts.items():
            if experts > known[layer]:
                raise ProfileError(
                    f"This profile of {self.model} has {experts} experts in layer {layer}, and the "
                    f"model has {known[layer]}. It is of another model."
                )
        if self.fingerprint is None:
            import warnings

            warnings.warn(
                f"This profile of {self.model} does not say which checkpoint it was made from; "
                "its layers and experts fit, so it is used. A profile that `moelab profile` makes "
                "is checked.",
                stacklevel=3,
            )

    def save(self, path: str | Path) -> Path:
        """Writes the profile as JSON, whole or not at all; see `profile_file.write_profile`."""
        from .profile_file import write_profile

        return write_profile(self, path)

    @classmethod
    def from_recording(
        cls, recording: Recording, *, tokens: int = PROMPT_TOKENS, domain: str = ALL
    ) -> Profile:
        """Makes a profile of what was recorded anyway.

        Every token counts. For counts by prompt, each sequence is cut into stretches of `tokens`
        tokens; what is left over at its end is in no stretch.

        Args:
            recording: See `Lab.record`.
            tokens: Length of a stretch.
            domain: What to call it.

        Raises:
            ProfileError: If nothing was recorded, no sequence is that long, or experts were not
                run as the router asked (a lossy miss action changes what it asks for later).
        """
        from .tally import Tally, check_lossless

        check_lossless(recording.run)
        run = recording.run
        tally = Tally(run["layers"], run["experts"])
        lengths = {"prefill": tokens, "decode": tokens}
        tally.add(recording.routing, recording.tokens, domain, lengths, tokens)
        return tally.profile(
            model=run["model"],
            fingerprint=run["fingerprint"],
            top_k=run["top_k"],
            phase_tokens=lengths,
            prompt_tokens=tokens,
            provenance={
                "made_by": "recording", "predicted": False, "capacity": run["capacity"],
                "versions": run["versions"], "started": run["started"],
            },
        )  # fmt: skip

    def _of(self, layer: int) -> np.ndarray:
        if layer not in self.activations:
            raise ProfileError(f"The profile has no layer {layer}; it has {_some(self.layers)}.")
        return self.activations[layer]

    def _rows(
        self,
        domain: str,
        phase: str,
        layer: int,
        counts: np.ndarray,
        tokens: int | None,
        mass: np.ndarray,
        prompts: np.ndarray,
        num_prompts: int,
    ) -> pd.DataFrame:
        import pandas as pd

        experts = self.experts[layer]
        top_k = math.nan if self.top_k is None else self.top_k[layer]
        total = mass.sum()
        return pd.DataFrame(
            {
                "domain": domain,
                "phase": phase,
                "layer": np.full(experts, layer, np.int16),
                "expert": np.arange(experts, dtype=np.int32),
                "count": counts,
                "share": counts / (tokens or math.nan),
                "uniform_share": top_k / experts,
                "mass": mass,
                "mass_share": mass / (total if total else math.nan),
                "prompts": prompts,
                "prompt_share": prompts / (num_prompts or math.nan),
                "uniform_prompt_share": self.uniform_prompt_share(
                    layer, phase if self.uses else None
                ),
            }
        )

    def _facts(self) -> dict[str, str]:
        sizes = sorted(set(self.experts.values()))
        span = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]}–{sizes[-1]}"
        facts = {
            "model": f"{self.model} ({self.fingerprint or 'fingerprint unknown'})",
            "experts": f"{len(self.layers)} layers of {span}"
            + ("" if self.top_k is None else f", top-{_range(self.top_k.values())}"),
            "prompts": f"{self.num_prompts:,} of {self.prompt_tokens or 'unknown'} tokens"
            + (" (routers only: predicted, not measured)" if self.predicted else ""),
        }
        if self.uses:
            facts["domains"] = ", ".join(f"{name} {n}" for name, n in self.domains.items())
            phases: dict[str, int] = {}
            for use in self.uses:
                phases[use.phase] = phases.get(use.phase, 0) + use.tokens
            facts["tokens"] = ", ".join(f"{n:,} {phase}" for phase, n in phases.items())
        half = [self._top_half(layer) for layer in self.layers]
        facts["busier half"] = (
            f"{np.mean(half):.0%} of {'routed slots' if self.uses else 'uses by prompt'} go to "
            f"the busier half of a layer's experts, {min(half):.0%} to {max(half):.0%} by layer "
            "(uniform 50%)"
        )
        universal = [len(found) for found in self.universal().values()]
        uniform = [self.uniform_prompt_share(layer) for layer in self.layers]
        facts["universal"] = (
            f"{np.mean(universal):.1f} experts a layer are used in at least {THRESHOLD:.0%} of "
            "the prompts"
            + (
                ""
                if any(map(math.isnan, uniform))
                else f" (if uniform, each in {min(uniform):.1%})"
            )
        )
        return facts

    def _top_half(self, layer: int) -> float:
        counts = self.counts(layer)
        values = np.sort(self._of(layer) if counts is None else counts)[::-1]
        return float(values[: (len(values) + 1) // 2].sum() / max(values.sum(), 1))

    def __repr__(self) -> str:
        return facts_text("Profile", self._facts())

    def _repr_html_(self) -> str:
        return facts_html("Profile", self._facts())


def _some(values: Iterable[int]) -> str:
    listed = [str(value) for value in values]
    return ", ".join(listed if len(listed) <= 8 else [*listed[:4], "…", *listed[-2:]])


def _range(values: Iterable[int]) -> str:
    found = sorted(set(values))
    return str(found[0]) if len(found) == 1 else f"{found[0]}–{found[-1]}"
