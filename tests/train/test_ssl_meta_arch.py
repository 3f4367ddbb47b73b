"""The objective is that of the published recipe, written here once more as loops over single crops."""

import itertools

import pytest
import torch
from tiny import CENTERING, SEPARATE_HEADS, all_in, losses_of_batch, precision, random_batch, tiny_model
from torch import Tensor, nn
from torch.nn import functional as F

from dinov2.data.collate import Batch
from dinov2.train.guards import NonFiniteGuard
from dinov2.train.optim import build_optimizer, ema_update
from dinov2.train.ssl_meta_arch import Losses, SSLMetaArch
from dinov2.train.train import clip_and_step, forward_backward

TEACHER_TEMP = 0.05
NO_DROP_PATH = "student.drop_path_rate=0"
WEIGHTS = ["dino.loss_weight=0.7", "dino.koleo_loss_weight=0.2", "ibot.loss_weight=0.4"]
TERMS = ["dino_local_crops_loss", "dino_global_crops_loss", "koleo_loss", "ibot_loss"]


# --- The naive version -----------------------------------------------------------------------------------------------


def cross_entropy(targets: Tensor, scores: Tensor) -> Tensor:
    """Targets and student scores (R, K) -> (R,)."""
    return -(targets * F.log_softmax(scores / 0.1, dim=-1)).sum(dim=-1)


def sinkhorn(scores: Tensor) -> Tensor:
    """(R, K) -> (R, K), step by step as published."""
    q = torch.exp(scores.double() / TEACHER_TEMP).T
    num_prototypes, rows = q.shape
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(dim=1, keepdim=True) * num_prototypes
        q /= q.sum(dim=0, keepdim=True) * rows
    return (q * rows).T.float()


def koleo(features: Tensor) -> Tensor:
    unit = features / features.norm(dim=-1, keepdim=True)
    nearest = [min((a - b).norm() for j, b in enumerate(unit) if j != i) for i, a in enumerate(unit)]
    return -torch.stack(nearest).log().mean()


def crop_by_crop(networks: nn.ModuleDict, crops: Tensor, masks: Tensor | None = None) -> list[dict[str, Tensor]]:
    """Features of every crop of every image by itself, with a row dimension of 1."""
    return [
        networks["backbone"](crops[row : row + 1], None if masks is None else masks[row : row + 1], is_training=True)
        for row in range(len(crops))
    ]


def naive_terms(model: SSLMetaArch, batch: Batch) -> dict[str, Tensor]:
    """The four terms without their weights."""
    cfg = model.cfg
    num_images = len(batch.global_crops) // 2
    num_local = len(batch.local_crops) // num_images
    patch_head = "ibot_head" if cfg.ibot.separate_head else "dino_head"
    teacher = crop_by_crop(model.teacher, batch.global_crops)
    student = crop_by_crop(model.student, batch.global_crops, batch.masks)
    local = crop_by_crop(model.student, batch.local_crops)

    teacher_cls = torch.cat([model.teacher["dino_head"](crop["x_norm_clstoken"]) for crop in teacher])
    masked_rows = [row for row in range(len(teacher)) if batch.masks[row].any()]
    teacher_patches = [
        model.teacher[patch_head](teacher[row]["x_norm_patchtokens"][0, batch.masks[row]]) for row in masked_rows
    ]
    if cfg.train.centering == "sinkhorn_knopp":
        cls_targets, patch_targets = sinkhorn(teacher_cls), sinkhorn(torch.cat(teacher_patches))
    else:
        cls_targets = F.softmax((teacher_cls - model.dino_loss.center) / TEACHER_TEMP, dim=-1)
        center = model.ibot_patch_loss.center[0]
        patch_targets = F.softmax((torch.cat(teacher_patches) - center) / TEACHER_TEMP, dim=-1)
    cls_targets = cls_targets.detach().unflatten(0, (2, num_images))

    student_cls = [model.student["dino_head"](crop["x_norm_clstoken"]) for crop in student]
    local_cls = [model.student["dino_head"](crop["x_norm_clstoken"]) for crop in local]
    pairs = 2 + max(2 * num_local, 1)
    facing = torch.zeros(())
    for image, crop in itertools.product(range(num_images), range(2)):
        other = cls_targets[1 - crop, image]
        facing = facing + cross_entropy(other, student_cls[crop * num_images + image]).sum() / num_images
    away = torch.zeros(())
    for image, crop, small in itertools.product(range(num_images), range(2), range(num_local)):
        scores = local_cls[small * num_images + image]
        away = away + cross_entropy(cls_targets[crop, image], scores).sum() / num_images

    patch_loss = torch.zeros(())
    targets = iter(patch_targets.detach().split([len(scores) for scores in teacher_patches]))
    for row in masked_rows:
        scores = model.student[patch_head](student[row]["x_norm_patchtokens"][0, batch.masks[row]])
        patch_loss = patch_loss + cross_entropy(next(targets), scores).mean() / len(student)

    features = torch.cat([crop["x_norm_clstoken"] for crop in student])
    return {
        "dino_local_crops_loss": away / pairs,
        "dino_global_crops_loss": facing / pairs,
        "koleo_loss": koleo(features[:num_images]) + koleo(features[num_images:]),
        "ibot_loss": patch_loss,
    }


