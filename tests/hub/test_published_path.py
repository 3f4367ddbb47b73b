"""The way the released weights take: files of their names and shapes on a server of their URL scheme, into torch.hub.

The released files themselves cannot be had where this was written. ViT-S is served with numbers, the others with their
shapes only: every tensor is one number repeated, which makes the files small, and the models are without memory.
"""

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from weight_server import WeightServer, serving

ROOT = Path(__file__).resolve().parents[2]

BACKBONES = [f"dinov2_vit{size}14{suffix}" for size in "sblg" for suffix in ("", "_reg")]
LARGE_AGAIN = (
    "dinov2_vitl14_reg",
    "dinov2_vitg14_reg",
)  # small ones have registers, too
NO_MEMORY = "ignore:.*copying from a non-meta parameter in the checkpoint to a meta parameter:UserWarning"


def hub_load(name: str, **kwargs: object) -> torch.nn.Module:
    return torch.hub.load(str(ROOT), name, source="local", **kwargs)


def file_of(state: dict[str, Tensor]) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def published_paths(name: str) -> tuple[str, str, str]:
    """The backbone, and its linear layers for 1 and 4 blocks."""
    folder = name.removesuffix("_reg")
    stem = f"/dinov2/{folder}/{folder}{'_reg4' if name.endswith('_reg') else ''}"
    return f"{stem}_pretrain.pth", f"{stem}_linear_head.pth", f"{stem}_linear4_head.pth"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WeightServer]:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with serving() as state:
        monkeypatch.setenv("DINOV2_WEIGHTS_URL", f"{state.url}/dinov2/")
        yield state


@torch.no_grad()
@pytest.mark.parametrize("name", ["dinov2_vits14", "dinov2_vits14_reg"])
def test_a_whole_vit_small_comes_over_the_wire(server: WeightServer, tmp_path: Path, name: str) -> None:
    source = hub_load(f"{name}_lc", pretrained=False).eval()
    backbone, _, head = published_paths(name)
    server.files = {backbone: file_of(source.backbone.state_dict()), head: file_of(source.linear_head.state_dict())}
    images = torch.randn(1, 3, 224, 224)
    expected = source.backbone(images)
    assert torch.equal(hub_load(name).eval()(images), expected)
    assert torch.equal(hub_load(f"{name}_lc", pretrained=True).eval()(images), source(images))
    assert [path for path, _ in server.requests] == [head, backbone][::-1], "the second model takes it from the cache"
    cached = sorted(path.name for path in (tmp_path / "hub" / "checkpoints").iterdir())
    assert cached == sorted(path.rpartition("/")[2] for path in (backbone, head))


@pytest.mark.filterwarnings(NO_MEMORY)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LARGE_AGAIN)) for name in BACKBONES]
)
def test_every_name_loads_files_of_its_shapes(server: WeightServer, name: str) -> None:
    backbone, head, head4 = published_paths(name)
    for layers, path in ((1, head), (4, head4)):
        with torch.device("meta"):
            model = hub_load(f"{name}_lc", pretrained=False, layers=layers)
        for part, place in ((model.backbone, backbone), (model.linear_head, path)):
            shapes = {key: value.shape for key, value in part.state_dict().items()}
            server.files[place] = file_of({key: torch.zeros(1).expand(shape) for key, shape in shapes.items()})
    assert sum(map(len, server.files.values())) < 2_000_000
    with torch.device("meta"):
        for layers in (1, 4):
            hub_load(f"{name}_lc", layers=layers)
        hub_load(name)
    assert sorted(path for path, _ in server.requests) == sorted((backbone, head, head4))


@pytest.mark.filterwarnings(NO_MEMORY)
def test_a_file_of_another_size_is_refused(server: WeightServer) -> None:
    with torch.device("meta"):
        state = hub_load("dinov2_vits14", pretrained=False).state_dict()
        server.files[published_paths("dinov2_vitb14")[0]] = file_of(
            {key: torch.zeros(1, device="cpu").expand(value.shape) for key, value in state.items()}
        )
        with pytest.raises(ValueError, match=r"other shape \(\d+\): cls_token \(file \(1, 1, 384\)"):
            hub_load("dinov2_vitb14")
