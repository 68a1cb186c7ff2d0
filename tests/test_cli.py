"""The command line: the demo's promise, clear errors, exit statuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import moelab
from moelab import cli


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert moelab.__version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "value"), [("24", 24), ("0.5", 0.5), ("1", 1), ("1.0", 1.0), ("auto", "auto")]
)
def test_capacity_is_read_as_typed(text: str, value: object) -> None:
    found = cli.capacity(text)
    assert found == value
    assert type(found) is type(value)


def test_an_explained_error_is_one_line_and_status_1(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["demo", str(tmp_path / "nothing")]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("moelab: There is no folder")
    assert "Traceback" not in printed.err


def test_a_wrong_capacity_makes_no_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert cli.main(["demo", "--capacity", "2", "--out", str(out)]) == 1
    assert "top-k" in capsys.readouterr().err
    assert not out.exists()


def test_demo_runs_records_and_draws(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import matplotlib.image

    out = tmp_path / "demo"
    assert cli.main(["demo", "--out", str(out), "--max-tokens", "24"]) == 0
    printed = capsys.readouterr().out
    assert "32 of 64 experts a layer" in printed
    assert str(out) in printed
    charts = sorted(path.name for path in out.glob("*.png"))
    assert charts == ["hit-rate-by-layer.png", "hit-rate-over-time.png", "routing.png"]
    for chart in charts:
        assert np.asarray(matplotlib.image.imread(out / chart)).std() > 0.05, "a blank chart"
    recording = moelab.read_recording(out / "recording")
    assert recording.run["capacity"] == 32
    assert {"prefill", "decode"} <= set(recording.tokens["phase"])


def test_the_package_is_imported_without_mlx() -> None:
    """`import moelab` is cheap; a model is what costs."""
    code = "import sys, moelab; sys.exit(any(m in sys.modules for m in ('mlx.core', 'pandas')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
