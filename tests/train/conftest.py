"""Runs in this process set up logging and precision; every test here leaves both as they were."""

import logging
from collections.abc import Iterator

import pytest
import torch

from dinov2.log import setup_logging


@pytest.fixture(autouse=True)
def process_restored() -> Iterator[None]:
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)
    setup_logging()  # closes the files of the test
    logging.captureWarnings(False)
    root.setLevel(level)
    root.handlers[:] = handlers
