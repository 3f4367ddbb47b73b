"""Claims about the configuration: published values, precedence, errors that name the key, the value and the place."""

import dataclasses
import json
import logging
import os
import re
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dinov2 import config
from dinov2.config import ConfigError, from_dict, load, save, to_dict

REPOSITORY = Path(__file__).parents[1]
GOLDEN = REPOSITORY.parent / "shared" / "golden" / "dev"


def flat(tree: dict, prefix: str = "") -> dict[str, object]:
    leaves: dict[str, object] = {}
    for name, value in tree.items():
        leaves |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return leaves


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# --- Published values ------------------------------------------------------------------------------------------------

PUBLISHED_DEFAULTS = {
    "MODEL.WEIGHTS": "",
    "init_from": "",
    "compute_precision.grad_scaler": True,
    "dino.loss_weight": 1.0,
    "dino.head_n_prototypes": 65536,
    "dino.head_bottleneck_dim": 256,
    "dino.head_nlayers": 3,
    "dino.head_hidden_dim": 2048,
    "dino.koleo_loss_weight": 0.1,
    "ibot.loss_weight": 1.0,
    "ibot.mask_sample_probability": 0.5,
    "ibot.mask_ratio_min_max": [0.1, 0.5],
    "ibot.separate_head": False,
    "ibot.head_n_prototypes": 65536,
    "ibot.head_bottleneck_dim": 256,
    "ibot.head_nlayers": 3,
    "ibot.head_hidden_dim": 2048,
    "train.batch_size_per_gpu": 64,
    "train.dataset_path": "ImageNet:split=TRAIN",
    "train.output_dir": ".",
    "train.saveckp_freq": 20,
    "train.seed": 0,
    "train.num_workers": 10,
    "train.augment_on": "cpu",
    "train.OFFICIAL_EPOCH_LENGTH": 1250,
    "train.cache_dataset": True,
    "train.centering": "centering",
    "student.arch": "vit_large",
    "student.patch_size": 16,
    "student.drop_path_rate": 0.3,
    "student.layerscale": 1e-5,
    "student.drop_path_uniform": True,
    "student.pretrained_weights": "",
    "student.ffn_layer": "mlp",
    "student.block_chunks": 0,
    "student.qkv_bias": True,
    "student.proj_bias": True,
    "student.ffn_bias": True,
    "student.num_register_tokens": 0,
    "student.interpolate_antialias": False,
    "student.interpolate_offset": 0.1,
    "teacher.momentum_teacher": 0.992,
    "teacher.final_momentum_teacher": 1,
    "teacher.warmup_teacher_temp": 0.04,
    "teacher.teacher_temp": 0.07,
    "teacher.warmup_teacher_temp_epochs": 30,
    "optim.epochs": 100,
    "optim.weight_decay": 0.04,
    "optim.weight_decay_end": 0.4,
    "optim.base_lr": 0.004,
    "optim.lr": 0.0,
    "optim.warmup_epochs": 10,
    "optim.min_lr": 1e-6,
    "optim.clip_grad": 3.0,
    "optim.freeze_last_layer_epochs": 1,
    "optim.freeze_backbone_steps": 0,
    "optim.freeze_backbone_except": "patch_embed",
    "optim.backbone_warmup_steps": 0,
    "optim.scaling_rule": "sqrt_wrt_1024",
    "optim.patch_embed_lr_mult": 0.2,
    "optim.layerwise_decay": 0.9,
    "optim.adamw_beta1": 0.9,
    "optim.adamw_beta2": 0.999,
    "crops.global_crops_scale": [0.32, 1.0],
    "crops.local_crops_number": 8,
    "crops.local_crops_scale": [0.05, 0.32],
    "crops.global_crops_size": 224,
    "crops.local_crops_size": 96,
    "evaluation.eval_period_iterations": 12500,
}
for network in ("teacher", "student"):
    for part in ("backbone", "dino_head", "ibot_head"):
        fp32_reduce = network == "student" and part != "backbone"
        PUBLISHED_DEFAULTS |= {
            f"compute_precision.{network}.{part}.sharding_strategy": "SHARD_GRAD_OP",
            f"compute_precision.{network}.{part}.mixed_precision.param_dtype": "fp16",
            f"compute_precision.{network}.{part}.mixed_precision.reduce_dtype": "fp32" if fp32_reduce else "fp16",
            f"compute_precision.{network}.{part}.mixed_precision.buffer_dtype": "fp32",
        }