# --- The objective ---------------------------------------------------------------------------------------------------


def losses_of(model: SSLMetaArch, batch: Batch) -> Losses:
    torch.manual_seed(1)  # for stochastic depth
    return losses_of_batch(model, batch, TEACHER_TEMP)


def grown_apart(*overrides: str) -> SSLMetaArch:
    """A model whose teacher is not its student, with centers that are not zero."""
    model = tiny_model(NO_DROP_PATH, *overrides).train()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for param in model.teacher.parameters():
            param += 0.05 * torch.randn(param.shape, generator=generator)
        for center in (model.dino_loss.center, model.ibot_patch_loss.center):
            center += 0.1 * torch.randn(center.shape, generator=generator)
    return model


@pytest.mark.parametrize("num_local", [0, 1, 3])
@pytest.mark.parametrize("centering", ["train.centering=sinkhorn_knopp", CENTERING])
@pytest.mark.parametrize("heads", [[], SEPARATE_HEADS], ids=["shared", "separate"])
def test_losses_and_gradients_are_those_of_loops_over_crops(heads: list[str], centering: str, num_local: int) -> None:
    batch = random_batch(num_images=3, num_local=num_local)
    model = grown_apart(*WEIGHTS, *heads, centering)
    naive = naive_terms(model, batch)  # before the centers move
    if num_local == 0:
        del naive["dino_local_crops_loss"]
    weights = dict(zip(TERMS, (0.7, 0.7, 0.2, 0.4), strict=True))
    expected = sum(weights[name] * value for name, value in naive.items())
    expected_gradients = torch.autograd.grad(expected, list(model.student.parameters()))

    losses = losses_of(model, batch)
    losses.total.backward()

    assert list(losses.terms) == list(naive)
    for name, value in losses.terms.items():
        torch.testing.assert_close(value, weights[name] * naive[name], rtol=1e-5, atol=1e-5, msg=name)
    torch.testing.assert_close(losses.total, expected, rtol=1e-5, atol=1e-5)
    for (name, param), gradient in zip(model.student.named_parameters(), expected_gradients, strict=True):
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(param.grad, gradient, rtol=1e-3, atol=1e-4, msg=name)


def test_the_published_display_has_no_weights_and_half_of_koleo_and_ibot() -> None:
    losses = losses_of(grown_apart(*WEIGHTS), random_batch())
    factors = dict(zip(TERMS, (1 / 0.7, 1 / 0.7, 0.5, 0.5 / 0.4), strict=True))
    assert list(losses.published) == TERMS
    for name, factor in factors.items():
        torch.testing.assert_close(losses.published[name], losses.terms[name] * factor)
    assert losses.total == torch.stack(list(losses.terms.values())).sum()


