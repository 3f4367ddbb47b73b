"""Evaluations run in this process set up logging and cuDNN; every test here leaves both as they were."""

import logging
from collections.abc import Iterator

import pytest
import torch

from dinov2.log import setup_logging


@pytest.fixture(autouse=True)
def process_restored() -> Iterator[None]:
    root = logging.getLogger()
    level, handlers, benchmark = root.level, list(root.handlers), torch.backends.cudnn.benchmark
    yield
    torch.backends.cudnn.benchmark = benchmark
    setup_logging()  # closes the files of the test
    logging.captureWarnings(False)
    root.setLevel(level)
    root.handlers[:] = handlers
