"""Tracking of objects in videos with frozen features: the command, its table, and its files.

Each process tracks its share of the sequences. The scores of a finished sequence are in a file of its own, so that a
rerun after an interruption continues with the others.
"""

import argparse
import hashlib
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dinov2 import config, distributed
from dinov2.config import Config
from dinov2.data.datasets import parse_dataset_str
from dinov2.data.videos import VIDEO_DATASETS, VOID, AnnotatedVideo, make_video_set
from dinov2.eval import setup
from dinov2.eval.file_identity import file_stats
from dinov2.eval.results import archive_results, as_table, counted, write_results
from dinov2.eval.tracking.prediction_files import (
    prediction_paths,
    read_record,
    save_overlay,
    save_predictions,
    write_record,
)
from dinov2.eval.tracking.propagation import PROTOCOLS, PropagationSettings, frame_size
from dinov2.eval.tracking.region_and_boundary import (
    Statistics,
    TrackingScores,
    mean_over_objects,
    score_video,
    statistics,
)
from dinov2.eval.tracking.video_tracking import FrameOptions, objects_of, read_annotations, track
from dinov2.flags.tracking import DINO_SHORT_SIDE, SHORT_SIDE_PATCHES
from dinov2.models.vision_transformer import DinoVisionTransformer

logger = logging.getLogger(__name__)

RESULTS_FILE = "results_eval_tracking.json"
SEQUENCES, PREDICTIONS, OVERLAYS = "sequences", "predictions", "overlays"  # folders
RESUMED = "resumed"  # key of scores that are of an earlier run


class Tracker(NamedTuple):
    """All that a video is tracked and scored with."""

    model: DinoVisionTransformer
    options: FrameOptions
    settings: PropagationSettings
    autocast_dtype: torch.dtype
    output_dir: Path
    facts: Mapping[str, Any]  # of the model
    save_predictions: bool = False
    resume: bool = True

    def identity(self, video: AnnotatedVideo) -> str:
        """Digest of all that the scores of a video depend on, with names, sizes and modification times of its files."""
        files = [*video.frames, *video.annotations]
        stats = file_stats(map(str, files), len(files)).tolist()
        options = {
            key: value for key, value in asdict(self.options).items() if key not in ("batch_size", "num_workers")
        }
        described = [dict(self.facts), asdict(self.settings), options, [path.name for path in files], stats]
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

    def run(self, video: AnnotatedVideo) -> dict[str, Any]:
        """The scores of a video: those of an earlier run, or new ones, which are written with the overlay."""
        identity, path = self.identity(video), self.output_dir / SEQUENCES / f"{video.name}.json"
        saved = all(each.is_file() for each in prediction_paths(self.output_dir / PREDICTIONS, video))
        if self.resume and (saved or not self.save_predictions) and (found := read_record(path, identity)):
            logger.info("%s: scores of an earlier run", video.name)
            return found | {RESUMED: True}
        started = time.monotonic()
        truth = read_annotations(video, self.options.image_options)
        predictions = track(self.model, video, truth[0], self.options, self.settings, self.autocast_dtype)
        objects = objects_of(truth[0])
        # The first frame is given; the benchmark does not score the last one either.
        j, f = score_video(truth[1:-1], predictions[1:-1], objects, VOID)
        num_frames, height, width = truth.shape
        resized = frame_size(height, width, self.options.short_side, self.model.patch_size)
        record = {
            "identity": identity,
            "unit": "fraction",
            "frames": num_frames,
            "size": [height, width],
            "resized": list(resized),
            "objects": {
                str(label): {"J": statistics(j[row])._asdict(), "F": statistics(f[row])._asdict()}
                for row, label in enumerate(objects)
            },
        }
        if self.save_predictions:
            save_predictions(self.output_dir / PREDICTIONS, video, predictions)
        record = write_record(path, record)
        save_overlay(self.output_dir / OVERLAYS / f"{video.name}.jpg", video, predictions, self.options.image_options)
        seconds = time.monotonic() - started
        logger.info("%s: %d frames, %s, %.1f s", video.name, num_frames, counted(len(objects), "object"), seconds)
        return record


def shares(videos: Sequence[AnnotatedVideo], num_processes: int) -> list[list[AnnotatedVideo]]:
    """Distribute videos so that the processes have about equally many frames: the longest first, to the least busy."""
    parts: list[list[AnnotatedVideo]] = [[] for _ in range(num_processes)]
    for video in sorted(videos, key=lambda video: -len(video.frames)):
        min(parts, key=lambda part: sum(len(other.frames) for other in part)).append(video)
    return parts


def track_all(tracker: Tracker, videos: Sequence[AnnotatedVideo]) -> dict[str, dict[str, Any]]:
    """Scores of all videos by name, in their order; the processes share the work."""
    mine = {video.name: tracker.run(video) for video in shares(videos, distributed.world_size())[distributed.rank()]}
    everything = {name: record for part in distributed.all_gather_object(mine) for name, record in part.items()}
    return {video.name: everything[video.name] for video in videos}


