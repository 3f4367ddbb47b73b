"""The command ranks, scores and writes; two processes find what one finds; features are reused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eval_images import CONFIG, tiny_backbone
from eval_processes import run_in_processes
from PIL import Image
from retrieval_images import draw_photo, write_groups, write_revisited

from dinov2.data.retrieval import make_retrieval_benchmark
from dinov2.eval.retrieval import evaluation
from dinov2.eval.retrieval.protocols import LongerSideTransform, preparation
from dinov2.eval.retrieval.rankings import RetrievalFeatures, extract_retrieval_features, score_benchmark
from dinov2.flags.retrieval import get_args_parser


def words(folder: Path, dataset: str, **options: Any) -> list[str]:
    config = folder / "tiny.yaml"
    config.write_text(CONFIG)
    found = ["--config-file", str(config), "--output-dir", str(folder / "out"), "--num-workers", "0", "--random-init"]
    for name, value in {"dataset": dataset, **options}.items():
        found += ["--" + name.replace("_", "-"), str(value)]
    return found


def run(folder: Path, dataset: str, **options: Any) -> dict[str, Any]:
    evaluation.main(get_args_parser().parse_args(words(folder, dataset, **options)))
    return json.loads((folder / "out" / evaluation.RESULTS_FILE).read_text())


def test_the_command_writes_scores_protocol_and_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_revisited(tmp_path)
    results = run(tmp_path, f"RevisitedOxford:root={tmp_path}")
    assert results["protocol"] == "dinov2" and results["image_size"] == 16, "the size of the model's crops"
    assert list(results["metrics"]) == ["easy", "medium", "hard"]
    assert set(results["scored_queries"].values()) == {2}, "the third has no positives"
    assert list(results["metrics"]["hard"]) == ["mAP", "mP@1", "mP@5", "mP@10"]
    assert results["per_query"][2] == {
        "query": f"{tmp_path}/roxford5k/jpg/bridge_q.jpg [4.2, 2, 19.8, 14]", "easy": None, "medium": None, "hard": None
    }  # fmt: skip
    mean = np.mean([row["medium"] for row in results["per_query"][:2]])
    assert results["metrics"]["medium"]["mAP"] == pytest.approx(mean) and mean > 50
    assert results["sets"] == {"queries": {"images": 3}, "database": {"images": 10}}, "without classes, they have none"
    assert "first min(k, r) images" in results["definitions"]["mP@k"] and "mAP" in results["definitions"]
    log = capsys.readouterr().out
    assert "DINOv2's image size is not published" in log
    assert "retrieval: 3 queries in a database of 10 images, scores in %" in log
    assert "mP@k: precision of the first k images, or of those up to the last positive" in log
    figure = Image.open(tmp_path / "out" / evaluation.FIGURE_FILE)
    assert figure.height > 3 * 128
    frames = {figure.convert("RGB").getpixel((16 + 1, 16 + 28 + 1)), figure.convert("RGB").getpixel((16 + 137, 45))}
    assert (0x1A, 0x1A, 0x1A) in frames and frames & {(0x1B, 0x9E, 0x4B), (0xD6, 0x27, 0x28), (0x9A, 0x9A, 0x9A)}

    assert set(results["feature_files"].values()) == {"written"}
    again = run(tmp_path, f"RevisitedOxford:root={tmp_path}")
    assert set(again["feature_files"].values()) == {"read"} and again["metrics"] == results["metrics"]
    other = run(tmp_path, f"RevisitedOxford:root={tmp_path}", protocol="short_side", shown_queries=0)
    assert set(other["feature_files"].values()) == {"written"}


def test_the_figure_has_no_row_with_the_query_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[int, list[int]] = {}

    def recorded(benchmark: Any, queries: list[int], rankings: list[list[int]], columns: int) -> Image.Image:
        drawn.update(zip(queries, rankings, strict=True))
        return evaluation_drawing(benchmark, queries, rankings, columns)

    evaluation_drawing = evaluation.draw_rankings
    monkeypatch.setattr(evaluation, "draw_rankings", recorded)
    run(tmp_path, f"RetrievalList:file={write_groups(tmp_path)}", shown_queries=4)
    assert list(drawn) == [0, 3, 6, 9]
    assert all(query not in ranking and len(ranking) == 8 for query, ranking in drawn.items())


def test_features_depend_on_the_boxes_of_queries(tmp_path: Path) -> None:
    write_revisited(tmp_path, form="json")
    run(tmp_path, f"RevisitedOxford:root={tmp_path}")
    content = json.loads((tmp_path / "roxford5k" / "gnd_roxford5k.json").read_text())
    content["gnd"][0]["bbx"] = [0, 0, 8, 8]
    (tmp_path / "roxford5k" / "gnd_roxford5k.json").write_text(json.dumps(content))
    results = run(tmp_path, f"RevisitedOxford:root={tmp_path}")
    assert sorted(results["feature_files"].values()) == ["read", "written"]


def test_scores_are_those_of_a_loop_over_pairs(tmp_path: Path) -> None:
    transform = preparation("dinov3", None, 16, 8).transform((0.5,) * 3, (0.5,) * 3)
    benchmark = make_retrieval_benchmark(f"RetrievalList:file={write_groups(tmp_path)}", transform=transform)
    model = tiny_backbone()
    features = extract_retrieval_features(model, benchmark, batch_size=4, num_workers=0)
    scores = score_benchmark(features, benchmark.ground_truth, benchmark.settings)["all"]
    tokens = [model(benchmark.database[i][0][None])[0].double() for i in range(13)]
    groups = [i // 4 for i in range(13)]
    for query in range(13):
        others = [i for i in range(13) if i != query]
        others.sort(key=lambda i: -float(torch.cosine_similarity(tokens[query], tokens[i], dim=0)))
        ranks = [rank for rank, i in enumerate(others) if groups[i] == groups[query]]
        found = scores.per_query[query]
        if not ranks:
            assert found is None and query == 12
            continue
        parts = [(j / r if r else 1.0) + (j + 1) / (r + 1) for j, r in enumerate(ranks)]
        assert found is not None and found.average_precision == pytest.approx(sum(parts) / 2 / len(ranks))


def test_images_that_cannot_be_read_are_last(tmp_path: Path) -> None:
    features = RetrievalFeatures(
        torch.eye(2), torch.tensor([[0.0, 0.0], [-1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1, 1]) > 0
    )
    assert features.ranking(0, 1).tolist() == [[2, 1, 0]]


def test_a_query_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    file = write_groups(tmp_path, roles=True)
    lines = ["path,group,role", *(f"q{i}.png,church,query" for i in range(150)), "church1.png,church,database"]
    for i in range(150):
        draw_photo(tmp_path / f"q{i}.png", (200, 40, 40), i)
    (tmp_path / "q7.png").write_bytes(b"no image")
    file.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"1 queries cannot be read: .*q7.png"):
        run(tmp_path, f"RetrievalList:file={file}")
    assert not (tmp_path / "out" / evaluation.RESULTS_FILE).exists()


def test_wrong_strings_and_sizes_create_nothing_or_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown dataset 'ImageFolder' in .*; known: RevisitedOxford"):
        run(tmp_path, f"ImageFolder:root={tmp_path}")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="--image-size 17 is not a multiple of student.patch_size = 8"):
        run(tmp_path, f"RetrievalList:file={write_groups(tmp_path)}", image_size=17)
    with pytest.raises(ValueError, match="unknown protocol 'dinov4'; known: dinov2, dinov3, short_side"):
        preparation("dinov4", None, 224, 14)


def test_the_longer_side_is_resized_and_the_rest_is_black() -> None:
    image = Image.new("RGB", (40, 20), (255, 255, 255))
    tensor = LongerSideTransform(16, (0.5,) * 3, (0.5,) * 3)(image)
    assert tensor.shape == (3, 16, 16)
    assert (tensor[:, 4:12] == 1).all() and (tensor[:, :4] == -1).all() and (tensor[:, 12:] == -1).all()
    assert preparation("dinov3", None, 224, 14).image_size == 224 and preparation("dinov3", 448, 224, 14)[1] == 448


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    dataset = f"RetrievalList:file={write_groups(tmp_path)}"
    alone = run(tmp_path, dataset)
    arguments = words(tmp_path, dataset, feature_cache="none")
    arguments[arguments.index("--output-dir") + 1] = str(tmp_path / "two")
    run_in_processes("dinov2/run/eval/retrieval.py", arguments)
    results = json.loads((tmp_path / "two" / evaluation.RESULTS_FILE).read_text())
    assert results["world_size"] == 2 and results["metrics"] == alone["metrics"]
    assert results["per_query"] == alone["per_query"]
