"""Extracted features are those of the model: any tokens, blocks, sizes, weights and images, in memory and in files."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from eval_images import tiny_backbone
from PIL import Image
from torch import Tensor
from weight_server import serving

import dinov2
from dinov2 import config
from dinov2.data.transforms import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, make_classification_eval_transform
from dinov2.eval import setup
from dinov2.eval.extract.__main__ import main
from dinov2.eval.extract.files import ImageFeatures
from dinov2.eval.extract.frozen_backbone import FrozenBackbone
from dinov2.eval.features import ModelWithIntermediateLayers, ModelWithPooledTokens, extract_features
from dinov2.flags.evaluation import get_args_parser
from dinov2.flags.extract import parse
from dinov2.models import build_model
from dinov2.models.backbones import build_published
from dinov2.models.key_mapping import to_hf, to_timm
from dinov2.models.published import WEIGHTS_URL_VARIABLE
from dinov2.models.vision_transformer import DinoVisionTransformer

SIZES = [(40, 30), (64, 64), (32, 48), (100, 33), (48, 48), (40, 30), (40, 30)]  # (width, height) of images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of images of different sizes, in two class folders."""
    rng = np.random.default_rng(0)
    for number, size in enumerate(SIZES):
        path = tmp_path / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (3, 4, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC).save(path)
    return tmp_path / "images"


def paths_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.png"))


def cropped(paths: list[Path], resize_size: int, crop_size: int) -> Tensor:
    """The images as the evaluations prepare them."""
    transform = make_classification_eval_transform(resize_size=resize_size, crop_size=crop_size)
    return torch.stack([transform(Image.open(path)) for path in paths])


def extract(images: Any, **options: Any) -> ImageFeatures:
    return dinov2.extract_features(images, **{"model": tiny_backbone(), **options})


# --- Tokens, blocks and sizes ----------------------------------------------------------------------------------------


def test_the_class_token_of_the_last_block_is_the_output_of_the_model(folder: Path) -> None:
    features, paths = extract(folder), paths_in(folder)
    torch.testing.assert_close(features.class_token, tiny_backbone()(cropped(paths, 16, 16)))
    assert features.names == [str(path) for path in paths]
    assert features.labels == [0, 0, 0, 0, 1, 1, 1]
    assert features.grids.tolist() == [[2, 2]] * 7
    assert features.patch_tokens is None and features.mean_patch_token is None


def test_tokens_of_several_blocks_have_the_final_norm(folder: Path) -> None:
    features = extract(folder, tokens=["both", "mean"], layers=[0, -1], resize_size=40, crop_size=32, batch_size=3)
    images, model = cropped(paths_in(folder), 40, 32), tiny_backbone()
    first, last = model.get_intermediate_layers(images, [0, 3], return_class_token=True)
    for index, (patches, class_token) in enumerate((first, last)):
        torch.testing.assert_close(features.class_token[:, index], class_token)
        torch.testing.assert_close(features.patch_tokens[:, index].flatten(1, 2), patches)
        torch.testing.assert_close(features.mean_patch_token[:, index], patches.mean(dim=1))
    assert features.patch_tokens.shape == (7, 2, 4, 4, 24)
    torch.testing.assert_close(features.class_token[:, 1], model(images))


def test_a_number_of_layers_counts_from_the_end(folder: Path) -> None:
    two, listed = extract(folder, layers=2), extract(folder, layers=[3, 2])
    assert two.class_token.shape == (7, 2, 24) and torch.equal(two.class_token, listed.class_token)
    assert torch.equal(extract(folder, layers=[2]).class_token, two.class_token[:, 0])


def test_pooled_tokens_are_those_of_the_linear_evaluation(folder: Path) -> None:
    pooled = ModelWithPooledTokens(ModelWithIntermediateLayers(tiny_backbone(), 2))(cropped(paths_in(folder), 16, 16))
    features = extract(folder, tokens=["class", "mean"], layers=2)
    torch.testing.assert_close(torch.stack([features.class_token, features.mean_patch_token], dim=2), pooled)


