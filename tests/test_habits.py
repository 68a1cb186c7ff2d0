"""The repository keeps its own promises about itself."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SKIPS = {"skip", "skipif", "xfail", "importorskip", "SkipTest"}


def readme_commands() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^```bash\n(python3 -m venv .*)\n```$", text, re.MULTILINE)


def skip_reasons(source: str) -> Iterator[tuple[int, str | None]]:
    """The line and the reason of everything in a test file that can skip a test."""
    tree = ast.parse(source)
    calls = {id(n.func): n for n in ast.walk(tree) if isinstance(n, ast.Call)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or node.attr not in SKIPS:
            continue
        call = calls.get(id(node))
        given = [k.value for k in call.keywords if k.arg in ("reason", "msg")] if call else []
        if call and node.attr in ("skip", "xfail", "SkipTest"):
            given += call.args[:1]
        texts = [g.value for g in given if isinstance(g, ast.Constant)]
        yield node.lineno, next((t for t in texts if isinstance(t, str)), None)


def test_readme_commands_are_complete() -> None:
    demo, tests = readme_commands()
    for command in (demo, tests):
        assert re.match(r"python3 -m venv \.venv && \.venv/bin/pip install -e ", command)
    assert demo.endswith(".venv/bin/moelab demo")
    assert tests.endswith(".venv/bin/python -m pytest")


def test_ci_runs_the_readme_command() -> None:
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert readme_commands()[1] in lines


def test_skips_are_registered() -> None:
    register = (ROOT / "tests" / "SKIPPED.md").read_text(encoding="utf-8")
    listed = {row.split("|")[1].strip() for row in register.splitlines() if row.startswith("| ")}
    used = set()
    for file in sorted((ROOT / "tests").rglob("*.py")):
        for line, reason in skip_reasons(file.read_text(encoding="utf-8")):
            assert reason, f"{file.name}:{line} skips without a literal reason"
            used.add(reason)
    assert used == listed - {"reason"}


def test_skip_reasons_are_found() -> None:
    source = """
import pytest
@pytest.mark.skipif(True, reason="one")
def test_a(): pytest.skip("two")
@pytest.mark.xfail(reason="three")
def test_b(): pytest.importorskip("torch", reason="four")
@pytest.mark.skip
def test_c(): pytest.skip(f"five {1}")
def test_d(): pytest.importorskip("torch")
"""
    found = [(line, reason or "") for line, reason in skip_reasons(source)]
    assert sorted(found) == [
        (3, "one"), (4, "two"), (5, "three"), (6, "four"), (7, ""), (8, ""), (9, "")
    ]  # fmt: skip


def test_notebooks_keep_charts_but_no_widget_state() -> None:
    for file in sorted((ROOT / "notebooks").glob("*.ipynb")):
        book = json.loads(file.read_text(encoding="utf-8"))
        assert "widgets" not in book["metadata"], file.name
        code = [c for c in book["cells"] if c["cell_type"] == "code" and c["source"]]
        assert "parameters" in code[0]["metadata"].get("tags", []), file.name
        assert all(c["execution_count"] for c in code), f"{file.name} was not run as a whole"


def test_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    command = [sys.executable, "-c", "import moelab; print(moelab.__version__)"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert shown.stdout.strip() == project["version"]


def test_no_path_of_this_machine() -> None:
    """Committed texts do not name the folders of the machine that they were written on."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        return
    listed = subprocess.run(
        [git, "ls-files", "-z"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    for name in filter(None, listed.stdout.split("\0")):
        file = ROOT / name
        if file.suffix in {".py", ".md", ".toml", ".ipynb", ".yaml", ".json"} and file.exists():
            text = file.read_text(encoding="utf-8")
            for place in (str(ROOT) + "/", sys.prefix + "/lib"):
                assert place not in text, f"{name} names {place}"
