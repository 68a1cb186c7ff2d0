"""`moelab pack`: writes a model's experts one after another into a pack file.

The experts come from mlx-lm's own loading of the family, whatever it does to the checkpoint's
tensors: the model is built with every weight still on disk, one layer's experts are evaluated,
written and freed, then the next layer's. So every family works, and memory for about one layer is
enough.

Where the file is put: into the model's folder, so that it moves and goes with the model. Not
there where the folder belongs to another program (a snapshot in the hub's cache, whose tools
count, verify and prune what is in it; the shipped model inside this package) or cannot be written
to or has no room: then into moelab's cache folder, under a name with the model's fingerprint.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import mlx.core as mx
import numpy as np
import psutil

from ..cache import VARIABLE, cache_folder
from ..display import size
from ..errors import CheckpointError
from ..families import SwitchSite, find_switches
from .fingerprint import fingerprint
from .headers import TensorSpan, read_headers
from .packfile import (
    ALIGN,
    Pack,
    PackedLayer,
    PackedTensor,
    align,
    manifest_bytes,
    preamble,
    read_pack,
    verify_records,
)
from .provenance import Trace, load_traced
from .resolve import LAB_MODEL, read_config, resolve

if TYPE_CHECKING:
    from collections.abc import Mapping

NAME = "experts.moepack"
"""The file's name in the model's own folder."""

DTYPES = {
    mx.uint8: "U8", mx.int8: "I8", mx.uint16: "U16", mx.int16: "I16", mx.uint32: "U32",
    mx.int32: "I32", mx.float16: "F16", mx.bfloat16: "BF16", mx.float32: "F32",
}  # fmt: skip
"""safetensors' names of the types that an expert's tensors can have."""


def pack(
    name_or_path: str | Path = LAB_MODEL,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> Path:
    """Writes a model's experts into a pack file, from which `moelab.load` then reads them.

    A file that is there already and belongs to this model is left as it is.

    Args:
        name_or_path: See `moelab.load`.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: As in `mlx_lm.load`.
        progress: Say what is going to be written, and show a bar.

    Returns:
        The file.

    Raises:
        CheckpointError: If the model cannot be loaded, the disk has not the room, or is found
            full on the way. Then, and after an interrupt, nothing is left behind.
    """
    folder = resolve(name_or_path, revision)
    read_config(folder)
    spans = read_headers(folder)
    mark = fingerprint(folder, spans)
    for place in places(folder, mark):
        try:
            found = read_pack(place)
            found.check_model(mark, version("mlx-lm"))
            return place
        except CheckpointError:
            continue  # none there, or one to be made again
    sites, computed = _lazy_experts(folder, trust_remote_code)
    layers = _plan(sites, computed)
    nbytes = layers[-1].end
    place = _with_room(places(folder, mark), nbytes)
    if progress:
        say(
            f"{folder.name}: packing the experts of {len(layers)} layers takes {size(nbytes)} of "
            f"disk; {size(shutil.disk_usage(place.parent).free)} are free in {place.parent}."
        )
    with _written_whole(place, nbytes) as file, _bar(nbytes, "packing", progress) as told:
        done = [
            _write_layer(file, site, layer, told) for site, layer in zip(sites, layers, strict=True)
        ]
        made_by = {name: version(name) for name in ("moelab", "mlx", "mlx-lm")}
        manifest = manifest_bytes(mark, made_by, done)
        file.seek(nbytes)
        file.write(manifest)
        file.seek(0)
        file.write(preamble(manifest, nbytes))
        if fingerprint(folder, read_headers(folder)) != mark:
            raise CheckpointError(f"{folder} was changed while its experts were packed. Try again.")
    return place


def verify(
    name_or_path: str | Path = LAB_MODEL, *, revision: str | None = None, progress: bool = True
) -> Path:
    """Reads a model's whole pack file and compares every expert with its checksum.

    Returns:
        The file.

    Raises:
        CheckpointError: If there is none, it is another model's, or an expert is damaged.
    """
    folder = resolve(name_or_path, revision)
    read_config(folder)
    found = find_pack(folder, read_headers(folder))
    if found is None:
        raise CheckpointError(f"{folder} has no pack file. `moelab pack` makes one.")
    nbytes = sum(layer.record_bytes * layer.experts for layer in found.layers.values())
    with _bar(nbytes, "verifying", progress) as told:
        verify_records(found, told)
    return found.file


def find_pack(folder: Path, spans: Mapping[str, TensorSpan]) -> Pack | None:
    """Returns the pack file of the model in `folder`, opened; None if there is none.

    Raises:
        CheckpointError: If there is one and it cannot be used.
    """
    if not (folder / NAME).exists() and not any(_kept(folder)):
        return None  # without the fingerprint, which reads a little of every shard
    mark = fingerprint(folder, spans)
    refused: CheckpointError | None = None
    for place in (folder / NAME, _cached(folder, mark)):
        if not place.exists():
            continue
        try:
            found = read_pack(place)
            found.check_model(mark, version("mlx-lm"))
        except CheckpointError as error:
            refused = refused or error
        else:
            return found
    if refused is not None:
        raise refused
    return None


def places(folder: Path, mark: str) -> list[Path]:
    """Returns where a model's pack file may be put, the better place first."""
    own = _is_the_users(folder) and os.access(folder, os.W_OK)
    return [*([folder / NAME] if own else []), _cached(folder, mark)]


