"""Configuration: a typed schema, and the loading of YAML files and overrides to a ``Config``.

The dataclasses below define every key and its type; attribute names are the YAML keys. Default values, meanings and
units are in ``configs/ssl_default_config.yaml`` only. A loaded ``Config`` is immutable.

    cfg = load("train/vitl16_short", ["train.dataset_path=ImageNet:split=TRAIN:root=/data", "optim.epochs=10"])
"""

import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, is_dataclass
from difflib import SequenceMatcher, get_close_matches
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, cast, get_args, get_origin, get_type_hints

import torch

from dinov2 import yaml_values
from dinov2.files import atomic_write

logger = logging.getLogger(__name__)


class ConfigError(ValueError):
    """An invalid configuration; the message names the key, the value, the choices and where it was set."""


# --- Types of values -------------------------------------------------------------------------------------------------


class Limit(NamedTuple):
    """A condition on a value, and its text in error messages."""

    text: str
    holds: Callable[[Any], bool]


Count = Annotated[int, Limit("at least 0", lambda n: n >= 0)]
Seed = Annotated[int, Limit("from 0 to 2^64 - 1", lambda n: 0 <= n < 2**64)]
Size = Annotated[int, Limit("at least 1", lambda n: n >= 1)]
LabeledImages = Annotated[int, Limit("at least 32", lambda n: n >= 32)]
DenseImages = Annotated[int, Limit("at least 16", lambda n: n >= 16)]
Real = Annotated[float, Limit("finite", math.isfinite)]
NotNegative = Annotated[float, Limit("at least 0", lambda x: 0 <= x < math.inf)]
Positive = Annotated[float, Limit("above 0", lambda x: 0 < x < math.inf)]
Probability = Annotated[float, Limit("from 0 to 1", lambda x: 0 <= x <= 1)]
DropRate = Annotated[float, Limit("at least 0 and below 1", lambda x: 0 <= x < 1)]
PositiveShare = Annotated[float, Limit("above 0 and at most 1", lambda x: 0 < x <= 1)]
_SCALE = "as pixels are in [0, 1]: divide by 255 if computed on a scale of 0 to 255"
PixelMean = Annotated[float, Limit(f"from 0 to 1, {_SCALE}", lambda x: 0 <= x <= 1)]
HueShift = Annotated[float, Limit("from 0 to 0.5, half of the hue circle", lambda x: 0 <= x <= 0.5)]
PixelStd = Annotated[float, Limit(f"above 0 and at most 1, {_SCALE}", lambda x: 0 < x <= 1)]

_ASCENDING = Limit("the smaller one first", lambda pair: pair[0] <= pair[1])
AreaRange = Annotated[tuple[PositiveShare, PositiveShare], _ASCENDING]
PositiveRange = Annotated[tuple[Positive, Positive], _ASCENDING]
ProbabilityRange = Annotated[tuple[Probability, Probability], _ASCENDING]

Level = Annotated[int, Limit("from 0 to 255", lambda n: 0 <= n <= 255)]
ValueRange = Annotated[tuple[Real, Real], Limit("the smaller one first", lambda pair: pair[0] < pair[1])]
ValueRanges = Annotated[tuple[ValueRange, ...], Limit("one for each band", lambda ranges: len(ranges) > 0)]
Bands = Annotated[tuple[Count, ...], Limit("one or more", lambda bands: len(bands) > 0)]

Precision = Literal["fp32", "fp16", "bf16"]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


# --- Schema ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weights:
    WEIGHTS: str


@dataclass(frozen=True)
class MixedPrecision:
    param_dtype: Precision
    reduce_dtype: Precision
    buffer_dtype: Precision


@dataclass(frozen=True)
class ModulePrecision:
    sharding_strategy: Literal["NO_SHARD", "SHARD_GRAD_OP", "FULL_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2"]
    mixed_precision: MixedPrecision


@dataclass(frozen=True)
class NetworkPrecision:
    backbone: ModulePrecision
    dino_head: ModulePrecision
    ibot_head: ModulePrecision


