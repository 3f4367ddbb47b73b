"""The notebook that a newcomer opens first: it runs, with a model of one's own and with a released one."""

import base64
import io
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image

from dinov2 import config
from dinov2.data import make_dataset
from dinov2.hub.backbones import dinov2_vits14
from dinov2.models import build_model
from dinov2.visualization.contact_sheet import GAP, MARGIN

NOTEBOOK = Path(__file__).resolve().parents[1] / "scripts" / "first_steps.ipynb"
MAX_BYTES = 1_000_000  # noise hardly compresses


def read() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def texts_of(notebook: Any) -> str:
    """All text that the cells show."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "\n".join(output.get("text") or output["data"]["text/plain"] for output in outputs)


def images_of(notebook: Any) -> list[Image.Image]:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    encoded = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    return [Image.open(io.BytesIO(base64.b64decode(image))) for image in encoded]


@pytest.fixture
def run_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that executes the notebook with other values in its first cell of code."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))

    def run(**values: str) -> Any:
        notebook = read()
        (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
        assert [line.split(" = ")[0] for line in parameters.source.splitlines()] == list(values)
        parameters.source = "\n".join(f"{name} = {value!r}" for name, value in values.items())
        client = NotebookClient(
            notebook,
            kernel_name="python3",
            timeout=120,  # seconds for a cell
            extra_arguments=["--log-level=ERROR"],
            resources={"metadata": {"path": str(NOTEBOOK.parent)}},
        )
        return client.execute()

    return run


def test_it_shows_what_came_of_it_and_nothing_of_the_machine() -> None:
    notebook = read()
    nbformat.validate(notebook)
    assert NOTEBOOK.stat().st_size < MAX_BYTES
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run once, from top to bottom"
    kinds = {output.get("name", output.output_type) for cell in code for output in cell.outputs}
    assert kinds == {"stdout", "execute_result"}, "no errors, no warnings"
    assert not any(word in NOTEBOOK.read_text() for word in ("/root", "/home", "/tmp", "/work"))
    assert "of 2,000 images right" in texts_of(notebook)
    assert len(images_of(notebook)) == 2


def test_it_runs_with_a_model_of_ones_own(tmp_path: Path, run_with: Any) -> None:
    cfg = config.load("train/quickstart", ["student.embed_dim=32", "student.depth=1"])
    config.save(cfg, tmp_path / "config.yaml")
    teacher = tmp_path / "eval" / "best" / "teacher_checkpoint.pth"
    teacher.parent.mkdir(parents=True)
    weights = build_model(**config.backbone_arguments(cfg)).state_dict()
    torch.save({"teacher": {f"backbone.{name}": value for name, value in weights.items()}}, teacher)

    done = run_with(MODEL=str(tmp_path), KNOWN="FashionMNIST:split=VAL", NEW="FashionMNIST:split=VAL")
    text = texts_of(done)
    assert "patches of 7 pixels; a feature has 32 numbers" in text
    assert "patch tokens (1, 16, 32)" in text
    assert "(torch.Size([2000, 32]), torch.Size([2000, 32]))" in text
    assert "10 neighbors: " in text
    similar, colors = images_of(done)
    pixels = np.asarray(similar)[:, -10 * (56 + GAP) - MARGIN :]  # without the labels of the rows
    top = int(np.flatnonzero((pixels < 128).any(axis=(1, 2)))[0])
    first, second = (pixels[y : y + 56] for y in (top, top + 56 + GAP))
    assert first.min() < 50 and (first == second).all(), "the nearest of an image is itself"
    assert len(colors.getcolors(colors.width * colors.height)) > 1000


def test_it_runs_with_a_released_model_and_images_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_with: Any
) -> None:
    monkeypatch.setenv("DINOV2_WEIGHTS_URL", str(tmp_path))
    (tmp_path / "dinov2_vits14").mkdir()
    torch.save(dinov2_vits14(pretrained=False).state_dict(), tmp_path / "dinov2_vits14" / "dinov2_vits14_pretrain.pth")
    source = make_dataset(dataset_str="FashionMNIST:split=VAL")
    for index in range(6):
        for folder in ("known/" + source.get_class_name(index)[:4].strip(), "new"):  # the new ones without labels
            path = tmp_path / folder / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            source.get_image(index).resize((64, 48)).save(path)

    done = run_with(
        MODEL="dinov2_vits14",
        KNOWN=f"ImageFolder:root={tmp_path / 'known'}",
        NEW=f"ImageFolder:root={tmp_path / 'new'}",
    )
    text = texts_of(done)
    assert "22.1 million parameters; patches of 14 pixels; a feature has 384 numbers" in text
    assert "patch tokens (1, 256, 384)" in text
    assert "(torch.Size([6, 384]), torch.Size([6, 384]))" in text
    assert "no labels" in text
    assert len(images_of(done)) == 2
