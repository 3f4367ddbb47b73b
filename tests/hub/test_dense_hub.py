"""torch.hub: depth estimators and segmenters by name have the published heads, ranges and files, and load strictly."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from weight_server import WeightServer, serving

from dinov2.hub import depthers, segmenters
from dinov2.models.dense import Depther, SegmentationHead, Segmenter, save_head
from dinov2.models.dense.head_files import weights_digest
from dinov2.models.download import cache_path

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"s": (384, 12), "b": (768, 12), "l": (1024, 24), "g": (1536, 40)}
TINY = {"depth": 4, "embed_dim": 16, "num_heads": 2, "img_size": 28}
NO_MEMORY = "ignore:.*copying from a non-meta parameter in the checkpoint to a meta parameter:UserWarning"

# Entry point, its options, and the part of the file name that says what the head is.
VARIANTS: list[tuple[str, dict[str, Any], str]] = [
    ("_ld", {}, "nyu_linear4"),
    ("_ld", {"layers": 1}, "nyu_linear"),
    ("_ld", {"layers": 4, "weights": "KITTI"}, "kitti_linear4"),
    ("_ld", {"layers": 1, "weights": depthers.Weights.KITTI}, "kitti_linear"),
    ("_dd", {}, "nyu_dpt"),
    ("_dd", {"weights": "KITTI"}, "kitti_dpt"),
    ("_seg", {}, "ade20k_linear"),
    ("_seg", {"head": "ms"}, "ade20k_ms"),
    ("_seg", {"weights": "VOC2012"}, "voc2012_linear"),
    ("_seg", {"head": "ms", "weights": segmenters.Weights.VOC2012}, "voc2012_ms"),
]
IDS = [content for _, _, content in VARIANTS]


def hub_load(name: str, **kwargs: object) -> Any:
    return torch.hub.load(str(ROOT), name, source="local", **kwargs)


def released(head: nn.Module) -> dict[str, Any]:
    return {"state_dict": {f"decode_head.{name}": value for name, value in head.state_dict().items()}}


def assert_same(one: nn.Module, other: nn.Module) -> None:
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, value in other.state_dict().items():
        assert torch.equal(one.state_dict()[name], value), name


def depth_range_of(model: Any) -> tuple[float, float]:
    return model.decode_head.min_depth, model.decode_head.max_depth


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DINOV2_WEIGHTS_URL", str(tmp_path))
    (tmp_path / "dinov2_vits14").mkdir()
    return tmp_path / "dinov2_vits14"


# --- What is built ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_segmenters_have_the_published_heads(size: str) -> None:
    width, depth = SIZES[size]
    for _, options, content in VARIANTS[6:]:
        with torch.device("meta"):
            model = hub_load(f"dinov2_vit{size}14_seg", pretrained=False, **options)
        layers, classes = 4 if "ms" in content else 1, 150 if "ade20k" in content else 21
        assert {name: tuple(value.shape) for name, value in model.decode_head.state_dict().items()} == {
            "bn.weight": (layers * width,),
            "bn.bias": (layers * width,),
            "bn.running_mean": (layers * width,),
            "bn.running_var": (layers * width,),
            "bn.num_batches_tracked": (),
            "conv_seg.weight": (classes, layers * width, 1, 1),
            "conv_seg.bias": (classes,),
        }
        assert (model.blocks, model.norm) == (tuple(range(depth - layers, depth)), True)
        assert isinstance(model, Segmenter)
        assert not model.training
        assert not model.cut_padding


def test_depth_ranges_are_those_of_the_published_code_unless_given() -> None:
    """Bins of linear heads end at 80 m whatever they were trained on; DPT heads are clamped to the data's range."""
    expected = {"nyu_dpt": (0.001, 10), "kitti_dpt": (0.001, 80)}
    for name, options, content in VARIANTS[:6]:
        for pretrained_range in (None, (0.5, 7.0)):
            model = hub_load(f"dinov2_vits14{name}", pretrained=False, depth_range=pretrained_range, **options, **TINY)
            assert depth_range_of(model) == (pretrained_range or expected.get(content, (0.001, 80)))
            assert isinstance(model, Depther)
            assert not model.norm
    model = depthers.dinov2_vits14_ld(pretrained=False, depth_range=depthers.DEPTH_RANGES["NYU"], **TINY)
    assert model.decode_head.bins()[-1] == 10


@torch.no_grad()
def test_images_of_any_size_get_depth_and_logits() -> None:
    images = torch.randn(2, 3, 30, 45)
    for name, channels in (("_ld", 1), ("_dd", 1), ("_seg", 150)):
        assert hub_load(f"dinov2_vits14{name}", pretrained=False, **TINY)(images).shape == (2, channels, 30, 45)