@dataclass(frozen=True)
class ComputePrecision:
    grad_scaler: bool
    teacher: NetworkPrecision
    student: NetworkPrecision


@dataclass(frozen=True)
class Dino:
    loss_weight: Real
    head_n_prototypes: Size
    head_bottleneck_dim: Size
    head_nlayers: Size
    head_hidden_dim: Size
    koleo_loss_weight: Real
    local_crops_loss_weight: Positive


@dataclass(frozen=True)
class Ibot:
    loss_weight: Real
    mask_sample_probability: Probability
    mask_ratio_min_max: ProbabilityRange
    separate_head: bool
    head_n_prototypes: Size
    head_bottleneck_dim: Size
    head_nlayers: Size
    head_hidden_dim: Size


@dataclass(frozen=True)
class Train:
    batch_size_per_gpu: Size
    accumulate_steps: Size
    dataset_path: str
    output_dir: str
    saveckp_freq: int
    seed: Seed
    num_workers: Count
    augment_on: Literal["cpu", "device"]
    OFFICIAL_EPOCH_LENGTH: Size
    cache_dataset: bool
    centering: Literal["centering", "sinkhorn_knopp"]
    sampler: Literal[
        "GLOBAL_ORDER", "SHARD_ORDER", "SHARDED_INFINITE", "SHARDED_INFINITE_NEW", "INFINITE", "EPOCH", "DISTRIBUTED"
    ]
    activation_checkpointing: Literal["none", "selective", "full"]
    compile: bool
    checkpoint_period: Size | None
    checkpoint_keep: Size
    checkpoint_keep_every: Count
    log_period: Size
    log_published_losses: bool
    max_nonfinite_steps: Size
    max_bad_image_share: Probability
    data_timeout: Count


@dataclass(frozen=True)
class Student:
    arch: str
    patch_size: Size
    embed_dim: Size | None
    depth: Size | None
    num_heads: Size | None
    mlp_ratio: Positive | None
    drop_path_rate: DropRate
    layerscale: NotNegative | None
    drop_path_uniform: bool
    pretrained_weights: str
    ffn_layer: Literal["mlp", "swiglu", "swiglufused", "identity"]
    block_chunks: Count
    qkv_bias: bool
    proj_bias: bool
    ffn_bias: bool
    num_register_tokens: Count
    interpolate_antialias: bool
    interpolate_offset: Real
    attention_backend: Literal["auto", "xformers", "varlen", "sdpa"]
    init_std: Positive
    pos_embed_std: Positive


@dataclass(frozen=True)
class Teacher:
    momentum_teacher: Probability
    final_momentum_teacher: Probability
    warmup_teacher_temp: Positive
    teacher_temp: Positive
    warmup_teacher_temp_epochs: Count


@dataclass(frozen=True)
class Distillation:
    teacher: str
    students: tuple[str, ...]
    global_batch_size: Count


@dataclass(frozen=True)
class Gram:
    loss_weight: NotNegative
    start_step: Count
    rise_steps: Count
    teacher: str
    teacher_step: Count
    refresh_period: Count
    max_refreshes: Count
    crops_scale: Size


@dataclass(frozen=True)
class Optim:
    epochs: Size
    weight_decay: NotNegative
    weight_decay_end: NotNegative
    base_lr: NotNegative
    lr: NotNegative
    warmup_epochs: Count
    min_lr: NotNegative
    clip_grad: NotNegative | None
    freeze_last_layer_epochs: Count
    freeze_backbone_steps: Count
    freeze_backbone_except: Literal["none", "patch_embed", "patch_embed_and_registers"]
    backbone_warmup_steps: Count
    scaling_rule: Literal["sqrt_wrt_1024", "linear_wrt_256", "linear_wrt_1024", "none"]
    patch_embed_lr_mult: NotNegative
    layerwise_decay: PositiveShare
    adamw_beta1: DropRate
    adamw_beta2: DropRate


@dataclass(frozen=True)
class Crops:
    global_crops_scale: AreaRange
    local_crops_number: Count
    local_crops_scale: AreaRange
    global_crops_size: Size
    local_crops_size: Size


