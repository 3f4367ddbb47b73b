"""Packed tokens: sequences of different lengths, concatenated in one matrix `(T, D)`.

A training step runs crops of two sizes through the same weights. Only attention needs the lengths of the sequences.

Legend: b_k sequences of n_k tokens in group k, T = sum of b_k * n_k tokens in total, D channels.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

_Make = TypeVar("_Make", bound=Callable[..., Tensor])

Segments = tuple[tuple[int, int], ...]  # for each group of equally long sequences: (number of sequences, their length)


def pack(groups: Sequence[Tensor]) -> tuple[Tensor, Segments]:
    """Concatenate the sequences of all groups: k tensors (b_k, n_k, D) -> (T, D) and their segments."""
    segments = tuple((group.shape[0], group.shape[1]) for group in groups)
    flat = [group.flatten(0, 1) for group in groups]
    return (flat[0] if len(flat) == 1 else torch.cat(flat)), segments


def unpack(tokens: Tensor, segments: Segments) -> list[Tensor]:
    """Undo `pack`: (T, D) -> k tensors (b_k, n_k, D), views of the input."""
    sizes = [count * length for count, length in segments]
    return [part.unflatten(0, segment) for part, segment in zip(tokens.split(sizes), segments, strict=True)]


def kept_outside_graphs(make: _Make) -> _Make:
    """Decorator: keep the last tensors that a function made; a compiler, which does not know caches, traces it."""
    # Bounded: stochastic depth gives one shape per rate. Tensors of inference mode cannot be saved for a backward pass.
    kept = functools.lru_cache(maxsize=256)(torch.inference_mode(False)(make))

    @functools.wraps(make)
    def made_or_kept(*args: Any) -> Any:
        return make(*args) if torch.compiler.is_compiling() else kept(*args)

    return cast(_Make, made_or_kept)


@kept_outside_graphs
def sequence_ends(segments: Segments, device: torch.device) -> Tensor:
    """Positions at which the sequences begin and the last one ends: (1 + sequences,) int32, without a copy to it."""
    parts, start = [torch.zeros(1, dtype=torch.int32, device=device)], 0
    for count, length in segments:
        parts.append(start + length * torch.arange(1, count + 1, dtype=torch.int32, device=device))
        start += count * length
    return torch.cat(parts)
