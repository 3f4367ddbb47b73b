"""Figures of dense predictions: what is drawn is what the head predicts, with the names and colors of its classes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from dinov2 import config
from dinov2.data.dense.palettes import voc_palette
from dinov2.eval.dense.heads import ChosenHead
from dinov2.eval.extract.frozen_backbone import FrozenBackbone
from dinov2.models import build_model
from dinov2.models.dense import Depther, LinearDepthHead, SegmentationHead, Segmenter, save_head
from dinov2.visualization import __main__ as visualize
from dinov2.visualization.dense_figures import classes_of, depth_sheet, protocol_of, segmentation_sheet
from dinov2.visualization.inputs import LoadedImage

CONFIG = """
student: {arch: vit_small, patch_size: 8, embed_dim: 24, depth: 2, num_heads: 3, init_std: 0.3}
crops: {global_crops_size: 32, local_crops_size: 8}
"""
COLORS = [[250, 20, 20], [20, 250, 20], [20, 20, 250]]
META = {"classes": ["sea", "sand", "sky"], "colors": COLORS, "protocol": "dinov2 with crop_size=32", "crop_size": 32}
LEVELS = (torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))


@pytest.fixture
def backbone(tmp_path: Path) -> FrozenBackbone:
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    torch.manual_seed(0)
    model = build_model(**config.backbone_arguments(config.load(str(tmp_path / "tiny.yaml")))).eval()
    return FrozenBackbone(model, "tiny", shorter_side=32)


def segmentation_head() -> SegmentationHead:
    torch.manual_seed(1)
    head = SegmentationHead(24, 3)
    torch.nn.init.normal_(head.conv_seg.weight)
    return head.eval()


def image(width: int, height: int, name: str = "a.png") -> LoadedImage:
    pixels = np.random.default_rng(width).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    return LoadedImage(name, name, Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def normalized(each: LoadedImage) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(each.image)).permute(2, 0, 1) / 255
    return ((pixels - LEVELS[0]) / LEVELS[1])[None]


def test_classes_are_those_of_the_windows_of_the_protocol(backbone: FrozenBackbone) -> None:
    head = ChosenHead(segmentation_head(), (1,), True, "OUT/head.pth", META)
    protocol = protocol_of(head, backbone)
    assert (protocol.name, protocol.crop_size, protocol.stride) == ("dinov2", 32, 21)
    wide = image(64, 32)
    figure = segmentation_sheet(backbone, [wide, image(32, 32)], head, protocol=protocol)
    segmenter = Segmenter(backbone.model, head.head, blocks=(1,), norm=True).eval()
    logits, visits = torch.zeros(1, 3, 32, 64), torch.zeros(64)
    with torch.no_grad():
        for left in (0, 21, 32):
            logits[..., left : left + 32] += segmenter(normalized(wide)[..., left : left + 32])
            visits[left : left + 32] += 1
    expected = (logits / visits).argmax(1)[0].numpy()
    assert figure.arrays["classes"][0].dtype == np.int16 and len(np.unique(expected)) == 3
    assert (figure.arrays["classes"][0] == expected).mean() > 0.995
    assert figure.arrays["classes"][1].shape == (32, 32)
    found = {color for _, color in figure.sheet.getcolors(10**7)}
    assert {tuple(color) for color in COLORS} <= found, "the legend has the colors of the head file"


def test_images_can_keep_their_sizes_and_protocols_be_chosen(backbone: FrozenBackbone) -> None:
    head = ChosenHead(segmentation_head(), (1,), True, "OUT/head.pth", META)
    protocol = protocol_of(head, backbone)
    for keep, shape in ((True, (50, 70)), (False, (32, 45))):
        figure = segmentation_sheet(backbone, [image(70, 50)], head, protocol=protocol, keep_size=keep)
        assert figure.arrays["classes"][0].shape == shape
    assert protocol_of(head, backbone, "dinov2_ms").short_side == 32
    published = ChosenHead(segmentation_head(), (8, 9, 10, 11), True, "x/dinov2_vits14_ade20k_ms_head.pth")
    assert protocol_of(published, backbone._replace(shorter_side=448)).short_side == 640
    assert protocol_of(published._replace(blocks=(11,)), backbone._replace(shorter_side=448)).short_side == 512


def test_names_and_colors_of_classes() -> None:
    trained = ChosenHead(SegmentationHead(24, 3), (1,), True, "head.pth", META)
    assert classes_of(trained).names == ["sea", "sand", "sky"] and classes_of(trained).palette.tolist() == COLORS
    assert classes_of(trained, ["a", "b", "c"]).names == ["a", "b", "c"]
    with pytest.raises(ValueError, match="--classes names 2 classes, the head has 3"):
        classes_of(trained, ["a", "b"])
    voc = classes_of(ChosenHead(SegmentationHead(24, 21), (1,), True, "x/dinov2_vits14_voc2012_linear_head.pth"))
    assert voc.names[15] == "person" and np.array_equal(voc.palette, voc_palette(21))
    other = classes_of(trained._replace(meta={}))
    assert other.names == ["class 0", "class 1", "class 2"] and len({*map(tuple, other.palette)}) == 3


def test_depth_is_that_of_the_image_and_its_mirror_image(backbone: FrozenBackbone) -> None:
    torch.manual_seed(2)
    head = LinearDepthHead(48, min_depth=0.5, max_depth=6.0).eval()
    torch.nn.init.normal_(head.conv_depth.weight, std=0.3)
    wide = image(64, 32)
    figure = depth_sheet(backbone, [wide], ChosenHead(head, (1,), False, "head.pth"), shorter_side=32)
    depther = Depther(backbone.model, head, blocks=(1,), norm=False).eval()
    with torch.no_grad():
        both = [depther(normalized(wide)), depther(normalized(wide).flip(-1)).flip(-1)]
    np.testing.assert_allclose(figure.arrays["depth"][0], torch.stack(both).mean(0)[0, 0].numpy(), rtol=1e-3)
    # The farthest place is darker than the nearest.
    depth = figure.arrays["depth"][0]
    drawn = np.array(figure.sheet.convert("L"), float)[-400:]  # the map is the last row
    assert depth.std() > 0.01 and drawn[:, 40:].min() < 30 and drawn.max() == 255


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The flags of a small model, in a folder with an image and two heads."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(CONFIG)
    image(48, 32).image.save("a.png")
    save_head("classes.pth", segmentation_head(), blocks=(1,), norm=True, meta=META)
    depth_head = LinearDepthHead(48, min_depth=0.5, max_depth=6.0)
    save_head("depth.pth", depth_head, blocks=(1,), norm=False)
    return ["--config-file", "tiny.yaml", "--random-init", "--images", "a.png"]


def test_the_commands_draw_and_keep_the_numbers(files: list[str]) -> None:
    assert visualize.main(["segmentation", *files, "--head", "classes.pth", "--npy"]) == 0
    classes = np.load("segmentation.classes.npy")
    assert classes.shape == (1, 32, 48) and set(np.unique(classes)) <= {0, 1, 2} and Path("segmentation.png").is_file()
    assert visualize.main(["segmentation", *files, "--head", "classes.pth", "--npy", "--size", "16"]) == 0
    assert np.load("segmentation.classes.npy").shape == (1, 16, 24)
    words = ["--head", "depth.pth", "--npy", "--bins", "1", "3", "--output", "new/d.jpg"]
    assert visualize.main(["depth", *files, *words]) == 0
    depth = np.load("new/d.depth.npy")
    assert depth.shape == (1, 32, 48) and 1 <= depth.min() <= depth.max() <= 3


def test_a_released_head_is_found_by_its_name(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path("mirror", "dinov2_vits14")
    folder.mkdir(parents=True)
    head = SegmentationHead(384, 21)
    state = {f"decode_head.{name}": value for name, value in head.state_dict().items()}
    torch.save({"state_dict": state}, folder / "dinov2_vits14_voc2012_linear_head.pth")
    monkeypatch.setenv("DINOV2_WEIGHTS_URL", "mirror")
    words = ["segmentation", "--images", "a.png", "--random-init", "--head", "voc2012_linear", "--size", "28", "--npy"]
    assert visualize.main([*words, "--model", "dinov2_vits14"]) == 0
    assert np.load("segmentation.classes.npy").shape == (1, 28, 42)
    with pytest.raises(ValueError, match="not for one of width 384 with 12 blocks, .* and 4 registers"):
        visualize.main([*words, "--model", "dinov2_vits14_reg"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["segmentation", "--head", "depth.pth"], "depth.pth holds a linear depth head, not a segmentation head"),
        (["depth", "--head", "classes.pth"], "classes.pth holds a segmentation head, not a linear depth or DPT depth"),
        (["depth", "--head", "nyu_dpd"], "unknown head 'nyu_dpd'; known: nyu_linear"),
        (
            ["segmentation", "--head", "classes.pth", "--classes", "tiny.yaml"],
            "--classes names 2 classes, the head has 3",
        ),
        (["segmentation", "--head", "ade20k_linear"], "the released head 'ade20k_linear' is for released backbones"),
    ],
)
def test_what_does_not_fit_is_refused(files: list[str], words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        visualize.main([*words, *files])


def test_a_head_is_needed(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in ((["depth"], "--head"), (["segmentation", "--head", "x", "--protocol", "capi"], "'capi'")):
        with pytest.raises(SystemExit):
            visualize.main([*words, *files])
        assert message in capsys.readouterr().err


def test_half_precision_is_not_used_for_the_head(backbone: FrozenBackbone) -> None:
    head = ChosenHead(segmentation_head(), (1,), True, "head.pth", META)
    protocol = protocol_of(head, backbone)
    arrays = [
        segmentation_sheet(backbone._replace(autocast_dtype=dtype), [image(40, 40)], head, protocol=protocol).arrays
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert np.array_equal(arrays[0]["classes"][0], arrays[1]["classes"][0])
    assert functional.one_hot(torch.from_numpy(arrays[0]["classes"][0]).long()).sum() == 32 * 32
