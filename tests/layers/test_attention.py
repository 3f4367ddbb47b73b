"""Attention: every backend computes the same, or reports that it cannot run."""

import contextlib
import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dinov2.layers import Attention, MemEffAttention, pack, unpack
from dinov2.layers.attention import _KERNELS, BACKENDS, _try_backend, best_backend
from dinov2.layers.packing import sequence_ends

ROOT = Path(__file__).resolve().parents[2]
SHAPES = [(2, 5), (3, 4), (1, 1)]  # sequences and their length, in three groups


def naive(attention: Attention, x: Tensor) -> Tensor:
    """One sequence (N, D), head by head and query by query."""
    n, dim = x.shape
    d = dim // attention.num_heads
    qkv = x @ attention.qkv.weight.T + attention.qkv.bias
    heads = []
    for h in range(attention.num_heads):
        q, k, v = (qkv[:, part * dim + h * d : part * dim + (h + 1) * d] for part in range(3))
        rows = []
        for i in range(n):
            weights = torch.exp((k @ q[i]) / math.sqrt(d))
            rows.append((weights[:, None] * v).sum(dim=0) / weights.sum())
        heads.append(torch.stack(rows))
    return torch.cat(heads, dim=1) @ attention.proj.weight.T + attention.proj.bias


def attention_of(dim: int = 24, num_heads: int = 3, backend: str = "auto") -> Attention:
    torch.manual_seed(0)
    return Attention(dim, num_heads, qkv_bias=True, attention_backend=backend)


def groups_of(dim: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, dim, dtype=dtype, generator=generator) for shape in SHAPES]


# --- Values ----------------------------------------------------------------------------------------------------------


def test_packed_attention_is_that_of_each_sequence() -> None:
    attention = attention_of().double()
    groups = groups_of(24, torch.float64)
    tokens, segments = pack(groups)
    for group, output in zip(groups, unpack(attention(tokens, segments), segments), strict=True):
        for sequence, result in zip(group, output, strict=True):
            torch.testing.assert_close(result, naive(attention, sequence))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)], ids=str)
def test_half_precision_with_a_gradient_is_close_to_double(dtype: torch.dtype, tolerance: float) -> None:
    def output_and_gradient(attention: Attention) -> list[Tensor]:
        weight = attention.qkv.weight
        tokens, segments = pack([group.to(weight.dtype) for group in groups_of(24, torch.float64)])
        output = attention(tokens, segments)
        return [output, *torch.autograd.grad(output.double().sin().sum(), weight)]

    ours, exact = output_and_gradient(attention_of().to(dtype)), output_and_gradient(attention_of().double())
    for half, value in zip(ours, exact, strict=True):
        assert half.dtype == dtype
        assert (half.double() - value).norm() < tolerance * value.norm()


def test_packed_gradients_are_those_of_each_sequence() -> None:
    attention = attention_of().double()
    groups = groups_of(24, torch.float64)
    tokens, segments = pack(groups)
    weighting = torch.randn(tokens.shape, dtype=torch.float64)

    def gradients(output: Tensor, leaf: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad((output * weighting).sum(), [leaf, *attention.parameters()]))

    leaf = tokens.clone().requires_grad_()
    ours = gradients(attention(leaf, segments), leaf)
    leaf = tokens.clone().requires_grad_()
    sequences = [sequence for group in unpack(leaf, segments) for sequence in group]
    expected = gradients(torch.cat([naive(attention, sequence) for sequence in sequences]), leaf)
    for ours_, expected_ in zip(ours, expected, strict=True):
        torch.testing.assert_close(ours_, expected_)


def test_a_batch_is_so_many_sequences() -> None:
    attention = attention_of().double()
    x = torch.randn(3, 5, 24, dtype=torch.float64)
    torch.testing.assert_close(attention(x), torch.stack([naive(attention, sequence) for sequence in x]))


