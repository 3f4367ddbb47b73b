"""Archives behind URLs: whole copies, made once, whatever the server does; what cannot be read ends the run by name."""

import logging
import multiprocessing
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from archive_files import image_bytes, levels, write_tar
from file_server import FileServer, serving
from tiny import run_train
from torch.utils.data import DataLoader

from dinov2.data.datasets import make_dataset
from dinov2.data.datasets.base import ChangedDataError, DataSourceError
from dinov2.data.shards import ParquetFiles, Shards, storage
from dinov2.data.shards.archives import ArchiveError
from dinov2.data.shards.sharded import order_warning
from dinov2.data.workers import LoadingError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data cache; requests are repeated at once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("DINOV2_DATA_CACHE", "DINOV2_DATA_CACHE_GB"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(storage, "_WAITS", (0.01, 0.02))
    return tmp_path / "cache" / "dinov2" / "data"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FileServer]:
    """A server of two archives with three images each, of the levels 0 to 5."""
    for number in range(2):
        files = [(f"{i}.png", image_bytes(3 * number + i)) for i in range(3)] + [(f"{i}.cls", b"7") for i in range(3)]
        write_tar(tmp_path / "served" / f"s-{number:02}.tar", files)
    with serving(tmp_path / "served") as server:
        yield server


def dataset_of(text: str) -> Any:
    return make_dataset(dataset_str=text)


def copies(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if not path.name.startswith(".")]


def gets(server: FileServer) -> list[str]:
    return [request for request in server.requests if request.startswith("GET")]


# --- URLs ------------------------------------------------------------------------------------------------------------


def test_a_range_of_urls_with_a_port_and_further_keys(server: FileServer, cache: Path) -> None:
    text = f"Tar:files={server.url}/s-{{00..01}}.tar:label=cls"
    dataset = dataset_of(text)
    assert levels(dataset) == list(range(6)) and dataset.get_targets().tolist() == [7] * 6
    assert dataset.describe(4) == f"{server.url}/s-01.tar: 1.png" and dataset.shard_sizes == [3, 3]
    assert len(copies(cache)) == 2 and len(gets(server)) == 2
    assert levels(dataset_of(text)) == list(range(6)) and len(gets(server)) == 2  # neither listed nor downloaded again


@pytest.mark.parametrize("pattern", ["d/*.tar", "d/x-{0..1}.tar", "d", "d/x-0.tar,memory://d/x-[1].tar"])
def test_memory_with_globs_and_folders(pattern: str, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for number in range(2):
        path = write_tar(tmp_path / "a.tar", [("a.png", image_bytes(number))])
        memory.pipe(f"/d/x-{number}.tar", path.read_bytes())
    try:
        dataset = dataset_of(f"Tar:files=memory://{pattern}")
        assert levels(dataset) == [0, 1] and dataset.describe(1).endswith("d/x-1.tar: a.png")
    finally:
        memory.rm("/d", recursive=True)


def test_local_urls_are_read_where_they_are(server: FileServer, cache: Path, tmp_path: Path) -> None:
    dataset = dataset_of(f"Tar:files=file://{tmp_path}/served/*.tar")
    assert levels(dataset) == list(range(6)) and dataset.describe(0) == f"{tmp_path}/served/s-00.tar: 0.png"
    assert not cache.exists()


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("SERVER/s-{00..02}.tar", FileNotFoundError, r"no such file: 'http.*s-02.tar'"),
        ("SERVER/x.tar?signed=1", FileNotFoundError, r"no such file: 'http.*x.tar\?signed=1'"),
        ("memory://nothing/*.tar", FileNotFoundError, r"no such file: 'memory://nothing/\*.tar'"),
        ("memory://nothing", FileNotFoundError, r"no such file: 'memory://nothing'"),
        ("nowhere://a.tar", ValueError, "nowhere://a.tar: Protocol not known: nowhere"),
        ("http://127.0.0.1:9/a.tar", DataSourceError, r"http://127.0.0.1:9/a.tar cannot be read, attempt 3: "),
    ],
)
def test_what_is_not_there_is_named(text: str, error: type[Exception], message: str, server: FileServer) -> None:
    with pytest.raises(error, match=message):
        dataset_of(f"Tar:files={text.replace('SERVER', server.url)}")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ImportError, match="s3://a/b.tar needs a package of fsspec: Install s3fs"):
        dataset_of("Tar:files=s3://a/b.tar")


def test_a_damaged_remote_archive_is_named_at_once(server: FileServer) -> None:
    (server.folder / "s-00.tar").write_bytes(b"not a tar" * 500)
    with pytest.raises(ArchiveError, match=rf"{server.url}/s-00.tar is no tar archive, or is damaged"):
        dataset_of(f"Tar:files={server.url}/s-00.tar")