def _is_the_users(folder: Path) -> bool:
    """Whether a folder belongs to the user and not to another program."""
    real = folder.resolve()
    in_hub = real.parent.name == "snapshots" and real.parent.parent.name.startswith("models--")
    return not in_hub and Path(__file__).resolve().parents[1] not in real.parents


def _label(folder: Path) -> str:
    """A name for people: the model's on the hub, or its folder's."""
    real = folder.resolve()
    if real.parent.name == "snapshots":
        return real.parent.parent.name.removeprefix("models--")
    return "lab" if not _is_the_users(folder) else real.name


def _cached(folder: Path, mark: str) -> Path:
    return cache_folder() / "packs" / f"{_label(folder)}-{mark}.moepack"


def _kept(folder: Path) -> Iterator[Path]:
    """Pack files in the cache that may be this model's."""
    within = cache_folder() / "packs"
    return (p for p in within.glob("*.moepack") if p.name.startswith(f"{_label(folder)}-"))


# -- what is to be written -------------------------------------------------------------------


def _lazy_experts(folder: Path, trust_remote_code: bool) -> tuple[list[SwitchSite], set[int]]:
    """Builds the model, nothing evaluated; returns its MoE layers and which arrays are computed."""
    model, config, trace = load_traced(folder, trust_remote_code=trust_remote_code)
    sites = find_switches(model, config["model_type"])
    # The trace keeps every array of the checkpoint alive, also once it is evaluated, so only this
    # leaves with it.
    return sites, {id(a) for site in sites for _, _, a in site.tensors() if _computed(trace, a)}


def _computed(trace: Trace, array: mx.array) -> bool:
    return trace.origin(array) is None


def _plan(sites: Sequence[SwitchSite], computed: set[int]) -> list[PackedLayer]:
    """Lays out the file, from shapes alone."""
    layers: list[PackedLayer] = []
    end = ALIGN  # the preamble has the first page for itself
    for site in sites:
        tensors: list[PackedTensor] = []
        at = 0
        for projection, key, array in site.tensors():
            if array.dtype not in DTYPES:
                raise CheckpointError(
                    f"{site.path}.{projection}.{key} is {array.dtype}, which a pack file has no "
                    "name for. Please report this with the model's name."
                )
            nbytes = array.nbytes // site.experts
            shape = tuple(array.shape[1:])
            dtype = DTYPES[array.dtype]
            tensors.append(
                PackedTensor(projection, key, dtype, shape, at, nbytes, id(array) in computed)
            )
            at += nbytes
        layers.append(PackedLayer(site.path, site.experts, end, align(at), tuple(tensors), ()))
        end = layers[-1].end
    return layers


