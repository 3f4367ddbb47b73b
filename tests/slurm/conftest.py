"""One cluster for all tests of this folder: starting it takes a second, and jobs can wait beside each other."""

import os
from collections.abc import Iterator

import pytest
from cluster import PACKAGES, Cluster, missing_programs, running_cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A cluster of six nodes; skipped only where the packages are missing and cannot be installed."""
    if missing := missing_programs():
        text = f"no {', '.join(missing)} here: apt-get install --no-install-recommends {' '.join(PACKAGES)}"
        (pytest.fail if os.geteuid() == 0 else pytest.skip)(text)
    with running_cluster(6) as cluster:
        yield cluster
