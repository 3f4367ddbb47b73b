"""A model and runs so small that a step takes milliseconds (`tiny.yaml`), and ways to look at what a run leaves."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2 import config
from dinov2.config import Config
from dinov2.data import make_dataset
from dinov2.data.augment import MultiCrop
from dinov2.data.collate import Batch, collate_data_and_cast
from dinov2.data.masking import MaskingGenerator
from dinov2.train import train
from dinov2.train.ssl_meta_arch import SSLMetaArch

ROOT = Path(__file__).resolve().parents[2]
CONFIG_FILE = Path(__file__).with_name("tiny.yaml")

CENTERING = "train.centering=centering"
SEPARATE_HEADS = [
    *("ibot.separate_head=true", "ibot.head_n_prototypes=12"),
    *("ibot.head_bottleneck_dim=8", "ibot.head_hidden_dim=32", "ibot.head_nlayers=2"),
]


def tiny_config(*overrides: str) -> Config:
    return config.load(CONFIG_FILE, overrides)


def tiny_model(*overrides: str, seed: int = 0) -> SSLMetaArch:
    torch.manual_seed(seed)
    return SSLMetaArch(tiny_config(*overrides))


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
    return subprocess.Popen(
        train_command("--config-file", str(CONFIG_FILE), "--output-dir", str(output_dir), *words),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": "", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **settings,
    )


def command_train(output_dir: Path, *words: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    """The training command in a process of its own, to its end."""
    with start_train(output_dir, *words, **settings) as process:
        stdout, stderr = process.communicate(timeout=240)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


# --- What a run leaves -----------------------------------------------------------------------------------------------


def checkpoints(output_dir: Path) -> list[int]:
    """Iterations of the checkpoints in an output folder."""
    return sorted(int(path.name.removeprefix("model_")) for path in (output_dir / "checkpoints").glob("*"))


def metrics(output_dir: Path) -> list[dict[str, float]]:
    """The lines of the metrics file without the times."""
    lines = [json.loads(line) for line in (output_dir / "training_metrics.json").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.endswith("_time")} for line in lines]


def tensors(output_dir: Path, iteration: int) -> dict[str, Tensor]:
    """All tensors of a checkpoint: networks, centres, moments of the optimizer."""
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
