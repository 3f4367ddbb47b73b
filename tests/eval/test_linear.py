"""The linear evaluation trains each classifier as if it were alone, resumes exactly, and writes what it found."""

import json
import os
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_images import ImageSet, command, draw, encoded, tiny_backbone, to_tensor, write_images
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dinov2.data.datasets import ImageNet
from dinov2.eval import knn, linear, log_regression
from dinov2.eval.features import ModelWithIntermediateLayers
from dinov2.eval.linear import Periods, eval_linear
from dinov2.eval.linear_data import make_train_loader
from dinov2.eval.linear_heads import (
    LinearGrid,
    LinearPostprocessor,
    classifier_names,
    classifiers_from_state_dict,
    create_linear_input,
    scale_lr,
    setup_linear_classifiers,
)
from dinov2.flags.evaluation import LEARNING_RATES

RATES = (0.01, 0.1)
BATCH_SIZE, MAX_ITER = 4, 8
PERIODS = Periods(max_iter=MAX_ITER, eval_period=3, checkpoint_period=2, kept_checkpoint_period=4)


def noisy(image: object) -> Tensor:
    """A random augmentation."""
    tensor = to_tensor(image)
    return tensor + 0.3 * torch.randn(tensor.shape)


class Experiment:
    """A small grid on the tokens of a small backbone."""

    def __init__(self, rates: tuple[float, ...] = RATES) -> None:
        self.tokens = ModelWithIntermediateLayers(tiny_backbone(), 4)
        self.images = ImageSet(10, transform=noisy)
        self.grid = self.make_grid(rates)
        self.num_validations = 0

    def make_grid(self, rates: tuple[float, ...]) -> LinearGrid:
        return setup_linear_classifiers(self.tokens(torch.zeros(1, 3, 16, 16)), [1, 4], rates, BATCH_SIZE, 3)

    def batches_from(self, iteration: int) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(make_train_loader(iteration, dataset=self.images, batch_size=BATCH_SIZE, num_workers=0))

    def validate(self) -> dict:
        self.num_validations += 1
        return {name: {"top-1": head.linear.bias[0].item()} for name, head in self.grid.classifiers.by_name().items()}

    def train(self, folder: Path, resume: bool = True, run: dict | None = None) -> list[dict]:
        return eval_linear(
            self.tokens,
            *self.grid,
            self.batches_from,
            self.validate,
            PERIODS,
            output_dir=folder,
            resume=resume,
            run=run or {},
        )


def assert_equal(ours: nn.Module, other: nn.Module) -> None:
    theirs = other.state_dict()
    assert ours.state_dict().keys() == theirs.keys()
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs[name]), name


def test_the_inputs_are_the_tokens_that_the_options_name() -> None:
    blocks = [(torch.randn(2, 4, 3), torch.randn(2, 3)) for _ in range(4)]
    torch.testing.assert_close(create_linear_input(blocks, 1, False), blocks[3][1])
    torch.testing.assert_close(
        create_linear_input(blocks, 2, True), torch.cat([blocks[2][1], blocks[3][1], blocks[3][0].mean(1)], dim=1)
    )
    half = [(patches.half(), cls.half()) for patches, cls in blocks]
    assert create_linear_input(half, 4, True).dtype == torch.float32


def test_each_classifier_of_the_grid_ends_as_one_trained_alone(tmp_path: Path) -> None:
    experiment = Experiment()
    start = experiment.make_grid(RATES).classifiers.by_name()
    experiment.train(tmp_path)
    trained = experiment.grid.classifiers.by_name()
    assert len(trained) == 2 * 2 * len(RATES)
    for (name, head), rate in zip(trained.items(), RATES * 4, strict=True):
        alone = start[name]
        velocity = [torch.zeros_like(p) for p in alone.parameters()]
        batches = experiment.batches_from(0)
        for iteration in range(MAX_ITER):
            images, labels = next(batches)
            loss = cross_entropy(alone(experiment.tokens(images)), labels)
            gradients = torch.autograd.grad(loss, list(alone.parameters()))
            lr = rate * BATCH_SIZE / 256 * 0.5 * (1 + np.cos(np.pi * iteration / MAX_ITER))
            with torch.no_grad():
                for parameter, momentum, gradient in zip(alone.parameters(), velocity, gradients, strict=True):
                    momentum.mul_(0.9).add_(gradient)
                    parameter.sub_(lr * momentum)
        torch.testing.assert_close(head.linear.weight, alone.linear.weight)
        torch.testing.assert_close(head.linear.bias, alone.linear.bias)


