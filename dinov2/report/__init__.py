"""A report about training runs on one page: `python -m dinov2.report OUT [OUT2 ...]`."""
