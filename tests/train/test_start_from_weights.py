"""Where a run may start from, and --eval-only: checkpoints, teacher checkpoints, backbones; strictly, or not at all."""

from pathlib import Path

import pytest
import torch
from checkpoint_files import write_checkpoint
from tiny import CENTERING, SEPARATE_HEADS, checkpoints, run_train, tensors, tiny_config, tiny_model
from torch import Tensor

from dinov2 import config
from dinov2.tools import __main__ as tools
from dinov2.train.network_files import load_training_weights
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.start.initial_weights import load_initial_weights

STANDSTILL = ["optim.epochs=1", "optim.base_lr=0", "optim.min_lr=0", "teacher.momentum_teacher=1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run whose student, teacher and centers all differ from where they started."""
    output_dir = tmp_path_factory.mktemp("trained")
    run_train(output_dir, CENTERING, "train.seed=5")
    return output_dir


def checkpoint(output_dir: Path) -> Path:
    return output_dir / "checkpoints" / "model_0000007"


def dump(output_dir: Path) -> Path:
    return output_dir / "eval" / "training_7" / "teacher_checkpoint.pth"


def model_in(output_dir: Path, iteration: int = 7) -> dict[str, Tensor]:
    """The networks and centers of a checkpoint."""
    stored = tensors(output_dir, iteration)
    return {name.removeprefix("model."): value for name, value in stored.items() if name.startswith("model.")}


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


# --- student.pretrained_weights --------------------------------------------------------------------------------------


def test_another_number_of_heads_than_the_run_of_a_teacher_is_named(trained: Path, tmp_path: Path) -> None:
    """Tensors do not determine it: without its run, the network would be another one in silence."""
    for source in (dump(trained), dump(trained).parent):
        with pytest.raises(ValueError, match="student.num_heads = 4, there 2"):
            run_train(tmp_path / "out", f"student.pretrained_weights={source}", "student.num_heads=4")
        run_train(tmp_path / "same", f"student.pretrained_weights={source}", *STANDSTILL, "--no-resume")


# --- MODEL.WEIGHTS ---------------------------------------------------------------------------------------------------


def test_a_checkpoint_gives_networks_and_centers_but_neither_optimizer_nor_iteration(
    trained: Path, tmp_path: Path
) -> None:
    run_train(tmp_path, f"MODEL.WEIGHTS={checkpoint(trained)}", *STANDSTILL)
    assert checkpoints(tmp_path) == [1], "the steps are counted from 0"
    assert_equal(model_in(tmp_path, 1), model_in(trained))
    assert tensors(tmp_path, 1)["optimizer.student.backbone.norm.weight.step"] == 2, "and so are those of AdamW"


def test_a_teacher_dump_gives_both_networks(trained: Path, tmp_path: Path) -> None:
    run_train(tmp_path, f"MODEL.WEIGHTS={dump(trained)}", *STANDSTILL)
    started, teacher = model_in(tmp_path, 1), torch.load(dump(trained))["teacher"]
    for side in ("student", "teacher"):
        assert_equal({name: started[f"{side}.{name}"] for name in teacher}, teacher)


@pytest.mark.parametrize("source", ["eval/training_7", "eval/best"])
def test_the_folder_of_a_teacher_is_its_file(source: str, trained: Path) -> None:
    by_folder, by_file = tiny_model(CENTERING), tiny_model(CENTERING)
    load_training_weights(by_folder, trained / source)
    load_training_weights(by_file, dump(trained))
    assert_equal(by_folder.state_dict(), by_file.state_dict())


def test_the_output_of_a_run_is_its_newest_checkpoint(trained: Path) -> None:
    model = tiny_model(CENTERING)
    load_training_weights(model, trained)
    assert_equal(model.state_dict(), model_in(trained))


def test_so_does_the_file_of_a_whole_checkpoint_with_its_student_and_centers(trained: Path, tmp_path: Path) -> None:
    assert tools.main(["convert", str(trained), str(tmp_path / "full.pth"), "--to", "full"]) == 0
    model = tiny_model(CENTERING)
    load_training_weights(model, tmp_path / "full.pth")
    assert_equal(model.state_dict(), model_in(trained))


def test_a_run_that_resumes_does_not_start_from_weights(trained: Path, tmp_path: Path) -> None:
    run_train(tmp_path, *STANDSTILL)
    run_train(tmp_path, *STANDSTILL, "optim.epochs=2", f"MODEL.WEIGHTS={dump(trained)}")
    assert_equal(model_in(tmp_path, 3), model_in(tmp_path, 1))


@pytest.mark.parametrize("source", [checkpoint, dump])
@pytest.mark.parametrize(
    "change",
    ["student.depth=1", "student.depth=3", "student.embed_dim=64", "dino.head_n_prototypes=8", *SEPARATE_HEADS[:1]],
)
def test_weights_of_another_model_are_refused_by_name(change: str, source: object, trained: Path) -> None:
    path = source(trained)
    with pytest.raises(ValueError, match=f"(?s){path}.*(student|backbone|head|center)"):
        load_training_weights(tiny_model(change), path)


def test_a_backbone_alone_is_no_model_and_the_error_names_its_key(tmp_path: Path) -> None:
    path = tmp_path / "backbone.pth"
    torch.save(tiny_model().student_backbone.state_dict(), path)
    with pytest.raises(ValueError, match="for a backbone alone use student.pretrained_weights"):
        load_training_weights(tiny_model(), path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value: float, trained: Path, tmp_path: Path) -> None:
    content = torch.load(dump(trained))
    content["teacher"]["backbone.norm.weight"][3] = value
    torch.save(content, tmp_path / "teacher.pth")
    with pytest.raises(ValueError, match=r"teacher\.pth are not finite .*: backbone\.norm\.weight$"):
        load_training_weights(tiny_model(CENTERING), tmp_path / "teacher.pth")
    stored = tensors(trained, 7)
    stored["model.student.dino_head.mlp.0.bias"][0] = value
    folder = write_checkpoint(tmp_path / "model_0000007", stored)
    with pytest.raises(ValueError, match=r"model_0000007 are not finite .*: model\.student\.dino_head\.mlp\.0\.bias$"):
        load_training_weights(tiny_model(CENTERING), folder)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="MODEL.WEIGHTS: no weights at .*nowhere.pth"):
        run_train(tmp_path, "MODEL.WEIGHTS=/nowhere.pth")
    with pytest.raises(ValueError, match=f"cannot load the model from {tmp_path}: .*metadata"):
        load_training_weights(tiny_model(), tmp_path)


