"""The flags of the evaluation of image retrieval."""

import argparse

from dinov2.flags import positive_int
from dinov2.flags.evaluation import PUBLISHED_CROP_SIZE, SMALLEST_PUBLISHED_SIZE, add_cache_flag, model_parser

PROTOCOLS = ("dinov2", "dinov3", "short_side")


def get_args_parser(add_help: bool = True) -> argparse.ArgumentParser:
    """Build the parser of the retrieval evaluation."""
    parser = model_parser("DINOv2 image retrieval", add_help)
    add = parser.add_argument
    dataset_help = "RevisitedOxford:root=..., RevisitedParis:root=... or RetrievalList:file=...[:root=...]"
    add("--dataset", required=True, help=dataset_help)
    protocol_help = (
        "dinov3: longer side to the image size, center crop, the rest black; dinov2: the same, as the sizes used there "
        "are not published; short_side: shorter side to 8/7 of the image size, center crop"
    )
    add("--protocol", choices=PROTOCOLS, default="dinov2", help=protocol_help)
    small = f"for models trained on global crops below {SMALLEST_PUBLISHED_SIZE} pixels: the size of those crops"
    size_help = f"side of the crop in pixels, a multiple of the patch size (default: {PUBLISHED_CROP_SIZE}; {small})"
    add("--image-size", type=positive_int, help=size_help)
    add("--batch-size", type=positive_int, default=256, help="images per process in feature extraction")
    add("--num-workers", type=int, default=5, help="data loader workers per process")
    add("--shown-queries", type=int, default=10, help="queries on the figure of rankings; 0 for no figure")
    add_cache_flag(parser)
    return parser
