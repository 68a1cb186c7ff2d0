"""A pack file holds what the model computes with, or is refused with the reason."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest

import moelab
from moelab.checkpoint import pack as pack_module
from moelab.checkpoint.headers import read_headers
from moelab.checkpoint.pack import find_pack, verify
from moelab.checkpoint.packfile import ALIGN, read_pack
from moelab.cli import main
from moelab.errors import CheckpointError
from tests.support import published, stock, tiny

PROMPT = tiny.prompt(24, seed=2)
TOKENS = 4


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOELAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tiny.build(tmp_path / "model", "olmoe")


def left_behind(place: Path) -> list[str]:
    return [p.name for p in place.rglob("*") if "moepack" in p.name]


def reads_from(lab: Any) -> set[str]:
    return {
        span.path.name
        for layer in lab.attachment.bank.layers
        for tensor in layer.loader._tensors
        for span in tensor.spans
    }


# The format, read independently of the package: struct, json and numpy only.


class Record(NamedTuple):
    layer: str
    projection: str
    key: str
    expert: int
    content: bytes


def records(file: Path) -> list[Record]:
    """Every tensor of every expert, as the format's description says where it is."""
    data = file.read_bytes()
    magic, version, zero, size, begin, length = struct.unpack_from("<8sIIQQQ", data)
    assert (magic, version, zero, size) == (b"moepack\n", 1, 0, len(data))
    manifest = data[begin : begin + length]
    assert begin + length == len(data)
    assert hashlib.sha256(manifest).digest() == data[40:72]
    found = []
    for layer in json.loads(manifest)["layers"]:
        assert layer["offset"] % 16384 == layer["stride"] % 16384 == 0
        for expert in range(layer["experts"]):
            at = layer["offset"] + expert * layer["stride"]
            whole = b""
            for tensor in layer["tensors"]:
                one = data[at + tensor["offset"] :][: tensor["nbytes"]]
                whole += one
                found.append(
                    Record(layer["path"], tensor["projection"], tensor["key"], expert, one)
                )
            assert data[at : at + len(whole)] == whole, "side by side"
            assert zlib.crc32(whole) == layer["crc32"][expert]
            assert not any(data[at + len(whole) : at + layer["stride"]])
    return found


def memory(array: mx.array) -> bytes:
    plain = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    return np.array(plain).tobytes()


def check_records(file: Path, folder: Path) -> int:
    """Compares every record with the stock model's own arrays."""
    modules = dict(stock.stock(folder)[0].named_modules())
    found = records(file)
    for layer, projection, key, expert, content in found:
        assert content == memory(modules[f"{layer}.{projection}"][key][expert])
    return len(found)


LAYOUTS = [
    (family, quant, layout)
    for family, quant in [
        ("olmoe", "affine4"), ("qwen3_next", "none"), ("deepseek_v3", "mxfp4"),
        ("gpt_oss", "affine3"), ("qwen3_moe", "nvfp4"), ("mixtral", "affine8"),
    ]
    for layout in stock.layouts(family, quant)
]  # fmt: skip


@pytest.mark.parametrize(("family", "quant", "layout"), LAYOUTS)
def test_a_packed_lab_is_exact(
    family: str, quant: str, layout: dict[str, Any], tmp_path: Path
) -> None:
    source = stock.folder(family, quant, **layout)
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    file = moelab.pack(folder, progress=False)
    assert file == folder / "experts.moepack"
    experts = tiny.experts(family)[0]
    assert check_records(file, folder) >= len(tiny.moe_layers(family)) * experts * 3
    want = stock.stock_steps(source, PROMPT, TOKENS)
    evictions = sweeps = 0
    for capacity in tiny.capacities(family)[:-1]:
        with moelab.load(folder, capacity) as lab:
            assert reads_from(lab) == {"experts.moepack"}
            tally = stock.Tally(lab, slot_bytes=True)
            got = stock.steps(lab.stream(PROMPT, TOKENS))
            evictions, sweeps = evictions + tally.evictions, sweeps + tally.sweeps
        assert stock.same_steps(got, want), capacity
    assert evictions and sweeps


