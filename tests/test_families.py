"""Every family of mlx-lm: the table that says so, and that it would say otherwise.

The whole table is `moelab families`, which CI runs. Here are some families for each way in which
they differ, other checkpoints of them, and what must make a trial fail.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

import moelab
from moelab import families as moe_families
from moelab import loading
from moelab.check.exact import compare
from moelab.check.families import discover, table, trial
from moelab.check.families.build import (
    build,
    random_model,
    write_json,
    write_shards,
    write_tokenizer,
)
from moelab.check.families.configs import CONFIGS, SEEDS, config_of
from moelab.check.families.trial import Trial, logits, try_family
from moelab.cli import main
from moelab.errors import CheckpointError, MoelabError
from moelab.experts import source
from moelab.experts.attach import Attachment
from moelab.experts.loader import ExpertLoader
from moelab.experts.residency import Load
from moelab.families import find_switches
from moelab.routing.recorder import Recorder
from tests.support import layouts, muse, stock

QUICK = [
    "bailing_moe",  # a compiled sum
    "dbrx",  # no switch
    "deepseek_v41",  # experts within experts, flat tokens, a cache of its own
    "gemma4",  # a router beside the block
    "hunyuan",  # layers that differ
    "kimi_k3",  # a latent width, a norm after the sum
    "llama4",  # weighs before the experts
    "longcat_flash",  # identity experts
    "nemotron_h",  # SwitchMLP
    "phimoe",  # no top k of one score
]
"""A family for each way in which families differ."""

QUANTS: dict[str, dict[str, Any] | None] = {
    "none": None,
    **{f"affine{b}": {"group_size": 32, "bits": b} for b in (2, 3, 4, 5, 6, 8)},
    **{mode: {"mode": mode} for mode in ("mxfp4", "mxfp8", "nvfp4")},
}


# -- the table -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", QUICK)
def test_a_family(tmp_path: Path, family: str) -> None:
    found = try_family(family, tmp_path / family)
    assert not found.failed, found.notes
    if family == "dbrx":
        assert (found.direct, found.exact, found.weights) == ("–", "–", "–")
        assert "separate modules" in found.notes[0]
        return
    assert (found.direct, found.packed, found.exact) == ("yes", "yes", "yes")
    assert found.weights == ("–" if family == "llama4" else "yes")
    assert found.actions == ("drop, low_bit, wrong_slot" if family == "phimoe" else "all")
    assert re.fullmatch(r"\d × 16, top-[123/4]+", found.experts)


def test_muse_spark_by_plain_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own kernels need Metal; the bank does not."""
    from mlx_lm.models import muse_spark

    for kernel in muse.KERNELS:
        monkeypatch.setattr(muse_spark, kernel.__name__, kernel)
    monkeypatch.setattr(trial, "NEEDS_METAL", {})
    found = try_family("muse_spark", tmp_path / "x")
    assert (found.failed, found.exact, found.weights) == (False, "yes", "–"), found.notes
    assert found.actions == "low_bit, wrong_slot"


@pytest.mark.skipif(mx.metal.is_available(), reason="muse_spark runs where there is Metal")
def test_muse_spark_without_metal(tmp_path: Path) -> None:
    found = try_family("muse_spark", tmp_path / "x")
    assert not found.failed and found.exact == "–"
    assert "Metal" in found.notes[0]
    with pytest.raises(CheckpointError, match="cannot run this muse_spark model on this machine"):
        moelab.load(tmp_path / "x", 0.5)


def test_every_family_is_found() -> None:
    """By instantiating: whatever holds a switch, and nothing that the sources do not tell."""
    from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP
    from mlx_lm.utils import _get_classes

    found = discover.families()
    assert set(found) == set(CONFIGS), "one tiny configuration each"
    folder = discover.model_folder()
    named = {
        path.stem
        for path in folder.glob("*.py")
        if re.search(r"Switch(GLU|MLP)\(", path.read_text()) and path.stem != "switch_layers"
    }
    assert named <= set(found) and len(named) >= 43
    for family in ("glm_moe_dsa", "solar_open", "kimi_k25", "qwen3_5_moe", "qwen3_vl_moe"):
        assert family in found and family not in named, "by inheritance"
    for family in found:
        model_class, args_class = _get_classes(config_of(family))
        model = model_class(args_class.from_dict(config_of(family)))
        switches = [m for m in model.modules() if isinstance(m, SwitchGLU | SwitchMLP)]
        assert bool(switches) == (family not in trial.NO_SWITCH), family


