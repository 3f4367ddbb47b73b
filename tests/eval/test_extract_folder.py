"""A folder of features has the same bytes whenever the extraction was killed, and for any number of processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eval_images import tiny_backbone, write_images
from PIL import Image

import dinov2
from dinov2.eval.extract.__main__ import main
from dinov2.eval.extract.folder import FeatureFolder

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


class Killed(BaseException):
    """The process has ended here."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve images of three classes."""
    write_images(tmp_path / "images", 12, seed=0)
    return tmp_path / "images"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A config and the weights of a small backbone, of which the architecture cannot be inferred."""
    torch.save(tiny_backbone().state_dict(), tmp_path / "tiny.pth")
    (tmp_path / "tiny.yaml").write_text(
        "student: {arch: vit_small, patch_size: 8, embed_dim: 24, depth: 4, num_heads: 3, layerscale: 0.5}\n"
        "crops: {global_crops_size: 16, local_crops_size: 8}\n"
    )
    return tmp_path / "tiny.pth"


def command(weights: Path, images: object, output: Path, *words: object) -> list[str]:
    model = ["--config-file", weights.with_suffix(".yaml"), "--pretrained-weights", weights]
    return [str(word) for word in (*model, "--images", images, "--output", output, "--num-workers", 0, *words)]


def extract(folder: Path, output: Path, **options: Any) -> Path:
    return dinov2.extract_features(folder, model=tiny_backbone(), output=output, **{"shard_size": 5, **options})


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- Interruptions ---------------------------------------------------------------------------------------------------


def test_killed_three_times_and_continued_it_has_the_same_bytes(tmp_path: Path, weights: Path) -> None:
    images = write_images(tmp_path / "images", 240, seed=0)
    output = tmp_path / "killed"
    options = ["--tokens", "class", "patch", "--shard-size", 8, "--batch-size", 3]
    words = [sys.executable, "-m", "dinov2.eval.extract", *command(weights, images, output, *options)]
    for number in (1, 7, 15):
        process = subprocess.Popen(words, env=os.environ | SETTINGS, cwd=ROOT)
        while len(list(output.glob(".features_*.json"))) < number and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it had not finished"
        assert not json.loads((output / "metadata.json").read_text())["complete"]
    finished = {path.name: path.stat().st_mtime_ns for path in output.glob("features_*")}
    assert 15 <= len(finished) < 30
    assert main(command(weights, images, output, *options)) == 0
    kept = [name for name, at in finished.items() if (output / name).stat().st_mtime_ns == at]
    assert len(kept) >= 15, "finished shards are not computed again"
    assert main(command(weights, images, tmp_path / "other", *options)) == 0
    found, expected = content(output), content(tmp_path / "other")
    assert found.keys() == expected.keys() and len(expected) == 32
    assert [name for name in expected if found[name] != expected[name]] == []


@pytest.mark.parametrize("file_format", ["safetensors", "npy"])
def test_interrupted_at_any_write_it_has_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_format: str
) -> None:
    options = {"format": file_format, "tokens": ["class", "mean"]}
    expected = content(extract(folder, tmp_path / "whole", **options))
    replace, interruptions = Path.replace, 0
    for before in (True, False):
        for moment in range(100):
            left = moment

            def replace_or_die(self: Path, target: Path, before: bool = before) -> Path:
                nonlocal left
                if tmp_path not in target.parents:  # the cached list of the images
                    return replace(self, target)
                left -= 1
                if left < 0 and before:
                    raise Killed
                replaced = replace(self, target)
                if left < 0:
                    raise Killed
                return replaced

            output = tmp_path / f"{before}{moment}"
            monkeypatch.setattr(Path, "replace", replace_or_die)
            try:
                extract(folder, output, **options)
            except Killed:
                interruptions += 1
            monkeypatch.setattr(Path, "replace", replace)
            extract(folder, output, **options)
            assert content(output) == expected, moment
            if left >= 0:
                break
    # The metadata at the start and the end, names; of three shards the files and the entry.
    assert interruptions == 2 * (3 + 3 * (2 if file_format == "safetensors" else 3))


def test_a_process_killed_while_it_ends_leaves_nothing_behind(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = content(extract(folder, tmp_path / "whole"))

    def die(_: FeatureFolder) -> None:
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(FeatureFolder, "_delete_entries", die)
        extract(folder, tmp_path / "out")
    (tmp_path / "out" / ".features_00000.safetensors.1.unfinished").write_bytes(b"half")
    assert content(extract(folder, tmp_path / "out")) == expected


def test_a_complete_folder_is_not_computed_again(folder: Path, tmp_path: Path) -> None:
    output = extract(folder, tmp_path / "out")
    times = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    extract(folder, output)
    assert {path.name: path.stat().st_mtime_ns for path in output.iterdir()} == times


def test_a_damaged_shard_is_computed_again_before_the_end_and_an_error_after_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = content(extract(folder, tmp_path / "whole"))
    output = tmp_path / "out"

    def die(_: FeatureFolder) -> None:
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(FeatureFolder, "finish", die)
        extract(folder, output)
    damage(output / "features_00001.safetensors")
    extract(folder, output)
    assert "features_00001.safetensors is missing or damaged, and is computed again" in caplog.text
    assert content(output) == expected
    damage(output / "features_00002.safetensors")
    with pytest.raises(ValueError, match=r"features_00002\.safetensors is missing or damaged since .*--overwrite"):
        extract(folder, output)
    assert content(extract(folder, output, overwrite=True)) == expected


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


# --- Processes -------------------------------------------------------------------------------------------------------


def test_two_processes_write_the_bytes_of_one(folder: Path, tmp_path: Path, weights: Path) -> None:
    options = ["--tokens", "both", "--size", 24, "--shard-size", 5, "--batch-size", 2]
    assert main(command(weights, folder, tmp_path / "one", *options)) == 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    address |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    words = [sys.executable, "-m", "dinov2.eval.extract", *command(weights, folder, tmp_path / "two", *options)]
    processes = [
        subprocess.Popen(
            words,
            env=os.environ | address | SETTINGS | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert "Features: 0/4" in outputs[0], "batches of 2 + 2 + 1 and 2 images of its two shards"
    assert content(tmp_path / "two") == content(tmp_path / "one")


# --- Other settings --------------------------------------------------------------------------------------------------


def test_other_settings_are_refused_and_named(folder: Path, tmp_path: Path) -> None:
    output = extract(folder, tmp_path / "out")
    expected = content(output)
    for options, message in (
        ({"tokens": "patch"}, r'tokens \["class"\] there, \["patch"\] now'),
        ({"layers": [2]}, r"layers \[3\] there, \[2\] now"),
        ({"shard_size": 6}, "shard_size 5 there, 6 now"),
        ({"dtype": "float16"}, 'dtype "float32" there, "float16" now'),
        ({"format": "npy"}, 'format "safetensors" there, "npy" now'),
        ({"batch_size": 8}, "batch_size 64 there, 8 now"),
        ({"resize_size": 20}, "preprocessing.resize_size 16 there, 20 now"),
    ):
        with pytest.raises(ValueError, match=f"has features of other settings: {message}.* --overwrite to delete"):
            extract(folder, output, **options)
    model = tiny_backbone()
    model.norm.bias.data += 1
    with pytest.raises(ValueError, match="other settings: model.weights.tensors_sha256"):
        dinov2.extract_features(folder, model=model, output=output, shard_size=5)
    (folder / "new.png").write_bytes(next(folder.rglob("*.png")).read_bytes())
    with pytest.raises(ValueError, match="other settings: num_images 12 there, 13 now; names_sha256"):
        extract(folder, output)
    (folder / "new.png").unlink()
    assert content(output) == expected
    assert extract(folder, output, overwrite=True, format="npy", shard_size=20) == output
    assert sorted(content(output)) == ["features_00000.class_token.npy", "metadata.json", "names.jsonl"]


def test_without_a_finished_shard_the_settings_may_change(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(FeatureFolder, "write", die)
        extract(folder, tmp_path / "out")
    extract(folder, tmp_path / "out", batch_size=2)
    assert content(tmp_path / "out") == content(extract(folder, tmp_path / "whole", batch_size=2))


def test_outputs_of_something_else_are_refused_before_the_model_is_loaded(folder: Path, tmp_path: Path) -> None:
    def refused(output: Path, match: str) -> None:
        with pytest.raises((ValueError, OSError), match=match):
            dinov2.extract_features(folder, pretrained_weights="none.pth", output=output)

    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "--output .*file is a file: give a folder")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "features_00000.safetensors").write_text("")
    refused(tmp_path / "out", r"has features_00000\.safetensors but no metadata\.json, so its settings are unknown")
    (tmp_path / "out" / "metadata.json").write_text("{}")
    with pytest.raises(ValueError, match=r"metadata\.json is not that of features in format 1"):
        extract(folder, tmp_path / "out")
    extract(folder, tmp_path / "out", overwrite=True)
    assert len(dinov2.load_features(tmp_path / "out").names) == 12


def test_an_output_in_use_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    output.mkdir()
    code = (
        "import sys, time; from pathlib import Path; from dinov2.files import folder_lock\n"
        "with folder_lock(Path(sys.argv[1])):\n    print('locked', flush=True); time.sleep(60)"
    )
    words = [sys.executable, "-c", code, str(output)]
    with subprocess.Popen(words, env=os.environ | SETTINGS, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        from dinov2.eval.extract import folder as module

        lock = module.folder_lock
        monkeypatch.setattr(module, "folder_lock", lambda path: lock(path, patience=0.1))
        with pytest.raises(BlockingIOError, match="is in use by another run"):
            extract(folder, output)
        process.kill()


# --- Unreadable images -----------------------------------------------------------------------------------------------


def test_unreadable_images_have_no_row_and_are_listed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path / "images", 120, seed=0)
    expected = dinov2.extract_features(tmp_path / "images", model=tiny_backbone(), tokens="both")
    bad = tmp_path / "images" / "b" / "14.png"
    original = bad.read_bytes()
    bad.write_bytes(b"no image")
    position = expected.names.index(str(bad))
    output = extract(tmp_path / "images", tmp_path / "out", tokens="both", batch_size=1)
    found = dinov2.load_features(output)
    kept = [index for index in range(120) if index != position]
    assert found.names == [expected.names[index] for index in kept]
    torch.testing.assert_close(found.class_token, expected.class_token[kept])
    torch.testing.assert_close(found.patch_tokens, expected.patch_tokens[kept])
    [listed] = json.loads((output / "metadata.json").read_text())["unreadable"]
    assert (listed["image_index"], listed["name"]) == (position, str(bad)) and "no supported image" in listed["reason"]
    assert "1 of 120 images cannot be read and have no features: cannot read the image of sample" in caplog.text
    bad.write_bytes(original)
    assert extract(tmp_path / "images", output, tokens="both", batch_size=1)  # complete as it is


def test_too_many_unreadable_images_are_an_error_until_they_are_repaired(folder: Path, tmp_path: Path) -> None:
    expected = content(extract(folder, tmp_path / "whole"))
    bad = folder / "b" / "2.png"
    original = bad.read_bytes()
    bad.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1 of 12 images cannot be read, more than the 1%.*the first: .*2\.png"):
        extract(folder, tmp_path / "out")
    with pytest.raises(ValueError, match="1 of 12 images cannot be read"):
        dinov2.extract_features(folder, model=tiny_backbone())
    bad.write_bytes(original)
    assert content(extract(folder, tmp_path / "out")) == expected


def test_a_repaired_image_is_read_when_the_extraction_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "images", 120, seed=0)
    expected = content(extract(tmp_path / "images", tmp_path / "whole"))
    bad = tmp_path / "images" / "b" / "14.png"
    original = bad.read_bytes()
    bad.write_bytes(b"no image")

    def die(_: FeatureFolder) -> None:
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(FeatureFolder, "finish", die)
        extract(tmp_path / "images", tmp_path / "out")
    bad.write_bytes(original)
    assert content(extract(tmp_path / "images", tmp_path / "out")) == expected


# --- Memory ----------------------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path, weights: Path) -> None:
    images = [tmp_path / "0.png", tmp_path / "1.png"]
    for path in images:
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (160, 160, 3), np.uint8)).save(path)
    code = (
        "import json, resource, sys; from dinov2.eval.extract.__main__ import main\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    main(words); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    commands = []
    for count in (40, 300):
        listed = tmp_path / f"{count}.txt"
        listed.write_text("".join(f"{images[number % 2]}\n" for number in range(count)))
        words = command(weights, listed, tmp_path / str(count), "--size", "original", "--tokens", "patch")
        commands.append([*words, "--shard-size", "20", "--layers", "4"])
    process = [sys.executable, "-c", code, json.dumps(commands)]
    result = subprocess.run(process, env=os.environ | SETTINGS, capture_output=True, text=True, check=True)
    few, many = (int(line) / 1024 for line in result.stdout.splitlines() if line.isdigit())
    written = sum(path.stat().st_size for path in (tmp_path / "300").glob("features_*")) / 2**20
    assert written > 40 and many < few + 15, (written, few, many)