OUR_DEFAULTS = {
    "dino.local_crops_loss_weight": 1.0,
    "distillation.teacher": "",
    "distillation.students": [],
    "distillation.global_batch_size": 0,
    "init_from_optimizer": False,
    "gram.loss_weight": 0.0,
    "gram.start_step": 0,
    "gram.rise_steps": 0,
    "gram.teacher": "",
    "gram.teacher_step": 0,
    "gram.refresh_period": 0,
    "gram.max_refreshes": 3,
    "gram.crops_scale": 2,
    "images.bands": None,
    "images.bands_axis": "auto",
    "images.nodata": None,
    "images.shown_bands": None,
    "images.pages": "first",
    "images.value_range": None,
    "images.max_pixels": 178956970,
    "images.max_file_size": 1024,
    "images.background": None,
    "health.period": 100,
    "health.probe_images": 64,
    "health.knn_period": None,
    "health.knn_images": 1000,
    "health.knn_dataset": "",
    "health.dense_dataset": "",
    "health.dense_images": 64,
    "health.best_by": "auto",
    "train.sampler": "GLOBAL_ORDER",
    "train.accumulate_steps": 1,
    "train.activation_checkpointing": "none",
    "train.compile": False,
    "train.checkpoint_period": None,
    "train.checkpoint_keep": 3,
    "train.checkpoint_keep_every": 0,
    "train.log_period": 10,
    "train.max_nonfinite_steps": 3,
    "train.max_bad_image_share": 0.01,
    "train.log_published_losses": False,
    "train.data_timeout": 1200,
    "student.embed_dim": None,
    "student.depth": None,
    "student.num_heads": None,
    "student.mlp_ratio": None,
    "student.attention_backend": "auto",
    "student.init_std": 0.02,
    "student.pos_embed_std": 0.02,
    "augmentation.aspect_ratio": [0.75, 4 / 3],
    "augmentation.flip_probability": 0.5,
    "augmentation.color_jitter": [0.4, 0.4, 0.2, 0.1],
    "augmentation.color_jitter_probability": 0.8,
    "augmentation.grayscale_probability": 0.2,
    "augmentation.blur_probabilities": [0.0, 0.9, 0.5],
    "augmentation.blur_sigma": [0.1, 2.0],
    "augmentation.solarize_probability": 0.2,
    "augmentation.implementation": "tensor",
    "augmentation.mean": [0.485, 0.456, 0.406],
    "augmentation.std": [0.229, 0.224, 0.225],
    "tracking.tensorboard": False,
    "tracking.wandb_project": "",
    "tracking.wandb_name": "",
    "tracking.wandb_mode": "online",
}

LONG_TRAINING = {
    "dino.head_n_prototypes": 131072,
    "dino.head_bottleneck_dim": 384,
    "ibot.separate_head": True,
    "ibot.head_n_prototypes": 131072,
    "train.dataset_path": "ImageNet22k",
    "train.centering": "sinkhorn_knopp",
    "student.patch_size": 14,
    "student.drop_path_rate": 0.4,
    "student.ffn_layer": "swiglufused",
    "student.block_chunks": 4,
    "teacher.momentum_teacher": 0.994,
    "optim.epochs": 500,
    "optim.weight_decay_end": 0.2,
    "optim.base_lr": 2e-4,
    "optim.warmup_epochs": 80,
    "optim.layerwise_decay": 1.0,
    "crops.local_crops_size": 98,
}
EVALUATION = {"student.patch_size": 14, "crops.global_crops_size": 518, "crops.local_crops_size": 98}
REGISTERS = {
    "student.num_register_tokens": 4,
    "student.interpolate_antialias": True,
    "student.interpolate_offset": 0.0,
}
GIANT = {"student.arch": "vit_giant2", "student.ffn_layer": "swiglufused"}

PUBLISHED_RECIPES = {  # what differs from the defaults, and nothing else does
    "train/vitl16_short": {"student.block_chunks": 4},
    "train/vitl14": LONG_TRAINING | {"train.batch_size_per_gpu": 32},
    "train/vitg14": LONG_TRAINING | {"train.batch_size_per_gpu": 12, "student.arch": "vit_giant2"},
    "eval/vits14_pretrain": EVALUATION | {"student.arch": "vit_small"},
    "eval/vitb14_pretrain": EVALUATION | {"student.arch": "vit_base"},
    "eval/vitl14_pretrain": EVALUATION,
    "eval/vitg14_pretrain": EVALUATION | GIANT,
    "eval/vits14_reg4_pretrain": EVALUATION | REGISTERS | {"student.arch": "vit_small"},
    "eval/vitb14_reg4_pretrain": EVALUATION | REGISTERS | {"student.arch": "vit_base"},
    "eval/vitl14_reg4_pretrain": EVALUATION | REGISTERS,
    "eval/vitg14_reg4_pretrain": EVALUATION | REGISTERS | GIANT,
}


def test_defaults_are_the_published_values_and_our_additions_and_nothing_else():
    assert flat(to_dict(load())) == PUBLISHED_DEFAULTS | OUR_DEFAULTS


