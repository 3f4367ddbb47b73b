"""Time of a step of two students that share a teacher, against two distillations; prints JSON.

    OMP_NUM_THREADS=1 python scripts/bench_students.py [--steps 2 12] [--rounds 3] [--batch-size 8]

Whole commands on a CPU: one job of two processes with a student each, and the same students in a job of one process
each. Each is run for a small and for a larger number of steps; the difference is what the further steps cost, crops
included. The teacher is an untrained ViT-S/14, the students have half and a third of its width; crops are of 112 and 56
pixels.

`ratio` is [median, least, most] over the rounds of the CPU seconds per step together / apart; `operations` is the same
ratio by the count of the dry run.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # run by path from a clone: make the package importable

import torch

from dinov2.train.preflight.flops import step_flops
from dinov2.train.stages.choice import build_arch
from dinov2.train.stages.several_students import planned_runs
from scripts.bench_training import PARTS, cpu_seconds
from scripts.side_by_side import hardware, ratios, spread

STUDENTS = {"half": (192, 6), "third": (128, 4)}  # width and number of heads


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs=2, default=[2, 12], metavar="N", help="steps of the two runs")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--depth", type=int, default=12, help="of all networks")
    return parser


def write_recipes(folder: Path, depth: int) -> None:
    """Recipes of the teacher, of each student, and of both students."""
    common = (
        "train: {dataset_path: 'FashionMNIST:split=VAL', num_workers: 0, checkpoint_period: 1000}\n"
        "optim: {epochs: 1, warmup_epochs: 0, freeze_last_layer_epochs: 0}\n"
        "teacher: {warmup_teacher_temp_epochs: 0}\ncrops: {global_crops_size: 112, local_crops_size: 56}\n"
        "health: {period: 0}\nevaluation: {eval_period_iterations: 0}\ndino: {head_n_prototypes: 1024}\n"
    )
    for name, (width, heads) in {"teacher": (384, 6), **STUDENTS}.items():
        student = f"patch_size: 14, drop_path_rate: 0.0, depth: {depth}, embed_dim: {width}, num_heads: {heads}"
        (folder / f"{name}.yaml").write_text(f"{common}student: {{arch: vit_small, {student}}}\n")
    listed = ", ".join(str(folder / f"{name}.yaml") for name in STUDENTS)
    (folder / "both.yaml").write_text(f"distillation: {{students: [{listed}]}}\n")


def command(folder: Path, recipe: str, processes: int, *words: str) -> list[str]:
    return [
        *(sys.executable, str(ROOT / "dinov2/run/train/train.py"), "--launcher", "local", "--ngpus", "0"),
        *("--tasks-per-node", str(processes), "--config-file", str(folder / f"{recipe}.yaml")),
        *("--output-dir", str(folder / "out" / recipe)),
        *(f"compute_precision.{part}.mixed_precision.param_dtype=fp32" for part in PARTS),
        *words,
    ]


def operations(folder: Path, words: Sequence[str], batch_size: int) -> float:
    """FLOPs of a step together / apart."""
    both = argparse.Namespace(config_file=str(folder / "both.yaml"), output_dir="", opts=list(words))
    both.opts.append(f"distillation.global_batch_size={batch_size}")
    together = apart = 0.0
    for run in planned_runs(both, len(STUDENTS)):
        model = build_arch(run.cfg, among_students=True)
        together += step_flops(run.cfg, model, share_of_job=1 / len(STUDENTS)).total
        apart += step_flops(run.cfg, model).total
    return together / apart


def main(args: argparse.Namespace) -> None:
    few, many = args.steps
    seconds: dict[str, list[float]] = {"together": [], "apart": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_recipes(folder, args.depth)
        cpu_seconds(command(folder, "teacher", 1, "train.OFFICIAL_EPOCH_LENGTH=1", "train.batch_size_per_gpu=2"))
        teacher = (folder / "out" / "teacher").rename(folder / "teacher_run")
        learns = [f"distillation.teacher={teacher}"]
        for number in range(args.rounds):
            for side in sorted(seconds, reverse=bool(number % 2)):
                total = {}
                for steps in args.steps:
                    words = [*learns, f"train.OFFICIAL_EPOCH_LENGTH={steps}"]
                    if side == "together":
                        words.append(f"distillation.global_batch_size={args.batch_size}")
                        commands = [command(folder, "both", len(STUDENTS), *words)]
                    else:
                        words.append(f"train.batch_size_per_gpu={args.batch_size}")
                        commands = [command(folder, student, 1, *words) for student in STUDENTS]
                    total[steps] = sum(cpu_seconds(each)[0] for each in commands)
                    shutil.rmtree(folder / "out")
                seconds[side].append((total[many] - total[few]) / (many - few))
        predicted = operations(folder, learns, args.batch_size)
    record = {"settings": vars(args), "operations": predicted}
    record |= {"cpu_seconds_per_step": {side: spread(values) for side, values in seconds.items()}}
    record |= {"ratio": ratios(seconds["together"], seconds["apart"])}
    print(json.dumps(record | hardware(torch.device("cpu")), indent=2))


if __name__ == "__main__":
    main(get_args_parser().parse_args())
