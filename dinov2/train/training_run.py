"""What a training run consists of besides its networks: dataset, loader, optimizer, metrics and checkpoints.

All of it is opened, built or restored here, before the first step.
"""

import logging
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dinov2 import config, distributed
from dinov2.config import DTYPES, Config, ConfigError, has_masks
from dinov2.data import DataAugmentationDINO, MaskingGenerator, make_dataset
from dinov2.data.collate import Batch
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.device_augment import RawBatch
from dinov2.data.images import ImageOptions
from dinov2.data.loader import make_train_loader
from dinov2.data.masking import published_max_num_patches
from dinov2.data.samplers import SamplerType
from dinov2.files import numbered_path, remove_leftovers
from dinov2.meters import MetricLogger
from dinov2.metrics_file import read_records, truncate_metrics
from dinov2.trackers import Tracker, open_trackers
from dinov2.train.checkpoint_files.folder import latest_checkpoint
from dinov2.train.checkpoint_files.state import Setup
from dinov2.train.environment import record_environment
from dinov2.train.monitor.starting_point import START, forget_start
from dinov2.train.optim import build_optimizer
from dinov2.train.parallel import parallelize
from dinov2.train.schedules import checkpoint_period, global_batch_size, num_steps
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.start.initial_weights import load_initial_weights, network_changes
from dinov2.train.start.source_runs import weights_of_run
from dinov2.train.start.step_zero import check_step_zero

if TYPE_CHECKING:  # its import takes long, so it is imported where it is used
    from dinov2.train.checkpoint import Checkpointer

logger = logging.getLogger(__name__)

METRICS_FILE = "training_metrics.json"

OUTPUTS = (
    *("checkpoints", "eval", "health", "training_metrics.json", "config.yaml", "environment.json", "report.html"),
    *("tensorboard", "wandb", "wandb_run_id"),
)
"""The outputs of a run in its folder, besides the log."""

# --- Data ------------------------------------------------------------------------------------------------------------


def open_dataset(cfg: Config, *, resume: bool) -> tuple[Config, ImageDataset]:
    """Open the dataset of a training run; returns it, and the configuration with what was measured of its pixels.

    This is their range, None for images of 8 bits, and the normalization of bands. All processes have the same.
    `resume`: reuse what an earlier run in the same folder measured on the same dataset.
    """
    if resume and (former := _former_measures(cfg)):
        logger.info("pixel values are mapped and normalized as in the run so far (OUTPUT/config.yaml)")
        cfg = former
    options = ImageOptions(**vars(cfg.images))
    dataset = make_dataset(dataset_str=cfg.train.dataset_path, image_options=options)
    found = dataset.survey().normalization() if config.is_normalization_missing(cfg) else None
    value_range, found = distributed.all_gather_object((dataset.image_options.value_range, found))[0]
    dataset.image_options = dataset.image_options.with_range(value_range)
    cfg = replace(cfg, images=replace(cfg.images, value_range=value_range))
    if found is not None:
        mean, std = (", ".join(f"{value:.4f}" for value in values) for values in found)
        logger.info("bands in [0, 1]: mean %s, standard deviation %s (augmentation.mean, .std set them)", mean, std)
        cfg = replace(cfg, augmentation=replace(cfg.augmentation, mean=found[0], std=found[1]))
    elif config.is_normalization_missing(cfg):
        path, reason = next(iter(dataset.survey().unreadable), ("", "none has a finite value"))
        raise ValueError(
            f"train.dataset_path={cfg.train.dataset_path}: mean and standard deviation of the bands cannot be measured "
            f"on {dataset.survey().num_sampled} images: {path}: {reason}"
        )
    return cfg, dataset


def _former_measures(cfg: Config) -> Config | None:
    """The configuration with what the run in the output folder measured and is not given; None without checkpoints."""
    output = Path(cfg.train.output_dir)
    if latest_checkpoint(output / "checkpoints") is None:
        return None
    try:
        former = config.load(output / "config.yaml")
    except (ConfigError, OSError):  # resuming reports a damaged one
        return None
    if (former.train.dataset_path, former.images.bands) != (cfg.train.dataset_path, cfg.images.bands):
        return None
    found = cfg
    if cfg.images.value_range is None and former.images.value_range is not None:
        found = replace(found, images=replace(cfg.images, value_range=former.images.value_range))
    if config.is_normalization_missing(cfg):
        mean, std = former.augmentation.mean, former.augmentation.std
        found = replace(found, augmentation=replace(cfg.augmentation, mean=mean, std=std))
    return found if found != cfg else None


