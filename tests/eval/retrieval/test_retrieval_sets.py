"""Benchmarks are read as published, queries are cropped, and a pickle cannot run code."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from retrieval_images import write_groups, write_revisited

from dinov2.data.images import BadImageError
from dinov2.data.retrieval import make_retrieval_benchmark
from dinov2.data.retrieval.revisited import read_plain_pickle


@pytest.mark.parametrize("form", ["pkl", "json"])
@pytest.mark.parametrize(("name", "dataset"), [("roxford5k", "RevisitedOxford"), ("rparis6k", "RevisitedParis")])
def test_the_published_layout_is_read(tmp_path: Path, form: str, name: str, dataset: str) -> None:
    content = write_revisited(tmp_path, name, form)
    benchmark = make_retrieval_benchmark(f"{dataset}:root={tmp_path}", transform=np.asarray)
    assert len(benchmark.queries) == 3 and len(benchmark.database) == 10
    assert [list(truth.hard) for truth in benchmark.ground_truth] == [entry["hard"] for entry in content["gnd"]]
    assert all(type(index) is int for truth in benchmark.ground_truth for index in truth.easy)
    assert benchmark.database.describe(9) == str(tmp_path / name / "jpg" / "tower_4.jpg")
    image, target = benchmark.queries[0]
    whole = np.asarray(Image.open(tmp_path / name / "jpg" / "church_q.jpg"))
    assert target is None and np.array_equal(image, whole[2:14, 4:20]), "the box 4.2, 2, 19.8, 14"
    assert benchmark.database[0][0].shape == (16, 24, 3)
    assert benchmark.queries.describe(0).endswith("church_q.jpg [4.2, 2, 19.8, 14]")
    assert next(benchmark.queries.image_files()).endswith("church_q.jpg")


def test_boxes_are_limited_to_the_image_and_must_touch_it(tmp_path: Path) -> None:
    gnd = [{"bbx": box, "easy": [0], "hard": [], "junk": []} for box in ([-3, -1, 99, 8], [30, 0, 40, 9], [0, 0, 1, 1])]
    write_revisited(tmp_path, form="json", gnd=gnd)
    queries = make_retrieval_benchmark(f"RevisitedOxford:root={tmp_path}").queries
    assert queries[0][0].size == (24, 8) and queries[2][0].size == (1, 1)
    with pytest.raises(BadImageError, match=r"church|tower.*the box has no pixel of the image of 24 x 16 pixels"):
        queries[1]


class Attack:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/never",)


@pytest.mark.parametrize("content", [Attack(), {"gnd": [Attack()]}, {"imlist": [print]}])
def test_a_pickle_that_refers_to_code_is_refused(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "bad.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"bad.pkl is damaged or not plain data .*, which data does not need"):
        read_plain_pickle(path)


def test_plain_pickles_of_all_protocols_are_read(tmp_path: Path) -> None:
    content = {
        "a": [1, 2.5, "text"],
        "array": np.arange(3),
        "scalar": np.float64(2.0),
        "objects": np.array(["x", None]),
    }
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path = tmp_path / f"{protocol}.pkl"
        path.write_bytes(pickle.dumps(content, protocol))
        found = read_plain_pickle(path)
        assert found["array"].tolist() == [0, 1, 2] and found["scalar"] == 2.0 and found["a"] == content["a"]
    (tmp_path / "cut.pkl").write_bytes((tmp_path / "2.pkl").read_bytes()[:40])
    with pytest.raises(ValueError, match="cut.pkl is damaged"):
        read_plain_pickle(tmp_path / "cut.pkl")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qimlist": ["church_q"]}, "10 images, 1 queries and the ground truth of 3"),
        ({"gnd": [{"bbx": [0, 0, 1, 1], "easy": [0], "hard": [0], "junk": []}] * 3}, "listed twice for one query"),
        ({"gnd": [{"bbx": [0, 0, 1, 1], "easy": [10], "hard": [], "junk": []}] * 3}, "index 10 or 10 of 10 images"),
        ({"gnd": [{"bbx": [0, 0, 1], "easy": [0], "hard": [], "junk": []}] * 3}, "does not have the structure"),
        ({"gnd": [{"easy": [0], "hard": [], "junk": []}] * 3}, "KeyError: 'bbx'"),
    ],
)
def test_a_ground_truth_that_does_not_fit_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_revisited(tmp_path, form="json", **changes)
    with pytest.raises(ValueError, match=message):
        make_retrieval_benchmark(f"RevisitedOxford:root={tmp_path}")


def test_missing_files_and_unknown_names_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no gnd_roxford5k.pkl or gnd_roxford5k.json in .*roxford5k"):
        make_retrieval_benchmark(f"RevisitedOxford:root={tmp_path}")
    write_revisited(tmp_path)
    (tmp_path / "roxford5k" / "jpg" / "tower_q.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"no image .*tower_q.jpg, which gnd_roxford5k.pkl lists"):
        make_retrieval_benchmark(f"RevisitedOxford:root={tmp_path}")
    with pytest.raises(ValueError, match=r"unknown dataset 'RevisitedOxfort' \(did you mean RevisitedOxford\?\)"):
        make_retrieval_benchmark("RevisitedOxfort:root=x")
    with pytest.raises(ValueError, match=r"missing root in 'RevisitedParis'; write RevisitedParis:root="):
        make_retrieval_benchmark("RevisitedParis")


def test_images_of_a_group_are_the_relevant_ones_and_the_query_is_junk(tmp_path: Path) -> None:
    benchmark = make_retrieval_benchmark(f"RetrievalList:file={write_groups(tmp_path)}")
    assert len(benchmark.queries) == len(benchmark.database) == 13 and benchmark.settings == ("all",)
    assert benchmark.ground_truth[5] == ([4, 6, 7], (), [5]) and benchmark.ground_truth[12] == ([], (), [12])


def test_roles_separate_queries_and_database(tmp_path: Path) -> None:
    benchmark = make_retrieval_benchmark(f"RetrievalList:file={write_groups(tmp_path, roles=True)}")
    assert len(benchmark.queries) == 4 and len(benchmark.database) == 9
    assert benchmark.ground_truth[1] == ([3, 4, 5], (), [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.png,x\n", "must name the columns path and group, got"),
        ("path,group\n", "lists no image"),
        ("path,group\nalone.png,\n", "line 2 of .* has an empty cell"),
        ("path,group,role\nalone.png,x,train\n", "a role other than"),
        ("path,group\nalone.png\n", "line 2 of .* has 1 columns, the first has 2"),
        ("path,group,role\nalone.png,x,query\n", "has 1 queries and 0 images of the database"),
    ],
)
def test_malformed_lists_are_named(tmp_path: Path, text: str, message: str) -> None:
    file = write_groups(tmp_path)
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        make_retrieval_benchmark(f"RetrievalList:file={file}")


def test_a_missing_first_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path,group\nno.png,a\n")
    with pytest.raises(FileNotFoundError, match=r"no image .*no.png, the first in .*list.csv"):
        make_retrieval_benchmark(f"RetrievalList:file={tmp_path / 'list.csv'}")
