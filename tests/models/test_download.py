"""Downloads end with the whole file or with nothing under its name, whatever the connection does."""

import errno
import gzip
import io
import re
import resource
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from weight_server import WeightServer, serving

from dinov2.models import download as module
from dinov2.models.download import cache_path, download
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.models.weights import load_backbone

FILE = "/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no waiting."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(module, "PAUSE_S", 0.001)
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture(scope="module")
def weights() -> bytes:
    """A file of `torch.save`, about a megabyte."""
    file = io.BytesIO()
    torch.save({"norm.weight": torch.randn(256 * 1024, generator=torch.Generator().manual_seed(0))}, file)
    return file.getvalue()


@pytest.fixture
def server(weights: bytes) -> Iterator[WeightServer]:
    with serving(files={FILE: weights}) as state:
        yield state


def cached(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir()) if cache.exists() else []


# --- Successful downloads ---------------------------------------------------------------------------------------------


def test_a_file_is_fetched_once_under_its_published_name(server: WeightServer, weights: bytes, cache: Path) -> None:
    path = download(server.url + FILE)
    assert path == cache / "dinov2_vits14_pretrain.pth"
    assert path.read_bytes() == weights
    assert download(server.url + FILE) == path
    assert server.requests == [(FILE, 0)]
    assert cached(cache) == [path.name]


def test_a_file_put_there_by_hand_is_taken_without_a_server(cache: Path) -> None:
    cache.mkdir(parents=True)
    (cache / "dinov2_vitg14_reg4_linear4_head.pth").write_bytes(b"by hand")
    assert download("http://unreachable.invalid/x/dinov2_vitg14_reg4_linear4_head.pth").read_bytes() == b"by hand"


def test_files_of_one_name_from_two_places_are_not_mixed_up(server: WeightServer, weights: bytes) -> None:
    other = weights.replace(weights[1000:1100], bytes(100))
    server.files |= {"/a/teacher_checkpoint.pth": weights, "/b/teacher_checkpoint.pth": other}
    first, second = (download(f"{server.url}/{folder}/teacher_checkpoint.pth") for folder in "ab")
    assert first.read_bytes() == weights and second.read_bytes() == other
    assert first.name.endswith("-teacher_checkpoint.pth")


def test_a_server_that_does_not_report_the_length(server: WeightServer, weights: bytes) -> None:
    server.length = False
    assert download(server.url + FILE).read_bytes() == weights


def test_weights_are_loaded_from_a_url(server: WeightServer) -> None:
    def vit() -> DinoVisionTransformer:
        return DinoVisionTransformer(img_size=8, patch_size=2, embed_dim=12, depth=1, num_heads=3)

    source, file = vit(), io.BytesIO()
    torch.save(source.state_dict(), file)
    server.files["/mine.pth"] = file.getvalue()
    loaded = load_backbone(vit(), f"{server.url}/mine.pth")
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in loaded.state_dict().items())


# --- What breaks off -------------------------------------------------------------------------------------------------


def test_a_cut_connection_is_continued(server: WeightServer, weights: bytes) -> None:
    server.cuts = [300_000, 0, 200_000]  # the second is the response whose body is not read
    assert download(server.url + FILE).read_bytes() == weights
    continued = [start for _, start in server.requests if start]
    assert continued == [300_000, 500_000]


def test_without_ranges_it_starts_over(server: WeightServer, weights: bytes) -> None:
    server.ranges, server.cuts = False, [300_000, 0, 700_000]
    assert download(server.url + FILE).read_bytes() == weights


