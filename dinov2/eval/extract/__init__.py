"""Features of any images, by any weights, in memory or in files.

`python -m dinov2.eval.extract` is the command, `dinov2.extract_features` (in `api`) the same in Python.
`frozen_backbone` loads the model, `sources` opens images and videos, `preprocessing` prepares them, `tokens` and
`extraction` run the model, `files` writes and reads features, `folder` continues after an interruption, with the same
`settings` only.
"""
