"""Set o_retrieval: average precision and precision at k of given rankings."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov2.data.retrieval import GroundTruth
from dinov2.eval.retrieval.average_precision import RetrievalScores, score_rankings, trapezoid_average_precision
from scripts.golden.comparison import Comparison
from scripts.golden.recording import Recording

TENSOR_TOLERANCE = 1e-7
TOLERANCE = 1e-12


def replay_retrieval(recording: Recording, comparison: Comparison) -> None:
    rankings = recording.input("ranks").T.numpy()
    database, queries = (recording.input(name).double() for name in ("X", "Q"))
    found = (-(database.T @ queries)).argsort(dim=0, stable=True)
    comparison.exact("ranking of the similarities", found, recording.tensors["ranks"])
    truth = [GroundTruth(*(entry[name] for name in GroundTruth._fields)) for entry in recording.json["gnd"]]
    ks = recording.json["config"]["kappas"]
    for setting, recorded in recording.json["results"].items():
        scores = score_rankings(rankings, truth, setting, ks)
        _compare(comparison, setting, scores, recorded)
        precise = [np.nan if each is None else each.average_precision for each in scores.per_query]
        found, theirs = torch.tensor(precise, dtype=torch.float32), recording.tensors[f"{setting}.aps"]
        recording.inputs.add(f"{setting}.aps")
        comparison.exact(f"{setting}.aps nan", found.isnan(), theirs.isnan())
        comparison.close(f"{setting}.aps", found.nan_to_num(), theirs.nan_to_num(), tolerance=TENSOR_TOLERANCE)
    for setting, recorded in recording.json["partial"].items():
        some = recorded["queries"]
        scores = score_rankings(rankings[some, : recorded["rows"]], [truth[index] for index in some], setting, ks)
        _compare(comparison, f"partial {setting}", scores, recorded)
    for number, case in enumerate(recording.json["ap"]):
        ours = trapezoid_average_precision(case["ranks"], case["nres"])
        comparison.close(f"ap {number}", _double(ours), _double(case["ap"]), tolerance=TOLERANCE)


def _compare(comparison: Comparison, label: str, scores: RetrievalScores, recorded: Mapping[str, Any]) -> None:
    means = _double([scores.mAP, *scores.precisions.values()])
    comparison.close(f"{label} means", means, _double([recorded["map"], *recorded["pr"]]), tolerance=TOLERANCE)
    for query, (aps, prs) in enumerate(zip(recorded["aps"], recorded["prs"], strict=True)):
        found = scores.per_query[query]
        comparison.exact(f"{label} query {query} is scored", found is not None, aps != "nan")
        if found is not None:
            ours, theirs = _double([found.average_precision, *found.precisions]), _double([aps, *prs])
            comparison.close(f"{label} query {query}", ours, theirs, tolerance=TOLERANCE)


def _double(values: float | list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