def test_whole_images_keep_their_proportions(folder: Path) -> None:
    features = extract(folder, tokens=["both", "mean"], layers=2, size=32, batch_size=4)
    model = tiny_backbone()
    for index, path in enumerate(paths_in(folder)):
        with Image.open(path) as image:
            scale = 32 / min(image.size)
            width, height = (round(side * scale / 8) * 8 for side in image.size)
            pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)) / np.float32(255)
        pixels = (pixels - np.float32(IMAGENET_DEFAULT_MEAN)) / np.float32(IMAGENET_DEFAULT_STD)
        blocks = model.get_intermediate_layers(torch.from_numpy(pixels).permute(2, 0, 1)[None], 2, reshape=True)
        expected = torch.cat(blocks).permute(0, 2, 3, 1)
        assert features.grids[index].tolist() == [height // 8, width // 8] == list(expected.shape[1:3])
        torch.testing.assert_close(features.patch_tokens[index], expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(features.mean_patch_token[index], expected.mean(dim=(1, 2)), atol=1e-4, rtol=1e-4)
    assert len({tuple(grid) for grid in features.grids.tolist()}) > 3


def test_the_size_of_images_can_be_kept(folder: Path) -> None:
    features = extract(folder, tokens="patch", size="original")
    expected = [[round(height / 8), round(width / 8)] for height, width in [(30, 40), (48, 32), (48, 48), (30, 40)]]
    assert features.grids[:4].tolist() == expected
    assert [list(tokens.shape) for tokens in features.patch_tokens[:4]] == [[*grid, 24] for grid in expected]


def test_images_are_prepared_as_in_the_evaluations(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(
        "student: {arch: vit_small, patch_size: 8, embed_dim: 24, depth: 2, num_heads: 3}\n"
        "crops: {global_crops_size: 32, local_crops_size: 16}\n"
        "augmentation: {mean: [0.1, 0.2, 0.3], std: [0.4, 0.5, 0.6]}\n"
    )
    args = get_args_parser().parse_args(["--config-file", str(file), "--random-init"])
    cfg = config.load(file)
    dataset = setup.labeled_dataset(f"ImageFolder:root={folder}", setup.eval_transform(args, cfg))
    expected, labels = extract_features(setup.build_model_for_eval(cfg, None), dataset, 64, 0)
    features = dinov2.extract_features(folder, config_file=file, random_init=True)
    assert torch.equal(features.class_token, expected) and features.labels == labels.tolist()


def test_published_models_see_the_published_crop(folder: Path) -> None:
    torch.manual_seed(0)
    model = build_model("vit_small", img_size=518, patch_size=14, embed_dim=24, depth=1, num_heads=3).eval()
    features = dinov2.extract_features(paths_in(folder)[:2], model=model)
    torch.testing.assert_close(features.class_token, model(cropped(paths_in(folder)[:2], 256, 224)))
    assert features.grids.tolist() == [[16, 16]] * 2


# --- Images ----------------------------------------------------------------------------------------------------------


def test_images_in_memory_are_prepared_and_tensors_are_not(folder: Path) -> None:
    paths = paths_in(folder)
    expected = extract(folder)
    opened = [Image.open(path).copy() for path in paths]
    images = extract(opened)
    assert torch.equal(images.class_token, expected.class_token) and images.names[1] == "image 1"
    tensors = extract(cropped(paths, 16, 16))
    assert torch.equal(tensors.class_token, expected.class_token) and tensors.labels == [None] * 7
    assert torch.equal(extract(opened[0]).class_token, expected.class_token[:1])


def test_labels_of_several_sources_are_left_out(folder: Path) -> None:
    features = extract([folder / "a" / "0.png", folder, folder / "b" / "1.png"])
    assert features.labels == [None] * 9
    each = [extract(source).class_token for source in (folder / "a" / "0.png", folder, folder / "b" / "1.png")]
    torch.testing.assert_close(features.class_token, torch.cat(each))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([1, 2], "images are paths or dataset strings, or PIL images, or one tensor .*, not int"),
        (torch.zeros(3, 16, 16), r"a tensor of images is \(n, 3, H, W\) float, normalized, not 3 x 16 x 16"),
        (torch.zeros(1, 3, 20, 16), "1 images of 20 x 16 pixels: .* multiples of the patch size 8"),
        ([], "no images given"),
        ("nowhere", "no such images: 'nowhere'; give a folder, image files, "),
    ],
)
def test_unsuitable_images_are_named(images: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError, FileNotFoundError), match=message):
        extract(images)


