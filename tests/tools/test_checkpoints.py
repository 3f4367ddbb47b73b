"""`python -m dinov2.tools` with checkpoints: every form holds the tensors of the model to the last bit."""

import json
import os
import re
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoint_files import Unsafe, assert_equal, run_tensors, trained, write_checkpoint
from safetensors import safe_open
from tiny import ROOT, run_train, tiny_config, tiny_model
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dinov2 import config
from dinov2.models import build_model
from dinov2.models.weights import chunk_block_names, load_backbone, read_state_dict
from dinov2.tools.__main__ import main
from dinov2.train.checkpoint_files.index import read_metadata
from dinov2.train.ssl_meta_arch import SSLMetaArch

METRICS = {
    "total_loss": {"window": [9.0, 8.5], "count": 2, "total": 17.5},
    "lr": {"window": [0.1], "count": 1, "total": 0.1},
}
FORMS = ["full", "teacher", "student", "backbone"]
SUFFIXES = [".pth", ".pt", ".safetensors"]


def model_of_a_run() -> SSLMetaArch:
    """Teacher and centers unlike the student and zero."""
    model = tiny_model()
    with torch.no_grad():
        for value in (*model.teacher.state_dict().values(), model.dino_loss.center, model.ibot_patch_loss.center):
            value += torch.randn(value.shape)
    return model


