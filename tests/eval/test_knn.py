"""k-NN is the vote of a brute-force search in float64, for any bank, chunk and k; the command writes what it found."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_images import command, tiny_backbone, write_images
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from dinov2.analysis import nearest_neighbors
from dinov2.analysis.nearest_neighbors import largest_of_rows
from dinov2.eval import knn
from dinov2.eval.knn import KnnModule, eval_knn_on_features, few_shot_index

CPU = torch.device("cpu")
NUM_CLASSES, TEMPERATURE = 4, 0.07


def features_and_labels(count: int, seed: int, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """Unit vectors (count, 8) around one of each class, and labels (count,)."""
    centers = torch.randn(NUM_CLASSES, 8, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(NUM_CLASSES, (count,), generator=generator)
    offsets = centers[labels] + 1.5 * torch.randn(count, 8, generator=generator)
    return normalize(1.0 * (spread < 1) + spread * offsets), labels


def brute_force(bank: Tensor, labels: Tensor, queries: Tensor, k: int, largest_k: int) -> Tensor:
    """Votes (Q, C) by a loop over queries and neighbors, in float64."""
    bank, queries = normalize(bank.double()), normalize(queries.double())
    votes = torch.zeros(len(queries), NUM_CLASSES, dtype=torch.float64)
    for i, query in enumerate(queries):
        cosines = torch.stack([query @ other for other in bank])
        nearest = cosines.argsort(descending=True)[:largest_k]
        weights = torch.exp(cosines[nearest] / TEMPERATURE)
        for neighbor, weight in list(zip(nearest, weights / weights.sum(), strict=True))[:k]:
            votes[i, labels[neighbor]] += weight
    return votes


@pytest.fixture(params=["torch", "faiss"])
def search(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search with and without the optional faiss."""
    monkeypatch.setattr(knn, "find_spec", lambda name: name == request.param)


def test_what_faiss_tries_to_load_is_not_logged() -> None:
    bank = torch.eye(3)
    knn.search_with_faiss(bank, bank, 1)
    loader = logging.getLogger("faiss.loader")
    assert not loader.isEnabledFor(logging.INFO) and loader.isEnabledFor(logging.WARNING)


@pytest.mark.usefixtures("search")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_not_finite_have_no_neighbors(value: float) -> None:
    bank, labels = features_and_labels(50, seed=0)
    broken = bank.clone()
    broken[3, 2] = value
    with pytest.raises(ValueError, match="features of the bank are not finite"):
        KnnModule(broken, labels, [3], TEMPERATURE, CPU, NUM_CLASSES)(bank)
    with pytest.raises(ValueError, match="features of the queries are not finite"):
        KnnModule(bank, labels, [3], TEMPERATURE, CPU, NUM_CLASSES)(broken)


@pytest.mark.usefixtures("search")
@pytest.mark.parametrize(("chunk", "batch"), [(1000, 1000), (7, 5), (1, 1)])
def test_votes_are_those_of_brute_force(monkeypatch: pytest.MonkeyPatch, chunk: int, batch: int) -> None:
    monkeypatch.setattr(knn, "BANK_CHUNK", chunk)  # also smaller than the largest k
    monkeypatch.setattr(knn, "QUERY_BATCH", batch)
    monkeypatch.setattr(nearest_neighbors, "QUERY_BATCH", batch)
    bank, labels = features_and_labels(50, seed=0)
    queries, _ = features_and_labels(12, seed=1)
    votes = KnnModule(bank, labels, [3, 20, 10], TEMPERATURE, CPU, NUM_CLASSES)(queries)
    assert list(votes) == [3, 10, 20]
    for k, result in votes.items():
        torch.testing.assert_close(result.double(), brute_force(bank, labels, queries, k, 20), rtol=0, atol=1e-5)
    torch.testing.assert_close(votes[20].sum(dim=1), torch.ones(12))


@pytest.mark.parametrize(("width", "k"), [(640, 5), (641, 5), (640, 20), (16, 16)])
def test_the_largest_are_those_of_topk(width: int, k: int) -> None:
    sims = torch.randn(7, width, generator=torch.Generator().manual_seed(0))
    values, positions = largest_of_rows(sims, k)
    assert torch.equal(values, sims.topk(k, dim=1).values)
    assert torch.equal(sims.gather(1, positions), values)


@pytest.mark.usefixtures("search")
def test_autocast_does_not_reach_the_similarities() -> None:
    bank, labels = features_and_labels(50, seed=0)
    queries, _ = features_and_labels(12, seed=1)
    module = KnnModule(bank, labels, [10], TEMPERATURE, CPU, NUM_CLASSES)
    expected = module.neighbors(queries)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = module.neighbors(queries)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.usefixtures("search")
