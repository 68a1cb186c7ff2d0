"""What cannot work is refused with a message that says what, what was got, and what to do."""

from __future__ import annotations

import gc
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import psutil
import pytest

import moelab
from moelab.errors import CapacityError, CheckpointError, MoelabError
from moelab.experts import capacity as capacity_module
from tests.support import stock, tiny


def held() -> tuple[int, int]:
    """Open files and bytes of arrays, once nothing waits to be freed."""
    gc.collect()
    mx.clear_cache()
    return psutil.Process().num_fds(), mx.get_active_memory()


@pytest.fixture(autouse=True)
def nothing_half_done() -> Iterator[None]:
    """After each of these tests there are no more files open and no more memory in use."""
    stock.stock(stock.folder("olmoe"))  # what the tests compare with is kept on purpose
    stock.folder("olmoe", chat_template=True)
    files, size = held()
    yield
    now = held()
    assert now[0] <= files
    assert now[1] <= size + 1000


def refused(error: type[Exception], *texts: str, **options: Any) -> None:
    """`moelab.load` with these options raises and says all of these texts."""
    options = {"name_or_path": stock.folder("olmoe"), **options}
    with pytest.raises(error) as caught:
        moelab.load(**options)
    message = str(caught.value)
    for text in texts:
        assert text in message, message
    assert isinstance(caught.value, ValueError), "code that knows no moelab catches it as well"


@pytest.mark.parametrize(
    ("capacity", "texts"),
    [
        (1, ("capacity 1 is 1 experts in layer 0", "between 2 (the layer's top-k", "16 (all")),
        (0, ("capacity 0", "between 2")),
        (-1, ("capacity -1", "between 2")),
        (17, ("capacity 17 is 17 experts", "16 (all its experts)")),
        (True, ("must be an int (experts a layer)", "got True")),
        (1.5, ("share between 0 and 1, got 1.5", "Give an int")),
        (0.0, ("share between 0 and 1, got 0.0",)),
        (-0.5, ("got -0.5",)),
        (math.nan, ("got nan",)),
        (math.inf, ("got inf",)),
        (0.05, ("capacity 0.05 is 1 experts", "between 2")),
        ("half", ("'auto'", "got 'half'")),
        ("8", ("'auto'", "got '8'")),
        (None, ("got None",)),
        ([4], ("got [4]",)),
    ],
    ids=repr,
)
def test_capacity(capacity: Any, texts: tuple[str, ...]) -> None:
    refused(CapacityError, *texts, capacity=capacity)


def test_shares_are_rounded_half_up() -> None:
    # 16 experts: 0.15625 is 2.5 of them, 0.28125 is 4.5; 1.0 is all, and 1 would be one.
    for share, slots in ((0.15625, 3), (0.28125, 5), (0.125, 2), (0.5, 8), (1.0, 16)):
        with moelab.load(stock.folder("olmoe"), share) as lab:
            assert lab.capacity == slots


def test_automatic_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    path = stock.folder("olmoe")
    with moelab.load(path) as lab:
        assert lab.capacity == 16, "it all fits"
        use = lab.memory()
        assert lab.budget is not None
        run = lab.budget.need.footprint
    one = use.resident_experts // 16
    fixed = use.trunk + run.cache + run.prefill
    for room, slots in ((7.5, 7), (2.1, 2)):
        size = int((fixed + room * one) / (1 - capacity_module.MARGIN))
        found = capacity_module.Memory(size, "what the test says")
        monkeypatch.setattr(capacity_module, "available_memory", lambda found=found: found)
        with moelab.load(path) as lab:
            assert lab.capacity == slots
    size = int((fixed + 1.9 * one) / (1 - capacity_module.MARGIN))
    found = capacity_module.Memory(size, "what the test says")
    monkeypatch.setattr(capacity_module, "available_memory", lambda: found)
    refused(CapacityError, "too little memory", "what the test says", "needs 2", "smaller model")
    del lab


@pytest.mark.parametrize("layout", ["stacked", "per_expert"])
@pytest.mark.parametrize("kind", tiny.BROKEN)
def test_damaged_checkpoints(tmp_path: Path, kind: str, layout: tiny.Layout) -> None:
    says = {
        "missing_shard": ("1 of 2 shards are missing", "model-00002-of-00002", "Download"),
        "truncated_shard": ("model-00002-of-00002", "is damaged", "cut off", "Download"),
        "empty_shard": ("is damaged", "0 bytes", "Download"),
        "header_too_long": ("is damaged", "header claims", "Download"),
        "header_not_json": ("is damaged", "not JSON", "Download"),
        "offsets_beyond": ("is damaged", "ends at byte", "Download"),
        "offsets_overlap": ("is damaged", "overlap", "Download"),
        "offsets_size": ("is damaged", "needs", "bytes", "Download"),
        "missing_tensor": ("says that", "and it is not", "download"),
        "missing_config": ("has no config.json", "Give the folder"),
        "no_weights": ("missing", "model-0000"),
    }
    path = tiny.broken(tmp_path, kind, layout=layout)
    refused(CheckpointError, str(path), *says[kind], name_or_path=path, capacity=4)


