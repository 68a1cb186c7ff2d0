"""From a name to a folder, from headers to byte ranges, and a checkpoint's fingerprint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import moelab
from moelab.checkpoint.fingerprint import fingerprint
from moelab.checkpoint.headers import read_header, read_headers
from moelab.checkpoint.provenance import load_traced
from moelab.checkpoint.resolve import resolve
from moelab.errors import CheckpointError
from moelab.experts.attach import origins_of
from moelab.families import find_switches
from tests.support import stock, tiny


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_tensor_lies_where_its_header_says(family: str) -> None:
    """Each span's bytes are the tensor's, by the judgement of MLX's own reader."""
    path = stock.folder(family, "affine4", dtype="bfloat16", shards=3)
    spans = read_headers(path)
    files: dict[Path, Any] = {file: mx.load(str(file)) for file in tiny.shard_files(path)}
    assert set(spans) == {name for file in files.values() for name in file}
    for name, span in spans.items():
        array = files[span.path][name]
        disk = np.fromfile(span.path, np.uint8, span.nbytes, offset=span.offset)
        assert tuple(array.shape) == span.shape
        assert np.array_equal(np.array(array.view(mx.uint8)).ravel(), disk), name


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_expert_is_found_on_disk(family: str) -> None:
    """Row e of the model's tensor is the bytes at its place, in every layout."""
    for layout in stock.layouts(family, "affine4"):
        path = stock.folder(family, **layout)
        spans = read_headers(path)
        model, config, trace = load_traced(path)
        experts, top_k = tiny.experts(family)
        sites = find_switches(model, config["model_type"])
        assert [site.layer for site in sites] == tiny.moe_layers(family)
        for site in sites:
            assert (site.experts, site.top_k) == (experts, top_k)
            origins = origins_of(site, trace, spans)
            for projection, key, array in site.tensors():
                parts = origins[projection, key]
                assert len(parts) in (1, experts)
                disk = [np.fromfile(p.path, np.uint8, p.nbytes, offset=p.offset) for p in parts]
                memory = np.array(array.view(mx.uint8)).ravel()
                assert np.array_equal(np.concatenate(disk), memory), (site.path, key)


def test_loading_leaves_mlx_as_it_was(tmp_path: Path) -> None:
    before = mx.stack
    load_traced(stock.folder("olmoe"))
    assert mx.stack is before
    bad = tiny.build(tmp_path, "olmoe", layout="per_expert")
    config = json.loads((bad / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps({**config, "hidden_size": 128}))
    with pytest.raises(CheckpointError):
        load_traced(bad)
    assert mx.stack is before


# Headers that lie, at random: whatever a file says, the answer is spans inside it or an error.

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4)
    | st.sampled_from(["F32", "U32", "BF16", "F64"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)  # fmt: skip


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.integers(0, 10**6),
    st.sampled_from(["dtype", "shape", "data_offsets", None]),
    st.integers(0, 2),
    values,
)
def test_headers_that_lie(tmp_path: Path, which: int, key: str | None, item: int, lie: Any) -> None:
    file = tmp_path / "model.safetensors"
    if not file.exists():
        shutil.copy(tiny.shard_files(stock.folder("olmoe"))[0], tmp_path / "whole")
    shutil.copy(tmp_path / "whole", file)
    header, _ = tiny.read_header(file)
    names = [name for name in header if name != "__metadata__"]
    name = names[which % len(names)]
    if key is None:
        header[name] = lie
    elif key != "dtype" and item and header[name][key]:
        header[name][key][item % len(header[name][key])] = lie
    else:
        header[name][key] = lie
    tiny.write_header(file, header)
    _is_refused_or_inside(file)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.binary(max_size=200), st.booleans())
def test_files_that_are_no_safetensors(tmp_path: Path, content: bytes, framed: bool) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes((len(content).to_bytes(8, "little") if framed else b"") + content)
    _is_refused_or_inside(file)


def test_a_shard_that_was_left_behind(tmp_path: Path) -> None:
    """Stock lets either of two shards win; which one, nobody could say afterwards."""
    path = tiny.build(tmp_path / "m", "olmoe")
    shutil.copy(path / "model.safetensors", path / "model-00001-of-00001.safetensors")
    with pytest.raises(CheckpointError, match="nothing says which one counts"):
        moelab.load(path, 4)