def test_features_that_are_close_to_each_other_are_distinguished() -> None:
    """As those of an untrained network with a small LayerScale, whose cosines are all 1 in float32."""
    bank, labels = features_and_labels(200, seed=0, spread=2e-4)
    queries, _ = features_and_labels(40, seed=1, spread=2e-4)
    right = brute_force(bank, labels, queries, 5, 5).argmax(dim=1)
    votes = KnnModule(bank, labels, [5], TEMPERATURE, CPU, NUM_CLASSES)(queries)[5]
    assert torch.equal(votes.argmax(dim=1), right)
    cosines = queries @ bank.T
    by_cosine = torch.nn.functional.one_hot(labels[cosines.topk(5).indices]).sum(dim=1).argmax(dim=1)
    assert (cosines - 1).abs().max() < 1e-6 and (by_cosine != right).sum() > 5


def test_k_larger_than_the_bank_becomes_its_size(caplog: pytest.LogCaptureFixture) -> None:
    bank, labels = features_and_labels(6, seed=0)
    with caplog.at_level(logging.WARNING):
        votes = KnnModule(bank, labels, [3, 10, 20], TEMPERATURE, CPU, NUM_CLASSES)(bank)
    assert list(votes) == [3, 6]
    assert "k = [10, 20]: the training set has only 6 images, k = 6 is used" in caplog.text


def test_impossible_numbers_are_named() -> None:
    bank, labels = features_and_labels(6, seed=0)
    with pytest.raises(ValueError, match=r"at least 1, got \[0, 3\]"):
        KnnModule(bank, labels, [0, 3], TEMPERATURE, CPU)
    with pytest.raises(ValueError, match="images per class must be at least 1, or -1 for all, got 0"):
        eval_knn_on_features(bank, labels, bank, labels, nb_knn=[1], n_per_class_list=[0])


def test_few_shot_banks_are_the_first_of_a_permutation_of_each_class() -> None:
    labels = torch.tensor([2, 0, 2, 0, 0, 2, 1, 0, 2])
    torch.manual_seed(5)
    expected = []
    for label in (0, 1, 2):
        positions = (labels == label).nonzero().flatten()
        expected += positions[torch.randperm(len(positions))[:2]].tolist()
    state = torch.get_rng_state()
    assert few_shot_index(labels, 2, seed=5).tolist() == expected
    assert labels[expected].tolist() == [0, 0, 1, 2, 2]
    assert torch.equal(torch.get_rng_state(), state)
    assert few_shot_index(labels, 2, seed=6).tolist() != expected


def test_few_shot_scores_are_the_mean_of_the_tries() -> None:
    bank, labels = features_and_labels(80, seed=0)
    queries, query_labels = features_and_labels(40, seed=1)
    scores = eval_knn_on_features(
        bank, labels, queries, query_labels, nb_knn=[3, 10], n_per_class_list=[-1, 5], n_tries=3
    )
    assert list(scores) == [("full", 3), ("full", 10), ("5 per class", 3), ("5 per class", 5)]
    tries = []
    for seed in range(3):
        index = few_shot_index(labels, 5, seed)
        votes = KnnModule(bank[index], labels[index], [3, 5], TEMPERATURE, CPU, NUM_CLASSES)(queries)
        tries.append((votes[3].argmax(dim=1) == query_labels).double().mean().item())
    assert scores["5 per class", 3]["top-1"] == pytest.approx(sum(tries) / 3)
    full = brute_force(bank, labels, queries, 10, 10).argmax(dim=1) == query_labels
    assert scores["full", 10] == {"top-1": pytest.approx(full.double().mean().item())}  # 4 classes: no top-5


def run(folder: Path, **options: object) -> dict:
    knn.main(knn.get_args_parser().parse_args(command(folder, **options)))
    return json.loads((folder / "out" / "results_eval_knn.json").read_text())


def test_the_command_writes_scores_settings_and_hash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / "teacher.pth"
    torch.save({"teacher": {f"backbone.{k}": v for k, v in tiny_backbone().state_dict().items()}}, weights)
    results = run(tmp_path, pretrained_weights=weights, nb_knn=[3, 5], n_per_class_list=[-1, 2])
    assert list(results["metrics"]) == ["full", "2 per class"]
    assert list(results["metrics"]["full"]) == ["3", "5"]
    top_1 = results["metrics"]["full"]["3"]["top-1"]
    assert 80 < top_1 <= 100  # the colors are easily distinguished
    log = capsys.readouterr().out
    assert f"('full', 3) Top 1: {top_1:.2f}" in log
    table = log.rpartition("k-NN classification of 21 images of 3 classes, accuracy in %\n")[2].splitlines()
    assert table[0].split() == ["images", "k", "top-1", "top-5"]
    assert table[1].split() == ["full", "3", f"{top_1:.2f}", "-"], "three classes have no top-5"
    assert [facts["images"] for facts in results["sets"].values()] == [30, 21]
    assert list(results["feature_files"].values()) == ["written", "written"]
    assert results["settings"]["nb_knn"] == [3, 5]
    assert results["weights"]["path"] == str(weights) and len(results["weights"]["sha256"]) == 64
    assert (tmp_path / "out" / "config.yaml").is_file()

    again = run(tmp_path, nb_knn=[1])  # a rerun replaces the results
    assert again["metrics"].keys() == {"full"} and again["metrics"]["full"].keys() == {"1"}
    assert again["weights"] is None


