"""Parquet files of the library datasets and of others: every image with its bytes and label; what is wrong is named."""

import logging
import multiprocessing
import os
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from archive_files import image_bytes, levels
from PIL import Image
from torch.utils.data import DataLoader

from dinov2.data.datasets import make_dataset
from dinov2.data.datasets.base import ChangedDataError, DataSourceError
from dinov2.data.images import BadImageError
from dinov2.data.shards.archives import ArchiveError
from dinov2.data.shards.sharded import order_warning

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("DINOV2_DATA_CACHE", "DINOV2_DATA_CACHE_GB"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache" / "dinov2" / "data"


def write(path: Path, columns: dict[str, Any], **settings: Any) -> Path:
    pq.write_table(pa.table(columns), path, **settings)
    return path


def write_structs(path: Path, count: int = 10, start: int = 0, **columns: Any) -> Path:
    """Images of the levels from `start` on in row groups of four."""
    images = [{"bytes": image_bytes(start + row), "path": f"{start + row}.png"} for row in range(count)]
    return write(path, {"image": pa.array(images, STRUCT), **columns}, row_group_size=4)


def dataset_of(text: str) -> Any:
    return make_dataset(dataset_str=text)


# --- Formats ---------------------------------------------------------------------------------------------------------


def test_files_of_the_library_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    import datasets  # slow to import

    features = datasets.Features({"photo": datasets.Image(), "label": datasets.ClassLabel(names=["z", "a", "m"])})
    for number in range(2):
        rows = [(Image.new("RGB", (6, 5), (10 * number + row, 0, 0)), row % 3) for row in range(10)]
        columns = {"photo": [image for image, _ in rows], "label": [label for _, label in rows]}
        written = datasets.Dataset.from_dict(columns, features=features)
        written.to_parquet(tmp_path / f"train-{number:05}-of-00002.parquet", batch_size=4)
    dataset = dataset_of(f"Parquet:files={tmp_path}/train-{{00000..00001}}-of-00002.parquet")
    assert levels(dataset) == list(range(20))
    assert dataset.classes == ["z", "a", "m"] and dataset.get_targets().tolist() == 2 * [row % 3 for row in range(10)]
    assert dataset.get_class_name(12) == "m"
    assert dataset.shard_sizes == [4, 4, 2, 4, 4, 2]
    assert dataset.describe(13) == f"{tmp_path}/train-00001-of-00002.parquet: row 3"


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()], ids=str)
def test_columns_of_plain_bytes_with_class_names(kind: pa.DataType, tmp_path: Path) -> None:
    images = pa.array([image_bytes(row) for row in range(5)], kind)
    write(tmp_path / "a.parquet", {"id": range(5), "jpg": images, "label": ["b", "a", "b", "c", "a"]})
    dataset = dataset_of(f"Parquet:files={tmp_path}")
    assert levels(dataset) == [0, 1, 2, 3, 4]
    assert dataset.classes == ["a", "b", "c"] and dataset.get_targets().tolist() == [1, 0, 1, 2, 0]


def test_columns_are_chosen_by_name(tmp_path: Path) -> None:
    pairs = {name: [image_bytes(start + row) for row in range(3)] for name, start in (("left", 0), ("right", 100))}
    path = write(tmp_path / "a.parquet", pairs | {"coarse": [True, False, True], "x.y": [1.5, 2.5, 3.5]})
    with pytest.raises(ArchiveError, match="several columns of images, left, right: choose one with :image=left"):
        dataset_of(f"Parquet:files={path}")
    dataset = dataset_of(f"Parquet:files={path}:image=right:label=coarse")
    assert levels(dataset) == [100, 101, 102] and dataset.get_targets().tolist() == [1, 0, 1]
    with pytest.raises(ArchiveError, match="column x.y holds double, not one class index or name in a row"):
        dataset_of(f"Parquet:files={path}:image=right:label=x.y")


def test_rows_have_the_bytes_of_their_files_and_paths_name_them(tmp_path: Path) -> None:
    path = write_structs(tmp_path / "a.parquet", label=[row % 4 for row in range(10)])
    dataset = dataset_of(f"Parquet:files={path}")
    assert [dataset.get_image_data(row) for row in (9, 0, 5)] == [image_bytes(row) for row in (9, 0, 5)]
    assert dataset.describe(5) == f"{path}: row 5, 5.png" and list(dataset.image_files()) == [str(path)] * 10
    assert dataset.get_targets().tolist() == [row % 4 for row in range(10)] and dataset.classes == []
    assert dataset.fingerprint() != dataset_of(f"Parquet:files={write_structs(tmp_path / 'b.parquet')}").fingerprint()