# --- student.pretrained_weights --------------------------------------------------------------------------------------


def starts_from(path: Path, *overrides: str) -> SSLMetaArch:
    settings = (f"student.pretrained_weights={path}", *overrides)
    model = tiny_model(*settings, seed=1)
    load_initial_weights(model, tiny_config(*settings))
    return model


def test_pretrained_weights_fill_both_backbones_from_any_layout(trained: Path, tmp_path: Path) -> None:
    flat = tmp_path / "backbone.pth"
    wanted = {
        n.removeprefix("backbone."): v for n, v in torch.load(dump(trained))["teacher"].items() if "backbone" in n
    }
    torch.save(wanted, flat)
    for path in (flat, dump(trained)):
        model = starts_from(path)
        assert_equal(dict(model.student["backbone"].state_dict()), wanted)
        assert_equal(dict(model.teacher["backbone"].state_dict()), wanted)
        assert_equal(dict(model.student["dino_head"].state_dict()), dict(model.teacher["dino_head"].state_dict()))


def test_heads_of_a_pretrained_model_are_new(trained: Path) -> None:
    head = starts_from(dump(trained)).student["dino_head"].state_dict()
    assert not torch.equal(head["mlp.0.weight"], torch.load(dump(trained))["teacher"]["dino_head.mlp.0.weight"])


def test_a_pretrained_backbone_that_does_not_fit_is_refused(trained: Path) -> None:
    with pytest.raises(ValueError, match="(?s)do not fit this backbone, nothing was loaded.*blocks.2"):
        starts_from(dump(trained), "student.depth=3")


# --- --eval-only -----------------------------------------------------------------------------------------------------


