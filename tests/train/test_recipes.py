"""Recipes that start from released weights, and those for one GPU: architecture, settings, cost, and a dry run."""

import re
from collections.abc import Iterator
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from test_preflight import PROCESSES
from tiny import ROOT, write_images

from dinov2 import config
from dinov2.models.backbones import build_published
from dinov2.models.published import PUBLISHED
from dinov2.train import train
from dinov2.train.preflight.checks import check_settings
from dinov2.train.preflight.dry_run import _flop
from dinov2.train.preflight.flops import step_flops
from dinov2.train.preflight.memory import estimate
from dinov2.train.schedules import global_batch_size, num_steps, scale_lr
from dinov2.train.ssl_meta_arch import SSLMetaArch

# Recipe -> published name.
CONTINUE = {f"train/continue_{name.removeprefix('dinov2_').replace('_reg', '_reg4')}": name for name in PUBLISHED}
ONE_GPU = ["train/vits14_1gpu", "train/vitb14_1gpu"]
HIGH_RESOLUTION = [f"train/vit{size}14_highres" for size in "sblg"]
DISTILLED = [f"train/vit{size}14_distilled" for size in "sbl"]
STAGES = [*HIGH_RESOLUTION, *DISTILLED, "train/vitl14_gram"]


def different(first: str, second: str) -> dict[str, Any]:
    """Keys of two recipes with other values, and the values of the second."""

    def flat(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for name, value in section.items():
            yield from flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]

    one, other = (dict(flat(asdict(config.load(name)))) for name in (first, second))
    return {key: value for key, value in other.items() if one[key] != value}


def meta_model(recipe: str, *overrides: str) -> SSLMetaArch:
    with torch.device("meta"):
        return SSLMetaArch(config.load(recipe, ["student.attention_backend=xformers", *overrides]))


def test_there_is_one_for_each_released_backbone() -> None:
    assert {name for name in config.packaged_names() if "continue" in name} == CONTINUE.keys()
    for recipe, name in CONTINUE.items():
        assert config.load(recipe).student.pretrained_weights == name


@pytest.mark.parametrize("recipe", [*CONTINUE, *ONE_GPU, *STAGES])
def test_the_header_says_what_how_long_what_to_expect_and_the_command(recipe: str) -> None:
    header = (files("dinov2") / "configs" / f"{recipe}.yaml").read_text(encoding="utf-8").partition("\ndino:")[0]
    assert all(f"# {word}:" in header for word in ("How long", "Expect", "Command"))
    assert f"--config-file {recipe} " in header and "not run at this size" in header
    cfg, batch = config.load(recipe), global_batch_size(config.load(recipe), PROCESSES[recipe])
    assert f"{num_steps(cfg):,} steps of {batch:,} images (" in header


@pytest.mark.parametrize("recipe", CONTINUE)
def test_the_network_is_the_released_one(recipe: str) -> None:
    """But for the position table, which is resampled to the crops of training."""
    with torch.device("meta"):
        released = build_published(CONTINUE[recipe])
    ours = meta_model(recipe).student_backbone
    shapes, wanted = ({name: v.shape for name, v in m.state_dict().items()} for m in (ours, released))
    assert shapes.pop("pos_embed") == (1, 257, released.embed_dim) and wanted.pop("pos_embed")
    assert shapes == wanted and ours.num_heads == released.num_heads
    for name in ("interpolate_offset", "interpolate_antialias", "num_register_tokens"):
        assert getattr(ours, name) == getattr(released, name)


def test_sizes_and_registers_differ_in_what_they_must() -> None:
    size = {"student.arch", "student.pretrained_weights"}
    heads = {"dino.head_n_prototypes", "ibot.head_n_prototypes"}
    batch = {"train.batch_size_per_gpu", "train.accumulate_steps"}
    small = "train/continue_vits14"
    assert different(small, "train/continue_vitb14").keys() == size | batch
    assert different(small, "train/continue_vitl14").keys() == size | heads | {"train.batch_size_per_gpu"}
    giant = {"student.ffn_layer", "student.drop_path_rate"}
    assert different(small, "train/continue_vitg14").keys() == size | heads | batch | giant
    for letter in "sblg":
        assert different(f"train/continue_vit{letter}14", f"train/continue_vit{letter}14_reg4") == {
            "student.pretrained_weights": f"dinov2_vit{letter}14_reg",
            "student.num_register_tokens": 4,
            "student.interpolate_antialias": True,
            "student.interpolate_offset": 0.0,
        }


