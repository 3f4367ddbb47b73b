"""The FLOPs of a step by formula are those that PyTorch counts on the operators of a real step."""

import pytest
import torch
from tiny import SEPARATE_HEADS, all_in, tiny_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dinov2 import config
from dinov2.config import Config
from dinov2.data.collate import Batch
from dinov2.train.parallel import parallelize
from dinov2.train.preflight.flops import StepFlops, product_speed, step_flops
from dinov2.train.ssl_meta_arch import SSLMetaArch
from scripts.bench_step import make_batch

WITHOUT_KOLEO = "dino.koleo_loss_weight=0"  # its similarities are not counted


def on_meta(cfg: Config) -> SSLMetaArch:
    with torch.device("meta"):
        return SSLMetaArch(cfg)


def by_formula(flops: StepFlops) -> tuple[float, float, float]:
    return sum(flops.teacher), sum(flops.student), flops.backward + flops.recomputed


def counted(cfg: Config, batch: Batch) -> tuple[int, int, int]:
    """FLOPs of teacher, student, and backward pass with what is recomputed, by PyTorch's own counter."""
    model, how = SSLMetaArch(cfg).train(), cfg.train.activation_checkpointing
    parallelize(model.student, model.teacher, cfg.compute_precision, activation_checkpointing=how)
    with sdpa_kernel(SDPBackend.MATH):  # the counter does not know the fused kernel of a CPU
        with FlopCounterMode(display=False) as teacher:
            [targets] = model.targets([batch], 0.05)
        with FlopCounterMode(display=False) as student:
            losses, _ = model(batch, targets)
        with FlopCounterMode(display=False) as backward:
            losses.total.backward()
    return teacher.get_total_flops(), student.get_total_flops(), backward.get_total_flops()


VARIANTS: dict[str, list[str]] = {
    "as it is": [],
    "patches of 14": ["student.patch_size=14", "crops.global_crops_size=56", "crops.local_crops_size=28"],
    "registers": ["student.num_register_tokens=4"],
    "swiglu": ["student.ffn_layer=swiglufused"],
    "no feed-forward network": ["student.ffn_layer=identity"],
    "separate heads": SEPARATE_HEADS,
    "no stochastic depth": ["student.drop_path_rate=0"],
    "rising stochastic depth": ["student.depth=4", "student.drop_path_uniform=false", "student.drop_path_rate=0.6"],
    "other masks": ["ibot.mask_sample_probability=0.9", "ibot.mask_ratio_min_max=[0.4, 0.8]"],
    "no iBOT": ["ibot.loss_weight=0", "ibot.mask_sample_probability=0"],
    "no DINO": ["dino.loss_weight=0", *SEPARATE_HEADS],
    "no local crops": ["crops.local_crops_number=0"],
    "centering": ["train.centering=centering"],
    "selective checkpointing": ["train.activation_checkpointing=selective"],
    "full checkpointing": ["train.activation_checkpointing=full"],
}


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_pass_is_counted_exactly(overrides: list[str]) -> None:
    cfg = tiny_config(WITHOUT_KOLEO, *overrides)
    batch = make_batch(cfg)
    batch = batch._replace(upperbound=len(batch.mask_index))  # without padding
    assert by_formula(step_flops(cfg, on_meta(cfg), len(batch.mask_index))) == counted(cfg, batch)


def test_masks_and_their_padding_are_counted_within_a_percent() -> None:
    settings = ["student.embed_dim=192", "student.num_heads=3", "student.depth=2", "train.batch_size_per_gpu=16"]
    cfg = config.load(None, [*settings, "dino.head_n_prototypes=4096", *all_in("fp32")])
    assert by_formula(step_flops(cfg, on_meta(cfg))) == pytest.approx(counted(cfg, make_batch(cfg)), rel=0.01)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_fvcore_counts_the_same_forward_pass() -> None:
    from fvcore.nn import FlopCountAnalysis

    cfg = tiny_config("student.drop_path_rate=0", "crops.local_crops_number=0")
    model = SSLMetaArch(cfg).eval()
    crops = torch.zeros(2 * cfg.train.batch_size_per_gpu, 3, *[cfg.crops.global_crops_size] * 2)
    analysis = FlopCountAnalysis(model.teacher["backbone"], crops)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    counted = 2 * analysis.by_operator()["linear"] + 2 * analysis.by_operator()["conv"]
    flops = step_flops(cfg, on_meta(cfg), masked_patches=crops.shape[0] * 16).teacher
    assert counted == flops.linear + flops.patches


def test_a_step_has_the_flops_of_its_micro_batches() -> None:
    one, three = (tiny_config(f"train.accumulate_steps={steps}") for steps in (1, 3))
    expected = [3 * part for part in by_formula(step_flops(one, on_meta(one)))]
    assert by_formula(step_flops(three, on_meta(three))) == pytest.approx(expected)


def test_the_short_recipe() -> None:
    """In TFLOP for a step of 64 images: teacher, student, backward, heads, all."""
    cfg = config.load("train/vitl16_short")
    flops = step_flops(cfg, on_meta(cfg))
    parts = [part / 1e12 for part in (*by_formula(flops), flops.heads, flops.total)]
    assert parts == pytest.approx([15.58, 18.81, 37.55, 0.81, 71.95], abs=0.01)
    assert flops.model == flops.total
    cfg = config.load("train/vitl16_short", ["train.activation_checkpointing=full"])
    again = step_flops(cfg, on_meta(cfg))
    assert again.model == flops.model and again.recomputed / 1e12 == pytest.approx(18.53, abs=0.01)


def test_the_speed_of_a_product_is_measured() -> None:
    assert 1e8 < product_speed(torch.float32, torch.device("cpu"), side=128, repeats=2) < 1e14
