"""dinov2.distributed: detection of the rank, and collectives."""

import os
import random
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from dinov2 import distributed
from dinov2.distributed import ProcessInfo, detect_process, expand_nodelist

ROOT = Path(__file__).resolve().parents[1]

TORCHRUN = {
    "MASTER_ADDR": "node7",
    "MASTER_PORT": "29500",
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
}
STEP = {  # task 5 of `srun --nodes 3 --ntasks 7`, two nodes with three tasks and one with one
    "SLURM_JOB_ID": "12345",
    "SLURM_JOB_NODELIST": "host[1-9]",
    "SLURM_JOB_NUM_NODES": "9",
    "SLURM_NTASKS": "9",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "host[2-3],other5",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "3(x2),1",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "1",
}
SUBMITIT = {
    "SUBMITIT_EXECUTOR": "local",
    "SUBMITIT_LOCAL_JOB_ID": "4711",
    "SUBMITIT_LOCAL_GLOBALID": "1",
    "SUBMITIT_LOCAL_LOCALID": "1",
    "SUBMITIT_LOCAL_NTASKS": "2",
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("host[1-3,07-09,12],other5", "host1 host2 host3 host07 host08 host09 host12 other5"),
        ("a1,b2", "a1 b2"),
        ("a1,b[2-3]", "a1 b2 b3"),
        ("rack[1-2]-node[08-10],x", "rack1-node08 rack1-node09 rack1-node10 rack2-node08 rack2-node09 rack2-node10 x"),
        ("gpu-node1.cluster", "gpu-node1.cluster"),
    ],
)
def test_node_lists_expand(text: str, expected: str) -> None:
    assert expand_nodelist(text) == expected.split()


@pytest.mark.parametrize("text", ["", "a[1-", "a[x]", "a[1-2]]"])
def test_a_wrong_node_list_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="not a SLURM node list"):
        expand_nodelist(text)


def test_alone_without_any_variable() -> None:
    assert detect_process({}) == ProcessInfo("alone")


def test_torchrun_wins_over_slurm() -> None:
    expected = ProcessInfo("torchrun", 5, 8, 1, 4, "node7", 29500)
    assert detect_process(TORCHRUN) == expected
    assert detect_process(STEP | TORCHRUN) == expected


def test_slurm_step_not_its_allocation_counts() -> None:
    assert detect_process(STEP) == ProcessInfo("slurm", 5, 7, 2, 3, "host2", 47303)


def test_slurm_port_is_drawn_from_the_job_unless_set() -> None:
    assert detect_process(STEP).master_port == random.Random(12345).randint(20000, 60000) == 47303
    assert detect_process(STEP | {"MASTER_PORT": "4000"}).master_port == 4000


def test_an_allocation_without_a_step_is_one_process() -> None:
    batch_script = {k: v for k, v in STEP.items() if "STEP" not in k}
    assert detect_process(batch_script) == ProcessInfo("alone")


def test_slurm_contradiction_is_an_error() -> None:
    with pytest.raises(ValueError, match="counts 3 nodes but lists 1"):
        detect_process(STEP | {"SLURM_STEP_NODELIST": "host2"})


def test_submitit_on_this_machine_even_inside_a_slurm_step() -> None:
    expected = ProcessInfo("submitit", 1, 2, 1, 2, "127.0.0.1", random.Random(4711).randint(20000, 60000))
    assert detect_process(SUBMITIT) == expected
    assert detect_process(STEP | SUBMITIT) == expected


