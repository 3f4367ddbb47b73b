"""Benchmark of feature extraction against DINOv2 of timm and transformers, sides alternating; prints JSON.

    python scripts/bench_features.py [--arch vit_small] [--size 224] [--batch-size 32] [--precision fp32] [--rounds 7]

All are the same network with random weights, in evaluation mode without gradients, and give the class tokens of one
batch; `ours` as the evaluations compute them, on a CPU a few images at a time. To separate this effect, it is also
timed in one pass and the others in the same slices. `ratio` is [median, least, most] over the rounds of a side's time /
ours in the same round: above 1 we are faster; `ratio_of_work` is the same of CPU seconds, which other programs disturb
less (with OMP_NUM_THREADS=1; a GPU makes them meaningless). Of timm and transformers, what is missing is in `not_run`.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run by path from a clone: make the package importable

import torch
from torch import Tensor

from dinov2.config import DTYPES
from dinov2.eval.features import run_model
from dinov2.models import build_model
from scripts.side_by_side import alternate, hardware, ratios


def ours(arch: str, size: int) -> torch.nn.Module:
    return build_model(arch, img_size=size, patch_size=14, init_values=1.0)


def timms(arch: str, size: int) -> torch.nn.Module:
    import timm

    name = {"vit_giant2": "giant"}.get(arch, arch.removeprefix("vit_"))
    return timm.create_model(f"vit_{name}_patch14_dinov2", pretrained=False, img_size=size, num_classes=0)


class Transformers(torch.nn.Module):
    def __init__(self, arch: str, size: int) -> None:
        from transformers import Dinov2Config, Dinov2Model

        super().__init__()
        backbone = build_model(arch, img_size=size, patch_size=14)
        self.model = Dinov2Model(
            Dinov2Config(
                hidden_size=backbone.embed_dim,
                num_hidden_layers=backbone.n_blocks,
                num_attention_heads=backbone.num_heads,
                image_size=size,
                patch_size=14,
                use_swiglu_ffn=arch == "vit_giant2",
            )
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).pooler_output


def main() -> None:
    parser = argparse.ArgumentParser(description="feature extraction against timm and transformers")
    parser.add_argument("--arch", default="vit_small", choices=("vit_small", "vit_base", "vit_large", "vit_giant2"))
    parser.add_argument("--size", type=int, default=224, help="pixels, a multiple of 14")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--precision", choices=sorted(DTYPES), default="fp32", help="of all sides, by autocast")
    parser.add_argument("--rounds", type=int, default=7, help="each times every side once, after one of warm-up")
    args = parser.parse_args()
    device, dtype = torch.device("cuda" if torch.cuda.is_available() else "cpu"), DTYPES[args.precision]
    images = torch.randn(args.batch_size, 3, args.size, args.size, device=device)
    models, not_run = {"ours": ours(args.arch, args.size).to(device).eval()}, {}
    for name, build in (("timm", timms), ("transformers", Transformers)):
        try:
            models[name] = build(args.arch, args.size).to(device).eval()
        except ModuleNotFoundError as error:
            not_run[name] = str(error)
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        "ours": partial(run_model, models["ours"]),
        **{name: model for name, model in models.items() if name != "ours"},
    }
    if device.type == "cpu":
        calls["ours, in one pass"] = models["ours"]
        calls |= {f"{name}, in slices": partial(run_model, models[name]) for name in models if name != "ours"}

    def extract(call: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return call(images)

    seconds = alternate({name: partial(extract, call) for name, call in calls.items()}, args.rounds, device)
    medians = {name: statistics.median(times) for name, times in seconds.wall.items()}
    record = {
        **vars(args),
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
        "images_per_s": {name: round(args.batch_size / median, 2) for name, median in medians.items()},
        **{
            key: {f"{name} / ours": ratios(times[name], times["ours"]) for name in calls if name != "ours"}
            for key, times in (("ratio", seconds.wall), ("ratio_of_work", seconds.work))
        },
        "not_run": not_run,
        **hardware(device),
    }
    sys.stdout.write(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
