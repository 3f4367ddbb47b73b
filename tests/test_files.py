"""A file is whole or not there."""

from pathlib import Path

import pytest

from dinov2.files import replacing


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("old")
    with pytest.raises(OSError, match="disk full"), replacing(path) as file:
        file.write(b"half of it")
        raise OSError("disk full")
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"] and path.read_text() == "old"
    with replacing(path) as file:
        file.write(b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"] and path.read_text() == "new"
