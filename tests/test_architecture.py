"""The house: imports only point down and not out of the wheel, utils only re-exports, the core needs no extras."""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
FLOORS = (
    *("names", "files", "autograd", "state", "miras", "ops", "layers", "memory", "models", "hf"),
    *("data", "evaluation", "training", "reading", "cli"),
)
DOOR = "titans.cli.experiment"  # to the experiments, which are not part of the wheel
# `titans` itself offers everything up to the models, so those floors must not lean on it.
ROOT_HEIGHT = FLOORS.index("models") + 0.5
CORE = [*FLOORS[FLOORS.index("miras") : FLOORS.index("hf")], "data", "utils"]
EXTRAS = ("transformers", "accelerate", "typer", "rich", "matplotlib", "tokenizers", "datasets", "pyarrow", "einops")


def module_name(file):
    parts = file.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(tree, package):
    """Absolute names that a module imports anywhere, `from a import b` counted as `a.b`, since b may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def complaint(module, target):
    """Why `module` may not import `target`, or None where it may."""
    if target.split(".")[0] == "experiments":
        return None if module == DOOR else "the experiments are outside the wheel"
    if module.split(".")[0] == "titans_miras":
        return None
    if target.split(".")[0] == "titans_miras":
        return "titans does not know its drop-in package"
    if target.split(".")[0] != "titans":
        return None
    own = (module.split(".") + [""])[1]
    other = (target.split(".") + [""])[1]
    if own == other:
        return None
    if other == "utils":
        return "utils holds import paths for users, nothing inside goes through it"
    if own == "utils":
        return None
    if own == "data" and other not in ("miras", "names"):
        return "data knows nothing of titans above miras"
    if own == "__main__":
        return None
    heights = [FLOORS.index(floor) if floor in FLOORS else ROOT_HEIGHT for floor in (own, other)]
    return None if heights[0] > heights[1] else f"{own or 'titans'} lies below {other or 'titans'}"


def complaints(module, source, is_package=False):
    package = module if is_package else module.rpartition(".")[0]
    found = ((target, complaint(module, target)) for target in imported_modules(ast.parse(source), package))
    return [f"{module} imports {target}: {reason}" for target, reason in found if reason]


def test_imports_point_down():
    files = sorted(SOURCE.rglob("*.py"))
    assert files
    found = [c for file in files for c in complaints(module_name(file), file.read_text(), file.name == "__init__.py")]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source", "allowed"),
    [
        ("titans.ops.scan", "from titans.miras import L2", True),
        ("titans.miras.bias", "from titans.ops.memory import chunked", False),
        ("titans.miras.bias", "def late():\n    import titans.ops.scan", False),
        ("titans.layers.attention", "from titans import memory", False),
        ("titans.layers.attention", "from ..ops import scan", True),
        ("titans.layers.attention", "from ..memory import NeuralMemory", False),
        ("titans.models.blocks", "from titans import NeuralMemory", False),
        ("titans.hf.adapter", "from titans import TitansConfig", True),
        ("titans.data.corpora", "from titans.hf import adapter", False),
        ("titans.data.corpora", "from . import published", True),
        ("titans.training.run", "from titans.utils.training import build_optimizer", False),
        ("titans.utils.training", "from titans.training import build_optimizer", True),
        ("titans.evaluation.niah", "from titans.cli import main", False),
        ("titans.evaluation.niah", "from experiments.framework import run", False),
        ("titans.cli.train", "import experiments", False),
        ("titans.cli.experiment", "from experiments import EXPERIMENTS", True),
        ("titans_miras.models", "from experiments.framework.recall import device", False),
        ("titans_miras.models", "from titans.models import TitansMAC", True),
        ("titans", "from titans.models import TitansMAC", True),
        ("titans", "from titans.hf import register", False),
        ("titans.models.config", "from titans_miras import TransformerConfig", False),
    ],
)
def test_the_rule_itself(module, source, allowed):
    assert (not complaints(module, source, is_package=module == "titans")) == allowed


def test_every_package_has_a_floor():
    names = {path.name for path in (SOURCE / "titans").iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert names <= {*FLOORS, "utils"}, "give the new package a place in FLOORS"


def test_utils_only_re_exports():
    for file in (SOURCE / "titans" / "utils").rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            documentation = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            names = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
            assert documentation or names or isinstance(node, (ast.Import, ast.ImportFrom)), f"{file}:{node.lineno}"


def test_core_runs_without_the_extras():
    script = f"""
        import importlib, pkgutil, sys

        for name in {EXTRAS}:
            sys.modules[name] = None

        import torch
        import titans

        for floor in {CORE}:
            package = importlib.import_module(f"titans.{{floor}}")
            for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
                if not module.name.startswith("titans.utils."):
                    importlib.import_module(module.name)

        if hasattr(titans, "NeuralMemory"):
            assert titans.NeuralMemory(d_model=16)(torch.randn(1, 5, 16)).shape == (1, 5, 16)
        if hasattr(titans, "TitansMAC"):
            model = titans.TitansMAC(11, d_model=16, n_layers=1, n_persistent=2, chunk_size=4)
            assert model(torch.randint(11, (1, 9))).logits.shape == (1, 9, 11)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    environment = {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "PATH": ""}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