def test_data_without_labels_and_weights_that_do_not_fit_are_errors(tmp_path: Path) -> None:
    write_images(tmp_path / "flat", 3, seed=0)
    for image in (tmp_path / "flat").rglob("*.png"):
        image.rename(tmp_path / "flat" / image.name)
    words = command(tmp_path / "a")
    words[words.index("--val-dataset") + 1] = f"ImageFolder:root={tmp_path / 'flat'}"
    with pytest.raises(ValueError, match="has no labels, which this evaluation needs"):
        knn.main(knn.get_args_parser().parse_args(words))
    torch.save({"norm.weight": torch.zeros(24)}, tmp_path / "part.pth")
    with pytest.raises(ValueError, match="do not fit this backbone"):
        run(tmp_path / "b", pretrained_weights=tmp_path / "part.pth")


def test_features_that_are_not_finite_leave_no_results(tmp_path: Path) -> None:
    run(tmp_path, nb_knn=[1])
    model = tiny_backbone()
    model.patch_embed.proj.weight.data *= 1e38  # finite, but nothing computed with them is
    torch.save(model.state_dict(), tmp_path / "large.pth")
    with pytest.raises(ValueError, match="are NaN or infinite"):
        run(tmp_path, pretrained_weights=tmp_path / "large.pth")
    out = tmp_path / "out"
    assert not (out / "results_eval_knn.json").exists() and (out / "results_eval_knn.json.previous").is_file()
    assert len(list((out / "features").iterdir())) == 2, "those of the run before"


def test_images_that_are_tested_on_and_trained_on_are_in_the_results(tmp_path: Path) -> None:
    words = command(tmp_path, nb_knn=[1])
    (tmp_path / "val" / "b" / "copy.png").write_bytes((tmp_path / "train" / "r" / "0.png").read_bytes())
    knn.main(knn.get_args_parser().parse_args(words))
    results = json.loads((tmp_path / "out" / "results_eval_knn.json").read_text())
    train, val = (words[words.index(flag) + 1] for flag in ("--train-dataset", "--val-dataset"))
    assert results["equal_images"] == {
        train: {"compared": 30, "equal": 0, "with_other_labels": 0},
        val: {"compared": 22, "equal": 1, "with_other_labels": 1},
    }


@pytest.mark.parametrize("folder", ["train", "train/../train"], ids=["same name", "same files"])
def test_a_test_set_of_training_images_is_warned_of_beside_the_result(
    folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train, val = (f"ImageFolder:root={tmp_path / name}" for name in ("train", folder))
    run(tmp_path, nb_knn=[1], train_dataset=train, val_dataset=val)
    results = json.loads((tmp_path / "out" / "results_eval_knn.json").read_text())
    assert results["metrics"]["full"]["1"]["top-1"] == 100
    assert results["equal_images"][val] == {"compared": 30, "equal": 30, "with_other_labels": 0}
    *_, table, warning, _ = caplog.messages
    assert table.startswith("k-NN classification of 30 images")
    assert warning.startswith(f"all 30 images of {val} are training images: k-NN finds each image itself")
    caplog.clear()
    run(tmp_path, nb_knn=[1])
    assert "are training images" not in caplog.text


def test_images_to_test_on_have_the_value_range_of_those_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, high in (("train", 4000), ("val", 500)):
        for index in range(4):
            values = np.random.default_rng(index).integers(0, high, (28, 28), np.uint16)
            path = tmp_path / f"deep_{name}" / "ab"[index % 2] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(path)
    sets = {f"{name}_dataset": f"ImageFolder:root={tmp_path / f'deep_{name}'}" for name in ("train", "val")}
    run(tmp_path, nb_knn=[1], **sets)
    assert capsys.readouterr().out.count("0 to 4,095 is mapped to 0..255") == 2
    run(tmp_path, nb_knn=[1], opts=["images.value_range=[0,1000]"], **sets)
    assert capsys.readouterr().out.count("0 to 1,000 is mapped to 0..255") == 2
