"""A results file replaces the one before, and names the bytes of the weights."""

import argparse
import hashlib
import json
from pathlib import Path

import pytest
import torch

from dinov2.eval.results import weights_fingerprint, write_results


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
    path = tmp_path / "checkpoints" / "vits14.pth"
    path.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    for source in (str(path), f"file://{path}", "https://example.org/dinov2/vits14.pth"):
        assert weights_fingerprint(source) == {"path": source, "sha256": digest}
    assert weights_fingerprint(None) is None