def build_loader(
    cfg: Config, dataset: ImageDataset, images_seen: int, while_waiting: Callable[[], object] | None = None
) -> Iterable[Batch] | Iterable[RawBatch]:
    """Build the loader of endless micro-batches of this process after `images_seen` images; for `to_device`."""
    crops, patch_size = cfg.crops, cfg.student.patch_size
    augmentation = DataAugmentationDINO(
        crops.global_crops_scale,
        crops.local_crops_scale,
        crops.local_crops_number,
        crops.global_crops_size,
        crops.local_crops_size,
        gram_crops_size=cfg.gram.crops_scale * crops.global_crops_size if cfg.gram.loss_weight > 0 else 0,
        **asdict(cfg.augmentation),
    )
    side = crops.global_crops_size // patch_size
    return make_train_loader(
        dataset,
        augmentation=augmentation,
        batch_size=cfg.train.batch_size_per_gpu,
        num_workers=cfg.train.num_workers,
        augment_on=cfg.train.augment_on,
        sampler=SamplerType[cfg.train.sampler],
        seed=cfg.train.seed,
        start_position=images_seen,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        patience=cfg.train.data_timeout,
        while_waiting=while_waiting,
        mask_generator=MaskingGenerator(
            (side, side), max_num_patches=published_max_num_patches(crops.global_crops_size, patch_size)
        ),
        mask_ratio_tuple=cfg.ibot.mask_ratio_min_max,
        mask_probability=cfg.ibot.mask_sample_probability if has_masks(cfg) else 0.0,
        dtype=DTYPES[cfg.compute_precision.student.backbone.mixed_precision.param_dtype],
    )


# --- State -----------------------------------------------------------------------------------------------------------


@dataclass
class TrainingRun:
    """The state of a run besides its networks: what steps update and checkpoints restore."""

    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    metrics: MetricLogger
    checkpointer: "Checkpointer"
    setup: Setup  # processes and data
    step: int  # last finished step; -1 before the first one
    images_seen: int  # by all processes so far
    from_weights: bool  # whether it begins now, from weights

    def save(self, *, wait: bool) -> None:
        """Write a checkpoint of the last finished step, with `wait` until it is complete, else in the background."""
        progress = {"images_seen": self.images_seen, "metrics": self.metrics.state_dict()}
        self.checkpointer.save(self.step, progress | self.setup._asdict())
        self.checkpointer.finish(wait=wait)


def start_or_resume(cfg: Config, model: SSLMetaArch, dataset: ImageDataset, *, resume: bool) -> TrainingRun:
    """Prepare training from the latest checkpoint if there is one and `resume`, else from the initial weights.

    The networks are parallelized. Outputs of an earlier run that is not resumed are archived.
    """
    output_dir = Path(cfg.train.output_dir)
    if distributed.is_main():
        remove_leftovers(output_dir, OUTPUTS)
    latest = distributed.from_main(lambda: latest_checkpoint(output_dir / "checkpoints")) if resume else None
    from_weights = False
    if latest is None:
        from_weights = start_from_weights(cfg, model, dataset)
        if not resume or distributed.from_main(lambda: has_lost_checkpoints(cfg)):
            archive_run(output_dir)
        if distributed.is_main():
            forget_start(output_dir)
    model.load_frozen(resuming=latest is not None)
    for name, fact in model.stage_facts().items():
        logger.info("%s: %s", name, fact)
    optimizer = parallelize_and_build_optimizer(cfg, model.train())
    scaler = torch.amp.GradScaler(distributed.device().type, enabled=uses_fp16(cfg))
    from dinov2.train.checkpoint import Checkpointer

    checkpointer = Checkpointer(
        output_dir / "checkpoints",
        model,
        optimizer,
        scaler,
        period=checkpoint_period(cfg),
        last_step=num_steps(cfg) - 1,
        keep=cfg.train.checkpoint_keep,
        keep_every=cfg.train.checkpoint_keep_every,
    )
    metrics = MetricLogger(
        "  ",
        output_dir / METRICS_FILE,
        is_main=distributed.is_main(),
        mean_over_processes=distributed.all_reduce_mean,
        hidden=("wd", "mom", "last_layer_lr", "backbone_lr", "current_batch_size", "teacher_temp"),
        scheduled=("lr",),
    )
    global_batch = global_batch_size(cfg, distributed.world_size())
    setup = Setup(distributed.world_size(), global_batch, len(dataset), dataset.fingerprint())
    first_step, images_seen, changes = resume_run(cfg, latest, checkpointer, metrics, setup)
    if latest is not None:
        model.check_frozen()
    elif cfg.init_from and cfg.init_from_optimizer:
        start_with_moments(cfg.init_from, checkpointer)
    if distributed.is_main() and first_step < num_steps(cfg):
        record_environment(output_dir, first_step, data=cfg.train.dataset_path, changes="; ".join(changes) or None)
    logger.info("%d of %d steps are done; %d images each", first_step, num_steps(cfg), global_batch)
    return TrainingRun(optimizer, scaler, metrics, checkpointer, setup, first_step - 1, images_seen, from_weights)


