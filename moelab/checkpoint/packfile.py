"""The expert-major file: all tensors of an expert side by side, so that one read fetches it.

A checkpoint that stacks its experts scatters each of them over as many places as there are
tensors, and some checkpoints have no bytes of an expert at all, because mlx-lm computes them while
it loads. A pack file has every expert as one *record*: its tensors' rows one after another, in the
order of the manifest, in the bytes that the model computes with.

Format, all numbers little-endian:

- a preamble of 72 bytes: magic, format version (u32), 4 zero bytes, length of the whole file,
  offset and length of the manifest (u64 each), SHA-256 of the manifest;
- the records, layer by layer, each beginning at a multiple of `ALIGN`;
- the manifest, JSON: what the file was made from and by, and for each layer where its records
  begin, how far apart they are, which tensors a record has, and the CRC-32 of every record.

What opening a file checks is cheap whatever its size: length, manifest and fingerprint, so a file
that was cut short, is of another version or of another model is refused. The checksums of the
records are for `verify_records`, which reads everything.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .headers import TensorSpan

MAGIC = b"moepack\n"
VERSION = 1

ALIGN = 1 << 14
"""A record begins at a multiple of this: the page of Apple silicon, and of every other machine a
multiple of its page (4 KiB). The system reads whole pages, so a record that begins inside one
would fetch a part of its neighbour too. Under 1% is lost to gaps at usual expert sizes."""

PREAMBLE = struct.Struct("<8sIIQQQ32s")


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """One tensor of every record of a layer."""

    projection: str
    key: str
    dtype: str
    """safetensors' name of the element type."""
    shape: tuple[int, ...]
    """Of one expert."""
    offset: int
    """First byte, counted from the start of the record."""
    nbytes: int
    """Of one expert."""
    computed: bool
    """mlx-lm computed it while loading: no byte range of the checkpoint holds it."""


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """The records of one layer."""

    path: str
    """The switch's dotted path in the model."""
    experts: int
    offset: int
    """Where the first record begins, counted from the start of the file."""
    stride: int
    """From one record to the next."""
    tensors: tuple[PackedTensor, ...]
    crc32: tuple[int, ...]
    """Of each record, gap not counted."""

    @property
    def record_bytes(self) -> int:
        """Bytes of a record, without the gap after it."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def end(self) -> int:
        """First byte after the layer's records."""
        return self.offset + self.experts * self.stride


@dataclass(frozen=True, slots=True)
class Pack:
    """An opened pack file; its records stay on disk."""

    file: Path
    fingerprint: str
    """Of the model that it was made from."""
    made_by: Mapping[str, str]
    """Versions of moelab, mlx and mlx-lm."""
    layers: Mapping[str, PackedLayer]
    """By the switch's path."""

    def spans(self, path: str) -> dict[tuple[str, str], tuple[TensorSpan, ...]]:
        """Returns where a layer's tensors are, by projection and name, for the loader."""
        layer = self.layers[path]
        return {
            (t.projection, t.key): (
                TensorSpan(
                    self.file,
                    t.dtype,
                    (layer.experts, *t.shape),
                    layer.offset + t.offset,
                    t.nbytes * layer.experts,
                    layer.stride,
                ),
            )
            for t in layer.tensors
        }

    def check_model(self, fingerprint: str, mlx_lm: str) -> None:
        """Refuses a file that was not made from this model.

        Args:
            fingerprint: The model's.
            mlx_lm: Version of the mlx-lm that runs it.

        Raises:
            CheckpointError: If it is another model's, or holds tensors as another version of
                mlx-lm computed them.
        """
        if self.fingerprint != fingerprint:
            raise refusal(
                self.file,
                f"was made from another model: its fingerprint is {self.fingerprint}, this "
                f"model's {fingerprint}",
            )
        made_by = self.made_by.get("mlx-lm")
        if made_by != mlx_lm and any(t.computed for x in self.layers.values() for t in x.tensors):
            raise refusal(
                self.file,
                f"holds experts as mlx-lm {made_by} computes them, and this is mlx-lm {mlx_lm}, "
                "which may do it differently",
            )


