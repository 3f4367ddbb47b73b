"""Parameter groups have the published multipliers and number; clipping and the moving average are exact."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import SEPARATE_HEADS, losses_of_batch, random_batch, tiny_model
from torch import nn

from dinov2.layers import DINOHead
from dinov2.models import build_model
from dinov2.train.optim import (
    build_optimizer,
    clip_gradients,
    ema_update,
    fuse_params_groups,
    get_params_groups_with_decay,
    get_vit_lr_decay_rate,
    set_hyperparameters,
    step_unless,
)
from dinov2.train.schedules import StepValues


@pytest.fixture(scope="module")
def deep_backbone() -> nn.Module:
    """24 blocks as in ViT-L, but thin."""
    return build_model("vit_large", embed_dim=8, num_heads=1, img_size=28, patch_size=14, init_values=1e-5)


@pytest.mark.parametrize(
    ("name", "multiplier"),
    [
        ("cls_token", 0.0717898),
        ("pos_embed", 0.0717898),
        ("mask_token", 0.0717898),
        ("register_tokens", 0.0717898),
        ("patch_embed.proj.weight", 0.0717898),  # before patch_embed_lr_mult
        ("blocks.0.norm1.weight", 0.0797664),
        ("blocks.6.attn.qkv.weight", 0.1500946),
        ("blocks.0.6.attn.qkv.weight", 0.1500946),  # chunked: the second number is the block
        ("blocks.3.23.mlp.fc1.bias", 0.9),
        ("blocks.23.mlp.fc1.bias", 0.9),
        ("norm.weight", 1.0),
    ],
)
def test_published_learning_rate_multipliers(name: str, multiplier: float) -> None:
    assert get_vit_lr_decay_rate(name, 0.9, num_layers=24) == pytest.approx(multiplier, rel=1e-6)


def test_patch_embedding_has_a_multiplier_of_its_own(deep_backbone: nn.Module) -> None:
    groups = get_params_groups_with_decay(deep_backbone, 0.9, patch_embed_lr_mult=0.2)
    multipliers = {group["name"]: group["lr_multiplier"] for group in groups}
    assert multipliers["patch_embed.proj.weight"] == pytest.approx(0.0143580, rel=1e-5)
    assert multipliers["patch_embed.proj.bias"] == multipliers["patch_embed.proj.weight"]
    assert multipliers["pos_embed"] == pytest.approx(0.0717898, rel=1e-6)


def test_heads_learn_at_the_full_rate_and_know_their_last_layer() -> None:
    groups = get_params_groups_with_decay(DINOHead(8, 16, nlayers=2, hidden_dim=8, bottleneck_dim=4), 0.5, 0.1)
    assert {group["lr_multiplier"] for group in groups} == {1.0}
    assert [group["name"] for group in groups if group["is_last_layer"]] == [
        "last_layer.weight_g",
        "last_layer.weight_v",
    ]


def test_biases_norms_and_gains_do_not_decay_tokens_and_prototypes_do(deep_backbone: nn.Module) -> None:
    networks = {"": deep_backbone, "head.": DINOHead(8, 16, nlayers=2, hidden_dim=8, bottleneck_dim=4)}
    decayed = {
        prefix + group["name"]: group["wd_multiplier"]
        for prefix, network in networks.items()
        for group in get_params_groups_with_decay(network)
    }
    expected = {
        "blocks.3.norm1.weight": 0.0,
        "blocks.3.norm2.bias": 0.0,
        "blocks.3.attn.qkv.bias": 0.0,
        "blocks.3.ls1.gamma": 0.0,
        "norm.weight": 0.0,
        "patch_embed.proj.bias": 0.0,
        "patch_embed.proj.weight": 1.0,
        "blocks.3.attn.qkv.weight": 1.0,
        "cls_token": 1.0,
        "pos_embed": 1.0,
        "mask_token": 1.0,
        "head.mlp.0.bias": 0.0,
        "head.mlp.0.weight": 1.0,
        "head.last_layer.weight_g": 1.0,
        "head.last_layer.weight_v": 1.0,
    }
    assert {name: decayed[name] for name in expected} == expected


def test_number_of_fused_groups_is_the_published_one(deep_backbone: nn.Module) -> None:
    def count(network: nn.Module, decay: float) -> int:
        return len(fuse_params_groups(get_params_groups_with_decay(network, decay, patch_embed_lr_mult=0.2)))

    assert count(deep_backbone, 0.9) == 52
    assert count(deep_backbone, 1.0) == 4
    assert count(DINOHead(8, 16), 0.9) == 3


def test_fused_groups_come_in_order_of_appearance_and_hold_every_parameter_once() -> None:
    model = tiny_model(*SEPARATE_HEADS)
    optimizer = build_optimizer(model.student, betas=(0.8, 0.9), lr_decay_rate=0.9, patch_embed_lr_mult=0.2)
    held = Counter(id(param) for group in optimizer.param_groups for param in group["params"])
    assert held == Counter(id(param) for param in model.student.parameters())
    owner = {id(param): name for name, module in model.student.items() for param in module.parameters()}
    owners = [owner[id(group["params"][0])] for group in optimizer.param_groups]
    assert owners == ["backbone"] * (len(owners) - 6) + ["dino_head"] * 3 + ["ibot_head"] * 3
    assert optimizer.param_groups[0]["params"][0] is model.student_backbone.cls_token
    assert all(group["fused"] and group["betas"] == (0.8, 0.9) for group in optimizer.param_groups)


def test_frozen_parameters_are_in_no_group() -> None:
    head = DINOHead(8, 16)
    head.last_layer.requires_grad_(False)
    assert not any(group["is_last_layer"] for group in get_params_groups_with_decay(head))


def test_scheduled_values_reach_the_groups_times_their_multipliers() -> None:
    model = tiny_model()
    optimizer = build_optimizer(model.student, betas=(0.9, 0.99), lr_decay_rate=0.5, patch_embed_lr_mult=0.2)
    set_hyperparameters(optimizer, StepValues(0.8, 0.3, 0.9, teacher_temp=0.05, last_layer_lr=0.1, backbone_lr=0.4))
    settings = {
        id(param): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for param in group["params"]
    }
    student = dict(model.student.named_parameters())
    expected = {
        "backbone.cls_token": (0.4 * 0.5**3, 0.3),
        "backbone.patch_embed.proj.weight": (0.8 * 0.5**3 * 0.2, 0.3),
        "backbone.blocks.1.norm1.weight": (0.4 * 0.5, 0.0),
        "backbone.norm.weight": (0.4, 0.0),
        "dino_head.mlp.0.weight": (0.8, 0.3),
        "dino_head.last_layer.weight_v": (0.1, 0.3),
    }
    for name, values in expected.items():
        assert settings[id(student[name])] == pytest.approx(values), name


def gradients(module: nn.Module) -> torch.Tensor:
    flat = [param.grad.flatten() for param in module.parameters() if param.grad is not None]
    return torch.cat(flat).double()  # the norm of a long vector is inexact in float32


def test_every_module_is_clipped_by_its_own_norm() -> None:
    model = tiny_model(*SEPARATE_HEADS)
    losses_of_batch(model, random_batch()).total.backward()
    before = {name: gradients(module) for name, module in model.student.items()}
    bound = sorted(float(gradient.norm()) for gradient in before.values())[1]  # so that one is clipped, one is not
    norms = clip_gradients(model.student, bound)
    for name, module in model.student.items():
        torch.testing.assert_close(norms[name].double(), before[name].norm(), rtol=1e-5, atol=0)
        scale = min(1.0, bound / float(before[name].norm()))
        torch.testing.assert_close(gradients(module), before[name] * scale, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("no_limit", [None, 0.0])
def test_without_a_limit_norms_are_only_measured(no_limit: float | None) -> None:
    model = tiny_model()
    losses_of_batch(model, random_batch()).total.backward()
    before = gradients(model.student)
    assert all(norm > 0 for norm in clip_gradients(model.student, no_limit).values())
    assert torch.equal(gradients(model.student), before)


def test_a_head_that_gets_no_gradient_is_not_measured() -> None:
    model = tiny_model("dino.loss_weight=0", *SEPARATE_HEADS)
    losses_of_batch(model, random_batch()).total.backward()
    assert set(model.student) == {"backbone", "dino_head", "ibot_head"}
    assert set(clip_gradients(model.student, 3.0)) == {"backbone", "ibot_head"}


def test_a_skipped_step_changes_nothing_and_does_not_affect_the_next_one() -> None:
    def run(*refusals: float) -> list[torch.Tensor]:
        torch.manual_seed(0)
        layer = nn.ModuleDict({"head": nn.Linear(3, 2)})
        optimizer = build_optimizer(layer, betas=(0.9, 0.99), lr_decay_rate=1.0, patch_embed_lr_mult=1.0)
        for refused in refusals:
            layer["head"](torch.ones(1, 3)).square().sum().backward()
            step_unless(torch.tensor(refused), optimizer)
            layer.zero_grad()
        states = [value for state in optimizer.state.values() for value in state.values()]
        return [param.detach().clone() for param in layer.parameters()] + states

    assert all(map(torch.equal, run(0.0, 1.0, 0.0, 1.0), run(0.0, 0.0)))


@given(momentum=st.floats(0, 1))
def test_the_teacher_is_a_moving_average_of_the_student(momentum: float) -> None:
    teacher, student = nn.Linear(3, 2).requires_grad_(False), nn.Linear(3, 2)
    expected = [
        momentum * t + (1 - momentum) * s for t, s in zip(teacher.parameters(), student.parameters(), strict=True)
    ]
    before = [param.clone() for param in student.parameters()]
    ema_update(teacher, student, momentum)
    torch.testing.assert_close(list(teacher.parameters()), [value.detach() for value in expected])
    assert all(torch.equal(param, old) for param, old in zip(student.parameters(), before, strict=True)), (
        "the student stays"
    )
