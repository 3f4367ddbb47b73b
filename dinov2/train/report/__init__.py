"""One page that shows how training runs went: `python -m dinov2.train.report OUT [OUT2 ...]`."""
