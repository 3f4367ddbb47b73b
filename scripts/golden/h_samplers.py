"""Set h: the order in which the samplers of the released code deal out indices."""

from itertools import islice
from typing import Any

from torch.utils.data import Sampler

from dinov2.data.samplers import EpochSampler, InfiniteSampler, ShardedInfiniteSampler
from scripts.golden.comparison import Comparison
from scripts.golden.recording import Recording


def replay_samplers(recording: Recording, comparison: Comparison) -> None:
    for kind, cases in recording.json["samplers"].items():
        for case in cases:
            options = {key: value for key, value in case.items() if key != "indices"}
            sampler = _sampler(kind, case)
            comparison.exact(f"{kind} {options}", list(islice(sampler, len(case["indices"]))), case["indices"])
            if isinstance(sampler, EpochSampler):
                comparison.exact(f"{kind} {options}: length", len(sampler), case["length"])


def _sampler(kind: str, case: dict[str, Any]) -> Sampler[int]:
    common = {
        "sample_count": case["sample_count"],
        "shuffle": case["shuffle"],
        "seed": case["seed"],
        "start": case["rank"],
        "step": case["world"],
    }
    match kind:
        case "INFINITE":
            return InfiniteSampler(**common, advance=case["advance"])
        case "SHARDED_INFINITE" | "SHARDED_INFINITE_NEW":
            at_once = kind == "SHARDED_INFINITE_NEW"
            return ShardedInfiniteSampler(**common, advance=case["advance"], use_new_shuffle_tensor_slice=at_once)
        case "EPOCH":
            sampler = EpochSampler(size=case["size"], **common)
            sampler.set_epoch(case["epoch"])
            return sampler
    raise ValueError(f"unknown sampler {kind!r}; known: INFINITE, SHARDED_INFINITE, SHARDED_INFINITE_NEW, EPOCH")