# --- Options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": "cls"}, "unknown --tokens 'cls'; known: class, patch, both, mean"),
        ({"dtype": "bfloat16"}, "unknown --dtype 'bfloat16'; known: float32, float16"),
        ({"format": "pt"}, "unknown --format 'pt'; known: safetensors, npy"),
        ({"layers": 5}, "--layers 5: the model has 4 blocks, 0 to 3"),
        ({"layers": [0, -5]}, "--layers 0,-5: the model has 4 blocks"),
        ({"layers": [3, -1]}, "--layers 3,-1 names a block twice"),
        ({"size": 32, "crop_size": 16}, "--size 32 is for whole images, --crop-size 16 for crops"),
        ({"size": "whole"}, "unknown --size 'whole'; known: a number of pixels, original"),
        ({"crop_size": 20}, "--crop-size 20 is not a multiple of student.patch_size = 8"),
        ({"batch_size": 0}, "--batch-size 0 must be at least 1"),
        ({"num_workers": -1}, "--num-workers -1 must be at least 0"),
        ({"random_init": True}, "random_init cannot be used with a model that is a backbone already"),
        (
            {"model": "dinov2_vits15"},
            "unknown --model 'dinov2_vits15'; did you mean dinov2_vits14? Names: dinov2_vits14, ",
        ),
        ({"token": "patch"}, "unknown option 'token' of extract_features; known: tokens, layers, "),
    ],
)
def test_impossible_options_are_named(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        extract(folder, **options)


def test_a_tensor_is_not_preprocessed() -> None:
    with pytest.raises(ValueError, match="crop_size cannot be used with a tensor"):
        extract(torch.zeros(1, 3, 16, 16), crop_size=8)


@pytest.mark.parametrize(
    ("text", "expected"), [("4", 4), ("5,11", [5, 11]), ("-4,-1", [-4, -1]), ("5,", [5]), ("-2", [-2])]
)
def test_layers_are_a_number_or_a_list(text: str, expected: int | list[int]) -> None:
    assert parse(["--images", "a", "--output", "b", f"--layers={text}"]).layers == expected


@pytest.mark.parametrize("text", ["0", "last", "1,x", "1.5"])
def test_other_layers_are_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--images", "a", "--output", "b", f"--layers={text}"])
    assert "expected a number of last blocks such as 4, or indices" in capsys.readouterr().err


def test_features_that_are_not_finite_name_the_image(folder: Path) -> None:
    model = tiny_backbone()
    model.norm.weight.data[3] = torch.inf
    with pytest.raises(ValueError, match=r"norm\.weight are NaN or infinite, and so are the features of .*0\.png"):
        extract(folder, model=model)
    model.norm.weight.data[3] = 1e30
    with pytest.raises(
        ValueError, match=r"features of .*0\.png exceed the largest float16, 65504: use --dtype float32"
    ):
        extract(folder, model=model, dtype="float16", tokens="patch")


# --- Weights ---------------------------------------------------------------------------------------------------------


def save_as(kind: str, model: DinoVisionTransformer, folder: Path) -> Path:
    """Write weights in a form of a library, and return the path to give."""
    state = model.state_dict()
    if kind == "teacher of a run":
        sizes = {"patch_size": 14, "embed_dim": 128, "depth": 2, "num_heads": 2, "layerscale": 1.0}
        overrides = [*(f"student.{key}={value}" for key, value in sizes.items()), "crops.global_crops_size=28"]
        config.save(config.load("eval/vits14_pretrain", overrides), folder / "config.yaml")
        path = folder / "eval" / "training_9" / "teacher_checkpoint.pth"
        path.parent.mkdir(parents=True)
        torch.save({"teacher": {f"backbone.{name}": value for name, value in state.items()}}, path)
        return path.parent
    if kind == "folder of transformers":
        safetensors.torch.save_file(to_hf(state), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"num_attention_heads": model.num_heads}))
        return folder
    path = folder / ("weights.safetensors" if kind == "timm file" else "weights.pth")
    safetensors.torch.save_file(to_timm(state), path) if kind == "timm file" else torch.save(state, path)
    return path


KINDS = ["file", "file URL", "web URL", "folder of transformers", "timm file", "teacher of a run"]


