"""Settings with which no run is any good are errors or warnings that name them; the recipes have none."""

import logging
import re
from argparse import Namespace
from pathlib import Path

import pytest
from tiny import run_train

from dinov2 import config
from dinov2.config import ConfigError
from dinov2.train.preflight.checks import check_device, check_settings
from dinov2.train.schedules import describe_schedules
from dinov2.train.stages.several_students import planned_runs

PROCESSES = {
    **{"train/vitl16_short": 32, "train/vitl14": 96, "train/vitg14": 256, "train/fashion_mnist": 1},
    **{"train/quickstart": 1, "train/vits14_1gpu": 1, "train/vitb14_1gpu": 1},
    **{f"train/vit{size}14_distilled": number for size, number in {"s": 32, "b": 32, "l": 64}.items()},
    **{f"train/vit{size}14_highres": number for size, number in {"s": 32, "b": 32, "l": 32, "g": 128}.items()},
    **{"train/vitl14_gram": 96, "train/vitsbl14_distilled": 64},
    **{f"train/continue_vit{size}14": number for size, number in {"s": 1, "b": 1, "l": 8, "g": 32}.items()},
    **{f"train/continue_vit{size}14_reg4": number for size, number in {"s": 1, "b": 1, "l": 8, "g": 32}.items()},
}


def warnings(*overrides: str, recipe: str = "train/fashion_mnist", world_size: int = 1) -> list[str]:
    return check_settings(config.load(recipe, overrides), world_size)


@pytest.mark.parametrize(("recipe", "world_size"), PROCESSES.items())
def test_recipes_are_silent_on_the_processes_they_are_made_for(recipe: str, world_size: int) -> None:
    runs = planned_runs(Namespace(config_file=recipe, output_dir="", opts=[]), world_size)
    assert [warning for run in runs for warning in check_settings(run.cfg, run.num_processes)] == []


def test_every_recipe_is_among_them() -> None:
    assert {name for name in config.packaged_names() if name.startswith("train/")} == PROCESSES.keys()


FP16 = "compute_precision.student.backbone.mixed_precision.param_dtype=fp16"

