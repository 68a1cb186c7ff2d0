"""`lab.record()`: a recording as a context manager."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Any

from ..errors import ClosedError
from ..machine import backend, chip, system, versions
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
        self._recording: Recording | None = None
        self._recorder: Recorder | None = None
        self._prompt_logprobs = prompt_logprobs

    def __enter__(self) -> Recording:
        if self._recording is not None:
            raise ClosedError("A recording records once. Ask for another: lab.record().")
        lab = self._lab
        run = manifest(lab, prompt_logprobs=self._prompt_logprobs)
        experts = max(run["experts"])
        layout = [(site.layer, site.top_k) for site in lab.sites]
        store = Store(layout, experts, lossy=lab.miss_action.lossy)
        load_bytes = {
            layer.layer: layer.loader.expert_disk_bytes for layer in lab.attachment.bank.layers
        }
        # The recording outlives the lab, so it is given nothing that holds on to the model.
        self._recorder = Recorder(
            store, experts, prompt_logprobs=self._prompt_logprobs, problems=run["problems"]
        )
        self._recording = Recording(run, frame_builder(store, lab.tokenizer.decode, load_bytes))
        try:
            lab.watch.add(self._recorder)
            lab.sessions.append(self)
        except BaseException:
            self.__exit__()
            raise
        return self._recording

    def __exit__(self, *_: object) -> None:
        try:
            self._leave()
        except BaseException:
            self._leave()  # an interrupt must not leave the model watched, or rows unread
            raise

    def _leave(self) -> None:
        """Ends the recording. Calling it again goes on with what an interrupt left."""
        assert self._recording is not None and self._recorder is not None
        self._lab.watch.remove(self._recorder)
        self._lab.sessions = [s for s in self._lab.sessions if s is not self]
        self._recorder.finish()
        self._recording.complete()

    def note_generation(self, settings: dict[str, Any]) -> None:
        """Told by the lab how a generation that is about to start is set up."""
        assert self._recording is not None
        self._recording.run["generations"].append(settings)


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
        "on_miss": lab.on_miss,
        "on_miss_settings": lab.miss_action.settings,
        "swap_budget": lab.swap_budget,
        "pins": {str(layer): sorted(pins) for layer, pins in lab.pins.items()},
        # From most to least worth keeping, so that a replay begins with the same recency.
        "initial_bank": {
            str(layer.layer): layer.residency.ranking()[::-1]
            for layer in lab.attachment.bank.layers
        },
        "generations": [],
        "problems": [],
        "versions": versions("numpy", "pandas"),
        "machine": {"chip": chip(), "system": system(), "backend": backend()},
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **options,
    }
