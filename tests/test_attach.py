"""Promise 5: attaching and detaching leave the model as it was found."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.switch_layers import SwitchGLU
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import dequantize_model, quantize_model, save_model

import moelab
from moelab import loading
from moelab.checkpoint.provenance import load_traced
from moelab.errors import AttachedError, ClosedError
from moelab.experts.switch import PartialSwitch
from moelab.families import find_switches
from moelab.lab import Lab
from tests.support import stock, tiny

TOKENS = mx.array([tiny.prompt(30)])
LORA = {"rank": 2, "scale": 1.0, "dropout": 0.0}


def snapshot(model: Any) -> dict[str, Any]:
    """Identity of every module, of every array and of everything that an instance carries."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        found[path] = (id(module), type(module), sorted(module), sorted(vars(module)))
        for key, value in module.items():
            if isinstance(value, mx.array):
                found[f"{path}.{key}"] = id(value)
    return found


@pytest.fixture
def as_loaded(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Snapshots of models as they were before their bank was attached."""
    taken: list[dict[str, Any]] = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        model, config, trace = load_traced(*args, **kwargs)
        taken.append(snapshot(model))
        return model, config, trace

    monkeypatch.setattr(loading, "load_traced", watched)
    return taken


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_model_is_left_as_it_was_found(family: str, as_loaded: list[dict[str, Any]]) -> None:
    path = stock.folder(family)
    lab = moelab.load(path, tiny.capacities(family)[0])
    assert snapshot(lab.model) != as_loaded[0]
    want = stock.stock(path)[0](TOKENS)
    assert stock.equal(lab.model(TOKENS), want)
    lab.close()
    assert snapshot(lab.model) == as_loaded[0]
    assert not any(isinstance(m, PartialSwitch) for m in lab.model.modules())
    assert stock.equal(lab.model(TOKENS), want)
    theirs = dict(tree_flatten(stock.stock(path)[0].parameters()))
    ours = dict(tree_flatten(lab.model.parameters()))
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(ours[name], theirs[name]) for name in ours)
    lab.close()
    assert snapshot(lab.model) == as_loaded[0]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_failed_attachment_leaves_nothing(
    family: str, as_loaded: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error at the last layer takes out the layers that were already replaced."""
    from moelab.experts import attach

    models: list[Any] = []
    count = len(tiny.moe_layers(family))

    class Failing(PartialSwitch):
        def __init__(self, *args: Any) -> None:
            nonlocal count
            count -= 1
            if not count:
                raise MemoryError("no more")
            super().__init__(*args)

    def find(model: Any, model_type: str) -> Any:
        models.append(model)
        return find_switches(model, model_type)

    monkeypatch.setattr(loading, "find_switches", find)
    monkeypatch.setattr(attach, "PartialSwitch", Failing)
    with pytest.raises(MemoryError):
        moelab.load(stock.folder(family), tiny.capacities(family)[0])
    assert snapshot(models[0]) == as_loaded[0]


def test_closing_while_recording_restores_all() -> None:
    path = stock.folder("qwen3_moe")
    lab = moelab.load(path, 4)
    with lab.record(), lab.record():
        lab.model(TOKENS)
        lab.close()
    switches = [m for m in lab.model.modules() if isinstance(m, SwitchGLU)]
    assert len(switches) == 2 and {type(m) for m in switches} == {SwitchGLU}
    assert type(lab.model) is type(stock.stock(path)[0])
    assert stock.equal(lab.model(TOKENS), stock.stock(path)[0](TOKENS))


def test_two_labs_of_one_checkpoint() -> None:
    path = stock.folder("olmoe")
    want = stock.stock(path)[0](TOKENS)
    with moelab.load(path, 2) as one:
        with moelab.load(path, 8) as two:
            assert stock.equal(one.model(TOKENS), want)
            assert stock.equal(two.model(TOKENS), want)
        assert stock.equal(one.model(TOKENS), want)
        with pytest.raises(AttachedError):
            one.model.parameters()
        two.model.parameters()


def test_attributes_of_the_replaced_switch() -> None:
    """What a family reads from its switch is answered as the stock switch would."""
    with moelab.load(stock.folder("gpt_oss"), 4) as lab:
        site = lab.sites[0]
        switch = site.parent[site.key]
        assert isinstance(switch, PartialSwitch)
        assert switch.gate_proj.num_experts == 16
        assert switch.gate_proj is site.switch.gate_proj
        assert switch.activation is site.switch.activation
        assert not hasattr(switch, "nonsense")


def test_full_layers_stay_stock(as_loaded: list[dict[str, Any]]) -> None:
    """With C = E there is nothing attached, so nothing is refused either."""
    path = stock.folder("olmoe")
    with moelab.load(path, 16) as lab:
        assert snapshot(lab.model) == as_loaded[0]
        assert lab.memory().slots == 0
        lab.model.freeze()
        assert len(tree_flatten(lab.model.parameters())) > 10
    with moelab.load(path, 1.0) as lab:
        assert lab.capacity == 16


def unchanged(lab: Lab) -> Any:
    return tree_map(lambda a: a, nn.Module.parameters(lab.model))


Ask = Callable[[Lab, Path], Any]
REFUSED: dict[str, Ask] = {
    "save_weights": lambda lab, out: lab.model.save_weights(str(out / "w.safetensors")),
    "save_model": lambda lab, out: save_model(out, lab.model),
    "save_model, donated": lambda lab, out: save_model(out, lab.model, donate_model=True),
    "nn.quantize": lambda lab, _: nn.quantize(lab.model, 32, 4),
    "nn.quantize of the inner model": lambda lab, _: nn.quantize(lab.model.model, 32, 4),
    "quantize_model": lambda lab, _: quantize_model(lab.model, {}, 32, 4),
    "dequantize_model": lambda lab, _: dequantize_model(lab.model),
    "lora": lambda lab, _: linear_to_lora_layers(lab.model, 1, LORA),
    "freeze": lambda lab, _: lab.model.freeze(),
    "unfreeze": lambda lab, _: lab.model.unfreeze(),
    "parameters": lambda lab, _: lab.model.parameters(),
    "trainable_parameters": lambda lab, _: lab.model.trainable_parameters(),
    "apply": lambda lab, _: lab.model.apply(lambda a: a),
    "set_dtype": lambda lab, _: lab.model.set_dtype(mx.float32),
    "update": lambda lab, _: lab.model.update(unchanged(lab)),
    "load_weights": lambda lab, _: lab.model.load_weights(tree_flatten(unchanged(lab))),
    "value_and_grad": lambda lab, _: nn.value_and_grad(lab.model, lambda x: x.sum())(TOKENS),
}  # fmt: skip


@pytest.mark.parametrize("ask", REFUSED)
def test_what_needs_all_experts_is_refused(ask: str, tmp_path: Path) -> None:
    """It raises before anything is changed or written, and works once the lab is closed."""
    # A quantised model cannot be quantised again, nor a float one dequantised.
    quant = "none" if "quantize" in ask and "de" not in ask else "affine4"
    path = stock.folder("qwen3_moe", quant)
    want = stock.stock(path)[0](TOKENS)
    with moelab.load(path, 4) as lab:
        lab.model(TOKENS)
        before = snapshot(lab.model)
        with (
            pytest.raises(AttachedError, match=r"lab\.close\(\)") as error,
            contextlib.redirect_stdout(io.StringIO()),
        ):
            REFUSED[ask](lab, tmp_path)
        assert "every expert" in str(error.value)
        assert not list(tmp_path.rglob("*.safetensors"))
        assert snapshot(lab.model) == before
        assert stock.equal(lab.model(TOKENS), want)
    if ask not in ("value_and_grad",):  # stock has no gradient of quantised experts
        with contextlib.redirect_stdout(io.StringIO()):
            REFUSED[ask](lab, tmp_path)


def test_a_saved_model_is_the_original(tmp_path: Path) -> None:
    path = stock.folder("qwen2_moe")
    lab = moelab.load(path, 4)
    lab.model(TOKENS)
    lab.close()
    for file in path.iterdir():
        if not file.name.startswith("model"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    save_model(tmp_path, lab.model)
    again, _ = mlx_lm.load(str(tmp_path))[:2]
    assert stock.equal(again(TOKENS), stock.stock(path)[0](TOKENS))


def test_widened_and_closed() -> None:
    """The trunk stays float32; the experts, read by stock MLX again, give the same output."""
    path = stock.folder("olmoe", "affine4", dtype="bfloat16")
    lab = moelab.load(path, 4, dtype="float32")
    want = lab.model(TOKENS)
    mx.eval(want)
    lab.close()
    assert lab.model(TOKENS).dtype == mx.float32
    assert mx.allclose(lab.model(TOKENS), want, atol=1e-3)


def test_a_closed_lab_says_so() -> None:
    lab = moelab.load(stock.folder("olmoe", chat_template=True), 4)
    chat = lab.chat()
    with lab:
        assert lab.generate("hi", 2)
    lab.close()
    asks: list[Callable[[], Any]] = [
        lambda: lab.generate("hi", 2),
        lambda: lab.stream("hi", 2),
        lambda: lab.chat(),
        lambda: lab.record(),
        lambda: lab.reset(),
        lambda: chat.say("hi", 2),
    ]
    for ask in asks:
        with pytest.raises(ClosedError, match=r"was closed\. Load the model again"):
            ask()
    assert repr(lab).endswith("closed>") and "closed" in lab._repr_html_()


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_an_attached_switch_cannot_be_duplicated(duplicate: Callable[[Any], Any]) -> None:
    """A copy's slots would be filled from files that only the original reads."""
    with moelab.load(stock.folder("olmoe"), 4) as lab:
        switch = lab.sites[0].parent[lab.sites[0].key]
        assert isinstance(switch, PartialSwitch)
        with pytest.raises(AttachedError, match="cannot be copied"):
            duplicate(switch)


def test_memory_is_free_at_once_after_a_recording() -> None:
    """No cycle of references may keep a closed model until garbage collection."""
    gc.collect()
    gc.disable()
    try:
        lab = moelab.load(stock.folder("olmoe"), 4)
        with lab.record():
            mx.eval(lab.model(TOKENS))
        layer = weakref.ref(lab.model.layers[0])
        lab.close()
        del lab
        assert layer() is None
    finally:
        gc.enable()
