"""A checkpoint folder is read to the last bit, or refused with the name of the file; it never runs code."""

import enum
import io
import json
import logging
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoint_files import Unsafe, assert_equal, write_checkpoint
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from dinov2.train.checkpoint_files import index
from dinov2.train.checkpoint_files.folder import (
    complete_checkpoints,
    find_checkpoint,
    latest_checkpoint,
    write_checksums,
)
from dinov2.train.checkpoint_files.index import read_metadata
from dinov2.train.checkpoint_files.state import read_state
from dinov2.train.checkpoint_files.tensors import SafeReader, read_shapes, read_tensors, stored_names


def some_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "model.teacher.weight": torch.randn(5, 3, generator=generator),
        "model.teacher.half": torch.randn(7, generator=generator).bfloat16(),
        "model.student.transposed": torch.randn(4, 6, generator=generator).half().t(),
        "model.student.part": torch.arange(10)[3:5],
        "model.student.none": torch.zeros(0, 3),
        "model.flags": torch.tensor([True, False]),
        "optimizer.student.weight.step": torch.tensor(3.0),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model_0000007", some_tensors(), images_seen=8)


# --- What is read ----------------------------------------------------------------------------------------------------


def test_tensors_are_read_to_the_last_bit(folder: Path) -> None:
    assert_equal(read_tensors(folder), some_tensors())
    teacher = {name: value for name, value in some_tensors().items() if name.startswith("model.teacher.")}
    assert_equal(read_tensors(folder, "model.teacher."), teacher)


def test_names_and_shapes_need_no_tensors(folder: Path) -> None:
    assert set(stored_names(folder)) == set(some_tensors())
    shapes = read_shapes(folder)
    assert all(shapes[name].shape == value.shape for name, value in some_tensors().items())
    assert all(shapes[name].dtype == value.dtype and shapes[name].is_meta for name, value in some_tensors().items())


def test_the_index_is_the_one_that_torch_reads(folder: Path) -> None:
    ours, theirs = read_metadata(folder), dcp.FileSystemReader(folder).read_metadata()
    assert ours.storage_data == theirs.storage_data and ours.planner_data == theirs.planner_data
    for name, stored in theirs.state_dict_metadata.items():
        found = ours.state_dict_metadata[name]
        assert (found.size, found.chunks, found.properties.dtype) == (
            stored.size,
            stored.chunks,
            stored.properties.dtype,
        )


class _EarlierPython(pickle.Pickler):
    """Names members of enumerations as Python before 3.11.4 does."""

    def reducer_override(self, value: Any) -> Any:
        return (getattr, (type(value), value.name)) if isinstance(value, enum.Enum) else NotImplemented


def test_an_index_written_by_an_earlier_python_is_read(folder: Path) -> None:
    written, buffer = read_metadata(folder), io.BytesIO()
    _EarlierPython(buffer).dump(pickle.loads((folder / ".metadata").read_bytes()))
    assert b"getattr" in buffer.getvalue()
    (folder / ".metadata").write_bytes(buffer.getvalue())
    assert read_metadata(folder) == written


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_safe_reader_serves_torch(folder: Path) -> None:
    tensors = {name: torch.empty_like(value) for name, value in some_tensors().items()}
    dcp.load(tensors, storage_reader=SafeReader(folder), no_dist=True)
    assert_equal(tensors, some_tensors())


def test_the_state_is_read(folder: Path) -> None:
    assert read_state(folder) == {"iteration": 7, "scaler": {}, "images_seen": 8}


def test_no_tensors_of_that_name(folder: Path) -> None:
    with pytest.raises(ValueError, match="model_0000007 holds no tensors with names that start with 'model.other'"):
        read_tensors(folder, "model.other")


# --- Which folder ----------------------------------------------------------------------------------------------------


