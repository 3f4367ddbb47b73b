"""Networks for other runtimes: exported like the published models, they compute the same at any size."""

import logging
import warnings
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from test_peers import with_generic_weights
from torch import Tensor

from dinov2.hub import backbones
from dinov2.layers import attention
from dinov2.models.positions import resample_positions
from dinov2.models.vision_transformer import DinoVisionTransformer

NAMES = ["dinov2_vits14", "dinov2_vits14_reg"]
SIZES = [(56, 56), (42, 70), (28, 28), (14, 98)]  # the first is the one the model was built for
Dim = torch.export.Dim


class Choice(torch.nn.Module):
    """Adds one where attention on a GPU is `sdpa`."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if attention.best_backend("cuda", torch.float16, 64) == "sdpa" else x


def small(name: str) -> DinoVisionTransformer:
    sizes = {"depth": 2, "embed_dim": 128, "num_heads": 2, "img_size": 56}
    return with_generic_weights(getattr(backbones, name)(pretrained=False, **sizes)).requires_grad_(False)


def images(batch: int, size: tuple[int, int]) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def assert_runs(path: Path, model: DinoVisionTransformer, batches: list[int], sizes: list[tuple[int, int]]) -> None:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = [item.name for item in session.get_inputs()]
    for batch in batches:
        for size in sizes:
            x = images(batch, size)
            (output,) = session.run(None, {name: x.numpy()})
            torch.testing.assert_close(torch.from_numpy(output), model(x), rtol=2e-5, atol=2e-5)


# --- ONNX ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_onnx_with_any_batch_and_size(tmp_path: Path, name: str) -> None:
    model, path = small(name), tmp_path / "model.onnx"
    shapes = {0: Dim("batch"), 2: 14 * Dim("rows"), 3: 14 * Dim("columns")}
    torch.onnx.export(model, (images(2, (42, 70)),), path, dynamic_shapes=(shapes,), dynamo=True, verbose=False)
    assert_runs(path, model, [1, 3], SIZES)


@pytest.mark.parametrize(
    ("dynamo", "size", "free"),
    [
        (False, SIZES[0], {0: "batch"}),
        (False, SIZES[1], {0: "batch", 2: "height", 3: "width"}),
        (True, SIZES[0], {0: "batch", 2: "height", 3: "width"}),
        (True, SIZES[1], {0: "batch"}),
    ],
    ids=["tracer, batch", "tracer, batch and size", "dynamo, batch and size", "dynamo, batch"],
)
def test_onnx_as_scripts_for_the_published_models_write_it(
    tmp_path: Path, dynamo: bool, size: tuple[int, int], free: dict[int, str]
) -> None:
    model, path = small("dinov2_vits14"), tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's: dynamic_axes and the tracer are old, the tracer sees Python numbers
        torch.onnx.export(
            model,
            images(2, size),
            path,
            input_names=["input"],
            output_names=["output"],
            dynamic_axes={"input": free},
            dynamo=dynamo,
            verbose=False,
        )
    assert_runs(path, model, [1, 2], SIZES if 2 in free else [size])


# --- PyTorch ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_programs_with_any_batch_and_size(name: str) -> None:
    model = small(name)
    shapes = {0: Dim("batch"), 2: 14 * Dim("rows"), 3: 14 * Dim("columns")}
    program = torch.export.export(model, (images(2, (42, 70)),), dynamic_shapes=(shapes,)).module()
    for batch in (2, 3):
        for size in [*SIZES[:3], (98, 56)]:
            x = images(batch, size)
            torch.testing.assert_close(program(x), model(x), rtol=2e-5, atol=2e-5)


def test_a_program_for_one_size_computes_exactly_the_same() -> None:
    model = small("dinov2_vits14")
    program = torch.export.export(model, (images(2, (42, 70)),), dynamic_shapes=({0: Dim("batch")},)).module()
    x = images(3, (42, 70))
    assert torch.equal(program(x), model(x))


def test_exporters_and_compilers_see_the_kernel_they_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing neither searches for the best kernel of a GPU nor tries one."""

    def asked(*_: object) -> str:
        raise AssertionError("searched for the best kernel")

    monkeypatch.setattr(attention, "_find_backend", asked)
    monkeypatch.delattr(attention.best_backend, "_dynamo_marked_constant", raising=False)  # by tests of compiled blocks
    torch.compiler.reset()
    x, expected = torch.zeros(2), torch.ones(2)
    assert torch.equal(torch.export.export(Choice(), (x,)).module()(x), expected)
    assert torch.equal(torch.compile(Choice(), backend="eager", fullgraph=True)(x), expected)
    with warnings.catch_warnings(action="ignore"):
        assert torch.equal(torch.jit.trace(Choice(), x, check_trace=False)(x), expected)
    with pytest.raises(AssertionError, match="searched for the best kernel"):
        Choice()(x)
    program = torch.export.export(small("dinov2_vits14"), (images(2, (28, 28)),))
    assert "scaled_dot_product_attention" in str(program.graph)


def test_blocks_compiled_for_training_take_the_best_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search runs outside of the compiled program, as `train.parallel` asks for."""
    monkeypatch.setattr(attention, "_find_backend", lambda *_: logging.getLogger().debug("search") or "varlen")
    monkeypatch.setattr(attention.best_backend, "_dynamo_marked_constant", True, raising=False)  # put back afterwards
    torch.compiler.assume_constant_result(attention.best_backend)
    torch.compiler.reset()
    x = torch.zeros(2)
    assert torch.equal(torch.compile(Choice(), backend="eager", fullgraph=True)(x), x)


# --- Positions of sizes not known beforehand -------------------------------------------------------------------------


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("offset", [0.0, 0.1])
@pytest.mark.parametrize("old", [(4, 4), (37, 37), (3, 8)])
def test_positions_as_matrix_products_are_the_interpolated_ones(
    old: tuple[int, int], offset: float, antialias: bool
) -> None:
    """Rows and columns are no ints while exporting; tensors, as here, when traced."""
    table = torch.randn(1, 1 + old[0] * old[1], 8, generator=torch.Generator().manual_seed(0))
    for new in [(4, 4), (37, 37), (3, 8), (16, 37), (1, 1), (5, 7), (60, 2), (37, 20)]:
        expected = resample_positions(table, old, new, offset=offset, antialias=antialias)
        unknown: Any = tuple(torch.tensor(size) for size in new)
        result = resample_positions(table, old, unknown, offset=offset, antialias=antialias)
        torch.testing.assert_close(result, expected, rtol=0, atol=5e-5)
        if new == old:
            assert torch.equal(result, table)