@dataclass(frozen=True)
class Augmentation:
    aspect_ratio: PositiveRange
    flip_probability: Probability
    color_jitter: tuple[NotNegative, NotNegative, NotNegative, HueShift]
    color_jitter_probability: Probability
    grayscale_probability: Probability
    blur_probabilities: tuple[Probability, Probability, Probability]
    blur_sigma: PositiveRange
    solarize_probability: Probability
    implementation: Literal["tensor", "pil"]
    mean: tuple[PixelMean, ...]
    std: tuple[PixelStd, ...]


@dataclass(frozen=True)
class Images:
    bands: Bands | None
    shown_bands: Bands | None
    bands_axis: Literal["auto", "first", "last"]
    nodata: Real | None
    pages: Literal["first", "bands", "images"]
    value_range: ValueRange | ValueRanges | None
    max_pixels: Size
    max_file_size: Size
    background: tuple[Level, Level, Level] | None


@dataclass(frozen=True)
class Evaluation:
    eval_period_iterations: int


@dataclass(frozen=True)
class Health:
    period: Count
    probe_images: Size
    knn_period: Count | None
    knn_images: LabeledImages
    knn_dataset: str
    dense_dataset: str
    dense_images: DenseImages
    best_by: Literal["auto", "knn", "patch_knn_miou", "cls_rank_me", "patch_rank_me"]


@dataclass(frozen=True)
class Tracking:
    tensorboard: bool
    wandb_project: str
    wandb_name: str
    wandb_mode: Literal["online", "offline"]


@dataclass(frozen=True)
class Config:
    MODEL: Weights
    init_from: str
    init_from_optimizer: bool
    compute_precision: ComputePrecision
    dino: Dino
    ibot: Ibot
    train: Train
    student: Student
    teacher: Teacher
    distillation: Distillation
    gram: Gram
    optim: Optim
    crops: Crops
    augmentation: Augmentation
    images: Images
    evaluation: Evaluation
    health: Health
    tracking: Tracking


# --- Loading and saving ----------------------------------------------------------------------------------------------


class _Source(NamedTuple):
    name: str  # as it appears in messages: "train/vitl14.yaml", "override 'optim.epochs=1'"
    values: dict[str, Any]  # checked, by dotted key


def load(file: str | Path | None = None, overrides: Sequence[str] = (), *, recipe: str | None = None) -> Config:
    """Load the defaults, then a file, then overrides; later values replace earlier ones, lists as a whole.

    Args:
        file: YAML file, or the name of a packaged one such as ``train/vitl16_short``; None: the defaults only.
        overrides: Texts ``dotted.key=value``, split at the first ``=``. For keys of type text the value is taken
            literally, and quotes around it are an error; for other keys it is YAML without comments.
        recipe: File of one of `distillation.students`, loaded before ``file``, which is for all of them.

    Raises:
        FileNotFoundError: There is neither such a file nor such a packaged name.
        ConfigError: YAML or an override is malformed, a key is unknown, or values are invalid or contradictory.
    """
    sources = _sources(file, overrides)
    if recipe is not None:
        for source in sources:
            for key in source.values:
                if key == "train.batch_size_per_gpu":
                    raise ConfigError(f"{key}: it follows from distillation.global_batch_size (in {source.name})")
                if key.startswith("student."):
                    raise ConfigError(f"{key}: several students have it from the recipes of each (in {source.name})")
        found = _find(recipe)
        sources.insert(0, _check(_read(found), str(found)))
    return _merge(sources)


def load_students(file: str | Path | None = None, overrides: Sequence[str] = ()) -> tuple[str, ...]:
    """The value of `distillation.students` alone: the other keys may be in the recipes of these. Errors as `load`."""
    values: dict[str, Any] = {}
    for source in _sources(file, overrides):
        values |= source.values
    return cast(tuple[str, ...], values.get("distillation.students", ()))


def _sources(file: str | Path | None, overrides: Sequence[str]) -> list[_Source]:
    sources = []
    if file is not None:
        found = _find(file)
        sources.append(_check(_read(found), str(found)))
    _check_datasets_once(overrides)
    return sources + [_check(_parse_override(word), f"override {word!r}") for word in overrides]


