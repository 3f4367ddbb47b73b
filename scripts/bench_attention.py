#!/usr/bin/env python
"""Benchmark of attention over packed sequences of two lengths, forward and backward; prints JSON.

    OMP_NUM_THREADS=1 python scripts/bench_attention.py [--arch vit_small] [--images 4] [--precision fp32,bf16]

Each way goes from the packed tokens of all crops after the projection `qkv` to what the projection `proj` gets and
back, on 2 sequences of 257 and 8 of 50 tokens per image, as in the published recipe with patches of 14 pixels:

    sdpa, xformers, varlen   ours, see `layers/attention.py`; sdpa is one call per group of equally long sequences
    dense                    one call of `scaled_dot_product_attention` over all tokens, block-diagonal mask
    padded                   one call over sequences that are filled up to the longest, keys masked
    nested                   one call over jagged nested tensors
    flex                     `flex_attention`, compiled, block mask

Masks are made and programs compiled beforehand. `difference` is the largest one to sdpa of outputs and gradients, whose
numbers are up to 5. `ratio` is [median, least, most] over the rounds of a way's time / sdpa's in the same round: below
1 it is faster than sdpa. A way that does not run here, or does not give the numbers of sdpa, is in `not_run`.
"""

import argparse
import json
import statistics
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dinov2.config import DTYPES
from dinov2.layers.attention import _KERNELS, _load
from dinov2.layers.packing import Segments, sequence_ends, unpack
from dinov2.models import ARCHS, build_model
from scripts.side_by_side import alternate, hardware, ratios

Way = Callable[[Tensor], Tensor]  # (T, 3, H, d) -> (T, H, d)
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # a mistake is of order 1


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="vit_small", choices=sorted(ARCHS), help="sets the number of heads")
    parser.add_argument("--images", type=int, default=4, help="in a batch")
    parser.add_argument("--global-tokens", type=int, default=257, help="2 sequences per image")
    parser.add_argument("--local-tokens", type=int, default=50, help="8 sequences per image")
    parser.add_argument("--precision", default="fp32,bf16", help=f"of {', '.join(sorted(DTYPES))}, several with commas")
    parser.add_argument("--ways", default=",".join(WAYS), help="in addition to sdpa, with commas; default: all")
    parser.add_argument("--rounds", type=int, default=10, help="each times every way once, after one of warm-up")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def main() -> None:
    args = get_args_parser().parse_args()
    device = torch.device(args.device)
    # Warnings about prototype features.
    warnings.filterwarnings("ignore", "The PyTorch API of nested tensors is in prototype stage", UserWarning)
    segments = ((2 * args.images, args.global_tokens), (8 * args.images, args.local_tokens))
    with torch.device("meta"):
        backbone = build_model(args.arch)
    heads, channels = backbone.num_heads, backbone.embed_dim // backbone.num_heads
    shape = (sum(count * length for count, length in segments), 3, heads, channels)
    record = {
        **{"arch": args.arch, "images": args.images, "segments": segments, "heads": heads, "channels": channels},
        "results": {
            name: compare(segments, shape, DTYPES[name], args.rounds, device, chosen(args.ways, WAYS))
            for name in chosen(args.precision, DTYPES)
        },
        **hardware(device),
    }
    print(json.dumps(record, indent=2))


def chosen(words: str, known: Mapping[str, object]) -> list[str]:
    """Names given with commas."""
    names = words.split(",")
    if unknown := set(names) - known.keys():
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}")
    return names