def test_sequences_do_not_see_each_other() -> None:
    attention = attention_of()
    tokens, segments = pack(groups_of(24, torch.float32))
    changed = tokens.clone()
    changed[5:10] += 1.0  # the second of the two long sequences
    same = (attention(tokens, segments) == attention(changed, segments)).all(dim=1)
    assert same.tolist() == [not 5 <= row < 10 for row in range(len(tokens))]


def test_the_published_class_is_this_one() -> None:
    assert MemEffAttention is Attention
    assert list(attention_of().state_dict()) == ["qkv.weight", "qkv.bias", "proj.weight", "proj.bias"]
    assert list(Attention(8, 2, proj_bias=False).state_dict()) == ["qkv.weight", "proj.weight"]


# --- Maps and dropout ------------------------------------------------------------------------------------------------


def naive_maps(attention: Attention, x: Tensor) -> Tensor:
    """Softmax of the scaled products of queries and keys, (N, D) -> (H, N, N)."""
    q, k = (x @ attention.qkv.weight.T + attention.qkv.bias).unflatten(-1, (3, attention.num_heads, -1)).unbind(1)[:2]
    return torch.stack([q[:, h] @ k[:, h].T for h in range(attention.num_heads)]).mul(attention.scale).softmax(dim=-1)


def test_a_hook_on_the_dropout_gets_the_maps_of_each_group() -> None:
    attention, groups = attention_of().double(), groups_of(24, torch.float64)
    tokens, segments = pack(groups)
    expected, maps = attention(tokens, segments), list[Tensor]()
    handle = attention.attn_drop.register_forward_hook(lambda module, inputs, output: maps.append(output))
    torch.testing.assert_close(attention(tokens, segments), expected)
    for group, found in zip(groups, maps, strict=True):
        torch.testing.assert_close(found, torch.stack([naive_maps(attention, sequence) for sequence in group]))
    assert attention(groups[0]).shape == groups[0].shape and maps[-1].shape == (2, 3, 5, 5)
    handle.remove()
    attention(tokens, segments)
    assert len(maps) == 4, "without the hook there are no maps"


@pytest.mark.parametrize("register", ["register_forward_pre_hook", "register_full_backward_hook"])
def test_every_kind_of_hook_on_the_dropout_is_called(register: str) -> None:
    attention, calls = attention_of(), list[int]()
    getattr(attention.attn_drop, register)(lambda *_: calls.append(1))
    attention(torch.randn(2, 5, 24)).sum().backward()
    assert calls == [1]


def test_a_hook_may_change_the_maps() -> None:
    attention, x = attention_of(), torch.randn(2, 5, 24)
    attention.attn_drop.register_forward_hook(lambda module, inputs, output: torch.full_like(output, 1 / 5))
    values = attention.qkv(x)[..., 48:].mean(dim=1, keepdim=True)
    torch.testing.assert_close(attention(x), attention.proj(values).expand(-1, 5, -1))


def test_modules_put_in_place_of_the_dropouts_are_called() -> None:
    class Uniform(torch.nn.Module):
        def forward(self, maps: Tensor) -> Tensor:
            return torch.full_like(maps, 1 / maps.shape[-1])

    attention, x = attention_of(), torch.randn(2, 5, 24)
    attention.attn_drop, attention.proj_drop = Uniform(), torch.nn.Tanh()
    values = attention.qkv(x)[..., 48:].mean(dim=1, keepdim=True)
    torch.testing.assert_close(attention(x), attention.proj(values).expand(-1, 5, -1).tanh())