def test_eval_only_writes_the_teacher_of_the_latest_checkpoint(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").symlink_to(trained / "checkpoints")
    run_train(tmp_path, "--eval-only", f"MODEL.WEIGHTS={tmp_path / 'not read'}")
    written = tmp_path / "eval" / "manual_8" / "teacher_checkpoint.pth"
    assert_equal(torch.load(written)["teacher"], torch.load(dump(trained))["teacher"])
    assert checkpoints(tmp_path) == [3, 5, 7] and not (tmp_path / "training_metrics.json").exists()


@pytest.mark.parametrize("source", [checkpoint, dump])
def test_eval_only_without_a_checkpoint_writes_the_teacher_of_model_weights(
    source: object, trained: Path, tmp_path: Path
) -> None:
    run_train(tmp_path, "--eval-only", f"MODEL.WEIGHTS={source(trained)}", "optim.epochs=9")
    written = tmp_path / "eval" / "manual_0" / "teacher_checkpoint.pth"
    assert_equal(torch.load(written)["teacher"], torch.load(dump(trained))["teacher"])
    assert config.load(tmp_path / "config.yaml").optim.epochs == 9, "an evaluation of it finds its config"


def test_eval_only_leaves_the_config_of_the_run_alone(tmp_path: Path) -> None:
    run_train(tmp_path, "optim.epochs=1")
    before = (tmp_path / "config.yaml").read_text()
    run_train(tmp_path, "--eval-only", "optim.epochs=77")
    assert (tmp_path / "config.yaml").read_text() == before


def test_eval_only_with_no_resume_takes_model_weights(trained: Path, tmp_path: Path) -> None:
    run_train(tmp_path, "optim.epochs=1")
    run_train(tmp_path, "--eval-only", "--no-resume", f"MODEL.WEIGHTS={dump(trained)}")
    written = tmp_path / "eval" / "manual_0" / "teacher_checkpoint.pth"
    assert_equal(torch.load(written)["teacher"], torch.load(dump(trained))["teacher"])


def test_eval_only_with_nothing_to_write_is_an_error_and_writes_no_random_weights(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint in .*checkpoints and MODEL.WEIGHTS is empty"):
        run_train(tmp_path, "--eval-only")
    assert not (tmp_path / "eval").exists()


# --- init_from -------------------------------------------------------------------------------------------------------


def test_an_own_run_gives_networks_heads_and_centers_of_its_newest_checkpoint(trained: Path, tmp_path: Path) -> None:
    run_train(tmp_path, f"init_from={trained}", *STANDSTILL)
    assert_equal(model_in(tmp_path, 1), model_in(trained))


def test_a_step_selects_the_checkpoint(trained: Path, tmp_path: Path) -> None:
    run_train(tmp_path, f"init_from={trained}:5", *STANDSTILL)
    assert_equal(model_in(tmp_path, 1), model_in(trained, 5))


def test_without_checkpoints_both_networks_start_from_the_best_teacher(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "eval").symlink_to(trained / "eval")
    settings = (f"init_from={tmp_path / 'old'}",)
    model = tiny_model(*settings, seed=1)
    load_initial_weights(model, tiny_config(*settings))
    best = torch.load(trained / "eval" / "best" / "teacher_checkpoint.pth")["teacher"]
    assert_equal(dict(model.student.state_dict()), best)
    assert_equal(dict(model.teacher.state_dict()), best)


def test_another_resolution_resamples_the_positions_of_both(trained: Path, tmp_path: Path) -> None:
    run_train(tmp_path, f"init_from={trained}", *STANDSTILL, "crops.global_crops_size=42")
    stored = model_in(tmp_path, 1)
    for side in ("student", "teacher"):
        assert stored[f"{side}.backbone.pos_embed"].shape == (1, 1 + 36, 32)
    name = "teacher.dino_head.last_layer.weight_v"
    assert torch.equal(stored[name], model_in(trained)[name])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/nowhere", "init_from: /nowhere is not the output folder of a run: there is no such folder"),
        ("{trained}:6", "init_from: .* has no checkpoint of step 6; there are: 3, 5, 7"),
        ("{trained}:last", "init_from: .*: expected OUT or OUT:STEP"),
        ("{empty}", "init_from: .* has neither checkpoints nor eval/best/teacher_checkpoint.pth"),
    ],
)
def test_what_is_no_run_or_step_is_an_error(source: str, message: str, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        run_train(tmp_path / "run", f"init_from={source.format(trained=trained, empty=tmp_path / 'empty')}")


def test_init_from_replaces_the_weights_of_a_recipe(trained: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = (f"init_from={trained}", "student.pretrained_weights=/not/read.pth")
    model = tiny_model(*settings, seed=1)
    with caplog.at_level("INFO"):
        load_initial_weights(model, tiny_config(*settings))
    assert f"init_from={trained} replaces student.pretrained_weights=/not/read.pth" in caplog.text
    assert torch.equal(model.student_backbone.cls_token, model_in(trained)["student.backbone.cls_token"])


def test_other_networks_than_those_of_the_run_are_named(trained: Path, tmp_path: Path) -> None:
    changed = ["student.embed_dim=64", "dino.head_n_prototypes=32"]
    with pytest.raises(ValueError, match="init_from: cannot load the model from ") as error:
        run_train(tmp_path, f"init_from={trained}", *changed)
    assert str(error.value).endswith(
        ". Settings there -> here: dino.head_n_prototypes: 16 -> 32; student.embed_dim: 32 -> 64"
    )


def test_what_a_name_was_meant_to_be_is_suggested(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no weights at dinov2_vits41; did you mean dinov2_vits14. Names"):
        run_train(tmp_path, "student.pretrained_weights=dinov2_vits41")
    with pytest.raises(FileNotFoundError, match="no weights at /nowhere/dinov2_vits14.pth$"):
        run_train(tmp_path, "student.pretrained_weights=/nowhere/dinov2_vits14.pth")