def test_an_interrupted_run_ends_as_one_that_was_not(tmp_path: Path) -> None:
    for folder in ("whole", "cut"):
        (tmp_path / folder).mkdir()
    whole = Experiment()
    history = whole.train(tmp_path / "whole")
    assert [record["iteration"] for record in history] == [3, 6]
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert names == {
        "running_checkpoint_linear_eval.pth", "model_0000003.pth", "model_0000007.pth", "model_final.pth",
        "last_checkpoint",
    }  # fmt: skip

    cut = Experiment()
    cut.batches_from = lambda iteration: islice(Experiment.batches_from(cut, iteration), 5)
    cut.train(tmp_path / "cut")  # the data end after 5 of 8 iterations; the last checkpoint is that after 4
    resumed = Experiment()
    assert resumed.train(tmp_path / "cut") == history
    assert resumed.num_validations == 1
    assert_equal(resumed.grid.classifiers, whole.grid.classifiers)


def test_a_finished_run_does_no_more_steps(tmp_path: Path) -> None:
    first, second = Experiment(), Experiment()
    first.train(tmp_path)
    second.batches_from = lambda iteration: pytest.fail("no data are needed") if iteration < MAX_ITER else []
    second.train(tmp_path)
    assert_equal(first.grid.classifiers, second.grid.classifiers)


def test_a_checkpoint_of_another_run_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    Experiment().train(tmp_path, run={"weights": "abc"})
    with pytest.raises(ValueError, match="belongs to another run .weights: 'abc' then, 'xyz' now.; start anew"):
        Experiment().train(tmp_path, run={"weights": "xyz"})
    Experiment().train(tmp_path, run={"weights": "xyz"}, resume=False)
    (tmp_path / "model_final.pth").write_bytes(b"half a file")
    with pytest.raises(ValueError, match="model_final.pth is .*damaged.*; start anew with --no-resume"):
        Experiment().train(tmp_path, run={"weights": "xyz"})
    (tmp_path / "model_final.pth").unlink()
    with pytest.raises(ValueError, match="last_checkpoint names model_final.pth, which is missing; start anew"):
        Experiment().train(tmp_path, run={"weights": "xyz"})


def test_augmentation_depends_on_the_position_alone() -> None:
    make = partial(make_train_loader, dataset=ImageSet(10, transform=noisy), batch_size=3)
    here = list(islice(make(0, num_workers=0), 6))
    torch.manual_seed(123)
    later = list(islice(make(4, num_workers=2), 2))
    for expected, found in zip(here[4:], later, strict=True):
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert len({images.numpy().tobytes() for images, _ in here}) == 6


def test_names_are_the_published_ones_and_distinguish_all_rates() -> None:
    assert scale_lr(1e-3, 128, 8) == pytest.approx(4e-3)
    assert classifier_names(4, True, [4e-3]) == ["classifier_4_blocks_avgpool_True_lr_0_00400"]
    halved = [rate / 2 for rate in LEARNING_RATES]  # one process with batches of 128
    names = classifier_names(1, False, halved)
    assert len(set(names)) == 13
    assert names[:2] == [
        "classifier_1_blocks_avgpool_False_lr_0_000005",
        "classifier_1_blocks_avgpool_False_lr_0_000010",
    ]
    with pytest.raises(ValueError, match="must differ"):
        classifier_names(1, False, [0.1, 0.1])


