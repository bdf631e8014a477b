"""Classification by prompts, against a loaded model; and names that do not fit the data."""

import json
from pathlib import Path

import numpy as np
import pytest
from exported_models import config_with, params_with, save_run
from PIL import Image

import vlmae
from data_pipelines.schema.checks import UserError
from data_pipelines.storage.prepare import main as prepare
from vlmae.cli.main import parse
from vlmae.config.experiment import EvaluationConfig
from vlmae.evaluation import zero_shot
from vlmae.evaluation.evaluate import evaluate_workdir
from vlmae.export.formats import export_run

ONLY_VTC = {f"objectives.{name}": 0.0 for name in ("vtm", "mlm", "mvm")}
PARTS = (
    *("answer_decoder", "choice_head", "classifier", "fusion", "logit_bias", "match_head"),
    *("pixel_decoder", "word_bias", "word_transform"),
)
CLASSES = {"w5": 3, "W6_w7": 2, "w8": 1}  # folders, and the pictures in each
PROMPTS = ("w20 {}", "{} w21 w22")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder of pictures for each class."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name, count in CLASSES.items():
        (root / name).mkdir()
        for i in range(count):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory) -> Path:
    """A run with VTC alone; the pictures are prepared as the split test of `sorted`."""
    root = tmp_path_factory.mktemp("zero_shot")
    data = root / "data"
    prepare(["folder", "--name", "sorted", "--split", f"test={pictures}", "--data-dir", str(data)])
    changes = {"data.data_dir": str(data), "model.num_classes": 0, "name": "vtc"}
    config = config_with(ONLY_VTC | changes)
    return save_run(config, root / "run", params_with({}, without=PARTS))


def classify(run: Path, **options) -> dict[str, float]:
    given = {"data": "sorted", "split": ("test",), "prompts": PROMPTS, "num_frames": 1}
    return evaluate_workdir(run, **given | options)["test"]


@pytest.mark.parametrize("exported", [False, True])
def test_clips_have_the_class_whose_prompts_fit_best(run, pictures, tmp_path, exported):
    """With a class that no clip has, and names in the form that the folders do not have."""
    names, words = ["w9", "w5", "w6 w7", "w8"], tmp_path / "names.txt"
    words.write_text("w9\nw5\nw6 w7\n\nw8\tw30\n")
    folder = run
    if exported:
        folder = tmp_path / "export"
        export_run(run, folder, "torch")
    model = vlmae.load(folder)
    said = ["w9", "w5", "w6 w7", "w30"]
    vectors = []
    for name in said:
        of_name = model.embed_text([text.replace("{}", name) for text in PROMPTS]).mean(axis=0)
        vectors.append(of_name / np.linalg.norm(of_name))
    options = {} if not exported else {"labels": words}
    data = {"labels": words} | options
    # An export has no folder of data: it is that of this machine.
    if exported:
        description = json.loads((folder / "config.json").read_text())
        description["experiment"]["data"]["data_dir"] = str(run.parent / "data")
        (folder / "config.json").write_text(json.dumps(description))
        (folder / "SHA256SUMS").unlink()
    metrics = classify(folder, **data)

    paths = [path for name in CLASSES for path in sorted((pictures / name).glob("*"))]
    truth = [names.index(path.parent.name.replace("_", " ").lower()) for path in paths]
    scores = model.embed_video(paths) @ np.stack(vectors).T
    ranks = np.array([(row >= row[i]).sum() for row, i in zip(scores, truth, strict=True)])
    right = {i: (ranks == 1)[np.array(truth) == i].mean() for i in set(truth)}
    assert metrics == {
        "zero_shot/top1": pytest.approx(100 * (ranks == 1).mean()),
        "zero_shot/top5": 100.0,
        "zero_shot/mean_per_class": pytest.approx(100 * np.mean([*right.values()])),
        "zero_shot/chance_top1": 25.0,
        "zero_shot/num_clips": 6.0,
        "zero_shot/num_classes": 4.0,
        "zero_shot/bad_clips": 0.0,
    }
    out = folder / "zero_shot_sorted_test"
    lines = [json.loads(line) for line in (out / "zero_shot.jsonl").read_text().splitlines()]
    found = {(Path(line["clip"]).parent.name, Path(line["clip"]).name): line for line in lines}
    for path, row, i in zip(paths, scores, truth, strict=True):
        line = found[path.parent.name, path.name]
        best = {said[k]: round(float(row[k]), 4) for k in np.argsort(-row)}
        assert line["label"] == said[i] and [*line["predicted"]] == [*best]
        assert line["predicted"] == pytest.approx(best, abs=2e-4)
    assert "top-1" in (out / "zero_shot.md").read_text()
    assert (out / "zero_shot.png").stat().st_size > 0 and not (out / "retrieval.json").exists()


