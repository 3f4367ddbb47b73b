"""Checks for combinations of valid settings that make a training run useless or questionable.

Settings with which nothing can be learned are errors, questionable ones are warnings. Unlike the checks of
`config.load`, these are done before training only, so that results of earlier runs can still be evaluated.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from operator import attrgetter

from dinov2 import distributed
from dinov2.config import Config, ConfigError, Dino, Ibot, has_masks, sources_of
from dinov2.data.datasets.base import ImageDataset
from dinov2.loss import DINOLoss
from dinov2.train.preflight.memory import masked_patches_per_image
from dinov2.train.schedules import build_schedules, checkpoint_period, global_batch_size, scale_lr
from dinov2.train.ssl_meta_arch import NUM_GLOBAL_CROPS
from dinov2.train.training_run import uses_fp16

# Limits. Published recipes are far from them: the numbers in parentheses.
SMALL_BATCH, MANY_PROTOTYPES = 256, 65_536  # images of a step; the published number
MAX_PROTOTYPES_PER_ROW = 64  # of Sinkhorn-Knopp (21); with 512, targets are nearly uniform and nothing is learned
MAX_LEARNING_RATE = 0.1  # of AdamW, which changes weights by about the rate per step (at most 0.006)
MAX_DECAY_PER_STEP = 0.02  # weight decay per step, as a fraction of the weight (at most 0.002)
MIN_MOMENTUM = 0.5  # of the teacher; below it the teacher is almost a copy of the student
MAX_INITIAL_SHARE = 0.5  # fraction of initial weights in the teacher at the end of a run (below 0.01)
MAX_FREE_RATE = 0.5  # of the patch embedding of a frozen backbone, relative to the heads (0.05)
MAX_DROP_PATH = 0.75  # fraction of blocks that an image skips (at most 0.4)
MIN_LAYERWISE_DECAY = 0.5  # with it the rate ten blocks below the last one is a thousandth (at least 0.9)
MIN_CLIP_GRAD = 1e-3  # with it gradients of 100 million weights are near AdamW's epsilon of 1e-8 (3)
MAX_MASK_RATIO = 0.9  # fraction of masked patches common to all masked crops (0.1 to 0.5)
MAX_JITTER = 1.0  # of brightness, contrast and saturation (at most 0.4)
MIN_STD = 0.01  # standard deviation of pixels in [0, 1]; 8-bit levels differ by 0.004
MIN_SCALE = 0.001  # area of a crop as a fraction of the image: 7 x 7 of 224 x 224 pixels


def check_settings(cfg: Config, world_size: int) -> list[str]:
    """Warnings of questionable combinations of settings, one line each; a ConfigError if nothing can be learned."""
    lr = scale_lr(cfg.optim.base_lr, cfg.optim.scaling_rule, global_batch_size(cfg, world_size))
    cfg = replace(cfg, optim=replace(cfg.optim, lr=lr))
    if problems := [*_useless_heads(cfg), *_no_masks(cfg)]:
        raise ConfigError("\n".join(problems))
    return [
        *_longer_than_the_run(cfg),
        *_learning_rate(cfg),
        *_optimizer(cfg),
        *_teacher_average(cfg),
        *_temperature(cfg),
        *_batch(cfg, world_size),
        *_network(cfg),
        *_crops(cfg),
        *_pixels(cfg),
        *_health(cfg),
        *_frozen_backbone(cfg),
    ]


def check_device(cfg: Config) -> list[str]:
    """A warning of a precision that the device of this process computes very slowly."""
    if distributed.device().type != "cpu" or not uses_fp16(cfg):
        return []
    keys = "compute_precision.{student,teacher}.{backbone,dino_head,ibot_head}.mixed_precision.param_dtype"
    return [f"fp16 is slower than fp32 on a CPU, up to a hundred times: {keys}=fp32 (bash makes six overrides of it)"]


def check_images(cfg: Config, dataset: ImageDataset) -> list[str]:
    """A warning if more of the sampled images cannot be read than the run tolerates."""
    survey = dataset.survey()
    if len(survey.unreadable) <= cfg.train.max_bad_image_share * max(survey.num_sampled, 1):
        return []
    return [
        f"{len(survey.unreadable)} of {survey.num_sampled} images sampled cannot be read: the run stops once the share "
        f"of such images is above train.max_bad_image_share={cfg.train.max_bad_image_share:g}"
    ]


def _set(cfg: Config, *keys: str) -> str:
    """Format settings, such as `optim.epochs = 10, optim.warmup_epochs = 2`."""

    def text(value: object) -> str:
        if isinstance(value, tuple):
            return f"[{', '.join(map(text, value))}]"
        return f"{value:g}" if isinstance(value, float) else str(value) or "''"

    return ", ".join(f"{key} = {text(attrgetter(key)(cfg))}" for key in keys)


def _heads(cfg: Config) -> dict[str, Dino | Ibot]:
    """Config sections of the heads that are trained."""
    separate = cfg.ibot.loss_weight > 0 and cfg.ibot.separate_head
    heads: dict[str, Dino | Ibot] = {"ibot": cfg.ibot} if separate else {}
    return heads if separate and cfg.dino.loss_weight <= 0 else {"dino": cfg.dino, **heads}


# --- Nothing can be learned ------------------------------------------------------------------------------------------


def _useless_heads(cfg: Config) -> Iterator[str]:
    for section, head in _heads(cfg).items():
        if head.head_n_prototypes == 1:
            yield f"{_set(cfg, f'{section}.head_n_prototypes')}: the softmax over one prototype is 1 for every image"
        if head.head_bottleneck_dim == 1:
            yield f"{_set(cfg, f'{section}.head_bottleneck_dim')}: one number, scaled to unit length, has no gradient"


def _no_masks(cfg: Config) -> Iterator[str]:
    if not has_masks(cfg):
        return
    crops = NUM_GLOBAL_CROPS * cfg.train.batch_size_per_gpu
    patches = (cfg.crops.global_crops_size // cfg.student.patch_size) ** 2
    consequence = f"masks none, which leaves nothing for {_set(cfg, 'ibot.loss_weight')}"
    if int(crops * cfg.ibot.mask_sample_probability) == 0:
        of = _set(cfg, "train.batch_size_per_gpu")
        yield f"{_set(cfg, 'ibot.mask_sample_probability')} of {crops} global crops ({of}) {consequence}"
    if patches * max(cfg.ibot.mask_ratio_min_max) <= 1:
        of = _set(cfg, "crops.global_crops_size", "student.patch_size")
        yield f"{_set(cfg, 'ibot.mask_ratio_min_max')} of {patches} patches of a global crop ({of}) {consequence}"


# --- Questionable settings -------------------------------------------------------------------------------------------


def _longer_than_the_run(cfg: Config) -> Iterator[str]:
    epochs, steps, run = cfg.optim.epochs, cfg.optim.epochs * cfg.train.OFFICIAL_EPOCH_LENGTH, _set(cfg, "optim.epochs")
    if cfg.optim.warmup_epochs == epochs:
        yield f"{_set(cfg, 'optim.warmup_epochs')} is the whole run ({run}): the learning rate rises until the end"
    if cfg.optim.freeze_last_layer_epochs >= epochs:
        yield f"{_set(cfg, 'optim.freeze_last_layer_epochs')} is the whole run ({run}): the prototypes never learn"
    if (frozen := cfg.optim.freeze_backbone_steps) >= steps:
        yield f"{_set(cfg, 'optim.freeze_backbone_steps')} is the whole run of {steps} steps: the backbone never learns"
    elif frozen + cfg.optim.backbone_warmup_steps >= steps:
        keys = _set(cfg, "optim.freeze_backbone_steps", "optim.backbone_warmup_steps")
        yield f"{keys} last until the end of the run of {steps} steps: the backbone never learns at the full rate"
    teacher = cfg.teacher
    if teacher.warmup_teacher_temp_epochs >= epochs and teacher.warmup_teacher_temp != teacher.teacher_temp:
        reached = build_schedules(cfg, cfg.optim.lr).teacher_temp[steps - 1]
        warmup, wanted = _set(cfg, "teacher.warmup_teacher_temp_epochs"), _set(cfg, "teacher.teacher_temp")
        if teacher.warmup_teacher_temp_epochs > epochs:
            yield f"{warmup} is longer than the run ({run}): {wanted} is never reached, it ends at {reached:.4g}"
        else:
            yield f"{warmup} is the whole run ({run}): {wanted} is reached at the last step only"
    for key, consequence in {
        "train.checkpoint_period": "the only checkpoint is that of the last step",
        "train.checkpoint_keep_every": "no checkpoint is kept for good",
        "health.knn_period": "k-NN is measured at the start, with teacher checkpoints and at the end only",
    }.items():
        if (attrgetter(key)(cfg) or 0) > steps:
            yield f"{_set(cfg, key)} is longer than the run of {steps} steps: {consequence}"
    period, kept = checkpoint_period(cfg), cfg.train.checkpoint_keep_every
    if kept % period and kept <= steps:
        every = f"only the checkpoints of every {math.lcm(kept, period)} steps are kept for good"
        yield f"{_set(cfg, 'train.checkpoint_keep_every')} is not a multiple of the period of {period} steps: {every}"


def _peak(cfg: Config) -> str:
    rule = _set(cfg, "optim.base_lr", "optim.scaling_rule")
    return f"the peak learning rate {cfg.optim.lr:.3g} ({rule})"


def _learning_rate(cfg: Config) -> Iterator[str]:
    lr, min_lr = cfg.optim.lr, cfg.optim.min_lr
    if lr == min_lr == 0:
        yield f"{_set(cfg, 'optim.base_lr', 'optim.min_lr')}: nothing is learned"
    elif min_lr > lr:
        yield f"{_set(cfg, 'optim.min_lr')} is above {_peak(cfg)}: the rate rises to it until the end"
    if lr > MAX_LEARNING_RATE:
        yield f"{_peak(cfg)} is above {MAX_LEARNING_RATE}: AdamW diverges"
    if (decay := cfg.optim.layerwise_decay) < MIN_LAYERWISE_DECAY:
        below = f"ten blocks below the last one the learning rate is {decay**10:.1g} of its"
        yield f"{_set(cfg, 'optim.layerwise_decay')}: {below}"


def _optimizer(cfg: Config) -> Iterator[str]:
    optim = cfg.optim
    decayed = max(optim.lr, optim.min_lr) * max(optim.weight_decay, optim.weight_decay_end)
    if decayed > MAX_DECAY_PER_STEP:
        keys = _set(cfg, "optim.weight_decay", "optim.weight_decay_end")
        yield f"{keys}: at {_peak(cfg)} a step takes up to {decayed:.1%} of every weight"
    if 0 < (optim.clip_grad or 0) < MIN_CLIP_GRAD:
        yield f"{_set(cfg, 'optim.clip_grad')}: gradients are clipped to the level of AdamW's epsilon; 0 = no limit"
    if optim.adamw_beta1 > optim.adamw_beta2:
        yield f"{_set(cfg, 'optim.adamw_beta1')} is above {_set(cfg, 'optim.adamw_beta2')}: swapped?"
    precision = "compute_precision.student.backbone.mixed_precision.param_dtype"
    if attrgetter(precision)(cfg) == "fp16" and not cfg.compute_precision.grad_scaler:
        yield f"compute_precision.grad_scaler = false, {_set(cfg, precision)}: small gradients become zero"


def _teacher_average(cfg: Config) -> Iterator[str]:
    first, final = cfg.teacher.momentum_teacher, cfg.teacher.final_momentum_teacher
    steps = cfg.optim.epochs * cfg.train.OFFICIAL_EPOCH_LENGTH
    keys = _set(cfg, "teacher.momentum_teacher", "teacher.final_momentum_teacher")
    if final < first:
        yield f"{keys}: the teacher moves more at the end than at the start; swapped?"
    if min(first, final) < MIN_MOMENTUM:
        yield f"{keys}: below {MIN_MOMENTUM} the teacher is almost a copy of the student"
    initial_share = ((first + final) / 2) ** steps  # the mean of the cosine schedule
    if initial_share > MAX_INITIAL_SHARE:
        yield f"{keys}: after the {steps} steps of the run {initial_share:.0%} of the teacher are initial weights"


def _temperature(cfg: Config) -> Iterator[str]:
    teacher, keys = cfg.teacher, _set(cfg, "teacher.warmup_teacher_temp", "teacher.teacher_temp")
    first = teacher.warmup_teacher_temp if teacher.warmup_teacher_temp_epochs else teacher.teacher_temp
    if first > teacher.teacher_temp:
        yield f"{keys}: the temperature falls during its warm-up; swapped?"
    of_student = DINOLoss(out_dim=1).student_temp
    if max(first, teacher.teacher_temp) >= of_student:
        yield f"{keys}: targets must be sharper than predictions (temperature {of_student:g}), or all become equal"


def _batch(cfg: Config, world_size: int) -> Iterator[str]:
    batch, per_process = global_batch_size(cfg, world_size), _set(cfg, "train.batch_size_per_gpu")
    if cfg.dino.koleo_loss_weight > 0 and cfg.train.batch_size_per_gpu < 2:
        yield f"{_set(cfg, 'dino.koleo_loss_weight')} has no effect: with {per_process} an image has no neighbor"
    if batch < 2:
        yield f"a step has one image ({per_process}, 1 process), without others to compare with"
    prototypes = max((head.head_n_prototypes for head in _heads(cfg).values()), default=0)
    if batch < SMALL_BATCH and prototypes >= MANY_PROTOTYPES and not (cfg.distillation.teacher or sources_of(cfg)):
        yield (
            f"{per_process}: a step has {batch} images, where published recipes with {prototypes:,} prototypes have "
            "1,024 or more; scaled down without changes they learn next to nothing: see docs/training.md, When the "
            "batch is small, and train/vits14_1gpu"
        )
    if cfg.train.centering != "sinkhorn_knopp":
        return
    rows: dict[str, tuple[str, float]] = {}
    if cfg.dino.loss_weight > 0:
        rows["class tokens"] = "dino", NUM_GLOBAL_CROPS * batch
    if cfg.ibot.loss_weight > 0:
        rows["masked patches"] = "ibot" if cfg.ibot.separate_head else "dino", masked_patches_per_image(cfg) * batch
    for name, (section, number) in rows.items():
        key = f"{section}.head_n_prototypes"
        if (per_row := attrgetter(key)(cfg) / number) > MAX_PROTOTYPES_PER_ROW:
            yield (
                f"{_set(cfg, key)}: {per_row:.0f} to each of the {number:.0f} {name} in a step of {batch} images; "
                f"above {MAX_PROTOTYPES_PER_ROW} (published: 21) sinkhorn_knopp makes targets nearly uniform; fewer "
                "prototypes, a larger batch or train.centering=centering help"
            )


def _network(cfg: Config) -> Iterator[str]:
    for section, head in _heads(cfg).items():
        if head.head_hidden_dim == 1 and head.head_nlayers > 1:
            yield f"{_set(cfg, f'{section}.head_hidden_dim')}: only one number per image reaches the prototypes"
    if cfg.gram.loss_weight > 0 and not (cfg.gram.teacher or cfg.gram.teacher_step or sources_of(cfg)):
        yield f"{_set(cfg, 'gram.teacher_step')}: the Gram teacher is the untrained network"
    if cfg.distillation.teacher and cfg.student.drop_path_rate > 0:
        yield f"{_set(cfg, 'student.drop_path_rate')}: the published distillation has no stochastic depth"
    if (rate := cfg.student.drop_path_rate) > MAX_DROP_PATH:
        mean = rate if cfg.student.drop_path_uniform else rate / 2
        yield f"{_set(cfg, 'student.drop_path_rate')}: an image skips {mean:.0%} of the blocks"


def _health(cfg: Config) -> Iterator[str]:
    health = cfg.health
    needed = {"health.period": health.period == 0}
    if health.best_by == "knn":
        needed |= {"health.knn_period": health.knn_period == 0, "health.knn_dataset": health.knn_dataset == "none"}
    if health.best_by == "patch_knn_miou":
        needed |= {"health.knn_period": health.knn_period == 0, "health.dense_dataset": not health.dense_dataset}
    missing = [key for key, is_off in needed.items() if is_off]
    if health.best_by != "auto" and missing:
        yield f"{_set(cfg, 'health.best_by', *missing)}: this is not measured, so no best teacher is selected"
    off = [key for key in ("health.period", "health.knn_period") if attrgetter(key)(cfg) == 0]
    if health.dense_dataset and off:
        yield f"{_set(cfg, 'health.dense_dataset', *off)}: k-NN of patches is not measured"


def _frozen_backbone(cfg: Config) -> Iterator[str]:
    optim = cfg.optim
    if not optim.freeze_backbone_steps:
        return
    if optim.freeze_backbone_except != "none" and optim.patch_embed_lr_mult * optim.layerwise_decay > MAX_FREE_RATE:
        keys = _set(cfg, "optim.freeze_backbone_except", "optim.patch_embed_lr_mult", "optim.layerwise_decay")
        yield f"{keys}: the patch embedding learns at nearly the rate of the new heads while the rest is frozen"
    key = next(iter(sources_of(cfg)), "student.pretrained_weights")
    if key != "student.pretrained_weights":
        keys = _set(cfg, "optim.freeze_backbone_steps", "optim.backbone_warmup_steps")
        yield f"{keys}: the heads come from {key} and are not new, so nothing need be frozen; set both to 0"


def _pixels(cfg: Config) -> Iterator[str]:
    if min(cfg.augmentation.std) < MIN_STD:
        yield f"{_set(cfg, 'augmentation.std')}: pixels in [0, 1] are divided by less than {MIN_STD}"
    if max(cfg.augmentation.color_jitter) > MAX_JITTER:
        yield f"{_set(cfg, 'augmentation.color_jitter')}: above {MAX_JITTER:g} many crops are black, white or garish"
    if has_masks(cfg) and min(cfg.ibot.mask_ratio_min_max) > MAX_MASK_RATIO:
        yield f"{_set(cfg, 'ibot.mask_ratio_min_max')}: masked crops show too little to predict the rest from"


def _crops(cfg: Config) -> Iterator[str]:
    crops, number = cfg.crops, _set(cfg, "crops.local_crops_number")
    for kind in ["global", "local"] if crops.local_crops_number > 0 else ["global"]:
        size, scale = f"crops.{kind}_crops_size", f"crops.{kind}_crops_scale"
        if attrgetter(size)(cfg) == cfg.student.patch_size:
            yield f"{_set(cfg, size)} is one patch ({_set(cfg, 'student.patch_size')})"
        if min(attrgetter(scale)(cfg)) < MIN_SCALE:
            yield f"{_set(cfg, scale)}: a crop of less than {MIN_SCALE} of an image has only a few pixels"
    if crops.local_crops_number == 0:
        return
    if cfg.dino.loss_weight <= 0:
        yield f"{number} has no effect with {_set(cfg, 'dino.loss_weight')}: local crops take time without any effect"
    if crops.local_crops_size > crops.global_crops_size:
        keys = "crops.local_crops_size", "crops.global_crops_size"
        yield f"{_set(cfg, *keys)}: local crops are larger than global ones; swapped?"
    if sum(crops.local_crops_scale) > sum(crops.global_crops_scale):
        keys = "crops.local_crops_scale", "crops.global_crops_scale"
        yield f"{_set(cfg, *keys)}: local crops show more of an image than global ones; swapped?"
