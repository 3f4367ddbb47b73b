"""The commands on images and real features: what is found, kept, listed for training, and shown."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from synthetic_features import near, unit_rows, write_features

import dinov2
from dinov2.curate import __main__ as curate
from dinov2.curate.groups import Groups, choose_kept
from dinov2.curate.outputs import class_balance
from dinov2.data import make_dataset
from dinov2.data.datasets.fashion_mnist import FashionMNIST


def run(command: str, features: Path, output: Path, *words: str | Path) -> dict[str, Any]:
    """Run a command; returns its `dropped.json`."""
    words = ("--features", features, "--output", output, *words)
    assert curate.main([command, *map(str, words)]) == 0
    found: dict[str, Any] = json.loads((output / "dropped.json").read_text(encoding="utf-8"))
    assert found["facts"]["images"] == found["facts"]["kept"] + len(found["dropped"])
    return found


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images in folders of their classes; 10 of them once more in half the size, and 5 as JPEG of quality 50."""
    folder, dataset = tmp_path_factory.mktemp("photos"), FashionMNIST(split=FashionMNIST.Split.TRAIN)
    for index in range(40):
        image = dataset.get_image(index).resize((56, 56), Image.Resampling.BICUBIC)
        path = folder / "images" / f"class {dataset.get_target(index)}" / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        if index < 10:
            image.resize((28, 28), Image.Resampling.BICUBIC).save(path.with_name(f"{index:02d}_small.png"))
        if 10 <= index < 15:
            image.save(path.with_name(f"{index:02d}_again.jpg"), quality=50)
    features = folder / "features"
    dinov2.extract_features(folder / "images", model="dinov2_fashion", output=features)
    (folder / "test").mkdir()
    for index in (0, 10, 20):
        image = dataset.get_image(index).resize((60, 60), Image.Resampling.BICUBIC)
        image.save(folder / "test" / f"{index:02d}.png")
    dinov2.extract_features(folder / "test", model="dinov2_fashion", output=folder / "test_features")
    return folder


def test_planted_duplicates_are_dropped_and_training_reads_the_list(photos: Path, tmp_path: Path) -> None:
    found = run("duplicates", photos / "features", tmp_path / "out", "--threshold", "0.98")
    expected = {f"{index:02d}_small" for index in range(10)} | {f"{index:02d}_again" for index in range(10, 15)}
    dropped = {Path(each["name"]).stem: each for each in found["dropped"]}
    assert set(dropped) == expected, "the small ones; of two of one size the JPEG, which is smaller"
    for stem, each in dropped.items():
        assert Path(each["kept"]).stem == stem[:2] and each["similarity"] > 0.98 and each["reason"] == "duplicate"
    assert found["facts"]["groups"] == 15 and found["facts"]["search"] == "exact"
    dataset = make_dataset(dataset_str=f"ImageList:file={tmp_path / 'out' / 'images.txt'}")
    assert len(dataset) == 40
    names = sorted((photos / "images").iterdir())
    for index in range(40):
        path = Path(dataset.describe(index))
        assert path.is_absolute() and path.is_file() and path.stem not in expected
        assert dataset.get_target(index) == names.index(path.parent)
    assert (tmp_path / "out" / "index.html").stat().st_size < 1_000_000
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["dropped.json", "images.txt", "index.html"]


