"""Annotation files of other code bases, in every form, with texts of our own."""

import json
import pickle
import sqlite3

import pytest

from data_pipelines.schema.checks import UserError
from data_pipelines.schema.records import Question
from data_pipelines.storage.builders.annotation import Annotation
from data_pipelines.storage.builders.annotation_files import read_annotations
from data_pipelines.storage.prepare import parse_args, prepare

DOGS = ("a dog runs", "the dog is brown")


def lines(*entries):
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def question(text, answer, kind="", options=()):
    return ((), (Question(text, answer, kind, options),))


# Form -> name of the file, its text, and media -> (captions, questions) of the split "val".
FORMS = {
    "ALPRO, ClipBERT: questions": (
        "val.jsonl",
        lines(
            {
                "answer": "sofa",
                "question": "what is red?",
                "video_id": "video7",
                "answer_type": "x",
            },
            {"answer": "two", "question": "how many?", "video_id": "video8"},
        ),
        {"video7": question("what is red?", "sofa", "x"), "video8": question("how many?", "two")},
    ),
    "ClipBERT: retrieval": (
        "ret.jsonl",
        lines(
            {"caption": DOGS[0], "clip_name": "data/mp4/video7", "sen_id": 0, "label": 1},
            {"caption": DOGS[1], "clip_name": "data/mp4/video7", "sen_id": 1, "label": 2},
        ),
        {"data/mp4/video7": (DOGS, ())},
    ),
    "ClipBERT: multiple choice": (
        "mc.jsonl",
        lines({"qid": "mc0", "clip_name": "v7", "title": "x", "answer": "1", "options": DOGS}),
        {"v7": ((DOGS[1],), (Question("", DOGS[1], "multiple choice", DOGS),))},
    ),
    "ClipBERT: TGIF": (
        "action.jsonl",
        lines({"gif_name": "g", "question": "what?", "options": DOGS, "answer": 0}),
        {"g": question("what?", DOGS[0], "", DOGS)},
    ),
    "M2: COCO": (
        "coco.jsonl",
        lines({"caption": DOGS, "image": "val2014/1.jpg"}),
        {"val2014/1.jpg": (DOGS, ())},
    ),
    "Frozen": (
        "MSR_VTT.json",
        json.dumps(
            {
                "info": {},
                "images": [{"id": "video7"}],
                "annotations": [{"image_id": "video7", "caption": c, "id": 3} for c in DOGS],
            }
        ),
        {"video7": (DOGS, ())},
    ),
    "official COCO": (
        "captions_val2014.json",
        json.dumps(
            {
                "images": [{"id": 7, "file_name": "x_7.jpg"}],
                "annotations": [{"image_id": 7, "id": 1, "caption": DOGS[0]}],
            }
        ),
        {"x_7.jpg": (DOGS[:1], ())},
    ),
    "official MSR-VTT": (
        "train_val_videodatainfo.json",
        json.dumps(
            {
                "videos": [
                    {"video_id": "video7", "split": "validate", "id": 7},
                    {"video_id": "video1", "split": "train", "id": 1},
                ],
                "sentences": [
                    {"caption": DOGS[0], "video_id": "video7", "sen_id": 0},
                    {"caption": "a cat", "video_id": "video1", "sen_id": 1},
                    {"caption": DOGS[1], "video_id": "video7", "sen_id": 2},
                ],
            }
        ),
        {"video7": (DOGS, ())},
    ),
    "VIOLET": (
        "txt_msrvtt-retrieval.json",
        json.dumps(
            {
                "train": [{"video": "video1", "caption": "a cat"}],
                "val": [{"video": "video7", "caption": DOGS[0]}],
            },
            indent=1,
        ),
        {"video7": (DOGS[:1], ())},
    ),
    "X-Pool": ("captions_msvd.json", json.dumps({"a_0_5": DOGS}), {"a_0_5": (DOGS, ())}),
    "CLIP4Clip's pickle, converted": (
        "raw-captions.json",
        json.dumps({"a_0_5": [caption.split() for caption in DOGS]}),
        {"a_0_5": (DOGS, ())},
    ),
    "ActivityNet Captions": (
        "val_1.json",
        json.dumps({"v_a": {"duration": 9.0, "sentences": DOGS}}),
        {"v_a": (DOGS, ())},
    ),
    "HQGA: open questions": (
        "val.csv",
        "video,width,height,question,answer,qid,type\n7010,9,9,what runs,dog,1,10\n",
        {"7010": question("what runs", "dog", "10")},
    ),
    "HQGA, NExT-QA: options": (
        "val.csv",
        "video,question,a0,a1,a2,a3,a4,answer,qid\n26,how many,4,3,2,1,0,4,ACTION4\n",
        {"26": question("how many", "0", "", ("4", "3", "2", "1", "0"))},
    ),
    "official SSv2": (
        "something-something-v2-validation.json",
        json.dumps([{"id": "74", "label": "holding a cup", "template": "Holding [x]"}]),
        {"74": (("holding a cup",), ())},
    ),
    "T-MASS": (
        "test_label.csv",
        f'success,video_path,starts,text,formatted_data\nTrue,/x/a.m4v,tensor([[0]]),"{DOGS[0]}",y\n',
        {"/x/a.m4v": (DOGS[:1], ())},
    ),
    "separated by semicolons": (
        "MSRVTT_JSFUSION_test.csv",
        f"\ufeffkey;vid_key;video_id;sentence\nret0;msr7;video7;{DOGS[0]}\n",
        {"video7": (DOGS[:1], ())},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read(tmp_path, form):
    name, text, expected = FORMS[form]
    (tmp_path / name).write_text(text)
    found = {item.media: (item.captions, item.questions) for item in read(tmp_path / name)}
    assert found == expected


def read(path, split="val"):
    return list(read_annotations(path, split))


@pytest.mark.parametrize("media_type", ["image", "video"])
def test_sqlite(tmp_path, media_type):
    with sqlite3.connect(tmp_path / "a.sqlite.db") as db:
        db.execute(f"CREATE TABLE annos (id integer PRIMARY KEY, {media_type} text, caption text)")
        db.executemany("INSERT INTO annos VALUES (?, ?, ?)", [(0, "b/2", "a"), (1, "a/1", "b")])
    first, second = read(tmp_path / "a.sqlite.db")
    assert first == Annotation(
        "b/2", f"{tmp_path}/a.sqlite.db: annos[0]", ("a",), (), (), "", media_type
    )
    assert second.media == "a/1" and second.captions == ("b",)
    with sqlite3.connect(tmp_path / "empty.db") as db:
        db.execute("CREATE TABLE x (id integer)")
        db.execute("CREATE TABLE y (id integer)")
    with pytest.raises(UserError, match="has no table 'annos'"):
        read(tmp_path / "empty.db")


@pytest.mark.parametrize("name", ["raw-captions.pkl", "captions"])
def test_pickles_are_refused_with_the_way_to_convert_them(tmp_path, name):
    captions = {"a_0_5": [["a", "dog"], ["the", "dog"]]}
    (tmp_path / name).write_bytes(pickle.dumps(captions))
    with pytest.raises(
        UserError, match=r"a pickle can run any code.*convert it: python -c"
    ) as error:
        read(tmp_path / name)
    code = str(error.value).split('python -c "')[1].removesuffix('"')
    here = {"open": lambda path, mode="r": (tmp_path / path).open(mode)}
    exec(code, here)  # what the message says to do
    [item] = read(tmp_path / f"{name.removesuffix('.pkl')}.json")
    assert item.captions == ("a dog", "the dog")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PAR1xxxx", "vlmae prepare parquet"),
        (b"\x1f\x8bxxxx", "unpack it first"),
        (b"PK\x03\x04xxxx", "unpack it first"),
        (b'{"train": [{"video": "a", "caption": "b"}]}', "no split 'val'; it has train"),
        (b'{"train": ', "not JSON"),
        (b'{"dog": 0, "cat": 1}', "a list of answers, not annotations: --data.classes takes it"),
    ],
)
def test_other_forms_are_refused_with_advice(tmp_path, content, message):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError, match=f"{tmp_path}/file: .*{message}"):
        read(tmp_path / "file")