def test_the_student_of_one_crop_faces_the_teacher_of_the_other() -> None:
    batch = random_batch(num_images=2)
    swapped = batch._replace(global_crops=batch.global_crops.roll(2, dims=0))  # crop 0 <-> crop 1
    model = grown_apart(CENTERING)
    targets, targets_of_swapped = (model.targets([some], TEACHER_TEMP)[0].cls for some in (batch, swapped))
    scores = model.teacher["dino_head"](model.teacher["backbone"](batch.global_crops[2:]))
    model = grown_apart(CENTERING)  # with the first center
    of_crop_1 = F.softmax((scores - model.dino_loss.center) / TEACHER_TEMP, dim=-1)
    torch.testing.assert_close(targets[0], of_crop_1.detach(), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(targets[0], targets[1], atol=1e-3)
    assert not torch.allclose(targets[0], targets_of_swapped[0], atol=1e-3)


# --- Switching off ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [[], SEPARATE_HEADS], ids=["shared", "separate"])
@pytest.mark.parametrize(
    ("off", "left"),
    [
        ("dino.loss_weight=0", ["koleo_loss", "ibot_loss"]),
        ("dino.koleo_loss_weight=0", ["dino_local_crops_loss", "dino_global_crops_loss", "ibot_loss"]),
        ("dino.loss_weight=-1", ["koleo_loss", "ibot_loss"]),
    ],
)
def test_a_loss_switched_off_leaves_the_others_as_they_are(off: str, left: list[str], heads: list[str]) -> None:
    batch = random_batch()
    everything = losses_of(tiny_model(*heads), batch).terms
    rest = losses_of(tiny_model(off, *heads), batch)
    assert list(rest.terms) == list(rest.published) == left
    for name, value in rest.terms.items():
        torch.testing.assert_close(value, everything[name])
    rest.total.backward()


@pytest.mark.parametrize("heads", [[], SEPARATE_HEADS], ids=["shared", "separate"])
def test_without_ibot_the_student_sees_no_masks(heads: list[str]) -> None:
    batch = random_batch()
    model = tiny_model("ibot.loss_weight=0", *heads)
    losses = losses_of(model, batch)
    assert list(losses.terms) == TERMS[:3]
    unmasked = batch._replace(masks=torch.zeros_like(batch.masks))
    with_ibot = losses_of(tiny_model(), unmasked).terms
    for name, value in losses.terms.items():
        torch.testing.assert_close(value, with_ibot[name])
    assert set(model.student) == {"backbone", "dino_head"}, "no head for patches"


def test_with_all_but_koleo_off_there_is_nothing_to_train() -> None:
    with pytest.raises(ValueError, match=r"dino.loss_weight and ibot.loss_weight are both 0"):
        tiny_model("dino.loss_weight=0", "ibot.loss_weight=0")


def test_a_batch_without_a_masked_patch_gives_a_patch_loss_of_0() -> None:
    for settings in ([], SEPARATE_HEADS, [CENTERING]):
        model = tiny_model(*settings)
        losses = losses_of(model, random_batch(num_images=1, mask_probability=0.0))
        losses.total.backward()
        assert losses.terms["ibot_loss"] == 0 and losses.total.isfinite()
        assert model.ibot_patch_loss.center.isfinite().all()
        assert all(param.grad is None or param.grad.isfinite().all() for param in model.student.parameters())


# --- Teacher, centers, modes -----------------------------------------------------------------------------------------


def test_the_teacher_starts_as_the_student_and_gets_no_gradient() -> None:
    model = tiny_model(*SEPARATE_HEADS)
    student, teacher = model.student.state_dict(), model.teacher.state_dict()
    assert list(student) == list(teacher)
    assert all(torch.equal(student[name], teacher[name]) for name in student)
    assert not {id(param) for param in model.student.parameters()} & {id(param) for param in model.teacher.parameters()}
    losses_of(model, random_batch()).total.backward()
    assert all(param.grad is None and not param.requires_grad for param in model.teacher.parameters())
    assert all(param.grad is not None for param in model.student.parameters())


def test_names_in_the_state_dict_are_the_published_ones() -> None:
    names = set(tiny_model(*SEPARATE_HEADS).state_dict())
    heads = ("backbone", "dino_head", "ibot_head")
    roots = {f"{side}.{head}" for side in ("student", "teacher") for head in heads}
    assert {".".join(name.split(".")[:2]) for name in names} == roots | {"dino_loss.center", "ibot_patch_loss.center"}
    assert "student.ibot_head.last_layer.weight_g" in names
    assert tiny_model(*SEPARATE_HEADS).state_dict()["ibot_patch_loss.center"].shape == (1, 1, 12)


def test_train_and_eval_keep_their_signatures_and_the_teacher_in_eval_mode() -> None:
    model = tiny_model()
    assert model.train() is model and model.training
    assert all(module.training for module in model.student.modules())
    assert not any(module.training for module in model.teacher.modules())
    assert model.eval() is model
    assert not any(module.training for module in model.modules())
    assert model.train(False) is model and not model.student.training


def test_only_the_student_has_stochastic_depth() -> None:
    batch = random_batch()
    model = tiny_model("student.drop_path_rate=0.5").train()
    features = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        features.append((model.predictions(batch).features, model.targets([batch], TEACHER_TEMP)[0].cls))
    assert not torch.equal(features[0][0], features[1][0])
    assert torch.equal(features[0][1], features[1][1])


def test_centers_move_after_the_targets_and_not_with_sinkhorn() -> None:
    batch = random_batch()
    model = tiny_model(CENTERING, *SEPARATE_HEADS)
    features = model.teacher["backbone"](batch.global_crops, is_training=True)
    cls_scores = model.teacher["dino_head"](features["x_norm_clstoken"])
    patch_scores = model.teacher["ibot_head"](features["x_norm_patchtokens"][batch.masks])

    first = model.targets([batch], TEACHER_TEMP)[0]
    torch.testing.assert_close(first.patch, F.softmax(patch_scores / TEACHER_TEMP, dim=-1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model.dino_loss.center, 0.1 * cls_scores.mean(0, keepdim=True), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model.ibot_patch_loss.center[0], 0.1 * patch_scores.mean(0, keepdim=True))
    second = model.targets([batch], TEACHER_TEMP)[0]
    shifted = (patch_scores - 0.1 * patch_scores.mean(0)) / TEACHER_TEMP
    torch.testing.assert_close(second.patch, F.softmax(shifted, dim=-1), rtol=1e-4, atol=1e-6)

    model = tiny_model()
    losses_of(model, batch)
    assert not model.dino_loss.center.any() and not model.ibot_patch_loss.center.any()


# --- Precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_computes_about_the_same_with_float32_parameters(dtype: str) -> None:
    batch = random_batch()
    model = tiny_model(NO_DROP_PATH, *all_in(dtype))
    half = getattr(torch, {"bf16": "bfloat16", "fp16": "float16"}[dtype])
    in_half = batch._replace(global_crops=batch.global_crops.to(half), local_crops=batch.local_crops.to(half))
    losses = losses_of(model, in_half)
    losses.total.backward()
    assert model.predictions(in_half).global_cls.dtype == half, "computed in half precision indeed"
    reference = losses_of(tiny_model(NO_DROP_PATH), batch).terms
    for name, value in losses.terms.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, reference[name], rtol=0.05, atol=0.02, msg=name)
    assert {param.dtype for param in model.parameters()} == {torch.float32}
    assert all(
        param.grad.dtype == torch.float32 and param.grad.isfinite().all() for param in model.student.parameters()
    )


@pytest.mark.parametrize("heads", [[], SEPARATE_HEADS], ids=["shared", "separate"])
def test_every_network_may_have_a_precision_of_its_own(heads: list[str]) -> None:
    batch = random_batch()
    for dtypes in itertools.product(("fp32", "bf16", "fp16"), repeat=4):
        places = itertools.product(("student", "teacher"), ("backbone", "dino_head"))
        choice = [precision(*place, dtype) for place, dtype in zip(places, dtypes, strict=True)]
        choice += [precision("student", "ibot_head", dtypes[1]), precision("teacher", "ibot_head", dtypes[3])]
        assert losses_of(tiny_model(*choice, *heads), batch).total.isfinite(), dtypes


@pytest.mark.gpu
@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_step_on_a_gpu_never_waits_for_it(centering: str, dtype: str) -> None:
    model = tiny_model(f"train.centering={centering}", "student.drop_path_rate=0.3", *all_in(dtype)).cuda().train()
    optimizer = build_optimizer(model.student, betas=(0.9, 0.99), lr_decay_rate=0.9, patch_embed_lr_mult=0.2)
    scaler, guard = torch.amp.GradScaler("cuda", enabled=dtype == "fp16"), NonFiniteGuard(3)
    batch = Batch._make(x.cuda() if isinstance(x, Tensor) else x for x in random_batch())
    for step in range(3):
        torch.cuda.set_sync_debug_mode("error" if step > 0 else "default")  # the first step fills caches
        try:
            losses = forward_backward(model, [batch], 0.05, scaler, seed=0, step=step)
            clip_and_step(losses, model.student, optimizer, scaler, 3.0, guard)
            ema_update(model.teacher, model.student, 0.99)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    guard.report(scaler, all_steps=True)
