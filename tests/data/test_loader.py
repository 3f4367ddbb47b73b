"""The training stream depends on seed and position only; images that cannot be read are replaced and reported."""

import io
import itertools
import logging
import pickle
import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from dinov2.data.augment import DataAugmentationDINO
from dinov2.data.collate import Batch
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.images import BadImageError
from dinov2.data.loader import make_data_loader, make_train_loader, to_device
from dinov2.data.masking import MaskingGenerator
from dinov2.data.sample_stream import AugmentedDataset, StreamCollate
from dinov2.data.samplers import SamplerType
from dinov2.data.workers import LoadingError

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # beside threads: fine here

AUGMENTATION = DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 2, 16, 8)


class ImageSet(Dataset):
    """Images filled with noise of their own; those in `bad` cannot be read."""

    def __init__(self, count: int = 20, bad: tuple[int, ...] = ()) -> None:
        self.count = count
        self.bad = bad
        self.shard_sizes = [count // 3, count - count // 3]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if index in self.bad:
            raise BadImageError(f"cannot read {index}", path=f"bad/{index}.jpg")
        pixels = np.random.default_rng(index).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        return Image.fromarray(pixels), index


class IndexOnly(ImageSet):
    """Images whose pixels are their index."""

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.new("RGB", (16, 16), (index, 0, 0)), index


class Unexpected(ImageSet):
    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        raise KeyError(f"no sample {index}")


def train_batches(num_steps: int, dataset: Dataset | None = None, **changes: Any) -> list[Batch]:
    settings: dict[str, Any] = {
        "augmentation": AUGMENTATION,
        "batch_size": 3,
        "num_workers": 0,
        "seed": 5,
        "mask_generator": MaskingGenerator(4),
        "mask_ratio_tuple": (0.1, 0.5),
        "mask_probability": 0.5,
    }
    return list(itertools.islice(make_train_loader(dataset or ImageSet(), **(settings | changes)), num_steps))


def same(a: Iterable[Any], b: Iterable[Any]) -> bool:
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(a, b, strict=True))


def all_same(a: list[Batch], b: list[Batch]) -> bool:
    return all(same(x, y) for x, y in zip(a, b, strict=True))


# ---- the training stream ----


def test_batches_depend_neither_on_workers_nor_on_restarts() -> None:
    whole = train_batches(9)
    assert all_same(train_batches(9, num_workers=2), whole)
    assert all_same(train_batches(5, num_workers=1, start_position=4 * 3), whole[4:])
    assert not any(same(a, b) for a, b in itertools.combinations(whole, 2))
    assert not any(same(a, b) for a, b in zip(train_batches(9, seed=6), whole, strict=True))


@pytest.mark.parametrize("sampler", SamplerType)
def test_every_sampler_continues_where_a_run_was_stopped(sampler: SamplerType) -> None:
    whole = train_batches(12, sampler=sampler, rank=1, world_size=2)
    for start_step in (1, 4, 7):
        rest = train_batches(12 - start_step, sampler=sampler, rank=1, world_size=2, start_position=start_step * 2 * 3)
        assert all_same(rest, whole[start_step:])


def test_crops_of_a_step_do_not_depend_on_the_number_of_ranks() -> None:
    one = train_batches(4, batch_size=4)
    ranks = [train_batches(4, batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    for step, batch in enumerate(one):
        images = batch.global_crops.unflatten(0, (2, 4))  # (crop, image, ...)
        parts = [rank[step].global_crops.unflatten(0, (2, 2)) for rank in ranks]
        assert torch.equal(torch.cat(parts, dim=1), images)


def test_an_epoch_has_every_image_once() -> None:
    whole = DataAugmentationDINO(
        (1.0, 1.0),
        (1.0, 1.0),
        0,
        16,
        aspect_ratio=(1.0, 1.0),
        color_jitter_probability=0.0,
        grayscale_probability=0.0,
        blur_probabilities=(0.0, 0.0, 0.0),
        solarize_probability=0.0,
        mean=(0.0, 0.0, 0.0),
        std=(1 / 255, 1 / 255, 1 / 255),
    )
    batches = train_batches(7, IndexOnly(21), augmentation=whole)
    seen = torch.cat([batch.global_crops[:3, 0, 0, 0] for batch in batches])
    assert sorted(seen.round().int().tolist()) == list(range(21))


def test_loading_leaves_the_global_generators_alone() -> None:
    torch.manual_seed(1)
    random.seed(1)
    expected = (torch.get_rng_state(), random.getstate())
    train_batches(2)
    train_batches(2, num_workers=1)
    list(make_data_loader(dataset=range(4), batch_size=2, num_workers=0, sampler_type=None))  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), expected[0])
    assert random.getstate() == expected[1]