def test_lists_choose_the_clips(tmp_path, manual_dir, read_folder):
    captions = {f"clip{number}": [f"caption {number}"] for number in range(4)}
    files = {
        "all.json": captions,
        "train_list.txt": "clip2\nclip0\n",
        "test.csv": "key,video_id,sentence\n0,clip3,a cat\n",
    }
    folder = manual_dir(files, [f"videos/clip{number}.mp4" for number in range(4)])
    words = ["annotations", "--name", "mine", "--media", str(folder / "videos")]
    words += [f"--split={split}={folder}/all.json" for split in ("train", "test")]
    words += [f"--list=train={folder}/train_list.txt", f"--list=test={folder}/test.csv"]
    name, options = parse_args([*words, "--data-dir", str(tmp_path / "data")])
    splits = read_folder(prepare(name, **options))
    found = {split: [item.captions for item in items] for split, items in splits.items()}
    assert found == {"train": [["caption 0"], ["caption 2"]], "test": [["caption 3"]]}
    (folder / "train_list.txt").write_text("clip2\nclip9\n")
    name, options = parse_args([*words, "--data-dir", str(tmp_path / "other")])
    with pytest.raises(UserError, match=r"train_list.txt: 'clip9' is not in .*all.json"):
        prepare(name, **options)


@pytest.mark.parametrize(
    ("media", "file"),
    [
        ("7", "videos/video7.mp4"),
        ("7", "videos/vid7.avi"),
        ("abc", "videos/v_abc.mts"),
        ("data/mp4/video7", "videos/a/video7.mp4"),
        ("/elsewhere/b.mpg", "videos/b.m4v"),
    ],
)
def test_clips_are_found_by_the_names_of_other_code_bases(
    tmp_path, manual_dir, read_folder, media, file
):
    folder = manual_dir({"test.jsonl": lines({"video_id": media, "caption": "a dog"})}, [file])
    options = {"name": "mine", "splits": {"test": folder / "test.jsonl"}}
    prepared = prepare("annotations", tmp_path / "data", manual_dir=folder / "videos", **options)
    [example] = read_folder(prepared)["test"]
    assert example.match_id == media and example.media_type == "video"