def test_classifiers_are_rebuilt_from_a_checkpoint_alone() -> None:
    classifiers = Experiment().grid.classifiers
    rebuilt = classifiers_from_state_dict(classifiers.state_dict(), "a.pth")
    assert_equal(rebuilt, classifiers)
    tokens = [(torch.randn(2, 4, 24), torch.randn(2, 24)) for _ in range(4)]
    expected = classifiers(tokens)
    for name, logits in rebuilt(tokens).items():
        assert torch.equal(logits, expected[name])
    with pytest.raises(ValueError, match="no linear classifiers in a.pth; found: norm.weight"):
        classifiers_from_state_dict({"norm.weight": torch.zeros(3)}, "a.pth")


def test_a_class_mapping_picks_logits() -> None:
    classifier = next(iter(Experiment().grid.classifiers.by_name().values()))
    tokens = [(torch.randn(2, 4, 24), torch.randn(2, 24)) for _ in range(4)]
    result = LinearPostprocessor(classifier, torch.tensor([2, 0]))(tokens, torch.tensor([1, 0]))
    assert torch.equal(result["preds"], classifier(tokens)[:, [2, 0]])


def test_the_first_of_the_best_is_chosen_also_when_none_is_right() -> None:
    assert linear.best_of({"a": {"top-1": 0.0}, "b": {"top-1": 0.0}}) == "a"
    assert linear.best_of({"a": {"top-1": [0.5, 0.1]}, "b": {"top-1": [0.2, 0.6]}}) == "b"


def test_features_of_training_images_that_are_not_finite_end_it(tmp_path: Path) -> None:
    experiment = Experiment()
    experiment.images.transform = lambda image: to_tensor(image) * torch.inf
    with pytest.raises(ValueError, match="the features of image 0 of the batch of iteration 0 are NaN or infinite"):
        experiment.train(tmp_path)


def test_validations_of_other_images_are_forgotten(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def train(validated_on: str) -> list[dict]:
        experiment = Experiment()
        arguments = (experiment.batches_from, experiment.validate, PERIODS)
        options = {"output_dir": tmp_path, "resume": True, "run": {}, "validated_on": validated_on}
        return eval_linear(experiment.tokens, *experiment.grid, *arguments, **options)

    history = train("some")
    assert len(history) == 2 and train("some") == history
    assert train("others") == [] and "its validations were on other images and are discarded" in caplog.text


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("last_checkpoint", b"\xff\0"),
        ("last_checkpoint", b""),
        ("last_checkpoint", b"../model_final.pth"),
        ("model_final.pth", {"model": {}, "run": {}}),
        ("model_final.pth", {"model": 3}),
        ("model_final.pth", {"iteration": "seven"}),
        ("model_final.pth", {"history": [1]}),
        ("model_final.pth", {"optimizer": {"state": {}}}),
        ("model_final.pth", {"run": [1]}),
    ],
)
def test_what_a_run_left_is_checked(file: str, content: bytes | dict, tmp_path: Path) -> None:
    Experiment().train(tmp_path, run={"weights": "abc"})
    if isinstance(content, dict):
        content = torch.load(tmp_path / file, weights_only=True) | content
        torch.save(content, tmp_path / file)
    else:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=f"{file} (is damaged|is (not a|no) checkpoint|belongs to another run)"):
        Experiment().train(tmp_path, run={"weights": "abc"})


class Code:
    """What a checkpoint must not hold: to read it means to run code."""