def test_a_new_family_is_found(tmp_path: Path) -> None:
    files = {
        "base": "class BaseModelArgs: pass",
        "switch_layers": "class SwitchGLU: pass\nclass SwitchLinear: pass",
        "dense": "from .base import BaseModelArgs\nclass Model: pass",
        "direct": "from .switch_layers import SwitchGLU\nclass Model: pass",
        "heir": "from .direct import Model as Base\nclass Model(Base): pass",
        "grandchild": "from . import heir\nclass Model: pass",
        "late": "class Model:\n    def f(self):\n        import mlx_lm.models.direct",
        "alias": "from mlx_lm.models.direct import Model",
        "assigned": "from . import direct\nModel = direct.Model",
        "own_way": "class Model:\n    num_experts = 8",
        "in_words": "class MixtureMoE: pass\nclass Model: pass",
        "helper": "from .switch_layers import SwitchGLU\ndef f(): pass",
        "uses_helper": "from .helper import f\nclass Model: pass",
    }
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "package").mkdir()
    (tmp_path / "package/__init__.py").write_text("from ..direct import Model")
    assert discover.families(tmp_path) == sorted(
        ["direct", "heir", "grandchild", "late", "alias", "assigned", "own_way", "in_words",
         "uses_helper", "package"]
    )  # fmt: skip


def test_a_new_family_fails_loudly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(table, "families", lambda: ["brand_new", "dbrx"])
    assert main(["families", "--out", str(tmp_path)]) == 1
    page = capsys.readouterr().out
    assert (tmp_path / "families.md").read_text() == page
    assert "| brand_new |" in page and "**FAILED:** no tiny configuration: add one to" in page
    assert "**Failed: brand_new.**" in page


def test_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def answer(family: str, folder: Path) -> Trial:
        asked.append(family)
        return Trial(family, "2 × 16, top-2", "yes", "–", "yes", "yes", "all")

    monkeypatch.setattr(table, "try_family", answer)
    assert main(["families", "--only", "kimi_k2, mixtral", "--out", str(tmp_path / "new")]) == 0
    assert asked == ["deepseek_v3", "mixtral"], "kimi_k2 is loaded as deepseek_v3"
    page = (tmp_path / "new/families.md").read_text()
    assert page == capsys.readouterr().out
    assert "| mixtral |  | 2 × 16, top-2 | yes | – | yes | yes | all |  |" in page
    assert "joyai_llm_flash, kimi_k2" in page and "2 of 2 are exact." in page
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["families.md"]
    asked.clear()
    assert main(["families"]) == 0
    assert asked == discover.families()
    assert main(["families", "--only", "mixtral,nonsense"]) == 1
    said = capsys.readouterr().err
    assert "named nonsense" in said and "mixtral" in said


def test_the_page_in_results_is_of_this_mlx_lm() -> None:
    page = (Path(__file__).parents[1] / "results/families.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \|", page, re.MULTILINE)
    assert [row for row in rows if row != "family"] == discover.families()
    assert "FAILED" not in page


# -- a trial that cannot fail proves nothing ---------------------------------------------------


def failure(tmp_path: Path, family: str = "qwen3_moe") -> str:
    found = try_family(family, tmp_path / "x")
    assert found.failed
    assert (found.exact, found.weights) != ("yes", "yes")
    return found.notes[-1]


def test_wrong_expert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_one = ExpertLoader.read_one

    def other(self: ExpertLoader, load: Load) -> float:
        return read_one(self, load._replace(expert=load.expert ^ 1))

    monkeypatch.setattr(ExpertLoader, "read_one", other)
    assert "differ from stock mlx-lm's" in failure(tmp_path)


def test_wrong_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = Recorder._weights
    monkeypatch.setattr(Recorder, "_weights", lambda *a: weights(*a) * np.float32(1.00001))
    assert "recorded weights differ from the block's" in failure(tmp_path)


def test_wrong_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Recorder._routing_rows

    def other(self: Recorder, step: Any, count: int) -> np.ndarray:
        found = rows(self, step, count)
        found["expert"] = found["expert"] ^ 1
        return found

    monkeypatch.setattr(Recorder, "_routing_rows", other)
    assert "recorded weights differ from the block's" in failure(tmp_path)


def test_unseen_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe_families, "COMPILED_SUMS", {})
    assert "recorded as NaN" in failure(tmp_path, "bailing_moe")


def test_not_detached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Attachment, "detach", lambda self: None)
    assert "not made of the same modules" in failure(tmp_path)


