"""A results file replaces the one before, and names the bytes of the weights."""

import argparse
import hashlib
import json
import time
from pathlib import Path

import pytest
import torch
from eval_images import ImageSet

from dinov2.eval.feature_cache import FeatureCache
from dinov2.eval.results import as_table, run_facts, set_facts, weights_fingerprint, write_results
from dinov2.models.download import cache_path


def test_results_replace_those_of_an_earlier_run(tmp_path: Path) -> None:
    args = argparse.Namespace(pretrained_weights=None, batch_size=4)
    for top_1 in (1.0, 2.0):
        write_results(tmp_path / "r.json", evaluation="knn", metrics={"top-1": top_1}, args=args)
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["metrics"] == {"top-1": 2.0}
    assert record["settings"]["batch_size"] == 4 and record["weights"] is None
    assert {"evaluation", "unit", "command", "date", "versions"} <= record.keys()


def test_the_fingerprint_is_the_hash_of_the_file_also_of_a_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    url, path = "https://example.org/a/weights.pth", tmp_path / "weights.pth"
    for file in (path, cache_path(url)):
        file.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    for source in (str(path), path.as_uri(), url):
        assert weights_fingerprint(source) == {"path": source, "sha256": digest}
    assert weights_fingerprint(None) is None


def test_the_fingerprint_of_a_folder_is_that_of_the_weights_in_it(tmp_path: Path) -> None:
    (tmp_path / "model-1.safetensors").write_bytes(b"one")
    (tmp_path / "model-2.safetensors").write_bytes(b"two")
    parts = {"a": "model-2.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    before = weights_fingerprint(str(tmp_path))
    assert before is not None and before["sha256"] == hashlib.sha256(b"onetwo").hexdigest()
    (tmp_path / "log.txt").write_text("an evaluation may write into this folder")
    assert weights_fingerprint(str(tmp_path)) == before


class SomeUnlabeled(ImageSet):
    """Three in four have labels: two classes in all."""

    def get_target(self, index: int) -> list[int]:  # type: ignore[override]
        return [[], [4], [4, 7], [7]][index % 4]


def test_sets_files_and_times_are_recorded(tmp_path: Path) -> None:
    assert set_facts(ImageSet(10)) == {"images": 10, "classes": 3}
    assert set_facts(SomeUnlabeled(8)) == {"images": 6, "classes": 2}
    cache, images = FeatureCache(tmp_path), ImageSet(4)
    cache.get("a", images, lambda: (time.sleep(0.05), (torch.zeros(4, 2), torch.tensor([0, 1, 2, 0])))[1])
    facts = run_facts({"A": images}, cache, time.monotonic() - 1)
    (file,) = tmp_path.iterdir()
    assert facts["sets"] == {"A": {"images": 4, "classes": 3}}
    assert facts["feature_files"] == {str(file): "written"}
    assert facts["seconds"]["features"] >= 0.05 and 0.9 < sum(facts["seconds"].values()) < 5
    for again, expected in ((cache, "written"), (FeatureCache(tmp_path), "read")):
        again.get("a", images, lambda: pytest.fail("they are on disk"))
        assert again.files == {str(file): expected}


def test_tables_are_aligned() -> None:
    table = as_table(
        "k-NN", ["bank", "k", "top-1", "top-5"], [["full", 10, 97.123, None], ["b", 200, [50.0, 60.0], 9.0]]
    )
    assert table.splitlines() == [
        "k-NN",
        "  bank    k  top-1  top-5",
        "  full   10  97.12      -",
        "  b     200  55.00   9.00",
    ]
