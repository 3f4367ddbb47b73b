"""Finds the recorded sets of a folder, replays each, and reports. ``REPLAYS`` names the replay of each set."""

import argparse
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from scripts.golden.a_backbone import replay_backbone, replay_block, replay_posembed
from scripts.golden.b_heads import replay_heads
from scripts.golden.c_losses import replay_losses
from scripts.golden.comparison import Comparison
from scripts.golden.d_optim import replay_param_groups, replay_schedules
from scripts.golden.e_masks import replay_collate, replay_masking
from scripts.golden.f_train import replay_batches, replay_training
from scripts.golden.g_eval import replay_knn, replay_linear, replay_log_regression, replay_metrics
from scripts.golden.h_samplers import replay_samplers
from scripts.golden.i_augment import replay_augment
from scripts.golden.j_names import replay_names
from scripts.golden.k_depth import replay_depth_heads, replay_depth_names, replay_depthers
from scripts.golden.l_seg_models import replay_segmentation_head, replay_segmentation_inference
from scripts.golden.l_segmentation_scores import replay_segmentation_scores
from scripts.golden.m_depth import replay_depth_losses, replay_depth_metrics
from scripts.golden.n_gram import replay_gram_loss
from scripts.golden.o_retrieval import replay_retrieval
from scripts.golden.p_tracking import replay_davis_metrics, replay_propagation
from scripts.golden.q_patch_probes import replay_patch_probes
from scripts.golden.recording import Recording

REPLAYS: dict[str, Callable[[Recording, Comparison], None]] = {
    "a_backbone": replay_backbone,
    "a_posembed_interp": replay_posembed,
    "a_block_stochastic_depth": replay_block,
    "b_dino_head": replay_heads,
    "c_losses": replay_losses,
    "d_schedules": replay_schedules,
    "d_param_groups": replay_param_groups,
    "e_masking": replay_masking,
    "e_collate": replay_collate,
    "f_train_batches": replay_batches,
    "f_train": replay_training,
    "g_knn": replay_knn,
    "g_linear": replay_linear,
    "g_logreg": replay_log_regression,
    "g_metrics": replay_metrics,
    "h_samplers": replay_samplers,
    "i_augment": replay_augment,
    "j_state_dicts": replay_names,
    "k_depth_heads": replay_depth_heads,
    "k_depthers": replay_depthers,
    "k_depth_state_dicts": replay_depth_names,
    "l_seg_linear_head": replay_segmentation_head,
    "l_seg_inference": replay_segmentation_inference,
    "l_miou": replay_segmentation_scores,
    "m_depth_losses": replay_depth_losses,
    "m_depth_metrics": replay_depth_metrics,
    "n_gram_loss": replay_gram_loss,
    "o_retrieval": replay_retrieval,
    "p_davis_metrics": replay_davis_metrics,
    "p_propagation": replay_propagation,
    "q_patch_probes": replay_patch_probes,
}

FAILURES_SHOWN = 5
COLUMNS = "{:<34} {:>6} {:>9} {:>9}  {:<26} {}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with ``argv``, or the arguments of this process; returns the exit status."""
    args = get_args_parser().parse_args(argv)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # also in the processes that replays start
    logging.disable(logging.WARNING)  # recorded configurations set keys that have no effect, which is logged
    return 0 if check_folder(args.folder, only=args.only, verbose=args.verbose) else 1


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("check_golden", description="Replay recorded golden sets against this code.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of recorded sets")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="replay only these files (names without suffix)")
    parser.add_argument("--verbose", action="store_true", help="print every comparison")
    return parser


def check_folder(folder: Path, *, only: Sequence[str] | None = None, verbose: bool = False) -> bool:
    """Replays the recorded sets of a folder, or those named in ``only``; returns whether there are any and all are ok.

    A JSON file that has neither the key ``set`` nor tensors beside it describes other files and is no set.
    """
    if not folder.is_dir():
        sys.exit(f"no folder at {folder}")
    stems = sorted({path.stem for suffix in ("json", "safetensors") for path in folder.glob(f"*.{suffix}")})
    paths = {stem: folder / f"{stem}.json" for stem in stems if not _only_tells(folder / f"{stem}.json")}
    if not paths:
        sys.exit(f"no recordings in {folder}")
    unknown = set(only or []) - set(paths)
    if unknown:
        sys.exit(f"no set {', '.join(sorted(unknown))} in {folder}; known: {', '.join(paths)}")
    print(COLUMNS.format("set", "cases", "max abs", "max rel", "tolerance", "result"))
    results = [check(path, verbose=verbose) for name, path in paths.items() if only is None or name in only]
    print(f"{sum(results)} of {len(results)} sets ok")
    return bool(results) and all(results)


def _only_tells(path: Path) -> bool:
    if not path.exists() or path.with_suffix(".safetensors").exists():
        return False
    try:
        return "set" not in json.loads(path.read_text())
    except ValueError:
        return False  # unknown: its line will report that it cannot be read


def check(path: Path, *, verbose: bool = False) -> bool:
    """Replays one set, prints its line, and what is off below it; returns whether it is ok."""
    start = time.monotonic()
    try:
        comparison = Comparison(Recording(path), verbose=verbose)
    except Exception as error:  # missing, damaged, or of another kind than its name; the other sets are to be replayed
        print(f"{path.stem}: NOT OK, cannot be read: {error}", flush=True)
        return False
    _replay(comparison)
    print(_line(comparison, time.monotonic() - start), flush=True)
    shown = comparison.failures if verbose else comparison.failures[:FAILURES_SHOWN]
    for failure in shown:
        print(f"    {failure}")
    if len(comparison.failures) > len(shown):
        print(f"    and {len(comparison.failures) - len(shown)} more (--verbose shows all)")
    return comparison.ok


def _replay(comparison: Comparison) -> None:
    recording = comparison.recording
    kind = recording.json.get("set")
    if kind not in REPLAYS:
        comparison.fail(f"unknown set {kind!r}; known: {', '.join(REPLAYS)}")
        return
    try:
        REPLAYS[kind](recording, comparison)
        comparison.finish()
    except Exception as error:  # whatever it is, the other sets are to be replayed
        comparison.fail(f"{type(error).__name__}: {error}")
        if comparison.verbose:
            traceback.print_exc()


def _line(comparison: Comparison, seconds: float) -> str:
    tolerance = comparison.tolerance_text()
    result = f"{'ok' if comparison.ok else 'NOT OK'} ({seconds:.1f} s)"
    for reason, count in comparison.left_out.items():
        result += f"; {count} not compared: {reason}"
    return COLUMNS.format(
        comparison.recording.name,
        comparison.cases,
        f"{comparison.worst_abs:.1e}",
        f"{comparison.worst_rel:.1e}",
        tolerance,
        result,
    )
