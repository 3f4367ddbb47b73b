"""Statistics of a dataset: values of each band, sizes, bad files, duplicates; `python -m dinov2.data.statistics`."""
