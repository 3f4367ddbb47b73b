"""The report shows the content of a run's files, whatever is missing, and shows text of files as text only."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from synthetic_run import FEATURE_STEPS, NUM_IMAGES, write_json, write_run
from tiny import metrics, run_train

from dinov2.report.__main__ import main
from dinov2.report.page import page
from dinov2.report.read_run import read_run, read_runs
from dinov2.report.run import Run
from dinov2.report.verdict import judge
from dinov2.train.environment import record_environment
from dinov2.train.monitor.alarms import Alarm

VOID = {"meta", "link", "img", "wbr", "path", "circle", "rect"}  # without end tag, or closed where they open


class Parsed(HTMLParser):
    """A page as a browser shows it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag != "wbr":
            self.texts.append(" ")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}>"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())

    def attributes(self, name: str) -> list[str | None]:
        return [attributes[name] for _, attributes in self.tags if name in attributes]


def parsed(*folders: Path) -> Parsed:
    return Parsed(page(read_runs(folders)))


def test_the_page_is_self_contained_and_well_formed(tmp_path: Path) -> None:
    html = page(read_runs([write_run(tmp_path / "run")]))
    found = Parsed(html)
    assert found.open == []
    assert all(str(source).startswith("data:image/") for source in found.attributes("src"))
    assert not {"script", "iframe", "object"} & {tag for tag, _ in found.tags}
    assert not re.search(r"url\(|https?:|@import", html)
    assert all(str(link)[0] in "#d" for link in found.attributes("href"))
    assert all(attributes["alt"] for tag, attributes in found.tags if tag == "img")
    assert all(
        attributes.get("aria-label") or attributes.get("aria-hidden") for tag, attributes in found.tags if tag == "svg"
    )
    assert len(found.attributes("id")) == len(set(found.attributes("id")))
    levels = [int(tag[1]) for tag, _ in found.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))