def test_fields_of_other_names(tmp_path, manual_dir, read_folder):
    entry = {"id": "1", "label": "holding a cup", "template": "Holding [something]"}
    folder = manual_dir({"test.json": [entry]}, ["1.webm"])
    words = ["annotations", "--name=mine", f"--split=test={folder}/test.json", f"--media={folder}"]
    words += ["--field=caption=template", f"--data-dir={tmp_path / 'data'}"]
    name, options = parse_args(words)
    [example] = read_folder(prepare(name, **options))["test"]
    assert example.captions == ["Holding [something]"]
    for wrong, message in (
        ({"fields": {"x": "y"}}, "--field x: must be one of media, caption"),
        ({"lists": {"x": "y"}}, "--list x: no --split of that name"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(name, tmp_path, name="mine", splits={"test": "x"}, **wrong)


@pytest.mark.parametrize("word", ["--split=test", "--split=test=", "--split==a", "--list=a"])
def test_malformed_pairs_end_the_command(word):
    words = ["annotations", "--name=mine", "--split=train=a", word]
    with pytest.raises(SystemExit):
        parse_args(words)
    with pytest.raises(SystemExit):
        parse_args([*words[:3], "--split=train=b"])


def test_annotations_with_captions_and_questions(tmp_path, manual_dir, read_folder):
    entries = [
        {"video": "v/1.mp4", "caption": "a dog"},
        {"image": "2.jpg", "caption": ["a cat", "a black cat"]},
        {"image": "2.jpg", "question": "what?", "answer": ["dog", "cat", "cat"], "question_id": 1},
        {"video": "v/1.mp4", "question": "who?", "answer": "dog", "answer_type": "animal"},
        {"video": "v/3.mp4", "caption": ["a cup", "a dog"], "answer": 1},
    ]
    folder = manual_dir({"train.json": entries}, ["v/1.mp4", "2.jpg", "v/3.mp4"])
    options = {"name": "mine", "splits": {"train": folder / "train.json"}}
    folder = prepare("annotations", tmp_path / "data", manual_dir=folder, **options)
    image, first, third = read_folder(folder)["train"]
    assert image.captions == ["a cat", "a black cat"] and image.media_type == "image"
    assert image.questions == [Question("what?", "cat", "")]
    assert first.captions == ["a dog"] and first.questions == [Question("who?", "dog", "animal")]
    assert third.questions == [Question("", "a dog", "multiple choice", ("a cup", "a dog"))]
    assert folder.parent.name == "mine"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"video": "1.mp4"}, "no field for the caption"),
        ({"video": "1.mp4", "caption": 3}, "field 'caption' must be a list"),
        ({"video": [3], "caption": "a"}, "field 'video' must hold texts only"),
        ({"video": "1.mp4", "caption": ["a", "b"], "answer": 2}, "field 'answer' must be"),
        (
            {"caption": "a"},
            r"no field for the media \(video, image, .*; say which by --field media",
        ),
        (
            {"video": "1", "options": ["1", "0"], "answer": "1"},
            "field 'answer' is '1', an option and",
        ),
        (
            {"video": "1", "options": ["a", "b"], "answer": "c"},
            "field 'answer' must be one of 0 to 1",
        ),
        ({"video": "1.mp4", "question": "q", "answer": []}, "field 'answer' is empty"),
        ("text", "must be an object"),
        (3, "must be an object"),
    ],
)
def test_malformed_entries_of_annotations_are_named(tmp_path, manual_dir, entry, message):
    folder = manual_dir({"test.json": [entry]}, ["1.mp4"])
    options = {"name": "mine", "splits": {"test": folder / "test.json"}}
    with pytest.raises(ValueError, match=rf"test.json\[0\]: {message}"):
        prepare("annotations", tmp_path / "data", manual_dir=folder, **options)


def test_annotations_with_paragraphs_and_matching_captions(tmp_path, manual_dir, read_folder):
    entries = [{"video": f"{number}.mp4", "caption": ["A dog.", "A cat."]} for number in (1, 2)]
    folder = manual_dir({"val.json": entries}, ["1.mp4", "2.mp4"])
    words = ["annotations", "--name", "mine", "--split", f"val={folder / 'val.json'}"]
    words += ["--manual-dir", str(folder), "--paragraphs", "--match-captions"]
    name, options = parse_args([*words, "--data-dir", str(tmp_path / "data")])
    examples = read_folder(prepare(name, **options))["val"]
    assert [example.captions for example in examples] == [["A dog. A cat."]] * 2
    assert {example.match_id for example in examples} == {"A dog. A cat."}


def test_annotations_arguments_are_checked(tmp_path):
    for name, splits, message in (
        ("mine", {}, "name at least one split"),
        ("My data", {"train": "x"}, "'My data' must be letters"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare("annotations", tmp_path, name=name, splits=splits)
    with pytest.raises(FileNotFoundError, match=r"mine: split 'train': .*x.json: no such file"):
        prepare("annotations", tmp_path, name="mine", splits={"train": tmp_path / "x.json"})