@pytest.mark.parametrize("family", published.BUILDERS)
def test_experts_that_mlx_lm_computes(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They cannot be read from the checkpoint; a pack file is made and said so."""
    folder = published.BUILDERS[family](tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"is computed by mlx-lm.*moelab pack"):
        moelab.load(folder, 4, pack=False)
    assert not left_behind(tmp_path)
    want = stock.stock_steps(folder, PROMPT, TOKENS)
    for capacity in (2, 5):
        with moelab.load(folder, capacity) as lab:
            tally = stock.Tally(lab, slot_bytes=True)
            assert stock.same_steps(stock.steps(lab.stream(PROMPT, TOKENS)), want)
            assert tally.evictions and tally.sweeps
        said = capsys.readouterr().err
        assert ("written to a pack file, once" in said) == (capacity == 2)
        assert ("of disk" in said and "are free" in said) == (capacity == 2)
    file = folder / "experts.moepack"
    assert check_records(file, folder) > 0
    computed = {
        (t["projection"], t["key"]): t["computed"]
        for layer in _manifest(file)["layers"]
        for t in layer["tensors"]
    }
    assert computed["gate_proj", "weight"] and computed["up_proj", "weight"]
    with moelab.load(folder, 1.0) as lab:  # all resident: nothing is read from anywhere
        assert stock.same_steps(stock.steps(lab.stream(PROMPT, TOKENS)), want)


def test_widening_from_a_pack(tmp_path: Path) -> None:
    """float32 slots of bfloat16 records: the same as from the checkpoint, and as MLX converts."""
    folder = tiny.build(tmp_path / "model", "qwen2_moe", quant=None, dtype="bfloat16")
    with moelab.load(folder, 4, dtype="float32", pack=False) as lab:
        want = stock.steps(lab.stream(PROMPT, TOKENS))
    with moelab.load(folder, 4, dtype="float32", pack=True) as lab:
        assert reads_from(lab) == {"experts.moepack"}
        assert stock.same_steps(stock.steps(lab.stream(PROMPT, TOKENS)), want)
        layer = lab.attachment.bank.layers[0]
        original = dict(stock.stock(folder)[0].named_modules())[lab.sites[0].path]
        for name in ("gate_proj", "up_proj", "down_proj"):
            for expert, slot in layer.residency.slot_of.items():
                whole = original[name]["weight"][expert].astype(mx.float32)
                assert stock.equal(layer.switch[name]["weight"][slot], whole)
    published_folder = published.granitemoe(tmp_path / "granite", dtype="bfloat16")
    with moelab.load(published_folder, 4, dtype="float32") as lab:
        got = stock.steps(lab.stream(PROMPT, TOKENS))
    with moelab.load(published_folder, 1.0, dtype="float32") as lab:
        first = stock.steps(lab.stream(PROMPT, TOKENS))
    assert [t for t, _ in got] == [t for t, _ in first]


def test_one_layer_in_memory_at_a_time(tmp_path: Path) -> None:
    overrides = {"num_hidden_layers": 6, "num_experts": 32}
    for layout in ("stacked", "per_expert"):
        folder = tiny.build(
            tmp_path / layout, "olmoe", quant=None, layout=layout, overrides=overrides
        )
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        file = moelab.pack(folder, progress=False)
        layer = next(iter(read_pack(file).layers.values()))
        # A stack of tensors is made beside them: once more the largest of three.
        assert mx.get_peak_memory() - before < 1.6 * layer.experts * layer.record_bytes
        assert mx.get_active_memory() <= before


# Where it is put, and when it is used.


def test_it_is_used_when_present(path: Path) -> None:
    with moelab.load(path, 4) as lab:
        assert reads_from(lab) == {"model.safetensors"}
        want = stock.steps(lab.stream(PROMPT, TOKENS))
    assert not left_behind(path)
    with moelab.load(path, 4, pack=True) as lab:
        assert reads_from(lab) == {"experts.moepack"}
    changed = (path / "experts.moepack").stat().st_mtime_ns
    with moelab.load(path, 4) as lab:
        assert reads_from(lab) == {"experts.moepack"}
        assert stock.same_steps(stock.steps(lab.stream(PROMPT, TOKENS)), want)
    with moelab.load(path, 4, pack=False) as lab:
        assert reads_from(lab) == {"model.safetensors"}
    assert moelab.pack(path, progress=False).stat().st_mtime_ns == changed, "made only once"


def test_where_it_is_put(path: Path, own_cache: Path, tmp_path: Path, monkeypatch: Any) -> None:
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / "0123abcd"
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(path, snapshot)
    mark = moelab.load(path, 4).fingerprint
    file = moelab.pack(snapshot, progress=False)
    assert file == own_cache / "packs" / f"owner--name-{mark}.moepack"
    assert sorted(p.name for p in snapshot.iterdir()) == sorted(p.name for p in path.iterdir())
    with moelab.load(snapshot, 4) as lab:
        assert reads_from(lab) == {file.name}
    # A folder that cannot be written to.
    writable = os.access
    monkeypatch.setattr(os, "access", lambda p, mode: Path(p) != path and writable(p, mode))
    file = moelab.pack(path, progress=False)
    assert file == own_cache / "packs" / f"model-{mark}.moepack"
    # The shipped model lies in this package.
    file = moelab.pack("lab", progress=False)
    assert file.parent == own_cache / "packs" and file.name.startswith("lab-")
    with moelab.load("lab", 8) as lab:
        assert reads_from(lab) == {file.name}


def test_the_command(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", str(path), "--verify"]) == 1
    assert "has no pack file" in capsys.readouterr().err
    assert main(["pack", str(path)]) == 0
    out, err = capsys.readouterr()
    assert out.strip() == str(path / "experts.moepack")
    assert "takes 54" in err and "are free in" in err
    assert main(["pack", str(path), "--verify"]) == 0
    assert "every expert is what was written" in capsys.readouterr().out


# What cannot be used, with the reason, and what happens then.


def _manifest(file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    begin, length = struct.unpack_from("<QQ", data, 24)
    return dict(json.loads(data[begin : begin + length]))


def _rewrite(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the manifest and makes all checksums right again."""
    data = file.read_bytes()
    begin, _ = struct.unpack_from("<QQ", data, 24)
    content = _manifest(file)
    change(content)
    text = json.dumps(content).encode()
    head = struct.pack("<8sIIQQQ", b"moepack\n", 1, 0, begin + len(text), begin, len(text))
    file.write_bytes(head + hashlib.sha256(text).digest() + data[72:begin] + text)


def _patch(offset: int, content: bytes) -> Callable[[Path], None]:
    def patch(file: Path) -> None:
        with file.open("r+b") as stream:
            stream.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
            stream.write(content)

    return patch


def _folder_instead(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _fewer_experts(content: dict[str, Any]) -> None:
    for layer in content["layers"]:
        layer["experts"] -= 1
        layer["crc32"].pop()


def _other_type(content: dict[str, Any]) -> None:
    content["layers"][1]["tensors"][0]["dtype"] = "I32"


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut short": (lambda f: os.truncate(f, f.stat().st_size - 1), r"was cut short: it has \d+ of"),
    "half": (lambda f: os.truncate(f, f.stat().st_size // 2), "was cut short"),
    "preamble cut": (lambda f: os.truncate(f, 30), "was cut short: it has 30 bytes"),
    "empty": (lambda f: os.truncate(f, 0), "is no pack file"),
    "too long": (lambda f: _patch(f.stat().st_size, b"x")(f), "is damaged: it has"),
    "another file": (_patch(0, b"GGUF"), "is no pack file"),
    "version": (_patch(8, b"\x02"), "format version 2, and this moelab reads version 1"),
    "manifest": (_patch(-9, b"#"), "manifest does not have the checksum"),
    "malformed": (lambda f: _rewrite(f, lambda c: c.pop("layers")), "manifest is malformed"),
    "beyond": (
        lambda f: _rewrite(f, lambda c: c["layers"][1].update(offset=1 << 30)),
        "points beyond its records",
    ),
    "another model": (
        lambda f: _rewrite(f, lambda c: c.update(fingerprint="0" * 16)),
        r"was made from another model: its fingerprint is 0{16}, this model's [0-9a-f]{16}",
    ),
    "layers": (lambda f: _rewrite(f, lambda c: c["layers"].pop()), "has not the 16 experts of"),
    "experts": (lambda f: _rewrite(f, _fewer_experts), "has not the 16 experts of"),
    "tensors": (lambda f: _rewrite(f, _other_type), "has other tensors than"),
    "a folder": (_folder_instead, "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_refused(kind: str, tmp_path: Path) -> None:
    """Where the checkpoint can be read it is, with a warning; else nothing is loaded."""
    damage, says = BAD[kind]
    direct = tiny.build(tmp_path / "direct", "olmoe")
    computed = published.granitemoe(tmp_path / "computed")
    for folder in (direct, computed):
        damage(moelab.pack(folder, progress=False))
    what_to_do = r".*experts\.moepack .*Run `moelab pack`.*delete the file"
    with pytest.warns(UserWarning, match=f"(?s){what_to_do}") as said:
        lab = moelab.load(direct, 4)
    assert any(re.search(says, str(w.message)) for w in said)
    with lab:
        assert reads_from(lab) == {"model.safetensors"}
        want = stock.stock_steps(stock.folder("olmoe"), PROMPT, TOKENS)
        assert stock.same_steps(stock.steps(lab.stream(PROMPT, TOKENS)), want)
    with pytest.raises(CheckpointError, match=f"(?s){what_to_do}") as error:
        moelab.load(computed, 4)
    assert re.search(says, str(error.value))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moelab.load(direct, 4, pack=False).close()


@pytest.mark.parametrize("kind", ["cut short", "version", "another model"])
def test_a_bad_file_is_made_again(kind: str, path: Path) -> None:
    BAD[kind][0](moelab.pack(path, progress=False))
    with pytest.raises(CheckpointError):
        find_pack(path, read_headers(path))
    with moelab.load(path, 4, pack=True) as lab:
        assert reads_from(lab) == {"experts.moepack"}
    assert check_records(path / "experts.moepack", path) > 0


def test_a_changed_model_is_another(path: Path) -> None:
    moelab.pack(path, progress=False)
    shard = path / "model.safetensors"
    content = bytearray(shard.read_bytes())
    # A fine-tune: same names, shapes and sizes, other numbers everywhere.
    start = tiny.read_header(shard)[1]
    content[start:] = bytes(255 - b for b in content[start:])
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match="was made from another model"):
        find_pack(path, read_headers(path))


def test_another_mlx_lm(tmp_path: Path) -> None:
    """What mlx-lm computed is trusted from the same version only; copied bytes from any."""
    direct = tiny.build(tmp_path / "direct", "olmoe")
    computed = published.granitemoe(tmp_path / "computed")
    for folder in (direct, computed):
        file = moelab.pack(folder, progress=False)
        _rewrite(file, lambda c: c["made_by"].update({"mlx-lm": "0.1"}))
    assert find_pack(direct, read_headers(direct)) is not None
    with pytest.raises(CheckpointError, match=r"as mlx-lm 0\.1 computes them, and this is mlx-lm"):
        find_pack(computed, read_headers(computed))


def test_every_flipped_byte_is_found(path: Path) -> None:
    """A damaged record: length and manifest are right, so only reading all of it can tell."""
    file = moelab.pack(path, progress=False)
    good = file.read_bytes()
    assert verify(path, progress=False) == file
    layers = list(read_pack(file).layers.values())
    for layer, expert, byte in [(0, 0, 0), (0, 7, 4000), (1, 15, layers[1].record_bytes - 1)]:
        at = layers[layer].offset + expert * layers[layer].stride + byte
        file.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(CheckpointError, match=f"expert {expert} of model.layers.{layer}.mlp"):
            verify(path, progress=False)
    gap = layers[0].offset + layers[0].record_bytes
    assert layers[0].record_bytes < layers[0].stride
    file.write_bytes(good[:gap] + b"\xff" + good[gap + 1 :])
    verify(path, progress=False)  # what lies between records is nobody's


# Disks and interrupts.


class Usage(NamedTuple):
    free: int


def test_no_room(path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said before anything is written; the cache is taken where only that has room."""
    free = {path: 400_000, own_cache / "packs": 300_000}
    monkeypatch.setattr(shutil, "disk_usage", lambda p: Usage(free[Path(p)]))
    with pytest.raises(CheckpointError) as error:
        moelab.pack(path, progress=False)
    texts = (
        "takes 540.7 kB of disk",
        "only 400.0 kB in",
        "and 300.0 kB in",
        "Free some",
        "MOELAB_CACHE",
    )
    assert all(text in str(error.value) for text in texts), str(error.value)
    with pytest.raises(CheckpointError, match=r"takes 540\.7 kB"):
        moelab.load(path, 4, pack=True)
    assert not left_behind(path) and not left_behind(own_cache)
    free[own_cache / "packs"] = 10_000_000
    assert moelab.pack(path, progress=False).parent == own_cache / "packs"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_fails_while_packing(
    number: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_layer = pack_module._write_layer
    calls = 0

    def failing(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(number, os.strerror(number))
        return write_layer(*args)

    monkeypatch.setattr(pack_module, "_write_layer", failing)
    says = "cannot be written" if number == errno.EIO else "was full before the 540.7 kB"
    with pytest.raises(CheckpointError, match=says):
        moelab.pack(path, progress=False)
    assert not left_behind(path)


def test_a_full_disk(path: Path) -> None:
    """The system's own error, from a device that is always full."""
    if not Path("/dev/full").exists():
        return
    with (
        pytest.raises(CheckpointError, match="was full before") as error,
        pack_module._written_whole(path / "experts.moepack", 10) as file,
        open("/dev/full", "wb", buffering=0) as full,
    ):
        file.write(b"x")
        full.write(b"x")
    assert "has been removed" in str(error.value)
    assert not left_behind(path)


def test_interrupts_leave_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any evaluation, write or at the very end; then it can be made as if nothing was."""
    places: list[tuple[Any, str]] = [
        (mx, "eval"),
        (zlib, "crc32"),
        (os, "fsync"),
        (Path, "replace"),
    ]
    for owner, name in places:
        function = getattr(owner, name)
        for stop in (1, 2, 20):
            calls = 0

            def stopping(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == stop:  # noqa: B023
                    raise KeyboardInterrupt
                return function(*args, **kwargs)  # noqa: B023

            with monkeypatch.context() as patch:
                patch.setattr(owner, name, stopping)
                try:
                    moelab.pack(path, progress=False)
                except KeyboardInterrupt:
                    assert not left_behind(path), (name, stop)
                else:
                    assert calls < stop
            (path / "experts.moepack").unlink(missing_ok=True)
    file = moelab.pack(path, progress=False)
    assert check_records(file, path) > 0


def test_an_interrupt_keeps_the_file_that_was_there(path: Path, monkeypatch: Any) -> None:
    file = moelab.pack(path, progress=False)
    _rewrite(file, lambda c: c.update(fingerprint="0" * 16))
    before = file.read_bytes()
    monkeypatch.setattr(zlib, "crc32", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        moelab.pack(path, progress=False)
    assert file.read_bytes() == before
    assert left_behind(path) == ["experts.moepack"]


def test_what_a_killed_process_left_is_removed(path: Path) -> None:
    gone = path / ".experts.moepack.99999999"
    mine = path / f".experts.moepack.{os.getppid()}"
    for file in (gone, mine):
        file.write_bytes(b"half a pack")
    moelab.pack(path, progress=False)
    assert not gone.exists() and mine.exists()


def test_a_model_that_changes_meanwhile(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_layer = pack_module._write_layer

    def changing(*args: Any) -> Any:
        config = path / "config.json"
        config.write_text(config.read_text() + " ")
        return write_layer(*args)

    monkeypatch.setattr(pack_module, "_write_layer", changing)
    with pytest.raises(CheckpointError, match="was changed while"):
        moelab.pack(path, progress=False)
    assert not left_behind(path)


def test_records_begin_at_pages() -> None:
    import mmap

    assert ALIGN % mmap.PAGESIZE == 0


def test_checks_look_at_the_pack_file(path: Path) -> None:
    """Where experts are read from is what `check` measures and what a lab lists as its files."""
    from moelab.check.bandwidth import expert_pieces
    from moelab.check.model import open_model
    from moelab.families import find_switches

    file = moelab.pack(path, progress=False)
    with moelab.load(path, 4) as lab:
        assert file in lab.shards and len(lab.shards) > 1
    with moelab.load(path, 4, pack=False) as lab:
        assert file not in lab.shards
    content = file.read_bytes()
    opened = open_model(path)
    stock_model, _ = stock.stock(path)
    for layer, site in zip(
        opened.layers, find_switches(stock_model, opened.facts.family), strict=True
    ):
        tensors = {(name, key): array for name, key, array in site.tensors()}
        for expert in range(layer.experts):
            pieces = expert_pieces(layer, expert)
            assert all(piece.path == file for piece in pieces)
            got = [content[p.offset : p.offset + p.nbytes] for p in pieces]
            assert got == [memory(tensors[key][expert]) for key in layer.origins]
