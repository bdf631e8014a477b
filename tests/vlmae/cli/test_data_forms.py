"""From a form in which people hold data to the metric: prepared, trained on, evaluated."""

import io
import json
import sys
import tarfile

import pytest
from published_sets import small_media
from tiny_experiment import get_config

from data_pipelines.storage import prepare
from vlmae.cli.experiment import main
from vlmae.config.tree import override

OFF = {f"objectives.{name}": 0.0 for name in ("vtc", "vtm", "mlm", "mvm")}
ANSWERS = {"dog": 0, "cat": 1, "bird": 2}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Trains the tiny experiment on a prepared data set; returns a file of its results."""

    def run(name, result, changes):
        where = {"data.data_dir": str(tmp_path / "data")}
        config = override(get_config(), where | changes | {"train.steps": 2, "data.batch_size": 4})
        for part in ("train.0", "eval"):
            config = override(config, {f"data.{part}.name": name})
        monkeypatch.setattr(sys, "argv", ["tiny", "--workdir", str(tmp_path / "run")])
        main(lambda: config)
        return json.loads((tmp_path / "run" / result).read_text())

    return run


def test_questions_of_alpro_with_its_answer_list(tmp_path, run):
    """One of three test questions has an answer that is not in the published list."""
    answers = {"train": [*ANSWERS] * 2, "test": ["dog", "cat", "fish"]}
    words = ["annotations", "--name", "msrvtt_qa", "--media", str(tmp_path / "videos")]
    for split, said in answers.items():
        lines = [
            {"question": "what runs?", "answer": answer, "video_id": f"video{i}"}
            | {"answer_type": "what"}
            for i, answer in enumerate(said)
        ]
        path = tmp_path / f"{split}.jsonl"
        path.write_text("\n".join(map(json.dumps, lines)))
        words += ["--split", f"{split}={path}"]
    (tmp_path / "videos").mkdir()
    for i in range(6):
        (tmp_path / "videos" / f"video{i}.mp4").write_bytes(small_media()[".mp4"])
    listed = tmp_path / "train_ans2label.json"
    listed.write_text(json.dumps(ANSWERS))
    prepare.main([*words, "--data-dir", str(tmp_path / "data")])
    tuned = OFF | {"data.task": "questions", "objectives.answer": 1.0, "data.classes": str(listed)}
    metrics = run("msrvtt_qa", "answers.json", tuned)
    assert metrics["num_questions"] == 3 and metrics["answerable"] == pytest.approx(200 / 3)
    assert metrics["frequent_accuracy"] == pytest.approx(100 / 3)  # counted in training
    classes = json.loads((tmp_path / "run" / "classes.json").read_text())
    assert list(classes) == [*ANSWERS] and classes["bird"] == {"what": 2}


def test_pre_training_on_tar_shards(tmp_path, run):
    """One shard holds clips, the other the frames of clips."""
    media = small_media()
    shards = [{".mp4": media[".mp4"]}, {"_000.jpg": media[".jpg"], "_001.png": media[".png"]}]
    for shard, files in enumerate(shards):
        with tarfile.open(tmp_path / f"0000{shard}.tar", "w") as tar:
            for i in range(4):
                for suffix, data in {".txt": f"clip {shard} {i}".encode(), **files}.items():
                    member = tarfile.TarInfo(f"{i:09d}{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    words = ["webdataset", "--name", "web", "--data-dir", str(tmp_path / "data")]
    words += [f"--split=train={tmp_path}/{{00000..00001}}.tar"]
    prepare.main([*words, f"--split=test={tmp_path}/00001.tar"])
    metrics = run("web", "retrieval.json", {})
    assert metrics["num_clips"] == 4 and metrics["bad_clips"] == 0
    assert metrics["t2v_r1"] % 25 == 0 and metrics["t2v_r5"] == 100  # of four clips