@pytest.mark.parametrize("name", PUBLISHED_RECIPES)
def test_published_recipe_differs_from_the_defaults_in_exactly_the_published_keys(name, caplog):
    assert flat(to_dict(load(name))) == PUBLISHED_DEFAULTS | OUR_DEFAULTS | PUBLISHED_RECIPES[name]
    assert not caplog.records


def test_every_published_recipe_is_packaged():
    assert set(config.packaged_names()) >= PUBLISHED_RECIPES.keys()
    for name in config.packaged_names():
        load(name)


@pytest.mark.parametrize("name", PUBLISHED_RECIPES)
def test_the_header_has_duration_expected_results_and_command(name):
    header = (files("dinov2") / "configs" / f"{name}.yaml").read_text(encoding="utf-8").split("\n\n")[0]
    assert all(f"# {word}:" in header for word in ("How long", "Expect", "Command"))
    assert f"dinov2/configs/{name}.yaml" in header


def test_short_path_leads_to_the_same_files():
    link = REPOSITORY / "configs"
    assert link.is_symlink() and os.readlink(link) == "dinov2/configs"
    assert (link / "train" / "vitl14.yaml").samefile(REPOSITORY / "dinov2" / "configs" / "train" / "vitl14.yaml")


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="recorded configurations are not beside this repository")
def test_configurations_of_recorded_runs_load_silently_and_unchanged(caplog):
    recorded = {file: json.loads(file.read_text()).get("config") for file in sorted(GOLDEN.glob("f_train_*.json"))}
    recorded = {file: content for file, content in recorded.items() if content}
    assert recorded
    for file, content in recorded.items():
        assert flat(to_dict(from_dict(content, source=file.name))) == PUBLISHED_DEFAULTS | OUR_DEFAULTS | flat(content)
    assert not caplog.records


# --- Files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["train/vitl14", "train/vitl14.yaml", "configs/train/vitl14", "configs/train/vitl14.yaml"]
    + ["dinov2/configs/train/vitl14.yaml", Path("train/vitl14")],
)
def test_packaged_names_work_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load(name).optim.epochs == 500


def test_a_file_wins_over_a_packaged_name(tmp_path, monkeypatch):
    (tmp_path / "train").mkdir()
    write(tmp_path / "train" / "vitl14", "optim: {epochs: 77}")
    monkeypatch.chdir(tmp_path)
    assert load("train/vitl14").optim.epochs == 77


@pytest.mark.parametrize("name", ["train/vitl41", "", "/", "train/../train/vitl14"])
def test_missing_file_is_an_error_that_lists_the_packaged_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"packaged names: .*eval/vits14_pretrain.*train/vitl16_short") as error:
        load(name)
    assert repr(name) in str(error.value)


def test_a_misspelled_recipe_gets_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"'train/vitl16_shrt'; did you mean train/vitl16_short\? packaged"):
        load("train/vitl16_shrt")


@pytest.mark.parametrize("text", ["", "# nothing\n", "student:\n  # arch: vit_small\n", "student: {}"])
def test_empty_files_and_sections_leave_the_defaults(text, tmp_path):
    assert load(write(tmp_path / "a.yaml", text)) == load()


@pytest.mark.parametrize("text", ["- optim\n- train\n", "5"])
def test_a_file_that_is_no_mapping_is_an_error(text, tmp_path):
    with pytest.raises(ConfigError, match=r"a\.yaml"):
        load(write(tmp_path / "a.yaml", text))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("optim:\n  epochs: [1\ntrain: 2\n", 3),
        ("a: &x {b: *x}", 1),
        ("train: {seed: !!int 010}", 1),
        ("optim:\n  epochs: 1\n  lr: 2\n  epochs: 3\n", 4),
        ("a:\n\tb: 1", 2),
    ],
)
def test_syntax_errors_and_duplicate_keys_name_file_and_line(text, line, tmp_path):
    with pytest.raises(ConfigError, match=rf"a\.yaml: line {line}: "):
        load(write(tmp_path / "a.yaml", text))