def _check_datasets_once(overrides: Sequence[str]) -> None:
    """Raise an error for two values of a dataset string, which a shell makes of braces without quotes."""
    values: dict[str, str] = {}
    for word in overrides:
        key, _, value = word.partition("=")
        if (
            key.endswith(("_dataset", "dataset_path"))
            and key != "train.cache_dataset"
            and values.setdefault(key, value) != value
        ):
            raise ConfigError(
                f"{key} is given twice, {values[key]} and {value}: put quotes around a value with braces, such as "
                f"'{key}=Tar:files=/data/{{0..9}}.tar'"
            )


def from_dict(mapping: Mapping[str, Any], source: str = "mapping") -> Config:
    """Build a configuration from a nested mapping, which errors call `source`, and the defaults; errors as `load`."""
    return _merge([_check(mapping, source)])


def to_dict(cfg: Config) -> dict[str, Any]:
    """Convert to nested dicts and lists, with all keys in the order of the schema."""
    return asdict(cfg, dict_factory=lambda items: {k: list(v) if type(v) is tuple else v for k, v in items})


def to_yaml(cfg: Config) -> str:
    """Format all keys as YAML; ``load`` restores ``cfg`` from it."""
    return yaml_values.dump(to_dict(cfg))


def save(cfg: Config, path: str | Path) -> None:
    """Write all keys as YAML, atomically; ``load(path) == cfg``."""
    with atomic_write(Path(path)) as file:
        file.write(to_yaml(cfg).encode())


def channels_of(cfg: Config) -> int:
    """Number of channels of the images."""
    return 3 if cfg.images.bands is None else len(cfg.images.bands)


def is_normalization_missing(cfg: Config) -> bool:
    """Whether mean and standard deviation are still those of red, green and blue, but images have other channels."""
    return channels_of(cfg) != 3 and len(cfg.augmentation.mean) == len(cfg.augmentation.std) == 3


def require_rgb(cfg: Config, task: str) -> None:
    """Raise a ConfigError unless images have three channels."""
    if channels_of(cfg) != 3:
        raise ConfigError(f"images.bands = {list(cfg.images.bands or ())}: {task} takes images of three channels only")


def require_normalization(cfg: Config) -> None:
    """Raise a ConfigError if mean and standard deviation of the bands are not known."""
    if is_normalization_missing(cfg):
        raise ConfigError(
            f"images.bands = {list(cfg.images.bands or ())}: augmentation.mean and augmentation.std of these bands are "
            "not given: use the config.yaml of the training run, or measure them by python -m dinov2.data.statistics"
        )


def has_masks(cfg: Config) -> bool:
    """Whether the student's global crops are masked."""
    return cfg.ibot.loss_weight > 0 and not cfg.distillation.teacher


def of_run(weights: str | Path) -> Config | None:
    """The configuration of the run that wrote a teacher, `OUT/eval/*`, or a checkpoint; None for other weights."""
    found = file_of_run(weights)
    return load(found) if found else None


def file_of_run(weights: str | Path) -> Path | None:
    """The file with `of_run`: `OUT/config.yaml`."""
    path = Path(weights).absolute()
    folder = path.parent if path.is_file() else path
    is_teacher = folder.parent.name == "eval" and (folder / "teacher_checkpoint.pth").is_file()
    is_checkpoint = folder.parent.name == "checkpoints" and folder.name.startswith("model_")
    found = folder.parent.parent / "config.yaml"
    return found if (is_teacher or is_checkpoint) and found.is_file() else None


def backbone_arguments(cfg: Config) -> dict[str, Any]:
    """Arguments of `dinov2.models.build_model` for the teacher's backbone; None is the default of the architecture."""
    arguments = asdict(cfg.student)
    for key in ("pretrained_weights", "drop_path_rate"):
        del arguments[key]
    arguments["init_values"] = arguments.pop("layerscale")
    return {**arguments, "img_size": cfg.crops.global_crops_size, "in_chans": channels_of(cfg)}


