"""A run from weights begins with the features of its source, or does not begin."""

import logging
from pathlib import Path

import pytest
import torch
from tiny import metrics, run_train, tiny_config, tiny_model

from dinov2.data import make_dataset
from dinov2.hub import backbones
from dinov2.models import build_model
from dinov2.models.published import PUBLISHED, published_settings
from dinov2.train.start.initial_weights import InitialWeights, load_initial_weights
from dinov2.train.start.step_zero import check_step_zero

SMALL = ("student.embed_dim=64", "student.num_heads=1")


def backbone(**settings: object) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    known = {"embed_dim": 64, "depth": 2, "num_heads": 1, "patch_size": 7, "img_size": 70, "init_values": 1.0}
    return build_model("vit_small", **known | settings).state_dict()


def checked(path: Path, *words: str) -> str:
    settings = (*SMALL, f"student.pretrained_weights={path}", *words)
    cfg = tiny_config(*settings)
    model = tiny_model(*settings, seed=1)
    loaded = load_initial_weights(model, cfg)
    return check_step_zero(model, cfg, make_dataset(dataset_str=cfg.train.dataset_path), loaded)


def saved(state: dict[str, torch.Tensor], path: Path) -> Path:
    torch.save(state, path)
    return path


def test_the_features_of_weights_for_larger_images_are_those_of_their_own_model(tmp_path: Path) -> None:
    text = checked(saved(backbone(), tmp_path / "weights.pth"))
    assert text.startswith("features of 8 images differ by up to ") and float(text.split()[8]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_so_are_those_of_a_file_in_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {name: value.to(dtype) for name, value in backbone().items()}
    assert checked(saved(state, tmp_path / "weights.pth")).startswith("features of 8 images differ by up to ")


def test_features_that_are_not_finite_start_no_run(tmp_path: Path) -> None:
    weights = saved(backbone(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"features of 8 images are NaN or infinite.*augmentation.std=\[1e-40"):
        checked(weights, "augmentation.std=[1.0e-40,1.0e-40,1.0e-40]")


def test_what_is_approximated_is_said_with_its_similarity(tmp_path: Path) -> None:
    weights = saved(backbone(patch_size=14, img_size=140), tmp_path / "weights.pth")
    text = checked(weights, "student.num_register_tokens=2")
    assert text.startswith("approximated (patch size 14 -> 7, registers 0 -> 2); mean cosine similarity to ")
    similarities = [float(part.split(" (")[0]) for part in text.rpartition(": ")[2].split(", ")]
    assert len(similarities) == 2 and all(0.3 < value < 1 for value in similarities)


def test_other_features_than_those_of_the_source_start_no_run(tmp_path: Path) -> None:
    state = backbone()
    cfg = tiny_config(*SMALL, f"student.pretrained_weights={saved(state, tmp_path / 'weights.pth')}")
    model = tiny_model(*SMALL, seed=1)
    load_initial_weights(model, cfg)
    with torch.no_grad():
        model.teacher["backbone"].blocks[1].ls2.gamma[5] += 0.01
    dataset = make_dataset(dataset_str=cfg.train.dataset_path)
    with pytest.raises(ValueError, match="KEY: features of 8 images differ by up to .* nothing was trained"):
        check_step_zero(model, cfg, dataset, InitialWeights("KEY", "SOURCE", state, None))


def test_settings_that_change_published_features_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of heads and the resampling of positions are not in the tensors."""
    serve_published(tmp_path, monkeypatch, "dinov2_vits14")
    words = (*VITS, "student.pretrained_weights=dinov2_vits14", "student.interpolate_offset=0.0")
    with pytest.raises(ValueError, match="student.pretrained_weights: features.*offset = 0.0, there 0.1"):
        run_train(tmp_path / "run", *words)
    assert not (tmp_path / "run" / "training_metrics.json").exists()


VITS = ("student.embed_dim=null", "student.depth=null", "student.num_heads=null", "student.patch_size=14")
VITS += ("crops.global_crops_size=56", "crops.local_crops_size=28", "optim.epochs=1", "train.batch_size_per_gpu=2")


def serve_published(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Random weights with the names and shapes of a published file, in a folder that stands for the server."""
    arch, registers = PUBLISHED[name]
    torch.manual_seed(7)
    stem = name.removesuffix("_reg")
    path = folder / "mirror" / stem / f"{stem}{'_reg4' if registers else ''}_pretrain.pth"
    path.parent.mkdir(parents=True)
    torch.save(build_model(arch, **published_settings(arch, registers=registers)).state_dict(), path)
    monkeypatch.setenv("DINOV2_WEIGHTS_URL", str(folder / "mirror"))


@pytest.mark.parametrize("registers", [False, True])
def test_a_published_name_starts_a_run_whose_teacher_is_the_hub_model(
    registers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    name = "dinov2_vits14_reg" if registers else "dinov2_vits14"
    serve_published(tmp_path, monkeypatch, name)
    words = [*VITS, f"student.pretrained_weights={name}"]
    if registers:
        words += [f"student.{key}" for key in ("num_register_tokens=4", "interpolate_antialias=true")]
        words += ["student.interpolate_offset=0.0"]
    with caplog.at_level(logging.INFO):
        run_train(tmp_path / "run", *words)
    assert "step 0: features of 8 images differ by up to" in caplog.text
    assert metrics(tmp_path / "run")[0]["iteration"] == -1
    state = torch.load(tmp_path / "run" / "eval" / "start" / "teacher_checkpoint.pth")["teacher"]
    state = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    arch, _ = PUBLISHED[name]
    small = build_model(arch, **published_settings(arch, registers=registers) | {"img_size": 56})
    small.load_state_dict(state)
    images = torch.randn(2, 3, 56, 56)
    hub = getattr(backbones, name)()
    torch.testing.assert_close(small.eval()(images), hub.eval()(images), rtol=1e-5, atol=1e-5)
