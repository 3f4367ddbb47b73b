"""The command tracks, scores, writes and resumes; two processes find what one finds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eval_images import CONFIG
from eval_processes import run_in_processes
from PIL import Image
from torch import Tensor, nn
from tracking_videos import PALETTE, moving_squares, write_davis, write_video

from dinov2.data.images import ImageOptions
from dinov2.data.videos import AnnotatedVideo, make_video_set, read_labels
from dinov2.eval.tracking import evaluation
from dinov2.eval.tracking.propagation import PROTOCOLS
from dinov2.eval.tracking.region_and_boundary import score_video, statistics
from dinov2.eval.tracking.video_tracking import FrameOptions, read_annotations, track
from dinov2.flags.tracking import get_args_parser


def words(folder: Path, dataset: str, **options: Any) -> list[str]:
    config = folder / "tiny.yaml"
    config.write_text(CONFIG)
    found = ["--config-file", str(config), "--output-dir", str(folder / "out"), "--num-workers", "0", "--random-init"]
    for name, value in {"dataset": dataset, "image_size": 48, **options}.items():
        found += ["--" + name.replace("_", "-")] + ([] if value is True else [str(value)])
    return found


def run(folder: Path, dataset: str, **options: Any) -> dict[str, Any]:
    evaluation.main(get_args_parser().parse_args(words(folder, dataset, **options)))
    return json.loads((folder / "out" / evaluation.RESULTS_FILE).read_text())


class MeanColors(nn.Module):
    """An ideal backbone: the feature of a patch is its mean color."""

    patch_size = 8

    def get_intermediate_layers(self, images: Tensor, n: int, reshape: bool) -> tuple[Tensor]:
        assert n == 1 and reshape
        return (torch.nn.functional.avg_pool2d(images, 8),)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_moving_squares_are_tracked_with_ideal_features(tmp_path: Path, protocol: str) -> None:
    frames, labels = moving_squares()
    write_video(tmp_path, "squares", frames, labels)
    (video,) = make_video_set(f"VideoFolder:root={tmp_path}").videos
    options = FrameOptions(48, (0.5,) * 3, (0.5,) * 3, ImageOptions(), batch_size=2)
    truth = read_annotations(video, ImageOptions())
    assert np.array_equal(truth, labels)
    predictions = track(MeanColors(), video, truth[0], options, PROTOCOLS[protocol])  # type: ignore[arg-type]
    assert predictions.dtype == np.uint8 and np.array_equal(predictions[0], labels[0])
    j, f = score_video(labels[1:-1], predictions[1:-1], [1, 2])
    assert j.mean() > 0.85 and f.mean() > 0.85
    if protocol == "dinov3":
        assert j.mean() > 0.99 and f.mean() > 0.99, "whole patches"


def test_labels_with_gaps_are_kept_and_void_is_background(tmp_path: Path) -> None:
    frames, labels = moving_squares()
    labels[labels == 2] = 9
    labels[:, -1, :] = 255
    write_video(tmp_path, "squares", frames, labels)
    (video,) = make_video_set(f"VideoFolder:root={tmp_path}").videos
    options = FrameOptions(48, (0.5,) * 3, (0.5,) * 3, ImageOptions())
    predictions = track(MeanColors(), video, labels[0], options, PROTOCOLS["dinov3"])  # type: ignore[arg-type]
    assert np.unique(predictions).tolist() == [0, 1, 9] and (predictions[0][-1] == 0).all()


def test_the_command_writes_scores_overlays_and_predictions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = write_davis(tmp_path / "davis")
    results = run(tmp_path, dataset, save_predictions=True)
    assert list(results["sequences"]) == ["bear", "dogs", "train"]
    assert list(results["sequences"]["dogs"]["objects"]) == ["1", "2"]
    assert results["sequences"]["bear"]["resized"] == [48, 80] and results["image_size"] == 48
    assert results["protocol"]["name"] == "dinov3" and results["protocol"]["size"] == 12
    log = capsys.readouterr().out
    assert "tracking in 3 sequences, scores in %" in log and "circle of 12 patches, top 5, temperature 0.2" in log

    out, objects = tmp_path / "out", []
    for video in make_video_set(dataset).videos:
        paths = sorted((out / "predictions" / video.name).iterdir())
        assert [path.stem for path in paths] == [path.stem for path in video.frames]
        predicted, truth = (np.stack([read_labels(p) for p in group]) for group in (paths, video.annotations))
        assert np.array_equal(predicted[0], truth[0])
        with Image.open(paths[0]) as image:
            assert image.mode == "P" and image.getpalette()[:12] == PALETTE
        j, f = score_video(truth[1:-1], predicted[1:-1], range(1, truth.max() + 1))
        objects += [(statistics(a).mean, statistics(b).mean) for a, b in zip(j, f, strict=True)]
        with Image.open(out / "overlays" / f"{video.name}.jpg") as overlay:
            assert overlay.height == 240
            assert np.asarray(overlay)[4:24, 6:36].max() > 200, "the name of the frame, white on a dark background"
    means = 100 * np.mean(objects, axis=0)
    assert results["metrics"]["J-Mean"] == pytest.approx(means[0]) and means[0] < 99
    assert results["metrics"]["J&F-Mean"] == pytest.approx(means.mean())
    of_objects = [each for sequence in results["sequences"].values() for each in sequence["objects"].values()]
    assert np.mean([each["J"]["mean"] for each in of_objects]) == pytest.approx(means[0]), "in percent, too"
    assert set(results["sequences"]["bear"]) == {"frames", "size", "resized", "objects"} and results["resumed"] == []


def test_finished_sequences_are_not_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write_davis(tmp_path / "davis")
    tracked: list[str] = []

    def recorded(model: Any, video: AnnotatedVideo, *args: Any) -> np.ndarray:
        if video.name in fail:
            raise KeyboardInterrupt
        tracked.append(video.name)
        return track(model, video, *args)

    monkeypatch.setattr(evaluation, "track", recorded)
    fail = {"dogs"}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, dataset)
    assert tracked == ["train"], "the longest one first"
    fail, tracked[:] = set(), []
    results = run(tmp_path, dataset)
    assert tracked == ["dogs", "bear"]
    assert "train: scores of an earlier run" in capsys.readouterr().out and results["resumed"] == ["train"]
    tracked.clear()
    assert run(tmp_path, dataset)["sequences"] == results["sequences"] and not tracked
    run(tmp_path, dataset, save_predictions=True)
    assert len(tracked) == 3, "their predictions were not saved"
    tracked.clear()
    run(tmp_path, dataset, protocol="dino")
    run(tmp_path, dataset, image_size=56)
    assert len(tracked) == 6
    tracked.clear()
    (tmp_path / "out" / "sequences" / "bear.json").write_text("{")
    labels = np.roll(moving_squares(5)[1], 8, axis=2)
    write_video(tmp_path / "davis", "dogs", moving_squares(5)[0], labels)
    run(tmp_path, dataset, image_size=56)
    assert sorted(tracked) == ["bear", "dogs"]
    tracked.clear()
    run(tmp_path, dataset, image_size=56, no_resume=True)
    assert len(tracked) == 3


def test_an_overlay_that_cannot_be_written_loses_no_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = write_davis(tmp_path / "davis")
    (tmp_path / "out" / "overlays" / "bear.jpg").mkdir(parents=True)
    assert set(run(tmp_path, dataset)["sequences"]) == {"train", "dogs", "bear"}
    assert "no overlay of bear" in capsys.readouterr().out


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    dataset = write_davis(tmp_path / "davis")
    alone = run(tmp_path, dataset)
    arguments = words(tmp_path, dataset)
    arguments[arguments.index("--output-dir") + 1] = str(tmp_path / "two")
    run_in_processes("dinov2/run/eval/tracking.py", arguments)
    results = json.loads((tmp_path / "two" / evaluation.RESULTS_FILE).read_text())
    assert results["world_size"] == 2 and results["metrics"] == alone["metrics"]
    assert results["sequences"] == alone["sequences"]


def test_sequences_are_shared_by_their_numbers_of_frames() -> None:
    videos = [AnnotatedVideo(str(count), [Path()] * count, []) for count in (3, 10, 4, 6)]
    assert [[video.name for video in part] for part in evaluation.shares(videos, 2)] == [["10", "3"], ["6", "4"]]
    assert [len(part) for part in evaluation.shares(videos, 6)] == [1, 1, 1, 1, 0, 0]


def test_trees_that_are_incomplete_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder .*JPEGImages/480p; expected JPEGImages and Annotations"):
        make_video_set(f"VideoFolder:root={tmp_path}")
    frames, labels = moving_squares()
    write_video(tmp_path, "a", frames, labels, resolution="Full-Resolution")
    with pytest.raises(FileNotFoundError, match="480p"):
        make_video_set(f"VideoFolder:root={tmp_path}")
    assert len(make_video_set(f"VideoFolder:root={tmp_path}:resolution=Full-Resolution").videos) == 1
    write_video(tmp_path, "b", frames[:2], labels[:2])
    with pytest.raises(ValueError, match="b has 2 frames; at least 3 are needed"):
        make_video_set(f"VideoFolder:root={tmp_path}")
    write_video(tmp_path, "b", frames, labels)
    with pytest.raises(FileNotFoundError, match=r"ImageSets/2017/train.txt"):
        make_video_set(f"DAVIS2017:split=TRAIN:root={tmp_path}")
    with pytest.raises(ValueError, match="unknown split 'TEST' in .*; known: TRAIN, VAL"):
        make_video_set(f"DAVIS2017:split=TEST:root={tmp_path}")
    (tmp_path / "Annotations" / "480p" / "b" / "00003.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"no annotation .*00003.png: 1 of 6 frames of b .* need .* all"):
        make_video_set(f"VideoFolder:root={tmp_path}")
    write_video(tmp_path, "b", frames, labels)
    (tmp_path / "JPEGImages" / "480p" / "b" / "00002.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"no frame .*b/00002\.\* for the annotation .*b/00002.png: 1 "):
        make_video_set(f"VideoFolder:root={tmp_path}")


def test_annotations_that_do_not_fit_are_named(tmp_path: Path) -> None:
    frames, labels = moving_squares(num_frames=3)
    write_video(tmp_path, "a", frames, labels[:, :40])
    (video,) = make_video_set(f"VideoFolder:root={tmp_path}").videos
    with pytest.raises(ValueError, match="00000.png has 80 x 40 pixels, the first frame 80 x 48"):
        read_annotations(video, ImageOptions())
    write_video(tmp_path, "a", frames, np.zeros_like(labels), palette=False)
    with pytest.raises(ValueError, match="00000.png has no object to track"):
        read_annotations(video, ImageOptions())
    Image.fromarray(frames[0]).save(video.annotations[0])
    with pytest.raises(ValueError, match="an image of mode RGB, not a palette image .*Pillow's mode P"):
        read_annotations(video, ImageOptions())