@pytest.mark.parametrize("recipe", CONTINUE)
def test_the_values_of_the_published_recipe(recipe: str) -> None:
    """FINO, with its learning rate converted to the scaling rule of DINOv2."""
    cfg = config.load(recipe)
    optim, teacher, crops = cfg.optim, cfg.teacher, cfg.crops
    assert optim.base_lr == pytest.approx(4 * 5e-5) and optim.scaling_rule == "sqrt_wrt_1024"
    assert scale_lr(optim.base_lr, optim.scaling_rule, 3072) == pytest.approx(3.46e-4, rel=2e-3)
    assert (optim.layerwise_decay, optim.patch_embed_lr_mult, optim.clip_grad) == (0.9, 0.2, 3.0)
    assert optim.weight_decay == optim.weight_decay_end == 0.04
    assert optim.freeze_backbone_steps == optim.backbone_warmup_steps == 1000
    assert optim.freeze_backbone_except == "patch_embed"
    assert (teacher.momentum_teacher, teacher.final_momentum_teacher) == (0.994, 1)
    assert (teacher.warmup_teacher_temp, teacher.teacher_temp) == (0.04, 0.07)
    assert (crops.global_crops_size, crops.local_crops_size) == (224, 98)
    assert (crops.global_crops_scale, crops.local_crops_scale) == ((0.4, 1.0), (0.05, 0.4))
    assert cfg.ibot.separate_head and cfg.train.centering == "sinkhorn_knopp"
    rows = 2 * global_batch_size(cfg, PROCESSES[recipe])
    assert 10.6 < cfg.dino.head_n_prototypes / rows < 21.4, "between FINO and DINOv2"