def test_a_key_given_twice_is_an_error_in_a_file_however_it_is_written(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.seed: given twice, as 1 and as 2 \(in .*a\.yaml\)"):
        load(write(tmp_path / "a.yaml", "train.seed: 1\ntrain:\n  seed: 2\n"))


def test_a_name_with_a_number_sign_in_a_file_is_no_comment(tmp_path):
    """`set #1` without quotes is `set` to YAML. A comment after a value has a space, or a number before it."""
    file = tmp_path / "a.yaml"
    with pytest.raises(ConfigError, match=r"a\.yaml: line 2: '/data/set' is followed by ' #': quote the value"):
        load(write(file, "train:\n  output_dir: /data/set #1\n"))
    for text in (
        "output_dir: /data/set # 1",
        "output_dir: '/data/set' #1",
        "seed: 1 #1",
        "output_dir: /data/set\n  #1",
    ):
        load(write(file, f"train:\n  {text}\n"))
    assert load(write(file, "train:\n  output_dir: '/data/set #1'\n")).train.output_dir == "/data/set #1"
    assert load(write(file, "train:\n  output_dir: /data/set#1\n")).train.output_dir == "/data/set#1"


def test_anchors_and_merge_keys_work_in_files(tmp_path):
    text = "augmentation:\n  mean: &m [0.5, 0.5, 0.5]\n  std: *m\ndino: &h {head_nlayers: 2}\nibot: {<<: *h}\n"
    cfg = load(write(tmp_path / "a.yaml", text))
    assert cfg.augmentation.std == (0.5, 0.5, 0.5) and cfg.ibot.head_nlayers == 2


def test_a_file_that_is_not_text_is_an_error_that_names_it(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"\x80\x02\xff")
    with pytest.raises(ConfigError, match=r"a\.pth: cannot be read as YAML"):
        load(tmp_path / "a.pth")


# --- Precedence and overrides ----------------------------------------------------------------------------------------


def test_defaults_then_file_then_overrides_in_order(tmp_path):
    file = write(tmp_path / "a.yaml", "optim: {epochs: 50, warmup_epochs: 5}\ntrain.seed: 3")
    cfg = load(file, ["optim.epochs=40", "train={seed: 4, num_workers: 2}", "optim.epochs=30"])
    assert (cfg.optim.epochs, cfg.optim.warmup_epochs, cfg.train.seed, cfg.train.num_workers) == (30, 5, 4, 2)
    assert cfg.train.batch_size_per_gpu == 64


def test_overrides_are_not_modified_nor_remembered():
    words = ["train.seed=5"]
    assert load(None, words).train.seed == 5
    assert words == ["train.seed=5"] and load().train.seed == 0


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("train.dataset_path=ImageNet:split=TRAIN:root=/a:extra=/b", "ImageNet:split=TRAIN:root=/a:extra=/b"),
        ("crops.global_crops_scale=[0.25,1.0]", [0.25, 1.0]),
        ("crops.global_crops_scale=[1, 1]", [1.0, 1.0]),
        ("student.layerscale=null", None),
        ("optim.base_lr=1e-3", 0.001),
        ("optim.base_lr=2.E-4", 0.0002),
        ("optim.base_lr=1", 1.0),
        ("ibot.separate_head=true", True),
        ("student.arch=vit_small", "vit_small"),
        ("optim.base_lr=.5", 0.5),
        ("optim.base_lr= 1E+0 ", 1.0),
        ("train.OFFICIAL_EPOCH_LENGTH=+1_000", 1000),
        ("optim.clip_grad=~", None),
        ("ibot.separate_head=Yes", True),
        ("MODEL.WEIGHTS=", ""),
        ("train.output_dir=/a=b", "/a=b"),
        ("optim.scaling_rule=none", "none"),
        ("student.arch=vit_golden", "vit_golden"),
        ("dino.loss_weight=-1", -1.0),
        ("evaluation.eval_period_iterations=0", 0),
    ],
)
def test_override_grammar(word, value):
    result = flat(to_dict(load(None, [word])))[word.partition("=")[0]]
    assert result == value and type(result) is type(value)


def test_numbers_without_a_dot_are_floats_in_files_too(tmp_path):
    assert load(write(tmp_path / "a.yaml", "optim:\n  base_lr: 1e-3\n")).optim.base_lr == 0.001


@pytest.mark.parametrize("word", ["train.seed", "--nodes", "4"])
def test_an_override_without_equals_sign_is_an_error(word):
    with pytest.raises(ConfigError, match=f"'{word}' has no '='"):
        load(None, [word])


TEXT_KEYS = [
    "train.dataset_path",
    "train.output_dir",
    "student.pretrained_weights",
    "MODEL.WEIGHTS",
    "init_from",
    "student.arch",
]
TEXT_KEYS += ["health.knn_dataset", "health.dense_dataset", "tracking.wandb_project", "tracking.wandb_name"]
AWKWARD = [
    *(
        "/data/set #1",
        "#1",
        "a: b",
        "a:",
        "{}",
        "{a: 1}",
        "[",
        "[1, 2]",
        "*",
        "*a",
        "&a b",
        "!!int 3",
        "!",
        "%j",
        "@",
        "`x`",
    ),
    *(
        "null",
        "~",
        "~/x",
        "true",
        "no",
        "1",
        "010",
        "1e3",
        ".inf",
        "2024-01-01",
        "-",
        "- a",
        "--- a",
        "...",
        "|",
        "> a",
        "?",
    ),
    *(
        " a",
        "a ",
        " ",
        "\t",
        "a\tb",
        "a\nb",
        "\n",
        "a=b",
        "=",
        "'a",
        'a"',
        "it's",
        "'",
        '"',
        "a\\b",
        "\\",
        "\\n",
        "é ü",
        "図",
    ),
    *("${x}", "${x", "$HOME", "a,b", "a;b", "a #", "# a", "<<", "\x7f", "\ufeff", "\u2028", "a'b'", "''a", "\udcff"),
]


