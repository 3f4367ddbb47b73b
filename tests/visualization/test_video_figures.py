"""Videos beside their components: the PCA of all frames, colors that stay, memory that does not grow."""

import errno
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.analysis.pca import fit_foreground, fit_pca_colormap
from dinov2.eval.extract.frozen_backbone import FrozenBackbone
from dinov2.eval.extract.video import Video
from dinov2.models import build_model
from dinov2.visualization.feature_maps import image_tokens
from dinov2.visualization.video import writing_video
from dinov2.visualization.video_figures import TokenStore, draw_video


def tiny_backbone() -> FrozenBackbone:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "pos_embed_std": 0.1}
    return FrozenBackbone(build_model("vit_small", **sizes, init_std=0.2).eval().requires_grad_(False), "tiny")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 frames of a bright disc that moves over a dark ramp, 75 x 50 pixels."""
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    y, x = np.mgrid[:50, :76]
    with writing_video(path, Fraction(10)) as write:
        for number in range(20):
            frame = np.stack([x, y, 76 - x], axis=-1).astype(np.uint8)
            frame[(x - 10 - 2 * number) ** 2 + (y - 25) ** 2 < 144] = (250, 200, 40)
            write(frame)
    return path


# --- Tokens on disk --------------------------------------------------------------------------------------------------


def test_tokens_come_back_in_order_again_and_again(tmp_path: Path) -> None:
    tokens = torch.randn(40, 2, 3, 5).half()
    with TokenStore(tmp_path, (2, 3, 5)) as store:
        for part in tokens.split([1, 17, 0, 22]):
            store.add(part)
        for _ in range(2):
            assert torch.equal(torch.cat(list(store)), tokens) and store.count == 40
        store.save(tmp_path / "tokens.npy")
    assert np.array_equal(np.load(tmp_path / "tokens.npy"), tokens.numpy())
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.npy"]


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_full_disk_is_an_error_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**40, 2**40 - 2**30, 2**30))
    with TokenStore(tmp_path, (32, 32, 512), expected=1000):
        pass
    with pytest.raises(OSError, match=r"1025 frames need 1\.0 GiB .* and 1\.0 GiB are free; a smaller --size") as error:
        TokenStore(tmp_path, (32, 32, 512), expected=1025)
    assert error.value.errno == errno.ENOSPC and error.value.filename == str(tmp_path)


# --- Videos ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("foreground", [False, True])
def test_the_panels_show_the_components_of_all_frames(clip: Path, tmp_path: Path, foreground: bool) -> None:
    backbone, output = tiny_backbone(), tmp_path / "pca.mp4"
    count = draw_video(
        backbone, Video(clip), output, shorter_side=48, foreground=foreground, tokens_file=tmp_path / "tokens.npy"
    )
    tokens = torch.from_numpy(np.load(tmp_path / "tokens.npy")).float()
    assert count == 20 and tokens.shape == (20, 6, 9, 24)
    frames = [Image.fromarray(frame) for frame in Video(clip).arrays((72, 48))]
    torch.testing.assert_close(tokens, torch.stack(image_tokens(backbone, frames)), rtol=2e-3, atol=2e-3)
    drawn = Video(output)
    assert drawn.rate == 10 and drawn.size == (2 * 504, 336)
    panels = np.stack([frame[:, 504:] for frame in drawn.arrays()]).reshape(20, 6, 56, 9, 56, 3)[:, :, 28, :, 28]
    colormap = fit_pca_colormap([tokens], fit_foreground([tokens]) if foreground else None)
    expected = 255 * colormap(tokens).numpy()
    assert np.abs(panels - expected).mean() < 12  # chroma is stored at half the resolution
    left = next(drawn.arrays())[:, :504]
    original = next(Video(clip).arrays((504, 336)))
    assert np.abs(left.astype(int) - original).mean() < 4


def test_one_of_several_frames_makes_a_slower_video_and_odd_sizes_are_fine(clip: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model("vit_small", img_size=35, patch_size=5, embed_dim=24, depth=1, num_heads=2).eval()
    output = tmp_path / "pca.mp4"
    assert draw_video(FrozenBackbone(model, "odd"), Video(clip), output, shorter_side=35, every=3, smooth=True) == 7
    drawn = Video(output)
    assert (drawn.count_frames(), drawn.rate) == (7, Fraction(10, 3))
    assert drawn.size[0] % 4 == drawn.size[1] % 2 == 0


def test_a_gif_becomes_a_gif_or_an_mp4(clip: Path, tmp_path: Path) -> None:
    with writing_video(tmp_path / "in.gif", Fraction(10)) as write:
        for frame in Video(clip).arrays():
            write(frame)
    for name in ("out.gif", "out.mp4"):
        assert draw_video(tiny_backbone(), Video(tmp_path / "in.gif"), tmp_path / name, shorter_side=16) == 20
        assert Video(tmp_path / name).count_frames() == 20


# Run in a process of its own, whose largest memory is measured.
DRAW = """
import resource, sys
from fractions import Fraction
from pathlib import Path
import numpy as np, torch
from dinov2.eval.extract.frozen_backbone import FrozenBackbone
from dinov2.eval.extract.video import Video
from dinov2.visualization.video import writing_video
from dinov2.visualization.video_figures import draw_video
from dinov2.models import build_model

torch.set_num_threads(1)
clip, count = Path(sys.argv[1]), int(sys.argv[2])
with writing_video(clip, Fraction(25)) as write:
    frame = np.random.default_rng(0).integers(0, 255, (16, 24, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
    for number in range(count):
        write(np.roll(frame, number, axis=1))
model = build_model("vit_small", img_size=32, patch_size=8, embed_dim=192, depth=1, num_heads=3).eval()
draw_video(FrozenBackbone(model, "small"), Video(clip), clip.with_name("out.mp4"), shorter_side=128)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_ten_times_as_many_frames_need_no_more_memory(tmp_path: Path) -> None:
    def megabytes(count: int) -> int:
        command = [sys.executable, "-c", DRAW, str(tmp_path / "clip.mp4"), str(count)]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    few, many = megabytes(200), megabytes(2000)
    tokens = 2000 * (16 * 24) * 192 * 2 / 2**20
    assert tokens > 250 and many - few < 40, f"{few} MiB for 200 frames, {many} MiB for 2,000"
