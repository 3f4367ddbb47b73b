"""What keeping freed memory is for: no page of a repeated allocation is given out by the system twice."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import resource, torch
from dinov2.train.environment import keep_freed_memory
{call}
def faults_of_ten_allocations():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults_of_ten_allocations()
print(faults_of_ten_allocations())
"""


def faults(call: str) -> int:
    command = [sys.executable, "-c", PROGRAM.format(call=call)]
    return int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="GNU's C library")
@pytest.mark.slow
def test_a_repeated_allocation_causes_no_page_faults() -> None:
    assert faults("keep_freed_memory()") < min(100, faults("") / 2)
