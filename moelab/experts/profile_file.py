"""A profile as JSON: mlx-moe's format, with what moelab knows besides under a key of its own.

mlx-moe reads `num_prompts` and each layer's `activation_counts` (prompts in which an expert was
used, by id), and so can this. All else that moelab counts lies under `"moelab"`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ProfileError
from .profile import THRESHOLD, Profile, Use

FORMAT = 1
"""Version of what lies under `"moelab"`."""

MOST = 1 << 16
"""Experts of a layer beyond which a file is taken to be damaged, not read into memory."""

OPEN_LEVELS = 3
"""Levels of the file that have a line for each entry; what lies deeper is on one line."""


def write_profile(profile: Profile, path: str | Path) -> Path:
    """Writes a profile, whole or not at all; a file that is there is replaced.

    Args:
        profile: The profile.
        path: The file; its folder is made.

    Returns:
        The path.

    Raises:
        ProfileError: If the file cannot be written.
    """
    target = writable(path)
    # Beside the target, since a file can only be renamed within one file system.
    part = target.with_name(f".{target.name}-{os.getpid()}.part")
    try:
        part.write_text(_text(_as_json(profile), OPEN_LEVELS) + "\n", encoding="utf-8")
        part.replace(target)
    except OSError as error:
        raise ProfileError(f"The profile cannot be written to {target}: {error}") from error
    finally:
        part.unlink(missing_ok=True)
    return target


def writable(path: str | Path) -> Path:
    """Returns the path of a file to write, with its folder made.

    Raises:
        ProfileError: If it is a folder, or its folder cannot be made or written to.
    """
    target = Path(path).expanduser()
    if target.is_dir():
        raise ProfileError(f"{target} is a folder. Name the file that the profile is to go to.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ProfileError(f"The folder {target.parent} cannot be made: {error}") from error
    if not os.access(target.parent, os.W_OK):
        raise ProfileError(f"The folder {target.parent} cannot be written to.")
    return target


def read_profile(path: str | Path) -> Profile:
    """Reads a profile that moelab or mlx-moe wrote.

    Args:
        path: The file.

    Raises:
        ProfileError: If there is no such file, or it is damaged, or of a later format.
    """
    source = Path(path).expanduser()
    try:
        data = json.loads(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise ProfileError(f"The profile {source} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"{source} is no profile: it is not JSON ({error}).") from error
    try:
        return _from_json(data)
    except _DamageError as error:
        raise ProfileError(
            f"{source} is no profile, or damaged: {error}. A profile is what `moelab profile` or "
            "mlx-moe's profile generator writes."
        ) from error


class _DamageError(Exception):
    """Says what is wrong with a file's contents."""


def _as_json(profile: Profile) -> dict[str, Any]:
    universal = profile.universal(THRESHOLD)
    layers = {
        str(layer): {
            "universal": list(universal[layer]),
            "activation_counts": {
                str(expert): int(active[expert]) for expert in np.flatnonzero(active).tolist()
            },
            "total_unique": int(np.count_nonzero(active)),
        }
        for layer, active in profile.activations.items()
    }
    capacity = profile.provenance.get("capacity")
    found: dict[str, Any] = {
        "model": profile.model,
        "num_prompts": profile.num_prompts,
        "threshold": THRESHOLD,
        "capacity": max(capacity) if isinstance(capacity, list) else capacity,
        "num_experts": max(profile.experts.values()),
        "moe_layers": len(profile.layers),
        "prompt_preset": profile.provenance.get("prompts"),
        "mix": profile.domains or profile.provenance.get("mix"),
        "layers": layers,
    }
    if profile.fingerprint is None:
        return found
    assert profile.top_k is not None
    found["moelab"] = {
        "format": FORMAT,
        "fingerprint": profile.fingerprint,
        "layers": list(profile.layers),
        "experts": list(profile.experts.values()),
        "top_k": list(profile.top_k.values()),
        "prompt_tokens": profile.prompt_tokens,
        "phase_tokens": dict(profile.phase_tokens),
        # For people and other programs; worked out anew on reading.
        "uniform_prompt_share": [
            float(f"{profile.uniform_prompt_share(layer):.6g}") for layer in profile.layers
        ],
        "provenance": dict(profile.provenance),
        "uses": [
            {
                "domain": use.domain,
                "phase": use.phase,
                "prompts": use.prompts,
                "tokens": use.tokens,
                "layers": {
                    str(layer): {
                        "count": use.counts[layer].tolist(),
                        "mass": [None if value != value else value
                                 for value in use.mass[layer].tolist()],
                        "prompts": use.in_prompts[layer].tolist(),
                    }
                    for layer in profile.layers
                },
            }
            for use in profile.uses
        ],
    }  # fmt: skip
    return found