@pytest.mark.parametrize("zipped", [True, False])
def test_the_error_does_not_advise_to_run_the_code_in_a_checkpoint(zipped: bool, tmp_path: Path) -> None:
    Experiment().train(tmp_path)
    torch.save({"model": Code()}, tmp_path / "model_final.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"model_final\.pth is no checkpoint of plain tensors.*Code") as refusal:
        Experiment().train(tmp_path)
    error: BaseException | None = refusal.value
    while error is not None:
        assert "weights_only" not in str(error)
        error = error.__cause__


def test_a_flipped_bit_in_a_checkpoint_is_noticed(tmp_path: Path) -> None:
    experiment = Experiment()
    experiment.train(tmp_path)
    data = bytearray((tmp_path / "model_final.pth").read_bytes())
    weight = next(iter(experiment.grid.classifiers.by_name().values())).linear.weight.detach().numpy().tobytes()
    data[data.index(weight) + 10] ^= 1
    (tmp_path / "model_final.pth").write_bytes(data)
    with pytest.raises(ValueError, match=r"model_final\.pth is .*damaged"):
        Experiment().train(tmp_path)


def run(folder: Path, **options: object) -> dict:
    linear.main(linear.get_args_parser().parse_args(command(folder, **options)))
    return json.loads((folder / "out" / "results_eval_linear.json").read_text())


def test_the_command_trains_tests_and_evaluates_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_images(tmp_path / "other", 9, seed=5)
    np.save(tmp_path / "swapped.npy", np.array([1, 0, 2]))
    options = {
        "epochs": 2,
        "epoch_length": 20,
        "eval_period_iterations": 20,
        "batch_size": 16,
        "learning_rates": [0.01, 0.1],
        "test_datasets": [other, other],
        "test_metric_types": ["mean_accuracy", "mean_per_class_accuracy"],
        "test_class_mapping_fpaths": [str(tmp_path / "swapped.npy"), "None"],
    }
    record = run(tmp_path, **options)
    results = record["metrics"]
    assert len(results["val"]) == 8
    assert [facts["images"] for facts in record["sets"].values()] == [30, 21, 9]
    features = tmp_path / "out" / "features"
    assert record["feature_files"] == {str(path): "written" for path in features.iterdir()}
    assert len(record["feature_files"]) == 2, "validation and test set, each once"
    assert record["seconds"]["features"] > 0 < record["seconds"]["rest"]
    table = capsys.readouterr().out.rpartition("linear classification, best on validation: ")[2].splitlines()
    assert table[0] == f"{results['best_classifier']['name']}, accuracy in %"
    assert table[2].split()[0] == "validation" and table[2].split()[-3:-1] == [
        "21",
        f"{results['best_classifier']['top-1']:.2f}",
    ]
    assert [line.split()[0] for line in table[3:5]] == ["test", "test"]
    best = results["best_classifier"]
    assert 80 < best["top-1"] == max(scores["top-1"] for scores in results["val"].values())
    assert [record["iteration"] for record in results["history"]] == [20, 40]
    assert [test["metric"] for test in results["test"]] == ["mean_accuracy", "mean_per_class_accuracy"]
    assert results["test"][0]["top-1"] < 50 < results["test"][1]["top-1"]  # red is called green in the first
    checkpoint = tmp_path / "out" / "model_final.pth"
    before = checkpoint.read_bytes()

    # Evaluating what is there trains nothing, whatever the batch size that the rates were scaled for.
    options = {
        "classifier_fpath": str(checkpoint),
        "batch_size": 7,
        "val_class_mapping_fpath": str(tmp_path / "swapped.npy"),
    }
    swapped = run(tmp_path, **options)["metrics"]
    assert checkpoint.read_bytes() == before
    assert swapped["val"].keys() == results["val"].keys()
    assert swapped["val"][best["name"]]["top-1"] < 50
    assert swapped["test"] == []
    again = run(tmp_path, classifier_fpath=str(checkpoint))
    assert again["metrics"]["val"] == results["val"]
    assert list(again["feature_files"].values()) == ["read"]
    uncached = run(tmp_path, classifier_fpath=str(checkpoint), feature_cache="none")
    assert uncached["metrics"]["val"] == results["val"] and uncached["feature_files"] == {}


def test_rates_that_diverge_are_not_chosen_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, epochs=1, epoch_length=6, batch_size=8, learning_rates=[0.1, 0.2])
    checkpoint = tmp_path / "out" / "model_final.pth"
    state = torch.load(checkpoint, weights_only=True)
    for rate, left in (("00313", 4), ("00625", 0)):
        for name, value in state["model"].items():
            if name.endswith(f"{rate}.linear.weight"):
                value[0] = torch.nan  # of which topk makes the surest class
        torch.save(state, checkpoint)
        if left:
            metrics = run(tmp_path, classifier_fpath=checkpoint)["metrics"]
            assert [len(metrics[key]) for key in ("val", "diverged")] == [left, 4]
            assert all("00625" in name for name in [*metrics["val"], metrics["best_classifier"]["name"]])
            assert all(rate in name for name in metrics["diverged"])
            assert f"diverged and excluded: {metrics['diverged'][0]}" in caplog.text
    with pytest.raises(ValueError, match="no classifier is left for .*use smaller --learning-rates"):
        run(tmp_path, classifier_fpath=checkpoint)
    assert not (tmp_path / "out" / "results_eval_linear.json").exists()