def test_no_weights_and_no_index(tmp_path: Path) -> None:
    path = tiny.broken(tmp_path, "no_weights")
    (path / "model.safetensors.index.json").unlink()
    refused(CheckpointError, "no model*.safetensors", "Give the folder", name_or_path=path)


def test_dense_model() -> None:
    for capacity in (4, 1.0):
        refused(CheckpointError, "qwen2 model has no routed experts", "dense", "mlx_lm",
                name_or_path=stock.folder("dense"), capacity=capacity)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "cannot be read"),
        ("[1]", "names no model_type"),
        ("{}", "names no model_type"),
        ('{"model_type": "no_such_family"}', "no_such_family"),
        ('{"model_type": "olmoe"}', "mlx-lm cannot load"),
        ("\ud800", "cannot be read"),
    ],
)
def test_config(tmp_path: Path, text: str, says: str) -> None:
    path = tiny.build(tmp_path, "olmoe")
    (path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    refused(CheckpointError, str(path), says, name_or_path=path, capacity=4)


def test_config_of_another_model(tmp_path: Path) -> None:
    path = tiny.build(tmp_path, "olmoe")
    config = json.loads((path / "config.json").read_text())
    for change in ({"hidden_size": 128}, {"num_experts": 32}, {"num_hidden_layers": 3}):
        (path / "config.json").write_text(json.dumps({**config, **change}))
        refused(CheckpointError, str(path), name_or_path=path, capacity=4)


def test_places(tmp_path: Path) -> None:
    file = tmp_path / "a file"
    file.write_text("x")
    refused(CheckpointError, "a file", "is a file", "Give the folder", name_or_path=file)
    refused(CheckpointError, "config.json", "no model's folder", name_or_path=tmp_path)
    gone = tmp_path / "gone"
    refused(CheckpointError, "There is no folder", "'owner/model'", name_or_path=gone)
    refused(CheckpointError, "There is no folder 'gpt'", "'lab'", name_or_path="gpt")
    refused(CheckpointError, "no folder", name_or_path="a/b/c")


def test_unquantised_bfloat16(tmp_path: Path) -> None:
    path = stock.folder("olmoe", "none", dtype="bfloat16")
    for capacity in (4, 16):
        texts = ("unquantised", "bfloat16", "stock mlx-lm fails as well", "dtype='float32'")
        refused(CheckpointError, *texts, name_or_path=path, capacity=capacity)
    refused(ValueError, "dtype must be None", "'bfloat16'", dtype="bfloat16")


def test_experts_that_mlx_lm_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """No byte range holds them; a full bank needs none."""
    from mlx_lm.models.olmoe import Model

    def sanitize(self: Any, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        return {k: v * 1 if "up_proj.scales" in k else v for k, v in weights.items()}

    monkeypatch.setattr(Model, "sanitize", sanitize)
    texts = ("up_proj.scales is computed by mlx-lm", "`moelab pack`")
    refused(CheckpointError, *texts, capacity=4, pack=False)
    with moelab.load(stock.folder("olmoe"), 16) as lab:
        lab.generate([5], 2)
    del lab


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", "warm"), ("top_p", 0), ("temperature", -1), ("top_k", [])]
)
def test_bad_recommendations(tmp_path: Path, name: str, value: Any) -> None:
    """A generation_config.json that no sampler takes is named, and nothing stays open."""
    recommended = {"do_sample": True, name: value}
    path = tiny.build(tmp_path, "olmoe", generation_config=recommended)
    texts = ("generation_config.json", name, "Correct the file")
    refused(CheckpointError, *texts, name_or_path=path, capacity=4)


@pytest.mark.parametrize("layout", stock.layouts("olmoe", "affine4"))
@pytest.mark.parametrize("cached", [False, True])
def test_cut_off_after_loading(tmp_path: Path, layout: dict[str, Any], cached: bool) -> None:
    """A read error in the middle of a generation is clear, and ends with the damage."""
    path = tiny.build(tmp_path, "olmoe", **layout)
    want = stock.stock_steps(stock.folder("olmoe"), tiny.prompt(20), 6)
    with moelab.load(path, 4) as lab:
        running = lab.stream(tiny.prompt(20), 6)
        if cached:
            next(iter(running))
        whole = {file: file.read_bytes() for file in tiny.shard_files(path)}
        for file in whole:
            os.truncate(file, 5000)
        with pytest.raises(CheckpointError, match=r"ended at byte .* of expert \d+ .*Restore it"):
            for _ in running:
                lab.reset()
        with pytest.raises(MoelabError):
            lab.generate(tiny.prompt(20), 6)
        for file, content in whole.items():
            file.write_bytes(content)
        with pytest.raises(CheckpointError, match="written to since"):
            lab.generate(tiny.prompt(20), 6)
    with moelab.load(path, 4) as lab:
        assert stock.same_steps(stock.steps(lab.stream(tiny.prompt(20), 6)), want)
    del lab, running


def _flip(file: Path) -> None:
    """Changes every byte after the header, where they are."""
    start = tiny.read_header(file)[1] if file.suffix == ".safetensors" else 16384
    with file.open("r+b") as stream:
        stream.seek(start)
        rest = stream.read()
        stream.seek(start)
        stream.write(bytes(255 - byte for byte in rest))


@pytest.mark.parametrize(
    "layout", [{}, {"layout": "per_expert", "shards": 2}, None], ids=["stacked", "own", "packed"]
)
def test_a_file_that_changes_after_loading(tmp_path: Path, layout: dict[str, Any] | None) -> None:
    """Written to in place it is noticed; where another takes its name, the old one is read on."""
    path = tiny.build(tmp_path / "model", "olmoe", **(layout or {}))
    if layout is None:
        moelab.pack(path, progress=False)
    files = tiny.shard_files(path) if layout is not None else [path / "experts.moepack"]
    want = stock.stock_steps(stock.folder("olmoe"), tiny.prompt(20), 6)
    with moelab.load(path, 4) as lab:
        for file in files:
            other = tmp_path / file.name
            other.write_bytes(file.read_bytes())
            _flip(other)
            other.replace(file)
        assert stock.same_steps(stock.steps(lab.stream(tiny.prompt(20), 6)), want)
    for file in files:
        _flip(file)
    with moelab.load(path, 4) as lab:
        running = iter(lab.stream(tiny.prompt(20), 6))
        next(running)
        for file in files:
            _flip(file)
        with pytest.raises(CheckpointError, match=r"was written to since .*Load the model again"):
            for _ in running:
                lab.reset()
    del lab, running


ASKS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no prompt": (lambda lab: lab.generate(""), "prompt is empty"),
    "no ids": (lambda lab: lab.generate([]), "prompt is empty"),
    "no messages": (lambda lab: lab.generate([], template=True), "prompt is empty"),
    "a number": (lambda lab: lab.generate(5), "got 5"),
    "mixed": (lambda lab: lab.generate([5, "a"]), "token ids or messages"),
    "floats": (lambda lab: lab.generate([5.0]), "token ids or messages"),
    "no role": (lambda lab: lab.generate([{"content": "a"}]), "'role' and 'content'"),
    "messages": (lambda lab: lab.generate([{"role": "user", "content": "a"}]), "no chat template"),
    "template": (lambda lab: lab.generate("a", template=True), "template=False"),
    "which template": (lambda lab: lab.generate("a", template="chatml"), "'chatml'"),
    "chat": (lambda lab: lab.chat(), "no chat template"),
    "max_tokens 0": (lambda lab: lab.stream([5], 0), "positive, or -1"),
    "max_tokens -2": (lambda lab: lab.stream([5], -2), "got -2"),
    "max_tokens 1.5": (lambda lab: lab.stream([5], 1.5), "got 1.5"),
    "chunk": (lambda lab: lab.stream([5], prefill_step_size=0), "prefill_step_size"),
    "kv_bits": (lambda lab: lab.stream([5], kv_bits=3), "8, 4 or None, got 3"),
    "temperature": (lambda lab: lab.stream([5], temperature=-1), "temperature must be 0 or more"),
    "not a temperature": (lambda lab: lab.stream([5], temperature=math.nan), "got nan"),
    "top_p": (lambda lab: lab.stream([5], top_p=0), "top_p"),
    "top_p 2": (lambda lab: lab.stream([5], top_p=2), "at most 1, got 2"),
    "top_k": (lambda lab: lab.stream([5], top_k=-1), "top_k"),
    "min_p": (lambda lab: lab.stream([5], min_p=1.5), "min_p"),
    "repetition": (lambda lab: lab.stream([5], repetition_penalty=0), "repetition_penalty"),
    "not a penalty": (lambda lab: lab.stream([5], repetition_penalty=math.nan), "got nan"),
}  # fmt: skip


def test_arguments_of_a_generation() -> None:
    """They raise at the call, not at the first token, and leave the lab as it was."""
    want = stock.stock_steps(stock.folder("olmoe"), [5, 6], 4)
    with moelab.load(stock.folder("olmoe"), 4) as lab:
        for name, (ask, says) in ASKS.items():
            try:
                ask(lab)
            except ValueError as error:
                assert says in str(error), name
            else:
                pytest.fail(f"{name} was taken")
        assert stock.same_steps(stock.steps(lab.stream([5, 6], 4)), want)
    del lab