def test_a_silent_server_is_retried(server: WeightServer, weights: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TIMEOUT_S", 0.3)
    server.stalls = [400_000]
    assert download(server.url + FILE).read_bytes() == weights
    assert server.requests[-1] == (FILE, 400_000)


def test_a_slow_server_is_waited_for(server: WeightServer, weights: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The timeout is for silence, not for the whole."""
    monkeypatch.setattr(module, "TIMEOUT_S", 0.3)
    server.pause_s = 0.05
    assert download(server.url + FILE).read_bytes() == weights
    assert len(server.requests) == 1


def test_a_busy_server_is_retried(server: WeightServer, weights: bytes) -> None:
    server.statuses = [503, 429]
    assert download(server.url + FILE).read_bytes() == weights


@pytest.mark.parametrize("ranges", [True, False])
def test_a_server_that_always_breaks_off_is_given_up_and_continued_another_day(
    server: WeightServer, weights: bytes, cache: Path, ranges: bool
) -> None:
    server.ranges, server.cuts = ranges, [100_000] + [0] * 100
    with pytest.raises(ConnectionError) as caught:
        download(server.url + FILE)
    for text in (server.url + FILE, "connection closed", str(cache / "dinov2_vits14_pretrain.pth")):
        assert text in str(caught.value)
    (partial,) = cached(cache)
    assert partial.startswith(".dinov2_vits14_pretrain.pth.") and (cache / partial).stat().st_size == 100_000
    server.cuts, server.num_bytes = [0, len(weights)] if ranges else [], 0
    assert download(server.url + FILE).read_bytes() == weights
    assert cached(cache) == ["dinov2_vits14_pretrain.pth"]
    assert (server.num_bytes == len(weights) - 100_000) == ranges


def test_what_is_left_of_another_version_is_not_continued(server: WeightServer, weights: bytes) -> None:
    server.cuts = [300_000] + [0] * 100
    with pytest.raises(ConnectionError):
        download(server.url + FILE)
    server.cuts, server.tag = [], '"2"'
    server.files[FILE] = changed = weights.replace(weights[1000:1100], bytes(100))
    assert download(server.url + FILE).read_bytes() == changed


def test_a_complete_file_that_was_not_renamed_is_not_fetched_again(
    server: WeightServer, weights: bytes, cache: Path
) -> None:
    server.cuts = [300_000] + [0] * 100
    with pytest.raises(ConnectionError):
        download(server.url + FILE)
    (partial,) = cache.iterdir()
    partial.write_bytes(weights)
    server.requests.clear()
    assert download(server.url + FILE).read_bytes() == weights
    assert [start for _, start in server.requests] == [0]


def test_a_server_that_trickles_is_given_up(server: WeightServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOW_S", 0.1)
    server.part, server.pause_s = 1, 0.01
    with pytest.raises(ConnectionError, match=r"only \d+ bytes in 0 s"):
        download(server.url + FILE)
    assert len([start for _, start in server.requests if start]) == module.ATTEMPTS - 1, "it may be continued"


def test_a_server_that_breaks_off_after_a_few_bytes_each_time_is_given_up(server: WeightServer) -> None:
    server.cuts = [1000] * 100
    with pytest.raises(ConnectionError, match="connection closed after"):
        download(server.url + FILE)
    assert len(server.requests) < 2 * module.ATTEMPTS


def test_a_server_that_sends_without_end_is_given_up_and_nothing_stays(
    server: WeightServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.length, server.endless = False, True
    usage = type(shutil.disk_usage("/"))
    with monkeypatch.context() as patch:
        patch.setattr(module, "MAX_UNKNOWN_BYTES", 3_000_000)
        with pytest.raises(ValueError, match=r"does not report its length, and it is larger than 3\.0 MB"):
            download(server.url + FILE)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 2_000_000))
        with pytest.raises(ValueError, match=r"larger than 1\.8 MB; the limits are .* nine tenths of the free space"):
            download(server.url + FILE)
    assert not cached(cache)


def test_what_cannot_be_continued_does_not_stay(server: WeightServer, cache: Path) -> None:
    server.length, server.endless = False, True
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        with pytest.raises(OSError, match="cannot write: File too large"):
            download(server.url + FILE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not cached(cache)


# --- What fails ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [404, 410])
def test_a_missing_file_is_named_at_once(server: WeightServer, cache: Path, status: int) -> None:
    server.statuses = [status]
    with pytest.raises(FileNotFoundError, match=f"no weights at {server.url}{FILE}: the server answered {status}"):
        download(server.url + FILE)
    assert len(server.requests) == 1 and not cached(cache)


def test_the_error_of_a_refusal_has_alternatives(server: WeightServer, cache: Path) -> None:
    server.statuses = [403]
    with pytest.raises(ConnectionError, match="the server answered 403 Forbidden") as caught:
        download(server.url + FILE)
    assert f"by hand: put the file at {cache / 'dinov2_vits14_pretrain.pth'}" in str(caught.value)


def test_a_download_that_its_server_refuses_to_continue_begins_anew_another_day(
    server: WeightServer, weights: bytes, cache: Path
) -> None:
    server.cuts, server.statuses = [300_000], [200, 200, 416]
    with pytest.raises(ConnectionError, match="the server answered 416"):
        download(server.url + FILE)
    assert not cached(cache)
    assert download(server.url + FILE).read_bytes() == weights


def test_a_file_for_which_there_is_no_space_leaves_nothing(
    server: WeightServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type(shutil.disk_usage("/"))(10**9, 0, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="not enough space"):
        download(server.url + FILE)
    assert not cached(cache)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"\x00\x01\x02\r\n\r\n", "BadStatusLine"),
        (b"HTTP/1.1 302 Found\r\nLocation: /x\r\nConnection: close\r\n\r\n", "302 The HTTP server .* infinite loop"),
    ],
)
def test_whatever_a_server_answers_the_reason_is_one_line_of_text(answer: bytes, reason: str, cache: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.recv(9999)
                        connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(ConnectionError, match=reason) as caught:
            download(f"http://127.0.0.1:{listener.getsockname()[1]}/x")
    first, *advice = str(caught.value).splitlines()
    assert first.isprintable() and len(advice) == 1 and not cached(cache)


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("host", ["127.0.0.1", "nowhere.invalid"])
def test_without_a_network_the_error_says_where_to_put_the_file(
    cache: Path, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.setattr(module, "PAUSE_S", 1000)  # it does not try again
    url = f"http://{host}:{closed_port()}"
    with pytest.raises(ConnectionError) as caught:
        download(url + FILE)
    message = str(caught.value)
    assert f"cannot download {url}{FILE}: " in message
    assert f"by hand: put the file at {cache / 'dinov2_vits14_pretrain.pth'}" in message
    assert "DINOV2_WEIGHTS_URL" in message and "a folder that holds dinov2_vits14/dinov2_vits14_pretrain.pth" in message
    with pytest.raises(ConnectionError) as caught:
        download(url + "/mine.pth")
    assert str(cache_path(url + "/mine.pth")) in str(caught.value) and "DINOV2_WEIGHTS_URL" not in str(caught.value)
    assert not cached(cache)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"<!DOCTYPE html><html>Please log in</html>", "begins with '<!DOCTYPE html>"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "begins with 'version https://git-lfs"),
        (b"", "it is empty"),
        (gzip.compress(b"x" * 1000, mtime=0), "begins with the bytes 1f 8b 08 00"),
        ("Zugang nötig".encode(), "begins with the bytes 5a 75 67"),
    ],
)
def test_a_page_is_no_file_of_weights(server: WeightServer, cache: Path, body: bytes, problem: str) -> None:
    server.files[FILE] = body
    with pytest.raises(ValueError, match=problem):
        download(server.url + FILE)
    assert not cached(cache)


def test_a_file_that_is_truncated_on_its_server_is_refused(server: WeightServer, weights: bytes, cache: Path) -> None:
    server.files[FILE] = weights[:-100]
    with pytest.raises(ValueError, match=f"{server.url}{FILE} cannot be used: it is truncated"):
        download(server.url + FILE)
    assert not cached(cache)


def test_a_damaged_file_in_the_cache_is_named_with_its_origin(cache: Path) -> None:
    cache.mkdir(parents=True)
    (cache / "dinov2_vits14_pretrain.pth").write_bytes(b"PK damaged")
    model = DinoVisionTransformer(img_size=8, patch_size=2, embed_dim=12, depth=1, num_heads=3)
    with pytest.raises(ValueError, match="delete it to download it again") as caught:
        load_backbone(model, f"http://nowhere.invalid{FILE}")
    assert str(cache / "dinov2_vits14_pretrain.pth") in str(caught.value)


def test_a_disk_without_space_is_known_beforehand(
    server: WeightServer, weights: bytes, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(OSError, match=r"not enough space for .*1\.1 MB needed, 0\.0 MB free") as caught:
        download(server.url + FILE)
    assert caught.value.errno == errno.ENOSPC and str(cache) in str(caught.value)


def test_a_disk_that_becomes_full_is_named(server: WeightServer, weights: bytes, cache: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        with pytest.raises(OSError, match="cannot write: File too large") as caught:
            download(server.url + FILE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(cache) in str(caught.value)
    assert download(server.url + FILE).read_bytes() == weights
    assert server.requests[-1] == (FILE, 300_000)


# --- Several at once -------------------------------------------------------------------------------------------------


def at_once(num: int, function: Callable[[], object]) -> list[object]:
    """What so many calls at the same time return or raise. (The lock is between open files: threads or processes.)"""
    results: list[object] = []
    start = threading.Barrier(num)

    def run() -> None:
        start.wait()
        try:
            results.append(function())
        except Exception as error:
            results.append(error)

    threads = [threading.Thread(target=run) for _ in range(num)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("locks", [True, False], ids=["with locks", "without locks"])
def test_several_at_once_do_not_harm_each_other(
    server: WeightServer, weights: bytes, cache: Path, monkeypatch: pytest.MonkeyPatch, locks: bool
) -> None:
    """With locks it is sent once; without, as on some network file systems, more often."""
    if not locks:
        monkeypatch.setattr(module, "_lock", lambda file, wait: True)
    server.pause_s = 0.01
    path = cache / "dinov2_vits14_pretrain.pth"
    assert at_once(4, lambda: download(server.url + FILE)) == [path] * 4
    assert path.read_bytes() == weights and cached(cache) == [path.name]
    if locks:
        assert server.num_bytes < 2 * len(weights)


def test_one_goes_on_where_the_other_broke_off(server: WeightServer, weights: bytes, cache: Path) -> None:
    server.pause_s, server.cuts = 0.01, [300_000, 0, 0, 0]
    path = cache / "dinov2_vits14_pretrain.pth"
    assert at_once(2, lambda: download(server.url + FILE)) == [path] * 2
    assert path.read_bytes() == weights


# --- Progress ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_on_a_terminal_only(
    server: WeightServer, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    stream = io.StringIO()
    stream.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", stream)
    download(server.url + FILE)
    shown = stream.getvalue()
    assert re.search(r"dinov2_vits14_pretrain\.pth: 100%.* 1\.05M/1\.05M .*B/s\]\n$", shown) if terminal else not shown
