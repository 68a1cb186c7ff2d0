"""OpenBLAS: loaded when it is asked for and helps, and never by importing moelab."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import moelab
from moelab import backend
from moelab.backend import tell_of_openblas, use_openblas, use_openblas_for
from tests.support import stock

needs_openblas = pytest.mark.skipif(
    sys.platform != "linux" or backend._openblas(ctypes.RTLD_LOCAL) is None,
    reason="OpenBLAS is not installed",
)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend._State, "library", None)
    monkeypatch.setattr(backend._State, "told", False)


def run(code: str, **variables: str) -> list[str]:
    """Runs a program of its own, in which nothing was imported, and returns its lines."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=True, env={"PATH": "/usr/bin:/bin", **variables},
        cwd=Path(moelab.__file__).parent.parent,
    )  # fmt: skip
    return done.stdout.split()


def test_importing_moelab_and_its_command_loads_no_mlx() -> None:
    code = "import moelab, moelab.cli, moelab.backend, sys; print('mlx.core' in sys.modules)"
    assert run(code) == ["False"]


def test_too_late_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(moelab.MoelabError, match="Restart"):
        use_openblas()
    use_openblas_for("lab")  # the command line says nothing of it


def test_bad_threads() -> None:
    with pytest.raises(ValueError, match="got 0"):
        use_openblas(0)


def test_elsewhere_there_is_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not use_openblas()


def test_absent_it_says_false() -> None:
    code = (
        "from moelab import backend; backend.LIBRARY = 'libnowhere.so.0'\n"
        "print(backend.use_openblas(), backend.openblas_in_use())"
    )
    assert run(code) == ["False", "False"]


@needs_openblas
def test_mlx_really_uses_it(tmp_path: Path) -> None:
    """The dynamic linker says whose matrix product MLX calls."""
    bound = {}
    for name, first in (("with", "moelab.use_openblas()"), ("without", "True")):
        code = (
            f"import moelab; print({first})\nimport mlx.core as mx; mx.set_default_device(mx.cpu)\n"
            "mx.eval(mx.ones((8, 8)) @ mx.ones((8, 8)))"
        )
        log = tmp_path / name
        assert run(code, LD_DEBUG="bindings", LD_DEBUG_OUTPUT=str(log)) == ["True"]
        lines = [x for p in tmp_path.glob(f"{name}.*") for x in p.read_text().splitlines()]
        bound[name] = {x.split(" to ")[1].split()[0] for x in lines
                       if "libmlx" in x.split(" to ")[0] and "`cblas_sgemm'" in x}  # fmt: skip
    assert bound["with"] and all("openblas" in target for target in bound["with"])
    assert bound["without"] and not any("openblas" in target for target in bound["without"])


@needs_openblas
def test_threads_are_one_unless_said() -> None:
    code = (
        "from moelab import backend\nprint(backend.use_openblas({}))\n"
        "print(backend._State.library.openblas_get_num_threads())"
    )
    assert run(code.format("")) == ["True", "1"]
    assert run(code.format("2")) == ["True", "2"]
    assert run(code.format(""), OPENBLAS_NUM_THREADS="2") == ["True", "2"]
    assert run(code.format("1"), OPENBLAS_NUM_THREADS="2") == ["True", "1"]


@needs_openblas
@pytest.mark.parametrize("quant", ["none", "affine4"])
def test_the_command_uses_it_for_unquantised_models(quant: str) -> None:
    path = stock.folder("qwen3_moe", quant)
    code = (
        f"from moelab import backend; backend.use_openblas_for({str(path)!r})\n"
        "print(backend.openblas_in_use())"
    )
    assert run(code) == [str(quant == "none")]


@needs_openblas
@pytest.mark.parametrize("quant", ["none", "affine4"])
def test_exact_with_it_too(quant: str) -> None:
    """A lab equals stock bit for bit, in prefill, sweeps and decode."""
    path = stock.folder("qwen3_next", quant)
    code = (
        "import moelab, json; assert moelab.use_openblas(2)\n"
        "import mlx.core as mx; mx.set_default_device(mx.cpu)\n"
        "import mlx_lm\nfrom tests.support import stock, tiny\n"
        f"path = stock.Path({str(path)!r})\n"
        "with moelab.load(path, 4) as lab:\n"
        "    tally = stock.Tally(lab)\n"
        "    ours = stock.steps(lab.stream(tiny.prompt(60), 8))\n"
        "print(json.dumps([tally.sweeps > 0, tally.evictions > 0,\n"
        "    stock.same_steps(ours, stock.stock_steps(path, tiny.prompt(60), 8))]))"
    )
    assert json.loads("".join(run(code))) == [True, True, True]


def test_told_once_and_only_where_it_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    large = backend.HELPS_FROM_BYTES
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tell_of_openblas({"quantization": {"bits": 4}}, large)
        tell_of_openblas({}, large - 1)
    with pytest.warns(UserWarning, match=r"not quantised.*moelab\.use_openblas"):
        tell_of_openblas({}, large)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tell_of_openblas({}, large)


@pytest.mark.parametrize("there", [True, False])
def test_what_is_told(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(backend, "_openblas", lambda _: object() if there else None)
    with pytest.warns(UserWarning, match="not used" if there else "not installed"):
        tell_of_openblas({}, backend.HELPS_FROM_BYTES)
    monkeypatch.setattr(backend._State, "told", False)
    monkeypatch.setattr(backend._State, "library", object())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tell_of_openblas({}, backend.HELPS_FROM_BYTES)


def test_loading_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(backend, "HELPS_FROM_BYTES", 1)
    with pytest.warns(UserWarning, match="OpenBLAS"), moelab.load(stock.folder("olmoe", "none"), 4):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with moelab.load(stock.folder("olmoe"), 4):
            pass
