"""Self-attention over packed sequences, with one of three equivalent kernels.

| backend | devices, dtypes | implementation |
| --- | --- | --- |
| `xformers` | CUDA, fp16/bf16/fp32 | one memory-efficient kernel over all sequences, block-diagonal mask |
| `varlen` | CUDA, fp16/bf16 | `torch.nn.attention.varlen`, the same in PyTorch itself |
| `sdpa` | everywhere | one `scaled_dot_product_attention` per group of equally long sequences |

`auto` selects the first one that runs with the given device, dtype and head width, which is tested by running it once:
xFormers can be imported on machines where none of its kernels work. The environment variable `XFORMERS_DISABLED` (any
value) excludes xFormers. Attention maps are computed explicitly only for dropout on them, or for a hook on `attn_drop`,
which gets them as (b, H, n, n).

Legend: T packed tokens, D width, H heads, d = D / H, B sequences of N tokens.
"""

import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinov2.layers.hooks import has_hooks
from dinov2.layers.packing import Segments, pack, sequence_ends

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "xformers", "varlen", "sdpa")


class Attention(nn.Module):
    """Multi-head self-attention with the published parameter names `qkv` and `proj`.

    Args:
        dim: Width D, a multiple of the number of heads H.
        attn_drop: Dropout rate of the attention maps, in [0, 1]. In training, a rate above 0 requires the maps, which
            the fast kernels do not compute; the published fast path ignores the rate.
        proj_drop: Dropout rate of the output, in [0, 1].
        attention_backend: One of `BACKENDS`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        attention_backend: str = "auto",
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} is not divisible by {num_heads} heads")
        if attention_backend not in BACKENDS:
            raise ValueError(f"unknown attention backend {attention_backend!r}; known: {', '.join(BACKENDS)}")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.attention_backend = attention_backend
        if attention_backend == "varlen":
            _load(attention_backend)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop: nn.Module = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.proj_drop: nn.Module = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, segments: Segments | None = None, ends: Tensor | None = None) -> Tensor:
        """Self-attention within each sequence of packed tokens (T, D) with `segments`, or of (B, N, D).

        `ends` are the `sequence_ends` of the segments, if they are known already.
        """
        qkv = self.qkv(x)  # (..., 3D), the shape that hooks on this layer expect
        if segments is None:
            qkv, segments = pack([qkv])
        qkv = qkv.unflatten(-1, (3, self.num_heads, self.head_dim))  # (T, 3, H, d): rows of Q, then K, then V
        if self._needs_maps():
            attended = _by_group(qkv, segments, self._attend_with_maps)
        else:
            attended = _KERNELS[self._backend(qkv)](qkv, segments, ends)
        return self.proj_drop(self.proj(attended.reshape(x.shape)))

    def _backend(self, qkv: Tensor) -> str:
        if self.attention_backend == "auto":
            return best_backend(qkv.device.type, qkv.dtype, self.head_dim)
        if self.attention_backend != "sdpa" and qkv.device.type != "cuda":
            raise ValueError(
                f"attention backend {self.attention_backend!r} runs on CUDA only, not on {qkv.device}; use auto or sdpa"
            )
        return self.attention_backend

    def _needs_maps(self) -> bool:
        """Whether `attn_drop` is active or has hooks."""
        drop = self.attn_drop
        if type(drop) is nn.Dropout:
            return (self.training and drop.p > 0) or has_hooks(drop)
        return type(drop) is not nn.Identity or has_hooks(drop)

    def _attend_with_maps(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of (b, H, n, d) each, through `attn_drop`."""
        maps = torch.softmax(q * self.scale @ k.mT, dim=-1)
        return self.attn_drop(maps).to(v.dtype) @ v


MemEffAttention = Attention  # published name of the memory-efficient variant, which is a backend here


