"""Files of heads: released ones are recognized by their tensors, ours come back whole, and errors name the cause."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dinov2.models.dense import DPTDepthHead, LinearDepthHead, SegmentationHead, read_head, save_head
from dinov2.models.vision_transformer import DinoVisionTransformer

NYU = (0.001, 10.0)


def release(path: Path, head: nn.Module, **others: Any) -> Path:
    """Write a head as the released files hold it."""
    state = {f"decode_head.{name}": value for name, value in head.state_dict().items()}
    torch.save({"state_dict": state | others}, path)
    return path


def assert_same(one: nn.Module, other: nn.Module) -> None:
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, value in other.state_dict().items():
        assert torch.equal(one.state_dict()[name], value), name


def randomized(head: nn.Module) -> nn.Module:
    for parameter in head.parameters():
        nn.init.normal_(parameter)
    return head


@pytest.mark.parametrize(("layers", "classes"), [(1, 150), (4, 21)])
def test_layers_and_classes_of_released_segmentation_heads_are_inferred(
    tmp_path: Path, layers: int, classes: int
) -> None:
    head = randomized(SegmentationHead(16 * layers, classes))
    found = read_head(release(tmp_path / "head.pth", head), kind="segmentation", embed_dim=16)
    assert_same(found.head, head)
    assert (found.num_layers, found.head.num_classes) == (layers, classes)
    assert (found.blocks, found.norm, found.meta, found.has_backbone) == (None, None, {}, False)


@pytest.mark.parametrize("layers", [1, 4])
def test_released_linear_depth_heads_get_the_range_that_is_given(tmp_path: Path, layers: int) -> None:
    head = randomized(LinearDepthHead(32 * layers))
    path = release(tmp_path / "head.pth", head)
    found = read_head(path, kind="linear depth", embed_dim=16, depth_range=(1, 5))
    assert_same(found.head, head)
    assert (found.num_layers, found.head.min_depth, found.head.max_depth) == (layers, 1, 5)
    with pytest.raises(ValueError, match=r"does not hold the range of its depths: give depth_range=\(min, max\)"):
        read_head(path, kind="linear depth", embed_dim=16)
    with pytest.raises(ValueError, match="0 < min < max in meters, not 5 to 1"):
        read_head(path, kind="linear depth", embed_dim=16, depth_range=(5, 1))


@pytest.mark.parametrize("readout", ["project", "ignore"])
def test_all_widths_of_released_dpt_heads_are_inferred(tmp_path: Path, readout: str) -> None:
    head = randomized(DPTDepthHead(16, channels=6, post_channels=(2, 3, 4, 5), readout=readout))
    found = read_head(release(tmp_path / "head.pth", head), kind="DPT depth", embed_dim=16, depth_range=NYU)
    assert_same(found.head, head)
    assert found.head.arguments == head.arguments


HEADS = [
    ("segmentation", lambda: SegmentationHead(64, 3, dropout=0.1, use_class_token=True), (1, 3)),
    (
        "linear depth",
        lambda: LinearDepthHead(48, num_bins=9, upsample=1, use_class_token=False, batch_norm=True),
        (1, 2, 3),
    ),
    ("linear depth", lambda: LinearDepthHead(32, norm="softmax", spacing="log", max_depth=20), (3,)),
    ("DPT depth", lambda: DPTDepthHead(16, channels=6, readout="add", min_depth=1, max_depth=7), (0, 1, 2, 3)),
]


@pytest.mark.parametrize(("kind", "make", "blocks"), HEADS)
def test_a_head_of_ones_own_comes_back_with_its_settings(
    tmp_path: Path, kind: str, make: Any, blocks: tuple[int, ...]
) -> None:
    head, meta = randomized(make()), {"dataset": "rooms", "classes": ["floor", "wall"], "step": 3}
    save_head(tmp_path / "head.pth", head, blocks=blocks, norm=True, meta=meta)
    assert [path.name for path in tmp_path.iterdir()] == ["head.pth"]
    found = read_head(tmp_path / "head.pth", kind=kind, embed_dim=16)
    assert_same(found.head, head)
    assert found.head.arguments == head.arguments
    assert (found.num_layers, found.blocks, found.norm, found.meta) == (len(blocks), blocks, True, meta)
    with pytest.raises(ValueError, match=rf"{len(blocks)} layers of a backbone of width 16, not 12"):
        read_head(tmp_path / "head.pth", kind=kind, embed_dim=12)


def test_the_range_of_a_head_of_ones_own_can_be_overridden(tmp_path: Path) -> None:
    save_head(tmp_path / "head.pth", LinearDepthHead(32, max_depth=20), blocks=[3], norm=False)
    found = read_head(tmp_path / "head.pth", kind="linear depth", embed_dim=16, depth_range=NYU)
    assert (found.head.min_depth, found.head.max_depth) == NYU


def test_what_cannot_be_saved_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a Linear is not a dense head; known: SegmentationHead, LinearDepthHead"):
        save_head(tmp_path / "head.pth", nn.Linear(1, 1), blocks=[0], norm=True)
    with pytest.raises(ValueError, match="meta of a head must be texts, numbers"):
        save_head(tmp_path / "head.pth", SegmentationHead(1, 1), blocks=[0], norm=True, meta={"path": tmp_path})
    with pytest.raises(ValueError, match=r"a head of 16 channels does not read the 3 blocks \[0, 1, 2\]"):
        save_head(tmp_path / "head.pth", SegmentationHead(16, 1), blocks=[0, 1, 2], norm=True)
    with pytest.raises(ValueError, match=r"does not read the 1 blocks \[3\]"):
        save_head(tmp_path / "head.pth", DPTDepthHead(16, channels=4), blocks=[3], norm=True)
    with pytest.raises(ValueError, match=r"does not read the 0 blocks \[\]"):
        save_head(tmp_path / "head.pth", SegmentationHead(16, 1), blocks=[], norm=True)
    assert not list(tmp_path.iterdir())


# --- Errors name the cause -------------------------------------------------------------------------------------------


def read_segmentation(path: Path, embed_dim: int = 16) -> Any:
    return read_head(path, kind="segmentation", embed_dim=embed_dim)


def test_a_head_of_another_width_is_refused_with_the_backbones_it_fits(tmp_path: Path) -> None:
    path = release(tmp_path / "head.pth", SegmentationHead(4 * 384, 2))
    message = (
        r"width 768: it reads 1536 channels, not 768 \(1 layer\) or 3072 \(4\); it fits ViT-S/14 with 4 layers or ViT-g"
    )
    with pytest.raises(ValueError, match=message):
        read_segmentation(path, 768)
    path = release(tmp_path / "head.pth", LinearDepthHead(2 * 1024))
    with pytest.raises(
        ValueError, match=r"reads 2048 channels, not 768 \(1 layer with class token\).* ViT-L/14 with 1 l"
    ):
        read_head(path, kind="linear depth", embed_dim=384, depth_range=NYU)
    path = release(tmp_path / "head.pth", DPTDepthHead(384, channels=4))
    with pytest.raises(ValueError, match="does not fit a backbone of width 768: its own is 384; it fits ViT-S/14"):
        read_head(path, kind="DPT depth", embed_dim=768, depth_range=NYU)


def test_a_head_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = release(tmp_path / "head.pth", LinearDepthHead(32))
    with pytest.raises(ValueError, match="holds a linear depth head, not a segmentation head"):
        read_segmentation(path)
    with pytest.raises(ValueError, match="holds a linear depth head, not a DPT depth head"):
        read_head(path, kind="DPT depth", embed_dim=16, depth_range=NYU)
    with pytest.raises(
        ValueError, match="unknown kind of head 'normals'; known: segmentation, linear depth, DPT depth"
    ):
        read_head(path, kind="normals", embed_dim=16)


def test_files_without_a_dense_head_are_described(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    backbone = DinoVisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=1)
    for content, what in (
        (backbone.state_dict(), "it is a backbone"),
        ({"state_dict": backbone.state_dict()}, "it is a backbone"),
        (nn.Linear(2, 2).state_dict(), "it is a linear classifier"),
        ({"state_dict": {}}, "it is empty"),
        ({"weights": torch.ones(1)}, "it holds weights"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=rf"no dense head \(names that begin with 'decode_head.'\): {what}"):
            read_segmentation(path)
    torch.save({"optimizer": {}, "epoch": 3}, path)
    with pytest.raises(ValueError, match="holds no state dict of tensors; it holds: optimizer, epoch"):
        read_segmentation(path)
    torch.save({"state_dict": {"decode_head.pixel_decoder.weight": torch.ones(1)}}, path)
    with pytest.raises(ValueError, match="holds an unknown head, .*; it has: pixel_decoder.weight"):
        read_segmentation(path)


def test_missing_unknown_and_misshapen_tensors_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "head.pth"
    head = SegmentationHead(16, 3)
    state = {f"decode_head.{name}": value for name, value in head.state_dict().items()}
    del state["decode_head.bn.running_var"]
    state |= {"decode_head.conv_seg.scale": torch.ones(1), "decode_head.bn.weight": torch.ones(8)}
    torch.save({"state_dict": state}, path)
    with pytest.raises(ValueError, match="do not fit this SegmentationHead") as caught:
        read_segmentation(path)
    lines = str(caught.value).splitlines()[1:]
    assert lines == [
        "  missing (1): bn.running_var",
        "  unknown (1): conv_seg.scale",
        "  other shape (1): bn.weight (file (8,), head (16,))",
    ]
    with pytest.raises(ValueError, match="unknown tensors beside the head: auxiliary_head.weight"):
        read_segmentation(release(path, head, **{"auxiliary_head.weight": torch.ones(1)}))
    del state["decode_head.conv_seg.weight"]
    dpt = {f"decode_head.{name}": value for name, value in DPTDepthHead(16, channels=4).state_dict().items()}
    del dpt["decode_head.reassemble_blocks.projects.2.conv.weight"]
    torch.save({"state_dict": dpt}, path)
    with pytest.raises(ValueError, match=r"is damaged: its DPT depth head lacks 'reassemble_blocks.projects.2.conv"):
        read_head(path, kind="DPT depth", embed_dim=16, depth_range=NYU)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    head = SegmentationHead(16, 3)
    head.bn.running_var[3] = value
    with pytest.raises(ValueError, match=r"are not finite \(NaN or infinite\): bn.running_var"):
        read_segmentation(release(tmp_path / "head.pth", head))


def test_damaged_and_absent_files_are_refused(tmp_path: Path) -> None:
    path = release(tmp_path / "head.pth", SegmentationHead(16, 3))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"head.pth is no checkpoint .* damaged"):
        read_segmentation(path)
    flipped = bytearray(whole)
    flipped[whole.index(head_bytes := torch.ones(16).numpy().tobytes()) + len(head_bytes) // 2] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match="damaged"):
        read_segmentation(path)
    with pytest.raises(FileNotFoundError, match="no weights at .*absent.pth"):
        read_segmentation(tmp_path / "absent.pth")


@pytest.mark.parametrize(
    "damage",
    [
        lambda settings: settings.pop("arguments"),
        lambda settings: settings.pop("blocks"),
        lambda settings: settings.update(blocks=[]),
        lambda settings: settings.update(norm=None),
        lambda settings: settings["arguments"].update(no_argument=1),
        lambda settings: settings["arguments"].pop("in_channels"),
    ],
)
def test_damaged_settings_are_named(tmp_path: Path, damage: Any) -> None:
    path = tmp_path / "head.pth"
    save_head(path, SegmentationHead(16, 3), blocks=[3], norm=True)
    content = torch.load(path)
    damage(content["head"])
    torch.save(content, path)
    with pytest.raises(ValueError, match="head.pth is damaged: its "):
        read_segmentation(path)


def test_a_backbone_beside_the_head_is_noticed_and_wrappers_are_removed(tmp_path: Path) -> None:
    head = SegmentationHead(16, 3)
    path = release(tmp_path / "whole.pth", head, **{"backbone.cls_token": torch.ones(1, 1, 16)})
    assert read_segmentation(path).has_backbone
    torch.save({f"module.decode_head.{name}": value for name, value in head.state_dict().items()}, path)
    assert_same(read_segmentation(path).head, head)
