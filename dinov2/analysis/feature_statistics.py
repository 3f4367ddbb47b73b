"""Whether features are any good, in numbers and without training anything.

Shapes: n images, N patches of an image, D feature width, m feature vectors.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional


def rank_me(features: Tensor) -> float:
    """How many directions features (m, D) make use of: from 1, all parallel, to min(m, D).

    NaN if all features are zero, or any is not finite.

    RankMe (Garrido et al. 2022, arXiv 2210.02885): the exponential of the entropy of the singular values, which are
    those of the features as they are, not centered.
    """
    features = features.double()
    if not features.isfinite().all():
        return math.nan
    gram = features.T @ features if features.shape[0] > features.shape[1] else features @ features.T
    singular_values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    return torch.special.entr(singular_values / singular_values.sum()).sum().exp().item()


def patch_similarity(tokens: Tensor) -> float:
    """The mean cosine between two different patches of one image, tokens (n, N, D) with N > 1; 1: all alike.

    It rises while dense features decay (DINOv3 paper, section 4.1): patches then say the same as the whole image.
    """
    unit = functional.normalize(tokens.float(), dim=-1)
    count = tokens.shape[1]
    of_all_pairs = unit.sum(dim=1).square().sum(dim=-1)  # with each patch's 1 with itself
    return ((of_all_pairs - count) / (count * (count - 1))).mean().item()


def nearest_distance(features: Tensor) -> Tensor:
    """The mean distance of unit vectors to their nearest neighbors, a scalar of 0 to 2: (m, D), m > 1.

    What KoLeo raises (paper, section 4), on the scale that a reader can judge: 0 means that features repeat.
    """
    unit = functional.normalize(features.float(), dim=-1)
    nearest = (unit @ unit.T).fill_diagonal_(-1).argmax(dim=1)
    return torch.linalg.vector_norm(unit - unit[nearest], dim=1).mean()  # 2 - 2 cos would lose digits


def leave_one_out_accuracy(features: Tensor, labels: Tensor, k: int = 10, temperature: float = 0.07) -> float:
    """Share of images that the weighted vote of their k nearest neighbors among the others puts into their class.

    NaN if any feature is not finite. The vote is that of the k-NN evaluation (Wu et al. 2018, arXiv 1805.01978).

    Args:
        features: (n, D), not normalized; n > 1.
        labels: (n,) int64, from 0.
    """
    if not features.isfinite().all():
        return math.nan
    unit = functional.normalize(features.double(), dim=-1)
    cosines, neighbors = (unit @ unit.T).fill_diagonal_(-torch.inf).topk(min(k, len(unit) - 1), dim=1)
    votes = unit.new_zeros(len(unit), int(labels.max()) + 1)
    votes.scatter_add_(1, labels[neighbors], torch.softmax(cosines / temperature, dim=1))
    return (votes.argmax(dim=1) == labels).double().mean().item()
