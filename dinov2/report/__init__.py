"""One page that shows how training runs went: `python -m dinov2.report OUT [OUT2 ...]`."""
