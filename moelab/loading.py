"""`moelab.load`: from a model's name to a `Lab`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .backend import tell_of_openblas
from .checkpoint.headers import read_headers
from .checkpoint.provenance import load_traced
from .checkpoint.resolve import LAB_MODEL, read_config, resolve
from .errors import CheckpointError
from .experts.attach import Attachment, all_parameters, arrays_in, origins_of
from .experts.capacity import Capacity, resolve_capacity
from .experts.policy import LRU
from .families import SwitchSite, find_switches
from .lab import Lab


def load(
    name_or_path: str | Path = LAB_MODEL,
    capacity: Capacity = "auto",
    *,
    dtype: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Lab:
    """Loads a model with only part of its experts in memory.

    Args:
        name_or_path: `"lab"` (the shipped model), a folder, or a name on the Hugging Face hub.
        capacity: Experts a layer to hold: an int counts them, a float is a share of them,
            `"auto"` takes what fits in the memory there is.
        dtype: `"float32"` converts 16-bit floats while loading; None keeps the checkpoint's.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: As in `mlx_lm.load`.

    Returns:
        The lab. The trunk is in memory, the bank is empty.

    Raises:
        CheckpointError: If there is no such model, its files are damaged, it has no routed
            experts, or its experts cannot be read one at a time.
        CapacityError: If the capacity is under a layer's top-k or over its number of experts.
    """
    from mlx_lm.utils import load_tokenizer

    if dtype not in (None, "float32"):
        raise ValueError(f"dtype must be None (the checkpoint's own) or 'float32', got {dtype!r}.")
    folder = resolve(name_or_path, revision)
    read_config(folder)
    spans = read_headers(folder)
    model, config, trace = load_traced(folder, trust_remote_code=trust_remote_code)
    sites = find_switches(model, config["model_type"])
    check_backend(sites, dtype)
    tell_of_openblas(config, sum(span.nbytes for span in spans.values()))
    expert_arrays = {id(array) for site in sites for _, _, array in site.tensors()}
    trunk = [a for a in arrays_in(all_parameters(model)) if id(a) not in expert_arrays]
    growth = 2 if dtype == "float32" else 1
    capacities = resolve_capacity(
        capacity,
        sites,
        trunk_bytes=growth * sum(a.nbytes for a in trunk),
        expert_bytes=growth * sum(a.nbytes // s.experts for s in sites for _, _, a in s.tensors()),
    )
    partial = [c < site.experts for c, site in zip(capacities, sites, strict=True)]
    origins = [
        origins_of(site, trace, spans) if part else {}
        for site, part in zip(sites, partial, strict=True)
    ]
    tokenizer = load_tokenizer(folder, eos_token_ids=config.get("eos_token_id"))
    attachment = Attachment(model, sites, capacities, origins, LRU, widen=dtype == "float32")
    try:
        if dtype == "float32":
            _widen(model, attachment)
        # Everything, private arrays such as RoPE frequencies too, so that another thread may run
        # the model: a lazy array belongs to the thread that made it.
        mx.eval([_own_arrays(module) for module in model.modules()])
        return Lab(
            name=str(name_or_path),
            path=folder,
            model=model,
            tokenizer=tokenizer,
            config=config,
            sites=sites,
            capacities=capacities,
            attachment=attachment,
            spans=spans,
            policy=LRU.name,
        )
    except BaseException:
        attachment.detach()
        raise


def check_backend(sites: Sequence[SwitchSite], dtype: str | None) -> None:
    """Refuses experts of a type that this machine's backend cannot multiply.

    Raises:
        CheckpointError: For unquantised 16-bit experts on a CPU, unless they are to be converted.
    """
    if dtype == "float32" or mx.default_device() != mx.Device(mx.cpu):
        return
    for site in sites:
        for name, key, array in site.tensors():
            quantised = "scales" in site.projections[name]
            if not quantised and array.dtype in (mx.bfloat16, mx.float16):
                raise CheckpointError(
                    f"{site.path}.{name}.{key} is unquantised {array.dtype}, which MLX cannot "
                    "multiply by expert on a CPU (stock mlx-lm fails as well). Load it with "
                    "dtype='float32', or quantise it with mlx_lm.convert."
                )


def _widen(model: nn.Module, attachment: Attachment) -> None:
    """Converts the 16-bit floats of everything that is not in the bank to float32."""
    in_bank = {id(a) for s in attachment.switches.values() for a in arrays_in(s)}
    for module in model.modules():
        for key, value in module.items():
            if (
                isinstance(value, mx.array)
                and id(value) not in in_bank
                and value.dtype in (mx.bfloat16, mx.float16)
            ):
                module[key] = value.astype(mx.float32)


def _own_arrays(module: nn.Module) -> list[mx.array]:
    """Returns the arrays that a module itself holds, private ones too."""
    held = [*module.values(), *vars(module).values()]
    return [a for value in held if not isinstance(value, nn.Module) for a in _plain_arrays(value)]


def _plain_arrays(value: Any) -> Iterator[mx.array]:
    """Yields the arrays in a value, not going into modules."""
    if isinstance(value, mx.array):
        yield value
    elif isinstance(value, dict) and not isinstance(value, nn.Module):
        for child in value.values():
            yield from _plain_arrays(child)
    elif isinstance(value, list | tuple):
        for child in value:
            yield from _plain_arrays(child)