def start_with_moments(source: str, checkpointer: "Checkpointer") -> None:
    """Load the moments of the optimizer from the run that the weights come from."""
    folder = weights_of_run(source)
    if not folder.is_dir():
        raise ValueError(f"init_from_optimizer: {source} has no checkpoints, so the state of its optimizer is lost")
    number = checkpointer.load_moments(folder)
    total = sum(len(group["params"]) for group in checkpointer.optimizer.param_groups)
    logger.info("the optimizer continues from %s for %d of %d parameters", folder, number, total)


def start_from_weights(cfg: Config, model: SSLMetaArch, dataset: ImageDataset) -> bool:
    """Load the initial weights of the configuration and check them; returns whether there are any."""
    loaded = load_initial_weights(model, cfg)
    if loaded is not None:
        check_step_zero(model, cfg, dataset, loaded)
    return loaded is not None


def parallelize_and_build_optimizer(cfg: Config, model: SSLMetaArch) -> torch.optim.AdamW:
    """Parallelize student and teacher in place, and build the optimizer of the student's then sharded parameters."""
    parallelize(
        model.student,
        model.teacher,
        cfg.compute_precision,
        frozen=model.frozen_networks,
        shared=model.shared_networks,
        block_chunks=cfg.student.block_chunks,
        activation_checkpointing=cfg.train.activation_checkpointing,
        compile_blocks=cfg.train.compile,
    )
    return build_optimizer(
        model.student,
        betas=(cfg.optim.adamw_beta1, cfg.optim.adamw_beta2),
        lr_decay_rate=cfg.optim.layerwise_decay,
        patch_embed_lr_mult=cfg.optim.patch_embed_lr_mult,
        freeze_backbone_except=cfg.optim.freeze_backbone_except,
    )


def open_run_trackers(cfg: Config, *, first_step: int) -> AbstractContextManager[list[Tracker] | None]:
    """The experiment trackers of a run, on rank 0."""
    return distributed.on_main(
        open_trackers(
            **asdict(cfg.tracking), output_dir=Path(cfg.train.output_dir), start=first_step, config=config.to_dict(cfg)
        )
    )


def resume_run(
    cfg: Config, latest: Path | None, checkpointer: "Checkpointer", metrics: MetricLogger, setup: Setup
) -> tuple[int, int, list[str]]:
    """Restore the latest checkpoint, if there is one.

    Changed settings, data and processes are logged as warnings. Config and metrics on disk are replaced only after that
    succeeded. Returns the next step, the number of images seen before it, and the changed settings.
    """
    config_file = Path(cfg.train.output_dir) / "config.yaml"
    start, images_seen, changes = 0, 0, list[str]()
    if latest is not None:
        check_same_stage(config_file, cfg)
        changes = changed_settings(config_file, cfg)
        try:
            state = checkpointer.load(latest, needed=("images_seen", "metrics"))
        except ValueError as error:
            if others := network_changes(changes):
                raise ValueError(f"{error} Settings there -> here: {'; '.join(others)}") from error
            raise
        for title, changed in (
            ("with other settings than before", changes),
            ("on other data or processes than before", setup.changes_since(state)),
        ):
            if changed:
                logger.warning("resuming %s: %s", title, "; ".join(changed))
        metrics.load_state_dict(state["metrics"])
        start, images_seen = state["iteration"] + 1, state["images_seen"]
        check_length_so_far(start, cfg)
    if distributed.is_main():
        config.save(cfg, config_file)
        first = START if latest is None else start  # the starting model is measured anew, too
        truncate_metrics(config_file.with_name(METRICS_FILE), first)
    return start, images_seen, changes


