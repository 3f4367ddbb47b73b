"""Sets p_davis_metrics and p_propagation: measures of masks, and label propagation."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dinov2.eval.tracking.propagation import (
    PropagationSettings,
    Propagator,
    frame_size,
    neighborhood_mask,
    patch_probabilities,
    pixel_probabilities,
    propagate,
    stretch,
)
from dinov2.eval.tracking.region_and_boundary import (
    boundary,
    boundary_accuracy,
    boundary_radius,
    mean_over_objects,
    region_similarity,
    statistics,
)
from scripts.golden.comparison import Comparison
from scripts.golden.recording import Recording

TENSOR_TOLERANCE = 1e-7
TOLERANCE = 1e-12
PROPAGATION_TOLERANCE = 2e-6


# --- Measures --------------------------------------------------------------------------------------------------------


def replay_davis_metrics(recording: Recording, comparison: Comparison) -> None:
    truth = recording.input("gt").numpy().astype(bool)
    result = np.zeros_like(truth)  # objects that were not found have empty masks
    found = recording.input("res").numpy().astype(bool)
    result[: len(found)] = found
    void = recording.input("void").numpy().astype(bool)
    recorded = recording.json["results"]
    no_void: list[np.ndarray | None] = [None] * len(void)
    for name, voids in (("", no_void), ("_void", list(void))):
        _compare(recording, comparison, f"J{name}", _over_frames(truth, result, region_similarity, voids))
        _compare(recording, comparison, f"F{name}", _over_frames(truth, result, boundary_accuracy, voids))
    for threshold in recording.json["config"]["thresholds"]:
        f = _over_frames(truth, result, partial(boundary_accuracy, tolerance=threshold), no_void)
        _compare(recording, comparison, f"F.th{threshold}", f)
        radius = boundary_radius(truth.shape[-2:], threshold)
        comparison.exact(f"radius {threshold}", radius, int(recorded[f"radius.th{threshold}"]))
    _boundaries(recording, comparison, truth, result)
    _statistics(recording, comparison)
    _full_size(recording, comparison)


def _over_frames(
    truth: np.ndarray, result: np.ndarray, measure: Callable[..., float], voids: Sequence[np.ndarray | None]
) -> Tensor:
    """A measure of masks for each object and frame."""
    rows = [[measure(*masks) for masks in zip(t, r, voids, strict=True)] for t, r in zip(truth, result, strict=True)]
    return torch.tensor(rows, dtype=torch.float64)


def _compare(recording: Recording, comparison: Comparison, name: str, ours: Tensor) -> None:
    exact = torch.tensor(recording.json["results"][name], dtype=torch.float64)
    comparison.close(f"{name} in JSON", ours, exact, tolerance=TOLERANCE)
    comparison.tensor(name, ours, tolerance=TENSOR_TOLERANCE)


def _boundaries(recording: Recording, comparison: Comparison, truth: np.ndarray, result: np.ndarray) -> None:
    comparison.exact("boundary.gt", torch.from_numpy(boundary(truth[0, 0])), recording.tensors["boundary.gt"].bool())
    touching = recording.tensors["boundary.border"].bool().numpy()
    masks = [*truth.reshape(-1, *touching.shape), *result.reshape(-1, *touching.shape)]
    recording.inputs.add("boundary.border")
    same = any(np.array_equal(boundary(mask), touching) for mask in masks)
    comparison.exact("boundary.border is that of one of the masks", same, True)


def _statistics(recording: Recording, comparison: Comparison) -> None:
    recorded = recording.json["statistics"]
    values = recording.json["results"]
    ours = {name: [statistics(np.array(row)) for row in values[name]] for name in ("J", "F")}
    for name, found in ours.items():
        expected = torch.tensor(recorded[name], dtype=torch.float64)
        found_tensor = torch.tensor(found, dtype=torch.float64)
        comparison.close(f"statistics {name}", found_tensor, expected, tolerance=TOLERANCE)
    scores = mean_over_objects(ours["J"], ours["F"])
    means = {"J&F-Mean": scores.j_and_f}
    for name, part in (("J", scores.j), ("F", scores.f)):
        means |= {f"{name}-Mean": part.mean, f"{name}-Recall": part.recall, f"{name}-Decay": part.decay}
    for name, value in means.items():
        _number(comparison, name, value, recording.json["global"][name])
    for case in recording.json["db_statistics_more"]:
        more = statistics(np.array(case["values"]))
        for name, value, theirs in zip(more._fields, more, case["mean_recall_decay"], strict=True):
            _number(comparison, f"{name} of {case['n']} frames", value, float(theirs))


def _number(comparison: Comparison, label: str, ours: float, theirs: float) -> None:
    if np.isnan(theirs):
        comparison.exact(f"{label} is nan", bool(np.isnan(ours)), True)
        return
    pair = (torch.tensor(value, dtype=torch.float64) for value in (ours, theirs))
    comparison.close(label, *pair, tolerance=TOLERANCE)


def _full_size(recording: Recording, comparison: Comparison) -> None:
    recorded = recording.json["results"]["big"]
    height, width = recorded["shape"]
    truth, result = (
        np.unpackbits(recording.input(f"big.{name}").numpy(), axis=1)[:height, :width].astype(bool)
        for name in ("gt", "res")
    )
    comparison.exact("big radius", boundary_radius((height, width)), int(recorded["radius"]))
    _number(comparison, "big J", region_similarity(truth, result), recorded["J"])
    _number(comparison, "big F", boundary_accuracy(truth, result), recorded["F"])


# --- Propagation -----------------------------------------------------------------------------------------------------


def _settings(recording: Recording) -> PropagationSettings:
    config = recording.json["config"]
    return PropagationSettings(
        shape=config["shape"],
        size=config["size"],
        topk=config["topk"],
        temperature=config["temperature"],
        context=config["context"],
        upsampling="nearest",
        min_max=True,
    )


def replay_propagation(recording: Recording, comparison: Comparison) -> None:
    settings, config = _settings(recording), recording.json["config"]
    features, labels = recording.input("features"), recording.input("first_mask")
    height, width = config["grid"]
    positions = torch.cartesian_prod(torch.arange(height), torch.arange(width)).float()
    inside = neighborhood_mask(positions, positions, settings).view(height, width, height, width)
    comparison.exact("neighborhood", inside, recording.tensors["neighborhood"].bool())
    probs = patch_probabilities(labels, config["grid"], config["masks"])
    comparison.exact("first_mask_small", probs.argmax(dim=-1), recording.tensors["first_mask_small"])
    comparison.exact("first_probs", probs, recording.tensors["first_probs"])

    step = propagate(features[:1], probs[None], features[1], settings)
    comparison.tensor("step1.probs", step, tolerance=PROPAGATION_TOLERANCE)
    context = recording.input("ctx_probs")
    step = propagate(features[: len(context)], context, features[len(context)], settings)
    comparison.tensor("step_ctx.probs", step, tolerance=PROPAGATION_TOLERANCE)
    tied = recording.input("tie.features")
    step = propagate(tied[None], context[:1], tied, settings)
    comparison.tensor("tie.probs", step, tolerance=PROPAGATION_TOLERANCE)
    comparison.tensor("postprocess.out", stretch(recording.input("postprocess.in")), tolerance=PROPAGATION_TOLERANCE)
    _loop(recording, comparison, probs, settings)
    for case in recording.json["size_cases"]:
        width, height = case["in_wh"]
        new_height, new_width = frame_size(height, width, case["short_side"], case["multiple"])
        label = f"size {case['in_wh']} to {case['short_side']} x {case['multiple']}"
        comparison.exact(label, [new_width, new_height], case["out_wh"])


def _loop(recording: Recording, comparison: Comparison, probs: Tensor, settings: PropagationSettings) -> None:
    features, labels = recording.input("features"), recording.input("first_mask")
    propagator = Propagator(features[0], probs, settings)
    small = [propagator.step(each) for each in features[1:]]
    comparison.tensor("loop.probs", torch.stack(small), tolerance=PROPAGATION_TOLERANCE)
    first = functional.one_hot(labels, probs.shape[-1]).movedim(-1, 0).float()
    size = (labels.shape[0], labels.shape[1])
    large = torch.stack([first, *(pixel_probabilities(each, size, settings) for each in small)])
    comparison.tensor("loop.mask_probabilities", large, tolerance=PROPAGATION_TOLERANCE)
    comparison.exact("loop.mask_predictions", large.argmax(dim=1), recording.tensors["loop.mask_predictions"])