@pytest.mark.parametrize("value", AWKWARD)
def test_text_is_taken_as_it_is_and_saved_and_loaded_so(value, tmp_path):
    """`#`, `: ` or `null` mean something in YAML, not in the name of a folder."""
    cfg = load(None, [f"{key}={value}" for key in TEXT_KEYS])
    result = flat(to_dict(cfg))
    assert [result[key] for key in TEXT_KEYS] == [value] * len(TEXT_KEYS)
    assert load(save_to(tmp_path / "config.yaml", cfg)) == cfg


def save_to(path, cfg):
    save(cfg, path)
    return path


@pytest.mark.parametrize("word", ["train.output_dir='a b'", 'train.output_dir=""', "train.centering='centering'"])
def test_quotes_around_a_text_are_an_error_that_shows_the_override_without_them(word):
    """They were needed while overrides were YAML, and would silently be part of the name now."""
    with pytest.raises(ConfigError) as error:
        load(None, [word])
    assert str(error.value).endswith(f"write {word.replace(chr(39), '').replace(chr(34), '')}")


@pytest.mark.parametrize("value", ["${oc.env:HOME}/x", "a${b"])
def test_interpolations_are_not_expanded_and_a_warning_is_logged(value, tmp_path, caplog):
    words = [f"train.output_dir={value}"]
    cfg = load(None, words)
    assert cfg.train.output_dir == value
    assert "train.output_dir" in caplog.text and "is not expanded" in caplog.text
    file = write(tmp_path / "a.yaml", f"train: {{output_dir: '{value}'}}")
    assert load(file).train.output_dir == value and len(caplog.records) == 2


@pytest.mark.parametrize("text", ["[", "&a [*a]", "!!int 010", "${x", "1 # a", "#1", "a: b: c", "--- 1\n--- 2"])
@pytest.mark.parametrize("key", ["optim.base_lr", "optim.clip_grad", "crops.local_crops_scale", "train"])
def test_an_override_that_is_no_yaml_is_an_error_that_quotes_it(key, text):
    with pytest.raises(ConfigError) as error:
        load(None, [f"{key}={text}"])
    assert f"override {f'{key}={text}'!r}" in str(error.value)


@pytest.mark.parametrize(
    "word",
    ["train={dataset_path: /data/set #1", "train={seed: 1, seed: 2}", "train=~", "train=3", "train.seed=" + "[" * 999],
)
def test_an_override_of_a_section_drops_nothing(word):
    with pytest.raises(ConfigError) as error:
        load(None, [word])
    assert repr(word) in str(error.value)


@pytest.mark.parametrize(
    "number", ["010", "1:30", "1_0", "10_00", "0x10", "0b1", "0o7", "1,5", "1.5.", "ten", "١", "1 0"]
)
@pytest.mark.parametrize("key", ["train.seed", "optim.base_lr"])
def test_what_yaml_would_misread_as_a_number_is_an_error(key, number, tmp_path):
    """To YAML 1.1 010 is 8, 1:30 is 90 and 1_0 is 10."""
    section, name = key.split(".")
    for sources in (None, [f"{key}={number}"]), (write(tmp_path / "a.yaml", f"{section}: {{{name}: '{number}'}}"), []):
        with pytest.raises(ConfigError, match=rf'{key}: expected .* got "{re.escape(number)}"'):
            load(*sources)


@pytest.mark.parametrize(
    "word", ["optim.epochs:3", "optim.epochs =3", "--optim.epochs=3", "=3", "=", "optim.epochs", ".=1", "optim.=1"]
)
def test_a_key_that_is_not_spelt_right_is_an_error(word):
    with pytest.raises(ConfigError):
        load(None, [word])


# --- Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("optim.base_lrr", "optim.base_lr"),
        ("student.register_tokens", "student.num_register_tokens"),
        ("optim.batch_size_per_gpu", "train.batch_size_per_gpu"),
        ("epochs", "optim.epochs"),
        ("model.weights", "MODEL.WEIGHTS"),
        ("crops.global_crops_scale[0]", "crops.global_crops_scale"),
        ("train.seed.x", "train.seed"),
        ("compute_precision.student.mixed_precision.param_dtype", "param_dtype"),
        ("studnet.arch", "student.arch"),
    ],
)
def test_an_unknown_key_is_an_error_that_names_the_nearest(key, nearest):
    with pytest.raises(ConfigError) as error:
        load(None, [f"{key}=1"])
    first, _, neighbors = str(error.value).partition("; nearest known keys: ")
    assert first == f"unknown key {key!r}" and nearest in neighbors
    assert neighbors.endswith(f"(in override '{key}=1')")


