"""Nearest neighbors by exact search.

Shapes: n rows of the bank that is searched, Q queries, D feature width.
"""

import torch
from torch import Tensor

QUERY_BATCH = 512  # similarities are computed for this many queries at once
GROUP = 16  # similarities per group; groups are compared by their maxima first


def search_with_torch(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k nearest rows of the bank (n, D) for each query (Q, D).

    Returns:
        Similarities (Q, k), largest first: -|q - b|^2 / 2 up to a constant per query; and rows of the bank (Q, k).
    """
    offset = torch.linalg.vector_norm(bank, dim=1).square() / -2
    memory = queries.new_empty(min(QUERY_BATCH, len(queries)) * len(bank))
    parts = []
    for part in queries.split(QUERY_BATCH):
        found = memory[: len(part) * len(bank)].view(len(part), len(bank))
        with torch.autocast(queries.device.type, enabled=False):  # half precision causes ties
            torch.addmm(offset, part, bank.T, out=found)
        parts.append(largest_of_rows(found, k))
    sims, positions = zip(*parts, strict=True)
    return torch.cat(sims), torch.cat(positions)


def largest_of_rows(sims: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values of each row and their positions, (Q, n) -> (Q, k), (Q, k); faster than `topk`.

    With the columns in groups, the k largest values are in the k groups with the largest maxima, or in the last columns
    that fill no group.
    """
    num_groups, rest = divmod(sims.shape[1], GROUP)
    if num_groups <= 2 * k:
        largest = sims.topk(k, dim=1)
        return largest.values, largest.indices
    grouped = sims[:, : GROUP * num_groups].unflatten(1, (GROUP, num_groups))
    groups = grouped.amax(dim=1).topk(k, dim=1, sorted=False).indices
    members = torch.arange(GROUP, device=sims.device) * num_groups
    last = torch.arange(GROUP * num_groups, sims.shape[1], device=sims.device).expand(len(sims), rest)
    positions = torch.cat([(groups[:, None] + members[:, None]).flatten(1), last], dim=1)
    largest = sims.gather(1, positions).topk(k, dim=1)
    return largest.values, positions.gather(1, largest.indices)