def _text(value: Any, levels: int) -> str:
    if levels == 0 or not value or not isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    if isinstance(value, dict):
        lines = [f"{json.dumps(k, ensure_ascii=False)}: {_text(v, levels - 1)}"
                 for k, v in value.items()]  # fmt: skip
        return "{\n" + ",\n".join(lines) + "\n}"
    if all(isinstance(item, int | float | str) for item in value):
        return _text(value, 0)
    return "[\n" + ",\n".join(_text(item, levels - 1) for item in value) + "\n]"


def _from_json(data: Any) -> Profile:
    top = _mapping(data, "the file")
    num_prompts = _count(_get(top, "num_prompts", "the file"), "num_prompts", least=1)
    own = top.get("moelab")
    if own is not None:
        own = _mapping(own, "moelab")
        if own.get("format") != FORMAT:
            raise _DamageError(
                f"it has format {own.get('format')!r}, and this moelab reads format {FORMAT}"
            )
    counted = _activations(top, num_prompts)
    if own is None:
        experts = _sizes(top, counted)
    else:
        experts = _by_layer(own, "experts")
        if set(counted) != set(experts):
            raise _DamageError("its layers are not those that moelab.layers lists")
    activations = {}
    for layer, size in experts.items():
        activations[layer] = np.zeros(size, np.int64)
        for expert, count in counted[layer].items():
            if expert >= size:
                raise _DamageError(f"layer {layer} has expert {expert} and {size} experts")
            activations[layer][expert] = count
    model = str(top.get("model", "a model that is not named"))
    if own is None:
        made: dict[str, Any] = {"made_by": "mlx-moe", "predicted": False}
        made.update({k: top[k] for k in ("capacity", "mix") if top.get(k) is not None})
        if top.get("prompt_preset") is not None:
            made["prompts"] = top["prompt_preset"]
        return Profile(
            model, None, experts, None, None, {}, num_prompts, activations, provenance=made
        )
    fingerprint = _get(own, "fingerprint", "moelab")
    if not isinstance(fingerprint, str):
        raise _DamageError(f"moelab.fingerprint is {fingerprint!r:.40}")
    return Profile(
        model=model,
        fingerprint=fingerprint,
        experts=experts,
        top_k=_by_layer(own, "top_k"),
        prompt_tokens=_count(_get(own, "prompt_tokens", "moelab"), "prompt_tokens", least=1),
        phase_tokens={
            str(phase): _count(n, f"phase_tokens.{phase}", least=1)
            for phase, n in _mapping(_get(own, "phase_tokens", "moelab"), "phase_tokens").items()
        },
        num_prompts=num_prompts,
        activations=activations,
        uses=_uses(own, experts),
        provenance=_mapping(own.get("provenance", {}), "moelab.provenance"),
    )


def _activations(top: Mapping[str, Any], num_prompts: int) -> dict[int, dict[int, int]]:
    layers = _mapping(_get(top, "layers", "the file"), "layers")
    if not layers:
        raise _DamageError("it has no layers")
    found: dict[int, dict[int, int]] = {}
    for name, entry in layers.items():
        layer = _number(name, "layers")
        counts = _mapping(
            _get(_mapping(entry, f"layer {name}"), "activation_counts", f"layer {name}"),
            f"activation_counts of layer {name}",
        )
        found[layer] = {}
        for expert, count in counts.items():
            where = f"expert {expert} of layer {name}"
            if _number(expert, where) >= MOST:
                raise _DamageError(f"{where}: no model has so many experts")
            found[layer][int(expert)] = _count(count, where, most=num_prompts)
    return dict(sorted(found.items()))