def align(nbytes: int) -> int:
    """Rounds up to a multiple of `ALIGN`."""
    return -(-nbytes // ALIGN) * ALIGN


def manifest_bytes(
    fingerprint: str, made_by: Mapping[str, str], layers: list[PackedLayer]
) -> bytes:
    """Returns the manifest."""
    content = {
        "fingerprint": fingerprint,
        "made_by": dict(made_by),
        "layers": [asdict(layer) for layer in layers],
    }
    return json.dumps(content, separators=(",", ":")).encode()


def preamble(manifest: bytes, offset: int) -> bytes:
    """Returns the preamble of a file whose manifest is at `offset` and ends it."""
    size = offset + len(manifest)
    checksum = hashlib.sha256(manifest).digest()
    return PREAMBLE.pack(MAGIC, VERSION, 0, size, offset, len(manifest), checksum)


def read_pack(file: Path) -> Pack:
    """Opens a pack file and checks what can be checked without reading the records.

    Raises:
        CheckpointError: If it is no pack file, of another version, cut short or damaged.
    """
    try:
        with file.open("rb") as stream:
            start = stream.read(PREAMBLE.size)
            size = file.stat().st_size
            if start[: len(MAGIC)] != MAGIC:
                raise refusal(file, "is no pack file: it does not begin as one does")
            if len(start) < PREAMBLE.size:
                raise refusal(file, f"was cut short: it has {size} bytes")
            _, version, _, wanted, offset, length, checksum = PREAMBLE.unpack(start)
            if version != VERSION:
                raise refusal(
                    file, f"has format version {version}, and this moelab reads version {VERSION}"
                )
            if size < wanted:
                raise refusal(file, f"was cut short: it has {size} of {wanted} bytes")
            if size > wanted or offset + length != wanted:
                raise refusal(file, f"is damaged: it has {size} bytes and should have {wanted}")
            stream.seek(offset)
            manifest = stream.read(length)
    except OSError as error:
        raise refusal(file, f"cannot be read ({error})") from error
    if hashlib.sha256(manifest).digest() != checksum:
        raise refusal(file, "is damaged: its manifest does not have the checksum that it should")
    try:
        content = json.loads(manifest)
        layers = {entry["path"]: _layer(entry) for entry in content["layers"]}
        pack = Pack(file, content["fingerprint"], content["made_by"], layers)
    except (ValueError, KeyError, TypeError) as error:
        raise refusal(file, f"is damaged: its manifest is malformed ({error!r})") from error
    if any(x.end > offset or x.record_bytes > x.stride for x in layers.values()):
        raise refusal(file, "is damaged: its manifest points beyond its records")
    return pack


def verify_records(pack: Pack, progress: Callable[[int], object] = lambda _: None) -> None:
    """Reads every record and compares it with its checksum.

    Args:
        pack: The opened file.
        progress: Told how many bytes were read since it was told last.

    Raises:
        CheckpointError: At the first record that differs.
    """
    with pack.file.open("rb", buffering=0) as stream:
        for layer in pack.layers.values():
            record = bytearray(layer.record_bytes)
            for expert, wanted in enumerate(layer.crc32):
                stream.seek(layer.offset + expert * layer.stride)
                got = _read_into(stream, memoryview(record))
                if got < len(record) or zlib.crc32(record) != wanted:
                    raise refusal(
                        pack.file,
                        f"is damaged: expert {expert} of {layer.path} is not what was written",
                    )
                progress(len(record))


def refusal(file: Path, why: str) -> CheckpointError:
    """Returns the error for a pack file that cannot be used."""
    return CheckpointError(
        f"The pack file {file} {why}. Run `moelab pack` for this model to make it again, or "
        "delete the file."
    )


def _read_into(stream: Any, buffer: memoryview) -> int:
    got = 0
    while got < len(buffer) and (more := stream.readinto(buffer[got:])):
        got += more
    return got


def _layer(entry: dict[str, Any]) -> PackedLayer:
    tensors = [PackedTensor(**{**t, "shape": tuple(t["shape"])}) for t in entry["tensors"]]
    layer = PackedLayer(**{**entry, "tensors": tuple(tensors), "crc32": tuple(entry["crc32"])})
    if len(layer.crc32) != layer.experts:
        raise ValueError("a record without a checksum")
    return layer
