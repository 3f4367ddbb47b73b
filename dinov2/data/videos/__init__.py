"""Videos with masks of objects, from dataset strings."""

from functools import partial

from dinov2.data.datasets import Entry, build_dataset
from dinov2.data.videos.annotated import VOID, AnnotatedVideo, VideoSet, read_labels, read_palette, read_videos

__all__ = [
    "VIDEO_DATASETS",
    "VOID",
    "AnnotatedVideo",
    "VideoSet",
    "make_video_set",
    "read_labels",
    "read_palette",
]

VIDEO_DATASETS = {
    "DAVIS2017": Entry(read_videos, required=("split", "root"), optional=("resolution",), splits=("TRAIN", "VAL")),
    "VideoFolder": Entry(partial(read_videos, split=None), required=("root",), optional=("resolution",)),
}


def make_video_set(dataset_str: str) -> VideoSet:
    """Open videos: `DAVIS2017:split=VAL:root=...[:resolution=480p]` or `VideoFolder:root=...[:resolution=480p]`.

    Raises:
        ValueError, OSError: The string is invalid, or files are missing.
    """
    videos: VideoSet = build_dataset(dataset_str, VIDEO_DATASETS)
    return videos
