"""The script behind the tables in docs/curation.md: what it plants, counts and prints."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinov2.curate import __main__ as curate
from dinov2.curate.feature_table import FeatureTable
from dinov2.data import make_dataset
from scripts import curation_evidence as evidence


def test_half_of_the_images_have_a_changed_copy(tmp_path: Path) -> None:
    evidence.write_planted(tmp_path / "images", 24)
    stems = sorted(path.stem for path in (tmp_path / "images").iterdir())
    assert len(stems) == 36 and {stem for stem in stems if "_" in stem} == {f"{i:05d}_{i % 6}" for i in range(12)}

    def pixels(name: str) -> np.ndarray:
        with Image.open(tmp_path / "images" / f"{name}.png") as image:
            return np.asarray(image, np.int64)[..., 0]

    assert (pixels("00000_0") == pixels("00000")).all(), "a copy"
    assert pixels("00002_2").shape == (56, 56)
    assert 0 < np.abs(pixels("00003_3") - pixels("00003")).max() < 120, "JPEG"
    assert (pixels("00005_5")[:, ::-1] == pixels("00005")).all() and (pixels("00005_5") != pixels("00005")).any()


def test_recall_and_precision_are_counted_by_pairs() -> None:
    names = ["00000.png", "00000_0.png", "00006.png", "00006_0.png", *(f"0000{i}_{i}.png" for i in range(1, 6))]
    left, right = np.array([0, 1, 0, 2, 2, 4]), np.array([1, 0, 2, 0, 3, 5])
    found = evidence.measure_planted(names, left, right)
    assert (found["copy"], found["mirrored"]) == (100, 0)
    assert found["recall"] == pytest.approx(100 * 2 / 7, abs=0.05), "two of seven copies"
    assert found["precision"] == 50, "of four pairs, each counted once"


def test_classes_of_the_long_tail_fall_with_their_rank(tmp_path: Path) -> None:
    evidence.write_long_tail(tmp_path / "images", seed=1)
    dataset = make_dataset(dataset_str=f"ImageList:file={tmp_path / 'images' / 'images.tsv'}")
    counts = sorted(np.bincount(dataset.get_targets()).tolist(), reverse=True)
    assert counts == [1000 // rank for rank in range(1, 11)]
    raw = evidence.write_raw_sample(tmp_path / "images" / "images.tsv", 100, seed=1)
    assert (
        len(set(raw.read_text().splitlines())) == 100 and len(make_dataset(dataset_str=f"ImageList:file={raw}")) == 100
    )


def test_synthetic_features_have_near_duplicates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "SHARD_SIZE", 300)
    evidence.write_synthetic(tmp_path / "features", 1000)
    table = FeatureTable([tmp_path / "features"])
    rows = table.take(np.arange(1000))
    cosines = np.einsum("nd,nd->n", rows[:10], rows[990:])
    assert ((cosines > 0.98) & (cosines < 0.999)).all() and (rows[:10] @ rows[10:990].T).max() < 0.9
    assert table.names[7] == "synthetic/00000007.jpg"


def test_what_commands_find_is_compared_with_what_was_planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def in_this_process(command: str, output: Path, *words: str | Path) -> tuple[dict[str, Any], float, float]:
        curate.main([command, "--output", str(output), *map(str, words)])
        return json.loads((output / "dropped.json").read_text()), 0.0, 0.0

    monkeypatch.setattr(evidence, "curate", in_this_process)
    results, table = evidence.large(tmp_path, 1200)
    assert results["duplicates"]["recall"] == 100 and results["duplicates"]["precision"] == 100
    assert set(results) == {"duplicates", "balance", "retrieve"} and table.count("\n") == 5
    assert len(json.loads((tmp_path / "balance" / "dropped.json").read_text())["dropped"]) == 1200 - 120