# The recipe takes 800 steps in 16 epochs, 64 images in a step, learning rate 0.0015, 16 patches a crop.
HARDLY_WANTED: list[tuple[list[str], str]] = [
    # longer than the run
    (["optim.warmup_epochs=16"], "optim.warmup_epochs = 16 is the whole run (optim.epochs = 16)"),
    (["optim.freeze_last_layer_epochs=16"], "optim.freeze_last_layer_epochs = 16 is the whole run"),
    (["optim.freeze_last_layer_epochs=999"], "optim.freeze_last_layer_epochs = 999 is the whole run"),
    (["optim.freeze_backbone_steps=800"], "optim.freeze_backbone_steps = 800 is the whole run of 800 steps"),
    (
        ["optim.freeze_backbone_steps=700", "optim.backbone_warmup_steps=100"],
        "optim.freeze_backbone_steps = 700, optim.backbone_warmup_steps = 100 last until the end of the run",
    ),
    (
        ["optim.freeze_backbone_steps=10"],
        "optim.layerwise_decay = 1: the patch embedding learns at nearly the rate of the new heads while the rest is",
    ),
    (
        ["init_from=/run", "optim.freeze_backbone_steps=10", "optim.freeze_backbone_except=none"],
        "optim.backbone_warmup_steps = 0: the heads come from init_from and are not new, so nothing need be frozen",
    ),
    (["teacher.warmup_teacher_temp_epochs=17"], "teacher.teacher_temp = 0.04 is never reached, it ends at 0.03941"),
    (["teacher.warmup_teacher_temp_epochs=16"], "teacher.teacher_temp = 0.04 is reached at the last step only"),
    (["train.checkpoint_period=801"], "train.checkpoint_period = 801 is longer than the run of 800 steps"),
    (["train.checkpoint_keep_every=900"], "train.checkpoint_keep_every = 900 is longer than the run of 800 steps"),
    (["train.checkpoint_keep_every=150"], "only the checkpoints of every 300 steps are kept for good"),
    (["health.knn_period=1000"], "health.knn_period = 1000 is longer than the run of 800 steps"),
    # learning rate and optimizer
    (["optim.min_lr=0.002"], "optim.min_lr = 0.002 is above the peak learning rate 0.0015"),
    (["optim.base_lr=0"], "optim.min_lr = 1e-06 is above the peak learning rate 0 (optim.base_lr = 0"),
    (["optim.base_lr=0", "optim.min_lr=0"], "optim.base_lr = 0, optim.min_lr = 0: nothing is learned"),
    (["optim.base_lr=4"], "the peak learning rate 4 (optim.base_lr = 4, optim.scaling_rule = none) is above 0.1"),
    (["optim.scaling_rule=sqrt_wrt_1024", "optim.base_lr=1"], "the peak learning rate 0.25 (optim.base_lr = 1"),
    (
        ["optim.layerwise_decay=0.1"],
        "optim.layerwise_decay = 0.1: ten blocks below the last one the learning rate is 1e-10",
    ),
    (["optim.weight_decay=40"], "optim.weight_decay = 40, optim.weight_decay_end = 0.1: at the peak"),
    (["optim.weight_decay_end=40"], "a step takes up to 6.0% of every weight"),
    (
        ["optim.adamw_beta1=0.999", "optim.adamw_beta2=0.9"],
        "optim.adamw_beta1 = 0.999 is above optim.adamw_beta2 = 0.9",
    ),
    ([FP16], "compute_precision.grad_scaler = false"),
    # teacher
    (["teacher.momentum_teacher=0.999"], "teacher.momentum_teacher = 0.999, teacher.final_momentum_teacher = 0.998"),
    (["teacher.momentum_teacher=0"], "below 0.5 the teacher is almost a copy of the student"),
    (["optim.epochs=2"], "after the 100 steps of the run 55% of the teacher are initial weights"),
    (
        ["teacher.momentum_teacher=1", "teacher.final_momentum_teacher=1"],
        "100% of the teacher are initial weights",
    ),
    (["teacher.warmup_teacher_temp=0.05"], "the temperature falls during its warm-up"),
    (["teacher.teacher_temp=0.1"], "teacher.teacher_temp = 0.1: targets must be sharper than predictions"),
    (["teacher.warmup_teacher_temp=2"], "teacher.warmup_teacher_temp = 2, teacher.teacher_temp = 0.04: targets must"),
    # batch
    (["train.batch_size_per_gpu=1"], "dino.koleo_loss_weight = 0.1 has no effect: with train.batch_size_per_gpu = 1"),
    (["train.batch_size_per_gpu=1"], "a step has one image"),
    (["dino.head_n_prototypes=65536"], "dino.head_n_prototypes = 65536: 512 to each of the 128 class tokens"),
    (["dino.head_n_prototypes=65536"], "dino.head_n_prototypes = 65536: 213 to each of the 307 masked patches"),
    (
        ["dino.head_n_prototypes=65536"],
        "a step has 64 images, where published recipes with 65,536 prototypes have 1,024",
    ),
    (
        ["ibot.separate_head=true", "ibot.head_n_prototypes=100000"],
        "ibot.head_n_prototypes = 100000: 326 to each of the 307 masked patches in a step of 64 images",
    ),
    # network and crops
    (["dino.head_hidden_dim=1"], "dino.head_hidden_dim = 1: only one number"),
    (["student.drop_path_rate=0.9"], "student.drop_path_rate = 0.9: an image skips 90% of the blocks"),
    (["augmentation.std=[0.2,0.2,0.005]"], "augmentation.std = [0.2, 0.2, 0.005]: pixels"),
    (
        ["crops.local_crops_size=35"],
        "crops.local_crops_size = 35, crops.global_crops_size = 28: local crops are larger",
    ),
    (["crops.local_crops_scale=[0.9,1]"], "crops.local_crops_scale = [0.9, 1], crops.global_crops_scale = [0.75, 1]"),
    (["crops.global_crops_scale=[0.0001,0.5]"], "crops.global_crops_scale = [0.0001, 0.5]: a crop of less than 0.001"),
    (["crops.local_crops_size=7"], "crops.local_crops_size = 7 is one patch (student.patch_size = 7)"),
    (["crops.global_crops_size=7", "ibot.loss_weight=0"], "crops.global_crops_size = 7 is one patch"),
    # pixels and health
    (["optim.clip_grad=1e-9"], "optim.clip_grad = 1e-09: gradients are clipped to the level of AdamW's epsilon"),
    (["augmentation.color_jitter=[40,40,20,0.1]"], "augmentation.color_jitter = [40, 40, 20, 0.1]: above 1"),
    (["ibot.mask_ratio_min_max=[1,1]"], "ibot.mask_ratio_min_max = [1, 1]: masked crops show too little"),
    (["health.best_by=knn", "health.knn_dataset=none"], "health.best_by = knn, health.knn_dataset = none: this is not"),
    (["health.best_by=cls_rank_me", "health.period=0"], "health.best_by = cls_rank_me, health.period = 0: this is not"),
    (["dino.loss_weight=0"], "crops.local_crops_number = 4 has no effect with dino.loss_weight = 0"),
]


