"""Fit the weights of a backbone to another one: positions, channels, patch size and registers that differ.

What an image of the new size gives is as close as possible to what it gave before; what changes is logged with its
numbers. Everything else must be equal, which `weights.load_state` checks.

Legend: D width, C channels, p side of a patch.
"""

import logging
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from dinov2.models.key_mapping import StateDict
from dinov2.models.positions import resample_positions
from dinov2.models.vision_transformer import DinoVisionTransformer

logger = logging.getLogger(__name__)

_PROJECTION, _REGISTERS = "patch_embed.proj.weight", "register_tokens"


def fit_state(state: StateDict, model: DinoVisionTransformer, source: str, *, all_parts: bool) -> StateDict:
    """Fit the position table and the channels of a state dict to a model, with `all_parts` also patches and registers.

    Tensors that cannot be fitted are returned as they are, and so are all of a network of another width.
    """
    fitted, level = dict(state), logging.INFO if all_parts else logging.WARNING
    table, projection = state.get("pos_embed"), state.get(_PROJECTION)
    if table is not None and table.shape != model.pos_embed.shape:
        fitted["pos_embed"] = fit_positions(table, model, source, level=level)
    if projection is not None and projection.ndim == 4 and projection.shape[0] == model.embed_dim:
        if all_parts:
            projection = _fit_patches(projection, model, source)
        fitted[_PROJECTION] = _fit_channels(projection, model, source)
    if all_parts and model.register_tokens is not None:
        _fit_registers(fitted, model, source)
    return fitted


def approximations(state: StateDict, model: DinoVisionTransformer) -> list[str]:
    """What `fit_state` can only approximate, so that features of the model are not those of the source; as texts."""
    _, channels, patch_size, _ = state[_PROJECTION].shape
    registers = state[_REGISTERS].shape[1] if _REGISTERS in state else 0
    pairs = {
        "patch size": (patch_size, model.patch_size),
        "channels": (channels, model.patch_embed.in_chans),
        "registers": (registers, model.num_register_tokens),
    }
    return [f"{name} {there} -> {here}" for name, (there, here) in pairs.items() if there != here]


def fit_positions(table: Tensor, model: DinoVisionTransformer, source: str, *, level: int = logging.WARNING) -> Tensor:
    """Resample a position table to the grid of the model: (1, 1 + g*g, D) -> (1, 1 + n, D).

    As the model resamples its own table for other images, so that one of the source's size gives the same features.
    """
    side = math.isqrt(max(table.shape[1] - 1, 0))
    if side * side != table.shape[1] - 1 or table.shape[2] != model.embed_dim:
        return table  # not a square grid or another width: reported with the other mismatches
    rows, columns = model.position_grid
    logger.log(
        level,
        "the position table of %s is for %d x %d patches, this model has %d x %d: resampled (bicubic)",
        *(source, side, side, rows, columns),
    )
    offset, antialias = model.interpolate_offset, model.interpolate_antialias
    # In float32 also for files in half precision, as models resample their tables.
    return resample_positions(table, (side, side), (rows, columns), offset=offset, antialias=antialias)


def _fit_channels(weight: Tensor, model: DinoVisionTransformer, source: str) -> Tensor:
    """Adapt a patch projection to the channels of the model: (D, C, p, p) -> (D, C of the model, p, p)."""
    stored, wanted = weight.shape[1], model.patch_embed.in_chans
    if weight.shape[2:] != model.patch_embed.patch_size or stored == wanted:
        return weight  # another patch size: reported with the other mismatches
    logger.warning("the patches of %s have %d channels, this model's have %d: weights adapted", source, stored, wanted)
    weight = weight.float()
    # An image that is the same in all channels keeps about the same projection.
    if wanted < stored:
        return weight.sum(dim=1, keepdim=True).expand(-1, wanted, -1, -1) / wanted
    return weight[:, torch.arange(wanted) % stored] * (stored / wanted)


def _fit_patches(weight: Tensor, model: DinoVisionTransformer, source: str) -> Tensor:
    """Resample a patch projection to the patch size of the model: (D, C, p, p) -> (D, C, new p, new p).

    By the pseudo-inverse of the resizing of patches (Beyer et al. 2023, "FlexiViT", arXiv 2212.08013, equation 5): a
    patch that was enlarged has exactly the same embedding, one that was reduced the nearest in the mean square.
    """
    old, new = weight.shape[-1], model.patch_size
    if weight.shape[2] != old or old == new:
        return weight
    logger.warning(
        "the patches of %s have %d x %d pixels, this model's %d x %d: weights resampled by the pseudo-inverse of the "
        "resizing of patches (FlexiViT)",
        *(source, old, old, new, new),
    )
    pixels = torch.eye(old * old, dtype=torch.float64).unflatten(1, (1, old, old))
    resizing = F.interpolate(pixels, size=(new, new), mode="bilinear", antialias=True).flatten(1)  # (old^2, new^2)
    inverse = torch.linalg.pinv(resizing)  # (new^2, old^2)
    return (weight.double().flatten(2) @ inverse.T).unflatten(2, (new, new)).float()


def _fit_registers(state: StateDict, model: DinoVisionTransformer, source: str) -> None:
    """Complete the registers of a state dict by the initial ones of the model, in place."""
    assert model.register_tokens is not None, "only for models with registers"
    initial = model.register_tokens.detach()
    known = state.get(_REGISTERS, initial[:, :0])
    if known.shape[1] >= initial.shape[1] or known.shape[2] != initial.shape[2]:
        return  # equal, or too many, or of another width: reported with the other mismatches
    logger.warning(
        "%s has %d register tokens, this model %d: the others are new", source, known.shape[1], initial.shape[1]
    )
    state[_REGISTERS] = torch.cat([known, initial[:, known.shape[1] :].to(known.dtype)], dim=1)
