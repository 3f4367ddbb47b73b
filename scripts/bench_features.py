"""How fast are features? Our backbone against timm's and transformers' DINOv2, sides alternating; prints JSON.

    python scripts/bench_features.py [--arch vit_small] [--size 224] [--batch-size 32] [--repeats 5]

All three are the same network with random weights, in evaluation mode without gradients, and give the class token.
`ratio` is the peer's time over ours: above 1 we are faster. Needs timm and transformers.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run by path from a clone: make the package importable

import torch
from torch import Tensor

from dinov2.config import DTYPES
from dinov2.models import build_model

Extract = Callable[[Tensor], Tensor]  # (B, 3, H, W) -> (B, D)


def ours(arch: str, size: int) -> torch.nn.Module:
    return build_model(arch, img_size=size, patch_size=14, init_values=1.0)


def timms(arch: str, size: int) -> torch.nn.Module:
    import timm

    name = {"vit_giant2": "giant"}.get(arch, arch.removeprefix("vit_"))
    return timm.create_model(f"vit_{name}_patch14_dinov2", pretrained=False, img_size=size, num_classes=0)


def transformers_(arch: str, size: int) -> torch.nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    backbone = build_model(arch, img_size=size, patch_size=14)
    return Dinov2Model(
        Dinov2Config(
            hidden_size=backbone.embed_dim,
            num_hidden_layers=backbone.n_blocks,
            num_attention_heads=backbone.num_heads,
            image_size=size,
            patch_size=14,
            use_swiglu_ffn=arch == "vit_giant2",
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="feature extraction against timm and transformers")
    parser.add_argument("--arch", default="vit_small", choices=("vit_small", "vit_base", "vit_large", "vit_giant2"))
    parser.add_argument("--size", type=int, default=224, help="pixels, a multiple of 14")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--precision", choices=sorted(DTYPES), default="fp32", help="by autocast")
    parser.add_argument("--repeats", type=int, default=5, help="timed batches of each side, after one warm-up")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = torch.randn(args.batch_size, 3, args.size, args.size, device=device)
    models = {
        name: build(args.arch, args.size).to(device).eval()
        for name, build in (("ours", ours), ("timm", timms), ("transformers", transformers_))
    }
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    dtype = DTYPES[args.precision]
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(args.repeats + 1):
        for name, model in models.items():
            with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                started = time.perf_counter()
                model(images)
                if device.type == "cuda":
                    torch.cuda.synchronize()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    record = {
        "arch": args.arch,
        "size": args.size,
        "batch_size": args.batch_size,
        "precision": args.precision,
        "parameters": counts,
        "images_per_s": {name: round(args.batch_size / median, 2) for name, median in medians.items()},
        "ratio": {
            name: round(statistics.median(p / o for p, o in zip(seconds[name], seconds["ours"], strict=True)), 3)
            for name in ("timm", "transformers")
        },
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }
    sys.stdout.write(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
