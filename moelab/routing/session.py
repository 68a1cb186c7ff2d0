"""`lab.record()`: a recording as a context manager."""

from __future__ import annotations

import datetime
import platform
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ClosedError
from .recorder import Recorder
from .recording import Recording, frame_builder
from .store import Store

if TYPE_CHECKING:
    from ..lab import Lab


class RecordingSession:
    """Records while its `with` block runs; a session records once.

    Args:
        lab: The lab to record.
        prompt_logprobs: See `Lab.record`.
    """

    def __init__(self, lab: Lab, *, prompt_logprobs: bool = False) -> None:
        self._lab = lab
        self._store = Store([(site.layer, site.top_k) for site in lab.sites])
        experts = max(site.experts for site in lab.sites)
        self._recorder = Recorder(self._store, experts, prompt_logprobs=prompt_logprobs)
        self._recording: Recording | None = None
        self._prompt_logprobs = prompt_logprobs

    def __enter__(self) -> Recording:
        if self._recording is not None:
            raise ClosedError("A recording records once. Ask for another: lab.record().")
        lab = self._lab
        load_bytes = {
            layer.layer: layer.loader.expert_disk_bytes for layer in lab.attachment.bank.layers
        }
        self._recording = Recording(
            manifest(lab, prompt_logprobs=self._prompt_logprobs),
            frame_builder(self._store, self._texts, load_bytes),
        )
        lab.watch.add(self._recorder)
        lab.sessions.append(self)
        return self._recording

    def __exit__(self, *_: object) -> None:
        self._lab.watch.remove(self._recorder)
        self._lab.sessions = [s for s in self._lab.sessions if s is not self]
        self._recorder.finish()
        assert self._recording is not None
        self._recording.complete()

    def note_generation(self, settings: dict[str, Any]) -> None:
        """Told by the lab how a generation that is about to start is set up."""
        assert self._recording is not None
        self._recording.run["generations"].append(settings)

    def _texts(self, tokens: np.ndarray) -> dict[int, str]:
        return {t: self._lab.tokenizer.decode([t]) for t in tokens.tolist()}


def manifest(lab: Lab, **options: Any) -> dict[str, Any]:
    """Returns what a reader needs to know to repeat a recording; JSON values only."""
    return {
        "model": lab.name,
        "model_type": lab.config["model_type"],
        "fingerprint": lab.fingerprint,
        "layers": [site.layer for site in lab.sites],
        "experts": [site.experts for site in lab.sites],
        "top_k": [site.top_k for site in lab.sites],
        "capacity": lab.capacity if len(set(lab.capacities)) == 1 else lab.capacities,
        "policy": lab.policy,
        "on_miss": "load",
        "initial_bank": {
            str(layer.layer): sorted(layer.residency.slot_of)
            for layer in lab.attachment.bank.layers
        },
        "generations": [],
        "versions": {
            name: version(name) for name in ("moelab", "mlx", "mlx-lm", "numpy", "pandas")
        },
        "machine": {
            "system": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "python": platform.python_version(),
        },
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **options,
    }
