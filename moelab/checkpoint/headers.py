"""Where each tensor of a safetensors checkpoint lies, by file and byte range.

`safetensors` and `mx.load` return tensors, not offsets, and experts are read by offset. So the
headers are read here, and checked before anything is loaded: a shard that was cut off or a header
that lies must be an error at the start, not garbage weights later.

Format: 8 bytes little-endian header length, that many bytes of JSON
(`{name: {dtype, shape, data_offsets: [begin, end]}, "__metadata__": {...}}`), then the data.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

ITEM_BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64,
}  # fmt: skip
"""Bits of an element, by safetensors' dtype name."""

MAX_HEADER_BYTES = 100_000_000
"""safetensors' own limit; a larger length means that the file is no safetensors file."""


@dataclass(frozen=True, slots=True)
class TensorSpan:
    """One tensor's place on disk."""

    path: Path
    """The shard."""
    dtype: str
    """safetensors' name of the element type, such as `"BF16"`."""
    shape: tuple[int, ...]
    """The tensor's shape."""
    offset: int
    """First byte, counted from the start of the file."""
    nbytes: int
    """Length in bytes, gaps not counted; what lies between gaps is in row-major order."""
    stride: int | None = None
    """Bytes from one row of the first axis to the next where there are gaps, as in a pack file;
    None where the tensor is contiguous."""


def shard_paths(folder: Path) -> list[Path]:
    """Returns the shards that mlx-lm would load from `folder`, sorted by name.

    Raises:
        CheckpointError: If there is none, or the index names a shard that is not there.
    """
    paths = sorted(folder.glob("model*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        wanted = {folder / name for name in _weight_map(index).values()}
        if missing := sorted(p.name for p in wanted if not p.exists()):
            raise CheckpointError(
                f"{folder}: {len(missing)} of {len(wanted)} shards are missing: "
                f"{', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}. "
                "Download the model again, or copy these files into the folder."
            )
    if not paths:
        raise CheckpointError(
            f"{folder} holds no model*.safetensors, so there are no weights to load. "
            "Give the folder of a model in MLX or Hugging Face format."
        )
    return paths


def read_headers(folder: Path) -> dict[str, TensorSpan]:
    """Reads and checks the header of every shard in `folder`.

    Returns:
        The span of each tensor, by its name in the checkpoint.

    Raises:
        CheckpointError: If a shard is missing or cut off, a header is not what the format says,
            two shards have the same tensor, or the index promises one that its shard has not.
    """
    spans: dict[str, TensorSpan] = {}
    for path in shard_paths(folder):
        for name, span in read_header(path).items():
            if name in spans:
                # mlx-lm loads every shard that it finds and lets one of them win.
                raise CheckpointError(
                    f"Tensor {name!r} is in {spans[name].path} and in {path}, and nothing says "
                    "which one counts. Remove the file that does not belong to the model."
                )
            spans[name] = span
    index = folder / "model.safetensors.index.json"
    if index.exists():
        for name, shard in _weight_map(index).items():
            if name not in spans or spans[name].path.name != shard:
                raise CheckpointError(
                    f"{index} says that {name!r} is in {shard}, and it is not. "
                    "The index and the shards do not belong together: download the model again."
                )
    return spans


def read_header(path: Path) -> dict[str, TensorSpan]:
    """Reads and checks the header of one shard. See `read_headers`."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise _damaged(path, f"it has {size} bytes, too few for a safetensors header")
        (length,) = struct.unpack("<Q", start)
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise _damaged(path, f"its header claims {length} bytes and the file has {size}")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise _damaged(path, f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    data = 8 + length
    spans = {
        name: _span(path, name, entry, data, size)
        for name, entry in header.items()
        if name != "__metadata__"
    }
    end, last = data, "the header"
    for name, span in sorted(spans.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if span.offset < end:
            raise _damaged(path, f"tensors {last!r} and {name!r} overlap")
        end, last = span.offset + span.nbytes, name
    return spans


def _span(path: Path, name: str, entry: Any, data: int, size: int) -> TensorSpan:
    try:
        dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
        begin, end = (int(n) for n in entry["data_offsets"])
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise _damaged(path, f"the entry of tensor {name!r} is malformed") from error
    if dtype not in ITEM_BITS:
        raise _damaged(path, f"tensor {name!r} has the unknown dtype {dtype!r}")
    expected = math.prod(shape) * ITEM_BITS[dtype] // 8
    if min(shape, default=0) < 0 or not 0 <= begin <= end or end - begin != expected:
        raise _damaged(
            path,
            f"tensor {name!r}, {dtype} {list(shape)}, needs {expected} bytes "
            f"and its header gives it [{begin}, {end}]",
        )
    if data + end > size:
        raise _damaged(
            path,
            f"tensor {name!r} ends at byte {data + end} and the file has {size}: "
            "the file was cut off or its header is wrong",
        )
    return TensorSpan(path, dtype, shape, data + begin, end - begin)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        return {str(name): str(shard) for name, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} is damaged ({error!r}): download the model again."
        ) from None


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {why}. Download it again.")
