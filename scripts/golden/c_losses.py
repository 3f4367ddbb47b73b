"""Set c: DINO, iBOT and KoLeo losses, centering and Sinkhorn-Knopp, on one or several ranks.

``rankR.`` prefixes what process R held. The losses and targets are recomputed from the recorded logits; gradients are
those with respect to the student's logits (KoLeo: features).
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2 import distributed
from dinov2.loss import DINOLoss, KoLeoLoss, iBOTPatchLoss
from scripts.golden.comparison import Comparison
from scripts.golden.ranks import replay_on_ranks
from scripts.golden.recording import Recording

Results = dict[str, Any]


def replay_losses(recording: Recording, comparison: Comparison) -> None:
    for results in replay_on_ranks(_replay_rank, recording.path, recording.json["world_size"]):
        recording.inputs |= set(results.pop("inputs"))
        comparison.tensors(results)


def _replay_rank(path: Path, rank: int) -> Results:
    recording = Recording(path)
    prefix = f"rank{rank}."
    results: Results = {}
    _dino_center(recording, prefix + "dino_center.", results)
    _dino_sinkhorn(recording, prefix + "dino_sinkhorn.", results)
    _ibot_center(recording, prefix + "ibot_center.", results)
    _ibot_dense(recording, prefix + "ibot_dense.", results)
    _ibot_sinkhorn(recording, prefix + "ibot_sinkhorn.", results)
    _ibot_sinkhorn_padded(recording, prefix + "ibot_sinkhorn_padded.", results)
    _koleo(recording, prefix + "koleo.", results)
    return results | {"inputs": sorted(recording.inputs)}


def _groups(recording: Recording, prefix: str) -> list[str]:
    """The ``step0``, ``t0_it3``, ``c1``, ... below a prefix, in order."""
    groups = {name.removeprefix(prefix).split(".")[0] for name in recording.names(prefix) if "." in name[len(prefix) :]}
    return sorted(groups, key=lambda group: [int(number) for number in re.findall(r"\d+", group)])


def _leaf(recording: Recording, name: str) -> Tensor:
    return recording.input(name).clone().requires_grad_()


def _gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(loss, leaf)[0]


def _dino_loss(recording: Recording) -> DINOLoss:
    config = recording.json["config"]
    return DINOLoss(config["K"], student_temp=config["st"], center_momentum=config["cm"])


def _ibot_loss(recording: Recording) -> iBOTPatchLoss:
    config = recording.json["config"]
    return iBOTPatchLoss(config["KP"], student_temp=config["st"], center_momentum=config["cm"])


def _dino_center(recording: Recording, prefix: str, results: Results) -> None:
    criterion = _dino_loss(recording)
    for step in _groups(recording, prefix):
        here = f"{prefix}{step}."
        temperature = recording.json["config"]["temps"][int(step.removeprefix("step"))]
        teacher = recording.input(f"{here}teacher_logits")
        students = [_leaf(recording, match[0]) for match in recording.matches(rf"{re.escape(here)}student_logits(\d+)")]
        probs = criterion.softmax_center_teacher(teacher, temperature)
        results[f"{here}center_used"] = criterion.center.clone()
        criterion.update_center(teacher)
        loss = criterion(students, list(probs.split(students[0].shape[0])))
        results[f"{here}teacher_probs"] = probs
        results[f"{here}loss"] = loss.detach()
        for match in recording.matches(rf"{re.escape(here)}dstudent(\d+)"):
            results[match[0]] = torch.autograd.grad(loss, students[int(match[1])], retain_graph=True)[0]
    results[f"{prefix}center_final"] = criterion.center.clone()


def _dino_sinkhorn(recording: Recording, prefix: str, results: Results) -> None:
    criterion = _dino_loss(recording)
    # The temperatures of t0, t1, ... are given in words: "dino_sinkhorn t0/t1 = 0.04/0.07".
    stated = re.search(r"dino_sinkhorn t0(?:/t\d+)* = ([\d./]*\d)", recording.json["note"])
    temperatures = [float(number) for number in stated[1].split("/")] if stated else []
    for group in _groups(recording, prefix):
        here = f"{prefix}{group}."
        index, iterations = (int(number) for number in re.findall(r"\d+", group))
        student = _leaf(recording, f"{here}student_logits")
        assign = criterion.sinkhorn_knopp_teacher(
            recording.input(f"{here}teacher_logits"), temperatures[index], n_iterations=iterations
        )
        loss = criterion([student], [assign])
        results[f"{here}assign"] = assign
        results[f"{here}loss_pairwise_all"] = loss.detach()
        results[f"{here}dstudent"] = _gradient(loss, student)


def _ibot_center(recording: Recording, prefix: str, results: Results) -> None:
    criterion = _ibot_loss(recording)
    for step in _groups(recording, prefix):
        here = f"{prefix}{step}."
        temperature = recording.json["config"]["ib_temps"][int(step.removeprefix("step"))]
        teacher = recording.input(f"{here}teacher_logits")
        student = _leaf(recording, f"{here}student_logits")
        masks = recording.input(f"{here}masks")
        probs = criterion.softmax_center_teacher(teacher, temperature)
        results[f"{here}center_used"] = criterion.center.clone()
        criterion.update_center(teacher)
        results[f"{here}teacher_probs"] = probs
        target = probs.squeeze(0)
        loss = criterion.forward_masked(
            student,
            target,
            student_masks_flat=masks,
            n_masked_patches=len(student),
            masks_weight=recording.input(f"{here}masks_weight"),
        )
        results[f"{here}loss_masked"] = loss.detach()
        results[f"{here}dstudent"] = _gradient(loss, student)
        default = criterion.forward_masked(student, target, student_masks_flat=masks)
        results[f"{here}loss_masked_default_weight"] = default.detach()
    results[f"{prefix}center_final"] = criterion.center.clone()


def _ibot_dense(recording: Recording, prefix: str, results: Results) -> None:
    if not recording.names(prefix):
        return
    student, teacher, masks = (recording.input(prefix + key) for key in ("student_logits", "teacher_probs", "masks"))
    results[f"{prefix}loss"] = _ibot_loss(recording)(student, teacher, masks)


def _ibot_sinkhorn(recording: Recording, prefix: str, results: Results) -> None:
    criterion = _ibot_loss(recording)
    for group in _groups(recording, prefix):
        here = f"{prefix}{group}."
        temperature = recording.json["config"]["ib_temps"][int(group.removeprefix("t"))]
        teacher = recording.input(f"{here}teacher_logits")
        padded = _leaf(recording, f"{here}student_logits_padded")
        masks = recording.input(f"{here}masks")
        assign = criterion.sinkhorn_knopp_teacher(teacher, temperature)
        # The published code overwrites the caller's count with the sum over ranks (Q54).
        results[f"{here}n_masked_after_call"] = distributed.all_reduce_sum(masks.sum().reshape(1))
        loss = criterion.forward_masked(padded[: len(teacher)], assign, masks, n_masked_patches=len(teacher))
        results[f"{here}assign"] = assign
        results[f"{here}loss_masked"] = loss.detach()
        results[f"{here}dstudent_padded"] = _gradient(loss, padded)


def _ibot_sinkhorn_padded(recording: Recording, prefix: str, results: Results) -> None:
    criterion = _ibot_loss(recording)
    for group in _groups(recording, prefix):
        here = f"{prefix}{group}."
        # The recorded count is smaller than the padded buffer handed in. It only enters constants that cancel: ours
        # does not take one.
        recording.input(f"{here}n_masked")
        temperature = recording.json["config"]["ib_temps"][int(group.removeprefix("t"))]
        results[f"{here}assign"] = criterion.sinkhorn_knopp_teacher(
            recording.input(f"{here}teacher_logits"), temperature
        )


def _koleo(recording: Recording, prefix: str, results: Results) -> None:
    for case in _groups(recording, prefix):
        here = f"{prefix}{case}."
        features = _leaf(recording, f"{here}x")
        loss = KoLeoLoss()(features)
        results[f"{here}loss"] = loss.detach()
        results[f"{here}dx"] = _gradient(loss, features)