def _sizes(top: Mapping[str, Any], counted: Mapping[int, Mapping[int, int]]) -> dict[int, int]:
    """Experts of each layer: as the file says, else up to the highest id."""
    said = top.get("num_experts")
    if said is None:
        highest = max((expert for counts in counted.values() for expert in counts), default=0)
        return dict.fromkeys(counted, highest + 1)
    return dict.fromkeys(counted, _count(said, "num_experts", least=1, most=MOST))


def _by_layer(own: Mapping[str, Any], key: str) -> dict[int, int]:
    layers, values = _get(own, "layers", "moelab"), _get(own, key, "moelab")
    if (
        not isinstance(layers, list)
        or not isinstance(values, list)
        or not len(layers) == len(values) > 0
    ):
        raise _DamageError(f"moelab.layers and moelab.{key} are not lists of one length")
    numbers = [_count(layer, "moelab.layers") for layer in layers]
    return dict(
        zip(numbers, [_count(v, f"moelab.{key}", least=1, most=MOST) for v in values], strict=True)
    )


def _uses(own: Mapping[str, Any], experts: Mapping[int, int]) -> tuple[Use, ...]:
    listed = _get(own, "uses", "moelab")
    if not isinstance(listed, list) or not listed:
        raise _DamageError("moelab.uses is no list, or empty")
    found = []
    for i, entry in enumerate(listed):
        where = f"moelab.uses[{i}]"
        use = _mapping(entry, where)
        prompts = _count(_get(use, "prompts", where), f"{where}.prompts")
        tokens = _count(_get(use, "tokens", where), f"{where}.tokens")
        layers = _mapping(_get(use, "layers", where), f"{where}.layers")
        arrays: dict[str, dict[int, np.ndarray]] = {"count": {}, "mass": {}, "prompts": {}}
        for layer, size in experts.items():
            at = f"{where}, layer {layer}"
            rows = _mapping(_get(layers, str(layer), where), at)
            for key, most in (("count", tokens), ("mass", None), ("prompts", prompts)):
                arrays[key][layer] = _array(_get(rows, key, at), f"{at}, {key}", size, most)
        found.append(
            Use(
                str(_get(use, "domain", where)), str(_get(use, "phase", where)), prompts, tokens,
                arrays["count"], arrays["mass"], arrays["prompts"],
            )
        )  # fmt: skip
    return tuple(found)


def _array(values: Any, where: str, size: int, most: int | None) -> np.ndarray:
    """Reads a list of counts up to `most`, or without `most` of masses, null for NaN."""
    if not isinstance(values, list) or len(values) != size:
        raise _DamageError(f"{where} is no list of {size} numbers")
    if most is not None:
        return np.array([_count(v, where, most=most) for v in values], np.int64)
    for value in values:
        if value is not None and (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not -np.inf < value < np.inf
        ):
            raise _DamageError(f"{where} holds {value!r:.40}, which is no gate mass")
    return np.array([np.nan if v is None else v for v in values], np.float64)


def _get(data: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in data:
        raise _DamageError(f"{where} has no {key!r}")
    return data[key]


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _DamageError(f"{where} is no JSON object")
    return value


def _number(text: str, where: str) -> int:
    # int() would also take "1_0" and " 1".
    if not (text.isascii() and text.isdigit()):
        raise _DamageError(f"{where}: {text!r:.40} is no number of a layer or expert")
    return int(text)


def _count(value: Any, where: str, *, least: int = 0, most: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise _DamageError(f"{where} is {value!r:.40}, which is no count from {least} on")
    if most is not None and value > most:
        raise _DamageError(f"{where} is {value}, and there can be only {most}")
    return value
