"""What a check found: frozen records, JSON that comes back whole, and a page to read."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import MoelabError
from ..machine import Machine
from .bandwidth import Bandwidth
from .exact import Exactness, Verdict
from .model import ModelFacts
from .speed import Memory, Speed

FORMAT = 1
"""Version of the JSON."""


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What `moelab.check.check` found on one machine with one model."""

    machine: Machine
    model: ModelFacts
    exactness: Exactness
    bandwidth: Bandwidth
    memory: Memory | None
    """None if the model could not be run; see `not_run`."""
    speed: Speed | None
    not_run: str | None
    """Why the model could not be run as a whole."""
    seconds: float
    """How long the check took."""

    @property
    def verdict(self) -> Verdict:
        """Whether the bank computes what stock mlx-lm computes, in one line."""
        layers = self.exactness.verdict
        # With equal layers, a whole model that differs has been run wrongly.
        if layers == "exact" and self.speed is not None and self.speed.same_bits is False:
            return "NOT exact"
        return layers

    @property
    def as_promised(self) -> bool | None:
        """Whether the verdict is what moelab promises on this backend; None if not checked.

        On a CPU every bit is promised to be equal. On a GPU prefill may be only close.
        """
        verdict = self.verdict
        if verdict == "not checked":
            return None
        if verdict == "exact in decode and close in prefill":
            return self.machine.backend != "CPU"
        return verdict == "exact"

    def page(self) -> str:
        """Returns the report as Markdown, to be read."""
        from .page import page

        return page(self)

    def to_json(self) -> str:
        """Returns the report as JSON. It names no folder, host or user."""
        content = {"format": FORMAT, "verdict": self.verdict, **dataclasses.asdict(self)}
        return _json(content) + "\n"

    @classmethod
    def from_json(cls, text: str) -> CheckReport:
        """Reads what `to_json` wrote.

        Raises:
            MoelabError: If it is no such text, or one of another format.
        """
        try:
            content = json.loads(text)
            if content["format"] == FORMAT:
                report: CheckReport = _build(cls, content)
                return report
        except (ValueError, KeyError, TypeError) as error:
            raise MoelabError(f"This is not the JSON of a moelab check ({error!r}).") from error
        raise MoelabError(
            f"This check has format {content['format']}, and this moelab reads format {FORMAT}."
        )

    def save(self, folder: str | Path) -> Path:
        """Writes `check.json` and `check.md` into a folder, each whole or not at all.

        Args:
            folder: Is made if it is not there.

        Returns:
            The folder.

        Raises:
            MoelabError: If the folder cannot be made or written to.
        """
        target = Path(folder).expanduser()
        contents = {"check.json": self.to_json(), "check.md": self.page()}
        try:
            target.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target, prefix=".check-") as made:
                for name, text in contents.items():
                    (Path(made) / name).write_text(text, encoding="utf-8")
                for name in contents:
                    (Path(made) / name).replace(target / name)
        except OSError as error:
            raise MoelabError(f"The report cannot be written to {target}: {error}") from error
        return target

    def _repr_markdown_(self) -> str:
        return self.page()

    def __repr__(self) -> str:
        return f"<CheckReport {self.model.name}: {self.verdict}>"


def _json(value: Any, indent: int = 0) -> str:
    """Like `json.dumps(indent=1)`, with records that hold no long lists on one line."""
    flat = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if not isinstance(value, dict | list) or (indent and len(flat) <= 200 and flat.count("{") < 3):
        return flat
    pad = "\n" + " " * (indent + 1)
    if isinstance(value, dict):
        inner = [f"{json.dumps(k)}: {_json(v, indent + 1)}" for k, v in value.items()]
        return "{" + ",".join(pad + item for item in inner) + pad[:-1] + "}"
    return "[" + ",".join(pad + _json(item, indent + 1) for item in value) + pad[:-1] + "]"


def _build(wanted: Any, value: Any) -> Any:
    """Makes a value of type `wanted` from what JSON gave, records within records too."""
    origin = get_origin(wanted)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        return _build(next(a for a in get_args(wanted) if a is not type(None)), value)
    if origin is list:
        return [_build(get_args(wanted)[0], item) for item in value]
    if origin is dict:
        return {k: _build(get_args(wanted)[1], v) for k, v in value.items()}
    if origin is Literal:
        if value not in get_args(wanted):
            raise ValueError(f"{value!r} is none of {get_args(wanted)}")
        return value
    if dataclasses.is_dataclass(wanted):
        hints = get_type_hints(wanted)
        return wanted(**{f.name: _build(hints[f.name], value[f.name])
                         for f in dataclasses.fields(wanted)})  # type: ignore[operator]  # fmt: skip
    if wanted is float and isinstance(value, int):
        return float(value)
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise TypeError(f"{value!r} is no {wanted.__name__}")
    return value
