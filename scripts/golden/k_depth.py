"""Sets k: depth heads, whole depth estimators, and the names and shapes of the released heads."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import relu

from dinov2.hub import depthers
from dinov2.models import ARCHS
from dinov2.models.dense import Depther, DPTDepthHead, Layer, LinearDepthHead, center_pad
from dinov2.models.published import weights_url
from dinov2.models.vision_transformer import DinoVisionTransformer
from scripts.golden.comparison import Comparison
from scripts.golden.recording import Recording

TOLERANCE = 1.2e-5

_SPACINGS = {"UD": "uniform"}
_LAYERS = {"linear": 1, "linear4": 4}


@torch.no_grad()
def replay_depth_heads(recording: Recording, comparison: Comparison) -> None:
    for name, case in recording.json["cases"].items():
        options = case["options"]
        head = _dpt_head(options) if "post_process_channels" in options else _linear_head(options)
        head.load_state_dict(recording.inputs_below(f"{name}.w."))
        layers = _layers(recording, f"{name}.in.", range(len(recording.matches(rf"{name}\.in\.(\d+)\.cls"))))
        compare = partial(_compare, comparison, name)
        compare("depth", head(layers))
        if isinstance(head, DPTDepthHead):
            _compare_stages(head, layers, compare, recording, name)
        else:
            compare("logits.img0", head.logits(layers)[:1])
            compare("bins", head.bins())


def _compare(comparison: Comparison, case: str, name: str, ours: Tensor) -> None:
    comparison.tensor(f"{case}.{name}", ours, tolerance=TOLERANCE)


def _compare_stages(head: DPTDepthHead, layers: list[Layer], compare: Any, recording: Recording, name: str) -> None:
    reassembled, maps = head.reassemble_blocks(layers), head.maps(layers)
    fused = head.fuse(maps)
    for index, (first, second, third) in enumerate(zip(reassembled, maps, fused, strict=True)):
        compare(f"reassemble.{index}.img0", first[:1])
        # Maps that the published fusion reads without resizing them were recorded after its ReLU in place.
        in_place = bool((recording.tensors[f"{name}.conv.{index}.img0"] >= 0).all())
        compare(f"conv.{index}.img0", relu(second[:1]) if in_place else second[:1])
        compare(f"fusion.{index}.img0", third[:1])
    projected = relu(head.project(fused[-1]))
    compare("project.img0", projected[:1])
    compare("prerelu", head.conv_depth(projected))


def _linear_head(options: dict[str, Any]) -> LinearDepthHead:
    if "in_channels" not in options:  # made by the function of the hub, with its range
        channels = 2 * options["embed_dim"] * options["layers"]
        return LinearDepthHead(channels, min_depth=options["head_min_depth"], max_depth=options["head_max_depth"])
    if not options["classify"] or options["input_transform"] != "resize_concat":
        raise ValueError(f"there is no linear depth head with these options: {options}")
    if list(options["in_index"]) != list(range(len(options["in_channels"]))):
        raise ValueError(f"layers are recorded in another order: {options['in_index']}")
    return LinearDepthHead(
        2 * sum(options["in_channels"]),
        num_bins=options["n_bins"],
        min_depth=options["min_depth"],
        max_depth=options["max_depth"],
        upsample=options["upsample"],
        norm=options["norm_strategy"],
        spacing=_SPACINGS[options["bins_strategy"]],
        align_corners=options["align_corners"],
    )


def _dpt_head(options: dict[str, Any]) -> DPTDepthHead:
    return DPTDepthHead(
        options["embed_dims"],
        channels=options["channels"],
        post_channels=options["post_process_channels"],
        readout=options["readout_type"],
        min_depth=options["min_depth"],
        max_depth=options["max_depth"],
    )


def _layers(recording: Recording, prefix: str, indices: Sequence[int]) -> list[Layer]:
    return [(recording.input(f"{prefix}{i}.patch"), recording.input(f"{prefix}{i}.cls")) for i in indices]


@torch.no_grad()
def replay_depthers(recording: Recording, comparison: Comparison) -> None:
    settings = recording.json["vit_kwargs"]
    backbone = DinoVisionTransformer(**settings)
    backbone.load_state_dict(recording.inputs_below("w.backbone."))
    images = {match[1]: recording.input(match[0]) for match in recording.matches(r"in\.(i\d+)\.x")}
    for label, x in images.items():
        comparison.exact(f"padded.{label}", center_pad(x, settings["patch_size"]), recording.tensors[f"padded.{label}"])
    for name, case in recording.json["cases"].items():
        head = _case_head(recording, name, case, backbone.embed_dim)
        depther = Depther(backbone, head, blocks=case["out_index"], norm=False).eval()
        for label, x in images.items():
            for index, (patches, token) in enumerate(depther.features(x)):
                place = f"feat.{label}.{index + 4 - len(depther.blocks)}"
                comparison.tensor(f"{place}.patch", patches, tolerance=TOLERANCE)
                comparison.tensor(f"{place}.cls", token, tolerance=TOLERANCE)
            _compare_depth(depther, x, case, partial(_compare, comparison, f"{name}.{label}"))


def _case_head(recording: Recording, name: str, case: dict[str, Any], width: int) -> LinearDepthHead | DPTDepthHead:
    state = recording.inputs_below(f"{name}.w.")
    depths: dict[str, Any] = {"min_depth": case["head_min_depth"], "max_depth": case["head_max_depth"]}
    head: LinearDepthHead | DPTDepthHead
    if "conv_depth.weight" in state:
        head = LinearDepthHead(2 * width * case["layers"], **depths)
    else:
        head = DPTDepthHead(width, channels=state["project.conv.weight"].shape[0], **depths)
    head.load_state_dict(state)
    return head


def _compare_depth(depther: Depther, x: Tensor, case: dict[str, Any], compare: Any) -> None:
    compare("raw", depther.decode_head(depther.extract_feat(x)))
    compare("norescale", depther.encode_decode(x, None, rescale=False))
    compare("depth", depther.encode_decode(x, None))
    compare("depth", depther(x))
    compare("depth_resized", depther.whole_inference(x, None, True, size=tuple(case["size"])))
    mirrored = [{"flip": True, "flip_direction": "horizontal"}] * len(x)
    averaged = depther.aug_test([x, x.flip(-1)], [[{"flip": False}] * len(x), mirrored])
    compare("aug", torch.stack([torch.from_numpy(depth) for depth in averaged]))
    windows = {"stride": tuple(case["slide"]["stride"]), "crop_size": tuple(case["slide"]["crop"])}
    compare("slide", depther.slide_inference(x, None, True, **windows))
    compare("slide", depther.inference(x, None, True, mode="slide", **windows))


def replay_depth_names(recording: Recording, comparison: Comparison) -> None:
    letters = {"s": "vit_small", "b": "vit_base", "l": "vit_large", "g": "vit_giant2"}
    for table, heads in recording.json["tables"].items():
        arch = letters[table.removeprefix("vit").removesuffix("14")]
        assert arch in ARCHS, "a published backbone"
        for kind, datasets in heads.items():
            keys: Any = None
            for weights, recorded in datasets.items():
                keys = keys if isinstance(recorded["keys"], str) else recorded["keys"]
                label = f"{table} {kind} {weights}"
                model = _depther(arch, kind, weights)
                _compare_names(comparison, label, model, recorded, keys)
                comparison.exact(f"{label}: file", _file_name(arch, kind, weights), recorded["file"])
                data_range = list(depthers.DEPTH_RANGES[weights])
                comparison.exact(f"{label}: range of the data", data_range, recorded["depth_range"])
                blocks = recording.json["backbone_out_index"][kind][table]
                comparison.exact(f"{label}: blocks", list(model.blocks), blocks)


def _depther(arch: str, kind: str, weights: str) -> Depther:
    with torch.device("meta"):  # shapes need no memory
        options: dict[str, Any] = {"head": "dpt"} if kind == "dpt" else {"layers": _LAYERS[kind]}
        return depthers.make_depther(arch, weights=weights, pretrained=False, **options)


def _file_name(arch: str, kind: str, weights: str) -> str:
    content = depthers.content_name("dpt" if kind == "dpt" else "linear", _LAYERS.get(kind, 4), weights)
    return weights_url(arch, content, registers=False).rpartition("/")[2]


def _compare_names(comparison: Comparison, label: str, model: Depther, recorded: dict[str, Any], keys: Any) -> None:
    state = {name: list(value.shape) for name, value in model.state_dict().items() if "backbone." not in name}
    comparison.exact(f"{label}: names and shapes", state, keys)
    head: Any = model.decode_head
    count = sum(parameter.numel() for parameter in head.parameters())
    comparison.exact(f"{label}: parameters", count, recorded["parameters"])
    comparison.exact(f"{label}: range of the head", [head.min_depth, head.max_depth], recorded["head_range"])
