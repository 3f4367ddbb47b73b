"""The stub of CUDA's libraries, built once for the tests of a process."""

from pathlib import Path

import pytest
import rehearsal


@pytest.fixture(scope="session")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not rehearsal.can_build():
        pytest.skip("needs gcc, nm and a PyTorch that is built for CUDA")
    return rehearsal.build(tmp_path_factory.mktemp("stub") / "library")
