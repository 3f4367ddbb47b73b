"""The classification sets of torchvision, by name: `CIFAR10:split=TRAIN:root=/data`."""

import inspect
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dinov2.data.datasets.base import ImageDataset
from dinov2.data.datasets.file_list import PathTable, check_folder
from dinov2.data.datasets.torchvision_sources import SOURCES, Arrays, Pairs, Source
from dinov2.data.images import EncodedImage, encode_png, read_image_file

logger = logging.getLogger(__name__)

OWN_TRAIN_SHARE = 0.8  # of each class of a set that is published undivided


class TorchvisionSet(ImageDataset):
    """A classification set in the files that torchvision expects: it finds and checks them, and knows the labels.

    Images are read and decoded as those of any other dataset. Files are in the order of their paths; labels are
    torchvision's. Nothing is downloaded unless asked for.

    Caltech101, Caltech256, EuroSAT, SEMEION and SUN397 are published undivided: without `split` this is the whole set.
    Their TRAIN is 80 % of each class and TEST the rest, a division of our own that depends only on the names of the
    files and the seed; results on it cannot be compared with published ones that divide otherwise.

    Args:
        name: one of `SOURCES`.
        root: the folder that torchvision calls root; holds for instance `cifar-10-batches-py`.
        split: one of `SOURCES[name].split_names`.
        download: get what is missing; "true" or "false" may be text. Several processes may ask at once.
        seed: of our division of a set that is published undivided, 0 when None.
        transforms, transform, target_transform: see `ImageDataset`.
        options: those in `SOURCES[name].options`, such as `partition` of DTD.

    Raises:
        FileNotFoundError: the files are not there, or not those that torchvision knows.
        OSError: they cannot be downloaded.
        ValueError: no such split; an option or a file is not as it should be; a package is missing that reads them.
    """

    def __init__(
        self,
        name: str,
        *,
        root: str | Path,
        split: str | None = None,
        download: bool | str = False,
        seed: int | str | None = None,
        transforms: Callable[[Any, Any], tuple[Any, Any]] | None = None,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(transforms=transforms, transform=transform, target_transform=target_transform)
        if name not in SOURCES:
            raise ValueError(f"no dataset {name!r}; known: {', '.join(SOURCES)}")
        source = SOURCES[name]
        if split not in source.split_names and (source.splits or split is not None):
            raise ValueError(f"{name} has no split {split!r}; it has {', '.join(source.split_names)}")
        if unknown := options.keys() - source.options.keys():
            raise ValueError(f"{name} has no option {', '.join(unknown)}; it has {', '.join(source.options) or 'none'}")
        if seed is not None and (source.splits or split is None):
            raise ValueError(f"seed={seed}: there is nothing to divide without a split, or with published ones")
        self.name, self.root, self.split = name, Path(root), split
        self._options = options
        arguments = source.splits.get(split or "", {}) | {
            key: _converted(key, value, source.options[key]) for key, value in options.items()
        }
        self.classes, samples = self._find(source, arguments, _converted("download", download, bool))
        self._keep(samples, None if source.splits or split is None else _converted("seed", seed or 0, int))

    def __len__(self) -> int:
        return len(self._images)

    def describe(self, index: int) -> str:
        """The path of the image, or its number where there is no file for each."""
        if isinstance(self._images, PathTable):
            return os.path.join(self.root, self._images[index])
        return f"{self.name} {self.split or ''} image {index}".replace("  ", " ")

    def open_image(self, index: int) -> EncodedImage:
        if isinstance(self._images, np.ndarray):  # no detour over a file, several times slower
            return EncodedImage(Image.fromarray(self._images[index]).convert("RGB"))
        return super().open_image(index)

    def get_image_data(self, index: int) -> bytes:
        """The file of sample `index`; where there is none, the image as a PNG file."""
        image = self._images[index]
        if isinstance(image, str):
            return read_image_file(os.path.join(self.root, image), self.image_options)
        return encode_png(image)

    def get_target(self, index: int) -> int | None:
        return None if self._targets is None else int(self._targets[index])

    def get_targets(self) -> np.ndarray | None:
        return self._targets

    def _keep(self, samples: Pairs | Arrays, seed: int | None) -> None:
        """Keeps the samples, files in the order of their paths; with a seed, our own division of them."""
        if isinstance(samples, Arrays):
            pixels, targets = samples
            names = [str(index) for index in range(len(pixels))]
        else:
            pairs = sorted(((os.fspath(path), target) for path, target in samples), key=itemgetter(0))
            pixels, targets = None, [target for _, target in pairs]
            names = [path.removeprefix(f"{self.root}{os.sep}") for path, _ in pairs]
        labels = np.array([-1 if target is None else target for target in targets], np.int64)
        if seed is not None:
            chosen = own_division(names, labels, self.split, seed)
            names, labels = [names[index] for index in chosen], labels[chosen]
            pixels = pixels[chosen] if isinstance(pixels, np.ndarray) else None
        # Not a list: of that, every worker process would get a copy.
        self._images = PathTable.of(names) if pixels is None else pixels
        self._targets = None if (labels < 0).any() else labels

    def _find(self, source: Source, arguments: dict[str, Any], download: bool) -> tuple[list[str], Pairs | Arrays]:
        """Names of the classes, and the samples; downloaded if need be and if that is wanted."""
        # OSError or RuntimeError: what torchvision raises when files are missing or not the right ones.
        if not download:
            try:
                return self._look(source, arguments)
            except (OSError, RuntimeError) as error:
                reason = str(error).partition(" You can")[0].rstrip(".")  # "You can use download=True"
                raise FileNotFoundError(f"no {self.name} in {self.root}: {reason}; {self._advice(source)}") from error
        try:
            with _one_process_at_a_time(self.root):
                try:
                    return self._look(source, arguments)
                except (OSError, RuntimeError):
                    logger.info("downloading %s to %s", self.name, self.root)
                    return self._ask(source, arguments | {"download": True})
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())  # may have several lines
            raise OSError(f"cannot download {self.name} to {self.root}: {reason}") from error

    def _look(self, source: Source, arguments: dict[str, Any]) -> tuple[list[str], Pairs | Arrays]:
        """`_ask` if there is something to ask about: some classes of torchvision make the folders that they miss."""
        if self.root.exists():
            check_folder(self.root)
        for place in (self.root, self.root / source.place):
            if not place.exists():
                raise FileNotFoundError(f"there is no {place}")
        return self._ask(source, arguments)

    def _ask(self, source: Source, arguments: dict[str, Any]) -> tuple[list[str], Pairs | Arrays]:
        """What torchvision makes of the files.

        Raises:
            OSError, RuntimeError: they are missing or not the right ones.
            ValueError: anything else.
        """
        defaults: dict[str, Any] = {"download": False} if source.can_download else {}
        if "loader" in inspect.signature(source.theirs).parameters:
            defaults["loader"] = os.fspath
        try:
            theirs = source.theirs(str(self.root), **(defaults | arguments))
            samples = source.read(theirs)
        except ImportError as error:
            package = str(error.name).partition(".")[0]
            raise ValueError(f"{self.name} needs the package {package}: pip install {package}") from error
        except (OSError, RuntimeError) as error:
            if isinstance(error.__context__, ImportError):
                raise ValueError(f"cannot read {self.name}: {error}") from error
            raise
        except Exception as error:
            raise ValueError(f"cannot read {self.name} in {self.root}: {type(error).__name__}: {error}") from error
        if not isinstance(samples, Arrays):
            folder = Path(samples[0][0]).parent if samples else self.root
            if not (samples and folder.is_dir()):
                raise FileNotFoundError(f"no images in {folder}")
        return _class_names(theirs), samples

    def _advice(self, source: Source) -> str:
        """What to do when files are missing."""
        if not source.can_download:
            return "torchvision cannot download it"
        given = {"split": self.split, "root": self.root, **self._options, "download": "true"}
        keys = "".join(f":{key}={value}" for key, value in given.items() if value is not None)
        return f"to download it: {self.name}{keys}"