def overall(records: Mapping[str, Mapping[str, Any]]) -> TrackingScores:
    """Means over the objects of all videos."""
    objects = [scores for record in records.values() for scores in record["objects"].values()]
    return mean_over_objects(*([_statistics(scores[name]) for scores in objects] for name in ("J", "F")))


def _statistics(values: Mapping[str, float | None]) -> Statistics:
    return Statistics(**{name: math.nan if value is None else value for name, value in values.items()})


def metrics_of(scores: TrackingScores) -> dict[str, float | None]:
    """The published names, in percent; None for nan."""
    values = {"J&F-Mean": scores.j_and_f}
    for name, part in (("J", scores.j), ("F", scores.f)):
        values |= {f"{name}-Mean": part.mean, f"{name}-Recall": part.recall, f"{name}-Decay": part.decay}
    return {name: None if math.isnan(value) else 100 * value for name, value in values.items()}


def sequence_facts(record: Mapping[str, Any]) -> dict[str, Any]:
    """Frames, sizes and the statistics of each object of a sequence, in percent; None for nan."""
    objects = {
        label: {
            measure: {name: None if value is None else 100 * value for name, value in values.items()}
            for measure, values in scores.items()
        }
        for label, scores in record["objects"].items()
    }
    return {key: record[key] for key in ("frames", "size", "resized")} | {"objects": objects}


def log_scores(records: Mapping[str, Mapping[str, Any]], title: str) -> None:
    """Log a table of the means per sequence, and over all objects, in percent."""
    rows: list[list[Any]] = []
    for name, record in [*records.items(), ("all objects", None)]:
        chosen = records if record is None else {name: record}
        metrics = metrics_of(overall(chosen))
        count = sum(len(each["objects"]) for each in chosen.values())
        rows.append([name, count, metrics["J&F-Mean"], metrics["J-Mean"], metrics["F-Mean"]])
    logger.info("%s", as_table(title, ["sequence", "objects", "J&F", "J", "F"], rows))


def short_side(args: argparse.Namespace, patch_size: int) -> int:
    """The shorter side of the frames in pixels: as given, else that of the protocol."""
    default = DINO_SHORT_SIDE if args.protocol == "dino" else SHORT_SIDE_PATCHES * patch_size
    return -(-(args.image_size or default) // patch_size) * patch_size


def described(args: argparse.Namespace, side: int) -> str:
    """The protocol in words."""
    settings = PROTOCOLS[args.protocol]
    return (
        f"protocol {args.protocol}: shorter side {side} pixels, {settings.shape} of {settings.size:g} patches, "
        f"top {settings.topk}, temperature {settings.temperature:g}, first and {settings.context} previous frames"
    )


def build_tracker(args: argparse.Namespace, cfg: Config, side: int) -> Tracker:
    """The tracker of the command line."""
    options = FrameOptions(
        side,
        tuple(cfg.augmentation.mean),
        tuple(cfg.augmentation.std),
        setup.image_options(cfg),
        args.batch_size,
        args.num_workers,
    )
    return Tracker(
        setup.build_model_for_eval(cfg, args.pretrained_weights),
        options,
        PROTOCOLS[args.protocol],
        setup.get_autocast_dtype(cfg),
        Path(args.output_dir),
        setup.frozen_model_facts(args, cfg),
        args.save_predictions,
        not args.no_resume,
    )


def main(args: argparse.Namespace) -> None:
    """Run the evaluation of the command line."""
    started = time.monotonic()
    with distributed.session():
        parse_dataset_str(args.dataset, VIDEO_DATASETS)  # before anything is created
        cfg = setup.setup(args)
        config.require_rgb(cfg, "tracking")
        side = short_side(args, cfg.student.patch_size)
        logger.info("%s", described(args, side))
        path = Path(args.output_dir) / RESULTS_FILE
        archive_results(path)
        videos = make_video_set(args.dataset)
        logger.info("%s, %d frames", counted(len(videos.videos), "sequence"), videos.num_frames)
        records = track_all(build_tracker(args, cfg, side), videos.videos)
        scores = overall(records)
        log_scores(records, f"tracking in {counted(len(records), 'sequence')}, scores in %\n{described(args, side)}")
        write_results(
            path,
            evaluation="tracking",
            metrics=metrics_of(scores),
            args=args,
            protocol={"name": args.protocol, **asdict(PROTOCOLS[args.protocol])},
            image_size=side,
            sequences={name: sequence_facts(record) for name, record in records.items()},
            resumed=[name for name, record in records.items() if RESUMED in record],
            seconds=round(time.monotonic() - started, 2),
        )
