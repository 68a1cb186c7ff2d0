"""Which bytes on disk become each parameter of the loaded model.

mlx-lm's families rename and stack tensors in `sanitize`, each in its own way. Instead of knowing
all of these ways, moelab watches: `load_traced` runs mlx-lm's own loading on lazy arrays and
notes which array object came from which name, and which stack was made of which arrays. A
parameter that is *the same object* as a loaded tensor, or as a stack of loaded tensors, has
exactly their bytes. One that was computed (split, transposed, dequantised) has not, and its
origin is unknown, which is an answer too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import CheckpointError


@dataclass(slots=True)
class Trace:
    """Where the arrays of a loaded model came from."""

    _names: dict[int, tuple[str, ...]] = field(default_factory=dict)
    _stacked: set[int] = field(default_factory=set)
    _alive: list[mx.array] = field(default_factory=list)
    """Keeps traced arrays alive, so that no other array gets the id of one of them."""

    def loaded(self, name: str, array: mx.array) -> None:
        """Notes that `array` is the checkpoint's tensor `name`."""
        self._names[id(array)] = (name,)
        self._alive.append(array)

    def stacked(self, parts: list[mx.array], result: mx.array) -> None:
        """Notes that `result` is `parts`, stacked along a new first axis."""
        names = [self._names.get(id(part)) for part in parts]
        if all(n is not None and len(n) == 1 and id(p) not in self._stacked
               for n, p in zip(names, parts, strict=True)):  # fmt: skip
            self._names[id(result)] = tuple(n[0] for n in names if n)
            self._stacked.add(id(result))
            self._alive.append(result)

    def origin(self, array: mx.array) -> tuple[str, ...] | str | None:
        """Returns where `array` came from.

        Returns:
            A name: it is that tensor. A tuple of names: it is their stack. None: it was computed.
        """
        names = self._names.get(id(array))
        if names is None:
            return None
        return names if id(array) in self._stacked else names[0]


def load_traced(
    folder: Path, *, trust_remote_code: bool = False
) -> tuple[nn.Module, dict[str, Any], Trace]:
    """Builds a model by mlx-lm's own loading, with every weight still on disk.

    Args:
        folder: The model's folder.
        trust_remote_code: As in `mlx_lm.load`.

    Returns:
        The model, whose arrays are lazy; its configuration as mlx-lm understood it; the trace.

    Raises:
        CheckpointError: If mlx-lm does not know the family, or the weights do not fit it.
    """
    from mlx_lm.utils import _get_classes, load_model

    trace = Trace()

    def traced_classes(config: dict[str, Any]) -> tuple[Callable[[Any], nn.Module], type]:
        model_class, args_class = _get_classes(config)

        def build(args: Any) -> nn.Module:
            model = model_class(args)
            # An attribute of the instance hides the method until it is deleted below.
            model.sanitize = _traced_sanitize(getattr(model, "sanitize", None), trace)
            return model

        return build, args_class

    try:
        model, config = load_model(
            folder,
            lazy=True,
            get_model_classes=traced_classes,
            trust_remote_code=trust_remote_code,
        )
    except (ValueError, TypeError, KeyError, RuntimeError, FileNotFoundError) as error:
        raise CheckpointError(f"mlx-lm cannot load {folder}: {error}") from error
    model.__dict__.pop("sanitize", None)
    return model, config, trace


def _traced_sanitize(
    sanitize: Callable[[Mapping[str, mx.array]], dict[str, mx.array]] | None, trace: Trace
) -> Callable[[dict[str, mx.array]], dict[str, mx.array]]:
    def traced(weights: dict[str, mx.array]) -> dict[str, mx.array]:
        for name, array in weights.items():
            trace.loaded(name, array)
        if sanitize is None:
            return weights
        with _watched_stack(trace):
            return sanitize(weights)

    return traced


@contextmanager
def _watched_stack(trace: Trace) -> Iterator[None]:
    """Lets `trace` see every `mx.stack` that is called inside, through whichever module."""
    stack: Any = mx.stack

    def watched(arrays: list[mx.array], axis: int = 0, **kwargs: Any) -> Any:
        result = stack(arrays, axis, **kwargs)
        if axis == 0:
            trace.stacked(list(arrays), result)
        return result

    mx.stack = watched  # type: ignore[assignment]
    try:
        yield
    finally:
        mx.stack = stack
