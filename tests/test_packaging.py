"""An installed package is whole: recipes, dataset, licenses and launchers are in the wheel, and it works."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import dinov2

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ["setup.py", "README.md", "LICENSE", "requirements.txt", "requirements-dev.txt"]


def run(*words: str | Path, cwd: Path, **environment: str) -> str:
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        list(map(str, words)), cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that the repository stays clean."""
    copy = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "dinov2", copy / "dinov2", ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-w", "dist", cwd=copy)
    (path,) = (copy / "dist").iterdir()
    return path


@pytest.mark.slow
def test_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "dinov2").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert expected <= names
    assert "dinov2/configs/ssl_default_config.yaml" in names
    assert "dinov2/configs/train/vitl16_short.yaml" in names
    assert "dinov2/configs/eval/vitg14_reg4_pretrain.yaml" in names
    assert "dinov2/data/datasets/embedded/fashion_mnist_12k.npz" in names
    assert "dinov2/run/train/train.py" in names
    assert "dinov2/run/eval/knn.py" in names
    assert not [name for name in names if name.endswith(".pyc") or not name.startswith("dinov2")]


@pytest.mark.slow
def test_metadata_come_from_their_one_home(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith("METADATA"))
    metadata = archive.read(name).decode()
    assert f"\nVersion: {dinov2.__version__}\n" in metadata
    assert "\nRequires-Python: >=3.11\n" in metadata
    for requirement in ("torch>=2.11", "torchvision>=0.26", "submitit>=1.5"):
        assert f"\nRequires-Dist: {requirement}\n" in metadata
    assert re.search(r'Requires-Dist: xformers>=\S+ sys_platform == "linux" and platform_machine == "x86_64"', metadata)


@pytest.mark.slow
def test_an_installed_package_works_away_from_the_clone(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    code = (
        "import dinov2; from pathlib import Path; from dinov2 import config; from dinov2.data import make_dataset;"
        f"assert Path(dinov2.__file__).is_relative_to({str(site)!r});"
        "assert config.load('train/vitl16_short').student.arch == 'vit_large';"
        "assert len(make_dataset(dataset_str='FashionMNIST:split=VAL')) == 2000"
    )
    run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site))
    for command in ("dinov2-train", "dinov2-knn", "dinov2-linear", "dinov2-log-regression", "dinov2-retrieval"):
        assert "--nodes" in run(sys.executable, site / "bin" / command, "--help", cwd=tmp_path, PYTHONPATH=str(site))


def requirements(name: str) -> list[Requirement]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return [Requirement(line) for line in lines if line]


def test_every_requirement_is_installed_in_a_version_that_is_declared() -> None:
    for requirement in requirements("requirements.txt"):
        if requirement.marker is None or requirement.marker.evaluate():
            assert requirement.specifier.contains(version(requirement.name), prereleases=True), requirement


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_every_requirement_has_a_lower_bound_that_the_tests_of_the_oldest_versions_install(name: str) -> None:
    command = f". scripts/setup_venv.sh; lower_bounds {name}"
    pins = [Requirement(pin) for pin in run("bash", "-c", command, cwd=ROOT).splitlines()]
    declared = requirements(name)
    assert [pin.name for pin in pins] == [requirement.name for requirement in declared]
    for pin, requirement in zip(pins, declared, strict=True):
        (lowest,) = (bound for bound in requirement.specifier if bound.operator == ">=")
        assert str(pin.specifier) == f"=={lowest.version}"
