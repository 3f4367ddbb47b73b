"""Logistic regression is scikit-learn's, C is chosen on the right images, and the command writes what it found."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from eval_images import command, write_images
from sklearn.linear_model import LogisticRegression

from dinov2.eval import knn, linear, log_regression
from dinov2.eval.log_regression import C_VALUES, Fitter, LabeledFeatures, eval_log_regression, hold_out, sweep_C_values
from dinov2.eval.metrics import MetricType


def data(count: int, seed: int) -> LabeledFeatures:
    """Noisy features (count, 6) of four classes."""
    centers = torch.randn(4, 6, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    return LabeledFeatures(centers[labels] + torch.randn(count, 6, generator=generator), labels)


def reference(C: float, train: LabeledFeatures) -> LogisticRegression:
    estimator = LogisticRegression(C=C, tol=1e-12, max_iter=1000)
    return estimator.fit(train.features.double().numpy(), train.labels.numpy())


def accuracy(estimator: LogisticRegression, test: LabeledFeatures) -> float:
    return estimator.score(test.features.double().numpy(), test.labels.numpy())


@pytest.mark.parametrize("C", [1e-3, 1.0, 100.0])
def test_probabilities_are_those_of_scikit_learn(C: float) -> None:
    train, val = data(80, 0), data(20, 1)
    found = Fitter(num_classes=4).fit(C, train)(*val)
    expected = reference(C, train).predict_proba(val.features.double().numpy())
    torch.testing.assert_close(found["preds"], torch.from_numpy(expected), rtol=0, atol=1e-6)
    assert torch.equal(found["target"], val.labels)


def test_a_class_without_training_images_gets_probability_zero() -> None:
    train, val = data(80, 0), data(20, 1)
    kept = train.labels != 1
    found = Fitter(num_classes=5).fit(1.0, LabeledFeatures(train.features[kept], train.labels[kept]))(*val)["preds"]
    assert found.shape == (20, 5)
    assert (found[:, [1, 4]] == 0).all()
    torch.testing.assert_close(found.sum(dim=1), torch.ones(20, dtype=torch.float64))


def test_the_grid_is_the_published_one() -> None:
    assert len(C_VALUES) == 45
    assert [10**-6 * 10 ** (i / 4) for i in range(45)] == pytest.approx(C_VALUES, rel=1e-6)


def test_the_sweep_scores_every_c_on_the_images_of_the_choice() -> None:
    train, choice = data(80, 0), data(30, 2)
    scores = sweep_C_values(Fitter(num_classes=4), train, choice, [1e-4, 1e-1, 10.0])
    assert [s["top-1"] for s in scores] == [accuracy(reference(C, train), choice) for C in (1e-4, 1e-1, 10.0)]


def test_a_tenth_is_held_out_and_then_used() -> None:
    train, val = data(85, 0), data(40, 1)
    order = torch.randperm(85, generator=torch.Generator().manual_seed(0))
    rest, tenth = hold_out(train)
    assert torch.equal(tenth.features, train.features[order[:8]]) and torch.equal(rest.labels, train.labels[order[8:]])
    Cs = [1e-3, 1e-1, 10.0]
    result = eval_log_regression(train, val, fitter=Fitter(num_classes=4), C_values=Cs)
    choices = [accuracy(reference(C, rest), tenth) for C in Cs]
    assert [s["top-1"] for s in result["sweep"]] == choices
    assert result["best_C"] == Cs[choices.index(max(choices))]
    assert result["top-1"] == accuracy(reference(result["best_C"], train), val)


def test_c_is_chosen_on_the_set_that_is_given() -> None:
    train, val, finetune = data(60, 0), data(40, 1), data(30, 2)
    both = LabeledFeatures(*(torch.cat(pair) for pair in zip(train, finetune, strict=True)))
    Cs, fitter = [1e-4, 1.0], Fitter(num_classes=4)
    on_finetune = eval_log_regression(train, val, fitter=fitter, finetune=finetune, C_values=Cs)
    assert [s["top-1"] for s in on_finetune["sweep"]] == [accuracy(reference(C, train), finetune) for C in Cs]
    assert on_finetune["top-1"] == accuracy(reference(on_finetune["best_C"], both), val)
    on_val = eval_log_regression(train, val, fitter=fitter, finetune_on_val=True, C_values=Cs)
    assert on_val["top-1"] == max(s["top-1"] for s in on_val["sweep"])  # the final fit is that of the sweep


def test_the_first_of_equal_cs_wins_and_classes_are_averaged_to_compare() -> None:
    train, val = data(60, 0), data(40, 1)
    fitter = Fitter(num_classes=4, metric_type=MetricType.PER_CLASS_ACCURACY)
    result = eval_log_regression(train, val, fitter=fitter, finetune_on_val=True, C_values=[1.0, 1.0 + 1e-9])
    assert len(result["top-1"]) == 4
    assert result["best_C"] == 1.0


@pytest.mark.parametrize("counts", [(9, 0), (2, 2)])
def test_too_few_images_to_hold_some_out_are_an_error(counts: tuple[int, int]) -> None:
    words = (
        "training images of [0-9] classes are too few to hold out a tenth .*--finetune-on-val.*--finetune-dataset-str"
    )
    with pytest.raises(ValueError, match=words):
        hold_out(data(*counts))
    with pytest.raises(ValueError, match="12 training images of 12 classes are too few"):
        hold_out(LabeledFeatures(torch.randn(12, 3), torch.arange(12)))


@pytest.mark.parametrize("counts", [(10, 1), (1, 10), (1,) * 9 + (3,), (30, 1, 1, 1, 1), (11, 11)])
def test_every_class_keeps_an_image_to_fit_to(counts: tuple[int, ...]) -> None:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    rest, tenth = hold_out(LabeledFeatures(torch.arange(len(labels)), labels))
    assert rest.labels.unique().tolist() == list(range(len(counts)))
    assert len(tenth.labels) == len(labels) // 10
    assert sorted(torch.cat([rest.features, tenth.features]).tolist()) == list(range(len(labels)))


def test_a_fit_that_has_not_converged_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    train, val = data(80, 0), data(20, 1)
    result = eval_log_regression(train, val, fitter=Fitter(num_classes=4, max_iter=40), C_values=[1e-3, 1e3, 1e4])
    assert [scores["converged"] for scores in result["sweep"]] == [True, False, False]
    assert "not converged after 40 iterations (--max-train-iters): 2 of 3 fits, C = 1e+03, 1e+04" in caplog.text
    assert result["converged"] == (result["best_C"] == 1e-3)
    assert ("the final fit has not converged" in caplog.text) != result["converged"]
    caplog.clear()
    result = eval_log_regression(train, val, fitter=Fitter(num_classes=4), C_values=[1e-3, 1.0])
    assert result["converged"] and "converged" not in caplog.text


def test_devices_that_are_not_there_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    for device in ("cudaa", "meta"):
        with pytest.raises(SystemExit):
            log_regression.get_args_parser().parse_args([f"--train-features-device={device}"])
        assert f"expected cpu or, on a machine with a GPU, cuda, got '{device}'" in capsys.readouterr().err


def test_a_rare_class_does_not_end_the_command(tmp_path: Path) -> None:
    words = command(tmp_path, max_train_iters=5)
    for path in sorted((tmp_path / "train" / "b").iterdir())[1:]:
        path.unlink()
    log_regression.main(log_regression.get_args_parser().parse_args(words))
    results = json.loads((tmp_path / "out" / "results_eval_log_regression.json").read_text())
    assert results["sets"][words[words.index("--train-dataset") + 1]] == {"images": 21, "classes": 3}


def test_images_of_one_class_are_an_error_that_names_the_dataset_string(tmp_path: Path) -> None:
    words = command(tmp_path)
    shutil.rmtree(tmp_path / "train" / "b")
    shutil.rmtree(tmp_path / "train" / "g")
    for evaluation in (log_regression, knn, linear):
        with pytest.raises(ValueError, match="all 10 images of --train-dataset '.*' are of one class .label 0, r."):
            evaluation.main(evaluation.get_args_parser().parse_args(words))


def test_the_command_writes_percents_and_the_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extra = write_images(tmp_path / "extra", 12, seed=3)
    words = command(tmp_path, finetune_dataset_str=extra, metric_type="mean_per_class_accuracy")
    log_regression.main(log_regression.get_args_parser().parse_args(words))
    results = json.loads((tmp_path / "out" / "results_eval_log_regression.json").read_text())
    metrics = results["metrics"]
    assert 80 < metrics["top-1"] <= 100
    assert [s["C"] for s in metrics["sweep"]] == C_VALUES
    best = max(metrics["sweep"], key=lambda s: s["top-1"])
    assert metrics["best_C"] == best["C"]
    assert results["settings"]["metric_type"] == "mean_per_class_accuracy"
    assert [facts["images"] for facts in results["sets"].values()] == [30, 21, 12]
    assert list(results["feature_files"].values()) == ["written"] * 3
    log = capsys.readouterr().out
    table = log.rpartition("logistic regression on 21 images of 3 classes, accuracy in %\n")[2].splitlines()
    assert table[0].split() == ["best", "C", "top-1", "top-5"]
    assert table[1].split() == [f"{metrics['best_C']:.3g}", f"{metrics['top-1']:.2f}", "-"]

    log_regression.main(log_regression.get_args_parser().parse_args(command(tmp_path, finetune_on_val=True)))
    again = json.loads((tmp_path / "out" / "results_eval_log_regression.json").read_text())
    assert len(again["sets"]) == 2 and list(again["feature_files"].values()) == ["read"] * 2