@pytest.mark.parametrize("kind", KINDS)
def test_features_of_any_kind_of_weights(
    folder: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    model = build_model("vit_small", img_size=28, patch_size=14, embed_dim=128, depth=2, num_heads=2, init_values=1.0)
    path = save_as(kind, model.eval(), tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    output = tmp_path / "features"
    with serving(files={"/weights.pth": path.read_bytes()} if kind == "web URL" else {}) as server:
        weights = {"file URL": path.as_uri(), "web URL": f"{server.url}/weights.pth"}.get(kind, str(path))
        words = ["--pretrained-weights", weights, "--images", str(folder), "--output", str(output)]
        assert main([*words, "--num-workers", "0"]) == 0
    found = dinov2.load_features(output)
    torch.testing.assert_close(found.class_token, model(cropped(paths_in(folder), 28, 28)))
    recorded = json.loads((output / "metadata.json").read_text())["settings"]["model"]["weights"]
    assert recorded["source"] == weights and len(recorded["sha256"]) == 64


def test_features_of_a_published_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    model = build_published("dinov2_vits14_reg").eval()
    (tmp_path / "dinov2_vits14").mkdir()
    torch.save(model.state_dict(), tmp_path / "dinov2_vits14" / "dinov2_vits14_reg4_pretrain.pth")
    monkeypatch.setenv(WEIGHTS_URL_VARIABLE, tmp_path.as_uri())
    image = paths_in(folder)[0]
    found = dinov2.extract_features(image, model="dinov2_vits14_reg", resize_size=56, crop_size=56, tokens="both")
    expected: Any = model.forward_features(cropped([image], 56, 56))
    torch.testing.assert_close(found.class_token, expected["x_norm_clstoken"])
    torch.testing.assert_close(found.patch_tokens.flatten(1, 2), expected["x_norm_patchtokens"])


# --- Files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_format", ["safetensors", "npy"])
@pytest.mark.parametrize("sizes", [{}, {"size": 24}], ids=["crops", "whole images"])
def test_files_have_what_is_in_memory(folder: Path, tmp_path: Path, file_format: str, sizes: dict[str, int]) -> None:
    options: dict[str, Any] = {"tokens": ["both", "mean"], "layers": 2, "batch_size": 2, **sizes}
    expected = extract(folder, **options)
    output = extract(folder, output=tmp_path / "out", format=file_format, shard_size=4, **options)
    found = dinov2.load_features(output)
    assert found.names == expected.names and found.labels == expected.labels
    assert torch.equal(found.grids, expected.grids)
    torch.testing.assert_close(found.class_token, expected.class_token)
    torch.testing.assert_close(found.mean_patch_token, expected.mean_patch_token)
    for patches, others in zip(found.patch_tokens, expected.patch_tokens, strict=True):
        torch.testing.assert_close(patches, others)


def test_files_are_those_of_the_libraries(folder: Path, tmp_path: Path) -> None:
    expected = extract(folder, tokens=["both"], batch_size=4)
    one = extract(folder, tokens=["both"], output=tmp_path / "one", dtype="float16", batch_size=4)
    tensors = safetensors.torch.load_file(one / "features_00000.safetensors")
    assert tensors["class_token"].dtype == torch.float16 and tensors["patch_tokens"].shape == (7, 2, 2, 24)
    torch.testing.assert_close(tensors["class_token"], expected.class_token.half())
    with safetensors.safe_open(one / "features_00000.safetensors", "pt") as file:
        settings = json.loads(file.metadata()["settings"])
    assert settings == json.loads((one / "metadata.json").read_text())["settings"]
    two = extract(folder, tokens=["both"], output=tmp_path / "two", format="npy", batch_size=4)
    assert np.array_equal(np.load(two / "features_00000.class_token.npy"), expected.class_token.numpy())
    assert np.load(two / "features_00000.patch_tokens.npy", mmap_mode="r").shape == (7, 2, 2, 24)
    whole = extract(folder, tokens="patch", size=16, output=tmp_path / "whole")
    tensors = safetensors.torch.load_file(whole / "features_00000.safetensors")
    assert len(tensors["patch_tokens"]) == tensors["grids"].prod(dim=1).sum()


def test_what_was_done_is_recorded(folder: Path, tmp_path: Path) -> None:
    backbone = FrozenBackbone.of(tiny_backbone(), "mine")._replace(mean=(0.1, 0.2, 0.3))
    output = extract(f"ImageFolder:root={folder}", model=backbone, output=tmp_path / "out", shard_size=4, layers=[1])
    metadata = json.loads((output / "metadata.json").read_text())
    settings = metadata["settings"]
    assert settings["model"]["name"] == "mine" and settings["model"]["depth"] == 4
    assert settings["images"] == [f"ImageFolder:root={folder}"] and settings["num_images"] == 7
    assert settings["preprocessing"] | {"std": 0} == {
        "resize_size": 16,
        "crop_size": 16,
        "interpolation": "bicubic",
        "mean": [0.1, 0.2, 0.3],
        "std": 0,
    }
    assert (settings["tokens"], settings["layers"], settings["dtype"]) == (["class"], [1], "float32")
    assert settings["versions"]["dinov2"] == dinov2.__version__
    assert metadata["complete"] and metadata["images"] == 7 and metadata["unreadable"] == []
    assert [shard["images"] for shard in metadata["shards"]] == [4, 3]
    rows = [json.loads(line) for line in (output / "names.jsonl").read_text().splitlines()]
    assert rows[4] == {"name": str(folder / "b" / "1.png"), "label": 1, "grid": [2, 2]}
    assert sorted(path.name for path in output.iterdir()) == [
        "features_00000.safetensors",
        "features_00001.safetensors",
        "metadata.json",
        "names.jsonl",
    ]


def test_a_folder_without_complete_features_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no features in .*: it has no metadata\.json"):
        dinov2.load_features(folder)
    output = extract(folder, output=tmp_path / "out")
    content = (output / "features_00000.safetensors").read_bytes()
    (output / "features_00000.safetensors").write_bytes(content[:-5])
    with pytest.raises(ValueError, match=r"features_00000\.safetensors is damaged"):
        dinov2.load_features(output)


def test_the_package_is_imported_without_pytorch_and_unknown_names_are_errors() -> None:
    code = (
        "import sys, dinov2; print('torch' in sys.modules, callable(dinov2.extract_features), 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "True", "True"]
    with pytest.raises(AttributeError, match="has no attribute 'extract_feature'"):
        dinov2.extract_feature  # noqa: B018