def test_missing_labels_are_counted_and_labels_are_not_used(tmp_path: Path) -> None:
    path = write_structs(tmp_path / "a.parquet", label=[1, None, *range(8)])
    dataset = dataset_of(f"Parquet:files={path}")
    assert dataset.get_targets() is None
    assert f"1 of 10 samples have no label, such as {path}: row 1, 1.png" in dataset.notes_on_files()[0]


# --- Faults ----------------------------------------------------------------------------------------------------------


def test_a_row_without_image_is_one_bad_image_and_counted(tmp_path: Path) -> None:
    images = pa.array(
        [{"bytes": image_bytes(0), "path": "0.png"}, None, {"bytes": image_bytes(2), "path": None}], STRUCT
    )
    path = write(tmp_path / "a.parquet", {"image": images})
    dataset = dataset_of(f"Parquet:files={path}")
    assert dataset.notes_on_files() == [f"{path}: 1 of 3 rows have no image"]
    with pytest.raises(BadImageError, match=r"sample 1 \(.*a.parquet: row 1\): the row has no image in it"):
        dataset.get_image(1)
    assert dataset.get_image(2).getpixel((0, 0))[0] == 2


def test_paths_alone_are_an_error_that_names_remedies(tmp_path: Path) -> None:
    images = pa.array([{"bytes": None, "path": "/elsewhere/0.png"}] * 3, STRUCT)
    path = write(tmp_path / "a.parquet", {"image": images})
    with pytest.raises(
        ArchiveError, match=r"no image in column image.bytes, but paths such as /elsewhere/0.png: .*ImageList"
    ):
        dataset_of(f"Parquet:files={path}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            ":image=photo",
            r"has no column photo \(image=photo\); it has: images \(list<.*, label \(string\), n \(int64\)",
        ),
        (":label=cls", r"has no column cls \(label=cls\); it has"),
        ("", r"has no column of images: .*; images: several values in a row"),
        (":image=label", r"has no images in column label: .*must be in it as bytes"),
        (":image=images", r"has no images in column images: .*images: several values in a row"),
    ],
)
def test_wrong_columns_are_errors_that_name_the_existing_ones(text: str, message: str, tmp_path: Path) -> None:
    images = pa.array([[{"bytes": image_bytes(1), "path": "a"}]], pa.list_(STRUCT))
    path = write(tmp_path / "a.parquet", {"images": images, "label": ["a"], "n": [1]})
    if "label=" in text:
        path = write_structs(tmp_path / "a.parquet")
    with pytest.raises(ArchiveError, match=message):
        dataset_of(f"Parquet:files={path}{text}")


@pytest.mark.parametrize("keep", [0, 3, 100, -5])
def test_a_truncated_file_is_named(keep: int, tmp_path: Path) -> None:
    path = write_structs(tmp_path / "a.parquet")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArchiveError, match=r"a.parquet is no Parquet file, or is damaged or truncated: "):
        dataset_of(f"Parquet:files={path}")


def test_a_damaged_row_group_ends_the_run(tmp_path: Path) -> None:
    path = write_structs(tmp_path / "a.parquet")
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(0)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(content)
    dataset = make_without_survey(path)
    assert dataset.get_image_data(3) == image_bytes(3)
    with pytest.raises(DataSourceError, match=r"a.parquet .*is damaged"):
        dataset.get_image(4)


def make_without_survey(path: Path) -> Any:
    from dinov2.data.shards import ParquetFiles

    return ParquetFiles(files=str(path))


def test_a_file_that_changes_ends_the_run_before_a_sample_is_another_one(tmp_path: Path) -> None:
    path = write_structs(tmp_path / "a.parquet")
    dataset = make_without_survey(path)
    assert dataset.get_image_data(0) == image_bytes(0)
    write_structs(path, start=50)
    assert dataset.get_image_data(1) == image_bytes(1)  # of the copy
    with pytest.raises(ChangedDataError, match=r"a.parquet has changed since its files were listed"):
        dataset.get_image(4)
    path.unlink()
    with pytest.raises(ChangedDataError, match=r"a.parquet is gone since its files were listed"):
        dataset.get_image(4)
    assert levels(dataset_of(f"Parquet:files={write_structs(path, start=50)}")) == list(range(50, 60))


