"""`moelab.discover`: what a model's routers ask for when no expert is loaded.

The attention layers, shared experts and routers run as ever; the routed experts contribute
nothing. A router in a late layer therefore sees a hidden state that lacks what the experts before
it would have added, so this predicts real use, and the less well the later the layer; the first
MoE layer's is exact. It reads nothing from disk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .errors import ProfileError
from .experts.event import LayerEvent, noting
from .experts.profile import PROMPT_TOKENS, Profile
from .experts.switch import PartialSwitch
from .experts.tally import Tally
from .profiling import provenance, shown
from .prompt_texts import Prompts, texts_of, windows

if TYPE_CHECKING:
    from .lab import Lab


def discover(
    lab: Lab, prompts: Prompts = None, *, tokens: int = PROMPT_TOKENS, progress: bool = True
) -> Profile:
    """Predicts which experts prompts will use, without loading any.

    Args:
        lab: The model; its bank is neither used nor changed.
        prompts: As in `moelab.profile`.
        tokens: Tokens of a prompt.
        progress: Show a progress bar.

    Returns:
        A profile whose `predicted` is true. It serves for pins and first contents as any other.

    Raises:
        ProfileError: If there is no text of that length, the lab is being recorded, or its
            routers are not left alone (`on_miss="reroute"`).
        ClosedError: If the lab was closed.
    """
    if lab.sessions:
        raise ProfileError(
            "The lab is being recorded, and a router-only pass would stand among what is. "
            "Call discover outside of lab.record()."
        )
    with lab.record() as empty:  # refuses a closed lab, and knows how misses are treated
        pass
    if empty.run["on_miss"] == "reroute":
        raise ProfileError(
            "With on_miss='reroute' the routers prefer experts that are resident. Discover with "
            "another miss action; what is loaded makes no difference then."
        )
    texts, called = texts_of(prompts)
    cut = windows(lab.tokenizer, texts, tokens)
    tally = Tally([s.layer for s in lab.sites], [s.experts for s in lab.sites])
    with _Probes(lab) as probes:
        for domain, ids in shown(cut, progress, "discover"):
            place, weight = [], []
            for event in probes.run(ids):
                place.append(tally.place(event.layer, np.array(event.ids).ravel()))
                weight.append(_weights(event))
            routed = np.concatenate(weight) != 0  # as in recordings: an identity expert's slot
            tally.add_prompt(
                domain, tokens, np.concatenate(place)[routed], np.concatenate(weight)[routed]
            )
    made = provenance("moelab.discover", lab, texts, called, cut)
    return tally.profile(
        model=lab.name,
        fingerprint=lab.fingerprint,
        top_k=[site.top_k for site in lab.sites],
        phase_tokens={"prefill": tokens},
        prompt_tokens=tokens,
        provenance={**made, "predicted": True, "settings": {"tokens": tokens}},
    )


class _Probe(nn.Module):
    """Stands in for a switch, answers with zeros, and notes what it was asked for.

    Args:
        layer: Number of its layer.
        stands_for: The stock switch or the bank's.
        events: Where to note.
    """

    def __init__(self, layer: int, stands_for: nn.Module, events: list[LayerEvent]) -> None:
        super().__init__()
        # Past nn.Module's own __setattr__, so that the switch does not become a child.
        object.__setattr__(self, "_layer", layer)
        object.__setattr__(self, "stands_for", stands_for)
        object.__setattr__(self, "_events", events)

    def __call__(self, x: mx.array, indices: mx.array, *more: Any) -> mx.array:
        switch = self.stands_for
        if isinstance(switch, PartialSwitch):
            switch = switch["slots"]
        # Built for its shape and dtype and never evaluated, so no weight is read.
        like = switch(x, indices, *more)
        event = LayerEvent(self._layer, indices, None)
        self._events.append(event)
        return noting(mx.zeros(like.shape, like.dtype), event)

    def __getattr__(self, key: str) -> Any:
        if "stands_for" not in self.__dict__:
            raise AttributeError(key)
        return getattr(self.__dict__["stands_for"], key)  # what a family reads from its switch


class _Probes:
    """Puts probes in the place of all of a lab's switches while its `with` block runs."""

    def __init__(self, lab: Lab) -> None:
        self._model = lab.model
        self._sites = lab.sites
        self._events: list[LayerEvent] = []
        self._originals = [(site, site.parent[site.key]) for site in lab.sites]

    def __enter__(self) -> _Probes:
        try:
            for site, original in self._originals:
                site.parent[site.key] = _Probe(site.layer, original, self._events)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._restore()
        except BaseException:
            self._restore()  # an interrupt must not leave a probe in the model
            raise

    def run(self, ids: list[int]) -> list[LayerEvent]:
        """Runs a prompt and returns what each layer's router chose, evaluated."""
        from mlx_lm.generate import generate_step

        self._events.clear()
        # The passes that moelab.profile makes, so that rounding makes no difference between them.
        for _ in generate_step(mx.array(ids), self._model, max_tokens=0):
            pass
        mx.eval([[e.ids] if e.weights is None else [e.ids, e.weights] for e in self._events])
        return list(self._events)

    def _restore(self) -> None:
        for site, original in self._originals:
            site.parent[site.key] = original


def _weights(event: LayerEvent) -> np.ndarray:
    """Returns a layer's gate weights, flat as its ids; NaN where the block weighs unseen."""
    if event.weights is None:
        return np.full(event.ids.size, np.nan)
    return np.array(event.weights.astype(mx.float32)).ravel()
