"""The transformer block: residuals, lists of crops, and both forms of stochastic depth."""

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinov2.layers import Attention, Block, Mlp, NestedTensorBlock, SwiGLUFFN, pack
from dinov2.layers.stochastic_depth import draw_branches

DIM = 8


def block_of(drop_path: float = 0.0, *, init_values: float | None = 1.0, **kwargs: object) -> Block:
    """A block with generic weights, always the same; what is drawn after it is the same too."""
    torch.manual_seed(0)
    block = Block(DIM, num_heads=2, qkv_bias=True, drop_path=drop_path, init_values=init_values, **kwargs)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return block


def attention_only(drop_path: float) -> Block:
    """A block whose feed-forward residual is zero, so that y - x is the attention residual alone."""
    block = block_of(drop_path)
    nn.init.zeros_(block.ls2.gamma)
    return block


def attention_residual(block: Block, x: Tensor) -> Tensor:
    return block.ls1(block.attn(block.norm1(x)))


def coefficients(y: Tensor, x: Tensor, residual: Tensor) -> Tensor:
    """By which factor the residual of each sample was added: (B, ...) -> (B,), the same over the whole sample."""
    factors = ((y - x) * residual).flatten(1).sum(dim=1) / residual.square().flatten(1).sum(dim=1)
    torch.testing.assert_close(y, x + residual * factors[:, None, None], rtol=1e-4, atol=1e-4)
    return factors


