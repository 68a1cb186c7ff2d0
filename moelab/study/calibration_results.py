"""The `Calibration`: what was measured, its file, and what it says of a pass."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..display import facts_html, facts_text
from ..errors import StudyError

FORMAT = 1

DECODE = ("base", "context", "missing", "load")
"""Seconds of a decoded token: itself, for each token before it, for each layer with a miss, and
for each load."""
PREFILL = ("base", "token", "distinct", "load", "swept")
"""Seconds of a chunk: itself, for each of its tokens, for each expert of a layer that it uses, for
each load, and for each layer that uses more experts than it has slots."""
WHOLE_DECODE = ("base", "context")
WHOLE_PREFILL = ("base", "token")
"""The same where all experts are resident."""

PARTS = {
    "decode": DECODE,
    "prefill": PREFILL,
    "whole_decode": WHOLE_DECODE,
    "whole_prefill": WHOLE_PREFILL,
}


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` measured. Seconds throughout.

    Attributes:
        model: The model's name.
        fingerprint: The checkpoint's; a forecast for another is refused.
        layers: MoE layers.
        decode: By `DECODE`; None where no capacity leaves a layer partial.
        prefill: By `PREFILL`; likewise.
        whole_decode: By `WHOLE_DECODE`, all experts resident; None where that was not measured.
        whole_prefill: By `WHOLE_PREFILL`.
        cold_load: What a load takes longer if the page cache does not hold it; None where pages
            cannot be dropped here.
        warm_share: How much of the experts' files the page cache held while the rest was measured,
            0 to 1; None where the system does not say.
        spread: Of each part its 5% and 95% quantile over resampled runs, by
            `"decode.base"` and so on.
        residuals: Median relative deviation of the observations from the fit, by phase.
        longest: Tokens of the longest chunk that was measured.
        observations: How many, by phase.
        took: How long it took.
        machine: As `moelab.machine.Machine` has it, versions with it.
    """

    model: str
    fingerprint: str
    layers: int
    decode: dict[str, float] | None
    prefill: dict[str, float] | None
    whole_decode: dict[str, float] | None
    whole_prefill: dict[str, float] | None
    cold_load: float | None
    warm_share: float | None
    longest: int
    spread: dict[str, list[float]] = field(default_factory=dict)
    residuals: dict[str, float] = field(default_factory=dict)
    observations: dict[str, int] = field(default_factory=dict)
    took: float = 0.0
    machine: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Writes JSON."""
        target = Path(path).expanduser()
        target.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=1)
        target.write_text(text + "\n", encoding="utf-8")
        return target

    @classmethod
    def read(cls, path: str | Path) -> Calibration:
        """Reads what `save` wrote.

        Raises:
            StudyError: If it is no calibration, or one of another format.
        """
        source = Path(path).expanduser()
        try:
            told = json.loads(source.read_text(encoding="utf-8"))
            version = told.pop("format")
            if version != FORMAT:
                raise StudyError(
                    f"{source} has format {version!r}, and this moelab reads {FORMAT}. Calibrate "
                    "again."
                )
            found = cls(**told)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, StudyError):
                raise
            raise StudyError(f"{source} holds no calibration ({error!r}).") from error
        found._check(source)
        return found

    def _check(self, source: Path) -> None:
        for phase, names in PARTS.items():
            parts = getattr(self, phase)
            if parts is None:
                continue
            if not isinstance(parts, dict) or set(parts) != set(names):
                raise StudyError(f"{source} holds no calibration: {phase} must have {names}.")
            for name, value in parts.items():
                if not isinstance(value, int | float) or not 0 <= value < math.inf:
                    raise StudyError(
                        f"{source}: {phase}.{name} is {value!r}, and must be seconds from 0 on. "
                        "Calibrate again."
                    )
        cold = self.cold_load
        if cold is not None and (not isinstance(cold, int | float) or not 0 <= cold < math.inf):
            raise StudyError(
                f"{source}: cold_load is {cold!r}, and must be seconds from 0 on, or null. "
                "Calibrate again."
            )

    def require(self, fingerprint: str, page_cache: str = "warm") -> None:
        """Refuses to be used for another model or an unknown state of the page cache.

        Raises:
            StudyError: If so.
        """
        if self.fingerprint != fingerprint:
            raise StudyError(
                f"This calibration is of {self.model} ({self.fingerprint}), and the model is "
                f"{fingerprint}. What a token costs is another: calibrate the model itself."
            )
        if page_cache not in ("warm", "cold"):
            raise StudyError(f"page_cache is 'warm' or 'cold', got {page_cache!r}.")
        if page_cache == "cold" and self.cold_load is None:
            raise StudyError(
                "This calibration has no cold loads: the system did not let go of the files' "
                "pages, so that a first read from the disk could not be measured. Forecast with "
                "page_cache='warm'."
            )

    def decode_seconds(
        self, context: Any, missing: Any, loads: Any, *, partial: float = 1.0
    ) -> tuple[Any, Any]:
        """Seconds of a decoded token: compute, and loads.

        Args:
            context: Tokens before it.
            missing: Layers with a miss.
            loads: Loads in all layers.
            partial: Share of the MoE layers that do not hold all their experts.

        Raises:
            StudyError: If a kind of layer was not measured.
        """
        whole, parts = self._kinds("decode", partial)
        compute = (1 - partial) * (whole["base"] + whole["context"] * context)
        compute = compute + partial * (parts["base"] + parts["context"] * context)
        return compute, parts["missing"] * missing + parts["load"] * loads

    def prefill_seconds(
        self, tokens: Any, distinct: Any, loads: Any, swept: Any, *, partial: float = 1.0
    ) -> tuple[Any, Any]:
        """Seconds of a prompt's chunk: compute, and loads.

        Args:
            tokens: Tokens of the chunk.
            distinct: Different experts that it uses, summed over the partial layers.
            loads: Loads in all layers.
            swept: Layers that use more experts than they have slots.
            partial: As in `decode_seconds`.

        Raises:
            StudyError: If a kind of layer was not measured.
        """
        whole, parts = self._kinds("prefill", partial)
        compute = (1 - partial) * (whole["base"] + whole["token"] * tokens)
        compute = compute + partial * (parts["base"] + parts["token"] * tokens)
        compute = compute + parts["distinct"] * distinct + parts["swept"] * swept
        return compute, parts["load"] * loads

    def _kinds(self, phase: str, partial: float) -> tuple[Mapping[str, float], Mapping[str, float]]:
        """Returns the parts of stock and of partial layers; zeros for a kind that there is not."""
        names = DECODE if phase == "decode" else PREFILL
        nothing = dict.fromkeys((*names, "context", "token"), 0.0)
        whole, parts = getattr(self, f"whole_{phase}"), getattr(self, phase)
        if partial < 1 and whole is None:
            raise StudyError(
                "Layers with all their experts resident were not measured, since they did not "
                "fit in memory or in the time. Forecast a capacity under all experts, or "
                "calibrate with a longer limit_seconds=."
            )
        if partial > 0 and parts is None:
            raise StudyError("Layers with a part of their experts were not measured.")
        return (whole if partial < 1 else nothing), (parts if partial > 0 else nothing)

    def _facts(self) -> dict[str, str]:
        def told(phase: str, name: str, unit: str) -> str:
            parts = getattr(self, phase)
            if parts is None:
                return "not measured"
            low, high = self.spread.get(f"{phase}.{name}", [parts[name]] * 2)
            return f"{parts[name] * 1e3:.3f} ms {unit} [{low * 1e3:.3f}, {high * 1e3:.3f}]"

        cold = "cannot be measured here" if self.cold_load is None else (
            f"{self.cold_load * 1e3:.3f} ms more a load")  # fmt: skip
        held = "not known" if self.warm_share is None else f"{self.warm_share:.0%} of the files"
        off = ", ".join(f"{k} {v:.1%}" for k, v in self.residuals.items())
        m = self.machine
        return {
            "model": f"{self.model} ({self.fingerprint})",
            "machine": f"{m.get('chip', '?')}, {m.get('cores', '?')} cores, "
            f"{m.get('busy', float('nan')):.0%} busy before",
            "decode": told("decode", "base", "a token"),
            "decode, a load": f"{told('decode', 'load', '')}; layer with a miss "
            f"{told('decode', 'missing', '')}",
            "prompt": told("prefill", "token", "a token"),
            "prompt, a load": told("prefill", "load", ""),
            "all resident": f"{told('whole_decode', 'base', 'a decoded token')}",
            "page cache": f"warm: {held}; cold: {cold}",
            "deviation": off or "none",
            "took": f"{self.took:.1f} s",
        }

    def __repr__(self) -> str:
        return facts_text("Calibration", self._facts())

    def _repr_html_(self) -> str:
        return facts_html("Calibration", self._facts())
