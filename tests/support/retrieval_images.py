"""Small benchmarks of image retrieval in the published layout."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COLORS = {"church": (200, 40, 40), "tower": (40, 200, 40), "bridge": (40, 40, 200)}


def draw_photo(path: Path, color: tuple[int, int, int], seed: int, size: tuple[int, int] = (24, 16)) -> None:
    """A photograph whose middle has a color, on a noisy background."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    pixels[2:-2, 4:-4] = np.clip(np.array(color) + rng.integers(-30, 30, pixels[2:-2, 4:-4].shape), 0, 255)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_revisited(root: Path, name: str = "roxford5k", form: str = "pkl", **changes: Any) -> dict[str, Any]:
    """Write three queries (the last without positives) and ten images, five of each of two buildings."""
    folder = root / name
    database = [f"{kind}_{index}" for kind in ("church", "tower") for index in range(5)]
    queries = ["church_q", "tower_q", "bridge_q"]
    for seed, stem in enumerate([*database, *queries]):
        draw_photo(folder / "jpg" / f"{stem}.jpg", COLORS[stem.partition("_")[0]], seed)
    box = [4.2, 2.0, 19.8, 14.0]
    content: dict[str, Any] = {
        "imlist": database,
        "qimlist": queries,
        "gnd": [
            {"bbx": box, "easy": [0, 1], "hard": [2, 3], "junk": [4]},
            {"bbx": box, "easy": [5, 6, 7], "hard": [8], "junk": []},
            {"bbx": box, "easy": [], "hard": [], "junk": [9]},
        ],
    }
    content |= changes
    file = folder / f"gnd_{name}.{form}"
    if form == "json":
        file.write_text(json.dumps(content))
    else:
        for entry in content["gnd"]:  # arrays, as in some copies
            entry["easy"] = np.array(entry["easy"], np.int64)
            entry["bbx"] = [np.float64(edge) for edge in entry["bbx"]]
        file.write_bytes(pickle.dumps(content))
    return content


def write_groups(folder: Path, roles: bool = False) -> Path:
    """Write a list of four images of each color, and one that is alone in its group."""
    lines = ["path,group" + (",role" if roles else "")]
    for seed, (kind, index) in enumerate([(kind, index) for kind in COLORS for index in range(4)]):
        draw_photo(folder / f"{kind}{index}.png", COLORS[kind], seed)
        lines.append(f"{kind}{index}.png,{kind}" + (f",{'query' if index == 0 else 'database'}" if roles else ""))
    draw_photo(folder / "alone.png", (128, 128, 128), 99)
    lines.append("alone.png,nothing" + (",query" if roles else ""))
    file = folder / "list.csv"
    file.write_text("\n".join(lines) + "\n")
    return file
