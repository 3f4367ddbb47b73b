"""Sets l: the linear segmentation head, and inference on windows, whole images, scales and mirror images."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dinov2.models.dense import Layer, SegmentationHead, predict_probabilities, resize, slide, sliding_windows
from dinov2.models.dense.padding import Size
from dinov2.models.dense.sliding_window import MapModel, visits
from scripts.golden.comparison import Comparison
from scripts.golden.recording import Recording

HEAD_TOLERANCE = 6e-6
SLIDE_TOLERANCE, WHOLE_TOLERANCE = 5e-6, 2.5e-5
SCORE_TOLERANCE = 0.0101  # in per cent, absolute; scores are recorded with two decimals
FILE_IGNORED = 255
WHOLE_SIZE = (512, 512)  # of the published whole mode, whatever the image

# Names of the released DINOv2 heads for those of DINOv3.
_NAMES = {"batchnorm_layer.": "bn.", "conv.": "conv_seg."}


def replay_segmentation_head(recording: Recording, comparison: Comparison) -> None:
    classes = recording.json["config"]["classes"]
    for name, case in recording.json["cases"].items():
        state = _released_names(recording.inputs_below(f"{name}.w."))
        channels = sum(case["dims"]) * (2 if case["cls"] else 1)
        head = SegmentationHead(channels, classes, use_class_token=case["cls"])
        head.load_state_dict(state)
        layers = _layers(recording, name, len(case["dims"]))
        with torch.no_grad():
            logits = head.eval()(layers)
        comparison.tensor(f"{name}.eval.logits", logits, tolerance=HEAD_TOLERANCE)
        predicted = resize(logits, tuple(case["rescale"]))
        comparison.tensor(f"{name}.eval.predict", predicted, tolerance=HEAD_TOLERANCE)
        _compare_training(head.train(), layers, name, recording, comparison)


def _compare_training(
    head: SegmentationHead, layers: list[Layer], name: str, recording: Recording, comparison: Comparison
) -> None:
    label = recording.input(f"{name}.train.label")
    logits = head(layers)
    resized = resize(logits, (label.shape[-2], label.shape[-1]))
    loss = cross_entropy(resized, label, ignore_index=FILE_IGNORED, reduction="sum") / label.numel()
    loss.backward()
    ours: dict[str, Any] = {
        "logits": logits,
        "loss": loss,
        "running_mean": head.bn.running_mean,
        "running_var": head.bn.running_var,
    }
    for value in ("logits", "loss", "running_mean", "running_var"):
        comparison.tensor(f"{name}.train.{value}", ours[value], tolerance=HEAD_TOLERANCE)
    tracked = f"{name}.train.num_batches_tracked"
    comparison.exact(tracked, head.bn.num_batches_tracked, recording.tensors[tracked])
    grads = _released_names({key: key for key in recording.names(f"{name}.train.grad.")}, f"{name}.train.grad.")
    ours = {name: value.grad for name, value in head.named_parameters()}
    for parameter, key in grads.items():
        comparison.tensor(key, ours[parameter], tolerance=HEAD_TOLERANCE)


def _released_names(named: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    renamed = {}
    for key, value in named.items():
        name = key.removeprefix(prefix)
        old = next(old for old in _NAMES if name.startswith(old))
        renamed[_NAMES[old] + name.removeprefix(old)] = value
    return renamed


def _layers(recording: Recording, name: str, count: int) -> list[Layer]:
    layers = []
    for index in range(count):
        place = f"{name}.in.{index}"
        patches = recording.input(place if place in recording else f"{place}.patch")
        token = recording.input(f"{place}.cls") if f"{place}.cls" in recording else patches.new_zeros(patches.shape[:2])
        layers.append((patches, token))
    return layers


@torch.no_grad()
def replay_segmentation_inference(recording: Recording, comparison: Comparison) -> None:
    config = recording.json["config"]
    model = _small_model(recording)
    windows: dict[str, Any] = {
        "window": tuple(config["crop"]),
        "stride": tuple(config["stride"]),
        "squares_if_smaller": True,
    }

    def sliding(images: Tensor) -> Tensor:
        return slide(model, images, **windows)

    for name, case in recording.json["cases"].items():
        if name.startswith("tta."):
            continue
        x, size = recording.input(f"in.{name}.x"), tuple(case["rescale_to"])
        places = sliding_windows((x.shape[-2], x.shape[-1]), **windows)
        comparison.exact(f"{name}: windows", [[place.height, place.width] for place in places], case["windows"])
        count = f"{name}.slide.count"
        comparison.exact(count, visits((x.shape[-2], x.shape[-1]), places), recording.tensors[count])
        comparison.tensor(f"{name}.slide.logits", sliding(x), tolerance=SLIDE_TOLERANCE)
        logits = resize(sliding(x), size)
        comparison.tensor(f"{name}.slide.out", logits, tolerance=SLIDE_TOLERANCE)
        comparison.tensor(f"{name}.slide.softmax_hflip", logits.softmax(1).flip(-1), tolerance=SLIDE_TOLERANCE)
        whole = model(resize(x, WHOLE_SIZE), size)
        comparison.tensor(f"{name}.whole.out", whole, tolerance=WHOLE_TOLERANCE)
    _compare_averages(recording, comparison, sliding)


def _small_model(recording: Recording) -> Callable[..., Tensor]:
    """The recorded model: a convolution with stride 4, tanh, and a linear head; logits at the size of the image."""
    weight, bias = recording.input("w.0.conv.weight"), recording.input("w.0.conv.bias")
    dim, channels, height, width = weight.shape
    stem = nn.Conv2d(channels, dim, (height, width), stride=4, padding=1)
    stem.load_state_dict({"weight": weight, "bias": bias})
    state = _released_names(recording.inputs_below("w.1."))
    head = SegmentationHead(dim, state["conv_seg.bias"].shape[0])
    head.load_state_dict(state)
    head.eval()

    def model(images: Tensor, size: Size | None = None) -> Tensor:
        patches = stem(images).tanh()
        logits = head([(patches, patches.new_zeros(patches.shape[:2]))])
        return resize(logits, size or (images.shape[-2], images.shape[-1]))

    return model


def _compare_averages(recording: Recording, comparison: Comparison, model: MapModel) -> None:
    predictions, labels = [], []
    for name, case in recording.json["cases"].items():
        if not name.startswith("tta."):
            continue
        scales = len(case["ratios"])
        images = [recording.input(f"in.{name}.{index}.x") for index in range(2 * scales)]
        mirrored = all(torch.equal(images[i].flip(-1), images[i + scales]) for i in range(scales))
        comparison.exact(f"{name}: mirror images follow", mirrored, True)
        label = recording.input(f"in.{name}.gt")
        size = (label.shape[-2], label.shape[-1])
        probabilities = predict_probabilities(model, images[:scales], size, mirror=True)
        comparison.tensor(f"{name}.prob", probabilities, tolerance=SLIDE_TOLERANCE)
        comparison.exact(f"{name}.pred", probabilities.argmax(1), recording.tensors[f"{name}.pred"])
        predictions.append(probabilities.argmax(1).flatten())
        labels.append(label.flatten())
        comparison.leave_out("images before they are scaled", f"{name}.pil")
    scores = _scores(torch.cat(predictions), torch.cat(labels), recording.json["config"]["classes"])
    for name, value in recording.json["tta"]["metrics"].items():
        comparison.close(
            f"tta {name}", scores[name], value, tolerance=SCORE_TOLERANCE / max(1.0, abs(value)), relative=False
        )


def _scores(predicted: Tensor, labels: Tensor, classes: int) -> dict[str, float]:
    """Scores in per cent; label 0 of the files is ignored, and label 1 is class 0."""
    kept = (labels != 0) & (labels != FILE_IGNORED)
    pairs = torch.stack([labels[kept] - 1, predicted[kept]])
    counts = torch.zeros(classes, classes, dtype=torch.float64)
    counts.index_put_((pairs[0], pairs[1]), torch.ones(pairs.shape[1], dtype=torch.float64), accumulate=True)
    hits, labelled, guessed = counts.diagonal(), counts.sum(1), counts.sum(0)
    precision, recall = hits / guessed, hits / labelled
    per_class = {
        "mIoU": hits / (labelled + guessed - hits),
        "acc": recall,
        "dice": 2 * hits / (labelled + guessed),
        "precision": precision,
        "recall": recall,
        "fscore": 2 * precision * recall / (precision + recall),
    }
    means = {name: 100 * values.nanmean().item() for name, values in per_class.items()}
    return means | {"aAcc": 100 * (hits.sum() / labelled.sum()).item()}