# --- Weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options", "content"), VARIANTS, ids=IDS)
def test_pretrained_loads_what_the_folder_holds(folder: Path, name: str, options: dict[str, Any], content: str) -> None:
    source = hub_load(f"dinov2_vits14{name}", pretrained=False, **options, **TINY)
    torch.save(source.backbone.state_dict(), folder / "dinov2_vits14_pretrain.pth")
    torch.save(released(source.decode_head), folder / f"dinov2_vits14_{content}_head.pth")
    loaded = hub_load(f"dinov2_vits14{name}", **options, **TINY)
    assert_same(loaded, source)
    assert (loaded.blocks, loaded.norm, loaded.training) == (source.blocks, source.norm, False)
    if name != "_seg":
        assert depth_range_of(loaded) == depth_range_of(source)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WeightServer]:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with serving() as state:
        monkeypatch.setenv("DINOV2_WEIGHTS_URL", f"{state.url}/dinov2/")
        yield state


def file_of(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def flat(module: nn.Module) -> dict[str, Tensor]:
    """A state dict of the same shapes, every tensor of which is one number repeated."""
    return {
        name: torch.zeros((), dtype=value.dtype, device="cpu").expand(value.shape)
        for name, value in module.state_dict().items()
    }


@pytest.mark.filterwarnings(NO_MEMORY)
@pytest.mark.parametrize("size", SIZES)
def test_every_name_loads_files_of_its_shapes_from_a_server(
    server: WeightServer, monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    backbones = set()
    if size != "s":  # their whole backbones take seconds, and are loaded as those of classifiers are
        for module in (depthers, segmenters):
            monkeypatch.setattr(module, "load_backbone", lambda _, source: backbones.add(source))
    stem = f"/dinov2/dinov2_vit{size}14/dinov2_vit{size}14_"
    for name, options, content in VARIANTS:
        with torch.device("meta"):
            model = hub_load(f"dinov2_vit{size}14{name}", pretrained=False, **options)
        head = {f"decode_head.{key}": value for key, value in flat(model.decode_head).items()}
        server.files[f"{stem}{content}_head.pth"] = file_of({"state_dict": head})
    if size == "s":
        server.files[f"{stem}pretrain.pth"] = file_of(flat(model.backbone))
    with torch.device("meta"):
        for name, options, _ in VARIANTS:
            hub_load(f"dinov2_vit{size}14{name}", **options)
    assert backbones == (set() if size == "s" else {f"{server.url}{stem}pretrain.pth"})
    assert sorted(path for path, _ in server.requests) == sorted(server.files)
    assert all(cache_path(f"{server.url}{path}").is_file() for path in server.files)
    assert cache_path("http://x/y/dinov2_vitg14_kitti_dpt_head.pth").name == "dinov2_vitg14_kitti_dpt_head.pth"
    assert cache_path("http://x/y/dinov2_vitg14_kitti_ms_head.pth").name != "dinov2_vitg14_kitti_ms_head.pth"


def test_a_head_of_other_weights_is_warned_of(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    backbone = hub_load("dinov2_vits14", pretrained=False, **TINY)
    torch.save(backbone.state_dict(), folder / "dinov2_vits14_pretrain.pth")
    save_head(
        folder / "mine.pth",
        SegmentationHead(backbone.embed_dim, 7),
        blocks=[3],
        norm=True,
        meta={"backbone": weights_digest(backbone)},
    )
    segmenters.dinov2_vits14_seg(weights=folder / "mine.pth", **TINY)
    assert not caplog.records
    with torch.no_grad():
        backbone.norm.bias[0] += 1e-3
    torch.save(backbone.state_dict(), folder / "dinov2_vits14_pretrain.pth")
    segmenters.dinov2_vits14_seg(weights=folder / "mine.pth", **TINY)
    assert "was trained on a backbone with other weights" in caplog.text


def test_heads_of_ones_own_are_used_as_they_were_trained(folder: Path) -> None:
    source = hub_load("dinov2_vits14", pretrained=False, **TINY)
    torch.save(source.state_dict(), folder / "dinov2_vits14_pretrain.pth")
    head = SegmentationHead(32, 7)
    save_head(folder / "mine.pth", head, blocks=[1, 3], norm=False)
    model = segmenters.dinov2_vits14_seg(weights=folder / "mine.pth", **TINY)
    assert (model.blocks, model.norm, model.decode_head.num_classes) == ((1, 3), False, 7)
    assert_same(model.decode_head, head)
    assert_same(model.backbone, source)

    depther = hub_load("dinov2_vits14_ld", pretrained=False, depth_range=(0.5, 30.0), layers=1, **TINY)
    save_head(folder / "mine.pth", depther.decode_head, blocks=[3], norm=True)
    model = depthers.dinov2_vits14_ld(weights=str(folder / "mine.pth"), **TINY)
    assert (model.blocks, model.norm, depth_range_of(model)) == ((3,), True, (0.5, 30))


def test_a_whole_model_of_ones_own_is_taken(tmp_path: Path) -> None:
    for name, options in (("_seg", {}), ("_dd", {"depth_range": (0.001, 10)})):
        source = hub_load(f"dinov2_vits14{name}", pretrained=False, **TINY)
        torch.save(source.state_dict(), tmp_path / "whole.pth")
        assert_same(hub_load(f"dinov2_vits14{name}", weights=tmp_path / "whole.pth", **options, **TINY), source)


# --- Errors ----------------------------------------------------------------------------------------------------------


def test_wrong_choices_are_named_with_the_right_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown weights 'SUN'; known: NYU, KITTI, or the path or URL"):
        depthers.dinov2_vits14_ld(weights="SUN", **TINY)
    with pytest.raises(ValueError, match="unknown weights 'CITYSCAPES'; known: ADE20K, VOC2012"):
        segmenters.dinov2_vits14_seg(weights="CITYSCAPES", **TINY)
    with pytest.raises(ValueError, match="layers must be 1 or 4, not 2"):
        depthers.dinov2_vits14_ld(layers=2, **TINY)
    with pytest.raises(ValueError, match="layers must be 4 for a DPT head, not 1"):
        depthers.dinov2_vits14_dd(layers=1, **TINY)
    with pytest.raises(ValueError, match="unknown segmentation head 'm2f'; known: linear, ms"):
        segmenters.dinov2_vits14_seg(head="m2f", **TINY)
    with pytest.raises(ValueError, match="unknown depth head 'bins'; known: linear, dpt"):
        depthers.make_depther("vit_small", head="bins", **TINY)
    with pytest.raises(ValueError, match="are not loaded with pretrained=False"):
        segmenters.dinov2_vits14_seg(weights=tmp_path / "head.pth", pretrained=False, **TINY)


def test_files_that_do_not_fit_are_refused_before_the_backbone_is_read(folder: Path) -> None:
    """There is no file of the backbone in the folder."""
    linear = released(SegmentationHead(16, 150))
    torch.save(linear, folder / "dinov2_vits14_ade20k_ms_head.pth")
    with pytest.raises(ValueError, match="ade20k_ms_head.pth holds the head 'linear', on 1 layers, not 'ms'"):
        segmenters.dinov2_vits14_seg(head="ms", **TINY)
    torch.save(linear, folder / "dinov2_vits14_voc2012_linear_head.pth")
    with pytest.raises(ValueError, match="has 150 classes, VOC2012 has 21"):
        segmenters.dinov2_vits14_seg(weights="VOC2012", **TINY)
    torch.save(linear, folder / "dinov2_vits14_nyu_linear4_head.pth")
    with pytest.raises(ValueError, match="holds a segmentation head, not a linear depth head"):
        depthers.dinov2_vits14_ld(**TINY)
    one = depthers.dinov2_vits14_ld(pretrained=False, layers=1, **TINY)
    torch.save(released(one.decode_head), folder / "dinov2_vits14_nyu_linear4_head.pth")
    with pytest.raises(ValueError, match="reads 1 layers, not layers=4"):
        depthers.dinov2_vits14_ld(**TINY)
    with pytest.raises(ValueError, match="does not hold the range of its depths"):
        depthers.dinov2_vits14_ld(layers=1, weights=folder / "dinov2_vits14_nyu_linear4_head.pth", **TINY)
    with pytest.raises(FileNotFoundError, match="dinov2_vits14_nyu_dpt_head.pth"):
        depthers.dinov2_vits14_dd(**TINY)


def test_a_released_file_of_another_backbone_is_refused_even_if_its_shapes_fit(tmp_path: Path) -> None:
    """One layer of ViT-g/14 has as many channels as four of ViT-S/14."""
    path = tmp_path / "dinov2_vitg14_ade20k_linear_head.pth"
    torch.save(released(SegmentationHead(1536, 150)), path)
    with pytest.raises(ValueError, match="is named as a file of dinov2_vitg14, but the backbone is vit_small"):
        segmenters.dinov2_vits14_seg(head="ms", weights=path)