def sources_of(cfg: Config) -> dict[str, str]:
    """What a run starts from, by key; the first one replaces the others. Empty for random weights."""
    found = {
        "init_from": cfg.init_from,
        "MODEL.WEIGHTS": cfg.MODEL.WEIGHTS,
        "student.pretrained_weights": cfg.student.pretrained_weights,
    }
    return {key: source for key, source in found.items() if source}


def differences(former: Config, new: Config) -> list[str]:
    """List the differences of two configurations: `dotted.key: former -> new`."""
    before, after = (dict(_flatten(to_dict(cfg))) for cfg in (former, new))
    return [f"{key}: {before[key]} -> {after[key]}" for key in after if before[key] != after[key]]


def packaged_names() -> list[str]:
    """Names that `load` accepts besides paths: ``eval/vitb14_pretrain``, ..., ``train/vitl16_short``."""
    folders = [folder for folder in _packaged().iterdir() if folder.is_dir()]
    recipes = [(folder, item) for folder in folders for item in folder.iterdir() if item.name.endswith(".yaml")]
    return sorted(f"{folder.name}/{item.name.removesuffix('.yaml')}" for folder, item in recipes)


# --- Reading ---------------------------------------------------------------------------------------------------------


def _packaged() -> Traversable:
    return files("dinov2") / "configs"


def _find(file: str | Path) -> Path | Traversable:
    if Path(file).is_file():
        return Path(file)
    name = str(file).removeprefix("dinov2/").removeprefix("configs/").removesuffix(".yaml")
    if name in packaged_names():
        return _packaged() / f"{name}.yaml"
    nearest = get_close_matches(name, packaged_names(), n=1)
    beside = get_close_matches(Path(file).name, [path.name for path in Path(file).parent.glob("*.yaml")], n=1)
    likely = Path(file).with_name(beside[0]) if beside else nearest[0] if nearest else ""
    hint = f"did you mean {likely}? " if likely else ""
    raise FileNotFoundError(f"no configuration file {str(file)!r}; {hint}packaged names: {', '.join(packaged_names())}")


