"""The predicted memory and traffic of a process are those of a naive count and of real processes."""

import dataclasses
import itertools
import json

import pytest
import torch
from tiny import CONFIG_FILE, SEPARATE_HEADS, all_in, run_script, tiny_config
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from dinov2 import config
from dinov2.config import Config
from dinov2.train.parallel import parallelize
from dinov2.train.preflight.memory import STRATEGIES, Estimate, estimate, saved_in_block, sharding_units
from dinov2.train.ssl_meta_arch import SSLMetaArch


def on_meta(cfg: Config) -> SSLMetaArch:
    with torch.device("meta"):
        return SSLMetaArch(cfg)


def predict(num_processes: int, *overrides: str, per_machine: int = 8) -> Estimate:
    cfg = tiny_config(*overrides)
    return estimate(cfg, on_meta(cfg), num_processes, per_machine)


def num_parameters(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())


def sharded(strategy: str) -> list[str]:
    places = itertools.product(("student", "teacher"), ("backbone", "dino_head", "ibot_head"))
    return [f"compute_precision.{side}.{name}.sharding_strategy={strategy}" for side, name in places]


def student_of(*overrides: str) -> nn.ModuleDict:
    return on_meta(tiny_config(*overrides)).student


def gathered_bytes(num_shards: int, module: nn.Module, itemsize: int) -> int:
    """Of weights that processes gather which hold shards as large as the first one's, naively."""
    return sum(param.chunk(num_shards)[0].numel() * num_shards for param in module.parameters()) * itemsize


def sent_in_ring(num_processes: int, whole: float) -> float:
    """By each process until all have seen a piece of everyone: one piece to the neighbor, again and again."""
    pieces = [{rank} for rank in range(num_processes)]
    sent = 0.0
    while any(len(seen) < num_processes for seen in pieces):
        pieces = [pieces[rank] | pieces[rank - 1] for rank in range(num_processes)]
        sent += whole / num_processes
    return sent


# --- State -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "num_shards"),
    [("NO_SHARD", 1), ("SHARD_GRAD_OP", 6), ("FULL_SHARD", 6), ("HYBRID_SHARD", 3), ("HYBRID_SHARD_ZERO2", 3)],
)
def test_a_process_holds_its_shards_five_times(strategy: str, num_shards: int) -> None:
    """Of weight, gradient, two moments, teacher; 6 processes on 2 machines, which do not divide the sizes."""
    parameters = list(student_of(*SEPARATE_HEADS).parameters())
    shards = sum(param.chunk(num_shards)[0].numel() for param in parameters)
    assert shards > num_parameters(student_of(*SEPARATE_HEADS)) / num_shards or num_shards == 1
    assert predict(6, *sharded(strategy), *SEPARATE_HEADS, per_machine=3).state == 5 * 4 * shards


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_process_shares_nothing(strategy: str) -> None:
    alone = predict(1, *sharded(strategy))
    assert alone.state == 20 * num_parameters(student_of())
    assert (alone.gathered, alone.reducing, alone.sent, alone.sent_by_machine) == (0, 0, 0, 0)


def test_autocast_of_one_process_makes_a_copy_of_the_student() -> None:
    assert predict(1, *all_in("bf16")).gathered == 2 * num_parameters(student_of())


# --- At the peak -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("chunks", "num_units"), [(0, 5), (1, 1), (2, 3), (5, 5)])
def test_units_are_blocks_or_several_and_the_rest(chunks: int, num_units: int) -> None:
    backbone = student_of("student.depth=5")["backbone"]
    names = {id(param): name for name, param in backbone.named_parameters()}
    rest, *blocks = [[names[id(param)] for param in unit] for unit in sharding_units(backbone, chunks)]
    assert not any("blocks" in name for name in rest) and "cls_token" in rest and "norm.weight" in rest
    assert sorted(rest + [name for block in blocks for name in block]) == sorted(names.values())
    numbers = [{int(name.split(".")[1]) for name in block} for block in blocks]
    assert len(numbers) == num_units and sum(map(len, numbers)) == 5, "no block in two units"


