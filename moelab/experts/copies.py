"""Keeps copies at few bits on disk, so that a large model's are made once.

Making them reads and quantises every expert. Where that took long, they are written to the cache
folder: one safetensors file a model and number of bits, whole or absent, named by the model's
fingerprint.
"""

from __future__ import annotations

import copy
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..cache import cache_folder
from .bank import LayerBank
from .lowbit import low_bit_copies, projection_of

KEEP_FROM_SECONDS = 5.0
"""Copies that were made in less are made again when they are needed."""

FORMAT = "1"


class Copies:
    """The copies of one model.

    Args:
        fingerprint: Gives the model's; called when it is first needed.
    """

    def __init__(self, fingerprint: Callable[[], str]) -> None:
        self._fingerprint = fingerprint

    def of(
        self, layers: Sequence[LayerBank], bits: int, have: Mapping[int, nn.Module]
    ) -> dict[int, nn.Module]:
        """Returns the copies of layers: those there are, those on disk, or new ones.

        Args:
            layers: The layers.
            bits: 2 or 3.
            have: Copies of these bits that are in memory, by layer.

        Returns:
            A switch with (experts, …) arrays for each layer, by its number.
        """
        from tqdm.auto import tqdm

        found = dict(have)
        lacking = [layer for layer in layers if layer.layer not in found]
        if lacking:
            found.update(self._read(lacking, bits))
        lacking = [layer for layer in lacking if layer.layer not in found]
        begin = time.monotonic()
        for layer in tqdm(lacking, "copies at few bits", unit="layer", leave=False, delay=1):
            found[layer.layer] = low_bit_copies(layer, bits)
        if time.monotonic() - begin >= KEEP_FROM_SECONDS:
            self._write(found, bits)
        return found

    def _place(self, bits: int) -> Path:
        return cache_folder() / "copies" / f"{self._fingerprint()}-{bits}bit.safetensors"

    def _read(self, layers: Sequence[LayerBank], bits: int) -> dict[int, nn.Module]:
        place = self._place(bits)
        if not place.exists():
            return {}
        try:
            loaded: Any = mx.load(str(place), return_metadata=True)
            arrays, metadata = loaded
            if metadata.get("format") != FORMAT:
                return {}
            found = {}
            for layer in layers:
                switch = copy.copy(layer.site.switch)
                for name in layer.site.projections:
                    prefix = f"{layer.layer}.{name}."
                    mine = {k[len(prefix) :]: a for k, a in arrays.items() if k.startswith(prefix)}
                    if not mine:
                        break
                    mx.eval(mine)
                    switch[name] = projection_of(mine, bits)
                else:
                    found[layer.layer] = switch
            return found
        except (RuntimeError, ValueError, OSError) as error:
            warnings.warn(f"{place} cannot be read ({error}); it is made again.", stacklevel=2)
            return {}

    def _write(self, copies: Mapping[int, nn.Module], bits: int) -> None:
        place = self._place(bits)
        arrays = {}
        for layer, switch in copies.items():
            for name, projection in switch.items():
                if hasattr(projection, "num_experts"):
                    for key, array in tree_flatten(projection):
                        if isinstance(array, mx.array):
                            arrays[f"{layer}.{name}.{key}"] = array
        made = place.with_name(f".{place.stem}-{os.getpid()}.safetensors")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            mx.save_safetensors(str(made), arrays, metadata={"format": FORMAT})
            made.replace(place)
        except (OSError, RuntimeError) as error:
            # They are in memory: the lab can run, and only the next one must make them again.
            warnings.warn(
                f"The copies could not be kept in {place.parent} ({error}); they will be made "
                "again for the next lab. Free some disk, or name a folder by MOELAB_CACHE.",
                stacklevel=2,
            )
        finally:
            made.unlink(missing_ok=True)
