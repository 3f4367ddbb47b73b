"""Runs a replay in several processes, connected by gloo, as the recordings with a world size above 1 were made."""

import logging
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

from dinov2 import distributed

# (JSON file of the set, rank) -> results by name
RankReplay = Callable[[Path, int], dict[str, Any]]


def replay_on_ranks(replay: RankReplay, path: Path, world_size: int) -> list[dict[str, Any]]:
    """Results of ``replay(path, rank)`` for every rank; in this very process when there is only one.

    Args:
        replay: A module-level function; it returns tensors, numbers and containers of them.
        path: The set's JSON file.
        world_size: Number of processes of the recording.
    """
    if world_size == 1:
        return [replay(path, 0)]
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_rank_main, args=(replay, path, world_size, _free_port(), folder), nprocs=world_size)
        return [torch.load(_result_file(folder, rank), weights_only=True) for rank in range(world_size)]


def _rank_main(rank: int, replay: RankReplay, path: Path, world_size: int, port: int, folder: str) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    }
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # as in the main process
    with distributed.session():
        torch.save(replay(path, rank), _result_file(folder, rank))


def _result_file(folder: str, rank: int) -> Path:
    return Path(folder) / f"rank{rank}.pt"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
