"""Set e: masks and collation, mask by mask for given seeds, and in statistics.

Ours draw from a ``random.Random`` in the published order, so the recorded seeds reproduce the recorded masks exactly.
The statistics are of fewer draws than the recorded ones; both sides' standard errors enter the comparison.
"""

import random
from typing import Any

import torch
from torch import Tensor

from dinov2.data.augment import MultiCrop
from dinov2.data.collate import collate_data_and_cast, draw_masks
from dinov2.data.masking import MaskingGenerator, published_max_num_patches
from scripts.golden.comparison import Comparison
from scripts.golden.recording import Recording

MAX_DRAWS = 1000
STATISTICS_SEED = 20240607
EXTREMES = "smallest and largest of many draws"


def replay_masking(recording: Recording, comparison: Comparison) -> None:
    for case in recording.json["generators"]:
        name = case["name"]
        generator = MaskingGenerator(
            (case["grid"], case["grid"]),
            min_num_patches=case["min_num_patches"],
            max_num_patches=case["max_num_patches"],
        )
        bound = published_max_num_patches(case["img"], case["patch"])
        comparison.exact(f"{name}: grid", case["img"] // case["patch"], case["grid"])
        comparison.close(f"{name}: largest rectangle", bound, case["max_num_patches"], tolerance=1e-12)
        log_aspect = torch.tensor(generator.log_aspect, dtype=torch.float64)
        comparison.close(f"{name}: log aspect", log_aspect, torch.tensor(case["log_aspect"]).double(), tolerance=1e-6)
        for seed in case["seeds"]:
            rng = random.Random(seed)
            targets = [target for target in case["targets"] for _ in range(case["draws_per_target_at_seed"])]
            masks = [torch.from_numpy(generator(target, rng=rng)) for target in targets]
            comparison.exact(f"{name}.seed{seed}", torch.stack(masks), recording.tensors[f"{name}.seed{seed}"])
        for stats in case["stats"].values():
            _compare_mask_statistics(recording, comparison, name, generator, stats)


def _compare_mask_statistics(
    recording: Recording, comparison: Comparison, name: str, generator: MaskingGenerator, stats: dict[str, Any]
) -> None:
    target, draws = stats["target"], min(stats["draws"], MAX_DRAWS)
    rng = random.Random(STATISTICS_SEED)
    masks = torch.stack([torch.from_numpy(generator(target, rng=rng)) for _ in range(draws)])
    counts = masks.flatten(1).sum(1)
    label = f"{name}, target {target}"
    comparison.mean(f"{label}: masked patches", counts, stats["mean_count"], stats["std_count"], stats["draws"])
    comparison.share(f"{label}: exactly the target", counts == target, stats["frac_exact"], stats["draws"])
    _compare_histogram(comparison, f"{label}: share with", counts, stats["hist"], stats["draws"])
    comparison.exact(f"{label}: at most the target", int(counts.max()) <= target, True)
    comparison.leave_out(EXTREMES, count=2)
    frequency = f"{name}.stat_freq.{target}"
    comparison.shares(frequency, masks, recording.tensors[frequency], stats["draws"])


def _compare_histogram(
    comparison: Comparison, label: str, counts: Tensor, histogram: dict[str, int], recorded_draws: int
) -> None:
    """Compares the shares of the values that are frequent enough for a standard error to mean anything."""
    values, numbers = counts.unique(return_counts=True)
    ours = dict(zip(values.tolist(), numbers.tolist(), strict=True))
    theirs = {int(value): number for value, number in histogram.items()}
    pooled = {value: ours.get(value, 0) + theirs.get(value, 0) for value in ours.keys() | theirs.keys()}
    frequent = [v for v, number in pooled.items() if number * len(counts) / (len(counts) + recorded_draws) >= 10]
    for value in sorted(frequent):
        comparison.share(f"{label} {value}", counts == value, theirs.get(value, 0) / recorded_draws, recorded_draws)
    rare = ~torch.isin(counts, torch.tensor(frequent))
    rare_share = sum(number for value, number in theirs.items() if value not in frequent) / recorded_draws
    comparison.share(f"{label} any rarer number", rare, rare_share, recorded_draws)


def replay_collate(recording: Recording, comparison: Comparison) -> None:
    for case in recording.json["cases"]:
        generator = _collate_generator(case)
        samples = _samples(recording, case)
        for seed in recording.json["seeds"]:
            prefix = f"{case['name']}.seed{seed}."
            batch = collate_data_and_cast(
                samples,
                mask_ratio_tuple=tuple(case["mask_ratio_tuple"]),
                mask_probability=case["mask_probability"],
                dtype=recording.tensors[f"{prefix}collated_global_crops"].dtype,
                n_tokens=generator.height * generator.width,
                mask_generator=generator,
                rng=random.Random(seed),
            )
            ours = {
                "collated_global_crops": batch.global_crops,
                "collated_local_crops": batch.local_crops,
                "collated_masks": batch.masks,
                "mask_indices_list": batch.mask_index,
                "upperbound": torch.tensor(batch.upperbound),
                "n_masked_patches": torch.tensor([len(batch.mask_index)]),
            }
            for key, value in ours.items():
                comparison.exact(prefix + key, value, recording.tensors[prefix + key])
            comparison.tensor(f"{prefix}masks_weight", batch.mask_weight, tolerance=1e-6)
        _compare_collate_statistics(comparison, case, generator)


def _collate_generator(case: dict[str, Any]) -> MaskingGenerator:
    side = case["img"] // case["patch"]
    return MaskingGenerator((side, side), max_num_patches=published_max_num_patches(case["img"], case["patch"]))


def _samples(recording: Recording, case: dict[str, Any]) -> list[MultiCrop]:
    samples = []
    for index in range(case["batch_images"]):
        prefix = f"{case['name']}.sample{index}."
        first, second = recording.input(f"{prefix}global")
        samples.append(MultiCrop((first, second), tuple(recording.input(f"{prefix}local"))))
    return samples


def _compare_collate_statistics(comparison: Comparison, case: dict[str, Any], generator: MaskingGenerator) -> None:
    name, rows, recorded_draws = case["name"], case["mask_rows"], case["draws"]
    n_tokens = generator.height * generator.width
    rng = random.Random(STATISTICS_SEED)
    masks, bounds = [], set()
    for _ in range(min(recorded_draws, MAX_DRAWS)):
        drawn, bound = draw_masks(
            rows,
            tuple(case["mask_ratio_tuple"]),
            case["mask_probability"],
            n_tokens=n_tokens,
            mask_generator=generator,
            rng=rng,
        )
        masks.append(drawn)
        bounds.add(bound)
    per_row = torch.stack(masks).sum(-1)
    total = per_row.sum(1)
    comparison.exact(f"{name}: upper bounds", sorted(bounds), sorted(case["upperbound_values"]))
    masked_rows = (per_row > 0).sum(1)
    comparison.exact(f"{name}: masked rows", int(masked_rows.max()), case["n_samples_masked"])
    _compare_histogram(comparison, f"{name}: masked rows", masked_rows, case["n_rows_with_any_mask"], recorded_draws)
    _compare_total(comparison, case, total, rows * n_tokens, case["n_samples_masked"] * n_tokens)
    ordered = per_row.sort(dim=1).values
    spreads = case["sorted_row_counts_std"]
    for row, (mean, std) in enumerate(zip(case["sorted_row_counts_mean"], spreads, strict=True)):
        comparison.mean(f"{name}: masked patches of sorted row {row}", ordered[:, row], mean, std, recorded_draws)
        comparison.spread(f"{name}: their spread, row {row}", ordered[:, row], std, recorded_draws)
    frequency = torch.tensor(case["row_masked_frequency"])
    comparison.shares(f"{name}: row is masked", per_row > 0, frequency, recorded_draws)
    # Every masked row has weights that add up to 1.
    weight = case["masks_weight_sum"]
    comparison.mean(f"{name}: sum of weights", masked_rows, weight["mean"], weight["std"], recorded_draws)
    comparison.leave_out("spread of the weights' sum: rounding errors and rare events", count=1)


def _compare_total(comparison: Comparison, case: dict[str, Any], total: Tensor, cells: int, masked_cells: int) -> None:
    name, draws, recorded = case["name"], case["draws"], case["total_masked"]
    comparison.mean(f"{name}: masked patches", total, recorded["mean"], recorded["std"], draws)
    comparison.spread(f"{name}: their spread", total, recorded["std"], draws)
    comparison.leave_out(EXTREMES, count=2)
    for key, size in (("overall_masked_ratio", cells), ("masked_ratio_among_masked", masked_cells)):
        comparison.mean(f"{name}: {key}", total / size, case[key], recorded["std"] / size, draws)
