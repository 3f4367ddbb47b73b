"""The data cache: copies are whole, made once, within the limit; the least recently used go first."""

import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest

from dinov2.data.datasets.base import DataSourceError
from dinov2.data.shards.local_cache import LocalCache, data_cache


def writer(content: bytes) -> Callable[[BinaryIO], int]:
    def write(file: BinaryIO) -> int:
        file.write(content)
        return len(content)

    return write


def never(file: BinaryIO) -> int:
    raise AssertionError("the copy is there")


def read(cache: LocalCache, key: str, write: Callable[[BinaryIO], int] = never, size: int = 100) -> bytes:
    with cache.opened(key, size, write) as file:
        return file.read()


def copies(cache: LocalCache) -> list[Path]:
    return [path for path in cache.folder.iterdir() if not path.name.startswith(".")]


def test_a_copy_is_made_once(tmp_path: Path) -> None:
    cache = LocalCache(tmp_path / "cache", 1000)
    assert read(cache, "a", writer(b"one")) == b"one"  # less than expected
    assert read(cache, "a") == b"one" and read(cache, "b", writer(b"two" * 50)) == b"two" * 50
    assert {path.stat().st_size for path in copies(cache)} == {3, 150}


def test_the_least_recently_used_copy_goes_and_can_be_read_to_its_end(tmp_path: Path) -> None:
    cache = LocalCache(tmp_path, 350)
    for number, key in enumerate("abc"):
        read(cache, key, writer(key.encode() * 100))
        newest = max(copies(cache), key=lambda path: path.stat().st_mtime_ns)
        os.utime(newest, (1000 + number, 1000 + number))
    assert read(cache, "a") == b"a" * 100  # now b is the oldest
    with cache.opened("b", 100, never) as file:
        os.utime(file.fileno(), (1001, 1001))
        assert read(cache, "d", writer(b"d" * 100)) == b"d" * 100
        assert file.read() == b"b" * 100
    assert len(copies(cache)) == 3 and read(cache, "a") == b"a" * 100 and read(cache, "c") == b"c" * 100
    assert read(cache, "b", writer(b"again")) == b"again"


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def fail(file: BinaryIO) -> int:
        file.write(b"half")
        raise KeyError("broken")

    cache = LocalCache(tmp_path, 1000)
    with pytest.raises(KeyError):
        read(cache, "a", fail)
    assert copies(cache) == [] and read(cache, "a", writer(b"whole")) == b"whole"


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / f".{'0' * 32}.{2**22 + 1}.unfinished").write_bytes(b"x")
    LocalCache(tmp_path, 1000).remove_leftovers()
    assert list(tmp_path.iterdir()) == []


def slow_reader(folder: Path, log: Path) -> None:
    def write(file: BinaryIO) -> int:
        with log.open("a") as lines:
            lines.write("made\n")
        time.sleep(0.3)
        return writer(b"x" * 50)(file)

    assert read(LocalCache(folder, 1000), "a", write) == b"x" * 50


def test_processes_that_need_the_same_copy_wait_for_the_first(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=slow_reader, args=(tmp_path / "cache", tmp_path / "log")) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "made\n"


def test_a_copy_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataSourceError, match=r"2e-06 GB do not fit in .* of 1e-06 GB \(DINOV2_DATA_CACHE_GB\)"):
        read(LocalCache(tmp_path, 1000), "a", never, size=2000)


def test_a_full_disk_is_named_with_the_variables(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(DataSourceError, match=f"data cache in {tmp_path} cannot be written: .*DINOV2_DATA_CACHE="):
            read(LocalCache(tmp_path, 10**6), "a", writer(bytes(20_000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert copies(LocalCache(tmp_path, 1)) == []


def test_a_use_counts_after_some_seconds_only(tmp_path: Path) -> None:
    cache = LocalCache(tmp_path, 1000)
    read(cache, "a", writer(b"one"))
    (path,) = copies(cache)
    before = path.stat().st_mtime_ns
    read(cache, "a")
    assert path.stat().st_mtime_ns == before
    os.utime(path, ns=(before - 60 * 10**9,) * 2)
    read(cache, "a")
    assert path.stat().st_mtime > time.time() - 30


def test_environment_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("DINOV2_DATA_CACHE", raising=False)
    monkeypatch.delenv("DINOV2_DATA_CACHE_GB", raising=False)
    assert data_cache() == LocalCache(tmp_path / "dinov2" / "data", 100 * 10**9)
    monkeypatch.setenv("DINOV2_DATA_CACHE", "/scratch/x")
    monkeypatch.setenv("DINOV2_DATA_CACHE_GB", "0.5")
    assert data_cache() == LocalCache(Path("/scratch/x"), 500_000_000)
    for wrong in ("much", "0", "-1", "nan", "inf"):
        monkeypatch.setenv("DINOV2_DATA_CACHE_GB", wrong)
        with pytest.raises(ValueError, match=f"DINOV2_DATA_CACHE_GB must be a number of gigabytes .*'{wrong}'"):
            data_cache()
