"""Settings for all tests. Claims about numbers are made on one thread, so that they do not depend on the machine."""

import logging
import os
import platform
from collections.abc import Iterator
from importlib.metadata import version

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; subprocesses inherit it

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# No deadline: the machine may be busy. Derandomized: a red test is red again on the next run.
settings.register_profile("dinov2", deadline=None, derandomize=True, database=None, print_blob=True)
settings.load_profile("dinov2")


def pytest_report_header() -> str:
    names = ("torch", "torchvision", "numpy", "pillow", "omegaconf", "scikit-learn", "safetensors")
    return f"Python {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in names)


@pytest.fixture(autouse=True)
def process_settings() -> Iterator[None]:
    """What a command run in this process sets: every test begins and ends without it."""
    _restore_logging()  # a fixture of a whole module may have run a command
    precision, benchmark = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    yield
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.benchmark = benchmark
    _restore_logging()


def _restore_logging() -> None:
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if type(handler).__module__ == "dinov2.log"]:
        root.removeHandler(handler)
        handler.close()
    logging.captureWarnings(False)
    root.setLevel(logging.WARNING)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # By far the longest tests come first, so that no process of pytest-xdist is left with them at the end.
    # (Keywords have the names of folders too, such as that of the clone.)
    items.sort(key=lambda item: item.get_closest_marker("slurm") is None)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
