"""Import compatibility with the published DINOv2 package: its names, and where they are in this package.

Importing `dinov2` installs an import finder for this table. Modules of the table that do not exist here are created on
import; existing ones get the names that they lack. An entry `module:name` is an object with the same interface; any
other text is the end of the ImportError for that name. Nothing is imported before it is used.
"""

import importlib
import random
import sys
from collections.abc import Sequence
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

_SHARDING = "sharding is dinov2.train.parallel.parallelize, checkpoints are dinov2.train.checkpoint.Checkpointer"
_DINO_TXT = "it belongs to dino.txt, which is not part of this package"
_CLUSTER = "clusters are dinov2.run.slurm and dinov2.run.partition, whose settings are flags of the launchers"
_KERNEL = "attention_backend chooses the kernel, see dinov2.layers.attention"
_PACKED = "a block packs batches of different sizes by dinov2.layers.pack"
_DENSE = "dense heads and models are in dinov2.models.dense, their evaluations in dinov2.eval.dense"
_HERE = "dinov2.published_names"

TABLE: dict[str, dict[str, str]] = {
    "dinov2.configs": {
        "dinov2_default_config": "the defaults are dinov2.config.load()",
        "load_and_merge_config": "dinov2.config:load",
        "load_config": "dinov2.config.load(name) gives a configuration with the defaults",
    },
    "dinov2.data.augmentations": {"DataAugmentationDINO": "dinov2.data:DataAugmentationDINO"},
    "dinov2.data.datasets": {},
    "dinov2.data.datasets.decoders": {
        name: "images are decoded by dinov2.data.images" for name in ("Decoder", "ImageDataDecoder", "TargetDecoder")
    },
    "dinov2.data.datasets.extended": {"ExtendedVisionDataset": "datasets are dinov2.data.datasets.base.ImageDataset"},
    "dinov2.data.datasets.image_net": {"ImageNet": "dinov2.data.datasets:ImageNet"},
    "dinov2.data.datasets.image_net_22k": {"ImageNet22k": "dinov2.data.datasets:ImageNet22k"},
    "dinov2.data.loaders": {
        name: f"dinov2.data:{name}" for name in ("SamplerType", "make_data_loader", "make_dataset")
    },
    "dinov2.distributed": {
        "enable": "processes are joined by dinov2.distributed.init() or session()",
        "get_global_rank": "dinov2.distributed:rank",
        "get_global_size": "dinov2.distributed:world_size",
        "get_local_rank": "dinov2.distributed:local_rank",
        "get_local_size": "dinov2.distributed:local_world_size",
        "is_main_process": "dinov2.distributed:is_main",
    },
    "dinov2.eval.depth": {"": _DENSE},
    "dinov2.eval.knn": {"eval_knn_with_model": "use dinov2.eval.knn.eval_knn or main"},
    "dinov2.eval.metrics": {
        name: "metrics are made by dinov2.eval.metrics.build_metric"
        for name in ("build_topk_accuracy_metric", "build_topk_imagenet_real_accuracy_metric")
    },
    "dinov2.eval.segmentation": {"": _DENSE},
    "dinov2.eval.segmentation_m2f": {"": _DENSE},
    "dinov2.eval.utils": {
        "ModelWithIntermediateLayers": "dinov2.eval.features:ModelWithIntermediateLayers",
        "ModelWithNormalize": "dinov2.eval.features:ModelWithNormalize",
        "all_gather_and_flatten": "dinov2.distributed:all_gather_cat",
        "evaluate": "classifiers are evaluated by dinov2.eval.linear.evaluate_linear_classifiers",
        "extract_features": "dinov2.eval.features:extract_features",
        "extract_features_with_dataloader": "use dinov2.eval.features.extract_features, which makes its own loader",
    },
    "dinov2.fsdp": {
        **dict.fromkeys(("FSDPCheckpointer", "free_if_fsdp", "get_fsdp_modules", "get_fsdp_wrapper"), _SHARDING),
        **dict.fromkeys(("is_fsdp", "is_sharded_fsdp", "rankstr", "reshard_fsdp_model"), _SHARDING),
        "ShardedGradScaler": "use torch.amp.GradScaler",
    },
    "dinov2.hub.depth": {
        "BNHead": "linear depth heads are dinov2.models.dense.LinearDepthHead",
        "DPTHead": "DPT heads are dinov2.models.dense.DPTDepthHead",
        "DepthEncoderDecoder": "depth estimators are dinov2.models.dense.Depther",
    },
    "dinov2.hub.dinotxt": {"": _DINO_TXT},
    "dinov2.hub.text": {"": _DINO_TXT},
    "dinov2.hub.utils": {"CenterPadding": "dinov2.models.dense.padding:CenterPadding"},
    "dinov2.layers": {"CausalAttentionBlock": _DINO_TXT, "SwiGLUFFNAligned": _DINO_TXT},
    "dinov2.layers.attention": dict.fromkeys(("XFORMERS_AVAILABLE", "XFORMERS_ENABLED"), _KERNEL),
    "dinov2.layers.block": {
        "CausalAttentionBlock": _DINO_TXT,
        **dict.fromkeys(("XFORMERS_AVAILABLE", "XFORMERS_ENABLED"), _KERNEL),
        **dict.fromkeys(("attn_bias_cache", "get_attn_bias_and_cat"), _PACKED),
        **dict.fromkeys(
            ("drop_add_residual_stochastic_depth", "drop_add_residual_stochastic_depth_list"),
            "stochastic depth is part of dinov2.layers.Block",
        ),
    },
    "dinov2.layers.drop_path": {"drop_path": "use the module dinov2.layers.DropPath"},
    "dinov2.layers.mlp": {"Mlp": "dinov2.layers:Mlp"},
    "dinov2.layers.swiglu_ffn": {
        "SwiGLUFFN": "dinov2.layers:SwiGLUFFN",
        "SwiGLUFFNAligned": _DINO_TXT,
        "SwiGLUFFNFused": "dinov2.layers:SwiGLUFFNFused",
        **dict.fromkeys(("XFORMERS_AVAILABLE", "XFORMERS_ENABLED"), _KERNEL),
    },
    "dinov2.logging": {
        "MetricLogger": "dinov2.meters:MetricLogger",
        "SmoothedValue": "dinov2.meters:SmoothedValue",
        "setup_logging": "dinov2.log:setup_logging",
    },
    "dinov2.loss.dino_clstoken_loss": {"DINOLoss": "dinov2.loss:DINOLoss"},
    "dinov2.loss.ibot_patch_loss": {"iBOTPatchLoss": "dinov2.loss:iBOTPatchLoss"},
    "dinov2.loss.koleo_loss": {"KoLeoLoss": "dinov2.loss:KoLeoLoss"},
    "dinov2.models": {"build_model_from_cfg": f"{_HERE}:build_model_from_cfg"},
    "dinov2.models.vision_transformer": {
        "BlockChunk": "blocks are never in chunks: model.blocks is one list",
        **dict.fromkeys(("init_weights_vit_timm", "named_apply"), "weights are drawn by model.init_weights()"),
    },
    "dinov2.run.submit": {
        "get_args_parser": "use dinov2.run.submission.make_parser",
        "get_shared_folder": "the folder of a job is its output folder",
        "submit_jobs": "use dinov2.run.launch.launch",
    },
    "dinov2.train": {
        "SSLMetaArch": "dinov2.train.ssl_meta_arch:SSLMetaArch",
        "get_args_parser": "dinov2.train.train:get_args_parser",
        "main": "dinov2.train.train:main",
    },
    "dinov2.train.train": {
        "apply_optim_scheduler": "use dinov2.train.optim.set_hyperparameters",
        "build_schedulers": "use dinov2.train.schedules.build_schedules",
        "do_test": "teachers are written by dinov2.train.network_files.save_teacher",
    },
    "dinov2.utils": {},
    "dinov2.utils.cluster": dict.fromkeys(
        (
            "ClusterType",
            "get_checkpoint_path",
            "get_cluster_type",
            "get_slurm_executor_parameters",
            "get_slurm_partition",
            "get_user_checkpoint_path",
        ),
        _CLUSTER,
    ),
    "dinov2.utils.config": {
        "apply_scaling_rules_to_cfg": "learning rates are scaled by dinov2.train.schedules.scale_lr",
        "default_setup": "use dinov2.distributed.session and dinov2.log.setup_logging",
        "get_cfg_from_args": "use dinov2.config.load(file, overrides)",
        "setup": "use dinov2.config.load, dinov2.distributed.session and dinov2.log.setup_logging",
        "write_config": f"{_HERE}:write_config",
    },
    "dinov2.utils.dtype": {"as_torch_dtype": f"{_HERE}:as_torch_dtype"},
    "dinov2.utils.param_groups": {
        name: f"dinov2.train.optim:{name}"
        for name in ("fuse_params_groups", "get_params_groups_with_decay", "get_vit_lr_decay_rate")
    },
    "dinov2.utils.utils": {
        "CosineScheduler": "dinov2.train.schedules:CosineScheduler",
        "fix_random_seeds": f"{_HERE}:fix_random_seeds",
        "get_sha": "the commit is in what dinov2.train.environment.record_environment writes",
        "has_batchnorms": f"{_HERE}:has_batchnorms",
        "load_pretrained_weights": f"{_HERE}:load_pretrained_weights",
    },
}
"""Names by module; an entry with an empty name is the module itself."""


