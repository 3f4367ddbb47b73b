"""A flipped bit in a file of weights is an error that names the file, never another number."""

import io
import logging
import os
import pickle
import random
import traceback
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file

from dinov2.models.checksums import CHECKSUM_KEY, NO_CHECKSUM, check_safetensors, check_zip, with_checksum
from dinov2.models.weights import read_file, read_state_dict


def some_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"backbone.blocks.{index}.weight": torch.randn(8, 8, generator=generator) for index in range(4)}


def write_torch(path: Path) -> Path:
    torch.save({"teacher": some_weights()}, path)
    return path


def write_safetensors(path: Path) -> Path:
    path.write_bytes(b"".join(with_checksum(save(some_weights(), {"format": "pt", CHECKSUM_KEY: NO_CHECKSUM}))))
    return path


@pytest.mark.parametrize(("write", "name"), [(write_torch, "t.pth"), (write_safetensors, "t.safetensors")])
def test_no_flipped_bit_changes_a_number(write: object, name: str, tmp_path: Path) -> None:
    path, expected, generator = write(tmp_path / name), some_weights(), random.Random(0)  # type: ignore[operator]
    intact, num_refused = path.read_bytes(), 0
    assert all(torch.equal(read_state_dict(path)[key], value) for key, value in expected.items())
    for _ in range(300):
        damaged = bytearray(intact)
        damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            found = read_state_dict(path)
        except ValueError as error:
            assert str(path) in str(error) and "weights_only" not in str(error)
            num_refused += 1
        else:
            assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert num_refused > 200, "the others hit bytes that fill gaps, or the dates of members"


def test_the_damaged_member_is_named(tmp_path: Path) -> None:
    path = write_torch(tmp_path / "t.pth")
    content = bytearray(path.read_bytes())
    content[content.index(some_weights()["backbone.blocks.2.weight"].numpy().tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^t/data/2 in it is damaged \(Bad CRC-32"):
        check_zip(path)
    with pytest.raises(ValueError, match=f"{path} is no checkpoint .* or damaged: t/data/2 in it is damaged"):
        read_file(path)


def test_an_open_file_of_arrays_is_checked_too() -> None:
    file = io.BytesIO()
    np.savez_compressed(file, features=np.arange(1000.0))
    check_zip(file)
    with zipfile.ZipFile(file) as archive:
        start = archive.getinfo("features.npy").header_offset
    content = bytearray(file.getvalue())
    content[start + 200] ^= 1
    with pytest.raises(ValueError, match=r"features.npy in it is damaged"):
        check_zip(io.BytesIO(content))


def test_files_without_checksums_are_read_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    old = tmp_path / "old.pth"
    torch.save(some_weights(), old, _use_new_zipfile_serialization=False)
    foreign = tmp_path / "foreign.safetensors"
    save_file(some_weights(), foreign)
    for path in (old, foreign):
        assert read_state_dict(path).keys() == some_weights().keys()
        assert [message for message in caplog.messages if str(path) in message and "no checksum" in message]


def test_a_checksum_hinders_no_other_reader(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "t.safetensors")
    check_safetensors(path)
    with safe_open(path, framework="pt") as file:
        assert file.metadata().keys() == {"format", CHECKSUM_KEY} and set(file.keys()) == some_weights().keys()
        assert all(torch.equal(file.get_tensor(name), value) for name, value in some_weights().items())


class _Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("true",)


def write_script(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


@pytest.mark.parametrize(
    "write",
    [
        write_script,
        lambda path: torch.save({"a": _Code()}, path),
        lambda path: torch.save({"a": torch.nn.Linear(2, 2)}, path),
        lambda path: torch.save({"a": Path("a")}, path, _use_new_zipfile_serialization=False),
        lambda path: path.write_bytes(pickle.dumps(_Code())),
    ],
)
def test_no_error_advises_to_run_code_in_a_file(write: Callable[[Path], object], tmp_path: Path) -> None:
    write(tmp_path / "a.pth")
    with pytest.raises(ValueError, match="a.pth is no checkpoint of plain tensors.*: ") as caught:
        read_file(tmp_path / "a.pth")
    text = "".join(traceback.format_exception(caught.value))
    assert "weights_only=False" not in text and "`weights_only`" not in text and "add_safe_globals" not in text
    assert not str(caught.value).endswith(": ")
