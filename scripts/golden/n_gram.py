"""Set n_gram_loss: the Gram loss and its gradients, the teacher's grid, and the schedule of the weight."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dinov2.loss.gram import Negatives, gram_loss, gram_weight, resample_tokens
from scripts.golden.comparison import Comparison
from scripts.golden.recording import Recording

TOLERANCE = 2.5e-6
SCHEDULE_TOLERANCE = 1e-12


def replay_gram_loss(recording: Recording, comparison: Comparison) -> None:
    for name, case in recording.json["cases"].items():
        prefix = "flat." if name.startswith("flat.") else ""
        student, teacher = (recording.input(f"{prefix}{side}").clone().requires_grad_() for side in SIDES)
        loss = _loss(student, teacher, case)
        gradients = torch.autograd.grad(loss, (student, teacher))
        comparison.tensor(f"{name}.loss", loss.detach(), tolerance=TOLERANCE)
        for side, gradient in zip(SIDES, gradients, strict=True):
            comparison.tensor(f"{name}.d{side}", gradient, tolerance=TOLERANCE)
        comparison.close(f"{name} in JSON", loss, case["loss"], tolerance=TOLERANCE)
    student, teacher = (recording.input(side) for side in SIDES)
    with_zero = student.clone()
    with_zero[0, 3] = 0.0
    comparison.tensor("zero_token.loss", gram_loss(with_zero, teacher), tolerance=TOLERANCE)
    half = [recording.input(f"half.{side}").bfloat16() for side in SIDES]
    comparison.tensor("half.loss", gram_loss(*half), tolerance=TOLERANCE)
    _teacher_grid(recording, comparison)
    _schedules(recording, comparison)


SIDES = ("student", "teacher")


def _loss(student: Tensor, teacher: Tensor, case: Mapping[str, Any]) -> Tensor:
    options = case["options"]
    negatives: Negatives = "keep"
    if options["remove_neg"]:
        negatives = "remove"
    elif options["remove_only_teacher_neg"]:
        negatives = "remove_teacher"
    return gram_loss(
        student, teacher, normalize=options["apply_norm"], per_image=case["img_level"], negatives=negatives
    )


def _teacher_grid(recording: Recording, comparison: Comparison) -> None:
    config, prefix = recording.json["config"], "teacher_grid."
    patches, mask = recording.input(f"{prefix}patches"), recording.input(f"{prefix}mask").bool()
    student = recording.input(f"{prefix}student").flatten(0, 1)  # crop by crop
    grids = [(config[f"{side}_grid"],) * 2 for side in ("teacher", "student")]
    for match in recording.matches(r"teacher_grid\.(bicubic|bilinear)(_antialias)?\.all"):
        mode, antialias = match[1], match[2] is not None
        ours = resample_tokens(patches, grids[0], grids[1], mode=mode, antialias=antialias)  # type: ignore[arg-type]
        comparison.tensor(match[0], ours, tolerance=TOLERANCE)
        for name, chosen in (("masked", mask), ("unmasked", ~mask)):
            selected = f"{prefix}{mode}{match[2] or ''}.{name}"
            if selected in recording:
                comparison.tensor(selected, ours[chosen], tolerance=TOLERANCE)
                comparison.exact(f"{selected}.student", student[chosen], recording.tensors[f"{selected}.student"])


def _schedules(recording: Recording, comparison: Comparison) -> None:
    names = {
        "warmup_iterations": "warmup_steps",
        "total_iterations": "total_steps",
        "cosine_iterations": "cosine_steps",
    }
    for number, case in enumerate(recording.json["schedule"]):
        options = {names.get(key, key): value for key, value in case.items() if key != "values"}
        ours = [gram_weight(step, **options) for step in range(len(case["values"]))]
        _compare(comparison, f"schedule {number}", ours, case["values"])
    published = recording.json["published_schedule"]
    options = {"start": 0.0, "peak": 0.0, "end": 2.0}
    options |= {"warmup_steps": 1_000_000, "total_steps": 1_200_000, "cosine_steps": 1_000}
    ours = [gram_weight(int(step), **options) for step in published]
    _compare(comparison, "published schedule", ours, list(published.values()))


def _compare(comparison: Comparison, label: str, ours: list[float], theirs: list[float]) -> None:
    pair = (torch.tensor(values, dtype=torch.float64) for values in (ours, theirs))
    comparison.close(label, *pair, tolerance=SCHEDULE_TOLERANCE)