def test_files_with_other_classes_are_an_error(tmp_path: Path) -> None:
    for name, names in (("a", '["x", "y"]'), ("b", '["y", "x"]')):
        feature = f'{{"info": {{"features": {{"label": {{"names": {names}, "_type": "ClassLabel"}}}}}}}}'
        table = pa.table({"image": [image_bytes(1)] * 2, "label": [0, 1]})
        pq.write_table(table.replace_schema_metadata({"huggingface": feature}), tmp_path / f"{name}.parquet")
    with pytest.raises(ValueError, match=r"b.parquet has other class names than .*a.parquet"):
        dataset_of(f"Parquet:files={tmp_path}")
    dataset = dataset_of(f"Parquet:files={tmp_path}/b.parquet")
    assert dataset.classes == ["y", "x"] and dataset.get_targets().tolist() == [0, 1]


def test_without_pyarrow_an_error_names_the_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_structs(tmp_path / "a.parquet")
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="Parquet files need pyarrow: pip install pyarrow"):
        dataset_of(f"Parquet:files={path}")


def test_a_folder_of_parquet_files_is_no_folder_of_images(tmp_path: Path) -> None:
    write_structs(tmp_path / "a.parquet")
    with pytest.raises(FileNotFoundError, match=r"found 1 .parquet \(a Parquet file: write Parquet:files=...\)"):
        dataset_of(f"ImageFolder:root={tmp_path}")


# --- Reading ---------------------------------------------------------------------------------------------------------


def test_the_index_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_structs(tmp_path / "a.parquet", label=list("aabbccddee"))
    os.utime(path, (1e9, 1e9))
    first = dataset_of(f"Parquet:files={path}")
    monkeypatch.setattr("dinov2.data.shards.parquet.index_parquet", lambda *args: pytest.fail("indexed again"))
    again = dataset_of(f"Parquet:files={path}")
    assert (again.fingerprint(), again.classes, again.shard_sizes) == (first.fingerprint(), list("abcde"), [4, 4, 2])


def test_a_small_cache_is_never_exceeded_and_every_image_is_right(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "a.parquet", {"image": [bytes([row]) * 1000 for row in range(40)]}, row_group_size=4)
    monkeypatch.setenv("DINOV2_DATA_CACHE_GB", "0.00001")  # two of ten row groups
    dataset = make_without_survey(path)
    for row in np.random.default_rng(0).permutation(40).tolist():
        assert dataset.get_image_data(row) == bytes([row]) * 1000
        assert sum(each.stat().st_size for each in cache.iterdir()) <= 10_000
    assert 40_000 < sum(dataset.copied_bytes) < 70_000
    warning = order_warning([dataset], by_shards=False)
    assert "needs 6.11e-05 GB" in warning and "cache, which has 1e-05; use train.sampler=SHARD_ORDER" in warning
    assert "SHARD_ORDER" not in order_warning([dataset], by_shards=True)
    monkeypatch.setenv("DINOV2_DATA_CACHE_GB", "1")
    assert order_warning([dataset], by_shards=False) == ""


def test_a_row_group_is_copied_in_pieces(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [rng.bytes(2**20) for _ in range(64)]
    path = write(tmp_path / "a.parquet", {"image": rows}, compression="snappy", write_batch_size=1)  # pages of a row
    dataset = make_without_survey(path)

    def peak() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) // 1024

    dataset.get_image_data(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak()
    shutil.rmtree(dataset._cache.folder)
    assert all(dataset.get_image_data(row) == rows[row] for row in range(64))
    assert peak() - before < 32  # MiB, of 64


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_what_the_dataset_has(method: str, tmp_path: Path) -> None:
    dataset = make_without_survey(write_structs(tmp_path / "a.parquet"))
    if method == "spawn":
        dataset = pickle.loads(pickle.dumps(dataset))
        assert levels(dataset) == list(range(10))
        return
    loader = DataLoader(
        dataset,
        num_workers=2,
        batch_size=None,
        collate_fn=lambda sample: sample[0].getpixel((0, 0))[0],
        multiprocessing_context=multiprocessing.get_context("fork"),
    )
    assert list(loader) == list(range(10))


def test_a_random_order_that_does_not_fit_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from tiny import run_train

    path = write_structs(tmp_path / "a.parquet", label=[row % 2 for row in range(10)])
    words = ["train.num_workers=0", "health.period=0", "optim.epochs=1", f"train.dataset_path=Parquet:files={path}"]
    with caplog.at_level(logging.WARNING):
        monkeypatch.setenv("DINOV2_DATA_CACHE_GB", "0.000001")
        run_train(tmp_path / "out", *words)
    found = [record.message for record in caplog.records if "data cache" in record.message]
    assert len(found) == 1 and found[0].startswith("train.sampler=GLOBAL_ORDER: reading in this order copies")