def test_other_images_under_the_same_names_are_not_resumed_with(tmp_path: Path) -> None:
    options = {"epochs": 1, "epoch_length": 4, "batch_size": 8, "learning_rates": [0.1]}
    run(tmp_path, **options)
    os.utime(tmp_path / "val" / "r" / "0.png", (0, 0))
    run(tmp_path, **options)  # which is only tested on
    os.utime(tmp_path / "train" / "r" / "0.png", (0, 0))
    with pytest.raises(ValueError, match="belongs to another run .names, sizes, times and labels .*--no-resume"):
        run(tmp_path, **options)
    with pytest.raises(ValueError, match="random, seed 0' then, 'random, seed 3' now"):
        run(tmp_path, **options, opts=["train.seed=3"])
    run(tmp_path, **options, no_resume=True)


def test_sets_that_no_classifier_fits_are_refused_before_training(tmp_path: Path) -> None:
    options = {"epochs": 1, "epoch_length": 2, "batch_size": 64, "learning_rates": [0.1]}  # more than there are images
    run(tmp_path, **options)
    classifiers = str(tmp_path / "out" / "model_final.pth")
    with pytest.raises(ValueError, match="are for another backbone: .* takes 24 features, and this one has 48"):
        run(tmp_path, classifier_fpath=classifiers, opts=["student.embed_dim=48"])
    np.save(tmp_path / "text.npy", np.array(["a"]))
    (tmp_path / "empty.npy").write_bytes(b"")
    for name, message in (("text", "must be a list of integers"), ("empty", "cannot read the class mapping")):
        with pytest.raises(ValueError, match=message):
            run(tmp_path, **options, val_class_mapping_fpath=tmp_path / f"{name}.npy")
    lists = {"train": "r/0.png\t0\nb/2.png\t1\n", "val": "r/0.png\t0\nb/2.png\t2\n"}
    for name, text in lists.items():
        (tmp_path / name / "list.tsv").write_text(text)
    words = command(tmp_path, **options)
    for name in lists:
        words[words.index(f"--{name}-dataset") + 1] = f"ImageList:file={tmp_path / name / 'list.tsv'}"
    with pytest.raises(ValueError, match="val/list.tsv has labels up to 2, but there are 2 classes"):
        linear.main(linear.get_args_parser().parse_args(words))


def test_lists_that_do_not_match_the_test_sets_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--test-metric-types has 1 values for 2 --test-datasets"):
        run(tmp_path, test_datasets=["ImageFolder:root=a", "ImageFolder:root=b"], test_metric_types=["mean_accuracy"])


# --- ImageNet-ReaL ---------------------------------------------------------------------------------------------------


