"""Weights in: every known layout is read to the last tensor, and anything else is refused with nothing loaded."""

import argparse
import logging
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dinov2.layers import DINOHead
from dinov2.models.key_mapping import to_hf, to_timm
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.models.weights import (
    check_numbers,
    chunk_block_names,
    flatten_block_names,
    load_backbone,
    read_state_dict,
)

StateDict = dict[str, Tensor]


def vit(**kwargs: object) -> DinoVisionTransformer:
    """Other random weights in each call."""
    settings = {"img_size": 8, "patch_size": 2, "embed_dim": 12, "depth": 3, "num_heads": 3, "init_values": 1.0}
    return DinoVisionTransformer(**{**settings, **kwargs})


def prefixed(prefix: str, state: StateDict) -> StateDict:
    return {prefix + name: value for name, value in state.items()}


def heads() -> StateDict:
    return prefixed("dino_head.", DINOHead(12, 20, hidden_dim=8, bottleneck_dim=4).state_dict())


def teacher_dump(state: StateDict) -> object:
    return {"teacher": prefixed("backbone.", state) | heads()}


def published_checkpoint(state: StateDict) -> object:
    """A training checkpoint as the published code writes it: both networks, centers, optimizer, iteration."""
    teacher = prefixed("teacher.backbone.", chunk_block_names(state, depth=3, block_chunks=2))
    student = prefixed("student.backbone.", {name: value + 1 for name, value in state.items()})
    model = student | prefixed("student.", heads()) | teacher | prefixed("teacher.", heads())
    model["dino_loss.center"] = torch.zeros(1, 20)
    return {"model": model, "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]}, "iteration": 7}


def wrapped_inside(state: StateDict) -> StateDict:
    """As sharding and activation checkpointing name the parameters of each block."""
    return {
        "_fsdp_wrapped_module.backbone."
        + re.sub(r"(blocks\.\d+\.)(\d+\.)", r"\1_fsdp_wrapped_module.\2_checkpoint_wrapped_module.", name): value
        for name, value in state.items()
    }


LAYOUTS: dict[str, Callable[[StateDict], object]] = {
    "flat": lambda state: state,
    "chunked": lambda state: chunk_block_names(state, depth=3, block_chunks=2),
    "backbone prefix": lambda state: prefixed("backbone.", state) | heads(),
    "module prefix": lambda state: prefixed("module.", state),
    "module and backbone prefix": lambda state: prefixed("module.backbone.", state) | prefixed("module.", heads()),
    "teacher checkpoint": teacher_dump,
    "teacher checkpoint, bare": lambda state: {"teacher": state},
    "published checkpoint": published_checkpoint,
    "model": lambda state: {"model": state, "epoch": 3},
    "state_dict": lambda state: {"state_dict": prefixed("module.", state)},
    "compiled": lambda state: prefixed("_orig_mod.", state),
    "compiled and parallel": lambda state: prefixed("module._orig_mod.", state),
    "lightning": lambda state: {"state_dict": prefixed("model.", state), "epoch": 3, "hyper_parameters": {"lr": 1e-3}},
    "lightning, compiled": lambda state: {"state_dict": prefixed("model._orig_mod.backbone.", state) | heads()},
    "model.backbone": lambda state: {"state_dict": prefixed("model.backbone.", state) | prefixed("model.", heads())},
    "encoder": lambda state: prefixed("encoder.", state) | {"decoder.weight": torch.zeros(3)},
    "mmengine": lambda state: {"meta": {"epoch": 1}, "state_dict": prefixed("backbone.", state), "message_hub": {}},
    "nested twice": lambda state: {
        "model": {"state_dict": prefixed("net.encoder.", state)},
        "optimizer": {"state": {}},
    },
    "deepspeed": lambda state: {"module": prefixed("module.", state), "lr_scheduler": None},
    "sharded and recomputed": lambda state: {
        "model": wrapped_inside(chunk_block_names(state, depth=3, block_chunks=2))
    },
    "one of several": lambda state: prefixed("teacher.", state) | prefixed("sam.", vit().state_dict()),
    "one of several dictionaries": lambda state: {"model": vit().state_dict(), "teacher": {"state_dict": state}},
    "teacher in words": lambda state: prefixed("student_net.", vit().state_dict()) | prefixed("teacher_net.", state),
    "averaged": lambda state: prefixed("module.", state) | {"n_averaged": torch.tensor(3)},
    "classifier without prefix": lambda state: state | {"head.weight": torch.zeros(4, 12), "head.bias": torch.zeros(4)},
    "flags of the trainer": lambda state: {"teacher": state, "args": argparse.Namespace(lr=1e-3, out="runs/1")},
    "extra numbers": lambda state: {**state, "epoch": 3, "name": "vit"},
    "half precision": lambda state: {name: value.half() for name, value in state.items()},
}


def assert_loaded(model: DinoVisionTransformer, state: StateDict, *, rtol: float = 0.0) -> None:
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=rtol, atol=rtol, msg=name)


