"""Revisited Oxford and Paris (Radenovic et al. 2018, arXiv 1803.11285) in their published layout.

root/roxford5k/jpg/*.jpg        root/rparis6k/jpg/*.jpg
root/roxford5k/gnd_roxford5k.pkl (or .json with the same content)
"""

import io
import pickle
from pathlib import Path
from typing import Any

from dinov2.data.retrieval.benchmark import Box, GroundTruth, QuerySet, RetrievalBenchmark
from dinov2.files import read_json, read_regular_file

# All that a pickle of containers, numbers, text and arrays of NumPy refers to. Nothing here runs code of the file.
_ALLOWED = {("_codecs", "encode"), ("numpy", "ndarray"), ("numpy", "dtype")} | {
    (f"numpy.{core}.{module}", name)
    for core in ("core", "_core")
    for module, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))
}


def read_revisited(name: str, *, root: str, **transforms: Any) -> RetrievalBenchmark:
    """Open `roxford5k` or `rparis6k` below `root`; the queries are cropped to their boxes.

    Raises:
        FileNotFoundError: The ground truth, a query or the first image of the database is missing.
        ValueError: The ground truth is damaged or has another structure.
    """
    folder = Path(root) / name
    files = [folder / f"gnd_{name}{suffix}" for suffix in (".pkl", ".json")]
    file = next((file for file in files if file.exists()), None)
    if file is None:
        raise FileNotFoundError(
            f"no {files[0].name} or {files[1].name} in {folder}; expected root/{name}/jpg/*.jpg and {files[0].name}"
        )
    content = read_json(file) if file.suffix == ".json" else read_plain_pickle(file)
    try:
        database, queries = ([f"{stem}.jpg" for stem in content[key]] for key in ("imlist", "qimlist"))
        boxes = [_box(entry["bbx"]) for entry in content["gnd"]]
        truth = [_ground_truth(entry, len(database)) for entry in content["gnd"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} does not have the structure of a ground truth (imlist, qimlist, and gnd with bbx, easy, hard and "
            f"junk): {type(error).__name__}: {error}"
        ) from error
    if not queries or not database or len(queries) != len(truth):
        raise ValueError(
            f"{file} has {len(database)} images, {len(queries)} queries and the ground truth of {len(truth)}"
        )
    images = folder / "jpg"
    for path in [*queries, database[0]]:
        if not (images / path).is_file():
            raise FileNotFoundError(f"no image {images / path}, which {file.name} lists")
    return RetrievalBenchmark(
        QuerySet(images, queries, boxes, **transforms), QuerySet(images, database, **transforms), truth
    )


def _box(edges: Any) -> Box:
    left, top, right, bottom = map(float, edges)
    return left, top, right, bottom


def _ground_truth(entry: Any, num_images: int) -> GroundTruth:
    truth = GroundTruth(*([int(index) for index in entry[key]] for key in GroundTruth._fields))
    everything = [*truth.easy, *truth.hard, *truth.junk]
    if len(set(everything)) < len(everything):
        raise ValueError("an image is listed twice for one query")
    if everything and not 0 <= min(everything) <= max(everything) < num_images:
        raise ValueError(f"index {min(everything)} or {max(everything)} of {num_images} images")
    return truth


class _PlainUnpickler(pickle.Unpickler):
    """Unpickles containers, numbers, text and NumPy arrays; a reference to anything else is an error."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which data does not need")
        return super().find_class(module, name)


def read_plain_pickle(path: Path) -> Any:
    """Read a pickle of plain data without running any code in it; anything else is a ValueError."""
    content = io.BytesIO(read_regular_file(path))
    try:
        return _PlainUnpickler(content, encoding="latin1").load()
    except Exception as error:  # on bytes that it does not expect pickle fails in many ways
        raise ValueError(f"{path} is damaged or not plain data ({type(error).__name__}: {error})") from error
