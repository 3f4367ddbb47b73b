"""A model and runs so small that a step takes milliseconds (`tiny.yaml`), and functions that read what a run wrote."""

import ctypes
import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov2 import config
from dinov2.config import Config
from dinov2.data import make_dataset
from dinov2.data.augment import MultiCrop
from dinov2.data.collate import Batch, collate_data_and_cast
from dinov2.data.masking import MaskingGenerator
from dinov2.train import train
from dinov2.train.ssl_meta_arch import Losses, SSLMetaArch

ROOT = Path(__file__).resolve().parents[2]
CONFIG_FILE = ROOT / "tests" / "train" / "tiny.yaml"

CENTERING = "train.centering=centering"
SEPARATE_HEADS = [
    *("ibot.separate_head=true", "ibot.head_n_prototypes=12"),
    *("ibot.head_bottleneck_dim=8", "ibot.head_hidden_dim=32", "ibot.head_nlayers=2"),
]


def precision(side: str, module: str, dtype: str) -> str:
    """The override that sets the precision of one network: fp32, fp16 or bf16."""
    return f"compute_precision.{side}.{module}.mixed_precision.param_dtype={dtype}"


def all_in(dtype: str) -> list[str]:
    """The overrides that set the precision of all networks."""
    places = itertools.product(("student", "teacher"), ("backbone", "dino_head", "ibot_head"))
    return [precision(*place, dtype) for place in places]


def tiny_config(*overrides: str) -> Config:
    return config.load(CONFIG_FILE, overrides)


def tiny_model(*overrides: str, seed: int = 0) -> SSLMetaArch:
    torch.manual_seed(seed)
    return SSLMetaArch(tiny_config(*overrides))


def losses_of_batch(model: SSLMetaArch, batch: Batch, teacher_temp: float = 0.05) -> Losses:
    """The losses of one batch with the teacher's targets for it; centers are updated."""
    [targets] = model.targets([batch], teacher_temp)
    losses, _ = model(batch, targets)
    return losses


def random_batch(num_images: int = 4, num_local: int = 3, mask_probability: float = 0.5, seed: int = 0) -> Batch:
    """Crops of noise, 28 and 14 pixels, and masks of a 4 x 4 grid."""
    generator = torch.Generator().manual_seed(seed)

    def crops(number: int, size: int) -> tuple[Tensor, ...]:
        return tuple(torch.randn(3, size, size, generator=generator) for _ in range(number))

    samples = [MultiCrop(crops(2, 28), crops(num_local, 14)) for _ in range(num_images)]  # type: ignore[arg-type]
    return collate_data_and_cast(
        samples,
        mask_ratio_tuple=(0.3, 0.6),
        mask_probability=mask_probability,
        dtype=torch.float32,
        n_tokens=16,
        mask_generator=MaskingGenerator((4, 4), min_num_patches=1, max_num_patches=8),
        rng=random.Random(seed),
    )


# --- Runs ------------------------------------------------------------------------------------------------------------


def run_train(output_dir: Path, *words: str) -> None:
    """The training command in this process."""
    args = ["--config-file", str(CONFIG_FILE), "--output-dir", str(output_dir), *words]
    train.main(train.get_args_parser().parse_intermixed_args(args))


def train_command(*words: str) -> list[str]:
    """The training command from a clone, by path."""
    return [sys.executable, "dinov2/train/train.py", *words]


def start_train(output_dir: Path, *words: str, **settings: Any) -> subprocess.Popen[str]:
    """The training command in a process of its own."""
    _, *command = train_command("--config-file", str(CONFIG_FILE), "--output-dir", str(output_dir), *words)
    return start_script(*command, **settings)


def start_script(*words: str, environment: dict[str, str] | None = None, **settings: Any) -> subprocess.Popen[str]:
    """A Python script of the clone in a process of its own, with further environment variables."""
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env=_environment() | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **settings,
    )


def _environment() -> dict[str, str]:
    """As on a machine without SLURM, GPU, or an installed package."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PYTHONPATH"))}
    return kept | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def run_script(*words: str) -> subprocess.CompletedProcess[str]:
    """A Python script of the clone, run by its path from the top folder, with no other program on PATH."""
    environment = _environment() | {"PATH": "/nowhere"}
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )


def command_train(output_dir: Path, *words: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    """The training command in a process of its own, to its end."""
    with start_train(output_dir, *words, **settings) as process:
        stdout, stderr = process.communicate(timeout=240)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


class Killed(BaseException):
    """What ends a run in the middle of a step."""


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def descendants(pid: int) -> list[int]:
    """The processes that a process and its children have started."""
    below = children(pid)
    return below + [other for child in below for other in descendants(child)]


@contextmanager
def killed_after(num_steps: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The run in here ends in the step after so many: when the optimizer has moved the student and not yet the rest."""
    clip_and_step, calls = train.clip_and_step, itertools.count()

    def stop(*args: Any) -> bool:
        accepted = clip_and_step(*args)
        if next(calls) == num_steps:
            raise Killed
        return accepted

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "clip_and_step", stop)
        yield


@contextmanager
def without_privileges() -> Iterator[None]:
    """Permissions of files hold in here for this thread, also if it is root's."""

    class Header(ctypes.Structure):
        _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))

    header, library = Header(0x20080522, 0), ctypes.CDLL(None)
    former = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice, for 64 bits
    library.capget(ctypes.byref(header), former)
    library.capset(ctypes.byref(header), (ctypes.c_uint32 * 6)(0, former[1], 0, 0, former[4], 0))
    try:
        yield
    finally:
        library.capset(ctypes.byref(header), former)


# --- What a run leaves -----------------------------------------------------------------------------------------------


def checkpoints(output_dir: Path) -> list[int]:
    """Iterations of the checkpoints in an output folder."""
    return sorted(int(path.name.removeprefix("model_")) for path in (output_dir / "checkpoints").glob("model_???????"))


TIMES = ("iter_time", "data_time", "data_wait")


def metrics(output_dir: Path) -> list[dict[str, float]]:
    """The lines of the metrics file without the times."""
    lines = [json.loads(line) for line in (output_dir / "training_metrics.json").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def tensors(output_dir: Path, iteration: int) -> dict[str, Tensor]:
    """All tensors of a checkpoint: networks, centers, moments of the optimizer."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    path = output_dir / f"checkpoint_{iteration}.pth"
    dcp_to_torch_save(output_dir / "checkpoints" / f"model_{iteration:07d}", path)
    return torch.load(path, weights_only=True)


def state(output_dir: Path, iteration: int) -> dict[str, Any]:
    """What a checkpoint holds besides tensors."""
    return json.loads((output_dir / "checkpoints" / f"model_{iteration:07d}" / "state.json").read_text())


def assert_same_end(one: Path, other: Path, iteration: int) -> None:
    """Two runs ended alike: the same tensors to the last bit, the same metrics, the same meters."""
    first, second = tensors(one, iteration), tensors(other, iteration)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert metrics(one) == metrics(other)
    assert state(one, iteration) == state(other, iteration)


def write_images(folder: Path, number: int) -> Path:
    """Photographs as PNG files; returns the folder."""
    dataset = make_dataset(dataset_str="FashionMNIST:split=VAL")
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(number):
        dataset[index * 7][0].save(folder / f"{index:03d}.png")
    return folder
