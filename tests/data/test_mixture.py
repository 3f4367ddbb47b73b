"""Mixtures: shares hold in every block, sources are passed through without repeats, and the order needs no state."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from archive_files import image_bytes, write_tar
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dinov2.data.datasets import make_dataset
from dinov2.data.global_order import GlobalOrderSampler, MixtureSampler, Source, samples_per_block
from dinov2.data.samplers import SamplerType, make_sampler


def sampler(sizes: list[int], per_block: list[int], **settings: Any) -> MixtureSampler:
    sources = [Source(str(i), size, count, None) for i, (size, count) in enumerate(zip(sizes, per_block, strict=True))]
    defaults: dict[str, Any] = {"sample_count": sum(sizes), "batch_size": 4, "sources": sources}
    return MixtureSampler(**defaults | settings)


def take(order: Any, count: int) -> list[int]:
    return list(itertools.islice(order, count))


# --- The order -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([0.9, 0.1], [9, 1]),
        ([1, 1, 1], [1, 1, 1]),
        ([2.0, 1.0], [2, 1]),
        ([0.01, 0.99], [1, 99]),
        ([5], [1]),
        ([0.3337, 0.6663], [334, 666]),  # nearly
        ([0.0123, 0.9877], [123, 9877]),
    ],
)
def test_samples_of_a_block_by_largest_remainders(weights: list[float], expected: list[int]) -> None:
    assert samples_per_block(weights) == expected


@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
def test_shares_are_off_by_at_most_a_percent(weights: list[float]) -> None:
    counts = samples_per_block(weights) if min(weights) / sum(weights) > 0.01 else [1]
    if len(counts) == len(weights):
        assert np.array(counts) / sum(counts) == pytest.approx(np.array(weights) / sum(weights), rel=0.0101)
        assert sum(counts) <= 10_000


def test_a_weight_that_is_too_small_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"weight 1e-06 of 1 is too small: in a block of 10,000 samples"):
        samples_per_block([0.999999, 0.000001])


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    data=st.data(),
    batch_size=st.integers(1, 5),
    seed=st.integers(0, 9),
)
def test_every_block_has_the_shares_and_a_source_repeats_nothing_before_its_pass_ends(
    sizes: list[int], data: st.DataObject, batch_size: int, seed: int
) -> None:
    per_block = data.draw(st.lists(st.integers(1, 7), min_size=len(sizes), max_size=len(sizes)))
    block, ends = sum(per_block), np.cumsum(sizes)
    order = take(sampler(sizes, per_block, seed=seed, batch_size=batch_size), 6 * block)
    source_of = np.searchsorted(ends, order, side="right")
    for start in range(0, len(order), block):
        assert np.bincount(source_of[start : start + block], minlength=len(sizes)).tolist() == per_block
    for number, size in enumerate(sizes):
        drawn = [index for index, source in zip(order, source_of, strict=True) if source == number]
        for start in range(0, len(drawn), size):
            part = drawn[start : start + size]
            assert len(set(part)) == len(part)
    sequence: list[int] = []
    for world_size in (2, 1, 3):  # resumed on other numbers of processes
        settings: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "world_size": world_size}
        ranks = [
            iter(sampler(sizes, per_block, rank=rank, start_position=len(sequence), **settings))
            for rank in range(world_size)
        ]
        sequence += [index for _ in range(2) for rank in ranks for index in take(rank, batch_size)]
    assert sequence == take(sampler(sizes, per_block, seed=seed), len(sequence))


def test_passes_blocks_and_seeds_differ() -> None:
    def order(seed: int) -> list[int]:
        return take(sampler([10, 10], [5, 5], seed=seed), 40)

    first, second = order(0)[:20], order(0)[20:]
    assert sorted(first) == sorted(second) == list(range(20)) and first != second
    assert order(1) != order(0) and order(0) == order(0)
    assert [index - 10 for index in first if index >= 10] != [index for index in first if index < 10]


def test_a_source_in_shards_is_read_by_shards() -> None:
    sources = [Source("a", 40, 1, [4] * 10), Source("b", 40, 1, None)]
    place: dict[str, Any] = {"sample_count": 80, "batch_size": 2, "seed": 0, "start_position": 0, "rank": 0}
    place |= {"world_size": 1, "mixture": sources}
    by_shards = make_sampler(SamplerType.SHARD_ORDER, **place)
    drawn = [index for index in take(by_shards, 80) if index < 40]
    assert sorted(drawn) == list(range(40)) and take(by_shards, 80) != take(
        make_sampler(SamplerType.GLOBAL_ORDER, **place), 80
    )
    with pytest.raises(ValueError, match="SHARD_ORDER needs a dataset in shards"):
        make_sampler(SamplerType.SHARD_ORDER, **place | {"mixture": sources[1:]})
    with pytest.raises(ValueError, match="weights of a mixture need .* GLOBAL_ORDER or SHARD_ORDER, not EPOCH"):
        make_sampler(SamplerType.EPOCH, **place)


# --- The dataset -----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders a (classes x, y) and b (class y), an archive c.tar (class z), and images without labels in d."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for level, name in enumerate(["a/x/0.png", "a/y/1.png", "a/y/2.png", "b/w/3.png", "b/y/4.png", "d/5.png"]):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (level, 0, 0)).save(path)
    write_tar(
        tmp_path / "c.tar",
        [(f"{i}.png", image_bytes(10 + i)) for i in range(5)] + [(f"{i}.txt", b"y") for i in range(5)],
    )
    return tmp_path


def write(folder: Path, *lines: str) -> str:
    (folder / "mix.yaml").write_text("\n".join(lines) + "\n")
    return f"Mix:file={folder}/mix.yaml"


A, B = "- dataset: ImageFolder:root=a", "- dataset: ImageFolder:root=b"
C, D = "- dataset: Tar:files=c.tar:label=txt", "- dataset: ImageFolder:root=d"


def test_sources_follow_each_other_and_classes_of_a_name_are_one(folder: Path) -> None:
    text = write(folder, A, "  weight: 0.75", B, "  weight: 0.15", "  name: others", C, "  weight: 0.1")
    dataset = make_dataset(dataset_str=text)
    assert [dataset.get_image(i).getpixel((0, 0))[0] for i in range(10)] == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]
    assert dataset.classes == ["w", "x", "y"] and dataset.get_targets().tolist() == [1, 2, 2, 0, 2, 2, 2, 2, 2, 2]
    assert dataset.describe(7) == "c.tar: 2.png" and dataset.names[1] == "others"
    assert [(source.num_samples, source.per_block) for source in dataset.mixture] == [(3, 15), (2, 3), (5, 2)]
    assert dataset.shares == [0.75, 0.15, 0.1] and dataset.shard_sizes is None


def test_without_weights_it_is_the_concatenation(folder: Path) -> None:
    dataset = make_dataset(dataset_str=write(folder, A, B))
    one = make_dataset(dataset_str="ImageFolder:root=a,b")
    assert dataset.mixture == [] and dataset.shares == [0.6, 0.4]
    assert [dataset[i][1] for i in range(5)] == [one[i][1] for i in range(5)] and dataset.classes == one.classes
    place: dict[str, Any] = {"sample_count": 5, "batch_size": 2, "seed": 3, "start_position": 0, "rank": 0}
    order = make_sampler(SamplerType.GLOBAL_ORDER, **place, world_size=1, mixture=dataset.mixture)
    assert take(order, 20) == take(GlobalOrderSampler(sample_count=5, batch_size=2, seed=3), 20)


def test_the_fingerprint_has_weights_and_sources(folder: Path) -> None:
    texts = [("", ""), ("  weight: 1", "  weight: 1"), ("  weight: 1", "  weight: 2")]
    prints = [make_dataset(dataset_str=write(folder, A, a, B, b)).fingerprint() for a, b in texts]
    prints += [make_dataset(dataset_str=write(folder, A, "  weight: 10", B, "  weight: 10")).fingerprint()]
    prints += [make_dataset(dataset_str=write(folder, B, "  weight: 1", A, "  weight: 1")).fingerprint()]
    assert Counter(prints)[prints[1]] == 2 and len(set(prints)) == 4


def test_a_source_without_labels_is_named(folder: Path) -> None:
    dataset = make_dataset(dataset_str=write(folder, A, D))
    assert dataset.get_targets() is None and dataset[0][1] is None
    assert "ImageFolder:root=d has no labels with class names" in dataset.notes()[0][1]


def test_the_shards_of_all_sources_are_those_of_the_whole(folder: Path) -> None:
    write_tar(folder / "e.tar", [("a.png", image_bytes(1))])
    assert make_dataset(dataset_str=write(folder, C, "- dataset: Tar:files=e.tar")).shard_sizes == [5, 1]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a: 1"], "must be a list of sources"),
        ([""], "must be a list of sources"),
        (["- a"], "source 1 in .*mix.yaml must have the keys dataset, weight, name, value_range, got 'a'"),
        ([A, "  wieght: 1"], "unknown key 'wieght' of source 1 in"),
        ([A, B, "  dataset: x"], "line 3: duplicate key 'dataset'"),
        ([A, "  weight: 0"], "weight of source 1 in .* must be a number above 0, got 0"),
        ([A, "  weight: yes"], "must be a number above 0, got True"),
        ([A, "  weight: .nan"], "must be a number above 0, got nan"),
        ([A, "  weight:"], "must be a number above 0, got None"),
        ([A, "  weight: 1", B], "ImageFolder:root=b has no weight, but others have"),
        ([A, "  weight: 1", B, "  weight: 1e-7"], "mix.yaml: ImageFolder:root=b: weight 1e-07 of 1 is too small"),
        (["- name: x"], "needs a text as dataset"),
        ([A, A], "names ImageFolder:root=a twice"),
        (["- dataset: ImageFolder:root=missing", "  name: x"], "source x: no folder missing"),
        (["- dataset: Foo:root=a"], "source Foo:root=a: unknown dataset 'Foo'"),
        (["- dataset: Mix:file=inner.yaml"], "source Mix:file=inner.yaml: a Mix cannot be a source of another one"),
    ],
)
def test_wrong_files(lines: list[str], message: str, folder: Path) -> None:
    (folder / "inner.yaml").write_text(A + "\n")
    with pytest.raises((ValueError, OSError), match=message):
        make_dataset(dataset_str=write(folder, *lines))


# --- Training --------------------------------------------------------------------------------------------------------


def test_a_dry_run_prints_sources_and_warns_of_a_small_one(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from tiny import run_train

    text = write(folder, A, "  weight: 0.9", C, "  weight: 0.1", "  name: scans")
    run_train(tmp_path / "out", f"train.dataset_path={text}", "train.num_workers=0", "optim.epochs=2000", "--dry-run")
    printed = capsys.readouterr().out
    images = int(printed.partition("images seen")[2].split()[0].replace(",", ""))
    assert f"5 images, 10 % of the samples, seen {images / 50:.1f} times" in printed.partition("source scans")[2]
    assert f"source ImageFolder:root=a of 3 images is seen {0.9 * images / 3:,.0f} times" in printed
    assert "source scans of" not in printed


def test_a_run_reads_the_shares(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny import run_train

    from dinov2.data.datasets import Mixture
    from dinov2.data.datasets.concatenation import Concatenation

    read: list[int] = []
    original = Concatenation.get_image_data

    def note(self: Mixture, index: int) -> bytes:
        read.append(index)
        return original(self, index)

    text = write(folder, A, "  weight: 0.25", C, "  weight: 0.75")
    monkeypatch.setattr(Concatenation, "get_image_data", note)
    run_train(tmp_path / "out", f"train.dataset_path={text}", "train.num_workers=0", "health.period=0")
    run = read[8:]  # after the survey of all images
    assert len(run) >= 16 and all(sum(i < 3 for i in run[s : s + 4]) == 1 for s in range(0, len(run) // 4 * 4, 4))


def test_sources_of_several_depths_have_ranges_of_their_own(tmp_path: Path) -> None:
    for name, value in (("xray", 4095), ("ct", 30000), ("photos", 200)):
        (tmp_path / name).mkdir()
        for number in range(3):
            pixels = np.full((8, 8), value * number // 2, np.uint8 if value < 256 else np.uint16)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    file = tmp_path / "mixture.yaml"
    sources = [f"- dataset: ImageFolder:root={tmp_path / name}\n  weight: 1" for name in ("xray", "ct", "photos")]
    sources[0] += "\n  value_range: [0, 4095]"
    file.write_text("\n".join(sources))
    dataset = make_dataset(dataset_str=f"Mix:file={file}")
    assert dataset.image_options.value_range == (0.0, 32767.0), "of the second source alone"
    levels = [int(np.asarray(dataset.get_image(index))[0, 0, 0]) for index in range(9)]
    assert levels == [0, 127, 255, 0, 117, 234, 0, 100, 200]
    file.write_text(f"- dataset: ImageFolder:root={tmp_path / 'ct'}\n  value_range: [5, 1]")
    with pytest.raises(ValueError, match=r"value_range of source 1 in .* must be \[low, high\], the smaller one first"):
        make_dataset(dataset_str=f"Mix:file={file}")


def test_a_folder_in_two_sources_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name / "0.png")
    (tmp_path / "link").symlink_to(tmp_path / "images")
    file = tmp_path / "mixture.yaml"
    for second in (f"{tmp_path}/images/a", f"{tmp_path}/link", f"{tmp_path}/x/../images"):
        (tmp_path / "x").mkdir(exist_ok=True)
        file.write_text(f"- dataset: ImageFolder:root={tmp_path}/images\n- dataset: ImageFolder:root={second}")
        with pytest.raises(ValueError, match="have images of one folder"):
            make_dataset(dataset_str=f"Mix:file={file}")
    file.write_text(f"- dataset: Mix:file={file}")
    with pytest.raises(ValueError, match="a Mix cannot be a source of another one; list its sources here"):
        make_dataset(dataset_str=f"Mix:file={file}")