def test_all_problems_of_a_file_are_reported_at_once_with_its_name(tmp_path):
    text = "optim:\n  epoch: 3\n  base_lr: fast\nstudnet: {}\ntrain: 4\n"
    with pytest.raises(ConfigError) as error:
        load(write(tmp_path / "mine.yaml", text))
    lines = str(error.value).splitlines()
    assert len(lines) == 4 and all(line.endswith("mine.yaml)") for line in lines)
    assert "'optim.epoch'" in lines[0] and "optim.base_lr" in lines[1] and "'studnet'" in lines[2]
    assert "train: a section" in lines[3]


@pytest.mark.parametrize(
    ("word", "wanted", "got"),
    [
        ("optim.epochs=ten", "an integer, at least 1", '"ten"'),
        ("optim.epochs=1.5", "an integer, at least 1", "1.5"),
        ("optim.epochs=true", "an integer, at least 1", "true"),
        ("optim.epochs=null", "an integer, at least 1", "null"),
        ("optim.base_lr='1e-3'", "a number, at least 0", '"1e-3"'),
        ("optim.base_lr=false", "a number, at least 0", "false"),
        ("ibot.separate_head=1", "true or false", "1"),
        ("train={output_dir: 2024}", "text (in quotes if it looks like something else", "2024"),
        ("student={arch: [vit_small]}", "text", '["vit_small"]'),
        ("train.seed=18446744073709551616", "from 0 to 2^64 - 1", "18446744073709551616"),
        ("augmentation.mean=[123.7,116.3,103.5]", "divide by 255", "[123.7, 116.3, 103.5]"),
        ("augmentation.std=[58,57,57]", "divide by 255", "[58, 57, 57]"),
        ("train.checkpoint_period=x", "an integer, at least 1, or null", '"x"'),
        ("train.centering=sinkhorn", "one of centering, sinkhorn_knopp", '"sinkhorn"'),
        ("augmentation.implementation=pillow", "one of tensor, pil", '"pillow"'),
        ("train.augment_on=gpu", "one of cpu, device", '"gpu"'),
        ("optim.scaling_rule=linear", "one of sqrt_wrt_1024, linear_wrt_256, linear_wrt_1024, none", '"linear"'),
        ("student.ffn_layer=moe", "one of mlp, swiglu, swiglufused, identity", '"moe"'),
        ("compute_precision.student.backbone.mixed_precision.param_dtype=fp8", "one of fp32, fp16, bf16", '"fp8"'),
        ("crops.local_crops_scale=0.3", "a list of 2 values", "0.3"),
        ("crops.local_crops_scale=[0.1,0.2,0.3]", "a list of 2 values", "[0.1, 0.2, 0.3]"),
        ("crops.local_crops_scale=[0.1,a]", "above 0 and at most 1", '[0.1, "a"]'),
        ("crops.local_crops_scale={a: 1}", "a list of 2 values", '{"a": 1}'),
        # of the right type but out of range
        ("train.batch_size_per_gpu=0", "at least 1", "0"),
        ("crops.global_crops_size=-224", "at least 1", "-224"),
        ("train.num_workers=-1", "at least 0", "-1"),
        ("student.block_chunks=-1", "at least 0", "-1"),
        ("student.drop_path_rate=1.0", "at least 0 and below 1", "1.0"),
        ("ibot.mask_sample_probability=1.5", "from 0 to 1", "1.5"),
        ("ibot.mask_ratio_min_max=[0.5,0.1]", "the smaller one first", "[0.5, 0.1]"),
        ("ibot.mask_ratio_min_max=[0.1,1.1]", "from 0 to 1", "[0.1, 1.1]"),
        ("crops.global_crops_scale=[1.0,0.32]", "the smaller one first", "[1.0, 0.32]"),
        ("crops.global_crops_scale=[0.0,0.5]", "above 0", "[0.0, 0.5]"),
        ("augmentation.blur_probabilities=[0,2,0]", "from 0 to 1", "[0, 2, 0]"),
        ("teacher.teacher_temp=0", "above 0", "0"),
        ("teacher.momentum_teacher=-0.1", "from 0 to 1", "-0.1"),
        ("optim.base_lr=.nan", "at least 0", "NaN"),
        ("dino.loss_weight=.inf", "finite", "Infinity"),
        ("optim.weight_decay=" + "9" * 400, "at least 0", "9" * 400),
    ],
)
def test_an_invalid_value_is_an_error_that_names_the_expected_type_and_its_source(word, wanted, got):
    with pytest.raises(ConfigError) as error:
        load(None, [word])
    message = str(error.value)
    key = word.partition("=")[0]
    assert re.match(rf"{key}[.\w]*: expected ", message) and wanted in message
    assert f"got {got} (in override {word!r})" in message


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["optim.epochs=5"], ["optim.warmup_epochs = 10", "optim.epochs = 5"]),
        (["optim.epochs=1000000"], ["optim.epochs = 1000000", "OFFICIAL_EPOCH_LENGTH = 1250"]),
        (["teacher.warmup_teacher_temp_epochs=1000000"], ["teacher.warmup_teacher_temp_epochs = 1000000"]),
        (["student.patch_size=14"], ["crops.local_crops_size = 96", "student.patch_size = 14"]),
        (["crops.global_crops_size=225"], ["crops.global_crops_size = 225", "student.patch_size = 16"]),
        (["ibot.mask_sample_probability=0"], ["ibot.mask_sample_probability", "ibot.loss_weight"]),
        (["ibot.mask_ratio_min_max=[0,0]"], ["ibot.mask_ratio_min_max", "ibot.loss_weight"]),
        (
            ["train.augment_on=device", "augmentation.implementation=pil"],
            ["train.augment_on = device", "augmentation.implementation = pil"],
        ),
        (["student.embed_dim=100", "student.num_heads=3"], ["student.embed_dim = 100", "student.num_heads = 3"]),
        (["student.depth=2", "student.block_chunks=3"], ["student.depth = 2", "student.block_chunks = 3"]),
    ],
)
def test_settings_that_contradict_each_other_are_named_together(words, named):
    with pytest.raises(ConfigError) as error:
        load(None, words)
    assert all(text in str(error.value) for text in [*named, *words])