def test_without_names_the_labels_of_the_split_are_the_classes(run, capsys):
    metrics = classify(run, prompts=("{}",))
    assert metrics["zero_shot/num_classes"] == 3
    assert "prompts: {}" in capsys.readouterr().out


def test_mean_per_class_and_ranks():
    right = np.array([True, True, True, False, False])
    assert zero_shot.mean_per_class(right, np.array([0, 0, 0, 0, 3])) == pytest.approx(37.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": ("a clip",)}, r"--prompts 'a clip' has no \{\} for the class, and is no file"),
        ({"prompts": ()}, r"--labels .*names.txt needs --prompts, such as"),
        (
            {"num_frames": 4, "labels": None},
            r"none of the 6 clips can be decoded; pictures need --num-frames 1",
        ),
        ({}, r"2 of the 3 labels of the data are not among the 2 of --labels: 'W6_w7' \(perhaps "),
    ],
)
def test_what_does_not_fit_is_said(run, tmp_path, options, message):
    names = tmp_path / "names.txt"
    names.write_text("w5\nw6_w77\n")
    with pytest.raises(UserError, match=message):
        classify(run, **{"labels": names} | options)


def test_files_of_templates_and_of_names(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("a video of {}\n\n{} is shown {here}\na video of {}\n")
    assert zero_shot.read_templates(["{}!", str(path)]) == [
        *("{}!", "a video of {}", "{} is shown {here}"),
    ]
    assert zero_shot.fill("{} is shown {here}", "a cat") == "a cat is shown {here}"
    path.write_text("a video of {}\nnothing\n")
    with pytest.raises(UserError, match=r"lines\.txt:2: 'nothing' has no \{\}"):
        zero_shot.read_templates([str(path)])
    path.write_text("riding_a_bike\nn014\ttench\n")
    assert zero_shot.read_names(path) == {"riding_a_bike": "riding a bike", "n014": "tench"}
    path.write_text("dog\ncat\nDog\n")
    with pytest.raises(UserError, match=r"lines\.txt:3: 'Dog' stands in line 1 already"):
        zero_shot.read_names(path)
    path.write_text("\n")
    with pytest.raises(UserError, match="names no class"):
        zero_shot.read_names(path)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (((), ()), "no clip of this split has a label"),
        ((("dog",), ("dog", "cat")), r"b\.mp4 has 2 labels \(dog, cat\), but each clip"),
        ((("dog",), ()), r"b\.mp4 has 0 labels \(none\)"),
    ],
)
def test_each_clip_needs_one_class(labels, message):
    with pytest.raises(UserError, match=message):
        zero_shot.number_labels(("a.mp4", "b.mp4"), labels, ["dog", "cat"])


def test_a_run_without_vtc_cannot_be_asked(run, tmp_path):
    off = {"objectives.vtc": 0.0, "objectives.vtm": 1.0, "name": "vtm"}
    other = save_run(config_with(off), tmp_path / "vtm")
    with pytest.raises(UserError, match=r"--evaluation\.prompts needs a trained head: set --obj"):
        classify(other)


def test_the_command_line_takes_several_templates():
    words = ["RUN", "--labels", "names.txt", "--prompts", "a video of {}", "{}"]
    assert parse("evaluate", words).keywords["prompts"] == ("a video of {}", "{}")
    with pytest.raises(UserError, match="needs --prompts"):
        EvaluationConfig(labels="names.txt")