def test_student_weights_that_are_kept_add_up_and_others_do_not() -> None:
    student = student_of("student.depth=4")
    backbone = student["backbone"]
    block = gathered_bytes(3, backbone.blocks[0], 2)
    everything = sum(gathered_bytes(3, network, 2) for network in student.values())
    rest = gathered_bytes(3, backbone, 2) - 4 * block
    settings = ["student.depth=4", *all_in("bf16")]
    assert predict(3, *settings, *sharded("SHARD_GRAD_OP")).gathered == everything
    assert predict(3, *settings, *sharded("FULL_SHARD")).gathered == rest + 2 * block
    in_halves = predict(3, *settings, *sharded("FULL_SHARD"), "student.block_chunks=2")
    assert in_halves.gathered == rest + 4 * block


def test_the_gradients_of_one_unit_are_reduced_and_each_network_keeps_a_buffer() -> None:
    student = student_of()
    block, head = num_parameters(student["backbone"].blocks[0]), num_parameters(student["dino_head"])
    assert block > head
    reduced = [f"compute_precision.student.{name}.mixed_precision.reduce_dtype=fp32" for name in student]
    assert predict(2, *all_in("bf16"), *reduced).reducing == 2 * block + 4 * (block + head)


def test_replicas_that_free_weights_keep_the_buffers_of_their_sums() -> None:
    """If these are not the gradients themselves: those of another micro-batch, or in another precision."""

    def reducing(num_processes: int, *settings: str) -> float:
        return predict(num_processes, *sharded("HYBRID_SHARD"), *settings, per_machine=3).reducing

    accumulating = "train.accumulate_steps=2"
    shards = sum(gathered_bytes(3, network, 4) for network in student_of().values()) / 3
    assert reducing(6, accumulating) == reducing(3, accumulating) + shards
    assert reducing(6) == reducing(3) == reducing(3, accumulating)


# --- Sent ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("strategy", "gathers"), [("SHARD_GRAD_OP", 2), ("FULL_SHARD", 3)])
def test_sent_in_a_ring_of_all_processes(strategy: str, gathers: int) -> None:
    """Weights of teacher and student, the latter once or twice; gradients, which need as many bytes as weights here."""
    weights = sum(gathered_bytes(6, network, 4) for network in student_of().values())
    costs = predict(6, *sharded(strategy), per_machine=3)
    assert costs.sent == costs.sent_by_machine == pytest.approx((gathers + 1) * sent_in_ring(6, weights))
    assert predict(6, *sharded(strategy), per_machine=6).sent_by_machine == 0


@pytest.mark.parametrize(("strategy", "gathers"), [("HYBRID_SHARD_ZERO2", 2), ("HYBRID_SHARD", 3)])
def test_only_gradients_leave_a_machine_that_shares_among_its_processes(strategy: str, gathers: int) -> None:
    weights = sum(gathered_bytes(3, network, 4) for network in student_of().values())
    costs = predict(12, *sharded(strategy), per_machine=3)
    everywhere = 2 * sent_in_ring(4, weights / 3)  # to sum it to pieces and to gather these
    assert costs.sent == pytest.approx((gathers + 1) * sent_in_ring(3, weights) + everywhere)
    assert costs.sent_by_machine == pytest.approx(3 * everywhere)
    assert costs.sent_by_machine < predict(12, *sharded("SHARD_GRAD_OP"), per_machine=3).sent_by_machine


def test_whole_copies_send_gradients_only() -> None:
    costs = predict(6, *sharded("NO_SHARD"), per_machine=3)
    assert costs.sent == costs.sent_by_machine == pytest.approx(2 * sent_in_ring(6, 4 * num_parameters(student_of())))


def test_micro_batches_send_each_for_itself_and_hold_no_more_than_their_targets() -> None:
    one, three = predict(4), predict(4, "train.accumulate_steps=3")
    assert three.sent == 3 * one.sent and three.sent_by_machine == 3 * one.sent_by_machine
    targets = three.activations - one.activations
    rows = 4 * 2 * (1 + 0.5 * 16 * 0.3)  # of 4 images with 2 crops: class tokens; half of the crops have masks
    assert targets == pytest.approx(2 * rows * 16 * 4)
    assert (one.gradients, three.gradients) == (one.state / 5, 0), "those of the first batches are there already"
    assert dataclasses.replace(three, activations=0, gradients=0, sent=0, sent_by_machine=0) == dataclasses.replace(
        one, activations=0, gradients=0, sent=0, sent_by_machine=0
    )


# --- Activations -----------------------------------------------------------------------------------------------------