def test_only_those_who_set_contradicting_keys_are_named():
    with pytest.raises(ConfigError) as error:
        load("train/vitl14", ["train.seed=3", "optim.epochs=5", "train.num_workers=1"])
    assert str(error.value) == (
        "optim.warmup_epochs = 80 is longer than optim.epochs = 5 "
        f"(in {files('dinov2') / 'configs/train/vitl14.yaml'}, override 'optim.epochs=5')"
    )


def test_settings_that_do_not_matter_do_not_contradict():
    load(None, ["crops.local_crops_number=0", "crops.local_crops_size=95"])
    load(None, ["ibot.loss_weight=0", "ibot.mask_sample_probability=0", "ibot.mask_ratio_min_max=[0,0]"])


# --- Keys without effect ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["train.saveckp_freq=5"], "train.checkpoint_period"),
        (["train.cache_dataset=false"], "cache"),
        (["optim.lr=0.1"], "optim.base_lr"),
        (["ibot.head_n_prototypes=128"], "ibot.separate_head"),
        (["train.output_dir=mine", "train.output_dir=/given/later"], "/given/later"),
    ],
)
def test_a_key_without_effect_is_accepted_with_a_warning(words, reason, caplog):
    load(None, words)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert words[0].partition("=")[0] in record.message and reason in record.message and words[0] in record.message


@pytest.mark.parametrize(
    "words",
    [
        ["train.saveckp_freq=20"],  # the default
        ["train.seed=7"],
        ["train.output_dir=/a"],
        ["ibot.head_n_prototypes=128", "ibot.separate_head=true"],
    ],
)
def test_a_key_with_effect_or_its_default_is_silent(words, caplog):
    load(None, words)
    assert not caplog.records