def test_copies_in_several_classes_and_one_set_given_twice_are_named(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = run("duplicates", photos / "features", tmp_path / "a", "--threshold", "0.98")
    assert found["facts"]["groups of several classes"] == 0 and "several classes" not in caplog.text
    names = ["a/0.png", "b/0.png", "c/1.png"]
    rows = unit_rows(2, 8)
    features = write_features(tmp_path / "features", rows[[0, 0, 1]], names, [0, 1, 2])
    found = run("duplicates", features, tmp_path / "b", "--threshold", "0.98")
    assert found["facts"]["groups of several classes"] == 1
    assert (
        "1 of 1 groups have images of several classes, such as a/0.png (class 0) and b/0.png (class 1)" in caplog.text
    )
    with pytest.raises(ValueError, match="--against and --features both name .*: all of its images would be dropped"):
        run("decontaminate", features, tmp_path / "c", "--against", features, "--threshold", "0.98")


def test_the_first_image_is_kept_if_that_is_wanted(photos: Path, tmp_path: Path) -> None:
    found = run("duplicates", photos / "features", tmp_path, "--threshold", "0.98", "--keep", "first")
    for each in found["dropped"]:
        assert each["kept"] < each["name"], "in the order of the paths"


def test_the_page_shows_groups_with_their_images(photos: Path, tmp_path: Path) -> None:
    run("duplicates", photos / "features", tmp_path, "--threshold", "0.98")
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") == 2 * 15 * 2, "pairs, in two sections"
    assert "Groups with the least similar images" in page and "http" not in page.replace("http-equiv", "")
    assert re.search(r"<th scope=\"row\">kept</th><td>40</td>", page)


def test_the_page_is_written_without_images_and_escapes_names(tmp_path: Path) -> None:
    rows = unit_rows(4, 8)
    names = ["<b>one</b>", "\udce9", "three", "four", *(f"copy {number}" for number in range(4))]
    features = write_features(tmp_path / "features", np.concatenate([rows, near(rows, 0.99)]), names)
    found = run("duplicates", features, tmp_path / "out", "--threshold", "0.95")
    assert found["facts"]["groups"] == 4
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert page.count("no image") == 16 and "&lt;b&gt;one" in page and "<b>one" not in page


def test_test_images_are_dropped_with_all_that_are_connected(photos: Path, tmp_path: Path) -> None:
    tests = photos / "test_features"
    found = run("decontaminate", photos / "features", tmp_path, "--against", tests, "--threshold", "0.98")
    dropped = {Path(each["name"]).stem: each for each in found["dropped"]}
    assert set(dropped) == {"00", "00_small", "10", "10_again", "20"}
    assert all(Path(each["test"]).stem == stem[:2] for stem, each in dropped.items())
    assert len(make_dataset(dataset_str=f"ImageList:file={tmp_path / 'images.txt'}")) == 50


def test_chains_are_dropped_and_the_reason_is_recorded(tmp_path: Path) -> None:
    """test - a - b - c, each at 0.97 to the next; d is apart."""
    test = unit_rows(1, 64)
    chain = [near(test, 0.97)]
    for seed in (2, 3):
        chain.append(near(chain[-1], 0.97, seed=seed))
    features = write_features(tmp_path / "a", np.concatenate([*chain, unit_rows(1, 64, seed=9)]), list("abcd"))
    tests = write_features(tmp_path / "b", test, ["test"])
    found = run("decontaminate", features, tmp_path / "out", "--against", tests, "--threshold", "0.95")
    assert [(each["name"], each["reason"].partition(" ")[0], each["test"]) for each in found["dropped"]] == [
        ("a", "near", "test"),
        ("b", "connected", "test"),
        ("c", "connected", "test"),
    ]
    cosines = [float(row @ test[0]) for row in np.concatenate(chain)]
    assert [each["similarity"] for each in found["dropped"]] == pytest.approx(cosines, abs=1e-4)
    assert (tmp_path / "out" / "indices.txt").read_text() == "3\td\n"
    apart = run("decontaminate", features, tmp_path / "none", "--against", tests, "--threshold", "0.99")
    assert apart["dropped"] == [] and apart["facts"]["near a test image"] == 0


def test_balance_evens_classes_out(tmp_path: Path) -> None:
    labels = np.repeat(np.arange(4), [400, 100, 50, 50])
    rows = np.eye(4, 16)[labels] + 0.05 * np.random.default_rng(0).standard_normal((600, 16))
    features = write_features(tmp_path / "features", rows.astype(np.float32), labels=labels.tolist(), shard_size=100)
    found = run("balance", features, tmp_path / "out", "--clusters", "20,4", "--size", "160")
    before, after = found["facts"]["classes, before"], found["facts"]["classes, after"]
    assert (before["largest"], before["smallest"]) == (400, 50)
    assert (after["largest"], after["smallest"], after["entropy in bits"]) == (40, 40, 2.0)
    kept = [int(line.split("\t")[0]) for line in (tmp_path / "out" / "indices.txt").read_text().splitlines()]
    assert np.bincount(labels[kept]).tolist() == [40, 40, 40, 40]
    assert {each["name"] for each in found["dropped"]}.isdisjoint(f"image {row}" for row in kept)


def test_retrieval_takes_each_image_once(photos: Path, tmp_path: Path) -> None:
    queries = photos / "test_features"
    found = run("retrieve", photos / "features", tmp_path, "--queries", queries, "--k", "2")
    lines = [json.loads(line) for line in (tmp_path / "neighbors.jsonl").read_text().splitlines()]
    stems = {Path(line["query"]).stem: [Path(name).stem for name, _ in line["neighbors"]] for line in lines}
    assert set(stems) == {"00", "10", "20"} and all(len(each) == 2 for each in stems.values())
    assert {*stems["00"], *stems["10"]} == {"00", "00_small", "10", "10_again"} and stems["20"][0] == "20"
    assert found["facts"]["kept"] == len({name for each in stems.values() for name in each})
    everything = run("retrieve", photos / "features", tmp_path, "--queries", queries, "--k", "99", "--overwrite")
    assert everything["facts"]["kept"] == 55 and everything["facts"]["neighbors"] == 3 * 55


def test_commands_select_the_same_by_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Near copies of test images, some with copies of their own, among many other rows."""
    tests = unit_rows(300, 32)
    copies = near(tests[:60], 0.97)
    rows = np.concatenate([unit_rows(1500, 32, seed=4), copies, near(copies[:20], 0.97, seed=5)])
    features = write_features(tmp_path / "pool", rows, shard_size=500)
    against = write_features(tmp_path / "tests", tests, [f"test {row}" for row in range(300)], shard_size=500)
    flags = {
        "decontaminate": ("--against", against, "--threshold", "0.95"),
        "retrieve": ("--queries", against, "--k", "1"),
    }
    for command, words in flags.items():
        exact = run(command, features, tmp_path / f"{command}_exact", *words)
        with monkeypatch.context() as patch:
            patch.setattr("dinov2.curate.search.EXACT_PAIRS", 0)
            found = run(command, features, tmp_path / f"{command}_cells", *words, "--probes", "99")
        assert found["facts"]["search"].endswith("cells") and exact["facts"]["search"] == "exact"
        names, expected = ({each["name"] for each in one["dropped"]} for one in (found, exact))
        if command == "decontaminate":
            assert names == expected == {f"image {row}" for row in range(1500, 1580)}
        else:
            assert len(names ^ expected) <= 6, "equally near ones, but for rounding"
            assert found["facts"]["neighbors"] == exact["facts"]["neighbors"] == 300


def test_one_image_is_enough(tmp_path: Path) -> None:
    features = write_features(tmp_path / "features", unit_rows(1, 8))
    assert run("duplicates", features, tmp_path / "a", "--threshold", "0.5")["facts"]["kept"] == 1
    same = ("--against", write_features(tmp_path / "test", unit_rows(1, 8)), "--threshold", "0.5")
    assert run("decontaminate", features, tmp_path / "b", *same)["facts"]["kept"] == 0
    assert run("balance", features, tmp_path / "c", "--clusters", "1", "--size", "1")["facts"]["kept"] == 1
    assert run("retrieve", features, tmp_path / "d", "--queries", features)["facts"]["kept"] == 1


def test_relative_names_begin_at_the_root(photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = [str(path.relative_to(photos)) for path in sorted((photos / "images").rglob("*.png"))[:5]]
    features = write_features(tmp_path / "features", unit_rows(5, 8), names)
    run("duplicates", features, tmp_path / "out", "--threshold", "0.99", "--root", photos)
    expected = [str(photos / name) for name in names]
    assert (tmp_path / "out" / "images.txt").read_text().splitlines() == expected, "without labels"
    caplog.clear()
    run("duplicates", features, tmp_path / "elsewhere", "--threshold", "0.99", "--root", tmp_path)
    assert "is no file, so that ImageList could not read it" in caplog.text
    assert not (tmp_path / "elsewhere" / "images.txt").exists()
    mixed = write_features(tmp_path / "mixed", unit_rows(5, 8), [*names[:4], "missing.png"])
    with pytest.raises(FileNotFoundError, match="1 of 5 images are missing, such as .*missing.png"):
        run("duplicates", mixed, tmp_path / "mixed_out", "--threshold", "0.99", "--root", photos)


def test_positions_are_those_of_the_dataset_and_its_images_are_shown(tmp_path: Path) -> None:
    """Of a dataset of embedded images, the second of which is regarded as unreadable."""
    dataset = FashionMNIST(split=FashionMNIST.Split.VAL)
    names = [dataset.describe(index) for index in range(len(dataset)) if index != 1]
    rows = unit_rows(1999, 16)
    rows[1] = rows[0]
    features = write_features(
        tmp_path / "features", rows, names, shard_size=500, unreadable=[1], images=["FashionMNIST:split=VAL"]
    )
    run("duplicates", features, tmp_path / "out", "--threshold", "0.999")
    lines = (tmp_path / "out" / "indices.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines[:3]] == ["0", "3", "4"]
    assert all(dataset.describe(int(number)) == name for number, name in (line.split("\t") for line in lines))
    assert (tmp_path / "out" / "index.html").read_text().count("data:image/jpeg") == 4


def test_other_files_are_never_overwritten(tmp_path: Path) -> None:
    features = write_features(tmp_path / "features", unit_rows(9, 8))
    words = ("--threshold", "0.99")
    run("duplicates", features, tmp_path / "out", *words)
    with pytest.raises(ValueError, match="is not empty, it has dropped.json: give another folder, or --overwrite"):
        run("duplicates", features, tmp_path / "out", *words)
    (tmp_path / "out" / "mine.txt").write_text("mine")
    (tmp_path / "out" / "neighbors.jsonl").write_text("of a former command")
    run("duplicates", features, tmp_path / "out", *words, "--overwrite")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
    assert not (tmp_path / "out" / "neighbors.jsonl").exists()
    with pytest.raises(NotADirectoryError, match="is a file: give a folder"):
        run("duplicates", features, tmp_path / "out" / "mine.txt", *words)


def test_wrong_numbers_are_named(tmp_path: Path) -> None:
    features = write_features(tmp_path / "features", unit_rows(9, 8))
    other = write_features(tmp_path / "other", unit_rows(9, 4))
    with pytest.raises(ValueError, match="--size 10: there are only 9 images"):
        run("balance", features, tmp_path / "out", "--clusters", "3", "--size", "10")
    with pytest.raises(ValueError, match="--clusters 10,2: there are only 9 images"):
        run("balance", features, tmp_path / "out", "--clusters", "10,2", "--size", "5")
    with pytest.raises(ValueError, match="embed_dim 8 there, 4 here"):
        run("retrieve", features, tmp_path / "out", "--queries", other)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["duplicates", "--threshold", "1.5"], "expected a cosine between -1 and 1, got '1.5'"),
        (["duplicates", "--threshold", "nan"], "expected a cosine"),
        (["duplicates"], "required: --threshold"),
        (["balance", "--size", "5", "--clusters", "50,1000"], "expected numbers that descend"),
        (["balance", "--size", "5", "--clusters", "5", "--resampling-steps", "-1"], "expected"),
        (["retrieve", "--queries", "b", "--probe", "3"], "did you mean --probes?"),
    ],
)
def test_wrong_flags_are_named(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        curate.main([*words, "--features", "a", "--output", "b"])
    assert message in capsys.readouterr().err


def test_a_missing_faiss_ends_the_command_before_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    features = write_features(tmp_path / "features", unit_rows(9, 8))
    with pytest.raises(ValueError, match="pip install"):
        run("duplicates", features, tmp_path / "out", "--threshold", "0.9")
    assert not (tmp_path / "out").exists()


def test_a_low_threshold_is_suspected(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    features = write_features(tmp_path / "features", np.abs(unit_rows(50, 8)))
    run("duplicates", features, tmp_path / "out", "--threshold", "0.3")
    assert "49 of 50 images are dropped: --threshold 0.3 may be too low" in caplog.text
    assert re.search(r"cosines of 0\.\d+ \(1%\)", caplog.text)


def test_names_that_break_a_list_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a\tb.png"
    Image.new("RGB", (8, 8)).save(path)
    features = write_features(tmp_path / "features", unit_rows(1, 8), [str(path)])
    with pytest.raises(ValueError, match="rename the file"):
        run("duplicates", features, tmp_path / "out", "--threshold", "0.9")
    assert not (tmp_path / "out" / "images.txt").exists()


@pytest.mark.parametrize("batch", [1, 1 << 20])
def test_groups_are_connected_components(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    monkeypatch.setattr("dinov2.curate.groups.BATCH", batch)
    groups = Groups(8, [(np.array([6, 2]), np.array([1, 3])), (np.array([], int), np.array([], int))])
    assert [group.tolist() for group in groups.of_several()] == [[1, 6], [2, 3]]
    groups.add(np.array([3, 5]), np.array([6, 7]))
    assert [group.tolist() for group in groups.of_several()] == [[1, 2, 3, 6], [5, 7]]
    assert list(Groups(3).of_several()) == []


def test_what_is_kept_of_a_group() -> None:
    sizes = {3: (100, 5), 4: (400, 5), 5: (400, 9), 6: (400, 9), 7: (0, 0)}
    group = np.array(list(sizes))
    assert choose_kept(group, "largest", sizes.__getitem__) == 5
    assert choose_kept(group, "first", sizes.__getitem__) == 3
    assert choose_kept(group, "largest", lambda _: (0, 0)) == 3


def test_class_balance_is_measured() -> None:
    assert class_balance(np.array([0, 0, 5, 5])) == {
        **{"classes": 2, "largest": 2, "smallest": 2, "entropy in bits": 1.0}
    }
    assert class_balance(np.array([1, 1, 1, 2]))["entropy in bits"] == pytest.approx(0.811)
    assert class_balance(np.array([], int))["classes"] == 0
