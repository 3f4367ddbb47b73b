"""Time of a training step in whole training commands: ours against lightly-train's DINOv2; prints JSON.

    python scripts/bench_training.py --images FOLDER [--peer-python PYTHON] [--steps 2 10] [--rounds 3] [--drop-path 0]

Each side trains ViT-S/14 from scratch on a CPU, with 2 x 224 + 8 x 98 crops, 65,536 prototypes and the defaults of its
package otherwise, once for a small and once for a larger number of steps. The difference of the two runs is what the
further steps cost, crops included, without imports, models and checkpoints. lightly-train is called by its
documented function; --peer-python is the interpreter of an environment that has it.

`ratio` is [median, least, most] over the rounds of our CPU seconds per step / the peer's in the same round: below 1 we
are faster. Set OMP_NUM_THREADS to the number of cores and OMP_WAIT_POLICY=PASSIVE, so that no thread waits in a loop.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # run by path from a clone: make the package importable

import torch

from scripts.side_by_side import cpu_seconds, hardware, ratios, spread

PEER = """
import sys
from lightly_train import __version__, pretrain
data, out, batch_size, precision, drop_path = sys.argv[1:]
if __name__ == "__main__":
    pretrain(
        out=out, data=data, model="dinov2/vits14-notpretrained", method="dinov2", epochs=1, overwrite=True,
        batch_size=int(batch_size), num_workers=0, accelerator="cpu", precision=precision,
        model_args={"drop_path_rate": float(drop_path)}, loggers={"tensorboard": None},
        callbacks={"model_checkpoint": None}, transform_args={"local_view": {"num_views": 8, "view_size": (98, 98)}},
    )
    print("lightly-train", __version__)
"""
PARTS = [f"{network}.{part}" for network in ("student", "teacher") for part in ("backbone", "dino_head", "ibot_head")]
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed"}  # lightly-train's names


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder with at least steps x batch size images")
    parser.add_argument("--peer-python", help="interpreter with lightly-train; without it, our side only")
    parser.add_argument("--steps", type=int, nargs=2, default=[2, 10], metavar="N", help="steps of the two runs")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--drop-path", type=float, default=0.0, help="rate of stochastic depth of both sides")
    parser.add_argument("--precision", choices=sorted(PRECISIONS), default="fp32", help="of both sides")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("opts", nargs="*", help="key=value of our side's config")
    return parser


def ours(data: Path, out: Path, steps: int, args: argparse.Namespace) -> list[str]:
    """Command that trains with this package, as published but for the sizes."""
    return [
        *(sys.executable, str(ROOT / "dinov2/train/train.py"), "--output-dir", str(out)),
        *("--config-file", str(ROOT / "dinov2/configs/ssl_default_config.yaml")),
        *(f"train.dataset_path=ImageList:file={data}/list.txt", "student.arch=vit_small", "student.patch_size=14"),
        *(f"train.batch_size_per_gpu={args.batch_size}", f"train.OFFICIAL_EPOCH_LENGTH={steps}", "optim.epochs=1"),
        *("optim.warmup_epochs=0", "teacher.warmup_teacher_temp_epochs=0", "optim.freeze_last_layer_epochs=0"),
        *(f"student.drop_path_rate={args.drop_path}", "crops.local_crops_size=98", "train.num_workers=0"),
        *("health.period=0", "evaluation.eval_period_iterations=0", "train.checkpoint_period=1000"),
        *(f"compute_precision.{part}.mixed_precision.param_dtype={args.precision}" for part in PARTS),
        *args.opts,
    ]


def peer(data: Path, out: Path, args: argparse.Namespace) -> list[str]:
    """Command that trains with lightly-train."""
    words = (str(data / "images"), str(out), str(args.batch_size), PRECISIONS[args.precision], str(args.drop_path))
    return [args.peer_python, "-c", PEER, *words]


def link_images(source: Path, folder: Path, count: int) -> None:
    """Make a folder with links to `count` images, and their list."""
    images = sorted(path for path in source.rglob("*") if path.is_file())[:count]
    if len(images) < count:
        raise SystemExit(f"--images: {source} has {len(images)} files; this many steps take {count}")
    (folder / "images").mkdir(parents=True)
    for image in images:
        (folder / "images" / image.name).symlink_to(image.resolve())
    (folder / "list.txt").write_text("".join(f"{image.resolve()}\n" for image in images))


def main(args: argparse.Namespace) -> None:
    few, many = args.steps
    seconds: dict[str, list[float]] = {"ours": [], "peer": []} if args.peer_python else {"ours": []}
    version = None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for steps in args.steps:
            link_images(args.images, folder / str(steps), steps * args.batch_size)
        for number in range(args.rounds):
            for side in sorted(seconds, reverse=bool(number % 2)):
                total = {}
                for steps in args.steps:
                    data, out = folder / str(steps), folder / "out"
                    command = peer(data, out, args) if side == "peer" else ours(data, out, steps, args)
                    total[steps], printed = cpu_seconds(command)
                    version = printed.strip().splitlines()[-1] if side == "peer" else version
                    shutil.rmtree(out)
                seconds[side].append((total[many] - total[few]) / (many - few))
    record: dict[str, Any] = {"settings": {**vars(args), "images": str(args.images)}, "peer": version}
    record |= {"cpu_seconds_per_step": {side: spread(values) for side, values in seconds.items()}}
    record |= {"ratio": ratios(seconds["ours"], seconds["peer"])} if args.peer_python else {}
    print(json.dumps(record | hardware(torch.device("cpu")), indent=2))


if __name__ == "__main__":
    main(get_args_parser().parse_args())
