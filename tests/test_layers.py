"""Imports run one way: no folder of the package imports one that stands above it."""

import ast
from pathlib import Path

import pyro_diffusion

ROOT = Path(pyro_diffusion.__file__).parent
LAYERS = [
    {"validation", "precision", "unwrapping", "ranks"},
    {"estimate"},
    {"nn"},
    {"schedules"},
    {"processes"},
    {"denoisers"},
    {"samplers", "dynamics"},
    {"distributions"},
    {"likelihoods", "checkpoint"},
    {"guidance", "foreign"},
    {"infer", "optim"},
    {"evaluate", "train"},
    {"plotting"},
]
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}


def imports(path: Path) -> set[str]:
    """Parts of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pyro_diffusion"):
            names = (node.module or "").split(".")[1:2] or [alias.name for alias in node.names]
            found |= set(names)
        elif isinstance(node, ast.Import):
            parts = [alias.name.split(".") for alias in node.names]
            found |= {p[1] for p in parts if p[0] == "pyro_diffusion" and len(p) > 1}
    return found


def test_imports_run_one_way():
    wrong = []
    for name, height in HEIGHT.items():
        folder = ROOT / name
        for path in folder.rglob("*.py") if folder.is_dir() else [ROOT / f"{name}.py"]:
            for other in imports(path) - {name}:
                if other in HEIGHT and HEIGHT[other] >= height:
                    wrong.append(f"{path.relative_to(ROOT)} imports {other}")
    assert not wrong
