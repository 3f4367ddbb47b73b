"""Run two training steps of a recipe on the stub device and print, for each phase of the second, the bytes that its
operators read and write, each input and output once, without those of matrix products, as JSON.

measure_bytes.py CONFIG_FILE [key=value ...]
"""

import json
import sys
from typing import Any

import torch
from measure_step import NOW, make_batches
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dinov2 import config
from dinov2.data.loader import to_device
from dinov2.train.ssl_meta_arch import SSLMetaArch

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::convolution")
NOTHING = ("aten::empty", "aten::new_empty", "aten::detach", "aten::_unsafe_view")


class Traffic(TorchDispatchMode):
    """Bytes of the tensors on the device that operators take and return."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and not func.name().startswith(PRODUCTS + NOTHING):
            inputs = {tensor.data_ptr(): tensor for tensor in _on_device((args, kwargs))}
            self.num_bytes += sum(tensor.nbytes for tensor in [*inputs.values(), *_on_device(result)])
        return result


def _on_device(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor) and value.is_cuda]


def main() -> None:
    cfg = config.load(sys.argv[1], sys.argv[2:])
    with torch.device("cuda"):
        model = SSLMetaArch(cfg).train()
    batches = iter(to_device(make_batches(cfg), torch.device("cuda")))
    record: dict[str, int] = {}
    for _ in range(2):  # the first one tries which attention runs
        batch = next(batches)
        model.student.zero_grad(set_to_none=True)
        with Traffic() as teacher:
            [targets] = model.targets([batch], NOW.teacher_temp)
        with Traffic() as student:
            losses, _ = model(batch, targets)
        with Traffic() as backward:
            losses.total.backward()
        record = {"teacher": teacher.num_bytes, "student": student.num_bytes, "backward": backward.num_bytes}
    print(json.dumps(record))


if __name__ == "__main__":
    main()