def _read(file: Path | Traversable) -> dict[str, Any]:
    try:
        content = yaml_values.parse(file.read_text(encoding="utf-8"))
    except yaml_values.YamlError as error:
        raise ConfigError(f"{file}: {error}") from error
    except (UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{file}: cannot be read as YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: expected sections of 'key: value' lines, got {content!r}")
    return cast(dict[str, Any], content)


def _parse_override(word: str) -> dict[str, Any]:
    key, equals, text = word.partition("=")
    if not equals:
        raise ConfigError(f"override {word!r} has no '='; write {word}=VALUE, and quotes around values with spaces")
    kind = _keys().get(key)
    if kind is str or get_origin(kind) is Literal:  # literally, as YAML would interpret `#`, `: ` or `null`
        if text[:1] in ("'", '"') and text[1:].endswith(text[0]):
            raise ConfigError(f"override {word!r}: quotes would become part of the text; write {key}={text[1:-1]}")
        return {key: text}
    if not text:
        return {key: ""}
    try:
        value = yaml_values.parse(text)
    except yaml_values.YamlError as error:
        raise ConfigError(f"override {word!r}: {text!r} is not a YAML value") from error
    if re.search(r"(?:\A|\s)#", text):
        raise ConfigError(f"override {word!r}: # begins a comment, which is not allowed here")
    if value is None and _is_section(key):
        raise ConfigError(f"override {word!r}: {_unknown(key, value)}")
    return {key: value}


# --- Checking --------------------------------------------------------------------------------------------------------


@cache
def _keys() -> dict[str, Any]:
    """Type of every key, by dotted key."""

    def walk(section: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        for name, kind in get_type_hints(section, include_extras=True).items():
            if is_dataclass(kind):
                yield from walk(kind, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", kind

    return dict(walk(Config, ""))


def _is_section(key: str) -> bool:
    return any(known.startswith(f"{key}.") for known in _keys())


def _flatten(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in mapping.items():
        key = f"{prefix}{name}"
        if value is None and _is_section(key):
            continue  # a section with all lines commented out
        if isinstance(value, Mapping) and key not in _keys() and (value or _is_section(key)):
            yield from _flatten(value, f"{key}.")
        else:
            yield key, value


def _check(mapping: Mapping[str, Any], name: str) -> _Source:
    values: dict[str, Any] = {}
    problems = []
    for key, value in _flatten(mapping):
        if key in values:
            problems.append(f"{key}: given twice, as {_show(values[key])} and as {_show(value)}")
        try:
            values[key] = _convert(value, _keys()[key])
        except KeyError:
            problems.append(_unknown(key, value))
        except (ValueError, OverflowError):
            problems.append(f"{key}: expected {_describe(_keys()[key])}, got {_show(value)}")
    if problems:
        raise ConfigError("\n".join(f"{problem} (in {name})" for problem in problems))
    return _Source(name, values)


def _convert(value: Any, kind: Any) -> Any:
    """Convert ``value`` to a ``kind``, or raise a ValueError. Strict, except that integers are valid floats."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        value = _convert(value, args[0])
        if all(limit.holds(value) for limit in args[1:]):
            return value
    elif origin in (Union, UnionType):
        for kind in args:
            with suppress(ValueError):
                return _convert(value, kind)
    elif kind is NoneType:
        if value is None:
            return None
    elif origin is tuple:
        if isinstance(value, list | tuple) and args[-1] is Ellipsis:
            return tuple(_convert(item, args[0]) for item in value)
        if isinstance(value, list | tuple):
            return tuple(_convert(item, item_kind) for item, item_kind in zip(value, args, strict=True))
    elif origin is Literal:
        if value in args:
            return value
    elif kind is float:
        if type(value) in (int, float):
            return float(value)
    elif type(value) is kind:  # not isinstance, which would accept True as an integer
        return value
    raise ValueError


def _describe(kind: Any) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return ", ".join([_describe(args[0]), *(limit.text for limit in args[1:])])
    if origin in (Union, UnionType):
        return ", or ".join("null" if each is NoneType else _describe(each) for each in args)
    if origin is tuple and args[-1] is Ellipsis:
        return f"a list (each {_describe(args[0])})"
    if origin is tuple:
        kinds = [_describe(each) for each in args]
        same = len(set(kinds)) == 1
        return f"a list of {len(args)} values ({f'each {kinds[0]}' if same else '; '.join(kinds)})"
    if origin is Literal:
        return f"one of {', '.join(args)}"
    text = "text (in quotes if it looks like something else)"
    return {bool: "true or false", int: "an integer", float: "a number", str: text}[kind]


def _show(value: Any) -> str:
    return json.dumps(value, default=repr, ensure_ascii=False)


def _unknown(key: str, value: Any) -> str:
    if _is_section(key):
        return f"{key}: a section, expected 'key: value' lines under it, got {_show(value)}"

    def likeness(known: str) -> float:  # of the key, or of its last part if the section is wrong
        pairs = [(key, known), (key.rpartition(".")[2], known.rpartition(".")[2])]
        return max(SequenceMatcher(None, a.lower(), b.lower()).ratio() for a, b in pairs)

    return f"unknown key {key!r}; nearest known keys: {', '.join(sorted(_keys(), key=likeness, reverse=True)[:3])}"


SHARDED_OVER = {
    "NO_SHARD": "nothing",
    "SHARD_GRAD_OP": "all processes",
    "FULL_SHARD": "all processes",
    "HYBRID_SHARD": "a machine",
    "HYBRID_SHARD_ZERO2": "a machine",
}


MAX_STEPS = 10**8  # maximum steps of a schedule, which has a number per step in memory; such a run would take years


def _contradictions(cfg: Config) -> Iterator[str]:
    epoch, teacher = cfg.train.OFFICIAL_EPOCH_LENGTH, cfg.teacher
    epochs = {
        "optim.epochs": cfg.optim.epochs,
        "teacher.warmup_teacher_temp_epochs": teacher.warmup_teacher_temp_epochs,
    }
    for key, number in epochs.items():
        if number * epoch > MAX_STEPS:
            yield f"{key} = {number} of train.OFFICIAL_EPOCH_LENGTH = {epoch} steps is more than {MAX_STEPS:,} steps"
    if cfg.optim.warmup_epochs > cfg.optim.epochs:
        yield f"optim.warmup_epochs = {cfg.optim.warmup_epochs} is longer than optim.epochs = {cfg.optim.epochs}"
    sizes = {"crops.global_crops_size": cfg.crops.global_crops_size}
    if cfg.crops.local_crops_number > 0:
        sizes["crops.local_crops_size"] = cfg.crops.local_crops_size
    for key, size in sizes.items():
        if size % cfg.student.patch_size:
            yield f"{key} = {size} is not a multiple of student.patch_size = {cfg.student.patch_size}"
    if cfg.train.augment_on == "device" and cfg.augmentation.implementation == "pil":
        yield "train.augment_on = device is incompatible with augmentation.implementation = pil, which needs the CPU"
    if cfg.ibot.loss_weight > 0 and cfg.ibot.mask_sample_probability == 0:
        yield "ibot.mask_sample_probability = 0 leaves no masked patches for ibot.loss_weight > 0"
    if cfg.ibot.loss_weight > 0 and max(cfg.ibot.mask_ratio_min_max) == 0:
        yield "ibot.mask_ratio_min_max = [0, 0] leaves no masked patches for ibot.loss_weight > 0"
    for module in ("backbone", "dino_head", "ibot_head"):
        sides = cfg.compute_precision.student, cfg.compute_precision.teacher
        student, teacher = (getattr(side, module).sharding_strategy for side in sides)
        if SHARDED_OVER[student] != SHARDED_OVER[teacher]:
            yield (
                f"compute_precision.student.{module}.sharding_strategy = {student} and "
                f"compute_precision.teacher.{module}.sharding_strategy = {teacher} shard weights differently, "
                f"but the teacher is an average of the student's shards"
            )
    yield from _contradictions_of_bands(cfg)
    yield from _contradictions_of_stages(cfg)
    width, heads = cfg.student.embed_dim, cfg.student.num_heads
    if width and heads and width % heads:
        yield f"student.embed_dim = {width} is not a multiple of student.num_heads = {heads}"
    if cfg.student.depth and cfg.student.block_chunks > cfg.student.depth:
        yield f"student.block_chunks = {cfg.student.block_chunks} is more than student.depth = {cfg.student.depth}"


def _contradictions_of_stages(cfg: Config) -> Iterator[str]:
    gram, steps = cfg.gram, cfg.optim.epochs * cfg.train.OFFICIAL_EPOCH_LENGTH
    if cfg.init_from_optimizer and not cfg.init_from:
        yield "init_from_optimizer = true needs init_from, whose optimizer it is"
    distillation = cfg.distillation
    if distillation.students and not distillation.teacher:
        yield f"distillation.students = {list(distillation.students)} need distillation.teacher"
    if distillation.students and not distillation.global_batch_size:
        yield "distillation.global_batch_size = 0: several students need the number of images in a step"
    if distillation.global_batch_size and not distillation.students:
        yield f"distillation.global_batch_size = {distillation.global_batch_size} is for distillation.students only"
    if gram.loss_weight <= 0:
        for key in ("teacher", "start_step", "rise_steps", "teacher_step", "refresh_period"):
            if value := getattr(gram, key):
                yield f"gram.{key} = {value} has no effect with gram.loss_weight = 0"
        return
    if gram.teacher and (gram.teacher_step or gram.refresh_period):
        key = "teacher_step" if gram.teacher_step else "refresh_period"
        yield f"gram.{key} = {getattr(gram, key)} is for copies of this run's teacher, not with gram.teacher"
    if cfg.distillation.teacher:
        yield f"gram.loss_weight = {gram.loss_weight} and distillation.teacher exclude one another"
    if gram.start_step + gram.rise_steps > steps:
        yield f"gram.start_step = {gram.start_step} + gram.rise_steps = {gram.rise_steps} is more than {steps} steps"
    if not gram.teacher and gram.teacher_step > gram.start_step:
        yield (
            f"gram.teacher_step = {gram.teacher_step} is after gram.start_step = {gram.start_step}: there is no Gram "
            "teacher when the loss begins"
        )


def _contradictions_of_bands(cfg: Config) -> Iterator[str]:
    images, channels = cfg.images, channels_of(cfg)
    ranges = images.value_range or ()
    bands = f"images.bands = {'null' if images.bands is None else list(images.bands)}"
    if ranges and isinstance(ranges[0], tuple) and (images.bands is None or len(ranges) != channels):
        yield f"images.value_range has a range for each of {len(ranges)} bands, which does not fit {bands}"
    for key, values in (("mean", cfg.augmentation.mean), ("std", cfg.augmentation.std)):
        if len(values) != channels and not is_normalization_missing(cfg):
            yield f"augmentation.{key} has {len(values)} values, but {bands} gives {channels} channels" + (
                "" if channels == 3 else ": give as many, or neither mean nor std, which are then measured"
            )
    if channels != 3 and cfg.augmentation.implementation == "pil":
        yield f"augmentation.implementation = pil is for images of three channels, not for {bands}"
    shown = images.shown_bands
    if shown is not None and (images.bands is None or len(shown) not in (1, 3) or not {*shown} <= {*images.bands}):
        yield f"images.shown_bands = {list(shown)} must be three or one of the bands that are read, {bands}"
    if images.nodata is not None and images.bands is None:
        yield f"images.nodata = {images.nodata} needs images.bands"
    if images.pages == "bands" and images.bands is None:
        yield "images.pages = bands needs images.bands, which says which of them are read"


# --- Merging ---------------------------------------------------------------------------------------------------------

_DEAD_KEYS = {
    "train.saveckp_freq": "checkpoints follow train.checkpoint_period",
    "train.cache_dataset": "caching depends on the dataset",
    "optim.lr": "it is computed from optim.base_lr by optim.scaling_rule (rule none takes it as it is)",
}
# A source that sets all of these is the config.yaml of a run, which records every key.
_RECORDED_KEYS = {*_DEAD_KEYS, "train.output_dir"}


@cache
def _defaults() -> dict[str, Any]:
    return _check(_read(_packaged() / "ssl_default_config.yaml"), "ssl_default_config.yaml").values


def _merge(sources: Sequence[_Source]) -> Config:
    values = dict(_defaults())
    for source in sources:
        values |= source.values
    cfg = _build(Config, values)
    if problems := list(_contradictions(cfg)):
        raise ConfigError("\n".join(f"{problem} (in {_origin(problem, sources)})" for problem in problems))
    for source in sources:
        if not source.values.keys() >= _RECORDED_KEYS:
            _warn_of_keys_without_effect(source, values)
    return cfg


def _origin(problem: str, sources: Sequence[_Source]) -> str:
    """Sources that set the keys named in a problem."""
    named = [source.name for source in sources if any(key in problem for key in source.values)]
    return ", ".join(named or [source.name for source in sources] or ["the defaults"])


def _build(section: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    kinds = get_type_hints(section).items()
    fields = {
        n: _build(kind, values, f"{prefix}{n}.") if is_dataclass(kind) else values[prefix + n] for n, kind in kinds
    }
    return section(**fields)


def _warn_of_keys_without_effect(source: _Source, final: Mapping[str, Any]) -> None:
    for key, value in source.values.items():
        if value == _defaults()[key]:
            continue
        reason = _DEAD_KEYS.get(key)
        if key.startswith("ibot.head_") and not final["ibot.separate_head"]:
            reason = "with ibot.separate_head = false iBOT uses the DINO head"
        if key == "train.output_dir" and value != final[key]:
            reason = f"a later source sets the output folder ({final[key]})"
        if isinstance(value, str) and "${" in value:
            logger.warning("%s = %s (in %s) is taken literally: ${...} is not expanded", key, _show(value), source.name)
        if reason:
            logger.warning("%s = %s (in %s) has no effect: %s", key, _show(value), source.name, reason)
