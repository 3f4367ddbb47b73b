"""The classifiers of the linear evaluation: a grid of inputs and learning rates, trained together.

Shapes: B images, N patches, D width of the backbone, C classes. Backbone output: for each of the last blocks, from
shallow to deep, patch tokens (B, N, D) and class token (B, D), after the final norm.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

TokensOfBlocks = Sequence[tuple[Tensor, Tensor]]

PUBLISHED_DECIMALS = 5
_NAME = re.compile(r"classifiers_dict\.(classifier_(\d+)_blocks_avgpool_(True|False)_lr_[\d_]+)\.linear\.weight")


def create_linear_input(x_tokens_list: TokensOfBlocks, use_n_blocks: int, use_avgpool: bool) -> Tensor:
    """Concatenate the class tokens of the last n blocks, and the mean patch token: (B, n*D) or (B, (n+1)*D) float32."""
    parts = [class_token for _, class_token in x_tokens_list[-use_n_blocks:]]
    if use_avgpool:
        parts.append(x_tokens_list[-1][0].mean(dim=1))
    return torch.cat(parts, dim=-1).float()


class LinearClassifier(nn.Module):
    """A linear layer on the tokens of the last n blocks."""

    def __init__(self, out_dim: int, use_n_blocks: int, use_avgpool: bool, num_classes: int = 1000) -> None:
        """Initialize the weights from a normal distribution of std 0.01, the biases with 0; `out_dim` inputs."""
        super().__init__()
        self.out_dim, self.use_n_blocks, self.use_avgpool = out_dim, use_n_blocks, use_avgpool
        self.linear = nn.Linear(out_dim, num_classes)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x_tokens_list: TokensOfBlocks) -> Tensor:
        return self.linear(create_linear_input(x_tokens_list, self.use_n_blocks, self.use_avgpool))


class AllClassifiers(nn.Module):
    """Classifiers by name; keys of the state dict: `classifiers_dict.NAME.linear.weight` and `.bias`."""

    def __init__(self, classifiers_dict: Mapping[str, LinearClassifier]) -> None:
        super().__init__()
        self.classifiers_dict = nn.ModuleDict(classifiers_dict)

    def forward(self, x_tokens_list: TokensOfBlocks) -> dict[str, Tensor]:
        """Logits {name: (B, C)}; classifiers with the same input share it."""
        input_of = cache(partial(create_linear_input, x_tokens_list))
        heads = self.by_name().items()
        return {name: head.linear(input_of(head.use_n_blocks, head.use_avgpool)) for name, head in heads}

    def by_name(self) -> dict[str, LinearClassifier]:
        return cast(dict[str, LinearClassifier], dict(self.classifiers_dict.items()))

    @property
    def num_classes(self) -> int:
        """C, the same for all classifiers."""
        return next(iter(self.by_name().values())).linear.out_features


class LinearPostprocessor(nn.Module):
    """Scores of one classifier, in the form that metrics take."""

    def __init__(self, linear_classifier: LinearClassifier, class_mapping: Tensor | None = None) -> None:
        """Store the classifier; `class_mapping` (C',) int64 selects the classes of another dataset from the C."""
        super().__init__()
        self.linear_classifier, self.class_mapping = linear_classifier, class_mapping

    def forward(self, samples: TokensOfBlocks, targets: Tensor) -> dict[str, Tensor]:
        logits = self.linear_classifier(samples)
        return {"preds": logits if self.class_mapping is None else logits[:, self.class_mapping], "target": targets}


def scale_lr(learning_rate: float, batch_size: int, world_size: int = 1) -> float:
    """The learning rate for a global batch of `batch_size * world_size`, given that for 256."""
    return learning_rate * (batch_size * world_size) / 256.0


def classifier_names(use_n_blocks: int, use_avgpool: bool, rates: Sequence[float]) -> list[str]:
    """Published names, such as `classifier_4_blocks_avgpool_True_lr_0_00400`, with more decimals if needed."""
    if len(set(rates)) < len(rates):
        raise ValueError(f"learning rates must differ from each other, got {list(rates)}")
    decimals = PUBLISHED_DECIMALS
    while len({f"{rate:.{decimals}f}" for rate in rates}) < len(rates):
        decimals += 1
    prefix = f"classifier_{use_n_blocks}_blocks_avgpool_{use_avgpool}_lr_"
    return [prefix + f"{rate:.{decimals}f}".replace(".", "_") for rate in rates]


class LinearGrid(NamedTuple):
    """Classifiers and their parameter groups for the optimizer, in the same order."""

    classifiers: AllClassifiers
    param_groups: list[dict[str, Any]]


def setup_linear_classifiers(
    sample_output: TokensOfBlocks,
    n_last_blocks_list: Sequence[int],
    learning_rates: Sequence[float],
    batch_size: int,
    num_classes: int,
    *,
    world_size: int = 1,
    seed: int = 0,
) -> LinearGrid:
    """Build a classifier for each number of blocks, without and with average pooling, and each learning rate.

    Classifiers of the same input start from the same weights, independently of the rest of the grid.

    Args:
        sample_output: Backbone output for any images; determines the widths.
        n_last_blocks_list: Numbers of blocks.
        learning_rates: For a global batch of 256; they must differ.
        batch_size: Images in each of `world_size` processes.
        num_classes: C.
        seed: Seed of the initial weights.
    """
    rates = [scale_lr(rate, batch_size, world_size) for rate in learning_rates]
    classifiers, groups = {}, []
    for n in n_last_blocks_list:
        for avgpool in (False, True):
            width = create_linear_input(sample_output, n, avgpool).shape[1]
            for name, rate in zip(classifier_names(n, avgpool, rates), rates, strict=True):
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    classifier = LinearClassifier(width, n, avgpool, num_classes)
                classifiers[name] = classifier.to(sample_output[0][0].device)
                groups.append({"params": classifiers[name].parameters(), "lr": rate})
    return LinearGrid(AllClassifiers(classifiers), groups)


def classifiers_from_state_dict(state: Mapping[str, Tensor], source: str) -> AllClassifiers:
    """Build the classifiers of a checkpoint, for any grid; a `ValueError` about `source` if they are incomplete."""
    classifiers = {}
    try:
        for match in filter(None, map(_NAME.fullmatch, state)):
            num_classes, width = state[match[0]].shape
            classifiers[match[1]] = LinearClassifier(width, int(match[2]), match[3] == "True", num_classes)
        if not classifiers:
            raise ValueError(f"no linear classifiers in {source}; found: {', '.join(list(state)[:4])}")
        model = AllClassifiers(classifiers)
        model.load_state_dict(dict(state))
    except (AttributeError, RuntimeError, TypeError) as error:  # missing entries, other types or shapes
        raise ValueError(f"{source} has no complete linear classifiers: {error}") from error
    return model


def check_width(classifiers: AllClassifiers, x_tokens_list: TokensOfBlocks, source: str) -> None:
    """Raise a `ValueError` if the classifiers of a file do not fit these tokens."""
    for name, classifier in classifiers.by_name().items():
        width = create_linear_input(x_tokens_list, classifier.use_n_blocks, classifier.use_avgpool).shape[1]
        if width != classifier.out_dim:
            raise ValueError(
                f"the classifiers of {source} are for another backbone: {name} takes {classifier.out_dim} features, "
                f"and this one has {width}"
            )