def test_a_recipe_file_is_warned_about_and_a_run_s_own_file_is_not(tmp_path, caplog):
    load(write(tmp_path / "recipe.yaml", "optim: {lr: 0.1}"))
    assert len(caplog.records) == 1 and "recipe.yaml" in caplog.text
    caplog.clear()

    run = from_dict({"ibot": {"head_nlayers": 2, "separate_head": True}})
    run = dataclasses.replace(
        run,
        optim=dataclasses.replace(run.optim, lr=0.00125),
        train=dataclasses.replace(run.train, output_dir="/runs/1", saveckp_freq=5),
        ibot=dataclasses.replace(run.ibot, separate_head=False),
    )
    save(run, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml") == run
    moved = load(tmp_path / "config.yaml", ["train.output_dir=/runs/2"])
    assert moved.train.output_dir == "/runs/2" and not caplog.records


# --- The loaded object, and saving -----------------------------------------------------------------------------------


def test_a_loaded_configuration_cannot_be_written_to():
    cfg = load()
    for section in (cfg, cfg.optim, cfg.compute_precision.student.backbone.mixed_precision):
        name = dataclasses.fields(section)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(section, name, getattr(section, name))
    hash(cfg)  # no lists or dicts anywhere inside


def test_to_dict_is_plain_and_reversible():
    cfg = load("train/vitl14")
    assert json.loads(json.dumps(to_dict(cfg))) == to_dict(cfg)
    assert from_dict(to_dict(cfg)) == cfg


def test_saved_file_is_plain_yaml_with_every_key_and_replaces_the_old_one(tmp_path):
    path = write(tmp_path / "config.yaml", "old")
    cfg = load("train/vitl14", ["train.output_dir=/a b/é"])
    save(cfg, path)
    assert load(path) == cfg
    assert yaml.safe_load(path.read_text(encoding="utf-8")) == to_dict(cfg)
    assert os.listdir(tmp_path) == ["config.yaml"]


def test_a_failed_save_leaves_what_was_there_and_no_rest(tmp_path):
    (tmp_path / "config.yaml").mkdir()
    with pytest.raises(OSError):
        save(load(), tmp_path / "config.yaml")
    assert os.listdir(tmp_path) == ["config.yaml"]


ANY = st.text(st.characters(exclude_categories=["Cs"]))
UNQUOTED = ANY.filter(lambda text: text[:1] not in ("'", '"') or not text[1:].endswith(text[0]))
NUMBER = st.one_of(st.floats(0, 1e300), st.integers(0, 10**15))
SCALES = st.tuples(st.floats(1e-9, 1), st.floats(1e-9, 1)).map(lambda pair: tuple(sorted(pair)))


@settings(max_examples=50, deadline=None)
@given(path=UNQUOTED, weight=NUMBER, seed=st.integers(0, 2**63), scale=SCALES)
def test_any_values_come_through_overrides_unchanged(path, weight, seed, scale):
    words = [
        f"train.output_dir={path}",
        f"optim.weight_decay={weight!r}",
        f"train.seed={seed}",
        f"crops.local_crops_scale={list(scale)}",
    ]
    cfg = load(None, words)
    assert (cfg.train.output_dir, cfg.optim.weight_decay, cfg.train.seed) == (path, weight, seed)
    assert cfg.crops.local_crops_scale == scale


@settings(max_examples=50, deadline=None)
@given(path=ANY, weight=NUMBER, scale=SCALES)
def test_any_values_come_through_save_and_load_unchanged(path, weight, scale, tmp_path_factory):
    values = {"train": {"output_dir": path}, "optim": {"min_lr": weight}, "crops": {"local_crops_scale": scale}}
    cfg = from_dict(values)
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    save(cfg, file)
    assert load(file) == cfg


@settings(max_examples=50, deadline=None)
@given(word=ANY)
def test_any_word_at_all_is_loaded_or_refused_with_an_error_that_quotes_it(word):
    for override in (word, f"train.output_dir={word}", f"optim.lr={word}", f"{word}=1", f"train.seed={word}"):
        try:
            cfg = load(None, [override])
        except ConfigError as error:
            assert repr(override) in str(error)
        else:
            assert override.startswith("train.output_dir=") <= (cfg.train.output_dir == word)


# Texts after `=`, and their values for a key of each type.
VALUES = st.one_of(
    st.sampled_from(AWKWARD),
    st.floats(allow_nan=False).map(repr),
    st.integers().map(str),
    st.from_regex(r"[-+.,_:e0-9]{1,6}"),
)
READERS = {
    "train.dataset_path": str,
    "train.seed": lambda text: int(text.replace("_", "")),
    "optim.weight_decay": lambda text: float(text.replace("_", "").replace(".inf", "inf")),
    "ibot.separate_head": lambda text: {
        "true": True,
        "yes": True,
        "on": True,
        "false": False,
        "no": False,
        "off": False,
    }[text.lower()],
}


@settings(max_examples=300, deadline=None)
@given(key=st.sampled_from([*READERS]), text=VALUES)
def test_an_override_is_refused_or_gives_exactly_what_was_written(key, text):
    try:
        value = flat(to_dict(load(None, [f"{key}={text}"])))[key]
    except ConfigError as error:
        assert key in str(error)
        return
    assert value == READERS[key](text), (key, text, value)
    assert key == "train.dataset_path" or not re.match(r"[-+]?0[0-9_]+$", text), (key, text, value)


def test_a_dataset_that_is_given_twice_is_an_error_that_speaks_of_quotes() -> None:
    words = [f"train.dataset_path=Tar:files=/data/{name}.tar" for name in "ab"]
    with pytest.raises(ConfigError, match=r"train.dataset_path is given twice, .*a.tar and .*b.tar: put quotes around"):
        config.load("train/quickstart", words)
    assert config.load("train/quickstart", [words[0], "train.seed=1", "train.seed=2", words[0]]).train.seed == 2