def own_division(names: Sequence[str], labels: np.ndarray, split: str | None, seed: int) -> list[int]:
    """The samples of a split of a set that is published undivided, in ascending order.

    In each class the samples are put in the order of a hash of seed and name; the first `OWN_TRAIN_SHARE`, at least
    one, are TRAIN, the others TEST. This is the same everywhere and in future.
    """
    order = sorted(range(len(names)), key=lambda index: sha256(os.fsencode(f"{seed} {names[index]}")).digest())
    by_class: dict[int, list[int]] = {}
    for index in order:
        by_class.setdefault(labels[index], []).append(index)
    chosen: list[int] = []
    for members in by_class.values():
        num_train = max(1, int(OWN_TRAIN_SHARE * len(members)))
        chosen += members[:num_train] if split == "TRAIN" else members[num_train:]
    return sorted(chosen)


def _class_names(theirs: Any) -> list[str]:
    """Names of the classes in the order of their indices; none if torchvision has none."""
    for attribute in ("classes", "categories", "all_categories"):
        if names := getattr(theirs, attribute, None):
            return [name if isinstance(name, str) else name[0] for name in names]  # the first of several synonyms
    return []


def _converted(key: str, value: Any, to: type) -> Any:
    """The value of a key of a dataset string, which is text.

    Raises:
        ValueError: it is none of that type.
    """
    try:
        return {"true": True, "false": False}[str(value).lower()] if to is bool else to(value)
    except (KeyError, ValueError):
        kind = "true or false" if to is bool else "a whole number"
        raise ValueError(f"{key} must be {kind}, got {value!r}") from None


@contextmanager
def _one_process_at_a_time(root: Path) -> Iterator[None]:
    """The processes of a distributed run all ask for a download; the first one does it, the others find it done."""
    import fcntl

    root.mkdir(parents=True, exist_ok=True)
    if not os.access(root, os.W_OK):  # nobody can download to it, but the files may be there
        yield
        return
    with (root / ".download.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
