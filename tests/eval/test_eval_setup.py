"""From a command line to the right backbone and the right image size, or an error that names the cause."""

import argparse
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from eval_images import CONFIG, command, tiny_backbone
from PIL import Image

from dinov2 import config
from dinov2.eval import knn, linear, log_regression, setup


def parsed(*words: str, config_file: str | Path = "eval/vits14_pretrain") -> argparse.Namespace:
    return setup.get_args_parser().parse_args(["--config-file", str(config_file), *words])


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(CONFIG)
    return path


def test_weights_or_a_wish_for_none_are_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed()
    assert "--pretrained-weights --random-init is required" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parsed("--random-init", "--pretrained-weights", "a.pth")


def test_counts_below_one_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--batch-size", "0"], ["--nb_knn", "10", "-1"], ["--n-tries", "two"]):
        with pytest.raises(SystemExit):
            knn.get_args_parser().parse_args(["--config-file", "a", "--random-init", *words])
        assert f"expected an integer of at least 1, got '{words[-1]}'" in capsys.readouterr().err


@pytest.mark.parametrize("number", ["0", "-0.1", "nan", "inf", "1e41", "warm"])
def test_rates_and_temperatures_of_which_nothing_can_be_computed_are_named(
    number: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for evaluation, flag in ((knn, "--temperature"), (linear, "--learning-rates")):
        with pytest.raises(SystemExit):
            evaluation.get_args_parser().parse_args(["--config-file", "a", "--random-init", f"{flag}={number}"])
        assert f"expected a number above 0 that is not extreme, got '{number}'" in capsys.readouterr().err


def test_overrides_of_one_command_line_do_not_reach_the_next() -> None:
    assert parsed("--random-init", "--opts", "a=1", "b=2", "--opts", "c=3").opts == ["a=1", "b=2", "c=3"]
    assert parsed("--random-init").opts == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], (256, 224)),
        (["--crop-size", "182"], (256, 182)),
        (["--resize-size", "518", "--crop-size", "518"], (518, 518)),
    ],
)
def test_images_have_the_published_size_or_that_of_the_flags(words: list[str], expected: tuple[int, int]) -> None:
    args = parsed("--random-init", *words)
    cfg = config.load(args.config_file)
    assert setup.image_sizes(args, cfg) == expected


def test_images_of_a_small_image_model_have_the_size_of_its_crops(small: Path) -> None:
    args = parsed("--random-init", config_file=small)
    assert setup.image_sizes(args, config.load(small)) == (16, 16)
    assert setup.image_sizes(args, config.load("train/vitl16_short"), 224) == (224, 224)


def test_impossible_sizes_are_named() -> None:
    cfg = config.load("eval/vits14_pretrain")
    with pytest.raises(ValueError, match="--crop-size 225 is not a multiple of student.patch_size = 14"):
        setup.image_sizes(parsed("--random-init", "--crop-size", "225"), cfg)
    with pytest.raises(ValueError, match="--crop-size 280 is larger than --resize-size 256"):
        setup.image_sizes(parsed("--random-init", "--crop-size", "280"), cfg)


def test_images_are_normalized_as_in_training(small: Path) -> None:
    cfg = config.load(small, ["augmentation.mean=[0.5,0.5,0.5]", "augmentation.std=[0.1,0.2,0.4]"])
    transform = setup.eval_transform(parsed("--random-init", config_file=small), cfg)
    tensor = transform(Image.new("RGB", (40, 20), (255, 0, 255)))
    assert tensor.shape == (3, 16, 16)
    torch.testing.assert_close(tensor[:, 0, 0], torch.tensor([5.0, -2.5, 1.25]))