def test_the_numbers_are_those_of_the_files(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    lines = [json.loads(line) for line in (folder / "training_metrics.json").read_text().splitlines()]
    text = parsed(folder).text
    assert f"The loss fell from {lines[0]['total_loss']:.4g} to {lines[-1]['total_loss']:.4g}." in text
    assert f"rose from {lines[0]['knn']:.1f} % at step 0 (untrained) to {lines[-1]['knn']:.1f} % at step 799" in text
    best = max((line for line in lines if "knn" in line), key=lambda line: line["knn"])
    assert f"{best['knn']:.1f} % at step {best['iteration']}" in text
    assert f"images per second {128 / lines[-1]['iter_time']:.4g}" in text  # 64 images of each of two processes
    for result in ("trained, k = 10 82.40", "raw pixels, k = 20 82.50", "best classifier, top-5 99.25"):
        assert result in text
    assert "best teacher is that of step 599 (k-NN 82.8 %)" in text
    assert "optim.base_lr 0.004 0.0015" in text  # setting, default, here
    assert "python dinov2/train/train.py --config-file train/fashion_mnist" in text
    assert "0123456789abcdef0123456789abcdef01234567, with 2 changed file(s)" in text


def test_images_are_in_rows_of_steps_and_columns_of_images(tmp_path: Path) -> None:
    alts = [attributes["alt"] for tag, attributes in parsed(write_run(tmp_path / "run")).tags if tag == "img"]
    rows = ["Image {}", *(f"Features of image {{}} at step {step}, in colors" for step in FEATURE_STEPS)]
    assert alts == [row.format(index) for row in rows for index in range(1, NUM_IMAGES + 1)]


def test_text_of_files_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('&amp;')</script><img src=x>"
    folder = write_run(tmp_path / "<b>run", overrides=(f"train.dataset_path={evil}",), environment=False)
    sessions = [{"first_step": 0, "command": evil, "device": evil, "commit": evil, "processes": 1, "date": evil}]
    write_json(folder / "environment.json", {"sessions": sessions})
    write_json(folder / "knn.json", {"evaluation": evil, "metrics": {evil: 1.5}, "settings": {"train_dataset": evil}})
    with (folder / "training_metrics.json").open("a") as file:
        file.write(json.dumps({"iteration": 800, evil: 1.0}) + "\n")
    run = read_run(folder, "<i>name")
    run = replace(run, alarms=[Alarm(evil, 0, 5, False, evil, evil)], notes=[evil])
    for runs in ([run], [run, replace(run, tag="<u>B")]):
        found = Parsed(page(runs, title=f"{evil}"))
        tags = {tag for tag, _ in found.tags}
        assert not tags & {"script", "i", "b", "u"}
        assert "x" not in found.attributes("src")
        assert found.text.count(evil) >= 8


MISSING: dict[str, tuple[Callable[[Path], object], str]] = {
    "config": (lambda run: (run / "config.yaml").unlink(), "There is no config.yaml"),
    "config of another version": (
        lambda run: (run / "config.yaml").write_text("a: 1"),
        "not a configuration of this version",
    ),
    "config that is none": (
        lambda run: (run / "config.yaml").write_text("a: [1"),
        "not a configuration of this version",
    ),
    "metrics": (lambda run: (run / "training_metrics.json").unlink(), "There is no training_metrics.json yet"),
    "lines": (lambda run: (run / "training_metrics.json").write_text(""), "training_metrics.json has no line yet"),
    "patch features": (lambda run: shutil.rmtree(run / "health"), "has kept no patch features"),
    "images": (lambda run: (run / "health" / "images.npz").unlink(), "step 799"),
    "whole images": (lambda run: (run / "health" / "images.npz").write_bytes(b"PK"), "images.npz could not be read"),
    "tokens": (lambda run: np.save(run / "health" / "patch_tokens_0000199.npy", np.zeros((2, 2))), "step 399"),
    "environment": (lambda run: (run / "environment.json").unlink(), "Not recorded"),
    "whole environment": (lambda run: (run / "environment.json").write_text("{"), "Not recorded"),
    "results": (lambda run: (run / "knn.json").write_text("[]"), "knn.json could not be read"),
    "best": (lambda run: (run / "eval" / "training_599" / "health.json").write_text("{}"), "could not be read"),
}


@pytest.mark.parametrize("part", MISSING)
def test_missing_parts_are_noted_and_the_rest_is_shown(tmp_path: Path, part: str) -> None:
    folder = write_run(tmp_path / "run")
    remove, note = MISSING[part]
    remove(folder)
    found = parsed(folder)
    assert note in found.text
    assert str(tmp_path) not in found.text.replace(f"output_dir: {folder}", "")
    assert ("The loss fell" in found.text) == (part not in ("metrics", "lines"))
    assert ("Settings that are not the default" in found.text) == (not part.startswith("config"))
    assert "B: whole" in parsed(folder, write_run(tmp_path / "whole")).text


def test_lines_that_cannot_be_read_are_counted_and_the_later_of_two_counts(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=100, images=False, evaluations=False)
    path = folder / "training_metrics.json"
    repeated = {"iteration": 50, "total_loss": 123.0, "koleo_loss": float("nan")}
    path.write_text(path.read_text() + json.dumps(repeated) + '\n{"iteration": 100, "total_l')
    run = read_run(folder, "run")
    assert [record["iteration"] for record in run.records] == [*range(0, 100, 10), 99]
    assert run.records[5] == {"iteration": 50, "total_loss": 123.0}
    assert "1 line(s) of training_metrics.json could not be read" in Parsed(page([run])).text


def test_a_folder_without_a_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither config.yaml nor training_metrics.json"):
        read_runs([tmp_path])
    assert main([str(tmp_path / "nothing")]) == 1
    assert "nothing is not the output folder of a training: there is no such folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_one_file(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=100, images=False)
    before = set(folder.rglob("*"))
    assert main([str(folder)]) == 0
    assert set(folder.rglob("*")) - before == {folder / "report.html"}
    assert main([str(folder), str(folder), "--output", str(tmp_path / "new" / "two.html"), "--title", "A & B"]) == 0
    assert "<h1>A &amp; B</h1>" in (tmp_path / "new" / "two.html").read_text()


def test_several_runs_share_charts_and_tables(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a" / "run")
    second = write_run(tmp_path / "b" / "run", seed=1, overrides=("optim.base_lr=0.003",))
    third = write_run(tmp_path / "c" / "run", health=False, images=False, evaluations=False, environment=False)
    runs = read_runs([first, second, third])
    assert [run.title for run in runs] == ["A: a/run", "B: b/run", "C: c/run"]
    html = page(runs)
    text = Parsed(html).text
    assert (
        "Settings that differ between the runs. default A: a/run B: b/run C: c/run optim.base_lr 0.004 0.0015" in text
    )
    assert "optim.base_lr 0.004 0.0015 0.003 0.0015" in text
    assert "trained, k = 10 82.40 83.40 \N{EN DASH}" in text
    label = next(text for text in re.findall('aria-label="([^"]*)"', html) if text.startswith("Total loss"))
    assert [f"{tag} from " in label for tag in "ABCD"] == [True, True, True, False]
    (chart,) = re.findall('<svg class="chart"[^>]*aria-label="Total loss.*?</svg>', html, re.S)
    lines = re.findall(r'<path class="line line-(\d)"(?: stroke-dasharray="([^"]*)")?', chart)
    assert len(set(lines)) == 3 and len({dashes for _, dashes in lines}) == 3  # differ by either alone
    for run in runs:  # values at the ends
        assert f">{run.tag} {run.records[-1]['total_loss']:.4g}<" in chart


def test_the_page_of_a_long_run_stays_small(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=20_000)
    html = page(read_runs([folder]))
    assert len((folder / "training_metrics.json").read_text()) > 2_000_000
    assert len(html) < 700_000


@pytest.mark.parametrize(
    ("words", "headline"),
    [
        ({}, "Healthy"),
        ({"done": 300}, "Healthy so far"),
        ({"done": 11}, "Too early to judge"),
        ({"health": False}, "Finished, not monitored"),
        ({"collapse_at": 300}, "Needs attention: collapse"),
    ],
)
def test_the_verdict_is_at_the_top(tmp_path: Path, words: dict, headline: str) -> None:
    found = parsed(write_run(tmp_path / "run", images=False, evaluations=False, **words))
    position = found.text.index(headline)
    assert position < found.text.index("Alarms") if "Alarms" in found.text else True
    assert any(headline in text for text in found.texts)


@pytest.mark.parametrize(
    ("knn", "loss", "headline"),
    [
        ((60, 80, 79), (5, 4, 3), "Healthy so far"),
        ((60, 80, 69), (5, 4, 3), "Unclear: k-NN accuracy fell"),
        ((60, 59, 58), (5, 4, 3), "Unclear: k-NN accuracy fell"),
        ((60, 70, 80), (3, 4, 5), "Healthy so far"),  # losses may rise while features get better
        ((), (3, 4, 5), "Unclear: the loss did not fall"),
    ],
)
def test_a_run_without_alarms_is_not_healthy_whatever_it_has_learned(
    tmp_path: Path, knn: tuple[int, ...], loss: tuple[int, ...], headline: str
) -> None:
    run = read_run(write_run(tmp_path / "run", images=False), "run")
    records = [
        {"iteration": step, "total_loss": value, "cls_target_information": 1.0, "cls_target_capacity": 5.0}
        for step, value in enumerate(loss)
    ]
    for record, value in zip(records, knn, strict=False):
        record["knn"] = value
    assert judge(replace(run, records=records))[1] == headline


def test_an_accuracy_that_is_not_above_guessing_is_not_healthy(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", images=False), "run")
    for accuracy, headline in ((57.5, "Unclear: k-NN is not better than guessing"), (70.0, "Healthy so far")):
        records = [
            {"iteration": step, "total_loss": 5.0 - step, "cls_target_information": 1.0, "cls_target_capacity": 5.0}
            | {"knn": accuracy - 2 + step, "knn_chance": 65.8}
            for step in range(3)
        ]
        assert judge(replace(run, records=records))[1] == headline


def alarmed(run: Run, **changes: object) -> Run:
    alarm = Alarm("data bottleneck", 100, 200, True, "images came late", "use more of them")
    return replace(run, alarms=[alarm._replace(**changes)])  # type: ignore[arg-type]


def test_alarms_are_shown_with_their_steps_and_shaded(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", images=False), "run")
    html = page([alarmed(run)])
    text = Parsed(html).text
    assert "Ended healthy, after alarms" in text and "Alarms: data bottleneck (over)." in text
    assert "Data bottleneck over Steps 100 to 200: images came late. What to do use more of them" in text
    charts = html.count('<svg class="chart"')
    assert charts > 20 and html.count('<g class="span"><title>data bottleneck</title>') == charts
    text = Parsed(page([alarmed(run, over=False)])).text
    assert "Needs attention: data bottleneck" in text and "Since step 100: images came late." in text
    assert "span" not in Parsed(page([run])).attributes("class")


def test_settings_that_changed_on_the_way_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_train(tmp_path, "optim.epochs=1")
    monkeypatch.setattr(sys, "argv", ["dinov2-train", "--output-dir=OUT"])
    record_environment(tmp_path)
    assert "with another output folder it repeats it" in parsed(tmp_path).text
    record_environment(tmp_path, 4, changes="train.seed: 0 -> 5")
    text = parsed(tmp_path).text
    assert "from step 4: train.seed: 0 -> 5" in text and "It does not repeat it" in text
    assert "it repeats it" not in text


def test_a_training_writes_what_the_report_shows(tmp_path: Path) -> None:
    """With a real run instead of made-up files."""
    folder = tmp_path / "run"
    run_train(folder)
    record_environment(folder)
    found, lines = parsed(folder), metrics(folder)
    assert "Finished: all 8 steps" in found.text and "There is no" not in found.text
    assert f"to {lines[-1]['knn']:.1f} % at step 7" in found.text and "Not measured" not in found.text
    steps = {str(alt).partition("at step ")[2] for alt in found.attributes("alt")}
    assert steps == {"", "0, in colors", "3, in colors", "7, in colors"}
    charts = " ".join(str(label) for label in found.attributes("aria-label"))
    for title in (
        "Total loss",
        "Effective rank",
        "Information",
        "Gradient norms",
        "Images per second",
        "Learning rate",
    ):
        assert f"{title}: " in charts
    assert "Also logged" not in found.text, "everything that is logged is in the table of metrics"
    assert "eval/best" in found.text and "PyTorch" in found.text