@pytest.mark.parametrize("recipe", ["train/continue_vits14", "train/continue_vits14_reg4"])
def test_a_dry_run_from_published_weights(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a small folder of images; at full size, as the smallest model is fast enough."""
    registers = recipe.endswith("_reg4")
    folder = tmp_path / "weights" / "dinov2_vits14"
    folder.mkdir(parents=True)
    torch.save(
        build_published(CONTINUE[recipe]).state_dict(),
        folder / f"dinov2_vits14{'_reg4' if registers else ''}_pretrain.pth",
    )
    monkeypatch.setenv("DINOV2_WEIGHTS_URL", str(tmp_path / "weights"))
    images = write_images(tmp_path / "images", 20)
    words = ["--dry-run", "--config-file", recipe, "--output-dir", str(tmp_path / "out")]
    words += [f"train.dataset_path=ImageFolder:root={images}"]
    train.main(train.get_args_parser().parse_intermixed_args(words))
    out = capsys.readouterr().out
    assert re.search(rf"starts from +{CONTINUE[recipe]}\n", out)
    assert re.search(rf"step 0 +features of 8 images differ by up to \S+ from those of {CONTINUE[recipe]}\n", out)
    assert re.search(r"global batch +256 images \(64 x 1 processes x 4 micro-batches\)\n", out)
    assert re.search(r"peak learning rate +0\.0001 \(base_lr 0\.0002, sqrt_wrt_1024\)\n", out)
    assert re.search(r"recommended steps +3,000, .*: optim\.epochs=12 \(our rule", out)
    assert "note: 20 images are few: first evaluate" in out and "everything is in order but for 2 warning(s)" in out
    assert "warning: fp16 is slower than fp32 on a CPU" in out


@pytest.mark.parametrize("recipe", [recipe for recipe in [*CONTINUE, *ONE_GPU] if "vits14" not in recipe])
def test_the_others_pass_a_dry_run_without_the_weights(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--dry-run", "--config-file", recipe, "--output-dir", str(tmp_path / "out"), "student.pretrained_weights="]
    words += ["train.dataset_path=FashionMNIST:split=VAL", "student.attention_backend=xformers"]
    train.main(train.get_args_parser().parse_intermixed_args(words))
    assert "everything is in order" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", [*(recipe for recipe in CONTINUE if "_reg4" not in recipe), *ONE_GPU])
def test_the_costs_in_the_documentation_are_those_of_the_dry_run(recipe: str) -> None:
    cfg, model, number = config.load(recipe), meta_model(recipe), PROCESSES[recipe]
    steps, batch = num_steps(cfg), global_batch_size(cfg, number)
    compute = _flop(step_flops(cfg, model).total * steps * number)
    memory = estimate(cfg, model, number, min(number, 8)).memory / 2**30
    row = f"{steps:,} x {batch:,} | {cfg.optim.base_lr * (batch / 1024) ** 0.5:.2g} | {compute} | {memory:.0f} GiB |"
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert row in re.sub(r"\]\([^)]*\)|\[", "", text), f"{recipe}: {row}"


def test_the_overrides_in_the_documentation_fit_their_numbers_of_gpus() -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8").partition("\n## Small compute\n")[2]
    rows = re.findall(r"^\| ([\w ]*?) *\| (\d+) \| ([\d,]+) \| `(.*)` \|$", text, re.MULTILINE)
    assert [start for start, *_ in rows] == ["from weights", "", "", "random weights", "", ""]
    for index, (_, processes, images, overrides) in enumerate(rows):
        for recipe in ONE_GPU if index > 2 else ["train/continue_vits14", "train/continue_vitb14"]:
            cfg, number = config.load(recipe, overrides.split()), int(processes)
            assert global_batch_size(cfg, number) == int(images.replace(",", ""))
            assert check_settings(cfg, number) == []


# --- Later stages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", DISTILLED)
def test_the_published_values_of_distillation(recipe: str) -> None:
    """Paper, table 16; heads and crops are those of its teacher, train/vitg14."""
    cfg, teacher = config.load(recipe), config.load("train/vitg14")
    assert global_batch_size(cfg, PROCESSES[recipe]) == 2048 and num_steps(cfg) == 625_000
    assert scale_lr(cfg.optim.base_lr, cfg.optim.scaling_rule, 2048) == 1e-3
    assert cfg.optim.warmup_epochs * cfg.train.OFFICIAL_EPOCH_LENGTH == 100_000
    assert (cfg.optim.weight_decay, cfg.optim.weight_decay_end) == (0.04, 0.2)
    assert (cfg.teacher.momentum_teacher, cfg.teacher.final_momentum_teacher) == (0.994, 1.0)
    assert cfg.student.drop_path_rate == 0 and cfg.student.ffn_layer == "mlp"
    assert (cfg.dino, cfg.ibot, cfg.crops) == (teacher.dino, teacher.ibot, teacher.crops)


@pytest.mark.parametrize("recipe", HIGH_RESOLUTION)
def test_the_high_resolution_stage_continues_the_recipe_that_it_names(recipe: str) -> None:
    former = "train/vitg14" if recipe.endswith("vitg14_highres") else recipe.replace("highres", "distilled")
    cfg, before = config.load(recipe), config.load(former)
    assert num_steps(cfg) == 10_000 and cfg.crops.global_crops_size == 518
    assert (cfg.dino, cfg.ibot, cfg.student) == (before.dino, before.ibot, before.student)
    batch = global_batch_size(cfg, PROCESSES[recipe])
    assert batch == global_batch_size(before, PROCESSES[former])
    rate, former_rate = (scale_lr(each.optim.base_lr, each.optim.scaling_rule, batch) for each in (cfg, before))
    assert rate == pytest.approx(former_rate / 10)
    assert cfg.optim.warmup_epochs / cfg.optim.epochs == before.optim.warmup_epochs / before.optim.epochs


def test_gram_anchoring_has_the_values_of_dinov3() -> None:
    cfg, before = config.load("train/vitl14_gram"), config.load("train/vitl14")
    assert (cfg.gram.loss_weight, cfg.gram.rise_steps, cfg.gram.crops_scale) == (2.0, 1000, 2)
    assert (cfg.teacher.momentum_teacher, cfg.dino.local_crops_loss_weight) == (0.999, 0.5)
    assert cfg.student == before.student and cfg.ibot == before.ibot


@pytest.mark.parametrize("recipe", STAGES)
def test_a_stage_needs_the_run_before_it(recipe: str, tmp_path: Path) -> None:
    key = "distillation.teacher" if recipe in DISTILLED else "init_from"
    words = ["--dry-run", "--config-file", recipe, "--output-dir", str(tmp_path)]
    words += ["train.dataset_path=FashionMNIST:split=VAL", "student.attention_backend=xformers"]
    with pytest.raises(FileNotFoundError, match=f"{key}: (TEACHER|PRETRAINED)_RUN is not .* leaves it to you"):
        train.main(train.get_args_parser().parse_intermixed_args(words))
