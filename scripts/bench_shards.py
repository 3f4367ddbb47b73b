"""Benchmark of images in tar shards, zip and Parquet files against a folder and the webdataset library; prints JSON.

    python scripts/bench_shards.py [--images 4000] [--side 256] [--repeats 5] [--members 1000000]

The same JPEG files, of smooth random colors, lie in a folder, in tar shards, in a zip file and in Parquet files on the
local disk. One process reads them, sides alternating: bytes alone, and decoded to RGB. Ours are read in random order;
webdataset reads its shards in order, with a shuffle buffer of 1,000 samples. Parquet is read from the copies in the
data cache; what these cost is measured apart, also with a cache of a quarter of the dataset. `--members` empty files in
one tar measure the listing.
"""

import argparse
import io
import itertools
import json
import os
import shutil
import statistics
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run by path from a clone: make the package importable

import numpy as np
import pyarrow
from PIL import Image
from pyarrow import parquet

from dinov2.data.datasets import make_dataset
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.global_order import GlobalOrderSampler, ShardOrderSampler
from dinov2.data.shards import ParquetFiles
from dinov2.data.shards.archives import list_tar
from dinov2.data.shards.local_cache import LIMIT_VARIABLE

SHARD, ROW_GROUP = 500, 100  # images
STRUCT = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
BUFFER = 1000  # samples that webdataset shuffles


def write_images(folder: Path, count: int, side: int) -> None:
    """The same images in folder/images, folder/shards, folder/parquet and folder/images.zip."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(min(count, 200)):  # smooth images, of which a JPEG file has a usual size
        small = Image.fromarray(rng.integers(0, 256, (side // 4, side // 4, 3), np.uint8))
        file = io.BytesIO()
        small.resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=85)
        files.append(file.getvalue())
    (folder / "shards").mkdir()
    (folder / "parquet").mkdir()
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for start in range(0, count, SHARD):
            with tarfile.open(folder / "shards" / f"shard-{start // SHARD:05}.tar", "w") as shard:
                for index, content in zip(range(start, min(start + SHARD, count)), itertools.cycle(files)):
                    name = f"{index // SHARD:05}/{index:08}.jpg"
                    path = folder / "images" / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)
                    shard.add(path, name)
                    archive.write(path, name)
            numbers = range(start, min(start + SHARD, count))
            rows = [{"bytes": files[number % len(files)], "path": None} for number in numbers]
            table = pyarrow.table({"image": pyarrow.array(rows, STRUCT)})
            parquet.write_table(table, folder / "parquet" / f"{start // SHARD:05}.parquet", row_group_size=ROW_GROUP)


def read(dataset: ImageDataset, order: np.ndarray, *, decode: bool) -> int:
    """Read all images of a dataset in an order; returns their number."""
    for index in order:
        if decode:
            dataset.open_image(int(index)).load()
        else:
            dataset.get_image_data(int(index))
    return len(order)


def read_by_webdataset(folder: Path, *, decode: bool) -> int:
    """The same with the webdataset library, shuffled in a buffer."""
    import webdataset  # type: ignore[import-untyped]

    urls = [str(path) for path in sorted((folder / "shards").iterdir())]
    samples: Iterator[Any] = webdataset.WebDataset(urls, shardshuffle=False).shuffle(BUFFER)
    count = 0
    for sample in samples:
        if decode:
            Image.open(io.BytesIO(sample["jpg"])).convert("RGB")
        count += 1
    return count


def measure(folder: Path, repeats: int, *, decode: bool) -> dict[str, Any]:
    """Images per second of each side, medians, and their ratio to the folder, median of the repeats."""
    sets = {
        "folder": make_dataset(dataset_str=f"ImageFolder:root={folder}/images"),
        "tar": make_dataset(dataset_str=f"Tar:files={folder}/shards"),
        "zip": make_dataset(dataset_str=f"Zip:files={folder}/images.zip"),
        "parquet": make_dataset(dataset_str=f"Parquet:files={folder}/parquet"),
    }
    sides: dict[str, Callable[[], int]] = {
        name: partial(read, dataset, np.random.default_rng(0).permutation(len(dataset)), decode=decode)
        for name, dataset in sets.items()
    }
    if find_spec("webdataset"):
        sides["webdataset"] = partial(read_by_webdataset, folder, decode=decode)
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, side in sides.items():
            started = time.perf_counter()
            count = side()
            if repeat:  # the first one warms up
                speeds[name].append(count / (time.perf_counter() - started))
    ratios = {
        name: round(statistics.median(a / b for a, b in zip(values, speeds["folder"], strict=True)), 3)
        for name, values in speeds.items()
    }
    return {"images_per_s": {name: round(statistics.median(v)) for name, v in speeds.items()}, "ratio": ratios}


def time_copies(folder: Path, repeats: int) -> dict[str, int]:
    """Images per second of Parquet, bytes alone: medians of the repeats, each from an empty data cache."""
    orders = {
        "all copied, random": (1.0, False),
        "a quarter, random": (0.25, False),
        "a quarter, by shards": (0.25, True),
    }
    speeds: dict[str, list[float]] = {name: [] for name in orders}
    for _, (name, (share, by_shards)) in itertools.product(range(repeats), orders.items()):
        total = sum(ParquetFiles(files=f"{folder}/parquet").copied_bytes)
        os.environ[LIMIT_VARIABLE] = str(1.1 * share * total / 1e9)
        dataset = ParquetFiles(files=f"{folder}/parquet")
        shutil.rmtree(folder / "cache" / "dinov2" / "data")
        place: Any = {"sample_count": len(dataset), "batch_size": 1}
        order: GlobalOrderSampler = GlobalOrderSampler(**place)
        if by_shards:
            order = ShardOrderSampler(**place, shard_sizes=dataset.shard_sizes, mixed=4)
        count = len(dataset) if share == 1 or by_shards else len(dataset) // 10  # it is slow
        started = time.perf_counter()
        read(dataset, np.array(list(itertools.islice(order, count))), decode=False)
        speeds[name].append(count / (time.perf_counter() - started))
    return {name: round(statistics.median(values)) for name, values in speeds.items()}


def time_listing(folder: Path, members: int) -> dict[str, float]:
    """Seconds that listing a tar of that many small files takes, and per million."""
    with tarfile.open(folder / "many.tar", "w") as archive:
        for index in range(members):
            archive.addfile(tarfile.TarInfo(f"{index // 1000:06}/{index:09}.jpg"))
    started = time.perf_counter()
    with (folder / "many.tar").open("rb") as file:
        count = len(list_tar(file, "many.tar").members)
    seconds = time.perf_counter() - started
    return {"members": count, "seconds": round(seconds, 2), "seconds_per_million": round(1e6 * seconds / count, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--side", type=int, default=256, help="of the images in pixels")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--members", type=int, default=1_000_000, help="files of the tar whose listing is timed")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        write_images(folder, args.images, args.side)
        result = {
            "bytes": measure(folder, args.repeats, decode=False),
            "decoded": measure(folder, args.repeats, decode=True),
            "parquet": time_copies(folder, args.repeats),
            "listing": time_listing(folder, args.members),
        }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
