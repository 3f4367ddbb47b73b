"""Set a: backbones, position embeddings, and one block with stochastic depth."""

from typing import Any

import torch
from torch import Tensor

from dinov2.layers import Mlp, NestedTensorBlock, SwiGLUFFN
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.models.weights import flatten_block_names
from scripts.golden.comparison import Comparison
from scripts.golden.recording import Recording


@torch.no_grad()
def replay_backbone(recording: Recording, comparison: Comparison) -> None:
    model = DinoVisionTransformer(**recording.json["vit_kwargs"]).eval()
    model.load_state_dict(flatten_block_names(recording.inputs_below("w.")))
    for case in recording.json["cases"]:
        tag = case["tag"]
        x = recording.input(f"in.{tag}.x")
        comparison.exact(f"{tag}: height and width", list(x.shape[-2:]), [case["H"], case["W"]])
        masked = model.forward_features(x, recording.input(f"in.{tag}.mask"))
        _compare_features(comparison, f"out.{tag}.mask.", masked)
        _compare_features(comparison, f"out.{tag}.nomask.", model.forward_features(x))
        positions = model.interpolate_pos_encoding(x, case["H"], case["W"])
        comparison.tensors({f"out.{tag}.forward": model(x), f"out.{tag}.pos": positions})
        for name, options in recording.json["get_intermediate_layers"].items():
            _compare_intermediate_layers(comparison, f"out.{tag}.gil.{name}.", model, x, options)
    if not recording.names("in.list."):
        return
    crops = [recording.input("in.list.global"), recording.input("in.list.local")]
    features = model.forward_features(crops, [recording.input("in.list.mask_global"), None])
    for index, crop_features in enumerate(features):
        _compare_features(comparison, f"out.list.{index}.", crop_features)


def _compare_features(comparison: Comparison, prefix: str, features: Any) -> None:
    for name in comparison.recording.names(prefix):
        comparison.tensor(name, features[name.removeprefix(prefix)])


def _compare_intermediate_layers(
    comparison: Comparison, prefix: str, model: DinoVisionTransformer, x: Tensor, options: dict[str, Any]
) -> None:
    if not comparison.recording.names(prefix):
        return  # not every option was recorded for every size
    ours: dict[str, Tensor] = {}
    layers: Any = model.get_intermediate_layers(x, **options)
    for index, layer in enumerate(layers):
        parts = layer if options.get("return_class_token") else (layer,)
        ours |= {f"{prefix}{index}.{part}": tokens for part, tokens in zip(("patch", "cls"), parts, strict=False)}
    comparison.exact(f"{prefix}*: outputs", sorted(ours), sorted(comparison.recording.names(prefix)))
    comparison.tensors(ours)


@torch.no_grad()
def replay_posembed(recording: Recording, comparison: Comparison) -> None:
    table = recording.input("pos_embed")
    patch = recording.json["patch_size"]
    for item in recording.json["items"]:
        model = DinoVisionTransformer(
            patch_size=patch,
            img_size=recording.json["img_size"],
            embed_dim=table.shape[-1],
            depth=0,
            num_heads=1,
            interpolate_offset=item["offset"],
            interpolate_antialias=item["antialias"],
        )
        model.pos_embed.copy_(table)
        height, width = item["grid_h"] * patch, item["grid_w"] * patch
        comparison.tensor(f"out.{item['tag']}", model.interpolate_pos_encoding(table, height, width))


def replay_block(recording: Recording, comparison: Comparison) -> None:
    for case in recording.json["cases"]:
        prefix = case["name"] + "."
        weights = recording.inputs_below(f"{prefix}w.")
        block = _block(case, weights).train()
        block.load_state_dict(weights)
        xs = [recording.input(match[0]).requires_grad_() for match in recording.matches(rf"{prefix}x(\d+)")]
        dys = [recording.input(match[0]) for match in recording.matches(rf"{prefix}dy(\d+)")]

        torch.manual_seed(case["torch_manual_seed_before_forward"])
        ys = block(xs) if case["list_input"] else [block(xs[0])]
        torch.autograd.backward(ys, dys)

        ours = {f"{prefix}y{index}": y for index, y in enumerate(ys)}
        ours |= {f"{prefix}dx{index}": x.grad for index, x in enumerate(xs) if x.grad is not None}
        ours |= {f"{prefix}dw.{name}": p.grad for name, p in block.named_parameters() if p.grad is not None}
        comparison.tensors(ours)
        _compare_choices(comparison, prefix, case)


def _compare_choices(comparison: Comparison, prefix: str, case: dict[str, Any]) -> None:
    """That the recorded choices are what the seed gives. Outputs that agree then show that our block drew the same."""
    recording = comparison.recording
    torch.manual_seed(case["torch_manual_seed_before_forward"])
    for match in recording.matches(rf"{prefix}randperm(\d+)"):
        comparison.exact(match[0], torch.randperm(len(recording.tensors[match[0]])), recording.tensors[match[0]])
    for match in recording.matches(rf"{prefix}bernoulli(\d+)"):
        kept = recording.tensors[match[0]]
        comparison.exact(match[0], torch.empty_like(kept).bernoulli_(1 - case["drop_path"]), kept)


def _block(case: dict[str, Any], weights: dict[str, Tensor]) -> NestedTensorBlock:
    """The block that has the recorded weights; options that the recording does not name show in names and shapes."""
    is_mlp = "mlp.fc1.weight" in weights
    hidden = weights["mlp.fc1.weight" if is_mlp else "mlp.w12.weight"].shape[0]
    return NestedTensorBlock(
        dim=case["dim"],
        num_heads=case["num_heads"],
        mlp_ratio=hidden / case["dim"] if is_mlp else 4.0,
        qkv_bias="attn.qkv.bias" in weights,
        proj_bias="attn.proj.bias" in weights,
        ffn_bias=("mlp.fc1.bias" if is_mlp else "mlp.w12.bias") in weights,
        drop_path=case["drop_path"],
        init_values=case["init_values"],
        ffn_layer=Mlp if is_mlp else SwiGLUFFN,
    )
