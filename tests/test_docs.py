"""README and docs: their commands, snippets, links and numbers agree with the code, and the site builds."""

import argparse
import importlib.util
import itertools
import json
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2 import config
from dinov2.config import Config
from dinov2.data.datasets import ImageNet, parse_dataset_str
from dinov2.metric_names import BY_NAME
from dinov2.models import build_model

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "MODEL_CARD.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOK = ROOT / "scripts" / "first_steps.ipynb"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def text_of(page: Path) -> str:
    text = page.read_text(encoding="utf-8")
    if page.suffix != ".ipynb":
        return text
    return "\n\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")


def blocks(page: Path, language: str) -> list[str]:
    return [code for name, code in FENCE.findall(text_of(page)) if name == language]


def inline_code(page: Path) -> list[str]:
    return [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", FENCE.sub("", text_of(page)))]


# --- Commands --------------------------------------------------------------------------------------------------------


class Command(NamedTuple):
    """A command of this repository: a script or module of Python, or a shell script, and its arguments."""

    page: str
    kind: str  # python | bash | pytest
    program: str  # path, "-m module"
    words: list[str]

    def __str__(self) -> str:
        return f"{self.page}: {self.program} {shlex.join(self.words)}"


def command_of(page: str, line: str) -> Command | None:
    """The command in a line of a shell; None if it is one of another program."""
    words = shlex.split(line, comments=True)
    words = list(itertools.dropwhile(lambda word: word == "srun" or re.fullmatch(r"[A-Z_]+=\S*", word), words))
    match words:
        case ["python", "-m", module, *rest] if module.startswith("dinov2"):
            return Command(page, "python", f"-m {module}", rest)
        case ["python", path, *rest] if path.startswith(("dinov2/", "scripts/")):
            return Command(page, "python", path, rest)
        case ["torchrun", *rest] if any(word.endswith(".py") for word in rest):
            first = next(i for i, word in enumerate(rest) if word.endswith(".py"))
            return Command(page, "python", rest[first], rest[first + 1 :])
        case ["bash", path, *rest]:
            return Command(page, "bash", path, rest)
        case ["pytest", *rest]:
            return Command(page, "pytest", "pytest", rest)
    return None


def find_commands() -> Iterator[Command]:
    for page in [*PAGES, NOTEBOOK]:
        starts = ("python ", "bash ", "pytest ", "srun ", "torchrun ")
        lines = [code for code in inline_code(page) if code.startswith(starts)]
        for block in blocks(page, "shell"):
            data = re.search(r"^# DATA: (.*)$", block, re.MULTILINE)
            unfolded = [line for line in block.replace("\\\n", " ").splitlines() if "python -c" not in line]
            lines += [re.sub(r"\bDATA$", data[1], line) if data else line for line in unfolded]
        for line in lines:
            if line.count("'") % 2 == 0 and (command := command_of(page.name, line)):
                yield command


COMMANDS = list(dict.fromkeys((c.page, c.kind, c.program, tuple(c.words)) for c in find_commands()))
PYTHON = [Command(page, kind, program, list(words)) for page, kind, program, words in COMMANDS if kind == "python"]
FOR_SHELL = [Command(page, kind, program, list(words)) for page, kind, program, words in COMMANDS if kind != "python"]


class Parsed(BaseException):
    """The arguments of a command have been accepted; nothing has run yet."""


def stop_after_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("parse_args", "parse_intermixed_args"):
        original = getattr(argparse.ArgumentParser, name)

        def parse(self: Any, *args: Any, original: Any = original, **kwargs: Any) -> None:
            raise Parsed(original(self, *args, **kwargs))

        monkeypatch.setattr(argparse.ArgumentParser, name, parse)


def parse(command: Command, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """The arguments as the program itself reads them from its command line."""
    words = ["train/quickstart" if word == "C" else word for word in command.words if word != "..."]
    words = ["eval/vits14_pretrain" if word == "CONFIG" else word for word in words]
    if "..." in command.words and "--config-file" not in words:
        words = ["--config-file", "train/quickstart", *words]
    stop_after_parsing(monkeypatch)
    monkeypatch.setattr(sys, "argv", [command.program, *words])
    monkeypatch.setattr(sys, "path", ["", *sys.path])  # whose first entry programs that run by path replace
    with warnings.catch_warnings(), pytest.raises(Parsed) as accepted:
        warnings.simplefilter("ignore")  # of modules that other tests have imported
        if command.program.startswith("-m "):
            runpy.run_module(command.program.removeprefix("-m "), run_name="__main__")
        else:
            runpy.run_path(str(ROOT / command.program), run_name="__main__")
    return accepted.value.args[0]


@pytest.mark.parametrize("command", PYTHON, ids=str)
def test_command_is_accepted_by_its_program(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    words = command.words or ["--help"]  # the name of a program, without the arguments that it may need
    command = command._replace(words=words)
    monkeypatch.chdir(folder)
    try:
        args = parse(command, monkeypatch)
    except SystemExit as end:
        assert end.code == 0, f"{command}\n{capsys.readouterr().err}"  # 0: --help
        return
    file = getattr(args, "config_file", None)
    if file is not None or hasattr(args, "opts"):
        file = ROOT / file if file and (ROOT / file).is_file() else file
        cfg = config.load(file, args.opts)
        if any(word.startswith("train.dataset_path=") for word in args.opts):
            parse_dataset_str(cfg.train.dataset_path)
    for name in ("train_dataset", "val_dataset"):
        if getattr(args, name, None) is not None:
            parse_dataset_str(getattr(args, name))


@pytest.mark.parametrize("command", FOR_SHELL, ids=str)
def test_scripts_and_tests_exist(command: Command) -> None:
    paths = [word.partition("::")[0] for word in command.words if "/" in word]
    for path in [command.program] * (command.kind == "bash") + paths * (command.kind == "pytest"):
        assert (ROOT / path).exists()


# --- Snippets of Python ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with what commands and snippets name: a run in OUT, and images."""
    folder = tmp_path_factory.mktemp("docs")
    cfg = config.load("train/quickstart")
    teacher = folder / "OUT" / "eval" / "training_24999" / "teacher_checkpoint.pth"
    teacher.parent.mkdir(parents=True)
    config.save(cfg, folder / "OUT" / "config.yaml")
    state = build_model(**config.backbone_arguments(cfg)).state_dict()
    torch.save({"teacher": {f"backbone.{name}": value for name, value in state.items()}}, teacher)
    (folder / "OUT" / "eval" / "best").symlink_to("training_24999")
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    for path in ("holiday/a.jpg", "birds/val/a.jpg", "birds/val/b.jpg"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / path)
    return folder


SNIPPETS = [(page, i, code) for page in PAGES for i, code in enumerate(blocks(page, "python"))]


@pytest.mark.parametrize(("page", "index", "code"), SNIPPETS, ids=[f"{page.name}-{i}" for page, i, _ in SNIPPETS])
def test_snippet_runs(page: Path, index: int, code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.sub(r"PATH(_|/)TO\1THIS\1(CLONE|REPOSITORY)", str(ROOT), code)
    code = code.replace('source="local"', 'source="local", pretrained=False')  # which would be a download
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    datasets = import_module("dinov2.data.datasets")
    monkeypatch.setattr(datasets, "DATASETS", dict(datasets.DATASETS))
    exec(compile(code, f"{page.name}, snippet {index}", "exec"), {"images": torch.randn(1, 3, 224, 224)})


def test_index_files_of_imagenet_are_made_as_documented() -> None:
    [command] = [block for page in PAGES for block in blocks(page, "shell") if "python -c" in block]
    compile(shlex.split(command)[2], "docs", "exec")
    assert callable(ImageNet.dump_extra) and len(ImageNet.Split) == 3


# --- Names -----------------------------------------------------------------------------------------------------------


def keys_of(kind: Any, prefix: str = "") -> Iterator[str]:
    for name, annotation in ((field.name, config.get_type_hints(kind)[field.name]) for field in fields(kind)):
        yield f"{prefix}{name}"
        if is_dataclass(annotation):
            yield from keys_of(annotation, f"{prefix}{name}.")


KEYS = set(keys_of(Config))


@pytest.mark.parametrize("page", [*PAGES, NOTEBOOK], ids=lambda page: page.name)
def test_configuration_keys_and_modules_in_the_text_exist(page: Path) -> None:
    sections = {key for key in KEYS if "." not in key}
    for code in inline_code(page):
        name = re.match(r"[\w.]+(?=$|=|: )", code)
        if name is None or "." not in name[0]:
            continue
        if name[0].split(".")[0] in sections and not name[0].endswith((".py", ".yaml")):
            assert name[0] in KEYS, f"{page.name}: {code}"
        if name[0].startswith("dinov2.") and not name[0].endswith((".html", ".py")):
            module, _, attribute = name[0].rpartition(".")
            if importlib.util.find_spec(name[0]) is None:
                assert hasattr(import_module(module), attribute), f"{page.name}: {code}"


def test_metrics_in_the_text_exist() -> None:
    codes = inline_code(ROOT / "docs" / "monitoring.md")
    names = {code for code in codes if re.fullmatch(r"(cls|patch|probe|grad|koleo|student|data|knn)[a-z_]*", code)}
    assert {"knn", "data_wait", "probe_cls_rank_me", "cls_target_information"} <= names <= BY_NAME.keys()


OTHER_PROGRAMS = {"--logdir", "--id"}  # of TensorBoard and wandb


@pytest.mark.parametrize("page", [*PAGES, NOTEBOOK], ids=lambda page: page.name)
def test_flags_in_the_text_exist(page: Path) -> None:
    sources = [*(ROOT / "dinov2").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]
    known = {flag for path in sources for flag in re.findall(r'"(--[\w-]+)"', path.read_text(encoding="utf-8"))}
    mentioned = {flag for code in inline_code(page) if code.startswith("--") for flag in re.findall(r"--[\w-]+", code)}
    assert mentioned <= known | OTHER_PROGRAMS


# --- Links -----------------------------------------------------------------------------------------------------------


def anchors_of(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text(encoding="utf-8"))):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors_of(target), f"{page.name}: {link}"


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", ".mkdocs.yml", "-d", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "build_model" in (tmp_path / "site" / "api" / "models" / "index.html").read_text()


# --- Numbers and words -----------------------------------------------------------------------------------------------


def test_readme_stays_short() -> None:
    lines = text_of(ROOT / "README.md").splitlines()
    assert len(lines) <= 200
    assert max(map(len, lines)) <= 130


def test_numbers_in_the_readme_are_those_of_the_pages() -> None:
    sections = re.split(r"^## ", text_of(ROOT / "README.md"), flags=re.MULTILINE)
    tables = [section for section in sections if section.startswith(("Is it right?", "How fast?"))]
    rows = [row for section in tables for row in re.findall(r"^\|.*\d \|$", section, re.MULTILINE)]
    cells = [row.split("|")[2].strip() for row in rows]
    assert len(cells) == 10
    known = set(re.findall(r"[\d.]+(?:e-\d+)?", text_of(ROOT / "docs" / "benchmarks.md")))
    assert set(cells) <= known


def test_expectations_of_recipes_are_those_of_the_model_card() -> None:
    rows = re.findall(r"^\| (?:`|ViT-)\S+.*$", text_of(ROOT / "MODEL_CARD.md"), re.MULTILINE)
    checked = 0
    for name in config.packaged_names():
        header = (ROOT / "dinov2" / "configs" / f"{name}.yaml").read_text(encoding="utf-8").split("\n\n")[0]
        if numbers := re.search(r"k-NN ([\d.]+) %, linear ([\d.]+) %", header):
            assert any(numbers[1] in row and numbers[2] in row for row in rows), name
            checked += 1
    assert checked == 11  # eight released models, three published recipes


BRITISH = r"(?i)\w*(colour|centre[sd]?\b|neighbour|behaviour|\bgrey|\blearnt|normalis|initialis|solaris|data sets?\b)"


@pytest.mark.parametrize(
    "page", [*PAGES, NOTEBOOK, *sorted((ROOT / "dinov2" / "configs").rglob("*.yaml"))], ids=lambda page: page.name
)
def test_spelling_is_american(page: Path) -> None:
    assert not [match[0] for match in re.finditer(BRITISH, text_of(page))]