def test_the_newest_complete_checkpoint_is_found_from_everywhere(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    for name in ("model_0000009", "model_10000000", "model_9999999", "model_10000001.unfinished", "model_best"):
        write_checkpoint(directory / name, some_tensors())
    newest = directory / "model_10000000"
    assert list(complete_checkpoints(directory)) == [9, 9999999, 10000000]
    assert latest_checkpoint(directory) == newest
    assert find_checkpoint(tmp_path) == find_checkpoint(directory) == find_checkpoint(newest) == newest
    assert find_checkpoint(directory / "model_0000009") == directory / "model_0000009"


@pytest.mark.parametrize("there", ["file", "link", "loop"])
def test_a_folder_of_checkpoints_that_is_none_is_an_error_and_not_empty(there: str, tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    directory.touch() if there == "file" else directory.symlink_to("checkpoints" if there == "loop" else "nowhere")
    for find in (latest_checkpoint, complete_checkpoints, lambda directory: find_checkpoint(directory.parent)):
        with pytest.raises(OSError, match=str(directory)):
            find(directory)


def test_no_checkpoint_anywhere(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "checkpoints") is None
    with pytest.raises(FileNotFoundError, match=f"no checkpoint in {tmp_path}: give a folder model_<iteration>"):
        find_checkpoint(tmp_path)


# --- Folders that would run code -------------------------------------------------------------------------------------


def harmful_root(metadata: Metadata, target: Path) -> object:
    return Unsafe(target)


def harmful_planner(metadata: Metadata, target: Path) -> object:
    metadata.planner_data = {"a": Unsafe(target)}
    return metadata


def harmful_name(metadata: Metadata, target: Path) -> object:
    metadata.state_dict_metadata[Unsafe(target)] = None  # type: ignore[index,assignment]
    return metadata


def harmful_size(metadata: Metadata, target: Path) -> object:
    metadata.state_dict_metadata["model.flags"].size = Unsafe(target)  # type: ignore[union-attr,assignment]
    return metadata


@pytest.mark.parametrize("harm", [harmful_root, harmful_planner, harmful_name, harmful_size])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_an_index_that_would_run_code_is_refused_and_does_not_run(
    harm: Callable[[Metadata, Path], object], protocol: int, folder: Path
) -> None:
    path, target = folder / ".metadata", folder / "made"
    content = pickle.dumps(harm(pickle.loads(path.read_bytes()), target), protocol=protocol)
    path.write_bytes(content)
    for read in (read_metadata, read_tensors, stored_names, lambda folder: SafeReader(folder).read_metadata()):
        with pytest.raises(ValueError, match=r"\.metadata is refused: it asks for .* which could run code"):
            read(folder)
    assert not target.exists()
    pickle.loads(content)
    assert target.exists(), "it would have run"


@pytest.mark.parametrize(
    "name", ["builtins eval", "os system", "torch load", "torch nn.Module", "torch.serialization load", "dinov2 log"]
)
def test_only_names_of_an_index_can_be_unpickled(name: str, folder: Path) -> None:
    (folder / ".metadata").write_bytes(f"c{name.replace(' ', chr(10))}\n.".encode())
    with pytest.raises(ValueError, match=f"refused: it asks for {name.replace(' ', '.')}, which could run code"):
        read_metadata(folder)


@pytest.mark.parametrize("name", ["Metadata", "TensorProperties", "_MEM_FORMAT_ENCODING"])
@pytest.mark.parametrize("state", [{"state": 1}, (None, {"__setstate__": 1})])
def test_an_index_cannot_change_classes(name: str, state: object, folder: Path) -> None:
    module = "torch.distributed.checkpoint.metadata"
    harm = f"c{module}\n{name}\n".encode() + pickle.dumps(state, protocol=0)[:-1] + b"b."
    (folder / ".metadata").write_bytes(harm)
    stand_in = index._RECORDS[module, name]
    before = dict(vars(stand_in)), dict(vars(stand_in.__mro__[1]))
    with pytest.raises(ValueError, match=r"\.metadata is damaged .*__setstate__"):
        read_metadata(folder)
    assert (dict(vars(stand_in)), dict(vars(stand_in.__mro__[1]))) == before


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_an_entry_that_is_no_tensor_is_refused_as_torch_would_run_it(tmp_path: Path) -> None:
    target = tmp_path / "made"
    folder = write_checkpoint(tmp_path / "model_0000001", {"model.weight": Unsafe(target)})
    with pytest.raises(ValueError, match=r"\.metadata is refused: model.weight is not a tensor but a pickled object"):
        read_tensors(folder)
    with pytest.raises(
        dcp.api.CheckpointException, match="model.weight is not a tensor|metadata is None"
    ):  # torch 2.11
        dcp.load({"model.weight": torch.zeros(1)}, storage_reader=SafeReader(folder), no_dist=True)
    assert not target.exists()
    dcp.load({"model.weight": torch.zeros(1)}, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    assert target.exists(), "torch's own reader runs it"


def test_tensors_that_are_pickles_are_refused(folder: Path, tmp_path: Path) -> None:
    metadata, target = pickle.loads((folder / ".metadata").read_bytes()), tmp_path / "made"
    place = next(info for index, info in metadata.storage_data.items() if index.fqn == "model.teacher.weight")
    file = folder / place.relative_path
    harm, whole = pickle.dumps(Unsafe(target), protocol=2), bytearray(file.read_bytes())
    whole[place.offset : place.offset + len(harm)] = harm
    file.write_bytes(whole)
    with pytest.raises(ValueError, match=f"{file} is damaged"):
        read_tensors(folder)
    assert not target.exists()


@pytest.mark.parametrize("elsewhere", ["../secret.distcp", "/etc/passwd", "", "..", "below/__0_0.distcp"])
def test_an_index_cannot_point_out_of_its_folder(elsewhere: str, folder: Path) -> None:
    change_table(folder, lambda metadata: setattr(first_place(metadata), "relative_path", elsewhere))
    with pytest.raises(
        ValueError, match=r"\.metadata is refused: it refers to .*, which is not a file of a checkpoint folder"
    ):
        read_metadata(folder)


# --- Damaged folders -------------------------------------------------------------------------------------------------


def change_table(folder: Path, change: Callable[[Any], object]) -> None:
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def first_place(metadata: Any) -> Any:
    return next(iter(metadata.storage_data.values()))


@pytest.mark.parametrize(
    "change",
    [
        lambda metadata: metadata.state_dict_metadata["model.teacher.weight"].chunks.pop(),
        lambda metadata: setattr(metadata.state_dict_metadata["model.flags"], "size", torch.Size([10**12])),
        lambda metadata: setattr(metadata.state_dict_metadata["model.flags"], "size", torch.Size([-2])),
        lambda metadata: setattr(metadata.state_dict_metadata["model.flags"], "chunks", None),
        lambda metadata: metadata.storage_data.clear(),
        lambda metadata: setattr(first_place(metadata), "length", 3),
        lambda metadata: setattr(first_place(metadata), "offset", -1),
        lambda metadata: setattr(metadata, "state_dict_metadata", None),
        lambda metadata: delattr(metadata, "storage_data"),
    ],
)
def test_an_index_that_contradicts_itself_is_damaged(change: Callable[[Any], object], folder: Path) -> None:
    change_table(folder, change)
    with pytest.raises(ValueError, match=r"\.metadata is damaged .*: copy the checkpoint again, or use another one"):
        read_metadata(folder)


@pytest.mark.parametrize("kept", [0, 1, 0.3, 0.7, 0.99])
def test_a_truncated_file_is_named(kept: float, folder: Path) -> None:
    for name, read in {".metadata": read_tensors, "__0_0.distcp": read_tensors, "state.json": read_state}.items():
        path = folder / name
        whole = path.read_bytes()
        path.write_bytes(whole[: int(kept * len(whole)) if kept < 1 else kept])
        with pytest.raises(ValueError, match=f"{path} is (damaged|truncated).*copy the checkpoint again"):
            read(folder)
        path.write_bytes(whole)


@pytest.mark.parametrize("garbage", [b"\0", b"<html>", b"\x80\x04\x95", bytes(range(256))])
def test_a_file_of_garbage_is_named(garbage: bytes, folder: Path) -> None:
    for name, read in {".metadata": read_tensors, "__0_0.distcp": read_tensors, "state.json": read_state}.items():
        path = folder / name
        whole = path.read_bytes()
        path.write_bytes(garbage * (len(whole) // len(garbage) + 1))
        with pytest.raises(ValueError, match=f"{path} is damaged.*copy the checkpoint again"):
            read(folder)
        path.write_bytes(whole)


def test_a_missing_file_is_named(folder: Path) -> None:
    for name, read in {".metadata": read_tensors, "__0_0.distcp": read_tensors, "state.json": read_state}.items():
        path = folder / name
        whole = path.read_bytes()
        path.unlink()
        with pytest.raises(FileNotFoundError, match=f"{path}.* incomplete"):
            read(folder)
        path.write_bytes(whole)


@pytest.mark.parametrize("state", [[], {"scaler": {}}, {"iteration": "7"}, None])
def test_a_state_without_an_iteration_is_refused(state: object, folder: Path) -> None:
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="state.json has no valid iteration"):
        read_state(folder)


@pytest.mark.parametrize(
    "damage",
    [
        {"iteration": 8},
        {"iteration": -1},
        {"iteration": True},
        {"iteration": 7.0},
        {"images_seen": -8},
        {"images_seen": 7},
        {"images_seen": 1e3},
        {"images_seen": 10**30},
        {"world_size": 0},
        {"global_batch": "4"},
        {"num_images": None},
        {"dataset": 3},
        {"scaler": []},
        {"scaler": {"scale": 2.0}},
        {"metrics": {"lr": 0.1}},
        {"metrics": {"lr": {"window": [None], "count": 1, "total": 1.0}}},
        {"metrics": {"lr": {"window": [0.1], "count": -1, "total": 1.0}}},
        {"metrics": [1]},
    ],
)
def test_a_state_whose_entries_cannot_be_is_refused(damage: dict[str, object], folder: Path) -> None:
    path = folder / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(
        ValueError, match=f"{path} (is damaged|is of iteration 8|has no valid iteration).*copy the checkpoint again"
    ):
        read_state(folder)


def test_special_files_do_not_hang(folder: Path) -> None:
    for name, read in {".metadata": read_metadata, "state.json": read_state}.items():
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(ValueError, match=f"{folder / name} is not a regular file"):
            read(folder)


# --- Checksums -------------------------------------------------------------------------------------------------------


def test_no_flipped_bit_changes_a_number(folder: Path) -> None:
    write_checksums(folder)
    generator, num_refused = random.Random(0), 0
    for name in (".metadata", "__0_0.distcp", "state.json", "checksums.json"):
        path = folder / name
        whole = path.read_bytes()
        for _ in range(100):
            damaged = bytearray(whole)
            damaged[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
            path.write_bytes(damaged)
            try:
                found = read_tensors(folder), read_state(folder)
            except (ValueError, OSError) as error:
                assert str(folder) in str(error)
                num_refused += 1
            else:
                assert_equal(found[0], some_tensors())
                assert found[1] == {"iteration": 7, "scaler": {}, "images_seen": 8}
        path.write_bytes(whole)
    assert num_refused > 300


def test_the_damaged_tensor_is_named_also_in_checkpoints_of_earlier_versions(folder: Path) -> None:
    path = folder / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[content.index(some_tensors()["model.teacher.weight"].numpy().tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"distcp is damaged \(model.teacher.weight: .*Bad CRC-32.*copy the checkpoint"
    ):
        read_tensors(folder)
    assert set(read_tensors(folder, "model.student")) == {
        name for name in some_tensors() if name.startswith("model.student")
    }


def test_what_has_no_checksum_is_read_and_logged(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    read_state(folder)
    assert caplog.messages == [f"{folder / 'state.json'} has no checksum: damage to it may not be detected"]
