"""Compiled blocks: the numbers of eager ones, one program for all numbers of masked patches."""

import copy
import itertools

import pytest
import torch
from tiny import losses_of_batch, random_batch, tiny_model

from dinov2.data.collate import Batch
from dinov2.train.parallel import parallelize
from dinov2.train.ssl_meta_arch import SSLMetaArch


def first_patches(batch: Batch, keep: int) -> Batch:
    """The batch with only some of its masked patches, as if the masks had come out smaller."""
    masks = batch.masks.flatten().clone()
    masks[batch.mask_index[keep:]] = False
    return batch._replace(
        masks=masks.view_as(batch.masks), mask_index=batch.mask_index[:keep], mask_weight=batch.mask_weight[:keep]
    )


def total_and_gradients(model: SSLMetaArch, batch: Batch) -> list[torch.Tensor]:
    torch.manual_seed(0)  # for stochastic depth
    model.student.zero_grad()
    total = losses_of_batch(model, batch).total
    total.backward()
    return [total.detach(), *(param.grad for param in model.student.parameters() if param.grad is not None)]


@pytest.mark.filterwarnings("default")  # the compiler causes some of its own
def test_compiled_blocks_compute_the_same_without_a_break_or_a_second_compilation() -> None:
    model = tiny_model("student.drop_path_rate=0.3", "student.drop_path_uniform=true").train()
    compiled = copy.deepcopy(model)
    parallelize(compiled.student, compiled.teacher, model.cfg.compute_precision, compile_blocks=True)
    batch = random_batch()
    batches = [first_patches(batch, keep) for keep in (len(batch.mask_index), 7, 3, 1)]
    assert len({len(part.mask_index) for part in batches}) == len(batches)
    counters = torch._dynamo.utils.counters
    counters.clear()
    programs = []
    for part in batches:
        torch.testing.assert_close(
            total_and_gradients(compiled, part), total_and_gradients(model, part), rtol=1e-4, atol=1e-5
        )
        programs.append(counters["stats"]["unique_graphs"])
    assert programs[0] > 0 and all(a == b for a, b in itertools.pairwise(programs)), programs
    assert not counters["graph_break"]