def test_masks_belong_to_the_position_and_can_be_off() -> None:
    first, second = train_batches(2)
    assert first.masks.shape == (6, 16) and first.masks.any(-1).sum() == 3
    assert not torch.equal(first.masks, second.masks)
    assert not train_batches(1, mask_probability=0.0)[0].masks.any()


def test_crops_have_the_requested_dtype() -> None:
    assert train_batches(1, dtype=torch.float16)[0].global_crops.dtype == torch.float16


def test_objects_sent_to_workers_can_be_pickled() -> None:
    dataset = AugmentedDataset(ImageSet(), AUGMENTATION, seed=0)
    collate = StreamCollate(
        seed=0,
        mask_generator=MaskingGenerator(4),
        mask_ratio_tuple=(0.1, 0.5),
        mask_probability=0.5,
        dtype=torch.float32,
    )
    pickle.loads(pickle.dumps((dataset, collate)))


# ---- images that cannot be read ----


def test_bad_images_are_replaced_and_reported() -> None:
    dataset = ImageSet(20, bad=(3, 4, 11))
    batches = train_batches(7, dataset)  # 21 positions: every image once, and one twice
    bad_images = {bad for batch in batches for bad in batch.bad_images}
    assert bad_images == {f"bad/{index}.jpg: cannot read {index}" for index in (3, 4, 11)}
    assert all(batch.global_crops.shape == (6, 3, 16, 16) for batch in batches)
    assert all_same(train_batches(7, dataset, num_workers=2), batches)
    assert all_same(train_batches(4, dataset, start_position=3 * 3), batches[3:])


def test_the_other_images_of_a_batch_are_not_touched_by_a_replacement() -> None:
    good = train_batches(7)
    batches = train_batches(7, ImageSet(20, bad=(3,)))
    changed = [
        (step, image)
        for step, (a, b) in enumerate(zip(good, batches, strict=True))
        for image in range(3)
        if not torch.equal(a.global_crops[image], b.global_crops[image])
    ]
    reported = [step for step, batch in enumerate(batches) for _ in batch.bad_images]
    assert [step for step, _ in changed] == reported and reported


def test_when_nothing_can_be_read_the_error_names_files() -> None:
    with pytest.raises(OSError, match=r"11 images drawn in a row.*bad/\d"):
        train_batches(1, ImageSet(5, bad=tuple(range(5))))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_other_errors_are_not_taken_for_bad_images_and_name_the_sample(num_workers: int) -> None:
    with pytest.raises(LoadingError, match=r"^cannot load sample \d+: KeyError: 'no sample \d+'$") as caught:
        train_batches(1, Unexpected(), num_workers=num_workers)
    assert "Traceback" in str(caught.value.__cause__), "for the log file"


class Files(ImageDataset):
    """JPEG files of noise; those in `cut_off` end in the middle, which shows when they are decoded."""

    def __init__(self, count: int = 20, cut_off: tuple[int, ...] = (), **transforms: Any) -> None:
        super().__init__(**transforms)
        self.count = count
        self.cut_off = cut_off

    def __len__(self) -> int:
        return self.count

    def get_image_data(self, index: int) -> bytes:
        file = io.BytesIO()
        ImageSet()[index][0].resize((150, 120)).save(file, "JPEG")
        return file.getvalue()[: -300 if index in self.cut_off else None]

    def get_target(self, index: int) -> int:
        return index

    def describe(self, index: int) -> str:
        return f"file/{index}.jpg"