def write_image_net(root: Path) -> None:
    """ImageNet with three classes in its real layout: 21 validation images of the classes 0, 1, 2, 0, 1, ..."""
    rng = np.random.default_rng(0)
    class_ids = ("n01440764", "n01443537", "n02124075")
    for number in range(1, 31):
        label = (number - 1) % 3
        names = [f"train/{class_ids[label]}/{class_ids[label]}_{number}.JPEG"]
        names += [f"val/{class_ids[label]}/ILSVRC2012_val_{number:08d}.JPEG"] if number <= 21 else []
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(encoded(draw(label, rng)))
    (root / "labels.txt").write_text("".join(f"{class_id},{class_id}\n" for class_id in class_ids))
    for split in (ImageNet.Split.TRAIN, ImageNet.Split.VAL):
        ImageNet(split=split, root=root, extra=root).dump_extra()


def test_reassessed_labels_count_with_any_right_one_and_without_unlabeled_images(tmp_path: Path) -> None:
    root = tmp_path / "imagenet"
    write_image_net(root)
    train, val = (f"ImageNet:split={split}:root={root}:extra={root}" for split in ("TRAIN", "VAL"))
    reals = []
    for name, lists in {
        "as before": [[0], [1], [2]] * 7,
        "all wrong": [[1], [2], [0]] * 7,
        "generous": [[], [1, 2, 0], [2, 1]] * 7,
    }.items():
        (tmp_path / name).write_text(json.dumps(lists + [[]] * (50_000 - 21)))
        reals.append(f"{val}:real={tmp_path / name}")
    options = {"epochs": 1, "epoch_length": 40, "batch_size": 8, "learning_rates": [0.1], "test_datasets": reals}
    words = command(tmp_path, **options, test_metric_types=["imagenet_real_accuracy"] * 3)
    words[words.index("--train-dataset") + 1], words[words.index("--val-dataset") + 1] = train, val
    linear.main(linear.get_args_parser().parse_args(words))
    results = json.loads((tmp_path / "out" / "results_eval_linear.json").read_text())
    before, wrong, generous = (test["top-1"] for test in results["metrics"]["test"])
    assert 80 < before == results["metrics"]["best_classifier"]["top-1"]
    assert wrong <= 100 - before and generous >= 80
    assert [results["sets"][name]["images"] for name in (val, *reals)] == [21, 21, 21, 14]

    words = command(tmp_path)
    words[words.index("--train-dataset") + 1], words[words.index("--val-dataset") + 1] = train, reals[0]
    for evaluation in (knn, log_regression, linear):
        with pytest.raises(ValueError, match="has lists of labels, which only the metric imagenet_real_accuracy"):
            evaluation.main(evaluation.get_args_parser().parse_args(words))


def test_sets_of_other_classes_are_refused_in_every_role(tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_images(other, 6, seed=3)
    (other / "b").rename(other / "yak")
    trained = command(tmp_path / "a", epochs=1, epoch_length=2, batch_size=4, learning_rates=[0.1])
    linear.main(linear.get_args_parser().parse_args(trained))
    classifiers = tmp_path / "a" / "out" / "model_final.pth"
    np.save(tmp_path / "map.npy", [0, 1, 9])
    tested = ["--test-datasets", f"ImageFolder:root={other}"]
    for words, message in (
        ([*trained, *tested], "has other classes than the training images.*yak"),
        (
            [*trained, *tested, "--classifier-fpath", str(classifiers)],
            "has other classes than the training images.*yak",
        ),
        ([*trained, *tested, "--test-class-mapping-fpaths", str(tmp_path / "map.npy")], "from 0 to 9, but there are 3"),
        ([*trained, "--val-metric-type", "imagenet_real_accuracy"], "needs a list of labels per image.*real="),
    ):
        with pytest.raises(ValueError, match=message):
            linear.main(linear.get_args_parser().parse_args(words))
    words = [*trained, "--classifier-fpath", str(classifiers), "--val-dataset", f"ImageFolder:root={other}"]
    with pytest.raises(ValueError, match="has other classes than the training images"):
        linear.main(linear.get_args_parser().parse_args(words))
