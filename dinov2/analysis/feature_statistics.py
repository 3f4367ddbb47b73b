"""Quality statistics of features that need no training.

Shapes: n images, N patches of an image, D feature dimension, m feature vectors.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional


def rank_me(features: Tensor) -> float:
    """Effective rank of features (m, D), from 1 (all parallel) to min(m, D).

    RankMe (Garrido et al. 2022, arXiv 2210.02885): the exponential of the entropy of the normalized singular values of
    the features, which are not centered. NaN if all features are zero or any is not finite.
    """
    features = features.double()
    if not features.isfinite().all():
        return math.nan
    gram = features.T @ features if features.shape[0] > features.shape[1] else features @ features.T
    singular_values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    return torch.special.entr(singular_values / singular_values.sum()).sum().exp().item()


def patch_similarity(tokens: Tensor) -> float:
    """Mean cosine similarity of two different patches of one image, in [-1, 1]: tokens (n, N, D), N > 1.

    It rises while dense features degrade (DINOv3 paper, section 4.1): patches then become as similar as their image.
    """
    unit = functional.normalize(tokens.float(), dim=-1)
    count = tokens.shape[1]
    pair_sum = unit.sum(dim=1).square().sum(dim=-1)  # includes the 1 of each patch with itself
    return ((pair_sum - count) / (count * (count - 1))).mean().item()


def nearest_distance(features: Tensor) -> Tensor:
    """Mean Euclidean distance of the normalized features (m, D), m > 1, to their nearest neighbors: scalar in [0, 2].

    The KoLeo loss (DINOv2 paper, section 4) raises it. 0: features are duplicates.
    """
    unit = functional.normalize(features.float(), dim=-1)
    nearest = (unit @ unit.T).fill_diagonal_(-1).argmax(dim=1)
    return torch.linalg.vector_norm(unit - unit[nearest], dim=1).mean()  # 2 - 2 cos would lose digits


def leave_one_out_accuracy(features: Tensor, labels: Tensor, k: int = 10, temperature: float = 0.07) -> float:
    """Leave-one-out accuracy of weighted k-NN classification (Wu et al. 2018, arXiv 1805.01978), in [0, 1].

    As in the k-NN evaluation, but of features (n, D), n > 1, not normalized, with labels (n,) from 0. NaN if any of the
    features is not finite.
    """
    if not features.isfinite().all():
        return math.nan
    unit = functional.normalize(features.double(), dim=-1)
    cosines, neighbors = (unit @ unit.T).fill_diagonal_(-torch.inf).topk(min(k, len(unit) - 1), dim=1)
    votes = unit.new_zeros(len(unit), int(labels.max()) + 1)
    votes.scatter_add_(1, labels[neighbors], torch.softmax(cosines / temperature, dim=1))
    return (votes.argmax(dim=1) == labels).double().mean().item()


def linear_cka(first: Tensor, second: Tensor) -> float:
    """Similarity of features (m, D) and (m, E), m > 3, of the same images or patches; 1: equal but for a rotation.

    Centered kernel alignment with linear kernels (Kornblith et al. 2019, arXiv 1905.00414), by the unbiased estimator
    of Song et al. 2012, which is 0 on average for independent features, however few rows there are. NaN if undefined.
    """
    grams = []
    for features in (first, second):
        gram = (features.double() @ features.double().T).fill_diagonal_(0)
        count = len(gram)
        # Centered without the diagonal (Szekely and Rizzo 2014), which gives the same estimate.
        means = gram.sum(dim=1) / (count - 2)
        centered = gram - means - means[:, None] + gram.sum() / ((count - 1) * (count - 2))
        grams.append(centered.fill_diagonal_(0))
    one, two = grams
    return ((one * two).sum() / (one.square().sum() * two.square().sum()).sqrt()).item()