def test_a_header_without_a_floor(tmp_path: Path) -> None:
    content = b"[" * 200_000
    (tmp_path / "model.safetensors").write_bytes(len(content).to_bytes(8, "little") + content)
    with pytest.raises(CheckpointError, match="not JSON"):
        read_header(tmp_path / "model.safetensors")


def _is_refused_or_inside(file: Path) -> None:
    try:
        spans = read_header(file)
    except CheckpointError as error:
        assert str(file) in str(error) and "Download it again" in str(error)
        return
    size, end = file.stat().st_size, 0
    for span in sorted(spans.values(), key=lambda s: (s.offset, s.nbytes)):
        assert end <= span.offset <= span.offset + span.nbytes <= size
        end = span.offset + span.nbytes


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 5}', '{"weight_map": [1]}', "{"])
def test_a_damaged_index(tmp_path: Path, text: str) -> None:
    path = tiny.build(tmp_path, "olmoe")
    (path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        read_headers(path)


# Names.


def cached(home: Path, name: str) -> Path:
    """Puts a model into a cache of the hub, as its client lays it out."""
    place = home / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    shutil.copytree(stock.folder("olmoe"), place / "snapshots" / ("0" * 40))
    return place / "snapshots" / ("0" * 40)


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No network, and an empty cache; returns the cache's folder."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_name_in_the_cache(offline: Path) -> None:
    folder = cached(offline, "someone/a-model")
    assert resolve("someone/a-model").resolve() == folder.resolve()
    with moelab.load("someone/a-model", 4) as lab:
        assert lab.name == "someone/a-model"
        want = stock.stock_steps(stock.folder("olmoe"), [5, 6, 7], 4)
        assert stock.same_steps(stock.steps(lab.stream([5, 6, 7], 4)), want)


def test_an_unknown_name_while_offline(offline: Path) -> None:
    with pytest.raises(CheckpointError, match="no-one/no-model") as error:
        moelab.load("no-one/no-model", 4)
    for text in ("not in the local cache", "Check the name and the connection", "give a folder"):
        assert text in str(error.value)
    with pytest.raises(CheckpointError, match="neither a folder nor a name"):
        moelab.load("no one/..", 4)


def test_an_unreachable_hub(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the client raises, the cache is tried, and the error says what happened."""
    snapshot = huggingface_hub.snapshot_download

    def unreachable(*args: Any, local_files_only: bool = False, **kwargs: Any) -> Any:
        if not local_files_only:
            raise OSError("no route to host")
        return snapshot(*args, local_files_only=True, **kwargs)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(CheckpointError, match="no route to host"):
        resolve("someone/a-model")
    folder = cached(offline, "someone/a-model")
    assert resolve("someone/a-model").resolve() == folder.resolve()


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny.build(tmp_path / "owner" / "model", "olmoe")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    asks: list[Callable[[], Path]] = [
        lambda: resolve(path), lambda: resolve(str(path)), lambda: resolve("~/owner/model"),
        lambda: resolve("owner/model"), lambda: resolve("./owner/model/"),
    ]  # fmt: skip
    for ask in asks:
        assert ask().resolve() == path.resolve()
    assert (resolve("lab") / "config.json").is_file()


def test_fingerprint(tmp_path: Path) -> None:
    """The same for a copy; another for other weights, another layout, another configuration."""

    def of(path: Path) -> str:
        return fingerprint(path, read_headers(path))

    path = stock.folder("olmoe")
    copy = shutil.copytree(path, tmp_path / "copy")
    assert of(path) == of(copy)
    assert len(of(path)) == 16 and int(of(path), 16) >= 0
    others = [
        stock.folder("olmoe", seed=1), stock.folder("olmoe", shards=3),
        stock.folder("olmoe", "affine8"), stock.folder("mixtral"),
    ]  # fmt: skip
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0}))
    assert len({of(p) for p in (path, copy, *others)}) == 6
    with moelab.load(path, 4) as lab:
        assert lab.fingerprint == of(path)