def test_dropout_acts_on_the_maps_and_on_the_output_while_training() -> None:
    plain, x = attention_of(), torch.randn(2, 5, 24)
    attention = Attention(24, 3, qkv_bias=True, attn_drop=0.5, proj_drop=0.25)
    attention.load_state_dict(plain.state_dict())
    assert (attention.attn_drop.p, attention.proj_drop.p) == (0.5, 0.25)
    assert (plain.attn_drop.p, plain.proj_drop.p) == (0.0, 0.0), "other code reads them"
    assert torch.equal(attention.eval()(x), plain(x))
    attention.train()
    outputs = torch.stack([attention(x) for _ in range(4000)])
    assert abs(float((outputs == 0).double().mean()) - 0.25) < 0.01
    torch.testing.assert_close(outputs.mean(dim=0), plain(x), rtol=0, atol=0.05)
    attention.attn_drop.p = attention.proj_drop.p = 0.0
    torch.testing.assert_close(attention(x), plain(x))


# --- One sequence, no sequence, transformations ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("math", [False, True])
def test_a_batch_of_one_is_half_of_a_batch_of_two(dtype: torch.dtype, math: bool) -> None:
    attention, x = attention_of().to(dtype), groups_of(24, torch.float64)[0].to(dtype)
    with sdpa_kernel(SDPBackend.MATH) if math else contextlib.nullcontext():
        both = attention(x)
        alone = attention(x[:1])
        (gradient,) = torch.autograd.grad(alone.float().sin().sum(), attention.qkv.weight)
    torch.testing.assert_close(alone, both[:1], rtol=2e-2, atol=2e-2)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_per_sample_gradients_are_those_of_each_sample() -> None:
    attention, x = attention_of().double(), groups_of(24, torch.float64)[0]
    weights = {name: value.detach() for name, value in attention.named_parameters()}

    def loss(weights: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(attention, weights, (sample[None],)).sin().sum()

    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
    for index, sample in enumerate(x):
        one_by_one = torch.func.grad(loss)(weights, sample)
        torch.testing.assert_close({name: value[index] for name, value in together.items()}, one_by_one)


def test_no_sequences_and_strided_ones() -> None:
    attention, x = attention_of(), torch.randn(5, 3, 24)
    assert attention(x[:0]).shape == (0, 3, 24)
    torch.testing.assert_close(attention(x.transpose(0, 1)), attention(x.transpose(0, 1).contiguous()))


# --- Choice of backend -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_on_a_cpu_a_backend_runs_or_is_refused(backend: str) -> None:
    attention, x = attention_of(backend=backend), torch.randn(2, 5, 24)
    if backend in ("auto", "sdpa"):
        assert torch.equal(attention(x), attention_of()(x))
    else:
        with pytest.raises(ValueError, match=f"backend '{backend}' runs on CUDA only, not on cpu; use auto or sdpa"):
            attention(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_auto_on_a_cpu_is_sdpa(dtype: torch.dtype) -> None:
    assert best_backend("cpu", dtype, 64) == "sdpa"


@pytest.mark.skipif(importlib.util.find_spec("xformers") is None, reason="needs xFormers")
def test_on_a_cpu_xformers_is_not_even_imported() -> None:
    program = """
import sys, torch
from dinov2.models.vision_transformer import DinoVisionTransformer
model = DinoVisionTransformer(img_size=28, patch_size=14, embed_dim=16, depth=2, num_heads=2, drop_path_rate=0.3)
features = model([torch.zeros(2, 3, 28, 28), torch.zeros(2, 3, 14, 14)], is_training=True)
features[0]["x_norm_clstoken"].sum().backward()
print([name for name in sys.modules if name.partition(".")[0] in ("xformers", "triton")])
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stderr


def test_what_cannot_be_is_refused_when_building() -> None:
    with pytest.raises(ValueError, match="unknown attention backend 'flash'; known: auto, xformers, varlen, sdpa"):
        Attention(8, 2, attention_backend="flash")
    with pytest.raises(ValueError, match="width 8 is not divisible by 3 heads"):
        Attention(8, 3)


def test_trying_a_backend_works_in_inference_mode_and_draws_nothing() -> None:
    """A first forward pass under inference mode must not make the fast backends look broken."""
    state = torch.random.get_rng_state()
    with torch.inference_mode():
        _try_backend("sdpa", "cpu", torch.float32, 8)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_cached_lengths_made_in_inference_mode_serve_training() -> None:
    with torch.inference_mode():
        ends = sequence_ends(((2, 5), (3, 4)), torch.device("cpu"))
    assert ends.tolist() == [0, 5, 10, 14, 18, 22]
    assert ends.dtype == torch.int32 and not ends.is_inference()


# --- On a GPU --------------------------------------------------------------------------------------------------------


def relative_error(ours: Tensor, expected: Tensor) -> float:
    return float((ours.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)], ids=str
)
@pytest.mark.parametrize("backend", ["xformers", "varlen"])
def test_on_a_gpu_each_backend_agrees_with_sdpa(backend: str, dtype: torch.dtype, tolerance: float) -> None:
    try:
        _try_backend(backend, "cuda", dtype, 64)
    except Exception as error:  # no kernel of this backend for this GPU, dtype or installation
        pytest.skip(f"{backend} does not run here with {dtype}: {error}")
    segments = ((4, 50), (8, 17), (1, 1))
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(4 * 50 + 8 * 17 + 1, 3, 2, 64, dtype=torch.float64, generator=generator).to("cuda", dtype)
    weighting = torch.randn(len(exact), 2, 64, dtype=torch.float64, generator=generator).to("cuda", dtype)

    def run(name: str, qkv: Tensor) -> tuple[Tensor, Tensor]:
        leaf = qkv.detach().clone().requires_grad_()
        output = _KERNELS[name](leaf, segments)
        (gradient,) = torch.autograd.grad(output, leaf, weighting.to(output.dtype))
        return output.detach(), gradient

    assert run(backend, exact)[0].dtype == dtype
    for ours, expected in zip(run(backend, exact), run("sdpa", exact.double()), strict=True):
        assert ours.shape == expected.shape
        assert relative_error(ours, expected) < tolerance


@pytest.mark.gpu
def test_on_a_gpu_auto_is_one_that_runs() -> None:
    """For any precision, and for heads of a width that most kernels do not take."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for num_heads in (1, 2, 5):  # heads of 60, 30 and 12 channels
            attention = attention_of(dim=60, num_heads=num_heads).to("cuda", dtype)
            assert attention(torch.randn(2, 5, 60, device="cuda", dtype=dtype)).isfinite().all()
    assert best_backend("cuda", torch.float32, 64) != "varlen", "it has no kernel for float32"


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["xformers", "varlen", "auto"])
def test_on_a_gpu_inference_does_not_spoil_training(backend: str) -> None:
    """Lengths are cached; those of an evaluation serve the training that follows."""
    attention = attention_of(dim=128, num_heads=2, backend=backend).to("cuda", torch.bfloat16)
    tokens = torch.randn(23, 128, device="cuda", dtype=torch.bfloat16)
    segments = ((2, 7), (3, 3))
    try:
        _try_backend("sdpa" if backend == "auto" else backend, "cuda", torch.bfloat16, 64)
    except Exception as error:
        pytest.skip(f"{backend} does not run here: {error}")
    with torch.inference_mode():
        attention(tokens, segments)
    attention(tokens, segments).sum().backward()
    assert attention.qkv.weight.grad is not None and attention.qkv.weight.grad.isfinite().all()


@pytest.mark.filterwarnings("ignore:.torch.jit.trace", "ignore::torch.jit.TracerWarning")
def test_half_precision_is_traced_alike_with_and_without_gradients() -> None:
    """Which `torch.jit.trace` compares."""
    attention = Attention(8, num_heads=2).bfloat16()
    traced = torch.jit.trace(attention, torch.randn(2, 3, 8, dtype=torch.bfloat16))
    x = torch.randn(4, 3, 8, dtype=torch.bfloat16)
    torch.testing.assert_close(traced(x), attention(x), rtol=0, atol=1e-2)
