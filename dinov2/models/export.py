"""Export backbones for other libraries and runtimes, and read the result again for comparison.

| form | output | readers |
| --- | --- | --- |
| `torch`, `safetensors` | published key names | this package, timm (`checkpoint_path=`), code for the released files |
| `hf` | a folder with `config.json` and `model.safetensors` | transformers: `AutoModel.from_pretrained` |
| `timm` | key names of timm | `timm.create_model(...).load_state_dict(...)` |
| `onnx` | images -> class token and patch tokens, for any batch and image size | onnxruntime and others |
| `torch.export` | the same as a program of PyTorch | `torch.export.load` |

Legend: B images of H x W pixels, n patches, R registers, D width.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dinov2.models.checksums import CHECKSUM_KEY, NO_CHECKSUM, with_checksum
from dinov2.models.infer_architecture import exact_ratio, infer_arguments
from dinov2.models.key_mapping import StateDict, to_hf, to_timm
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.models.weight_files import import_optional, import_safetensors, read_file
from dinov2.models.weights import load_backbone

Tokens = Callable[[Tensor], Tensor]
"""Images (B, C, H, W) -> class token and patch tokens after the last norm, (B, 1 + n, D)."""

_LARGEST_ONNX_BYTES = 1_900_000_000  # limit of a protocol buffer file; larger weights are in a second file


class Form(NamedTuple):
    """Functions that write a backbone, and read it with its usual library."""

    write: Callable[[DinoVisionTransformer, Path], None]
    read: Callable[[DinoVisionTransformer, Path], Tokens]  # the model has the expected architecture
    suffixes: tuple[str, ...]  # accepted by readers; none for a folder
    positions: Callable[[DinoVisionTransformer], dict[str, Any]] = lambda _: {}
    """Attributes of `DinoVisionTransformer` for the way in which the library resamples positions."""


class Difference(NamedTuple):
    """Result of a comparison at one image size."""

    height: int
    width: int
    largest: float  # difference of any output
    scale: float  # largest absolute output
    published: float | None  # largest difference to published resampling, if the library has its own


class Features(nn.Module):
    """The exported program: images -> class token (B, D) and patch tokens (B, n, D) after the last norm."""

    def __init__(self, backbone: DinoVisionTransformer) -> None:
        super().__init__()
        self.backbone = backbone
        self.train(backbone.training)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W)."""
        features: Any = self.backbone.forward_features(images)
        return features["x_norm_clstoken"], features["x_norm_patchtokens"]


def tokens_of(model: Callable[[Tensor], Any]) -> Tokens:
    """Concatenate the class token and the patch tokens of a model with the outputs of `Features`."""

    def tokens(images: Tensor) -> Tensor:
        class_token, patches = model(images)
        return torch.cat([class_token.unsqueeze(1), patches], dim=1)

    return tokens


@torch.no_grad()
def compare(model: DinoVisionTransformer, form: Form, path: Path) -> list[Difference]:
    """Compare an exported model with the original on random images, of the native size and of another."""
    ours, theirs = tokens_of(Features(model)), form.read(model, path)
    generator = torch.Generator().manual_seed(0)
    native, patch = model.patch_embed.img_size, model.patch_size
    rule = {name: value for name, value in form.positions(model).items() if getattr(model, name) != value}
    results = []
    for batch, (height, width) in ((1, native), (2, (3 * patch, 5 * patch))):
        images = torch.randn(batch, model.patch_embed.in_chans, height, width, generator=generator)
        result = theirs(images)
        with _attributes(model, rule):
            expected = ours(images)
        largest, scale = (result - expected).abs().max().item(), expected.abs().max().item()
        published = (result - ours(images)).abs().max().item() if rule and (height, width) != native else None
        results.append(Difference(height, width, largest, scale, published))
    return results


@contextlib.contextmanager
def _attributes(model: DinoVisionTransformer, values: dict[str, Any]) -> Iterator[None]:
    before = {name: getattr(model, name) for name in values}
    try:
        vars(model).update(values)
        yield
    finally:
        vars(model).update(before)


# --- Published key names ---------------------------------------------------------------------------------------------


def _save(state: StateDict, path: Path) -> None:
    """Write a state dict in the format of the suffix."""
    if path.suffix == ".safetensors":
        content = import_safetensors().save(state, {"format": "pt", CHECKSUM_KEY: NO_CHECKSUM})
        with path.open("wb") as file:
            file.writelines(with_checksum(content))
    else:
        torch.save(state, path)


def _write_ours(model: DinoVisionTransformer, path: Path) -> None:
    _save(model.state_dict(), path)


def _read_ours(model: DinoVisionTransformer, path: Path) -> Tokens:
    positions = {name: getattr(model, name) for name in ("interpolate_offset", "interpolate_antialias")}
    same = DinoVisionTransformer(**infer_arguments(model.state_dict(), model.num_heads) | positions)
    return tokens_of(Features(load_backbone(same, path).eval()))


# --- transformers ----------------------------------------------------------------------------------------------------


def _write_hf(model: DinoVisionTransformer, folder: Path) -> None:
    folder.mkdir()
    config = json.dumps(hf_config(model), indent=2, sort_keys=True)
    (folder / "config.json").write_text(config + "\n", encoding="utf-8")
    _save(to_hf(model.state_dict()), folder / "model.safetensors")


