"""Settings for all tests. Claims about numbers are made on one thread, so that they do not depend on the machine."""

import os
import platform
from importlib.metadata import version

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; subprocesses inherit it

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# No deadline: the machine may be busy. Derandomised: a red test is red again on the next run.
settings.register_profile("dinov2", deadline=None, derandomize=True, database=None, print_blob=True)
settings.load_profile("dinov2")


def pytest_report_header() -> str:
    names = ("torch", "torchvision", "numpy", "pillow", "omegaconf", "scikit-learn", "torchmetrics", "safetensors")
    return f"Python {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in names)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
