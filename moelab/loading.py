"""`moelab.load`: from a model's name to a `Lab`."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .backend import tell_of_openblas
from .checkpoint.fingerprint import fingerprint
from .checkpoint.headers import TensorSpan, read_headers
from .checkpoint.provenance import load_traced
from .checkpoint.resolve import LAB_MODEL, read_config, resolve
from .errors import CapacityError, CheckpointError
from .experts.attach import Attachment, arrays_in
from .experts.budget import needs
from .experts.capacity import Capacity, resolve_capacity
from .experts.lowbit import low_bit_bytes
from .experts.misses import LowBit, MissAction, checked_budget, resolve_action
from .experts.pins import Pins, PinsLike, resolve_pins, with_profile
from .experts.policies import Policy, PolicyMaker, make_policy
from .experts.profile import Profile
from .experts.source import find_origins
from .families import SwitchSite, find_switches
from .lab import Lab


def load(
    name_or_path: str | Path = LAB_MODEL,
    capacity: Capacity = "auto",
    *,
    policy: str | Policy | PolicyMaker = "lru",
    on_miss: str | MissAction = "load",
    pins: PinsLike = None,
    swap_budget: int | None = None,
    budget_gb: float | None = None,
    context: int | None = None,
    kv_bits: int | None = None,
    dtype: str | None = None,
    pack: bool | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Lab:
    """Loads a model with only part of its experts in memory.

    Args:
        name_or_path: `"lab"` (the shipped model), a folder, or a name on the Hugging Face hub.
        capacity: Experts a layer to hold: an int counts them, a float is a share of them,
            `"auto"` takes what fits in the memory there is, as `lab.budget` then shows. A sequence
            has an int for each MoE layer, a mapping one by the decoder layer's number.
        policy: Who leaves when an expert needs a slot: a name that `moelab.policies()` lists, or
            an object of your own.
        on_miss: What happens when a chosen expert is not resident: `"load"` reads it and is exact;
            see `Lab.set_on_miss` for the approximations.
        pins: Experts that never leave: a mapping from layer to ids, one list for all layers, or
            `moelab.Pins(profile, top=8)` or `Pins(profile, share=0.5)`. With a profile, its order
            also decides what fills a bank that begins full.
        swap_budget: For an approximation: experts a layer that may enter after a step. None for
            the layer's top-k.
        budget_gb: Memory to take instead, in units of 10⁹ bytes. It counts what `lab.memory()`
            counts, trunk and slots; if you give `context`, the cache and the peak of prefill too.
        context: Tokens of prompt and answer that `"auto"` and a budget leave room for. None takes
            8,192, or the model's most if that is less, for `"auto"`.
        kv_bits: Bits of the cache that this room is for: 8, 4 or None for the model's own type.
            What a cache is made with is `kv_bits` of `Lab.generate`.
        dtype: `"float32"` converts 16-bit floats while loading; None keeps the checkpoint's.
        pack: Whether to read the experts from a pack file (see `moelab.pack`): True makes one if
            there is none, False reads the checkpoint itself, None takes the file if there is one
            and makes it only where the checkpoint's experts cannot be read one at a time.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: As in `mlx_lm.load`.

    Returns:
        The lab. The trunk is in memory; the bank holds the pins, and what else `Lab.reset` says.

    Raises:
        CheckpointError: If there is no such model, its files are damaged, it has no routed
            experts, its experts cannot be read one at a time, or its pack file cannot be used
            or made.
        CapacityError: If the capacity is under a layer's top-k or over its number of experts, too
            little memory is there or allowed, or both a capacity and a budget were given.
    """
    from mlx_lm.utils import load_tokenizer

    if dtype not in (None, "float32"):
        raise ValueError(f"dtype must be None (the checkpoint's own) or 'float32', got {dtype!r}.")
    maker = make_policy(policy)
    action, swap_budget = resolve_action(on_miss), checked_budget(swap_budget)
    if capacity != "auto" and (context is not None or kv_bits is not None):
        raise CapacityError(
            "context and kv_bits say how much room 'auto' or a budget is to leave, and with "
            f"capacity={capacity!r} they would do nothing. Leave them away; for a quantised cache "
            "give kv_bits to lab.generate."
        )
    folder = resolve(name_or_path, revision)
    read_config(folder)
    spans = read_headers(folder)
    model, config, trace = load_traced(folder, trust_remote_code=trust_remote_code)
    sites = find_switches(model, config["model_type"])
    check_backend(sites, dtype)
    copies = 0
    if isinstance(action, LowBit):
        copies = sum(low_bit_bytes(site, action.bits) for site in sites)
    tell_of_openblas(config, sum(span.nbytes for span in spans.values()))
    settled = resolve_capacity(
        capacity,
        sites,
        lambda: needs(
            model,
            sites,
            config,
            context=context,
            kv_bits=kv_bits,
            widen=dtype == "float32",
            extra_bytes=copies,
        ),
        budget_gb=budget_gb,
        whole=context is not None,
    )
    capacities = settled.capacities
    partial = [site for c, site in zip(capacities, sites, strict=True) if c < site.experts]
    found = iter(
        find_origins(
            folder, partial, trace, spans, packed=pack, trust_remote_code=trust_remote_code
        )
    )
    origins = [
        next(found) if c < site.experts else {} for c, site in zip(capacities, sites, strict=True)
    ]
    spec = with_profile(pins)
    orders = None
    name = ""  # not asked for unless there is a profile
    if isinstance(spec, Pins) and isinstance(spec.profile, Profile):
        orders, name = spec.profile.orders(), fingerprint(folder, spans)
    pinned = resolve_pins(spec, sites, capacities, fingerprint=name)
    tokenizer = load_tokenizer(folder, eos_token_ids=config.get("eos_token_id"))
    attachment = Attachment(
        model,
        sites,
        capacities,
        origins,
        maker,
        pins=pinned,
        orders=orders,
        fingerprint=lambda: fingerprint(folder, spans),
        widen=dtype == "float32",
    )
    try:
        if dtype == "float32":
            _widen(model, attachment)
        # Everything, private arrays such as RoPE frequencies too, so that another thread may run
        # the model: a lazy array belongs to the thread that made it.
        mx.eval([_own_arrays(module) for module in model.modules()])
        attachment.reset()
        lab = Lab(
            name=str(name_or_path),
            path=folder,
            model=model,
            tokenizer=tokenizer,
            config=config,
            sites=sites,
            capacities=capacities,
            attachment=attachment,
            spans=spans,
            policy=maker().name,
            pins=pinned,
            swap_budget=swap_budget,
            budget=settled.budget,
            reopen=functools.partial(
                reopened, folder, pack=pack, trust_remote_code=trust_remote_code
            ),
        )
        if action.lossy:
            lab.set_on_miss(action)
        return lab
    except BaseException:
        attachment.detach()
        raise


def reopened(
    folder: Path,
    sites: Sequence[SwitchSite],
    *,
    pack: bool | None = None,
    trust_remote_code: bool = False,
) -> dict[int, dict[tuple[str, str], tuple[TensorSpan, ...]]]:
    """Makes the experts of stock layers lazy again, as they were before they were loaded.

    Args:
        folder: The model's folder.
        sites: The layers; their switches get lazy arrays.
        pack: As in `load`.
        trust_remote_code: As in `load`.

    Returns:
        Where each tensor is, by layer.

    Raises:
        CheckpointError: If the experts cannot be read one at a time.
    """
    spans = read_headers(folder)
    model, config, trace = load_traced(folder, trust_remote_code=trust_remote_code)
    fresh = {site.layer: site for site in find_switches(model, config["model_type"])}
    again = [fresh[site.layer] for site in sites]
    found = find_origins(
        folder, again, trace, spans, packed=pack, trust_remote_code=trust_remote_code
    )
    for site, lazy in zip(sites, again, strict=True):
        for name, key, array in lazy.tensors():
            site.switch[name][key] = array
    return {site.layer: origins for site, origins in zip(sites, found, strict=True)}


def check_backend(sites: Sequence[SwitchSite], dtype: str | None) -> None:
    """Refuses experts of a type that this machine's backend cannot multiply.

    Raises:
        CheckpointError: On a CPU, for unquantised 16-bit experts, unless they are to be converted,
            and for quantised ones with a global scale.
    """
    if mx.default_device() != mx.Device(mx.cpu):
        return
    for site in sites:
        for name, key, array in site.tensors():
            if key == "global_scale":
                raise CheckpointError(
                    f"{site.path}.{name} is quantised with a global scale for each expert, which "
                    "MLX multiplies on a GPU only (stock mlx-lm fails as well). Run it on a Mac, "
                    "or quantise the original model without one."
                )
            if dtype == "float32":
                continue
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