def _by_group(qkv: Tensor, segments: Segments, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """(T, 3, H, d) -> (T, H, d), a batched call of q, k, v -> (b, H, n, d) for each group of (b, H, n, d)."""
    groups = []
    for (count, length), part in zip(segments, qkv.split([count * n for count, n in segments]), strict=True):
        q, k, v = part.unflatten(0, (count, length)).permute(2, 0, 3, 1, 4)
        groups.append(attend(q, k, v).transpose(1, 2).flatten(0, 1))
    return groups[0] if len(groups) == 1 else torch.cat(groups)


def _sdpa(qkv: Tensor, segments: Segments, ends: Tensor | None = None) -> Tensor:
    """(T, 3, H, d) -> (T, H, d), a batched call per group."""
    return _by_group(qkv, segments, _attend)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of (b, H, n, d) each, by the fused kernel except where its gradient takes 2 to 4 times as long."""
    if q.is_cpu and q.requires_grad and q.dtype in (torch.bfloat16, torch.float16) and not torch.jit.is_tracing():
        return torch.softmax(q * q.shape[-1] ** -0.5 @ k.mT, dim=-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


def _xformers(qkv: Tensor, segments: Segments, ends: Tensor | None = None) -> Tensor:
    """(T, 3, H, d) -> (T, H, d), one call for all sequences."""
    fmha = importlib.import_module("xformers.ops.fmha")
    q, k, v = (part.unsqueeze(0) for part in qkv.unbind(1))
    return fmha.memory_efficient_attention(q, k, v, attn_bias=_block_diagonal_mask(segments, q.device)).squeeze(0)


def _varlen(qkv: Tensor, segments: Segments, ends: Tensor | None = None) -> Tensor:
    """(T, 3, H, d) -> (T, H, d), one call for all sequences."""
    ends = sequence_ends(segments, qkv.device) if ends is None else ends
    longest = max(length for _, length in segments)
    # By attribute: an import would interrupt a compilation. `_load` has imported it.
    varlen: Any = getattr(torch.nn.attention, "varlen")  # noqa: B009
    return varlen.varlen_attn(*qkv.unbind(1), ends, ends, longest, longest)


_KERNELS = {"xformers": _xformers, "varlen": _varlen, "sdpa": _sdpa}


# Bounded, unlike the published one: stochastic depth gives one shape per rate. Created outside of inference mode, whose
# tensors cannot be saved for a backward pass.
@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)
def _block_diagonal_mask(segments: Segments, device: torch.device) -> Any:
    lengths = [length for count, length in segments for _ in range(count)]
    return importlib.import_module("xformers.ops.fmha.attn_bias").BlockDiagonalMask.from_seqlens(lengths, device=device)


def backend_keyword(attention_backend: str) -> dict[str, str]:
    """The keyword of this package's attention and blocks, omitted for the default."""
    return {} if attention_backend == "auto" else {"attention_backend": attention_backend}


def best_backend(device_type: str, dtype: torch.dtype, head_dim: int) -> str:
    """Select the first backend of the table above that computes attention and its gradient for such inputs.

    Compilers and exporters that trace this function get `sdpa`, which all of them support. A compiler that calls it
    instead (`torch.compiler.assume_constant_result`) gets the selection made outside.
    """
    if device_type != "cuda" or torch.compiler.is_dynamo_compiling():
        return "sdpa"  # before `is_exporting`, which is true in every compilation of torch 2.11
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return "sdpa"
    return _find_backend(device_type, dtype, head_dim)


@functools.cache
def _find_backend(device_type: str, dtype: torch.dtype, head_dim: int) -> str:
    here = f"{device_type}, {dtype}, {head_dim} channels per head"
    for name in ["varlen"] if "XFORMERS_DISABLED" in os.environ else ["xformers", "varlen"]:
        try:
            _try_backend(name, device_type, dtype, head_dim)
        except Exception as error:  # any failure means that it is not usable
            logger.debug("attention backend %s does not run on %s: %s", name, here, error)
        else:
            logger.info("attention backend for %s: %s", here, name)
            return name
    logger.info("attention backend for %s: sdpa", here)
    return "sdpa"


def _try_backend(name: str, device_type: str, dtype: torch.dtype, head_dim: int) -> None:
    """Run attention and its gradient once, in any grad mode of the caller, without drawing random numbers.

    The lengths are those of usual crops: for longer sequences some backends have other kernels.
    """
    _load(name)
    with torch.inference_mode(False), torch.enable_grad():
        qkv = torch.zeros(197 + 37, 3, 2, head_dim, device=device_type, dtype=dtype, requires_grad=True)
        _KERNELS[name](qkv, ((1, 197), (1, 37))).sum().backward()


def _load(name: str) -> None:
    """Import what a backend needs.

    Raises:
        ImportError: It is not installed, or its kernels cannot be loaded here.
    """
    if name == "varlen":
        importlib.import_module("torch.nn.attention.varlen")
    elif name == "xformers":
        # Kernels for another CUDA version cannot be loaded, which the package finds out in seconds, with warnings.
        spec = importlib.util.find_spec("xformers")
        if spec is None or spec.origin is None:
            raise ImportError("xFormers is not installed")
        for library in sorted(Path(spec.origin).parent.glob("_C*.so")):
            try:
                torch.ops.load_library(library)
            except OSError as error:
                raise ImportError(f"the kernels of xFormers cannot be loaded: {error}") from error
        importlib.import_module("xformers.ops.fmha")