def assert_refused(model: DinoVisionTransformer, path: Path, *messages: str) -> None:
    """Loading raises an error with all these messages and leaves the model as it was."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        load_backbone(model, path)
    for message in (str(path), *messages):
        assert message in str(caught.value)
    assert_loaded(model, before)


# --- What is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read(tmp_path: Path, layout: str) -> None:
    state = vit().state_dict()
    path = tmp_path / "weights.pth"
    torch.save(LAYOUTS[layout](state), path)
    model = vit()
    assert load_backbone(model, path) is model
    assert_loaded(model, state, rtol=1e-3 if layout == "half precision" else 0.0)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("layout", ["flat", "chunked", "backbone prefix"])
def test_safetensors_are_read(tmp_path: Path, layout: str) -> None:
    state = vit().state_dict()
    content = LAYOUTS[layout](state)
    assert isinstance(content, dict)
    save_file(content, tmp_path / "weights.safetensors")
    assert_loaded(load_backbone(vit(), str(tmp_path / "weights.safetensors")), state)


def test_paths_and_file_urls(tmp_path: Path) -> None:
    state = vit().state_dict()
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    for name in (path, str(path), path.as_uri()):
        assert_loaded(load_backbone(vit(), name), state)


def test_the_student_can_be_selected(tmp_path: Path) -> None:
    state = vit().state_dict()
    torch.save(published_checkpoint(state), tmp_path / "model.pth")
    torch.save({"student": state, "teacher": vit().state_dict()}, tmp_path / "both.pth")
    student = load_backbone(vit(), tmp_path / "model.pth", checkpoint_key="student")
    assert_loaded(student, {name: value + 1 for name, value in state.items()})
    assert_loaded(load_backbone(vit(), tmp_path / "both.pth", checkpoint_key="student"), state)


def test_registers_and_swiglu_are_read(tmp_path: Path) -> None:
    options = {"num_register_tokens": 2, "ffn_layer": "swiglufused"}
    state = vit(**options).state_dict()
    torch.save(state, tmp_path / "weights.pth")
    assert_loaded(load_backbone(vit(**options), tmp_path / "weights.pth"), state)


def test_read_state_dict_keeps_heads_and_flattens_names(tmp_path: Path) -> None:
    state = vit().state_dict()
    path = tmp_path / "weights.pth"
    torch.save({"teacher": prefixed("backbone.", chunk_block_names(state, 3, 3)) | heads()}, path)
    assert set(read_state_dict(path)) == set(prefixed("backbone.", state) | heads())


# --- Several networks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (lambda a, b: {"model": a, "model_ema": b}, "model, model_ema"),
        (lambda a, b: {"model": a, "student": b}, "model, student"),
        (lambda a, b: prefixed("image.", a) | prefixed("sam.backbone.", b), "image, sam.backbone"),
        (lambda a, b: {"state_dict": a | prefixed("ema.", b)}, "one without prefix, ema"),
        (lambda a, b: {"x": {"teacher": a}, "y": {"teacher": b}}, "x.teacher, y.teacher"),
        (lambda a, b: prefixed("student.", to_hf(a)) | prefixed("ema.", to_hf(b)), "student, ema"),
    ],
)
def test_one_of_several_networks_is_never_taken_silently(
    tmp_path: Path, content: Callable[[StateDict, StateDict], object], names: str
) -> None:
    torch.save(content(vit().state_dict(), vit().state_dict()), tmp_path / "weights.pth")
    message = f"holds several networks: {names}; checkpoint_key = 'teacher' matches none of them or several"
    assert_refused(vit(), tmp_path / "weights.pth", message)


@pytest.mark.parametrize("key", ["model_ema", "model", "ema"])
def test_the_key_selects_the_network(tmp_path: Path, key: str) -> None:
    model, average = vit().state_dict(), vit().state_dict()
    torch.save({"model": model, "model_ema": {"state_dict": average}}, tmp_path / "weights.pth")
    loaded = load_backbone(vit(), tmp_path / "weights.pth", checkpoint_key=key)
    assert_loaded(loaded, model if key == "model" else average)


@pytest.mark.parametrize("layout", [to_hf, to_timm])
def test_networks_of_other_libraries_are_distinguished(
    tmp_path: Path, layout: Callable[[StateDict], StateDict]
) -> None:
    state = vit().state_dict()
    others = prefixed("student.", layout(vit().state_dict()))
    torch.save({"state_dict": others | prefixed("teacher.net.", layout(state))}, tmp_path / "weights.pth")
    assert_loaded(load_backbone(vit(), tmp_path / "weights.pth"), state | {"mask_token": torch.zeros(1, 12)})


def test_a_missing_student_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(teacher_dump(state := vit().state_dict()), tmp_path / "weights.pth")
    assert_loaded(load_backbone(vit(), tmp_path / "weights.pth", checkpoint_key="student"), state)
    assert "holds no student: its teacher is used" in caplog.text


def test_names_that_meet_are_refused(tmp_path: Path) -> None:
    state = vit().state_dict()
    torch.save(state | prefixed("module.", state), tmp_path / "weights.pth")
    assert_refused(vit(), tmp_path / "weights.pth", "tensors with and without wrapper")


def test_a_file_that_holds_itself_is_refused(tmp_path: Path) -> None:
    content: dict[str, object] = {"epoch": 3}
    content["model"] = content
    torch.save(content, tmp_path / "weights.pth")
    assert_refused(vit(), tmp_path / "weights.pth", "no state dict of tensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, value: float) -> None:
    state = {name: tensor.clone() for name, tensor in vit().state_dict().items()}
    state["blocks.1.attn.qkv.weight"][3, 2] = value
    torch.save(teacher_dump(state), tmp_path / "weights.pth")
    assert_refused(vit(), tmp_path / "weights.pth", "are not finite (NaN or infinite): blocks.1.attn.qkv.weight")


def test_weights_that_are_integers_are_named(tmp_path: Path) -> None:
    state = vit().state_dict()
    torch.save({**state, "norm.weight": (127 * state["norm.weight"]).to(torch.int8)}, tmp_path / "weights.pth")
    assert_refused(vit(), tmp_path / "weights.pth", "are not floating-point numbers: norm.weight (torch.int8)")


def test_weights_that_are_no_plain_tensors_are_named(tmp_path: Path) -> None:
    torch.save({**vit().state_dict(), "norm.weight": torch.ones(12, device="meta")}, tmp_path / "weights.pth")
    assert_refused(vit(), tmp_path / "weights.pth", "not plain tensors: norm.weight (meta)")
    with pytest.raises(ValueError, match=r"weights in it are not plain tensors: norm.weight \(torch.sparse_coo\)"):
        check_numbers({"norm.weight": torch.ones(12).to_sparse()}, "it")


def test_what_is_saved_beside_the_tensors_is_named(tmp_path: Path) -> None:
    for content, name in ((vit(), "dinov2.models.vision_transformer.DinoVisionTransformer"), (Path("x"), "PosixPath")):
        torch.save({"model": content, "teacher": vit().state_dict()}, tmp_path / "weights.pth")
        assert_refused(vit(), tmp_path / "weights.pth", f"{name}: save its state dict alone where it was written")


def test_a_file_of_another_format_is_named(tmp_path: Path) -> None:
    save_file(vit().state_dict(), tmp_path / "weights.pth")
    assert_refused(
        vit(), tmp_path / "weights.pth", "it is not a file of torch.save; a file of safetensors must be named"
    )


# --- Names of blocks in chunks ---------------------------------------------------------------------------------------


def test_chunked_names_are_the_published_ones() -> None:
    flat = {f"blocks.{i}.norm1.weight": torch.tensor(i) for i in range(24)} | {"norm.weight": torch.tensor(24)}
    names = list(chunk_block_names(flat, depth=24, block_chunks=4))
    expected = [f"blocks.{i // 6}.{i}.norm1.weight" for i in range(24)] + ["norm.weight"]
    assert names == expected


@pytest.mark.parametrize(
    ("depth", "chunks", "sizes"), [(10, 4, [2] * 5), (5, 2, [2, 2, 1]), (3, 1, [3]), (3, 3, [1] * 3), (2, 5, [1, 1])]
)
def test_chunks_that_do_not_divide_the_depth_leave_a_rest(depth: int, chunks: int, sizes: list[int]) -> None:
    flat = {f"blocks.{i}.ls1.gamma": torch.tensor(i) for i in range(depth)}
    chunked = [int(name.split(".")[1]) for name in chunk_block_names(flat, depth, chunks)]
    assert [chunked.count(chunk) for chunk in range(max(chunked) + 1)] == sizes


@pytest.mark.parametrize("prefix", ["", "backbone.", "student.backbone."])
def test_flattening_undoes_chunking(prefix: str) -> None:
    state = prefixed(prefix, vit(depth=7).state_dict())
    chunked = chunk_block_names(state, depth=7, block_chunks=3)
    assert set(chunked) != set(state)
    flat = flatten_block_names(chunked)
    assert list(flat) == list(state) and all(flat[name] is state[name] for name in state)


def test_flat_names_stay() -> None:
    state = vit().state_dict()
    assert list(flatten_block_names(state)) == list(state)


# --- Positions of another grid ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("img_size", [16, 6, (4, 12)])
def test_positions_of_another_grid_are_resampled_and_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, img_size: int | tuple[int, int]
) -> None:
    state = vit().state_dict()
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    model = load_backbone(vit(img_size=img_size), path)
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    rows, columns = model.patch_embed.patches_resolution
    assert str(path) in record.message and f"4 x 4 patches, this model has {rows} x {columns}" in record.message
    assert_loaded(model, state | {"pos_embed": model.pos_embed})
    source = vit()  # resamples its own table for images of another size
    source.load_state_dict(state)
    images = torch.randn(2, 3, 2 * rows, 2 * columns)
    torch.testing.assert_close(model.eval()(images), source.eval()(images), rtol=1e-6, atol=1e-6)


def test_positions_of_the_same_grid_raise_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(vit().state_dict(), tmp_path / "weights.pth")
    load_backbone(vit(), tmp_path / "weights.pth")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_positions_of_a_grid_that_is_not_square_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(vit(img_size=(4, 6)).state_dict(), path)
    assert_refused(vit(), path, "pos_embed (file (1, 7, 12), model (1, 17, 12))")


# --- Weights of another network --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of_file", "of_model", "messages"),
    [
        ({"ffn_layer": "swiglufused"}, {}, ["missing (12): blocks.0.mlp.fc1.weight", "unknown (12)", "ffn_layer"]),
        ({}, {"ffn_layer": "swiglufused"}, ["missing (12): blocks.0.mlp.w12.weight", "ffn_layer"]),
        ({"num_register_tokens": 2}, {}, ["unknown (1): register_tokens", "num_register_tokens"]),
        ({}, {"num_register_tokens": 2}, ["missing (1): register_tokens", "num_register_tokens"]),
        (
            {"num_register_tokens": 4},
            {"num_register_tokens": 2},
            [
                "other shape (1): register_tokens (file (1, 4, 12), model (1, 2, 12))",
                "loaded: it has 4 register tokens,",
            ],
        ),
        ({"depth": 4}, {}, ["unknown (14): blocks.3.norm1.weight", "and 8 more"]),
        ({}, {"depth": 4}, ["missing (14): blocks.3.norm1.weight", "and 8 more"]),
        (
            {"embed_dim": 24},
            {},
            [
                "loaded: its width is 24, that of this one 12 (student.arch",
                "cls_token (file (1, 1, 24), model (1, 1, 12))",
            ],
        ),
        ({"patch_size": 4}, {}, ["patch_embed.proj.weight (file (12, 3, 4, 4), model (12, 3, 2, 2))", "patch_size"]),
        ({"init_values": None}, {}, ["missing (6): blocks.0.ls1.gamma"]),
    ],
)
def test_weights_of_another_network_are_refused(
    tmp_path: Path, of_file: dict[str, object], of_model: dict[str, object], messages: list[str]
) -> None:
    path = tmp_path / "weights.pth"
    torch.save(vit(**of_file).state_dict(), path)
    assert_refused(vit(**of_model), path, "nothing was loaded", *messages)


def test_a_single_missing_tensor_is_refused(tmp_path: Path) -> None:
    state = vit().state_dict()
    state.pop("blocks.1.mlp.fc2.bias")
    path = tmp_path / "weights.pth"
    torch.save(teacher_dump(state), path)
    assert_refused(vit(), path, "missing (1): blocks.1.mlp.fc2.bias")


def test_heads_alone_are_no_backbone(tmp_path: Path) -> None:
    torch.save({"teacher": heads()}, tmp_path / "weights.pth")
    assert_refused(vit(), tmp_path / "weights.pth", "missing", "unknown", "dino_head.mlp.0.weight")
    assert_refused(vit(), tmp_path / "weights.pth", "nothing was loaded: it holds no whole backbone")


# --- Files that are no weights ---------------------------------------------------------------------------------------


class Unsafe:
    """Unpickling it would write a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("kept", [0, 1, 100, 0.3, 0.7, 0.99])
