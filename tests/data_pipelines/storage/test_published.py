"""MSVD, TGIF-QA, DiDeMo and ActivityNet in the published formats, through the real builders."""

import pytest
from published_sets import FILES, MC_TABLE, MEDIA, activity_answer

from data_pipelines.schema.records import Question
from data_pipelines.storage.prepare import prepare

UNCOUNTED = ("webvid_2m", "webvid_10m", "hvu")  # no exact count is published
# Each case: data set, files (changed from the right ones), what the error names.
MALFORMED = [
    ("msvd", {"val_list.txt": "b_1_2\nc_9_9\n"}, "val_list.txt:2: no caption of c_9_9"),
    ("msvd", {"AllVideoDescriptions.txt": "a_0_5\n"}, "Descriptions.txt:1: must be a clip, a sp"),
    ("msvd_qa", {"youtube_mapping.txt": "a_0_5\n"}, "youtube_mapping.txt:1: must be a clip, a sp"),
    ("msvd_qa", {"youtube_mapping.txt": "a_0_5 vid3\n"}, r"qa.json\[0\]: no vid1 in youtube_mapp"),
    ("tgif_action", {"Test_action_question.csv": "gif_name\tquestion\n"}, ":1: column 'a1' is mis"),
    ("didemo", {"test_data.json": [{"video": "a.avi"}]}, r"\[0\]: field 'description' is missing"),
    ("activitynet", {"val_1.json": {"v_b": {}}}, r"val_1.json\['v_b'\]: field 'sentences' is mis"),
    ("activitynet", {"val_1.json": {"v_b": {"sentences": [1]}}}, "'sentences' must hold texts onl"),
    ("activitynet_qa", {"val_a.json": []}, r"val_q.json\[0\]: no answer to v_a_1 in val_a.json"),
]


@pytest.fixture
def read_right(manual_dir, read_back):
    """Writes the right files of a data set and reads them back."""
    return lambda name: read_back(name, manual_dir(FILES[name], MEDIA[name]))


@pytest.mark.parametrize(("name", "changed", "message"), MALFORMED)
def test_malformed_entries_are_named(tmp_path, manual_dir, name, changed, message):
    folder = manual_dir(FILES[name] | changed, MEDIA[name])
    with pytest.raises(ValueError, match=message):
        prepare(name, tmp_path / "data", manual_dir=folder, allow_other_counts=True)


@pytest.mark.parametrize("name", [name for name in FILES if name not in UNCOUNTED])
def test_other_counts_are_refused(tmp_path, manual_dir, name):
    with pytest.raises(ValueError, match=f"{name}: split '.*' has .* published are"):
        prepare(name, tmp_path, manual_dir=manual_dir(FILES[name], MEDIA[name]))


def test_msvd(read_right):
    splits = read_right("msvd")
    assert splits["train"][0].captions == ["a dog runs", "the dog"]
    assert splits["test"][0].captions == ["a cat", "a cat"]  # every one is a query
    assert splits["val"][0].match_id == "b_1_2"


def test_msvd_questions(read_right):
    splits = read_right("msvd_qa")
    assert [example.match_id for example in splits["train"]] == ["vid1"]
    assert [item.kind for item in splits["train"][0].questions] == ["who", "what"]
    assert splits["test"][0].match_id == "vid2"


@pytest.mark.parametrize("task", ["action", "transition"])
def test_tgif_with_options(read_right, task):
    [example] = read_right(f"tgif_{task}")["test"]
    options = ("run", "jump", "sit", "eat", "bark")
    assert example.questions == [Question("What does it do 2 times ?", "bark", task, options)]


@pytest.mark.parametrize("answer", ["5", "-1", "bark"])
def test_tgif_answers_must_be_places_of_options(tmp_path, manual_dir, answer):
    files = FILES["tgif_action"] | {
        "Test_action_question.csv": MC_TABLE.replace("\t4\t", f"\t{answer}\t")
    }
    with pytest.raises(ValueError, match=r"Test_action_question.csv:2: field 'answer' must be one"):
        folder = manual_dir(files, MEDIA["tgif_action"])
        prepare("tgif_action", tmp_path, manual_dir=folder, allow_other_counts=True)


def test_tgif_frame(read_right, small_media):
    first, second = read_right("tgif_frame")["train"]
    assert first.questions == [Question("what runs ?", "dog", "object")]
    assert second.questions == [Question("what is the color ?", "red", "color")]
    assert first.media == small_media[".gif"] and first.media_type == "video"


def test_didemo_descriptions_become_paragraphs(read_right):
    first, second = read_right("didemo")["train"]
    assert first.match_id == "c@N00_1.mov" and first.captions == ["a dog runs it stops."]
    assert second.captions == ["a cat"]


def test_activitynet_sentences_become_paragraphs(read_right):
    splits = read_right("activitynet")
    assert splits["train"][0].captions == ["A dog. It runs."]
    assert splits["val_1"][0].captions == ["A cat."] and splits["val_1"][0].match_id == "v_b"


def test_activitynet_questions(tmp_path, manual_dir, read_right):
    [example] = read_right("activitynet_qa")["train"]
    assert example.questions == [Question("is it red", "no", "yes/no")]
    files = FILES["activitynet_qa"] | {"train_a.json": [activity_answer(kind=9)]}
    with pytest.raises(ValueError, match=r"train_a.json\[0\]: field 'type' must be one of 0 to 8"):
        folder = manual_dir(files)
        prepare("activitynet_qa", tmp_path, manual_dir=folder, allow_other_counts=True)
