"""Segmentation by k-NN of patches of a teacher at random: for one process, or as a script for several."""

import json
import sys
from pathlib import Path

from tiny import tiny_config, tiny_model

from dinov2 import distributed
from dinov2.data import make_dataset
from dinov2.train.monitor.probe import Probe
from dinov2.train.training_run import parallelize_and_build_optimizer


def dense_probe_work(*words: str) -> dict[str, float]:
    """What is measured, on weights that several processes share."""
    cfg, model = tiny_config(*words), tiny_model(*words)
    parallelize_and_build_optimizer(cfg, model.train())
    return Probe(cfg, model, make_dataset(dataset_str=cfg.train.dataset_path)).patch_knn()


if __name__ == "__main__":
    with distributed.session():
        found = dense_probe_work(*sys.argv[2:])
        Path(sys.argv[1], f"{distributed.rank()}.json").write_text(json.dumps(found))