def run_process(rank: int, folder: str) -> None:
    """One of two processes that write a checkpoint together; rank 0 also writes the whole tensors."""
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    model, mesh = model_of_a_run(), init_device_mesh("cpu", (2,))
    for network in (model.student, model.teacher):
        for block in network.backbone.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(network.backbone, mesh=mesh)  # heads stay whole in each process
    tensors = run_tensors(model, trained(model))
    write_checkpoint(Path(folder) / "model_0000007", tensors)
    whole = {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in tensors.items()}
    if rank == 0:
        torch.save(whole, f"{folder}/whole.pth")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint that two processes wrote, each its shards, and its whole tensors."""
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(run_process, args=(str(folder),), nprocs=2)
    return folder / "model_0000007", torch.load(folder / "whole.pth", weights_only=True)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint that one process wrote, and its tensors."""
    folder = tmp_path_factory.mktemp("one") / "checkpoints" / "model_0000007"
    model = model_of_a_run()
    tensors = run_tensors(model, trained(model))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0).state_dict()
    return write_checkpoint(folder, tensors, scaler=scaler, images_seen=1234567, metrics=METRICS), tensors


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a real run."""
    folder = tmp_path_factory.mktemp("run")
    run_train(folder, "optim.epochs=1")
    return folder


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def content_of(path: Path) -> Any:
    """The file as other programs read it."""
    if path.suffix != ".safetensors":
        return torch.load(path, weights_only=True)
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict


def convert(source: Path, output: Path, form: str, *words: str) -> Path:
    assert main(["convert", str(source), str(output), "--to", form, *words]) == 0
    return output


def error_of(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line that a failing command prints."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def described(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, str]:
    """The output of `inspect`: {title: value}; the first line is the source."""
    capsys.readouterr()
    assert main(["inspect", *map(str, words)]) == 0
    source, *lines = capsys.readouterr().out.splitlines()
    return {"source": source} | {line[:31].strip(): line[31:] for line in lines}


# --- convert ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("writers", ["one_process", "two_processes"])
def test_every_form_has_the_tensors_of_the_model(
    form: str, suffix: str, writers: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder, tensors = request.getfixturevalue(writers)
    content = content_of(convert(folder, tmp_path / f"new/folder/weights{suffix}", form))
    if form == "full" and suffix != ".safetensors":
        assert content["iteration"] == 7
        moments = content["optimizer"]["state"]
        flat = {f"optimizer.{name}.{key}": value for name, entry in moments.items() for key, value in entry.items()}
        assert_equal(flat | {f"model.{name}": value for name, value in content["model"].items()}, tensors)
    elif form == "full":
        assert_equal(content, part(tensors, "model.") | {n: v for n, v in tensors.items() if n.startswith("optimizer")})
    elif form == "backbone":
        assert_equal(content, part(tensors, "model.teacher.backbone."))
    else:
        assert_equal(content if suffix == ".safetensors" else content[form], part(tensors, f"model.{form}."))
        assert suffix == ".safetensors" or list(content) == [form]
    assert [path.name for path in (tmp_path / "new/folder").iterdir()] == [f"weights{suffix}"]


def test_two_processes_each_wrote_their_part(two_processes: tuple[Path, dict[str, Tensor]]) -> None:
    folder, tensors = two_processes
    assert {path.name for path in folder.glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}
    stored = read_metadata(folder).state_dict_metadata
    assert len(stored["model.teacher.backbone.blocks.0.attn.qkv.weight"].chunks) == 2
    assert_equal(part(tensors, "model."), dict(model_of_a_run().state_dict()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_form_can_be_evaluated(
    form: str, suffix: str, one_process: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    folder, tensors = one_process
    output = convert(folder, tmp_path / f"weights{suffix}", form)
    model = load_backbone(build_model(**config.backbone_arguments(tiny_config())), output)
    network = "student" if form == "student" else "teacher"
    assert_equal(dict(model.state_dict()), part(tensors, f"model.{network}.backbone."))
    if form in ("teacher", "student"):
        assert_equal(read_state_dict(output), part(tensors, f"model.{network}."))


def test_the_teacher_of_a_run_is_the_one_that_the_run_exported(run: Path, tmp_path: Path) -> None:
    (dump,) = run.glob("eval/training_1/*.pth")
    for source in (run, run / "checkpoints", run / "checkpoints" / "model_0000001"):
        content = content_of(convert(source, tmp_path / "teacher.pth", "teacher", "--force"))
        assert list(content) == ["teacher"]
        assert_equal(content["teacher"], torch.load(dump, weights_only=True)["teacher"])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_full_file_can_be_converted_like_the_folder(
    suffix: str, one_process: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    folder, _ = one_process
    full = convert(folder, tmp_path / f"full{suffix}", "full")
    for form in FORMS:
        for kind in (".pth", ".safetensors"):
            of_file = convert(full, tmp_path / f"{form} of file{kind}", form)
            of_folder = convert(folder, tmp_path / f"{form} of folder{kind}", form)
            assert_same_content(content_of(of_file), content_of(of_folder))


def assert_same_content(found: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same_content(found[key], value)
    else:
        assert found == expected


def test_other_entries_are_kept(one_process: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    content = content_of(convert(one_process[0], tmp_path / "full.pth", "full"))
    assert list(content) == ["model", "optimizer", "iteration", "scaler", "images_seen", "metrics"]
    assert (content["scaler"]["scale"], content["images_seen"], content["metrics"]) == (1024.0, 1234567, METRICS)
    with safe_open(convert(one_process[0], tmp_path / "teacher.safetensors", "teacher"), framework="pt") as file:
        assert file.metadata().items() >= {"format": "pt", "contents": "teacher", "iteration": "7"}.items()


def test_a_published_training_checkpoint_can_be_converted(tmp_path: Path) -> None:
    """Names of blocks in chunks, an optimizer that numbers its parameters."""
    model = model_of_a_run()
    chunked = chunk_block_names(dict(model.state_dict()), depth=2, block_chunks=1)
    assert chunked.keys() != model.state_dict().keys()
    optimizer = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
    torch.save({"model": chunked, "optimizer": optimizer, "iteration": 3}, tmp_path / "published.pth")
    content = content_of(convert(tmp_path / "published.pth", tmp_path / "backbone.pth", "backbone"))
    assert_equal(content, dict(model.teacher.backbone.state_dict()))
    full = content_of(convert(tmp_path / "published.pth", tmp_path / "full.safetensors", "full"))
    assert torch.equal(full["optimizer.0.exp_avg"], torch.ones(2))


def test_a_released_backbone_can_be_converted(tmp_path: Path) -> None:
    state = dict(model_of_a_run().teacher.backbone.state_dict())
    torch.save(state, tmp_path / "released.pth")
    assert_equal(content_of(convert(tmp_path / "released.pth", tmp_path / "b.safetensors", "backbone")), state)


def test_tensors_that_share_memory_are_copied(tmp_path: Path) -> None:
    large = torch.randn(1000, 32)
    state = {"patch_embed.proj.weight": large[:4], "tied": large[:4], "transposed": large[4:8].t()}
    torch.save(state, tmp_path / "views.pth")
    for suffix in SUFFIXES:
        output = convert(tmp_path / "views.pth", tmp_path / f"parted{suffix}", "backbone")
        assert_equal(content_of(output), state)
        assert output.stat().st_size < large.nbytes / 4


def test_an_existing_file_is_replaced_only_by_force(
    one_process: tuple[Path, dict[str, Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "weights.pth"
    output.write_text("precious")
    words = ("convert", one_process[0], output, "--to", "teacher")
    assert error_of(capsys, *words) == (f"error: {output} exists already: give another name, or --force to replace it")
    assert output.read_text() == "precious"
    convert(one_process[0], output, "teacher", "--force")
    assert list(content_of(output)) == ["teacher"]


def test_a_file_can_replace_itself(one_process: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    output = convert(one_process[0], tmp_path / "weights.pth", "teacher")
    convert(output, output, "backbone", "--force")
    assert_equal(content_of(output), part(one_process[1], "model.teacher.backbone."))


@pytest.mark.parametrize(
    ("output", "words", "message"),
    [
        ("weights", [], "the suffix of .*weights indicates no format; known: .pth, .pt, .safetensors"),
        ("weights.bin", ["--format", "safetensors"], "the suffix of .*weights.bin indicates no format"),
        (
            "weights.pth",
            ["--format", "safetensors"],
            "--format safetensors but the suffix of .*.pth indicates torch",
        ),
        ("folder.pth", [], "folder.pth is a folder: give the name of a file in it"),
    ],
)
def test_a_suffix_that_readers_do_not_recognize_is_an_error(
    output: str,
    words: list[str],
    message: str,
    one_process: tuple[Path, dict[str, Tensor]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "folder.pth").mkdir()
    error = error_of(capsys, "convert", one_process[0], tmp_path / output, "--to", "teacher", *words)
    assert re.search(message, error), error
    assert [path.name for path in tmp_path.iterdir()] == ["folder.pth"]


def test_torch_files_may_have_any_other_suffix(one_process: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    output = convert(one_process[0], tmp_path / "weights.bin", "teacher", "--format", "torch")
    assert list(content_of(output)) == ["teacher"]


@pytest.mark.parametrize(
    ("held", "asked"), [("teacher", "student"), ("teacher", "full"), ("backbone", "teacher"), ("student", "teacher")]
)
def test_a_form_that_the_checkpoint_does_not_contain_is_an_error(
    held: str,
    asked: str,
    one_process: tuple[Path, dict[str, Tensor]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = convert(one_process[0], tmp_path / "source.safetensors", held)
    error = error_of(capsys, "convert", source, tmp_path / "output.pth", "--to", asked)
    name = "backbone" if held == "backbone" else f"{held} backbone"
    assert error.startswith(f"error: {source} does not hold what --to {asked} needs; it holds: {name}")
    assert not (tmp_path / "output.pth").exists()


def test_without_safetensors_the_error_says_what_to_install(
    one_process: tuple[Path, dict[str, Tensor]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = convert(one_process[0], tmp_path / "weights.safetensors", "teacher")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for words in (("inspect", output), ("convert", one_process[0], output, "--to", "teacher", "--force")):
        assert error_of(capsys, *words).endswith("pip install safetensors")
    convert(one_process[0], tmp_path / "weights.pth", "teacher")


def test_convert_prints_how_to_evaluate_the_file(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "my weights.pth"
    weights = f"--pretrained-weights '{output}' --output-dir '{tmp_path}/my weights/knn'"
    expected = f"--config-file {run}/config.yaml {weights} --train-dataset TRAIN"
    for source in (run, next(run.glob("eval/*/*.pth"))):
        convert(source, output, "teacher", "--force")
        assert f"python dinov2/run/eval/knn.py {expected}" in capsys.readouterr().out


@pytest.mark.parametrize("network", ["teacher", "student"])
def test_the_backbone_of_a_run_is_converted_for_other_libraries(
    network: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also with two heads in 32 channels, which the config of the run determines."""
    backbone = content_of(convert(run, tmp_path / f"{network}.pth", network))[network]
    expected = part(backbone, "backbone.")
    output = convert(run, tmp_path / "hf", "hf", "--checkpoint-key", network)
    assert "28 x 28 pixels: largest difference" in capsys.readouterr().out
    assert json.loads((output / "config.json").read_text())["num_attention_heads"] == 2
    assert_equal(read_state_dict(output), expected)