class _Finder(MetaPathFinder):
    """Finds the modules of the table, whether they exist here or not."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in TABLE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None:
            return ModuleSpec(fullname, _TableLoader(), is_package=_has_children(fullname))
        if isinstance(spec.loader, SourceFileLoader):
            spec.loader = _FileLoader(spec.loader.name, spec.loader.path)
        return spec


class _TableLoader(Loader):
    """Creates a module that contains only the names of the table."""

    def exec_module(self, module: ModuleType) -> None:
        if reason := TABLE[module.__name__].get(""):
            raise ModuleNotFoundError(f"there is no {module.__name__} here: {reason}", name=module.__name__)
        _add_names(module)


class _FileLoader(SourceFileLoader):
    """Executes the file of a module and adds the names of the table."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        _add_names(module)
        if _has_children(module.__name__) and not hasattr(module, "__path__"):
            module.__path__ = []  # a file whose published counterpart is a folder


def install() -> None:
    """Make the names of the table importable."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _has_children(module: str) -> bool:
    return any(name.startswith(f"{module}.") for name in TABLE)


def _add_names(module: ModuleType) -> None:
    module.__getattr__ = partial(_resolve, module.__name__)  # type: ignore[method-assign]


def _resolve(module: str, name: str) -> Any:
    entry = TABLE[module].get(name)
    if entry is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    home, colon, attribute = entry.partition(":")
    if not colon or " " in home:
        raise ImportError(f"there is no {module}.{name} here: {entry}", name=module)
    return getattr(importlib.import_module(home), attribute)


# --- Functions with the published interface --------------------------------------------------------------------------


def build_model_from_cfg(cfg: Any, only_teacher: bool = False) -> tuple[Any, ...]:
    """Build the networks of a configuration: (teacher, D), or (student, teacher, D)."""
    config, models = importlib.import_module("dinov2.config"), importlib.import_module("dinov2.models")
    if not isinstance(cfg, config.Config):
        omegaconf = importlib.import_module("omegaconf")
        cfg = config.from_dict(cfg if isinstance(cfg, dict) else omegaconf.OmegaConf.to_container(cfg))
    arguments = config.backbone_arguments(cfg)
    teacher = models.build_model(**arguments)
    if only_teacher:
        return teacher, teacher.embed_dim
    student = models.build_model(**arguments, drop_path_rate=cfg.student.drop_path_rate)
    return student, teacher, teacher.embed_dim


def load_pretrained_weights(model: Any, pretrained_weights: str, checkpoint_key: str = "teacher") -> None:
    """Load weights into a backbone, strictly."""
    importlib.import_module("dinov2.models.weights").load_backbone(model, pretrained_weights, checkpoint_key)


def fix_random_seeds(seed: int = 31) -> None:
    """Seed the random numbers of Python, NumPy and PyTorch."""
    random.seed(seed)
    importlib.import_module("numpy").random.seed(seed)
    importlib.import_module("torch").manual_seed(seed)


def has_batchnorms(model: Any) -> bool:
    """Whether a network contains batch normalization."""
    batch_norm = importlib.import_module("torch.nn.modules.batchnorm")._BatchNorm
    return any(isinstance(module, batch_norm) for module in model.modules())


def as_torch_dtype(dtype: Any) -> Any:
    """Convert the name of a dtype, such as `fp16` or `float16`."""
    torch, dtypes = importlib.import_module("torch"), importlib.import_module("dinov2.config").DTYPES
    found = dtypes.get(dtype, getattr(torch, dtype, None)) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise ValueError(f"unknown dtype {dtype!r}; known: {', '.join(dtypes)}, and torch names")
    return found


def write_config(cfg: Any, output_dir: str, name: str = "config.yaml") -> str:
    """Write a configuration into a folder; returns the path of the file."""
    path = Path(output_dir) / name
    importlib.import_module("dinov2.config").save(cfg, path)
    return str(path)