def hf_config(model: DinoVisionTransformer) -> dict[str, Any]:
    """The content of `config.json` for a backbone; a ValueError if transformers has no such architecture."""
    arguments = infer_arguments(model.state_dict(), model.num_heads)
    ratio, registers = arguments["mlp_ratio"], model.num_register_tokens
    if ratio != int(ratio):
        raise ValueError(f"the MLP ratio of transformers is an integer, but this network has {ratio:.4g}")
    return {
        "architectures": ["Dinov2WithRegistersModel" if registers else "Dinov2Model"],
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "hidden_size": model.embed_dim,
        "num_hidden_layers": model.n_blocks,
        "num_attention_heads": model.num_heads,
        "mlp_ratio": int(ratio),
        "use_swiglu_ffn": arguments["ffn_layer"] == "swiglufused",
        "qkv_bias": arguments["qkv_bias"],
        "image_size": arguments["img_size"],
        "patch_size": model.patch_size,
        "num_channels": model.patch_embed.in_chans,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "torch_dtype": "float32",
        **({"num_register_tokens": registers} if registers else {}),
    }


def _read_hf(model: DinoVisionTransformer, folder: Path) -> Tokens:
    transformers = import_optional("transformers", "comparing with transformers")
    registers = model.num_register_tokens
    network = transformers.Dinov2WithRegistersModel if registers else transformers.Dinov2Model
    theirs, report = network.from_pretrained(folder, output_loading_info=True)
    if problems := {title: names for title, names in report.items() if names}:
        raise ValueError(f"transformers cannot load what was written: {problems}")
    theirs.eval()
    return lambda images: _without_registers(theirs(images).last_hidden_state, registers)


def _without_registers(tokens: Tensor, registers: int) -> Tensor:
    return torch.cat([tokens[:, :1], tokens[:, 1 + registers :]], dim=1)


# --- timm ------------------------------------------------------------------------------------------------------------


def _write_timm(model: DinoVisionTransformer, path: Path) -> None:
    _save(to_timm(model.state_dict()), path)


def timm_arguments(model: DinoVisionTransformer) -> tuple[str, dict[str, Any]]:
    """Name and keywords for `timm.create_model`."""
    arguments = infer_arguments(model.state_dict(), model.num_heads)
    size = {384: "small", 768: "base", 1024: "large"}.get(model.embed_dim, "small")
    if arguments["ffn_layer"] == "swiglufused":
        size = "giant"
        packed = model.state_dict()["blocks.0.mlp.w12.weight"].shape[0]
        arguments["mlp_ratio"] = exact_ratio(packed, model.embed_dim)
    taken = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias")
    keywords = {name: arguments[name] for name in (*taken, "proj_bias")}
    keywords["init_values"] = arguments["init_values"] or 0.0  # None would select the default of its name
    if registers := model.num_register_tokens:
        keywords["reg_tokens"] = registers
    return f"vit_{size}_patch14{'_reg4' if registers else ''}_dinov2", keywords


def _read_timm(model: DinoVisionTransformer, path: Path) -> Tokens:
    timm = import_optional("timm", "comparing with timm")
    name, keywords = timm_arguments(model)
    theirs = timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True, **keywords)
    content: Any = read_file(path)
    try:
        theirs.load_state_dict(content)
    except RuntimeError as error:
        raise ValueError(f"timm cannot load what was written: {error}") from error
    theirs.eval()
    return lambda images: _without_registers(theirs.forward_features(images), model.num_register_tokens)


# --- Programs --------------------------------------------------------------------------------------------------------

_OUTPUTS = ["class_token", "patch_tokens"]


def _example(model: DinoVisionTransformer) -> tuple[tuple[Tensor], Any]:
    """Example images for tracing, and their dynamic dimensions."""
    patch = model.patch_size
    rows, columns = (patch * torch.export.Dim(name, min=1) for name in ("rows", "columns"))
    images = torch.zeros(2, model.patch_embed.in_chans, 3 * patch, 5 * patch)
    return (images,), ({0: torch.export.Dim("batch"), 2: rows, 3: columns},)


def _write_onnx(model: DinoVisionTransformer, path: Path) -> None:
    for package in ("onnx", "onnxscript"):
        import_optional(package, "writing ONNX")
    images, dynamic_shapes = _example(model)
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    torch.onnx.export(
        Features(model),
        images,
        path,
        input_names=["images"],
        output_names=_OUTPUTS,
        dynamic_shapes=dynamic_shapes,
        dynamo=True,
        external_data=num_bytes > _LARGEST_ONNX_BYTES,
        verbose=False,
    )


def _read_onnx(model: DinoVisionTransformer, path: Path) -> Tokens:
    session = import_optional("onnxruntime", "comparing with ONNX").InferenceSession(
        path, providers=["CPUExecutionProvider"]
    )
    return tokens_of(lambda images: map(torch.from_numpy, session.run(_OUTPUTS, {"images": images.numpy()})))


def _write_program(model: DinoVisionTransformer, path: Path) -> None:
    images, dynamic_shapes = _example(model)
    torch.export.save(torch.export.export(Features(model), images, dynamic_shapes=dynamic_shapes), path)


def _read_program(model: DinoVisionTransformer, path: Path) -> Tokens:
    return tokens_of(torch.export.load(path).module())


FORMS = {
    "hf": Form(
        _write_hf,
        _read_hf,
        (),
        lambda model: {"interpolate_offset": 0.0, "interpolate_antialias": model.num_register_tokens > 0},
    ),
    "timm": Form(
        _write_timm,
        _read_timm,
        (".pth", ".pt", ".bin", ".safetensors"),
        lambda _: {"interpolate_offset": 0.0, "interpolate_antialias": True},
    ),
    "safetensors": Form(_write_ours, _read_ours, (".safetensors",)),
    "torch": Form(_write_ours, _read_ours, (".pth", ".pt", ".bin")),
    "onnx": Form(_write_onnx, _read_onnx, (".onnx",)),
    "torch.export": Form(_write_program, _read_program, (".pt2",)),
}