@pytest.mark.parametrize("stray", [{"MASTER_ADDR": "x"}, {"LOCAL_RANK": "0"}, {"WORLD_SIZE": "1", "RANK": "0"}])
def test_a_stray_variable_is_ignored_and_reported(stray: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    assert detect_process(stray) == ProcessInfo("alone")
    assert f"ignoring {next(iter(sorted(stray)))}" in caplog.text or "ignoring RANK" in caplog.text


@pytest.mark.parametrize("half", [{"WORLD_SIZE": "2"}, {"RANK": "1"}, {"LOCAL_RANK": "3"}])
def test_half_a_torchrun_is_no_silent_single_run(half: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="means several processes, but MASTER_ADDR.* not set"):
        detect_process(half)


def test_an_impossible_place_is_an_error() -> None:
    with pytest.raises(ValueError, match="impossible process.*rank=9"):
        detect_process(TORCHRUN | {"RANK": "9"})


def test_alone_there_is_no_group_and_helpers_are_the_identity() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    with distributed.session() as process:
        assert process == ProcessInfo("alone")
        assert not distributed.is_enabled()
        assert (distributed.rank(), distributed.world_size(), distributed.local_rank()) == (0, 1, 0)
        assert distributed.is_main()
        distributed.barrier()
        for helper in (
            distributed.all_reduce_sum,
            distributed.all_reduce_max,
            distributed.all_gather_cat,
            distributed.all_gather_varied,
            distributed.broadcast,
        ):
            result = helper(values)
            assert torch.equal(result, values)
            assert not result.requires_grad
            assert result.data_ptr() != values.data_ptr(), "a helper must not hand out its argument's memory"
        assert distributed.all_gather_object("a") == ["a"]


# One launch for all claims about several processes: starting them takes most of the time.
WORKER = """
import torch
from dinov2 import distributed as d

with d.session() as process:
    r, w = d.rank(), d.world_size()
    assert (r, w, d.local_rank(), d.local_world_size()) == (process.rank, 3, process.rank, 3)
    assert d.is_enabled() and d.is_main() == (r == 0)

    mine = torch.tensor([1.0, 10.0 * r])
    assert d.all_reduce_sum(mine).tolist() == [3.0, 30.0]
    assert d.all_reduce_max(mine).tolist() == [1.0, 20.0]
    assert mine.tolist() == [1.0, 10.0 * r], "the argument is untouched"
    assert d.all_gather_cat(torch.full((2, 1), r)).flatten().tolist() == [0, 0, 1, 1, 2, 2]

    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):  # r rows on rank r
        rows = torch.full((r, 2), r, dtype=dtype)
        expected = torch.tensor([[1, 1], [2, 2], [2, 2]], dtype=dtype)
        assert torch.equal(d.all_gather_varied(rows), expected)
    assert d.all_gather_varied(torch.zeros(0, 4)).shape == (0, 4)

    assert d.broadcast(torch.tensor(r), source=2).item() == 2
    assert d.all_gather_object({"rank": r}) == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
    rows = torch.arange(3) + 10 * r  # row i goes to rank i, and row 0 of rank 2 to nobody
    sent = [[1, 1, 1], [1, 1, 1], [0, 1, 1]][r]
    received = [[1, 1, 0], [1, 1, 1], [1, 1, 1]][r]
    arrived = d.exchange(rows[3 - sum(sent):], sent, received)
    assert arrived.tolist() == [[0, 10], [1, 11, 21], [2, 12, 22]][r]
    d.barrier()

    assert d.group() is None
    try:
        d.split([1, 1])
    except ValueError as error:
        assert "3 processes cannot be divided into groups of 1, 1" in str(error)
    assert d.split([1, 2]) == (r > 0) and (d.group() is not None)
    assert (d.rank(), d.world_size(), d.is_enabled()) == [(0, 1, False), (0, 2, True), (1, 2, True)][r]
    assert d.all_reduce_sum(torch.tensor(r)).item() == [0, 3, 3][r]
    assert d.all_gather_object(r) == [[0], [1, 2], [1, 2]][r]
    assert d.broadcast(torch.tensor(r), source=0).item() == [0, 1, 1][r]
    if r > 0:
        assert d.device_mesh(2).size() == 2 and d.cpu_group() is not None
        try:
            d.device_mesh(1)
        except ValueError as error:
            assert "2 processes cannot be divided into groups of 1" in str(error)
    with d.whole_job():
        assert d.rank() == r and d.all_gather_cat(torch.tensor([r])).tolist() == [0, 1, 2]
    assert d.world_size() == [1, 2, 2][r]
assert not d.is_enabled() and d.local_rank() == 0 and d.group() is None
"""

FAILS_ON_ONE = """
import logging, torch
from dinov2 import distributed as d

logging.basicConfig()
with d.session():
    if d.rank() == 1:
        raise ValueError("the disk of rank 1 is full")
    d.barrier()
"""


def start(code: str, rank: int, world_size: int, port: int) -> subprocess.Popen[str]:
    process = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
    }
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        env=os.environ | process | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_three_processes_sum_gather_and_broadcast(free_port: int) -> None:
    processes = [start(WORKER, rank, 3, free_port) for rank in range(3)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], "\n".join(outputs)


def test_a_failing_process_is_reported_and_ends_the_others(free_port: int) -> None:
    processes = [start(FAILS_ON_ONE, rank, 2, free_port) for rank in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]  # the group's own time-out is 30 minutes
    assert all(process.returncode != 0 for process in processes)
    assert "process 1 of 2 on" in outputs[1]
    assert "the disk of rank 1 is full" in outputs[1]
