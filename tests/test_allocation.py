"""What keeping freed memory is for: no page of a repeated allocation is given out by the system twice, and few are."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import resource, torch
from pathlib import Path
from dinov2 import distributed
{call}
def faults_of_ten_allocations():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first, again = faults_of_ten_allocations(), faults_of_ten_allocations()
kept = torch.ones(2**24)
print(first, again, Path("/proc/self/smaps_rollup").read_text())
"""
LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="GNU's C library")


def faults(call: str) -> tuple[int, int, int]:
    """Page faults of ten allocations, of ten more, and bytes in large pages."""
    command = [sys.executable, "-c", PROGRAM.format(call=call)]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True).stdout
    first, again, smaps = printed.split(maxsplit=2)
    [large] = re.findall(r"^AnonHugePages: *(\d+) kB$", smaps, re.MULTILINE)
    return int(first), int(again), int(large) * 1024


def test_a_repeated_allocation_causes_no_page_faults() -> None:
    _, usual, _ = faults("")
    _, again, _ = faults("with distributed.session(): pass")
    assert again < min(100, usual / 2)


@pytest.mark.skipif(not LARGE_PAGES.exists() or "[never]" in LARGE_PAGES.read_text(), reason="the system has none")
def test_a_second_session_reserves_nothing_and_pages_are_large() -> None:
    first, _, large = faults("""
with distributed.session():
    pass
def mapped():
    return int(Path("/proc/self/statm").read_text().split()[0])
before = mapped()
with distributed.session():
    pass
assert mapped() < before + 2**15, (before, mapped())  # pages of 4 KiB: 128 MiB
""")
    assert large >= 48 * 2**20, large  # of the 64 MB that are kept
    assert first < 2000, first  # 16,384 pages of 4 KiB


LIMITS = {
    "of the process": "resource.setrlimit(resource.RLIMIT_AS, (2**46, 2**46))",
    "of its heap": "resource.setrlimit(resource.RLIMIT_DATA, (2**46, 2**46))",
    "of the machine": """
from dinov2 import allocation
allocation._OVERCOMMIT = Path("strict")
allocation._OVERCOMMIT.write_text("2\\n")
""",
}


@pytest.mark.parametrize("limit", LIMITS)
def test_where_addresses_are_limited_none_are_reserved(limit: str, tmp_path: Path) -> None:
    _, again, _ = faults(
        f"""
import os
os.chdir({str(tmp_path)!r})
{LIMITS[limit]}
mapped = lambda: int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
before = mapped()
with distributed.session():
    pass
assert mapped() - before < 2**28, mapped() - before
"""
    )
    assert again < 100, "freed memory is kept nevertheless"