def test_nothing_proven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "RUNS", ((3, 2), (1, 2)))
    assert "nothing is swept" in failure(tmp_path)


def test_listed_and_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "NO_SWITCH", {"mixtral": "said to be impossible"})
    assert "although it is listed as impossible" in failure(tmp_path, "mixtral")


def test_weights_said_to_be_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "NOT_VALID", {"mixtral": "said to be unknown"})
    assert "although there are said to be none" in failure(tmp_path, "mixtral")


def refused(tmp_path: Path, family: str) -> str:
    found = try_family(family, tmp_path / "x")
    assert (found.failed, found.exact) == (True, "yes")
    return found.notes[-1]


def test_refused_and_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "NO_ACTION", {})
    assert "it refuses substitute, reroute, and none is listed" in refused(tmp_path, "phimoe")


def test_said_to_be_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "NO_ACTION", {"mixtral": (("drop",), "said to be impossible")})
    assert "it refuses no miss action, and drop is listed" in refused(tmp_path, "mixtral")


def test_pack_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def direct(folder: Path, capacity: float, *, pack: bool) -> Any:
        return load(folder, capacity, pack=False)

    load = loading.load
    monkeypatch.setattr(loading, "load", direct)
    assert "read from elsewhere" in failure(tmp_path)


def test_packed_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be read directly is tried from a pack file, and said."""

    def refused(*_: Any) -> Any:
        raise CheckpointError("computed by mlx-lm")

    monkeypatch.setattr(source, "origins_of", refused)
    found = try_family("qwen3_moe", tmp_path / "x")
    assert (found.failed, found.direct, found.packed) == (False, "no", "yes"), found.notes
    assert (found.exact, found.weights, found.notes) == ("yes", "yes", ["computed by mlx-lm"])


# -- other checkpoints -------------------------------------------------------------------------


def same_at_half(folder: Path, *, packs: bool = False) -> None:
    """Logits at half of the experts have stock mlx-lm's bits; says whether that takes a pack."""
    wanted = logits(load_model(folder)[0])
    assert all(mx.isfinite(array).all().item() for array in wanted)
    before = {path.name for path in folder.iterdir()}
    with moelab.load(folder, 0.5) as lab:
        evicted: list[int] = []

        class Watcher:
            def loaded(self, layer: int, loads: Any, seconds: Any) -> None:
                evicted.extend(load.evicted for load in loads if load.evicted is not None)

        lab.attachment.bank.watchers.append(Watcher())
        assert compare(logits(lab.model), wanted).equal
        assert evicted
    made = {path.name for path in folder.iterdir()} - before
    assert made == ({"experts.moepack"} if packs else set())


@pytest.mark.parametrize("family", layouts.SWITCHES)
def test_one_tensor_an_expert(tmp_path: Path, family: str) -> None:
    """As published, in shards: `sanitize` stacks lazily, and the bank reads the pieces."""
    folder = build(
        tmp_path / "x",
        config_of(family),
        quant=None,
        seed=SEEDS.get(family, 0),
        arrange=functools.partial(layouts.per_expert, family),
        shards=3,
    )
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert any(re.search(r"\.(experts|mlp)\.15\.|\.mlp\.7\.", name) for name in names)
    assert len(set(names.values())) == 3
    same_at_half(folder)


@pytest.mark.parametrize("family", layouts.FUSED)
def test_gate_and_up_in_one_tensor(tmp_path: Path, family: str) -> None:
    """As published: mlx-lm cuts, so that a pack file is made."""
    arrange = functools.partial(layouts.fused, family)
    folder = build(tmp_path / "x", config_of(family), quant=None, arrange=arrange, shards=2)
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert not any(re.search(r"\.(switch_mlp|switch_glu|experts)\.up_proj", name) for name in names)
    same_at_half(folder, packs=True)
    (folder / "experts.moepack").unlink()
    with pytest.raises(CheckpointError, match="computed by mlx-lm"):
        moelab.load(folder, 0.5, pack=False)


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("family", ["gemma4_text", "nemotron_h", "gpt_oss"])
def test_quantisations(tmp_path: Path, family: str, quant: str) -> None:
    """With GeGLU, with SwitchMLP and with biases."""
    same_at_half(build(tmp_path / "x", config_of(family), quant=QUANTS[quant], seed=2, shards=2))