def test_the_backbone_is_that_of_the_weights_and_frozen(small: Path, tmp_path: Path) -> None:
    expected = tiny_backbone()
    weights = tmp_path / "teacher_checkpoint.pth"
    state = {f"backbone.{name}": value for name, value in expected.state_dict().items()}
    torch.save({"teacher": state | {"dino_head.last_layer.weight_g": torch.ones(4, 1)}}, weights)
    args = parsed("--pretrained-weights", str(weights), "--output-dir", str(tmp_path), config_file=small)
    model, dtype = setup.setup_and_build_model(args)
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model(images), expected(images))
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert dtype == torch.float32  # on the CPU, though the config has fp16


@pytest.mark.parametrize(
    ("overrides", "hint"),
    [
        (["student.patch_size=4"], "student.patch_size"),
        (["student.arch=vit_base", "student.embed_dim=48"], "student.arch"),
        (["student.depth=3"], "unknown .*blocks.3."),
        (["student.depth=5"], "missing .*blocks.4."),
        (["student.ffn_layer=swiglufused"], "student.ffn_layer"),
        (["student.num_register_tokens=2"], "student.num_register_tokens"),
        (["student.layerscale=0"], "unknown .*blocks.0.ls1.gamma"),
    ],
)
def test_a_config_of_another_network_is_an_error(small: Path, tmp_path: Path, overrides: list[str], hint: str) -> None:
    weights = tmp_path / "weights.pth"
    torch.save(tiny_backbone().state_dict(), weights)
    with pytest.raises(ValueError, match=f"(?s)weights.pth do not fit this backbone.*{hint}"):
        setup.build_model_for_eval(config.load(small, overrides), str(weights))


def test_positions_of_another_image_size_are_resampled_and_logged(
    small: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = tmp_path / "weights.pth"
    torch.save(tiny_backbone().state_dict(), weights)
    with caplog.at_level(logging.WARNING):
        model = setup.build_model_for_eval(config.load(small, ["crops.global_crops_size=32"]), str(weights))
    assert model.pos_embed.shape == (1, 1 + 4 * 4, 24)
    assert "is for 2 x 2 patches, this model has 4 x 4: resampled" in caplog.text


def test_an_untrained_network_is_that_of_the_seed(small: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, same, other = (
        setup.build_model_for_eval(config.load(small, [f"train.seed={seed}"]), None) for seed in (0, 0, 1)
    )
    assert torch.equal(first.patch_embed.proj.weight, same.patch_embed.proj.weight)
    assert not torch.equal(first.patch_embed.proj.weight, other.patch_embed.proj.weight)
    with caplog.at_level(logging.WARNING):
        setup.build_model_for_eval(config.load(small), None)
    assert "--random-init" in caplog.text


def test_the_config_is_saved_but_not_over_the_one_that_was_read(small: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    config.save(config.load(small), run / "config.yaml")
    before = (run / "config.yaml").read_text()
    args = parsed("--random-init", "--opts", "train.seed=5", "--output-dir", str(run), config_file=run / "config.yaml")
    assert setup.setup(args).train.seed == 5
    assert (run / "config.yaml").read_text() == before
    args.output_dir = str(tmp_path / "eval")
    setup.setup(args)
    saved = config.load(tmp_path / "eval" / "config.yaml")
    assert saved.train.seed == 5 and saved.train.output_dir == str(tmp_path / "eval")
    assert (tmp_path / "eval" / "logs" / "log.txt").is_file()


@pytest.mark.parametrize("wrong", ["ImageFoldr:root=/", "ImageFolder:root=/no/such/folder", "ImageList:file=/no/list"])
@pytest.mark.parametrize("evaluation", [knn, log_regression, linear], ids=["knn", "log_regression", "linear"])
def test_a_dataset_that_is_not_there_leaves_no_output_folder(tmp_path: Path, evaluation: Any, wrong: str) -> None:
    words = command(tmp_path)
    words[words.index("--val-dataset") + 1] = wrong
    with pytest.raises((ValueError, FileNotFoundError), match="unknown dataset|no such|/no/"):
        evaluation.main(evaluation.get_args_parser().parse_args(words))
    assert not (tmp_path / "out").exists()
