"""The flags of the evaluation of tracking."""

import argparse

from dinov2.flags import positive_int
from dinov2.flags.evaluation import model_parser

PROTOCOLS = ("dinov3", "dinov3_paper", "dino")
SHORT_SIDE_PATCHES = 30  # 420 pixels with patches of 14, 480 with patches of 16
DINO_SHORT_SIDE = 480  # pixels


def get_args_parser(add_help: bool = True) -> argparse.ArgumentParser:
    """Build the parser of the tracking evaluation."""
    parser = model_parser("DINOv2 tracking of objects in videos", add_help)
    add = parser.add_argument
    add("--dataset", required=True, help="DAVIS2017:split=VAL:root=...[:resolution=480p] or VideoFolder:root=...")
    protocol_help = (
        "dinov3: circle of 12 patches, top 5, temperature 0.2, last step as in the published notebook; dinov3_paper: "
        "last step as in the text of the paper; dino: square of 12 patches, top 5, temperature 0.1"
    )
    add("--protocol", choices=PROTOCOLS, default="dinov3", help=protocol_help)
    size_help = (
        f"shorter side of the frames in pixels, rounded up to the patch size (default: {SHORT_SIDE_PATCHES} patches, "
        f"for dino {DINO_SHORT_SIDE}; published also 60 and 90 patches)"
    )
    add("--image-size", type=positive_int, help=size_help)
    add("--batch-size", type=positive_int, default=4, help="frames per forward pass")
    add("--num-workers", type=int, default=2, help="data loader workers per process")
    predictions_help = "save the predicted label maps as palette PNGs, in predictions/SEQUENCE/00000.png"
    add("--save-predictions", action="store_true", help=predictions_help)
    add("--no-resume", action="store_true", help="compute all sequences anew, also those that an earlier run finished")
    return parser
