"""Train a small backbone under `torch.compile` as one graph on the stub device, and print what it waited for, as JSON.

compile_backbone.py DROP_PATH_RATE BACKEND
"""

import json
import sys

import rehearsal
import torch

from dinov2.models.vision_transformer import DinoVisionTransformer


def main() -> None:
    rate, backend = float(sys.argv[1]), sys.argv[2]
    with torch.device("cuda"):
        model = DinoVisionTransformer(
            img_size=32, embed_dim=128, depth=2, num_heads=2, drop_path_rate=rate, init_values=1e-5
        ).train()
        large, small = torch.zeros(8, 3, 32, 32), torch.zeros(4, 3, 16, 16)
    compiled = torch.compile(model, fullgraph=True, backend=backend)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            one = compiled(large)
            two = compiled([large, small], masks=[None, None], is_training=True)
        (one.sum() + sum(output["x_norm_clstoken"].sum() for output in two)).backward()

    step()  # compiles
    rehearsal.reset()
    torch.cuda.set_sync_debug_mode("error")
    step()
    torch.cuda.set_sync_debug_mode("default")
    print(json.dumps(rehearsal.counters()))


if __name__ == "__main__":
    main()