# --- Servers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failures", [[503, "truncated"], ["truncated"], ["slow"], [429, 500]])
def test_failures_that_pass_are_repeated(
    failures: list[int | str], server: FileServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.failures = list(failures)
    assert levels(dataset_of(f"Tar:files={server.url}/s-00.tar")) == [0, 1, 2]
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == (0 if failures == ["slow"] else len(failures))
    assert all("s-00.tar cannot be read, next attempt in 0.0" in warning for warning in warnings)


@pytest.mark.parametrize("has_ranges", [True, False])
def test_a_second_attempt_goes_on_where_the_first_ended(
    has_ranges: bool, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_BLOCK", 4096)
    server.has_ranges = has_ranges
    server.failures = ["", 500] if has_ranges else []
    assert levels(dataset_of(f"Tar:files={server.url}/s-01.tar")) == [3, 4, 5]
    if has_ranges:
        assert [request.partition("bytes=")[2] for request in gets(server)] == [
            "0-4095",
            "4096-8191",
            "4096-8191",
            "8192-10239",
        ]


def test_a_server_that_keeps_failing_ends_the_run(server: FileServer) -> None:
    server.failures = [500] * 3
    with pytest.raises(DataSourceError, match=rf"{server.url}/s-00.tar cannot be read, attempt 3: .*500"):
        dataset_of(f"Tar:files={server.url}/s-00.tar")
    server.failures = [403]
    with pytest.raises(DataSourceError, match=r"s-00.tar cannot be read, attempt 1: .*403"):
        dataset_of(f"Tar:files={server.url}/s-00.tar")


def test_an_archive_that_cannot_be_read_is_no_bad_image(server: FileServer, cache: Path) -> None:
    dataset = dataset_of(f"Tar:files={server.url}/s-00.tar")
    copies(cache)[0].unlink()
    server.failures = ["truncated"] * 3
    with pytest.raises(DataSourceError, match=r"s-00.tar cannot be read, attempt 3"):
        dataset.get_image(0)
    assert copies(cache) == [] and levels(dataset) == [0, 1, 2]


def test_a_server_that_fails_for_good_ends_training(
    server: FileServer, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = Shards.get_image_data, []

    def read(self: Shards, index: int) -> bytes:
        calls.append(index)
        if len(calls) == 20:  # six have been inspected before the first step
            server.failures = [503] * 1000
            for path in copies(cache):
                path.unlink()
        return original(self, index)

    monkeypatch.setattr(Shards, "get_image_data", read)
    words = ["train.num_workers=0", "health.period=0", f"train.dataset_path=Tar:files={server.url}/s-{{00..01}}.tar"]
    with pytest.raises(LoadingError, match=r"cannot load sample .*s-0\d.tar cannot be read, attempt 3: .*503"):
        run_train(tmp_path / "out", *words)
    assert len(calls) == 20  # no other image took its place


@pytest.mark.parametrize("change", ["replace", "delete"])
def test_an_archive_that_changes_ends_the_run(change: str, server: FileServer, cache: Path) -> None:
    dataset, path = dataset_of(f"Tar:files={server.url}/s-00.tar"), server.folder / "s-00.tar"
    if change == "replace":
        write_tar(path, [(f"{i}.png", image_bytes(9 - i)) for i in range(3)] + [("z.txt", b"")] * 3)
        os.utime(path, (1e9, 1e9))
    else:
        path.unlink()
    assert levels(dataset) == [0, 1, 2]  # of the copy
    copies(cache)[0].unlink()
    with pytest.raises(
        ChangedDataError, match=rf"s-00.tar {'has changed' if change == 'replace' else 'is gone'} since"
    ):
        dataset.get_image(0)
    assert copies(cache) == []
    if change == "replace":
        assert levels(dataset_of(f"Tar:files={server.url}/s-00.tar")) == [9, 8, 7]


# --- The cache -------------------------------------------------------------------------------------------------------


def test_a_cache_of_one_archive_reads_two_in_several_processes(
    server: FileServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DINOV2_DATA_CACHE_GB", "0.000011")  # of 10,240 bytes each
    dataset = dataset_of(f"Tar:files={server.url}/s-{{00..01}}.tar")
    loader = DataLoader(
        dataset,
        num_workers=2,
        batch_size=None,
        sampler=[0, 3, 1, 4, 2, 5] * 4,
        collate_fn=lambda sample: sample[0].getpixel((0, 0))[0],
        multiprocessing_context=multiprocessing.get_context("fork"),
    )
    before = len(gets(server))
    assert list(loader) == [0, 3, 1, 4, 2, 5] * 4
    assert len(copies(cache)) == 1 and len(gets(server)) - before >= 2
    assert "it needs 2.05e-05 GB of the data cache" in order_warning([dataset], by_shards=False)


def test_an_archive_larger_than_the_cache_is_an_error(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINOV2_DATA_CACHE_GB", "0.000001")
    with pytest.raises(DataSourceError, match="do not fit in the data cache"):
        dataset_of(f"Tar:files={server.url}/s-00.tar")


# --- Parquet ---------------------------------------------------------------------------------------------------------


def test_of_a_remote_parquet_file_only_what_is_read_is_transferred(server: FileServer, cache: Path) -> None:
    rows = [os.urandom(100_000) for _ in range(12)]
    pq.write_table(pa.table({"image": rows}), server.folder / "a.parquet", row_group_size=3)
    dataset = ParquetFiles(files=f"{server.url}/a.parquet")
    server.failures = ["truncated", 503]
    assert [dataset.get_image_data(row) for row in (7, 6, 8)] == [rows[7], rows[6], rows[8]]
    assert len(copies(cache)) == 1 and 300_000 < copies(cache)[0].stat().st_size < 301_000
    transferred = 0
    for request in gets(server):
        first, _, last = request.partition("bytes=")[2].partition("-")
        transferred += int(last) - int(first) + 1
    assert transferred < 3 * 320_000  # a row group of four, three attempts, and what is around it
    pq.write_table(pa.table({"image": rows[::-1]}), server.folder / "a.parquet", row_group_size=3)
    with pytest.raises(ChangedDataError, match=r"a.parquet has changed"):
        dataset.get_image(0)
