"""Features read from the files of an extraction: rows, names, labels, and everything that does not fit together."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_features import unit_rows, write_features

from dinov2.curate import feature_table
from dinov2.curate.feature_table import FeatureTable, check_comparable


@pytest.mark.parametrize(("file_format", "dtype"), [("safetensors", "float32"), ("npy", "float16")])
def test_rows_are_those_in_the_files_at_unit_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_format: str, dtype: str
) -> None:
    rows = unit_rows(23, 8)
    table = FeatureTable([write_features(tmp_path, (3 * rows).astype(dtype), file_format=file_format)])
    tolerance = 1e-6 if dtype == "float32" else 2e-3
    index = np.array([22, 0, 7, 6, 7])
    np.testing.assert_allclose(table.take(index), rows[index], atol=tolerance)
    np.testing.assert_allclose(np.linalg.norm(table.take(index), axis=1), 1, atol=1e-6)
    monkeypatch.setattr(feature_table, "CHUNK_BYTES", 5 * 8 * 4)
    chunks = list(table.chunks())
    assert [(start, len(part)) for start, part in chunks] == [(0, 5), (5, 5), (10, 5), (15, 5), (20, 3)]
    np.testing.assert_allclose(np.concatenate([part for _, part in chunks]), rows, atol=tolerance)


def test_several_folders_are_one_table_without_labels(tmp_path: Path) -> None:
    first, second = unit_rows(9, 4), unit_rows(3, 4, seed=1)
    write_features(tmp_path / "a", first, labels=[5] * 9, unreadable=[0, 4])
    write_features(tmp_path / "b", second, ["x", "y\udce9", "z"], unreadable=[1])
    assert FeatureTable([tmp_path / "a"]).labels is not None
    table = FeatureTable([tmp_path / "a", tmp_path / "b"])
    assert (len(table), table.width, table.labels) == (12, 4, None)
    np.testing.assert_allclose(table.take(np.arange(12)), np.concatenate([first, second]), atol=1e-6)
    assert list(table.names)[8:] == ["image 8", "x", "y\udce9", "z"], "also names that are no UTF-8"
    # Of 11 images the first and fifth were not read: row 3 is image 5.
    assert [table.locate(row) for row in (0, 2, 3, 8, 9, 10)] == [(0, 1), (0, 3), (0, 5), (0, 10), (1, 0), (1, 2)]


def test_labels_are_class_indices_or_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = unit_rows(3, 4)
    labels = FeatureTable([write_features(tmp_path / "all", rows, labels=[2, 0, 2])]).labels
    assert labels is not None and labels.tolist() == [2, 0, 2]
    assert FeatureTable([write_features(tmp_path / "several", rows, labels=[[1, 2], [0], [2]])]).labels is None
    assert not caplog.records
    assert FeatureTable([write_features(tmp_path / "some", rows, labels=[2, None, 2])]).labels is None
    assert "1 of 3 images have no label" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": [1, 2]}, "blocks 1, 2: extract those of one"),
        ({"tokens": ["patch"]}, "has patch tokens, not class"),
    ],
)
def test_features_of_another_kind_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_features(tmp_path, unit_rows(3, 4), **change)
    with pytest.raises(ValueError, match=message):
        FeatureTable([tmp_path])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preprocessing": {"crop_size": 56}}, "preprocessing .*28.* there, .*56.* here"),
        ({"layers": [1]}, "layers"),
        ({"model": {"name": "tiny", "weights": {"sha256": "1"}, "embed_dim": 4}}, "weights.sha256 0 there, 1 here"),
        ({"model": {"name": "tiny", "weights": {"sha256": "0"}, "embed_dim": 8}}, "model.embed_dim 4 there, 8 here"),
    ],
)
def test_features_of_different_models_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_features(tmp_path / "a", unit_rows(3, 4))
    write_features(tmp_path / "b", unit_rows(3, 4), **change)
    with pytest.raises(ValueError, match=message):
        FeatureTable([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(ValueError, match=message):
        check_comparable(FeatureTable([tmp_path / "a"]), FeatureTable([tmp_path / "b"]))
    moved = {"name": "other", "weights": {"source": "elsewhere", "sha256": "0"}, "embed_dim": 4}
    write_features(tmp_path / "same", unit_rows(3, 4), model=moved)
    assert len(FeatureTable([tmp_path / "a", tmp_path / "same"])) == 6, "the same weights, wherever they are"


@pytest.mark.parametrize(("value", "kind"), [(np.nan, "not finite"), (np.inf, "not finite"), (0.0, "zero")])
def test_features_without_a_direction_are_named(tmp_path: Path, value: float, kind: str) -> None:
    rows = unit_rows(9, 4)
    rows[8] = value
    table = FeatureTable([write_features(tmp_path, rows)])
    assert len(table.take(np.arange(8))) == 8
    with pytest.raises(ValueError, match=f"features of image 8 are {kind}"):
        list(table.chunks())


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no features in"):
        FeatureTable([tmp_path])
    with pytest.raises(ValueError, match="at least one"):
        FeatureTable([write_features(tmp_path / "empty", unit_rows(0, 4), [])])
    write_features(tmp_path, unit_rows(9, 4))
    file = tmp_path / "features_00001.safetensors"
    content = file.read_bytes()
    for damaged in (content[:-1], content[:20], b"", b"\xff" * 100):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="features_00001.safetensors is damaged"):
            FeatureTable([tmp_path]).take(np.arange(9))
    file.write_bytes((tmp_path / "features_00000.safetensors").read_bytes())
    with pytest.raises(ValueError, match="7 x 4 features of 2 images"):
        FeatureTable([tmp_path]).take(np.arange(9))
    names = tmp_path / "names.jsonl"
    names.write_text(names.read_text().partition("\n")[2])
    with pytest.raises(ValueError, match="8 names of 9 features"):
        FeatureTable([tmp_path])
    metadata = tmp_path / "metadata.json"
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"complete": False}))
    with pytest.raises(ValueError, match="not finished"):
        FeatureTable([tmp_path])
