"""Packed tokens: sequences of different lengths, concatenated in one matrix `(T, D)`.

A training step runs crops of two sizes through the same weights. Only attention needs the lengths of the sequences.

Legend: b_k sequences of n_k tokens in group k, T = sum of b_k * n_k tokens in total, D channels.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

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


# Bounded: stochastic depth gives one shape per rate. Tensors of inference mode cannot be saved for a backward pass.
@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)
def sequence_ends(segments: Segments, device: torch.device) -> Tensor:
    """Positions at which the sequences begin and the last one ends: (1 + sequences,) int32."""
    lengths = [0] + [length for count, length in segments for _ in range(count)]
    return torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
