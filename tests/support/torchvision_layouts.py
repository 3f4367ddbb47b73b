"""Small datasets in the files that torchvision expects: {name: function that writes one and returns its content}.

Each function is given the root and returns {split: [(pixels, class), ...]}; the split of an undivided set is None.
"""

import bz2
import csv
import json
import pickle

import numpy as np
from PIL import Image

RNG = np.random.default_rng(0)
Truth = dict[str | None, list[tuple[np.ndarray, int | None]]]


def pixels(*shape):
    return RNG.integers(0, 256, shape or (6, 8, 3), dtype=np.uint8)


def save(path, label=None):
    """Writes an image, lossless whatever its name, and returns it with its class."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels()
    Image.fromarray(image).save(path, "PPM" if path.suffix == ".ppm" else "PNG")
    return image, label


def text(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def class_folders(root, names, *, suffix="jpg", per_class=2):
    """`per_class` images in a folder for each class."""
    return [
        save(root / name / f"{number}.{suffix}", label)
        for label, name in enumerate(names)
        for number in range(per_class)
    ]


def arrays(labels, *shape):
    return [(pixels(*shape), label) for label in labels]


def cifar(root, parts, label_key, meta):
    truth: Truth = {"TRAIN": [], "TEST": []}
    root.mkdir()
    for number, (name, split) in enumerate(parts):
        samples = arrays([number % 3, 2], 32, 32, 3)
        data = np.stack([image.transpose(2, 0, 1).reshape(-1) for image, _ in samples])
        with (root / name).open("wb") as file:
            pickle.dump({"data": data, label_key: [label for _, label in samples]}, file)
        truth[split] += samples
    name, key = meta
    (root / name).write_bytes(pickle.dumps({key: ["airplane", "bird", "cat"]}))
    return truth


def cifar10(root):
    parts = [(f"data_batch_{number}", "TRAIN") for number in range(1, 6)] + [("test_batch", "TEST")]
    return cifar(root / "cifar-10-batches-py", parts, "labels", ("batches.meta", "label_names"))


def cifar100(root):
    parts = [("train", "TRAIN"), ("test", "TEST")]
    return cifar(root / "cifar-100-python", parts, "fine_labels", ("meta", "fine_label_names"))


def clevr(root):
    base = root / "clevr" / "CLEVR_v1.0"
    truth: Truth = {"TEST": [save(base / "images/test/CLEVR_test_0.png")]}
    for split in ("train", "val"):
        names = [f"CLEVR_{split}_{number}.png" for number in range(3)]
        truth[split.upper()] = [save(base / "images" / split / name, 3 + number) for number, name in enumerate(names)]
        scenes = [{"image_filename": name, "objects": [{}] * (3 + number)} for number, name in enumerate(names)]
        text(base / "scenes" / f"CLEVR_{split}_scenes.json", json.dumps({"scenes": scenes}))
    return truth


def caltech101(root):
    base = root / "caltech101" / "101_ObjectCategories"
    save(base / "BACKGROUND_Google" / "image_0001.jpg")
    names = ["Faces", "accordion", "airplanes"]  # as sorted: capitals first
    return {None: [save(base / name / f"image_{n:04d}.jpg", i) for i, name in enumerate(names) for n in range(1, 6)]}


def caltech256(root):
    base = root / "caltech256" / "256_ObjectCategories"
    names = ["001.ak47", "002.american-flag"]
    return {
        None: [save(base / name / f"{i + 1:03d}_{n:04d}.jpg", i) for i, name in enumerate(names) for n in (1, 2, 3)]
    }


def country211(root):
    base = root / "country211"
    return {
        split: class_folders(base / folder, ["AD", "AE"])
        for split, folder in (("TRAIN", "train"), ("VAL", "valid"), ("TEST", "test"))
    }


def dtd(root):
    base = root / "dtd" / "dtd"
    truth: Truth = {}
    for split in ("train", "val", "test"):
        names = [f"{name}/{name}_{split}.jpg" for name in ("banded", "zigzagged")]
        truth[split.upper()] = [save(base / "images" / name, label) for label, name in enumerate(names)]
        text(base / "labels" / f"{split}1.txt", *names)
        text(base / "labels" / f"{split}2.txt", *names[1:])
    return truth


def idx(array):
    kind = {"uint8": 8, "int32": 12}[array.dtype.name]
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, kind, array.ndim]) + sizes + array.astype(array.dtype.newbyteorder(">")).tobytes()


def write_idx(images_path, labels_path, samples, labels=None):
    images_path.parent.mkdir(parents=True, exist_ok=True)
    images_path.write_bytes(idx(np.stack([image for image, _ in samples])))
    labels_path.write_bytes(idx(np.array([label for _, label in samples], np.uint8) if labels is None else labels))


def mnist(root, name="MNIST"):
    truth: Truth = {}
    for split, part, labels in (("TRAIN", "train", [5, 0, 9]), ("TEST", "t10k", [7, 2])):
        truth[split] = arrays(labels, 28, 28)
        raw = root / name / "raw"
        write_idx(raw / f"{part}-images-idx3-ubyte", raw / f"{part}-labels-idx1-ubyte", truth[split])
    return truth


def kmnist(root):
    return mnist(root, "KMNIST")


def emnist(root):
    truth: Truth = {}
    raw = root / "EMNIST" / "raw"
    for kind in ("letters", "digits"):
        for part in ("train", "test"):
            samples = truth[f"{part.upper()}_{kind.upper()}"] = arrays([1, 9], 28, 28)
            stem = f"emnist-{kind}-{part}"
            write_idx(raw / f"{stem}-images-idx3-ubyte", raw / f"{stem}-labels-idx1-ubyte", samples)
    return truth


def qmnist(root):
    truth: Truth = {}
    raw = root / "QMNIST" / "raw"
    for part in ("train", "test"):
        samples = truth[part.upper()] = arrays([4, 8, 0], 28, 28)
        labels = np.array([[label, 300, 1, 2, 3, 4, 5, 6] for _, label in samples], np.int32)
        write_idx(raw / f"qmnist-{part}-images-idx3-ubyte", raw / f"qmnist-{part}-labels-idx2-int", samples, labels)
    return truth


def eurosat(root):
    return {None: class_folders(root / "eurosat" / "2750", ["AnnualCrop", "Forest", "Highway"], per_class=6)}


def fer2013(root):
    truth = {"TRAIN": arrays([6, 0], 48, 48), "TEST": arrays([3, 1], 48, 48)}
    usages = [("TRAIN", "Training", 0), ("TRAIN", "Training", 1), ("TEST", "PublicTest", 0), ("TEST", "PrivateTest", 1)]
    (root / "fer2013").mkdir()
    with (root / "fer2013" / "fer2013.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["emotion", "pixels", "Usage"])
        for split, usage, number in usages:
            image, label = truth[split][number]
            writer.writerow([label, " ".join(map(str, image.reshape(-1))), usage])
    return truth


def fgvc_aircraft(root):
    data = root / "fgvc-aircraft-2013b" / "data"
    text(data / "variants.txt", "707-320", "Falcon 2000")
    text(data / "families.txt", "Boeing 707", "Falcon")
    truth: Truth = {}
    for number, split in enumerate(("train", "val", "trainval", "test")):
        names = [f"{number}00", f"{number}01"]
        truth[split.upper()] = [save(data / "images" / f"{name}.jpg", 1 - i) for i, name in enumerate(names)]
        text(data / f"images_variant_{split}.txt", f"{names[0]} Falcon 2000", f"{names[1]} 707-320")
        text(data / f"images_family_{split}.txt", f"{names[0]} Falcon")
    return truth


def flowers102(root):
    from scipy.io import savemat

    base = root / "flowers-102"
    labels = [77, 102, 1, 1, 50, 3]
    samples = [save(base / "jpg" / f"image_{i:05d}.jpg", label - 1) for i, label in enumerate(labels, start=1)]
    savemat(base / "imagelabels.mat", {"labels": np.array([labels], np.uint8)})
    savemat(base / "setid.mat", {"trnid": [[2, 1]], "valid": [[3, 5]], "tstid": [[6, 4]]})
    return {"TRAIN": samples[:2], "VAL": [samples[2], samples[4]], "TEST": [samples[5], samples[3]]}


def food101(root):
    base = root / "food-101"
    truth: Truth = {}
    for split in ("train", "test"):
        names = {"waffles": [f"waffles/{split}2", f"waffles/{split}1"], "apple_pie": [f"apple_pie/{split}3"]}
        files = [(name, int(kind == "waffles")) for kind in names for name in names[kind]]
        truth[split.upper()] = [save(base / "images" / f"{name}.jpg", label) for name, label in files]
        text(base / "meta" / f"{split}.json", json.dumps(names))
    return truth


def gtsrb(root):
    base = root / "gtsrb"
    images = base / "GTSRB" / "Final_Test" / "Images"
    test = [save(images / f"{number:05d}.ppm", label) for number, label in enumerate([16, 1])]
    rows = [f"{number:05d}.ppm;8;6;1;1;5;5;{label}" for number, (_, label) in enumerate(test)]
    text(base / "GT-final_test.csv", "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId", *rows)
    return {"TRAIN": class_folders(base / "GTSRB/Training", ["00000", "00001"], suffix="ppm"), "TEST": test}


def inaturalist(root):
    names = [f"{i:05d}_Animalia_Chordata_Aves_Order_Family_Genus_{kind}" for i, kind in enumerate(("merula", "pica"))]
    versions = {"TRAIN": "2021_train", "TRAIN_MINI": "2021_train_mini", "VAL": "2021_valid"}
    return {split: class_folders(root / version, names, per_class=3) for split, version in versions.items()}


def imagenette(root):
    names = ["n01440764", "n03888257"]
    return {
        split: class_folders(root / "imagenette2" / split.lower(), names, suffix="jpeg") for split in ("TRAIN", "VAL")
    }


def oxford_pets(root):
    base = root / "oxford-iiit-pet"
    truth: Truth = {}
    for split, part in (("TRAIN", "trainval"), ("TEST", "test")):
        names = [f"Abyssinian_{part}1", f"american_bulldog_{part}1", f"american_bulldog_{part}2"]
        truth[split] = [save(base / "images" / f"{name}.jpg", int("bulldog" in name)) for name in names]
        text(base / "annotations" / f"{part}.txt", *(f"{name} {1 + ('bulldog' in name)} 1 1" for name in names))
    return truth


def pcam(root):
    import h5py

    truth: Truth = {}
    (root / "pcam").mkdir()
    for split, part in (("TRAIN", "train"), ("VAL", "valid"), ("TEST", "test")):
        samples = truth[split] = arrays([1, 0, 1], 96, 96, 3)
        for key, array in (("x", np.stack([i for i, _ in samples])), ("y", np.array([[[[k]]] for _, k in samples]))):
            with h5py.File(root / "pcam" / f"camelyonpatch_level_2_split_{part}_{key}.h5", "w") as file:
                file[key] = array
    return truth


def places365(root):
    text(root / "categories_places365.txt", "/a/airfield 0", "/b/barn 1")
    truth: Truth = {}
    for split, part in (("TRAIN", "standard"), ("TRAIN_CHALLENGE", "challenge")):
        names = ["/a/airfield/00000001.jpg", "/b/barn/00000001.jpg"]
        folder = root / f"data_large_{part}"
        truth[split] = [save(folder / name[1:], label) for label, name in enumerate(names)]
        text(root / f"places365_train_{part}.txt", *(f"{name} {label}" for label, name in enumerate(names)))
    truth["VAL"] = [save(root / "val_large" / f"Places365_val_{i}.jpg", 1) for i in range(2)]
    text(root / "places365_val.txt", *(f"Places365_val_{i}.jpg 1" for i in range(2)))
    truth["TEST"] = [save(root / "test_large" / "Places365_test_0.jpg")]
    text(root / "places365_test.txt", "Places365_test_0.jpg")
    return truth


def rendered_sst2(root):
    base = root / "rendered-sst2"
    return {
        split: class_folders(base / folder, ["negative", "positive"], suffix="png")
        for split, folder in (("TRAIN", "train"), ("VAL", "valid"), ("TEST", "test"))
    }


def semeion(root):
    samples = [(RNG.integers(0, 2, (16, 16), dtype=np.uint8) * np.uint8(255), label) for label in (3, 9, 3, 3, 9)]
    rows = [[*(image.reshape(-1) // 255), *(int(label == digit) for digit in range(10))] for image, label in samples]
    text(root / "semeion.data", *(" ".join(f"{value:.4f}" for value in row) for row in rows))
    return {None: samples}


def stl10(root):
    base = root / "stl10_binary"
    truth = {"TRAIN": arrays([0, 9, 4], 96, 96, 3), "TEST": arrays([1], 96, 96, 3)}
    truth["UNLABELED"] = arrays([None, None], 96, 96, 3)
    text(base / "class_names.txt", "airplane", "bird")
    text(base / "fold_indices.txt", "0 2 ", "1 ")
    for split, samples in truth.items():  # columns before rows
        (base / f"{split.lower()}_X.bin").write_bytes(np.stack([i.transpose(2, 1, 0) for i, _ in samples]).tobytes())
        if split != "UNLABELED":
            (base / f"{split.lower()}_y.bin").write_bytes(bytes(label + 1 for _, label in samples))
    return truth


def sun397(root):
    base = root / "SUN397"
    text(base / "ClassName.txt", "/a/abbey", "/b/bazaar/indoor")
    files = [
        (f"{place}/sun_{i}.jpg", label) for label, place in enumerate(("a/abbey", "b/bazaar/indoor")) for i in "xyz"
    ]
    return {None: [save(base / name, label) for name, label in files]}


def svhn(root):
    from scipy.io import savemat

    truth = {split: arrays([1, 0, 9], 32, 32, 3) for split in ("TRAIN", "TEST", "EXTRA")}
    for split, samples in truth.items():
        labels = np.array([[label or 10] for _, label in samples], np.uint8)
        images = np.stack([image for image, _ in samples], axis=-1)
        savemat(root / f"{split.lower()}_32x32.mat", {"X": images, "y": labels})
    return truth


def stanford_cars(root):
    from scipy.io import savemat

    base = root / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": np.array(["Audi", "BMW"], object)})
    annotations = np.array([("1.jpg", 2), ("2.jpg", 1)], dtype=[("fname", object), ("class", object)])
    savemat(base / "devkit" / "cars_train_annos.mat", {"annotations": annotations})
    savemat(base / "cars_test_annos_withlabels.mat", {"annotations": annotations})
    return {
        split: [save(base / folder / "1.jpg", 1), save(base / folder / "2.jpg", 0)]
        for split, folder in (("TRAIN", "cars_train"), ("TEST", "cars_test"))
    }


def usps(root):
    truth: Truth = {}
    for split, name in (("TRAIN", "usps.bz2"), ("TEST", "usps.t.bz2")):
        samples = [(RNG.integers(0, 2, (16, 16), dtype=np.uint8) * np.uint8(255), label) for label in (0, 9)]
        lines = [
            f"{label + 1} " + " ".join(f"{i}:{value / 127.5 - 1}" for i, value in enumerate(image.reshape(-1), start=1))
            for image, label in samples
        ]
        (root / name).write_bytes(bz2.compress("\n".join(lines).encode()))
        truth[split] = samples
    return truth


LAYOUTS = {
    "CIFAR10": cifar10,
    "CIFAR100": cifar100,
    "CLEVRClassification": clevr,
    "Caltech101": caltech101,
    "Caltech256": caltech256,
    "Country211": country211,
    "DTD": dtd,
    "EMNIST": emnist,
    "EuroSAT": eurosat,
    "FER2013": fer2013,
    "FGVCAircraft": fgvc_aircraft,
    "Flowers102": flowers102,
    "Food101": food101,
    "GTSRB": gtsrb,
    "INaturalist": inaturalist,
    "Imagenette": imagenette,
    "KMNIST": kmnist,
    "MNIST": mnist,
    "OxfordIIITPet": oxford_pets,
    "PCAM": pcam,
    "Places365": places365,
    "QMNIST": qmnist,
    "RenderedSST2": rendered_sst2,
    "SEMEION": semeion,
    "STL10": stl10,
    "SUN397": sun397,
    "SVHN": svhn,
    "StanfordCars": stanford_cars,
    "USPS": usps,
}
