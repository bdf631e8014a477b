"""`vlmae prepare DIR` says what lies in a folder, and its commands work."""

import json
import pickle
import shlex

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from published_sets import FILES, MEDIA, fill

from data_pipelines.storage.builders.recognize import describe_folder
from data_pipelines.storage.prepare import main, parse_args, prepare


@pytest.mark.parametrize("name", FILES)
def test_published_sets_are_recognized(tmp_path, name):
    fill(tmp_path, FILES[name], MEDIA[name][:1])
    command = f"{name}: vlmae prepare {name} --manual-dir {tmp_path}"
    lines = describe_folder(tmp_path).splitlines()
    assert command in lines
    assert all(": vlmae prepare " in line for line in lines)


def line(video):
    return json.dumps({"video_id": video, "question": "what?", "answer": "dog"}) + "\n"


def test_the_commands_for_annotation_files_work(tmp_path, manual_dir, read_folder):
    files = {f"txt/{split}.jsonl": line(f"v_{split}") for split in ("train", "test")}
    files["txt/train_ans2label.json"] = {"dog": 0}
    media = [f"my videos/v_{split}.mp4" for split in ("train", "test")]
    folder = manual_dir(files, media)
    answers, command = describe_folder(folder).splitlines()
    assert answers == (
        f"{folder}/txt/train_ans2label.json: a list of answers: --data.classes "
        f"{folder}/txt/train_ans2label.json"
    )
    assert command == (
        f"annotations: vlmae prepare annotations --name txt --split test={folder}/txt/test.jsonl "
        f"--split train={folder}/txt/train.jsonl --media '{folder}/my videos'"
    )
    _, _, *words = shlex.split(command.partition(": ")[2])
    name, options = parse_args([*words, "--data-dir", str(tmp_path / "data")])
    splits = read_folder(prepare(name, **options))
    assert [item.match_id for item in splits["test"]] == ["v_test"]


def test_tars_and_parquet_files_are_grouped(tmp_path):
    for name in ("00000", "00001", "00002"):
        (tmp_path / "cc12m").mkdir(exist_ok=True)
        (tmp_path / "cc12m" / f"{name}.tar").write_bytes(b"")
        (tmp_path / "cc12m" / f"{name}.parquet").write_bytes(b"")
    (tmp_path / "hf" / "data").mkdir(parents=True)
    for split in ("train", "validation"):
        path = tmp_path / "hf" / "data" / f"{split}-00000-of-00001.parquet"
        pq.write_table(pa.table({"a": ["b"]}), path)
    assert describe_folder(tmp_path).splitlines() == [
        "webdataset: vlmae prepare webdataset --name cc12m --split "
        f"'train={tmp_path}/cc12m/{{00000..00002}}.tar'",
        f"parquet: vlmae prepare parquet --name data --split 'train={tmp_path}/hf/data/train-*-of-*"
        f".parquet' --split 'val={tmp_path}/hf/data/validation-*-of-*.parquet'",
    ]
    (tmp_path / "cc12m" / "00001.tar").unlink()
    assert f"'train={tmp_path}/cc12m/*.tar'" in describe_folder(tmp_path)


def test_what_is_not_read_says_why(tmp_path, capsys):
    (tmp_path / "raw-captions.pkl").write_bytes(pickle.dumps({}))
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    main([str(tmp_path)])
    empty, notes, captions = capsys.readouterr().out.splitlines()
    assert "empty.json: not read: has no entry" in empty
    assert "notes.csv: not read: " in notes and "no field for the media" in notes
    assert "raw-captions.pkl: not read: a pickle can run any code" in captions


def test_media_alone_need_a_manifest(tmp_path):
    assert describe_folder(tmp_path) == f"{tmp_path}: nothing that is known"
    fill(tmp_path, {}, ["a/1.mp4"])
    assert "media without texts; write a table" in describe_folder(tmp_path)
    (tmp_path / "train.jsonl").write_text('{"media": "a/1.mp4", "caption": "a"}\n')
    assert "manifest: vlmae prepare manifest" in describe_folder(tmp_path)