def compare(
    segments: Segments,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    rounds: int,
    device: torch.device,
    names: Sequence[str],
) -> dict[str, dict[str, Any]]:
    """Check and time sdpa and the named ways with numbers of one precision."""
    torch.manual_seed(0)
    qkv = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
    upstream = torch.randn(shape[0], *shape[2:], device=device, dtype=dtype)

    def run(way: Way) -> list[Tensor]:
        output = way(qkv)
        (gradient,) = torch.autograd.grad(output, qkv, upstream)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return [output.detach(), gradient]

    ways, differences, memory, not_run = {}, {}, {}, {}
    expected = run(lambda qkv: _KERNELS["sdpa"](qkv, segments))
    for name in dict.fromkeys(["sdpa", *names]):
        try:
            way = WAYS[name](segments, device)
            difference = max(float((a - b).abs().max()) for a, b in zip(run(way), expected, strict=True))
            if device.type == "cuda":
                memory[name] = peak_memory(partial(run, way), device)
        except Exception as error:  # any failure means that it does not run here
            not_run[name] = f"{type(error).__name__}: {error}".strip().partition("\n")[0][:160]
            continue
        if difference > TOLERANCE[dtype]:
            not_run[name] = f"differs from sdpa by {difference:.2g}"
        else:
            ways[name], differences[name] = way, difference
    seconds = alternate({name: partial(run, way) for name, way in ways.items()}, rounds, device).wall
    return {
        "milliseconds": {name: round(1000 * statistics.median(times), 3) for name, times in seconds.items()},
        "ratio": {f"{name} / sdpa": ratios(times, seconds["sdpa"]) for name, times in seconds.items()},
        "difference": {name: float(f"{difference:.2g}") for name, difference in differences.items()},
        "peak_memory_bytes": memory,
        "not_run": not_run,
    }


def peak_memory(work: Callable[[], object], device: torch.device) -> int:
    """Peak bytes on the GPU above those allocated before."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return torch.cuda.max_memory_allocated(device) - before


# --- The ways: prepared for some segments, then called ---------------------------------------------------------------


def project(name: str) -> Callable[[Segments, torch.device], Way]:
    def prepare(segments: Segments, device: torch.device) -> Way:
        _load(name)
        ends = sequence_ends(segments, device)
        return lambda qkv: _KERNELS[name](qkv, segments, ends)

    return prepare


def dense_mask(segments: Segments, device: torch.device) -> Way:
    which = sequence_of_token(segments, device)
    mask = which[:, None] == which

    def attend(qkv: Tensor) -> Tensor:
        q, k, v = qkv.permute(1, 2, 0, 3).unsqueeze(1)  # each (1, H, T, d)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).squeeze(0).transpose(0, 1)

    return attend


def padded(segments: Segments, device: torch.device) -> Way:
    longest = max(length for _, length in segments)
    lengths = torch.tensor([length for count, length in segments for _ in range(count)], device=device)
    real = torch.arange(longest, device=device) < lengths[:, None]  # (sequences, longest)

    def attend(qkv: Tensor) -> Tensor:
        groups = [F.pad(part, (0, 0) * 3 + (0, longest - part.shape[1])) for part in unpack(qkv, segments)]
        q, k, v = torch.cat(groups).permute(2, 0, 3, 1, 4)  # each (sequences, H, longest, d)
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None])
        return output.transpose(1, 2)[real]

    return attend


def nested(segments: Segments, device: torch.device) -> Way:
    lengths = [length for count, length in segments for _ in range(count)]
    ends = torch.tensor([0, *lengths], device=device).cumsum(0)

    def attend(qkv: Tensor) -> Tensor:
        q, k, v = (
            torch.nested.nested_tensor_from_jagged(
                part.contiguous(), ends, min_seqlen=min(lengths), max_seqlen=max(lengths)
            ).transpose(1, 2)
            for part in qkv.unbind(1)
        )
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            return (
                F.scaled_dot_product_attention(q, k, v).transpose(1, 2).values()
            )  # not cuDNN, which asks for a driver

    return attend


def flex(segments: Segments, device: torch.device) -> Way:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    which = sequence_of_token(segments, device)

    def same(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return which[query] == which[key]

    mask = create_block_mask(same, None, None, len(which), len(which), device=str(device))
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(qkv: Tensor) -> Tensor:
        q, k, v = qkv.permute(1, 2, 0, 3).unsqueeze(1)  # each (1, H, T, d)
        return compiled(q, k, v, block_mask=mask).squeeze(0).transpose(0, 1)

    return attend


WAYS: dict[str, Callable[[Segments, torch.device], Way]] = {
    **{name: project(name) for name in ("sdpa", "xformers", "varlen")},
    **{"dense": dense_mask, "padded": padded, "nested": nested, "flex": flex},
}


def sequence_of_token(segments: Segments, device: torch.device) -> Tensor:
    """(T,): the number of the sequence that a token belongs to."""
    lengths = torch.tensor([length for count, length in segments for _ in range(count)], device=device)
    return torch.arange(len(lengths), device=device).repeat_interleave(lengths)


if __name__ == "__main__":
    main()