def test_a_scale_for_each_expert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nvfp4 with a global scale: a row of one number. Only GPUs compute with it, so only read."""
    nvfp4 = {"group_size": 16, "bits": 4, "mode": "nvfp4"}
    config = config_of("qwen3_moe")
    model = random_model(config)

    def experts(path: str, module: nn.Module) -> bool | dict[str, Any]:
        one = hasattr(module, "to_quantized") and ".switch_mlp." in path
        return {**nvfp4, "global_scale": True} if one else False

    nn.quantize(model, class_predicate=experts)
    weights = dict(tree_flatten(model.parameters()))
    assert weights["model.layers.0.mlp.switch_mlp.up_proj.global_scale"].shape == (16,)
    write_shards(tmp_path, weights, 1)
    write_tokenizer(tmp_path, False)
    write_json(tmp_path / "config.json", {**config, "quantization": nvfp4})
    if mx.default_device() == mx.Device(mx.cpu):
        for dtype in (None, "float32"):
            with pytest.raises(CheckpointError, match="on a GPU only"):
                moelab.load(tmp_path, 0.5, dtype=dtype)
        monkeypatch.setattr("moelab.loading.check_backend", lambda *_: None)
    with moelab.load(tmp_path, 0.5) as lab:
        for layer in lab.attachment.bank.layers:
            layer.load(layer.residency.admit([3, 7], layer.begin([3, 7])))
            layer.end()
            stock.check_slot_bytes(layer)
            scales = np.array(layer.switch.up_proj.global_scale)
            path = f"model.layers.{layer.layer}.mlp.switch_mlp.up_proj.global_scale"
            assert scales.shape == (8,) and layer.residency.slot_of.keys() == {3, 7}
            for expert, slot in layer.residency.slot_of.items():
                assert scales[slot] == weights[path][expert].item() != 0


def test_refused_for_its_own_reason(tmp_path: Path) -> None:
    dense = build(tmp_path / "dense", {**config_of("qwen2_moe"), "model_type": "qwen2"})
    with pytest.raises(CheckpointError, match="it is dense"):
        moelab.load(dense, 0.5)
    with pytest.raises(CheckpointError, match="each expert as a module of its own"):
        moelab.load(build(tmp_path / "dbrx", config_of("dbrx")), 0.5)


# -- a compiled sum ----------------------------------------------------------------------------


def test_opened_block() -> None:
    from mlx_lm.models import bailing_moe
    from mlx_lm.models.bailing_moe import BailingMoeSparseMoeBlock as Block

    compiled = bailing_moe.aggregate_expert_outputs
    opened = moe_families.opened_block(Block)
    assert opened is not None and issubclass(opened, Block)
    assert (opened.__name__, opened.__module__) == (Block.__name__, Block.__module__)
    assert moe_families.opened_block(nn.Linear) is None
    assert moe_families.opened_block(opened) is None, "it shows its factor once"

    class Seeing(mx.array):
        asked: list[mx.array]

        def seen(self, factor: mx.array) -> mx.array:
            self.asked.append(factor)
            return factor * 2 if len(self.asked) > 1 else factor

    y, weights = mx.random.normal((1, 5, 2, 8)), mx.random.uniform(shape=(1, 5, 2))
    shown = opened.__call__.__globals__["aggregate_expert_outputs"]
    assert compare([shown(y, weights)], [compiled(y, weights)]).equal
    seeing = Seeing(y)
    seeing.asked = []
    assert compare([shown(seeing, weights)], [compiled(y, weights)]).equal
    assert seeing.asked[0].shape == (1, 5, 2, 1)
    assert compare([shown(seeing, weights)], [compiled(y, weights * 2)]).equal, "what seen returns"
    assert bailing_moe.aggregate_expert_outputs is compiled, "mlx-lm's module is left alone"


def test_layers_are_numbered_as_in_the_model() -> None:
    from mlx_lm.utils import _get_classes

    def layers(family: str) -> list[int]:
        model_class, args_class = _get_classes(config_of(family))
        model = model_class(args_class.from_dict(config_of(family)))
        return [site.layer for site in find_switches(model, family)]

    assert layers("phixtral") == [0, 1], "transformer.h.0.moe.switch_mlp"
    assert layers("llama4") == [1, 3], "language_model.model.layers.1.feed_forward.experts"
    assert layers("nemotron_h") == [1, 3], "backbone.layers.1.mixer.switch_mlp"
    assert layers("deepseek_v41") == [0, 1, 2], "model.layers.0.mlp.experts.switch_mlp"


def test_unwritable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MoelabError, match="cannot be written"):
        table.FamilyTable([], {}, "x").save(tmp_path / "file" / "folder")
