"""`moelab.plan`: from headers alone, and the same as what `moelab.load` then does."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import mlx.core as mx
import pytest
from huggingface_hub.errors import (
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils._safetensors import (
    SafetensorsFileMetadata,
    SafetensorsRepoMetadata,
    TensorInfo,
)

import moelab
from moelab.checkpoint import outline
from moelab.checkpoint.headers import read_header, shard_paths
from moelab.cli import main
from moelab.errors import CapacityError, CheckpointError
from moelab.experts import capacity as capacity_module
from moelab.experts.memory import Memory
from moelab.planning import Plan
from tests.support import stock, tiny

NAME = "someone/model"


class Hub:
    """A hub with one model, of which it gives `config.json` and headers and nothing else.

    Args:
        folder: The model.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[str] = []
        self.error: Exception | None = None

    def hf_hub_download(self, name: str, file: str, revision: str | None = None) -> str:
        self.asked.append(file)
        if self.error is not None:
            raise self.error
        assert name == NAME and file.endswith(".json"), "no weights are asked for"
        if not (self.folder / file).exists():
            raise no_entry(file)
        return str(self.folder / file)

    def get_safetensors_metadata(self, name: str, revision: str | None = None) -> Any:
        files = {}
        for path in shard_paths(self.folder):
            spans = read_header(path)
            start = min(span.offset for span in spans.values())
            tensors = {}
            for tensor, span in spans.items():
                begin = span.offset - start
                tensors[tensor] = TensorInfo(
                    dtype=span.dtype,  # type: ignore[arg-type]
                    shape=list(span.shape),
                    data_offsets=(begin, begin + span.nbytes),
                )
            files[path.name] = SafetensorsFileMetadata(metadata={}, tensors=tensors)
        weight_map = {t: f for f, m in files.items() for t in m.tensors}
        return SafetensorsRepoMetadata(
            metadata=None, sharded=len(files) > 1, weight_map=weight_map, files_metadata=files
        )


def no_entry(file: str) -> Exception:
    error = RemoteEntryNotFoundError.__new__(RemoteEntryNotFoundError)
    Exception.__init__(error, f"404: no {file}")
    return error


def bare(kind: type[Exception], text: str = "what the client says") -> Exception:
    """An error of the hub's client without the HTTP response that its constructor wants."""
    error = kind.__new__(kind)
    Exception.__init__(error, text)
    return error


def hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Hub:
    found = Hub(folder)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", found.hf_hub_download)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", found.get_safetensors_metadata)

    def nothing(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", nothing)
    return found


def memory(monkeypatch: pytest.MonkeyPatch, nbytes: float) -> None:
    found = Memory(int(nbytes), "what the test says")
    monkeypatch.setattr(capacity_module, "available_memory", lambda: found)


def settled() -> int:
    gc.collect()
    mx.clear_cache()
    return mx.get_active_memory()


@pytest.mark.parametrize("family", [*tiny.FAMILIES, "lab"])
def test_the_plan_is_what_load_does(
    family: str, monkeypatch: pytest.MonkeyPatch, lab_path: Path
) -> None:
    """Bytes and capacity, for the folder and for the hub's headers of the same model."""
    path = lab_path if family == "lab" else stock.folder(family, shards=2)
    memory(monkeypatch, 1e12)
    whole = moelab.plan(path, context=100)
    assert whole.runs and whole.verdict == "fits whole" and not whole.dense
    assert whole.budget is not None
    run = whole.budget.need.footprint
    room = whole.trunk_bytes + run.cache + run.prefill
    memory(monkeypatch, (room + 0.6 * (whole.total_bytes - whole.trunk_bytes)) / 0.9)
    before = settled()
    here = moelab.plan(path, context=100)
    there = hub(monkeypatch, path)
    found = moelab.plan(NAME, context=100)
    assert settled() <= before + 2000, "nothing was evaluated"
    assert set(there.asked) == {"config.json", "hf_quant_config.json"}
    with moelab.load(path, context=100) as lab:
        assert lab.capacity < lab.sites[0].experts
        use = lab.memory()
        for plan in (here, found):
            assert plan.capacity == tuple(lab.capacities) and plan.budget == lab.budget
            assert plan.budget is not None and plan.budget.weights == use.total
            assert plan.trunk_bytes == use.trunk
            assert plan.layers == tuple(site.layer for site in lab.sites)
            assert plan.experts == tuple(site.experts for site in lab.sites)
            assert plan.top_k == tuple(site.top_k for site in lab.sites)
            assert plan.not_direct is None and plan.family == lab.config["model_type"]
            assert plan.verdict.startswith(f"runs with {lab.capacity} of {lab.sites[0].experts}")
            assert f"{lab.capacity} of {lab.sites[0].experts}" in repr(plan)
            size = sum(f.stat().st_size for f in shard_paths(path))
            assert plan.disk_bytes == pytest.approx(size, rel=0.15)
    assert here.downloaded and here.disk_needed == 0
    assert not found.downloaded and found.disk_needed == found.disk_bytes
    budget = (whole.trunk_bytes + (whole.total_bytes - whole.trunk_bytes) / 2) / 1e9
    with moelab.load(path, budget_gb=budget) as lab:
        assert moelab.plan(path, budget_gb=budget).capacity == tuple(lab.capacities)


def test_shared_experts() -> None:
    shared = {family: moelab.plan(stock.folder(family)).shared_expert for family in tiny.FAMILIES}
    has = {"qwen2_moe", "qwen3_next", "deepseek_v3"}
    assert {family for family, found in shared.items() if found} == has


def test_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    there = hub(monkeypatch, stock.folder("qwen2_moe"))
    plan = moelab.plan(NAME, budget_gb=0.0003)
    texts = repr(plan), plan._repr_html_()
    for text in texts:
        for word in (NAME, "top-2", "a shared expert", "to be downloaded", "needed", "your budget",
                     "trunk", "cache", "runs with", "experts are read from"):  # fmt: skip
            assert word in text, word
    found = json.loads(json.dumps(plan.to_dict()))
    assert found["verdict"] == plan.verdict and found["capacity"] == list(plan.capacity)
    assert found["budget"]["rows"][0]["nbytes"] == 300_000
    poor = moelab.plan(NAME, budget_gb=0.0001)
    assert not poor.runs and poor.verdict.startswith("does not fit: the 2 experts a layer")
    assert set(poor.capacity) == {0}
    monkeypatch.setattr("moelab.planning._free", lambda _: 10)
    full = moelab.plan(NAME)
    assert not full.runs and "does not fit on the disk" in full.verdict and "10 bytes" in repr(full)
    assert there.asked


def test_where_a_packed_file_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gpt_oss's own layout has gate and up interleaved, which mlx-lm takes apart."""
    import numpy as np
    from mlx.utils import tree_flatten

    model = stock.stock(stock.folder("gpt_oss", "none"))[0]
    weights = dict(tree_flatten(model.parameters()))
    out: dict[str, mx.array] = {}
    for name, value in weights.items():
        if ".experts.gate_proj." in name:
            up = weights[name.replace("gate_proj", "up_proj")]
            both = np.stack([np.array(value), np.array(up)], axis=2)
            joined = mx.array(both.reshape(value.shape[0], -1, *value.shape[2:]))
            kind = name.rpartition(".")[2]
            new = "gate_up_proj_bias" if kind == "bias" else "gate_up_proj.weight"
            out[name.replace(f"gate_proj.{kind}", new)] = joined
        elif ".experts.down_proj.bias" in name:
            out[name.replace("down_proj.bias", "down_proj_bias")] = value
        elif ".experts.up_proj." not in name:
            out[name] = value
    mx.save_safetensors(str(tmp_path / "model.safetensors"), out, metadata={"format": "pt"})
    shutil.copy(stock.folder("gpt_oss", "none") / "config.json", tmp_path)
    whole = moelab.plan(tmp_path)
    assert whole.not_direct is not None and whole.disk_needed == 0, "all resident: nothing to read"
    routed = whole.total_bytes - whole.trunk_bytes
    part = moelab.plan(tmp_path, budget_gb=(whole.trunk_bytes + routed / 2) / 1e9)
    assert part.disk_needed == routed
    assert "packed file" in part.verdict and "packed file" in repr(part)
    hub(monkeypatch, tmp_path)
    found = moelab.plan(NAME, budget_gb=(whole.trunk_bytes + routed / 2) / 1e9)
    assert found.disk_needed == found.disk_bytes + routed


def test_dense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny.build(tmp_path / "dense", "dense")
    memory(monkeypatch, 1e9)
    plan = moelab.plan(path)
    assert plan.dense and not plan.runs and plan.capacity == () and plan.budget is None
    assert plan.verdict.startswith("dense: it has no routed experts") and "mlx_lm" in repr(plan)
    assert ", which fits" in plan.verdict and plan.trunk_bytes == plan.total_bytes > 0
    memory(monkeypatch, 1000)
    assert "does not fit" in moelab.plan(path).verdict
    json.dumps(plan.to_dict())


def test_what_this_backend_cannot_do_is_a_note() -> None:
    plan = moelab.plan(stock.folder("olmoe", "none", dtype="bfloat16"))
    assert len(plan.notes) == 1 and "dtype='float32'" in repr(plan)


def test_a_model_in_the_cache_counts_as_here(monkeypatch: pytest.MonkeyPatch) -> None:
    path = stock.folder("olmoe")
    there = hub(monkeypatch, path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(path))
    plan = moelab.plan(NAME)
    assert plan.downloaded and plan.disk_needed == 0 and not there.asked


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (bare(RepositoryNotFoundError), "There is no model 'someone/model'"),
        (bare(LocalEntryNotFoundError), "hub cannot be reached"),
        (ConnectionError("no route"), "hub cannot be reached .*no route"),
        (bare(NotASafetensorsRepoError), "no model.safetensors on the hub"),
        (no_entry("config.json"), "has no config.json on the hub"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_the_hub_refuses(error: Exception, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, stock.folder("olmoe")).error = error
    with pytest.raises(CheckpointError, match=text):
        moelab.plan(NAME)


@pytest.mark.parametrize(
    ("name", "text"),
    [("no-such-folder", "no folder 'no-such-folder'"), ("/no/such", "no folder '/no/such'")],
)
def test_no_such_model(name: str, text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        moelab.plan(name)


@pytest.mark.parametrize("config", ["no JSON", "[]", "{}", '{"model_type": "no_such_family"}'])
def test_bad_configurations(config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny.build(tmp_path / "x", "olmoe")
    (path / "config.json").write_text(config)
    with pytest.raises(CheckpointError):
        moelab.plan(path)
    hub(monkeypatch, path)
    with pytest.raises(CheckpointError) as caught:
        moelab.plan(NAME)
    if "no_such_family" in config:
        assert NAME in str(caught.value) and "moelab-plan" not in str(caught.value)


@pytest.mark.parametrize("file", ["../model.safetensors", "a/b.safetensors", ".hidden"])
def test_shards_with_bad_names(file: str, tmp_path: Path) -> None:
    metadata = SafetensorsFileMetadata(metadata={}, tensors={})
    with pytest.raises(CheckpointError, match="no file name"):
        outline._write_hollow(NAME, tmp_path, file, metadata)
    assert not list(tmp_path.parent.glob("model.safetensors"))


def test_headers_that_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    there = hub(monkeypatch, stock.folder("olmoe"))
    metadata = there.get_safetensors_metadata(NAME)
    tensors = metadata.files_metadata["model.safetensors"].tensors
    first = next(iter(tensors.values()))
    first.data_offsets = (0, first.data_offsets[1] + 64)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda *_, **__: metadata)
    with pytest.raises(CheckpointError, match=r"needs .* bytes"):
        moelab.plan(NAME)


@pytest.mark.parametrize(
    "options", [{"context": 0}, {"kv_bits": 3}, {"budget_gb": -1}, {"budget_gb": float("nan")}]
)
def test_bad_arguments(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CapacityError):
        moelab.plan("lab", **options)
    if "budget_gb" in options:
        with pytest.raises(CapacityError):
            moelab.plan(tiny.build(tmp_path / "dense", "dense"), **options)


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "lab", "--budget", "0.01", "--context", "16"]) == 0
    out = capsys.readouterr().out
    assert "verdict" in out and "16 tokens" in out and "your budget" in out
    assert main(["plan", "no-such-folder"]) == 1
    assert "no folder" in capsys.readouterr().err


class Served(BaseHTTPRequestHandler):
    """Serves a folder's files as the hub does, and counts the bytes of weights that it gave."""

    folder: Path
    weights = 0
    ranges: ClassVar[list[str]] = []

    def _answer(self, body: bool) -> None:
        file = self.folder / self.path.rpartition("/resolve/main/")[2]
        if not self.path.startswith(f"/{NAME}/resolve/main/") or not file.is_file():
            self.send_response(404)
            known = self.path.startswith(f"/{NAME}/")
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = file.read_bytes()
        asked = self.headers.get("Range")
        if asked:
            first, last = map(int, asked.removeprefix("bytes=").split("-"))
            self.ranges.append(asked)
            part = data[first : last + 1]
        else:
            part = data
        if body and file.suffix == ".safetensors":
            type(self).weights += len(part)
        self.send_response(206 if asked else 200)
        self.send_header("ETag", f'"{file.name}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(part)))
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}")
        self.end_headers()
        if body:
            self.wfile.write(part)

    def do_GET(self) -> None:
        self._answer(True)

    def do_HEAD(self) -> None:
        self._answer(False)

    def log_message(self, *_: Any) -> None:
        pass


def test_over_http(tmp_path: Path, lab_path: Path) -> None:
    """The real client of the hub, in a process of its own, against a server on this machine."""
    Served.folder = lab_path
    server = ThreadingHTTPServer(("127.0.0.1", 0), Served)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(Path(moelab.__file__).parents[1]),
    }
    code = "import sys; from moelab.cli import main; sys.exit(main(sys.argv[1:]))"

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, "plan", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    try:
        done = run(NAME, "--budget", "0.01")
        missing = run("someone/else")
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr
    plan = moelab.plan(lab_path, budget_gb=0.01)
    assert plan.verdict in done.stdout and "to be downloaded" in done.stdout
    assert Served.ranges and Served.weights < 300_000 < plan.disk_bytes / 10, "headers alone"
    assert not list(tmp_path.rglob("*.safetensors"))
    assert missing.returncode == 1 and "There is no model 'someone/else'" in missing.stderr


def test_names() -> None:
    assert moelab.Plan is Plan and callable(moelab.plan)
