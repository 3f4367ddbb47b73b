"""Opening of datasets with maps by their dataset strings."""

from dinov2.data.datasets import make_dataset
from dinov2.data.dense.base import DenseDataset
from dinov2.data.images import ImageOptions


def open_dense(
    dataset_str: str, kind: str, image_options: ImageOptions | None = None, setting: str = "dataset"
) -> DenseDataset:
    """Open a dataset with maps of a kind; a `ValueError`, which names the `setting`, if it has none or is empty."""
    if image_options is not None and image_options.pages == "images":
        raise ValueError(
            f"{setting} {dataset_str!r}: images.pages=images, but maps belong to files, not to their pages"
        )
    dataset = make_dataset(dataset_str=dataset_str, image_options=image_options)
    if not isinstance(dataset, DenseDataset) or dataset.kind != kind:
        has = f"{dataset.kind} maps" if isinstance(dataset, DenseDataset) else "no maps"
        raise ValueError(f"{setting} {dataset_str!r} has {has}; {kind} maps are needed, see docs/datasets.md")
    if not len(dataset):
        raise ValueError(f"{setting} {dataset_str!r} is empty")
    return dataset