@pytest.mark.parametrize("augment_on", ["cpu", "device"])
def test_files_that_are_cut_off_are_replaced_and_named(augment_on: str) -> None:
    batches = train_batches(7, Files(20, cut_off=(3, 11)), augment_on=augment_on)
    batches = list(to_device(batches, torch.device("cpu")))
    bad_images = {bad for batch in batches for bad in batch.bad_images}
    assert {bad.partition(": ")[0] for bad in bad_images} == {"file/3.jpg", "file/11.jpg"}
    assert all("truncated" in bad or "cannot decode" in bad for bad in bad_images)
    assert all(batch.global_crops.shape == (6, 3, 16, 16) for batch in batches)


def test_a_transform_of_the_data_set_is_applied_first() -> None:
    class Inverted(Files):
        def get_image(self, index: int) -> Image.Image:
            return ImageOps.invert(super().get_image(index))

    plain = train_batches(1, Files())[0].global_crops
    assert same([train_batches(1, Files(transform=ImageOps.invert))[0].global_crops], [inverted(Files())])
    assert same([train_batches(1, Inverted())[0].global_crops], [inverted(Files())])
    assert not same([plain], [inverted(Files())])


def inverted(dataset: Files) -> Tensor:
    images = [(ImageOps.invert(dataset.get_image(index)), index) for index in range(len(dataset))]
    return train_batches(1, images)[0].global_crops  # type: ignore[arg-type]


# ---- augmentation on the device ----


def device_batches(num_steps: int, dataset: Dataset | None = None, **changes: Any) -> list[Batch]:
    return list(to_device(train_batches(num_steps, dataset, augment_on="device", **changes), torch.device("cpu")))


def test_the_device_makes_the_same_batches() -> None:
    for on_cpu, on_device in zip(train_batches(4, Files()), device_batches(4, Files()), strict=True):
        assert same(on_cpu[2:], on_device[2:])
        for a, b in zip(on_cpu[:2], on_device[:2], strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype
            assert (a - b).abs().mean() < 0.01  # half a level


def test_raw_batches_depend_neither_on_workers_nor_on_restarts_nor_on_ranks() -> None:
    whole = device_batches(6)
    assert all_same(device_batches(6, num_workers=2), whole)
    assert all_same(device_batches(4, num_workers=1, start_position=2 * 3), whole[2:])
    one = device_batches(2, batch_size=4)
    ranks = [device_batches(2, batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    for step, batch in enumerate(one):
        parts = [rank[step].global_crops.unflatten(0, (2, 2)) for rank in ranks]
        assert torch.allclose(torch.cat(parts, dim=1), batch.global_crops.unflatten(0, (2, 4)), atol=0.02)


def test_raw_batches_without_local_crops_and_in_half_precision() -> None:
    only_global = DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 0, 16, 8)
    (batch,) = device_batches(1, augmentation=only_global, dtype=torch.bfloat16)
    assert batch.global_crops.dtype == torch.bfloat16 and batch.local_crops.shape == (0, 3, 16, 16)


def test_what_cannot_be_left_to_the_device_is_refused() -> None:
    pil = DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 2, 16, 8, implementation="pil")
    with pytest.raises(ValueError, match="not pil"):
        train_batches(1, augmentation=pil, augment_on="device")
    with pytest.raises(ValueError, match="known: cpu, device"):
        train_batches(1, augment_on="gpu")


# ---- to the device ----


def test_on_the_cpu_batches_pass_without_a_copy() -> None:
    batches = train_batches(3)
    passed = list(to_device(batches, torch.device("cpu")))
    assert all_same(passed, batches)
    assert all(a.global_crops.data_ptr() == b.global_crops.data_ptr() for a, b in zip(passed, batches, strict=True))


def test_batches_are_taken_from_the_loader_on_demand() -> None:
    taken = []
    stream = (taken.append(step) or batch for step, batch in enumerate(train_batches(3)))  # type: ignore[func-returns-value]
    next(to_device(stream, torch.device("cpu")))
    assert taken == [0]


@pytest.mark.gpu
@pytest.mark.parametrize("augment_on", ["cpu", "device"])
def test_on_cuda_all_batches_arrive_in_order(augment_on: str) -> None:
    settings: dict[str, Any] = {"num_workers": 2, "dataset": ImageSet(20, bad=(3,)), "augment_on": augment_on}
    expected = train_batches(8, **settings)
    device = torch.device("cuda")
    arrived = []
    for batch in to_device(train_batches(8, **settings), device):
        torch.cuda._sleep(10_000_000)  # work on this batch while the next one is copied
        arrived.append(Batch._make(x.clone() if isinstance(x, Tensor) else x for x in batch))
    assert all(x.is_cuda for batch in arrived for x in batch if isinstance(x, Tensor))
    assert all(isinstance(batch.bad_images, tuple) for batch in arrived)
    cpu = [Batch._make(x.cpu() if isinstance(x, Tensor) else x for x in batch) for batch in arrived]
    expected = list(to_device(expected, torch.device("cpu")))
    assert all(same(a[2:], b[2:]) for a, b in zip(cpu, expected, strict=True))
    for a, b in zip(cpu, expected, strict=True):
        assert torch.allclose(a.global_crops, b.global_crops, atol=0.0 if augment_on == "cpu" else 0.2)


# ---- the plain loader ----


class Numbers(Dataset):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        return index


def plain_batches(num_batches: int | None = None, **settings: Any) -> list[list[int]]:
    defaults: dict[str, Any] = {"dataset": Numbers(), "batch_size": 4, "num_workers": 0}
    loader = make_data_loader(**(defaults | settings))
    return [batch.tolist() for batch in itertools.islice(loader, num_batches)]


def test_unshuffled_distributed_reads_everything_in_order() -> None:
    distributed: dict[str, Any] = {"sampler_type": SamplerType.DISTRIBUTED, "shuffle": False, "drop_last": False}
    assert plain_batches(**distributed) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert plain_batches(**distributed, rank=1, world_size=2) == [[1, 3, 5, 7], [9]]


def test_infinite_is_the_default_and_drops_no_incomplete_batch_as_there_is_none() -> None:
    assert plain_batches(4, shuffle=False) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1], [2, 3, 4, 5]]