@pytest.mark.parametrize(("overrides", "text"), HARDLY_WANTED)
def test_questionable_settings_are_warnings_with_keys_and_numbers(overrides: list[str], text: str) -> None:
    assert any(text in warning for warning in warnings(*overrides)), warnings(*overrides)


IBOT_HEAD = ["ibot.separate_head=true", "ibot.head_n_prototypes=128"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["optim.warmup_epochs=15", "optim.freeze_last_layer_epochs=15", "teacher.warmup_teacher_temp_epochs=15"],
        ["teacher.warmup_teacher_temp_epochs=99", "teacher.warmup_teacher_temp=0.04"],  # constant, whatever its length
        ["teacher.warmup_teacher_temp_epochs=0", "teacher.warmup_teacher_temp=2"],  # never used
        ["optim.min_lr=0.0015"],  # constant
        ["dino.head_n_prototypes=65536", "train.centering=centering", "train.accumulate_steps=4"],
        [*("dino.head_n_prototypes=1", "dino.loss_weight=0", "crops.local_crops_number=0"), *IBOT_HEAD],  # head unused
        ["crops.local_crops_number=0", "crops.local_crops_size=70", "crops.local_crops_scale=[1,1]"],
        ["crops.local_crops_size=28", "crops.local_crops_scale=[0.75,1]"],
        ["train.checkpoint_period=800", "train.checkpoint_keep_every=800", "health.knn_period=800"],
        ["augmentation.mean=[0,0,0]", "augmentation.std=[1,1,1]"],
        ["optim.clip_grad=0", "health.knn_dataset=none", "health.period=0", "ibot.mask_ratio_min_max=[0.1,1]"],
        ["health.best_by=cls_rank_me", "health.knn_dataset=none"],
        ["augmentation.color_jitter=[1,1,1,0.5]"],
        ["train.batch_size_per_gpu=1", "train.accumulate_steps=64", "dino.koleo_loss_weight=0"],
    ],
)
def test_what_is_unusual_but_sensible_is_silent(overrides: list[str]) -> None:
    assert warnings(*overrides) == []


