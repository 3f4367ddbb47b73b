"""Everything that the processes of an evaluation share out: for one process, or as a script for several."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from eval_images import ImageSet, tiny_backbone

from dinov2 import distributed
from dinov2.eval.feature_cache import FeatureCache
from dinov2.eval.features import ModelWithIntermediateLayers, extract_features
from dinov2.eval.knn import eval_knn
from dinov2.eval.linear import Periods, eval_linear, evaluate_linear_classifiers
from dinov2.eval.linear_data import EvalSet, extract_tokens, make_train_loader
from dinov2.eval.linear_heads import setup_linear_classifiers
from dinov2.eval.log_regression import Fitter, LabeledFeatures, eval_log_regression
from dinov2.eval.metrics import MetricType


def shared_work(folder: Path) -> dict[str, Any]:
    """Results of all evaluations on 11 and 7 images, which two processes cannot share evenly."""
    model, train, val = tiny_backbone(), ImageSet(11), ImageSet(7, seed=1)
    bank, queries = (LabeledFeatures(*extract_features(model, part, 2, 0)) for part in (train, val))
    scores = eval_knn(model, train, val, batch_size=2, num_workers=0, nb_knn=[1, 3], n_per_class_list=[-1, 2])
    logreg = eval_log_regression(
        bank, queries, fitter=Fitter(num_classes=3), finetune_on_val=True, C_values=[1e-3, 1e-1, 1e1]
    )

    world_size = distributed.world_size()
    batch_size = 4 // world_size
    tokens = ModelWithIntermediateLayers(model, 4)
    grid = setup_linear_classifiers(
        tokens(train[0][0][None]), [1, 4], [0.1], batch_size, num_classes=3, world_size=world_size
    )
    heads = grid.classifiers.by_name()
    val_set = EvalSet("val", val, MetricType.MEAN_ACCURACY, class_mapping=None)
    val_tokens = extract_tokens(tokens, val, 2, 0, FeatureCache(folder / "features"))
    validate = partial(evaluate_linear_classifiers, heads, val_set, val_tokens, num_classes=3)
    eval_linear(
        tokens,
        grid.classifiers,
        grid.param_groups,
        partial(make_train_loader, dataset=train, batch_size=batch_size, num_workers=0),
        validate,
        Periods(max_iter=6, eval_period=100, checkpoint_period=3, kept_checkpoint_period=100),
        output_dir=folder,
        resume=False,
        run={},
    )
    return {
        "features": bank.features.tolist(),
        "knn": {str(key): value for key, value in scores.items()},
        "logreg": logreg,
        "heads": {name: head.linear.weight.tolist() for name, head in heads.items()},
        "linear": validate(),
        "share": len(val_tokens[1]),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    with distributed.session():
        results = shared_work(Path(sys.argv[1]))
        Path(sys.argv[1], f"results{distributed.rank()}.json").write_text(json.dumps(results))