def _with_room(choices: Sequence[Path], nbytes: int) -> Path:
    """Returns the first place whose disk has the room."""
    found = []
    for place in choices:
        place.parent.mkdir(parents=True, exist_ok=True)
        _sweep_out(place)
        free = shutil.disk_usage(place.parent).free
        if free > nbytes + (nbytes >> 8):  # the manifest, and the file system's own needs
            return place
        found.append(f"{size(free)} in {place.parent}")
    raise CheckpointError(
        f"Packing the experts takes {size(nbytes)} of disk, and there are only "
        f"{' and '.join(found)} free. Free some, or name a folder on another disk by the "
        f"environment variable {VARIABLE}."
    )


# -- writing ---------------------------------------------------------------------------------


def _write_layer(
    file: BinaryIO, site: SwitchSite, layer: PackedLayer, told: Callable[[int], object]
) -> PackedLayer:
    """Evaluates one layer's experts, writes them and frees them; returns it with checksums."""
    arrays = [array for _, _, array in site.tensors()]
    try:
        rows = [_rows(array) for array in arrays]
    except RuntimeError as error:
        raise CheckpointError(f"mlx-lm cannot load the experts of {site.path}: {error}") from error
    checksums = []
    for expert in range(layer.experts):
        file.seek(layer.offset + expert * layer.stride)
        checksum = 0
        for of_tensor in rows:
            file.write(of_tensor[expert].data)
            checksum = zlib.crc32(of_tensor[expert], checksum)
        checksums.append(checksum)
        told(layer.stride)
    del arrays, rows
    # The model is of no more use: nothing else refers to these arrays.
    for projection in site.projections.values():
        for key in [k for k, v in projection.items() if isinstance(v, mx.array)]:
            del projection[key]
    mx.clear_cache()
    return PackedLayer(
        layer.path, layer.experts, layer.offset, layer.stride, layer.tensors, tuple(checksums)
    )


def _rows(array: mx.array) -> np.ndarray:
    """Evaluates an array and returns its memory as uint8 (experts, bytes), row-major."""
    # As unsigned integers, since numpy has no bfloat16.
    plain = mx.contiguous(array).reshape(array.shape[0], -1).view(mx.uint8)
    mx.eval(plain)
    return np.array(plain, copy=False)


@contextmanager
def _written_whole(place: Path, nbytes: int) -> Iterator[BinaryIO]:
    """Gives a file that appears at `place` when the block is over, or not at all."""
    made = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        with made.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        made.replace(place)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(
                f"The disk of {place.parent} was full before the {size(nbytes)} of experts were "
                "written; what was written has been removed. Free some, or name a folder on "
                f"another disk by the environment variable {VARIABLE}."
            ) from error
        raise CheckpointError(f"{place} cannot be written: {error}") from error
    finally:
        made.unlink(missing_ok=True)


def _sweep_out(place: Path) -> None:
    """Removes what a process that was killed while it packed has left behind."""
    for left in place.parent.glob(f".{place.name}.*"):
        number = left.suffix[1:]
        if number.isdigit() and not psutil.pid_exists(int(number)):
            left.unlink(missing_ok=True)


def say(text: str) -> None:
    """Tells the user something, in a terminal and in a notebook, without breaking a bar."""
    from tqdm.auto import tqdm

    tqdm.write(text, file=sys.stderr)


@contextmanager
def _bar(nbytes: int, what: str, shown: bool) -> Iterator[Callable[[int], Any]]:
    from tqdm.auto import tqdm

    options = {"unit": "B", "unit_scale": True, "leave": False, "disable": not shown}
    with tqdm(total=nbytes, desc=what, **options) as bar:
        yield bar.update
