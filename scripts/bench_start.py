"""Time that commands take before they do anything, against `import torch`; prints JSON.

    OMP_NUM_THREADS=1 python scripts/bench_start.py --images FOLDER [--rounds 5]

`ratio` is [median, least, most] over the rounds of the CPU seconds of a command / those of `import torch` in the same
round. The commands: `--help` of the training; its dry run with the images in a folder, and with the embedded ones.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # run by path from a clone: make the package importable

import torch

from scripts.side_by_side import cpu_seconds, hardware, ratios, spread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of images to check in a dry run")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    train = [sys.executable, str(ROOT / "dinov2/train/train.py")]
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as out:
        dry = [*train, "--dry-run", "--output-dir", out, "--config-file"]
        commands = {
            "import torch": [sys.executable, "-c", "import torch"],
            "--help": [*train, "--help"],
            "dry run, images": [*dry, "train/vitl16_short", f"train.dataset_path=ImageFolder:root={args.images}"],
            "dry run, quickstart": [*dry, "train/quickstart"],
        }
        for number in range(args.rounds):
            for name in sorted(commands, reverse=bool(number % 2)):
                seconds.setdefault(name, []).append(cpu_seconds(commands[name])[0])
    record = {
        "cpu_seconds": {name: spread(values) for name, values in seconds.items()},
        "ratio": {name: ratios(values, seconds["import torch"]) for name, values in seconds.items()},
        **hardware(torch.device("cpu")),
    }
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