def rows_through(module: nn.Module, run: Callable[[], object]) -> list[int]:
    """How many tokens went through the module in each of its calls."""
    counts: list[int] = []
    hook = module.register_forward_hook(lambda module, args, output: counts.append(args[0].numel() // DIM))
    run()
    hook.remove()
    return counts


# --- Without stochastic depth ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("init_values", [None, 1.0])
def test_two_pre_norm_residuals(init_values: float | None) -> None:
    block = block_of(init_values=init_values)
    x = torch.randn(3, 5, DIM)
    gains = (block.ls1.gamma, block.ls2.gamma) if init_values else (1.0, 1.0)
    expected = x + gains[0] * block.attn(block.norm1(x))
    expected = expected + gains[1] * block.mlp(block.norm2(expected))
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("init_values", [None, 0.0, 0])
def test_layer_scale_can_be_left_out(init_values: float | None) -> None:
    names = Block(DIM, 2, init_values=init_values).state_dict()
    assert not [name for name in names if "ls" in name.split(".")[0]]


def test_a_list_is_each_batch_by_itself() -> None:
    block = block_of(ffn_layer=SwiGLUFFN)
    crops = [torch.randn(2, 5, DIM), torch.randn(3, 4, DIM), torch.randn(1, 5, DIM)]
    for crop, output in zip(crops, block(crops), strict=True):
        torch.testing.assert_close(output, block(crop))


def test_gradients_of_a_list_are_those_of_each_batch() -> None:
    block = block_of().double()
    crops = [torch.randn(2, 5, DIM, dtype=torch.float64), torch.randn(3, 4, DIM, dtype=torch.float64)]
    weightings = [torch.randn_like(crop) for crop in crops]

    def gradients(outputs: list[Tensor]) -> tuple[Tensor, ...]:
        total = torch.stack([(y * w).sum() for y, w in zip(outputs, weightings, strict=True)]).sum()
        return torch.autograd.grad(total, [*crops, *block.parameters()])

    for crop in crops:
        crop.requires_grad_()
    for ours, expected in zip(gradients(block(crops)), gradients([block(crop) for crop in crops]), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_evaluation_ignores_the_rate(rate: float) -> None:
    block, plain = block_of(rate).eval(), block_of(0.0)
    x = torch.randn(4, 5, DIM)
    assert torch.equal(block(x), plain(x))
    for ours, expected in zip(block([x, x[:, :3]]), plain([x, x[:, :3]]), strict=True):
        assert torch.equal(ours, expected)


def test_the_published_order_of_arguments() -> None:
    block = Block(8, 2, 3.0, True, False, False, 0.1, 0.2, 0.5, 0.3, nn.ReLU, nn.LayerNorm, Attention, Mlp)
    assert block.attn.qkv.bias is not None and block.attn.proj.bias is None and block.mlp.fc1.bias is None
    assert (block.mlp.fc1.out_features, type(block.mlp.act)) == (24, nn.ReLU)
    assert (block.attn.attn_drop.p, block.attn.proj_drop.p, block.mlp.drop.p) == (0.2, 0.1, 0.1)
    assert (block.ls1.gamma == 0.5).all() and block.sample_drop_ratio == block.drop_path1.drop_prob == 0.3


class MeanOfTokens(nn.Module):
    """Attention of a user, which takes batches only."""

    def __init__(self, dim: int, num_heads: int, **options: object) -> None:
        super().__init__()
        assert options == {"qkv_bias": False, "proj_bias": True, "attn_drop": 0.0, "proj_drop": 0.0}

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=1, keepdim=True).expand_as(x)


def forward_of_batches(self: Any, x: Tensor) -> Tensor:
    """What scripts put in place of the forward of attention to keep its maps."""
    batch, num_tokens, width = x.shape
    qkv = self.qkv(x).view(batch, num_tokens, 3, self.num_heads, width // self.num_heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    maps = (self.scale * q @ k.mT).softmax(dim=-1)
    return self.proj((maps @ v).transpose(1, 2).reshape(batch, num_tokens, width))


@pytest.mark.parametrize("place", ["class", "subclass", "module"])
def test_a_forward_for_batches_put_in_place_gets_batches(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block = block_of().eval()
    groups = [torch.randn(4, 3, DIM), torch.randn(2, 5, DIM)]
    expected = block(groups)
    if place == "class":
        monkeypatch.setattr(Attention, "forward", forward_of_batches)
    elif place == "subclass":
        block.attn.__class__ = type("MapsKept", (Attention,), {"forward": forward_of_batches})
    else:
        block.attn.forward = types.MethodType(forward_of_batches, block.attn)
    for output, wanted in zip(block(groups), expected, strict=True):
        torch.testing.assert_close(output, wanted)


def test_a_forward_of_layer_scale_put_in_place_is_called() -> None:
    block = block_of().eval()
    block.ls1.forward = lambda x: 0 * x
    block.ls2.forward = lambda x: 0 * x
    x = torch.randn(2, 3, DIM)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_attention_of_others_is_taken_for_batches_and_lists(drop_path: float) -> None:
    block = Block(DIM, 2, attn_class=MeanOfTokens, drop_path=drop_path, ffn_layer=lambda **_: nn.Identity())
    groups = [torch.randn(4, 3, DIM), torch.randn(2, 5, DIM)]
    assert [output.shape for output in block(groups)] == [group.shape for group in groups]
    block.eval()
    for output, group in zip(block(groups), groups, strict=True):
        x = group + block.norm1(group).mean(dim=1, keepdim=True)
        torch.testing.assert_close(output, x + block.norm2(x))
        torch.testing.assert_close(block(group), output)


@pytest.mark.parametrize("name", ["ls1", "ls2"])
def test_a_hook_on_layer_scale_sees_and_changes_the_residual(name: str) -> None:
    """Without hooks it is fused with the sum."""
    block, x = block_of().eval(), torch.randn(2, 5, DIM)
    expected, seen = block(x), list[Tensor]()
    handle = getattr(block, name).register_forward_hook(lambda module, inputs, output: seen.append(output))
    torch.testing.assert_close(block(x), expected)
    assert [output.shape for output in seen] == [x.shape]
    handle.remove()
    getattr(block, name).register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    assert not torch.allclose(block(x), expected)


@pytest.mark.parametrize("drop_path", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("training", [False, True])
def test_no_images_give_no_tokens(drop_path: float, training: bool) -> None:
    block = block_of(drop_path).train(training)
    assert block(torch.zeros(0, 5, DIM)).shape == (0, 5, DIM)
    assert [len(group) for group in block([torch.zeros(0, 5, DIM), torch.zeros(2, 3, DIM)])] == [0, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("drop_path", [0.0, 0.05, 0.5])
def test_one_image_in_half_precision_has_a_gradient(dtype: torch.dtype, drop_path: float) -> None:
    block = block_of(drop_path).train().to(dtype)
    block(torch.randn(1, 5, DIM, dtype=dtype)).sum().backward()
    assert block.attn.qkv.weight.grad is not None and block.attn.qkv.weight.grad.isfinite().all()


def test_the_published_class_is_this_one() -> None:
    assert NestedTensorBlock is Block


# --- Skipping samples: single batches above a rate of 0.1, and always lists ------------------------------------------

KEPT = [(10, 0.3, 7), (10, 0.5, 5), (8, 0.15, 6), (3, 0.9, 1), (1, 0.5, 1), (4, 0.2, 3)]


@pytest.mark.parametrize(("batch", "rate", "kept"), KEPT)
def test_a_share_of_the_batch_is_kept_and_scaled(batch: int, rate: float, kept: int) -> None:
    block = attention_only(rate)
    x = torch.randn(batch, 5, DIM)
    residual = attention_residual(block, x)
    factors = coefficients(block(x), x, residual).sort().values
    expected = [0.0] * (batch - kept) + [batch / kept] * kept
    torch.testing.assert_close(factors, torch.tensor(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("batch", "rate", "kept"), KEPT)
def test_dropped_samples_cost_no_work(batch: int, rate: float, kept: int) -> None:
    block, x = block_of(rate), torch.randn(batch, 5, DIM)
    for module in (block.norm1, block.attn.qkv, block.norm2, block.mlp):
        assert rows_through(module, lambda: block(x)) == [kept * 5]


def test_dropped_samples_are_untouched() -> None:
    block, x = attention_only(0.5), torch.randn(10, 5, DIM)
    same = (block(x) == x).flatten(1)
    assert same.all(dim=1).sum() == 5 and same.any(dim=1).sum() == 5


def test_each_group_of_a_list_keeps_its_own_share_even_at_a_low_rate() -> None:
    for rate, kept in ((0.05, (9, 19)), (0.4, (6, 12))):
        block = attention_only(rate)
        crops = [torch.randn(10, 5, DIM), torch.randn(20, 3, DIM)]
        for crop, output, keep in zip(crops, block(crops), kept, strict=True):
            factors = coefficients(output, crop, attention_residual(block, crop)).sort().values
            expected = [0.0] * (len(crop) - keep) + [len(crop) / keep] * keep
            torch.testing.assert_close(factors, torch.tensor(expected), rtol=1e-4, atol=1e-5)
        assert rows_through(block.mlp, lambda: block(crops)) == [kept[0] * 5 + kept[1] * 3]  # noqa: B023


def test_a_list_of_one_batch_skips_too() -> None:
    block = block_of(0.1)
    assert rows_through(block.mlp, lambda: block([torch.randn(10, 5, DIM)])) == [9 * 5]


def test_both_residuals_draw_their_own_samples() -> None:
    """y - x is zero where both dropped a sample: with a common draw that would be half of them, always."""
    block, x = block_of(0.5), torch.randn(8, 2, DIM)
    untouched = {int((block(x) == x).flatten(1).all(dim=1).sum()) for _ in range(20)}
    assert untouched - {4}


@pytest.mark.parametrize("as_list", [False, True])
def test_skipping_keeps_the_expected_residual(as_list: bool) -> None:
    n, batch, kept = 1000, 4, 2
    block, x = attention_only(0.4), torch.randn(batch, 2, DIM)
    residual = attention_residual(block, x)
    draws = [coefficients(block([x])[0] if as_list else block(x), x, residual) for _ in range(n)]
    sigma = ((batch / kept - 1) / n) ** 0.5
    assert (torch.stack(draws).mean(dim=0) - 1).abs().max() < 4 * sigma


def test_gradients_skip_with_the_samples() -> None:
    block, x = block_of(0.5), torch.randn(6, 3, DIM, requires_grad=True)
    y = block(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    untouched = (y == x).flatten(1).all(dim=1)
    assert 0 < untouched.sum() < 6
    assert torch.equal(gradient[untouched], torch.ones_like(gradient[untouched]))
    assert (gradient[~untouched] != 1).flatten(1).any(dim=1).all()


def test_branches_drawn_for_all_blocks_are_those_that_each_block_would_draw() -> None:
    blocks = [block_of(rate) for rate in (0.5, 0.0, 0.3)]
    tokens, segments = pack([torch.randn(10, 5, DIM), torch.randn(20, 3, DIM)])
    torch.manual_seed(1)
    one_by_one = tokens
    for block in blocks:
        one_by_one = block(one_by_one, segments)
    torch.manual_seed(1)
    together = tokens
    for block, branches in zip(blocks, draw_branches(segments, [0.5, 0.0, 0.3], tokens.device), strict=True):
        together = block(together, segments, branches=branches)
    assert torch.equal(together, one_by_one)


def test_gradients_of_kept_and_dropped_tokens_are_those_of_the_formula() -> None:
    block = block_of(0.5).double()
    tokens, segments = pack([torch.randn(6, 3, DIM, dtype=torch.float64)])
    [(attention, ffn)] = draw_branches(segments, [0.5], tokens.device)

    def naive(x: Tensor) -> Tensor:
        residual = block.ls1(block.attn(block.norm1(x[attention.rows]), attention.segments))
        x = x.index_add(0, attention.rows, residual * attention.scale)
        return x.index_add(0, ffn.rows, block.ls2(block.mlp(block.norm2(x[ffn.rows]))) * ffn.scale)

    x, y = tokens.clone().requires_grad_(), tokens.clone().requires_grad_()
    weighting = torch.randn_like(tokens)
    ours = torch.autograd.grad((block(x, segments, branches=(attention, ffn)) * weighting).sum(), x)
    expected = torch.autograd.grad((naive(y) * weighting).sum(), y)
    torch.testing.assert_close(ours, expected)


# --- Masking residuals: single batches up to a rate of 0.1 -----------------------------------------------------------


def test_at_a_low_rate_whole_samples_are_masked_and_nothing_is_skipped() -> None:
    block, x = attention_only(0.1), torch.randn(200, 2, DIM)
    factors = coefficients(block(x), x, attention_residual(block, x))
    dropped = factors.abs() < 1e-4
    assert 5 <= dropped.sum() <= 40
    torch.testing.assert_close(factors[~dropped], torch.full((int((~dropped).sum()),), 1 / 0.9), rtol=1e-3, atol=0)
    assert rows_through(block.mlp, lambda: block(x)) == [400]


def test_masking_keeps_the_expected_residual() -> None:
    n, rate = 40_000, 0.1
    block, x = attention_only(rate), torch.randn(1, 2, DIM).expand(n, -1, -1)
    with torch.no_grad():
        factors = coefficients(block(x), x, attention_residual(block, x[:1]).expand_as(x))
    assert abs(factors.mean().item() - 1) < 4 * (rate / (1 - rate) / n) ** 0.5


def test_the_rate_of_the_two_forms_meets_at_a_tenth() -> None:
    x = torch.randn(100, 2, DIM)
    assert rows_through((block := block_of(0.1)).mlp, lambda: block(x)) == [200]
    assert rows_through((block := block_of(0.11)).mlp, lambda: block(x)) == [89 * 2]
