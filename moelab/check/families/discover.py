"""Finds every family of the installed mlx-lm that can have routed experts.

Read off the sources and not off a list, so that a family that a later mlx-lm brings is found
without anybody having told moelab: a module counts if it, or one that it imports, names mlx-lm's
switches, or speaks of experts at all.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

PACKAGE = "mlx_lm.models"
SWITCHES = "switch_layers"
"""Where mlx-lm keeps its switches."""
_SIGNS = re.compile(r"\bSwitch(GLU|MLP|Linear)\b|experts|moe", re.IGNORECASE)


def model_folder() -> Path:
    """Returns the folder of mlx-lm's model files."""
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))


def families(folder: Path | None = None) -> list[str]:
    """Returns the modules whose model can have routed experts, by name.

    Args:
        folder: Where the model files are; None for the installed mlx-lm's.
    """
    folder = folder or model_folder()
    sources = {
        ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__"): path
        for path in folder.rglob("*.py")
    }
    texts = {name: path.read_text(encoding="utf-8") for name, path in sources.items()}
    trees = {name: ast.parse(text) for name, text in texts.items()}
    imports = {name: _imports(tree) & texts.keys() for name, tree in trees.items()}
    models = [name for name, tree in trees.items() if "Model" in _names(tree)]
    # What imports the switches' own file for something else names no switch.
    marked = {name for name in texts if name != SWITCHES and _SIGNS.search(texts[name])}
    return sorted(name for name in models if _reaches(name, imports, marked))


def aliases() -> dict[str, list[str]]:
    """Returns, by module, the other `model_type`s that mlx-lm loads with it."""
    from mlx_lm import utils

    found: dict[str, list[str]] = {}
    for model_type, module in utils.MODEL_REMAPPING.items():
        found.setdefault(module, []).append(model_type)
    for (model_type, architecture), module in utils.MODEL_ARCHITECTURE_REMAPPING.items():
        found.setdefault(module, []).append(f"{model_type} ({architecture})")
    return {module: sorted(types) for module, types in found.items()}


def _reaches(name: str, imports: dict[str, set[str]], marked: set[str]) -> bool:
    seen, waiting = set(), [name]
    while waiting:
        at = waiting.pop()
        if at in marked:
            return True
        seen.add(at)
        waiting += imports[at] - seen
    return False


def _names(tree: ast.Module) -> set[str]:
    """Returns the classes and imported names of a module."""
    found = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            found |= {t.id for t in node.targets if isinstance(t, ast.Name)}
    return found


def _imports(tree: ast.Module) -> set[str]:
    """Returns the modules beside it that a module imports anywhere."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level == 0 and not module.startswith(PACKAGE):
                continue
            module = module.removeprefix(PACKAGE).lstrip(".")
            found |= {module} if module else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.removeprefix(f"{PACKAGE}.")
                for alias in node.names
                if alias.name.startswith(f"{PACKAGE}.")
            }
    return found