def test_the_batch_of_all_processes_and_micro_batches_counts() -> None:
    words = ["dino.head_n_prototypes=65536", "ibot.loss_weight=0"]
    assert warnings(*words) != []
    assert warnings(*words, world_size=8) == warnings(*words, "train.accumulate_steps=8") == []


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["dino.head_n_prototypes=1"], "dino.head_n_prototypes = 1: the softmax over one prototype is 1"),
        (["ibot.separate_head=true", "ibot.head_n_prototypes=1"], "ibot.head_n_prototypes = 1"),
        (["dino.head_bottleneck_dim=1"], "dino.head_bottleneck_dim = 1: one number, scaled to unit length"),
        (["crops.global_crops_size=7"], "ibot.mask_ratio_min_max = [0.1, 0.5] of 1 patches"),
        (["ibot.mask_ratio_min_max=[0.01,0.05]"], "masks none, which leaves nothing for ibot.loss_weight = 1"),
        (
            ["train.batch_size_per_gpu=4", "ibot.mask_sample_probability=0.1"],
            "ibot.mask_sample_probability = 0.1 of 8 global crops (train.batch_size_per_gpu = 4) masks none",
        ),
    ],
)
def test_what_can_teach_nothing_is_an_error(overrides: list[str], text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        warnings(*overrides)


def test_a_run_logs_its_warnings_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        run_train(tmp_path, "optim.epochs=1", "optim.freeze_last_layer_epochs=1", "health.period=0")
    (message,) = [message for message in caplog.messages if "freeze_last_layer" in message]
    assert message.startswith("optim.freeze_last_layer_epochs = 1 is the whole run (optim.epochs = 1)")
    assert message in (tmp_path / "logs" / "log.txt").read_text()


@pytest.mark.parametrize(
    ("overrides", "name", "text"),
    [
        ([], "learning rate", "0 at step 0, 0.0015 at step 99, 1.008e-06 at step 799"),
        (["optim.warmup_epochs=0"], "learning rate", "0.0015 at step 0, 1.006e-06 at step 799"),
        (["optim.warmup_epochs=16"], "learning rate", "0 at step 0, 0.0015 at step 799, 0.0015 at step 799"),
        (["optim.min_lr=0.1"], "learning rate", "0 at step 0, 0.1 at step 799, 0.1 at step 799"),
        ([], "teacher temperature", "0.03 to 0.04 at step 199, then constant"),
        (["teacher.warmup_teacher_temp_epochs=0"], "teacher temperature", "0.04"),
        (["teacher.warmup_teacher_temp_epochs=16"], "teacher temperature", "0.03 to 0.04 at step 799, then constant"),
        (["teacher.warmup_teacher_temp_epochs=32"], "teacher temperature", "0.03 to 0.035; 0.04 is not reached"),
        ([], "last layer of the heads", "learns from step 0"),
        (["optim.freeze_last_layer_epochs=1"], "last layer of the heads", "learns from step 50"),
        (["optim.freeze_last_layer_epochs=16"], "last layer of the heads", "never learns"),
        (["optim.freeze_backbone_steps=999"], "backbone", "never learns"),
        (
            ["optim.freeze_backbone_steps=200", "optim.backbone_warmup_steps=200"],
            "backbone",
            "learns from step 200 (frozen before but for its patch embedding), at the rate of the heads from step 400; "
            "highest 0.0009173 at step 400",
        ),
        ([], "weight decay", "0.04 to 0.1"),
        (["optim.epochs=2"], "teacher momentum", "0.99 to 0.997998"),
    ],
)
def test_what_schedules_reach_within_the_run(overrides: list[str], name: str, text: str) -> None:
    cfg = config.load("train/fashion_mnist", overrides)
    assert describe_schedules(cfg, cfg.optim.base_lr)[name] == text


def test_half_precision_on_a_cpu_is_warned_of_with_the_overrides() -> None:
    (warning,) = check_device(config.load("train/vitl16_short"))
    assert (
        "compute_precision.{student,teacher}.{backbone,dino_head,ibot_head}.mixed_precision.param_dtype=fp32" in warning
    )
    places = [f"{side}.{part}" for side in ("student", "teacher") for part in ("backbone", "dino_head", "ibot_head")]
    in_fp32 = [f"compute_precision.{place}.mixed_precision.param_dtype=fp32" for place in places]
    assert check_device(config.load("train/vitl16_short", in_fp32)) == []
