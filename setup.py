"""Packaging: the package with its YAML files, its embedded dataset and its launchers, and commands for them."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

HERE = Path(__file__).resolve().parent


def read_requirements(name: str) -> list[str]:
    """The requirements in a file, without comments and without lines that are options for pip."""
    lines = (line.partition("#")[0].strip() for line in (HERE / name).read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("-")]


def read_version() -> str:
    """`__version__` of the package, without importing it."""
    match = re.search(r'^__version__ = "(.+)"$', (HERE / "dinov2" / "__init__.py").read_text(), re.MULTILINE)
    assert match is not None, "dinov2/__init__.py sets __version__"
    return match[1]


DEV = {re.split("[<>=]", line)[0]: line for line in read_requirements("requirements-dev.txt")}

setup(
    name="dinov2",
    version=read_version(),
    description="Self-supervised training of vision transformers, and evaluation of their frozen features",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    install_requires=read_requirements("requirements.txt"),
    extras_require={
        "video": [DEV["av"]],
        "parquet": [DEV["pyarrow"]],
        "tracking": [DEV["tensorboard"], DEV["wandb"]],
        "curation": [DEV["faiss-cpu"]],
        "dev": list(DEV.values()),
    },
    # Namespace packages too: folders of configurations need no __init__.py to be part of the package.
    packages=find_namespace_packages(include=["dinov2", "dinov2.*"], exclude=["*.__pycache__"]),
    package_data={"": ["*.yaml", "*.npz", "*.pth", "*.html", "*.css", "*.js", "LICENSE*"]},
    entry_points={
        "console_scripts": [
            "dinov2-train = dinov2.run.train.train:main",
            "dinov2-knn = dinov2.run.eval.knn:main",
            "dinov2-linear = dinov2.run.eval.linear:main",
            "dinov2-log-regression = dinov2.run.eval.log_regression:main",
            "dinov2-segmentation = dinov2.run.eval.segmentation:main",
            "dinov2-depth = dinov2.run.eval.depth:main",
            "dinov2-retrieval = dinov2.run.eval.retrieval:main",
            "dinov2-tracking = dinov2.run.eval.tracking:main",
        ]
    },
)
