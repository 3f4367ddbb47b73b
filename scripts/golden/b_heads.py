"""Set b: the DINO head, forward and gradients."""

import torch

from dinov2.layers import DINOHead
from scripts.golden.comparison import Comparison
from scripts.golden.recording import Recording


def replay_heads(recording: Recording, comparison: Comparison) -> None:
    for case in recording.json["cases"]:
        prefix = case["name"] + "."
        head = DINOHead(**case["kw"])
        gain = head.state_dict()["last_layer.weight_g"]
        comparison.close(f"{prefix}initial weight_g", gain, torch.full_like(gain, case["init_weight_g"]), tolerance=0.0)
        head.load_state_dict(recording.inputs_below(f"{prefix}w."))
        x = recording.input(f"{prefix}x").requires_grad_()
        y = head(x)
        y.backward(recording.input(f"{prefix}dy"))
        comparison.tensor(f"{prefix}y", y)
        assert x.grad is not None, "x is a leaf that requires a gradient"
        comparison.tensor(f"{prefix}dx", x.grad)
        comparison.tensors({f"{prefix}dw.{name}": p.grad for name, p in head.named_parameters() if p.grad is not None})
