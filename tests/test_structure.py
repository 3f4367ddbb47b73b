"""The structure rules of the package, checked in the source of every file and in a fresh interpreter."""

import ast
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dinov2"
FILES = sorted(PACKAGE.rglob("*.py"))

# Who may import whom: downward only. Modules of one layer may import each other.
MAY_IMPORT = {
    "__init__": {"published_names", "eval.extract"},  # the latter on first use
    "published_names": set(),
    "files": set(),
    "html_templates": set(),
    "analysis": set(),
    "config": {"files", "yaml_values"},
    "flags": set(),
    "yaml_values": set(),
    "allocation": set(),
    "distributed": {"allocation"},
    "log": set(),
    "meters": {"metrics_file"},
    "metrics_file": {"files"},
    "metric_names": set(),
    "trackers": {"files", "metric_names"},
    "layers": set(),
    "configs": set(),
    "models": {"layers"},
    "data": {"files", "yaml_values"},
    "data.statistics": {"config", "data", "files", "flags", "html_templates", "log", "meters"},  # a command
    "loss": {"distributed"},
    "hub": {"models"},
    "train": {"config", "data", "distributed", "files", "flags", "layers", "log", "loss", "models", "analysis"}
    | {"trackers", "meters", "metrics_file"},
    "eval": {"flags", "config", "data", "distributed", "files", "log", "meters", "models", "analysis"},
    "visualization": {"flags", "config", "data", "distributed", "files", "log", "models", "analysis", "eval"}
    | {"html_templates"},
    # Of a run the report needs what reads the files that it left.
    "report": {"config", "files", "flags", "html_templates", "log", "analysis", "metric_names", "metrics_file"}
    | {f"train.{name}" for name in ("monitor", "environment", "checkpoint_files")},
    "curate": {"flags", "data", "files", "html_templates", "log", "eval"},
    "tools": {"flags", "config", "files", "log", "models", "train"},
    "run": {"flags", "config", "distributed", "files", "log", "train", "eval"},
}

# What a layer needs beyond Python itself when it is imported. torch.hub.load needs torch alone.
MAY_NEED: dict[str, set[str]] = {
    "__init__": set(),
    "published_names": set(),
    "flags": set(),
    "hub": {"torch"},
    "layers": {"torch"},
    "analysis": {"torch", "PIL"},
    "loss": {"torch"},
    "models": {"torch"},
    "data": {"torch", "numpy", "PIL"},
}

# Imported only inside the functions that use them: optional, or slow.
OPTIONAL = {"xformers", "submitit", "matplotlib", "sklearn", "cuml", "cupy", "tensorboard", "wandb", "av"}
OPTIONAL |= {"faiss", "torchvision", "scipy", "pyarrow", "aiohttp"}


def layer_of(path: Path) -> str:
    first, *others = path.relative_to(PACKAGE).with_suffix("").parts
    return f"{first}.{others[0]}" if others and f"{first}.{others[0]}" in MAY_IMPORT else first


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names that a piece of source imports; `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def without_type_checking(tree: ast.Module) -> ast.Module:
    """A module without what is imported for type checkers only, and never when it runs."""
    kept = [node for node in tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")]
    return ast.Module(kept, [])


def imported_at_import(tree: ast.Module) -> Iterator[str]:
    """Dotted names that a module imports when it is itself imported: not those inside functions."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("__name__ == '__main__'", "TYPE_CHECKING"):
            continue
        yield from imported(node)


def test_every_part_of_the_package_has_a_rule() -> None:
    assert {layer_of(path) for path in FILES} <= set(MAY_IMPORT)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_follows_the_rules(path: Path) -> None:
    tree, layer = tree_of(path), layer_of(path)
    allowed = MAY_IMPORT.get(layer, set()) | {layer}
    for name in imported(tree):
        package, _, rest = name.partition(".")
        if package == "dinov2" and rest not in ("", "__version__"):
            assert any(f"{rest}.".startswith(f"{part}.") for part in allowed), f"{layer} must not import {name}"
    for name in imported_at_import(tree):
        top = name.partition(".")[0]
        assert top not in OPTIONAL, f"import {top} inside the function that uses it"
        if layer in MAY_NEED and top not in sys.stdlib_module_names and top != "dinov2":
            assert top in MAY_NEED[layer], f"{layer} must not need {top}"
    for node in ast.walk(tree):
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"line {node.lineno}: relative import"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"line {node.lineno}: print() in the package; use the logger"


def test_no_modules_import_each_other_in_a_circle() -> None:
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        parts = {
            name if name in modules else name.rpartition(".")[0]
            for name in imported(without_type_checking(tree_of(path)))
        }
        graph[module] = (parts & set(modules)) - {module}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from error


def test_a_folder_has_at_most_15_files() -> None:
    counts = Counter(str(path.parent.relative_to(ROOT)) for path in FILES)
    assert {folder: count for folder, count in counts.items() if count > 15} == {}


def test_helpers_live_beside_their_users() -> None:
    parts = {part for path in FILES for part in path.relative_to(PACKAGE).with_suffix("").parts}
    assert not {"utils", "util", "helpers", "misc", "common"} & parts


def test_no_module_is_named_like_one_of_the_standard_library() -> None:
    names = {path.stem for path in PACKAGE.iterdir()}
    assert not names & set(sys.stdlib_module_names)


def test_recipes_exist_once() -> None:
    assert (ROOT / "configs").is_symlink()
    assert (ROOT / "configs").resolve() == PACKAGE / "configs"


# Everything that importing could do to a process and must not.
IMPORT_EVERYTHING = """
import importlib, logging, os, pkgutil, signal, sys, warnings
import torch, torch.distributed

def state():
    return {
        "environment": {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"},  # torchvision's
        "root logger": list(logging.getLogger().handlers),
        "signals": [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)],
        "process group": torch.distributed.is_initialized(),
        "CUDA": torch.cuda.is_initialized(),
        "precision": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
        "cuDNN": torch.backends.cudnn.benchmark,
        "dtype": torch.get_default_dtype(),
        "random state": torch.get_rng_state().tolist(),
    }

optional = set(sys.argv[1].split(","))
before = state()
import dinov2
for module in pkgutil.walk_packages(dinov2.__path__, "dinov2."):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        importlib.import_module(module.name)
    assert not caught, f"importing {module.name} warns: {caught[0].message} ({caught[0].filename})"
    loaded = optional & set(sys.modules)
    assert not loaded, f"importing {module.name} imports {loaded}"
    after = state()
    changed = [name for name in before if before[name] != after[name]]
    assert not changed, f"importing {module.name} changes {changed}"
"""


def test_nothing_happens_at_import() -> None:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(IMPORT_EVERYTHING), ",".join(OPTIONAL)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout + result.stderr == ""


@pytest.mark.parametrize("module", ["train.preflight.dry_run", "train.train", "run.train.train", "report.__main__"])
def test_only_what_reads_or_shards_tensors_imports_what_takes_as_long_as_half_of_torch(module: str) -> None:
    slow = "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor"
    program = f"import sys, dinov2.{module}; print([name for name in {slow} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
