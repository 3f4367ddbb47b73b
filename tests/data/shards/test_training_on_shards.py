"""Training on shards is training on the same images in a folder, bit for bit; a replaced shard ends it."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny import run_train, tensors

from dinov2.data.shards import Shards


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `images`, and the same in `a.tar` and `b.tar`, and in `images.parquet`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for index in range(40):
        path = tmp_path / "images" / "ab"[index // 20] / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(path)
    for name in "ab":
        subprocess.run(["tar", "--sort=name", "-C", "images", "-cf", f"{name}.tar", name], cwd=tmp_path, check=True)
    files = [path.read_bytes() for path in sorted(tmp_path.glob("images/*/*.png"))]
    pq.write_table(pa.table({"image": files}), tmp_path / "images.parquet", row_group_size=16)
    return tmp_path


@pytest.mark.parametrize(("workers", "dataset"), [(0, "Tar:files=F/{a,b}.tar"), (2, "Parquet:files=F/images.parquet")])
def test_shards_train_as_their_images_do_in_a_folder(workers: int, dataset: str, images: Path) -> None:
    words = [f"train.num_workers={workers}", "health.period=0"]
    run_train(images / "folder", *words, f"train.dataset_path=ImageFolder:root={images}/images")
    run_train(images / "shards", *words, f"train.dataset_path={dataset.replace('F', str(images), 1)}")
    first, second = tensors(images / "folder", 7), tensors(images / "shards", 7)
    assert first.keys() == second.keys() and len(first) > 20
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_order_by_shards_resumes_where_it_stopped(images: Path) -> None:
    words = ["train.num_workers=0", "health.period=0", "train.sampler=SHARD_ORDER"]
    words.append(f"train.dataset_path=Tar:files={images}/{{a,b}}.tar")
    run_train(images / "whole", *words)
    run_train(images / "parts", *words, "train.checkpoint_period=3")
    shutil.rmtree(images / "parts" / "checkpoints" / "model_0000007")
    run_train(images / "parts", *words, "train.checkpoint_period=3")
    first, second = tensors(images / "whole", 7), tensors(images / "parts", 7)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_shard_that_is_replaced_ends_the_run_by_name(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = Shards.get_image_data, []

    def read(self: Shards, index: int) -> bytes:
        calls.append(index)
        if len(calls) == 48:  # 40 have been inspected before the first step
            (images / "b.tar").write_bytes((images / "a.tar").read_bytes())
        return original(self, index)

    monkeypatch.setattr(Shards, "get_image_data", read)
    words = ["train.num_workers=0", "health.period=0", f"train.dataset_path=Tar:files={images}/a.tar,{images}/b.tar"]
    with pytest.raises((OSError, RuntimeError), match=r"b.tar has changed since its files were listed"):
        run_train(images / "out", *words)
    assert 48 <= len(calls) < 60