@pytest.mark.parametrize("source", ["eval/{}", "eval/{}/teacher_checkpoint.pth"])
def test_an_exported_teacher_has_the_settings_of_its_run(
    source: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two heads in 32 channels, which its tensors do not determine; they cannot be inferred elsewhere."""
    teacher = run / source.format(next((run / "eval").glob("training_*")).name)
    assert described(capsys, teacher)["width"] == "32, 2 blocks, 2 heads"
    output = convert(teacher, tmp_path / "model.pt2", "torch.export")
    images = torch.rand(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    found, _ = torch.export.load(output).module()(images)
    model = build_model(**config.backbone_arguments(config.load(run / "config.yaml"))).eval()
    load_backbone(model, str(teacher))
    torch.testing.assert_close(found, model(images), atol=1e-5, rtol=1e-5)


def test_a_config_beside_weights_that_no_run_wrote_is_not_read(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of the user may be called checkpoints, and the one above it have any config.yaml."""
    for folder in ("checkpoints", "eval"):
        (tmp_path / folder / "mine").mkdir(parents=True)
        shutil.copy(next(run.glob("eval/training_*/*.pth")), tmp_path / folder / "mine" / "weights.pth")
    (tmp_path / "config.yaml").write_text("some: thing\n")
    for folder in ("checkpoints", "eval"):
        assert "width" in described(capsys, tmp_path / folder / "mine" / "weights.pth", "--num-heads", "2")


def test_a_flag_that_does_not_apply_to_the_form_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("convert", tmp_path, tmp_path / "weights.pth", "--to")
    error = error_of(capsys, *words, "teacher", "--num-heads", "2")
    assert error.startswith("error: --num-heads does not apply to --to teacher, only to --to hf, timm, ")
    error = error_of(capsys, *words, "timm", "--format", "torch")
    assert error == "error: --format does not apply to --to timm, only to --to full, teacher, student, backbone"


# --- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_prints_what_is_in_a_checkpoint(
    one_process: tuple[Path, dict[str, Tensor]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = one_process
    model = model_of_a_run()
    found = described(capsys, folder.parent)
    assert (found["source"], found["iteration"], found["images seen"]) == (str(folder), "7", "1,234,567")
    assert (found["gradient scale"], found["last losses"]) == ("1024.0", "total_loss 8.5")
    assert found["written by"] == "1 process(es)"
    num_bytes = sum(path.stat().st_size for path in folder.iterdir())
    assert found["size on disk"].startswith(f"{num_bytes / 1e6:.1f} MB in 3 file(s)")
    for network in ("student", "teacher"):
        for name, module in model.get_submodule(network).items():
            count = sum(value.numel() for value in module.state_dict().values())
            assert found[f"{network} {name}"] == f"{count:,} parameters, float32"
    assert found["centers of the losses"] == "dino_loss.center 1 x 16, ibot_patch_loss.center 1 x 1 x 16"
    num_parameters = len(list(model.student.parameters()))
    assert found["optimizer state"] == f"exp_avg, exp_avg_sq, step of {num_parameters} tensors, float32"


def test_inspect_prints_the_architecture_of_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = described(capsys, run)
    assert (found["network"], found["width"]) == ("none of the published ones", "32, 2 blocks, 2 heads")
    assert found["positions"] == "4 x 4 patches, images of 28 pixels"


def test_inspect_prints_how_many_processes_wrote(
    two_processes: tuple[Path, dict[str, Tensor]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert described(capsys, two_processes[0])["written by"] == "2 process(es)"


@pytest.mark.parametrize("module", ["dinov2.tools", "dinov2.train.checkpoint", "dinov2.models.weights"])
def test_the_former_names_of_the_command_work(module: str, one_process: tuple[Path, dict[str, Tensor]]) -> None:
    command = [sys.executable, "-m", module, "inspect", str(one_process[0])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "") and "student backbone" in done.stdout


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_inspect_prints_what_is_in_a_file(
    suffix: str, one_process: tuple[Path, dict[str, Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = described(capsys, one_process[0])
    about_all = {"source", "size on disk", "written by"}
    full = described(capsys, convert(one_process[0], tmp_path / f"full{suffix}", "full"))
    assert {title: full[title] for title in full.keys() - about_all} == {
        title: whole[title] for title in whole.keys() - about_all
    }
    teacher = described(capsys, convert(one_process[0], tmp_path / f"teacher{suffix}", "teacher"))
    assert teacher.keys() - {"iteration"} == {"source", "size on disk", "teacher backbone", "teacher dino_head"} | {
        "optimizer state",
        "network",
    }
    assert teacher["teacher backbone"] == whole["teacher backbone"] and teacher["optimizer state"] == "none"
    backbone = described(capsys, convert(one_process[0], tmp_path / f"backbone{suffix}", "backbone"))
    assert backbone["backbone"] == whole["teacher backbone"]


def test_inspect_lists_every_tensor(
    one_process: tuple[Path, dict[str, Tensor]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", "--names", str(one_process[0])]) == 0
    listed = capsys.readouterr().out.partition("\n\n")[2].splitlines()
    assert {line.split()[0] for line in listed} == set(one_process[1])
    assert "model.teacher.backbone.patch_embed.proj.weight  32 x 3 x 7 x 7  float32" in listed
    assert "optimizer.student.backbone.norm.weight.step  scalar  float32" in listed


def test_any_file_of_tensors_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = {"fc": {"weight": torch.zeros(3, 2), "bias": torch.zeros(3).half()}, "epoch": 5, "metrics": [1.0]}
    torch.save(content, tmp_path / "other.pt")
    found = described(capsys, tmp_path / "other.pt")
    assert (found["epoch"], found["other tensors"]) == ("5", "2: fc")


def test_what_is_no_checkpoint_is_an_error_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"epoch": 5}, tmp_path / "empty.pth")
    torch.save({"weight": Unsafe(tmp_path / "made")}, tmp_path / "unsafe.pth")
    (tmp_path / "text.safetensors").write_text("no tensors")
    assert "empty.pth holds no tensors; it holds: epoch" in error_of(capsys, "inspect", tmp_path / "empty.pth")
    assert f"no checkpoint in {tmp_path}" in error_of(capsys, "inspect", tmp_path)
    assert f"no weights at {tmp_path}/absent" in error_of(capsys, "inspect", tmp_path / "absent")
    assert "text.safetensors is no checkpoint" in error_of(capsys, "inspect", tmp_path / "text.safetensors")
    assert main(["inspect", str(tmp_path / "unsafe.pth")]) == 1
    assert not (tmp_path / "made").exists()


def test_a_damaged_checkpoint_is_an_error_in_one_line_and_nothing_is_written(
    one_process: tuple[Path, dict[str, Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(one_process[0], tmp_path / "model_0000007")
    file = folder / "__0_0.distcp"
    file.write_bytes(bytes(file.stat().st_size))
    error = error_of(capsys, "convert", folder, tmp_path / "teacher.pth", "--to", "teacher")
    assert error.startswith(f"error: {file} is damaged")
    assert [path.name for path in tmp_path.iterdir()] == ["model_0000007"]


def test_a_closed_pipe_is_no_error(one_process: tuple[Path, dict[str, Tensor]]) -> None:
    reading, writing = os.pipe()
    os.close(reading)  # as `head` does when it has its lines
    command = [sys.executable, "-m", "dinov2.tools", "inspect", str(one_process[0])]
    try:
        done = subprocess.run(command, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