def check_same_stage(former: Path, cfg: Config) -> None:
    """Raise a ValueError for settings that cannot change within a run: bands, and what its stage is."""
    try:
        before = config.load(former)
    except (ConfigError, OSError):  # `changed_settings` reports it
        return
    values: dict[str, Callable[[Config], object]] = {
        **{f"images.{key}": attrgetter(f"images.{key}") for key in ("bands", "bands_axis", "pages")},
        "distillation.teacher": lambda each: bool(each.distillation.teacher),
        "gram.loss_weight": lambda each: each.gram.loss_weight > 0,
        "gram.teacher": lambda each: each.gram.teacher,
    }
    for key, value in values.items():
        if value(before) != value(cfg):
            then, now = (attrgetter(key)(each) for each in (before, cfg))
            raise ValueError(
                f"the run in {former.parent} was trained with {key} = {_text(then)}, not {_text(now)}, and cannot go "
                "on with that: give the same, or another --output-dir, for a stage of its own"
            )


def _text(value: Any) -> str:
    return str(list(value) if isinstance(value, tuple) else value) or "''"


def check_length_so_far(steps_done: int, cfg: Config) -> None:
    """Raise a ValueError if the run in the output folder has more steps already than it shall have."""
    if steps_done > num_steps(cfg):
        raise ValueError(
            f"the run in {cfg.train.output_dir} has {steps_done:,} steps already, more than the {num_steps(cfg):,} of "
            f"optim.epochs = {cfg.optim.epochs} and train.OFFICIAL_EPOCH_LENGTH = {cfg.train.OFFICIAL_EPOCH_LENGTH}; "
            "nothing was changed. Give its own length or a larger one to resume it, another --output-dir for another "
            "run, or --no-resume to start anew here"
        )


def changed_settings(former: Path, cfg: Config) -> list[str]:
    """Changes since the config file of a run, "optim.epochs: 2 -> 4"; none, with a warning, if it cannot be read."""
    if not former.exists():
        return []
    try:
        return config.differences(config.load(former), cfg)
    except (ValueError, OSError) as error:
        logger.warning("cannot compare settings, %s is replaced: %s", former, error)
        return []


def uses_fp16(cfg: Config) -> bool:
    """Whether gradients need scaling, which only fp16 with its small range does."""
    student = cfg.compute_precision.student
    dtypes = {module.mixed_precision.param_dtype for module in (student.backbone, student.dino_head, student.ibot_head)}
    return cfg.compute_precision.grad_scaler and "fp16" in dtypes


# --- Earlier runs in the same folder ---


def has_lost_checkpoints(cfg: Config) -> bool:
    """Whether the earlier run in the output folder has no checkpoints, but once had some; logs a warning if so.

    They were deleted, or are on a disk that is not mounted. A run that was stopped within two periods of checkpoints,
    and wrote no teachers, may have had none.
    """
    output_dir = Path(cfg.train.output_dir)
    records = read_records(output_dir / METRICS_FILE)
    newest = int(records[-1]["iteration"]) if records else START
    try:
        former = config.load(output_dir / "config.yaml")
    except (ValueError, OSError):
        former = cfg
    has_teachers = any((output_dir / "eval").glob("training_*"))
    if not has_teachers and newest < min(2 * checkpoint_period(former), num_steps(former) - 1):
        return False
    logger.warning(
        "there is no checkpoint in %s, but the metrics of an earlier run go to step %d%s",
        output_dir / "checkpoints",
        newest,
        ", and there are its teachers" if has_teachers else "",
    )
    return True


def archive_run(output_dir: Path) -> None:
    """Move the outputs of an earlier run to `OUT/earlier.<n>`, so that they are neither mixed nor lost."""
    former = [path for name in OUTPUTS if (path := output_dir / name).exists()]
    if distributed.is_main() and former:
        archive = numbered_path(output_dir / "earlier")
        archive.mkdir()
        for path in former:
            path.rename(archive / path.name)
        logger.warning("starting anew: the outputs of an earlier run are now in %s", archive)
    distributed.barrier()