@pytest.mark.parametrize("name", ["weights.pth", "legacy.pth", "weights.safetensors"])
def test_a_truncated_file_is_refused(tmp_path: Path, name: str, kept: float) -> None:
    path, state = tmp_path / name, vit().state_dict()
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=name != "legacy.pth")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if kept < 1 else kept])
    assert_refused(vit(), path, "truncated or damaged")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_an_empty_file_is_called_empty(tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / f"weights{suffix}"
    path.touch()
    assert_refused(vit(), path, "it is empty")
    assert not caplog.messages, "it is of no older version"


def test_a_damaged_teacher_of_a_run_can_be_written_again(tmp_path: Path) -> None:
    teacher = tmp_path / "eval" / "best" / "teacher_checkpoint.pth"
    teacher.parent.mkdir(parents=True)
    torch.save({"teacher": vit().state_dict()}, teacher)
    teacher.write_bytes(teacher.read_bytes()[:5000])
    (tmp_path / "checkpoints").mkdir()
    command = f"python -m dinov2.tools convert {tmp_path} teacher.pth --to teacher"
    assert_refused(
        vit(),
        teacher,
        f"truncated or damaged: its end is missing; the teacher of the run's newest checkpoint: {command}",
    )


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "text", ["<!DOCTYPE html><html></html>", "404: Not Found", "version https://git-lfs.github.com/spec/v1\noid", "{}"]
)
def test_a_text_file_is_refused(tmp_path: Path, text: str, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_text(text)
    assert_refused(vit(), path, "no checkpoint of plain tensors")


def test_a_pickle_that_could_run_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    path, target = tmp_path / "weights.pth", tmp_path / "written"
    torch.save(vit().state_dict() | {"extra": Unsafe(target)}, path)
    assert_refused(vit(), path, "no checkpoint of plain tensors")
    path.write_bytes(pickle.dumps({"extra": Unsafe(target)}, protocol=2))
    assert_refused(vit(), path, "no checkpoint of plain tensors")
    assert not target.exists()


def test_a_whole_pickled_model_is_refused(tmp_path: Path) -> None:
    torch.save(vit(), tmp_path / "weights.pth")
    assert_refused(vit(), tmp_path / "weights.pth", "no checkpoint of plain tensors", "DinoVisionTransformer")


@pytest.mark.parametrize(
    ("content", "held"),
    [
        ({}, "it holds: "),
        ([torch.zeros(2)], "it holds: list"),
        (torch.zeros(2), "it holds: Tensor"),
        ({"optimizer": {"lr": 1.0}, "epoch": 3}, "it holds: optimizer, epoch"),
        ({"teacher": {"backbone.norm.weight": [1.0]}}, "it holds: backbone.norm.weight"),
        ({0: torch.zeros(2)}, "it holds: 0"),
    ],
)
def test_a_file_of_something_else_is_refused_with_what_it_holds(tmp_path: Path, content: object, held: str) -> None:
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    assert_refused(vit(), path, "no state dict of tensors", held)


@pytest.mark.parametrize("name", ["absent.pth", "absent.safetensors", "."])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"no weights at {tmp_path / name}"):
        load_backbone(vit(), tmp_path / name)