@pytest.mark.parametrize("sampler_type", [SamplerType.INFINITE, SamplerType.SHARDED_INFINITE, SamplerType.GLOBAL_ORDER])
def test_advance_skips_samples_of_this_rank(sampler_type: SamplerType) -> None:
    settings: dict[str, Any] = {"sampler_type": sampler_type, "rank": 1, "world_size": 2}
    assert plain_batches(5, **settings, sampler_advance=12) == plain_batches(8, **settings)[3:]


def test_epoch_size() -> None:
    batches = plain_batches(sampler_type=SamplerType.EPOCH, sampler_size=25, drop_last=False)
    assert [len(batch) for batch in batches] == [4, 4, 4, 4, 4, 4, 1]


def test_shuffle_works_without_a_sampler_and_follows_the_seed() -> None:
    orders = [sum(plain_batches(sampler_type=None, drop_last=False, seed=seed), []) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == list(range(10))
    assert plain_batches(1, sampler_type=None, shuffle=False) == [[0, 1, 2, 3]]


def test_persistent_workers_without_workers_are_no_error() -> None:
    assert len(plain_batches(sampler_type=None, persistent_workers=True)) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"sampler_type": SamplerType.INFINITE, "sampler_size": 5},
        {"sampler_type": SamplerType.SHARDED_INFINITE, "sampler_size": 5},
        {"sampler_type": SamplerType.DISTRIBUTED, "sampler_size": 5},
        {"sampler_type": SamplerType.DISTRIBUTED, "sampler_advance": 5},
        {"sampler_type": SamplerType.EPOCH, "sampler_advance": 5},
        {"sampler_type": SamplerType.GLOBAL_ORDER, "shuffle": False},
    ],
)
def test_options_that_a_sampler_does_not_have_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=options["sampler_type"].name):
        plain_batches(**options)


def test_the_number_of_batches_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="dinov2.data.loader"):
        plain_batches(1)
        plain_batches(sampler_type=None)
    assert [record.getMessage() for record in caplog.records] == [
        "endless batches of 4 samples",
        "2 batches of 4 samples",
    ]