def saved_per_block(depth: int, checkpointing: str) -> float:
    """Bytes that autograd keeps for the backbone's backward pass, without parameters."""
    cfg = tiny_config(f"student.depth={depth}", "student.drop_path_rate=0")
    model = SSLMetaArch(cfg).train()
    parallelize(model.student, model.teacher, cfg.compute_precision, activation_checkpointing=checkpointing)  # type: ignore[arg-type]
    storages = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no other gets its place
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        crops = [torch.randn(8, 3, 28, 28), torch.randn(12, 3, 14, 14)]
        features = model.student["backbone"](crops, [None, None], is_training=True)
    parameters = {param.untyped_storage().data_ptr() for param in model.parameters()}
    assert features
    return sum(t.untyped_storage().nbytes() for place, t in storages.items() if place not in parameters)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_block_keeps_about_what_is_estimated(checkpointing: str) -> None:
    """In float32, which is the same on all devices; half precision on CUDA is tested in tests/cuda."""
    tokens = 8 * 17 + 12 * 5
    per_block = (saved_per_block(5, checkpointing) - saved_per_block(2, checkpointing)) / 3
    estimated = sum(saved_in_block(student_of()["backbone"].blocks[0], 4, 0.0, checkpointing))
    assert estimated == 4 * 32 * {"none": 18, "full": 1}[checkpointing]
    assert per_block / tokens == pytest.approx(estimated, rel=0.15)


def test_activations_grow_with_what_costs_and_shrink_by_computing_twice() -> None:
    usual = predict(1).activations
    for change in ("student.depth=3", "crops.local_crops_number=5", "student.drop_path_rate=0"):
        assert predict(1, change).activations > usual, change
    assert predict(1, "train.batch_size_per_gpu=8").activations == 2 * usual
    deep = ["student.depth=12", "train.activation_checkpointing="]
    none, selective, full = (predict(1, deep[0], deep[1] + how).activations for how in ("none", "selective", "full"))
    assert none > selective > full > 0


def test_the_published_recipe_fits_the_gpus_that_it_was_published_for() -> None:
    cfg = config.load("train/vitl16_short")
    costs = estimate(cfg, on_meta(cfg), 32, 8)
    assert 20e9 < costs.memory < 80e9
    at_once = costs.activations - costs.gradients
    assert costs.memory == costs.state + costs.gathered + costs.reducing + at_once


# --- Real processes --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_processes", "strategies"),
    [(2, ["NO_SHARD", "FULL_SHARD"]), (3, ["SHARD_GRAD_OP"]), (4, ["HYBRID_SHARD"])],
    ids=["2 processes", "3, uneven shards", "4 on 2 machines"],
)
def test_processes_hold_and_send_what_is_predicted(num_processes: int, strategies: list[str]) -> None:
    result = run_script(
        *("scripts/bench_memory.py", f"--processes={num_processes}", f"--strategies={','.join(strategies)}"),
        *("--config-file", str(CONFIG_FILE), "train.accumulate_steps=2", *SEPARATE_HEADS),
    )
    assert result.returncode == 0, result.stderr
    runs = json.loads(result.stdout)["runs"]
    assert [(run["processes"], run["strategy"]) for run in runs] == [(num_processes, name) for name in strategies]
    for run in runs:
        measured, predicted = run["measured"], run["predicted"]
        assert measured["state"] == predicted["state"]
        of_losses = 10000  # sums over a few prototypes, in some iterations
        assert 0 <= measured["sent"] - predicted["sent"] < of_losses < predicted["sent"] / 20


@pytest.mark.slow
def test_the_table_has_a_line_for_each_strategy_and_a_column_for_each_backbone() -> None:
    words = ("scripts/sharding_table.py", "--archs=vit_small,vit_large", "--processes=1,8,32")
    rows = json.loads(run_script(*words).stdout)
    assert len(rows) == 2 * (1 + 3 + 5)
    (large,) = [row for row in rows if (row["arch"], row["processes"]) == ("vit_large", 1)]
    assert large["state"] == 20 * sum(large["parameters"].values())
    lines = run_script(*words, "--markdown").stdout.splitlines()
    assert f"| 1 | any | 0.82 + 0.08 | {large['state'] / 2**30:.2f} + {large['gathered'] / 2**30:.2f} |" in lines
    assert sum(line.startswith("| 32 | HYBRID_SHARD |") for line in lines) == 2
