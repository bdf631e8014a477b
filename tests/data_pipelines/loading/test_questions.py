"""What is asked of a clip: questions with answers, labels, and questions with options."""

import dataclasses

import numpy as np
import pytest
from batches import Stills, assert_equal, take, with_split

from data_pipelines.loading import rows
from data_pipelines.loading.evaluation import eval_data
from data_pipelines.media import sampling, transforms
from data_pipelines.schema.classes import Classes
from data_pipelines.schema.config import SourceConfig
from data_pipelines.schema.records import Question
from data_pipelines.storage.build import build
from data_pipelines.storage.class_counts import classes_for
from data_pipelines.storage.stored import read_texts, tokenizer_for


class Quiz(Stills):
    """Each still with a question of four options, one of them right; the last has three."""

    def examples(self):
        stills = [self._still(i) for i in range(6)]
        asked = [
            Question(f"which number {i}?", "two", f"kind{i % 2}", ("one", "two", "three", "four"))
            for i in range(6)
        ]
        asked[5] = dataclasses.replace(asked[5], options=("two", "one", "three"))
        items = [
            dataclasses.replace(still, questions=[question])
            for still, question in zip(stills, asked, strict=True)
        ]
        return {"train": items[:5], "test": items}


@pytest.fixture
def questions_config(shapes_config):
    return dataclasses.replace(shapes_config, task="questions")


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.e2e)])
def test_every_question_is_asked_once_an_epoch(questions_config, num_workers):
    config = dataclasses.replace(questions_config, num_workers=num_workers)
    classes = classes_for(config)
    tokenizer, expected = tokenizer_for(config), []
    for text in read_texts(config.train[0], config.data_dir):
        for item in text.questions:
            ids, _ = tokenizer.encode([item.question], config.text_len)
            media_id = rows.match_hash(text.match_id.encode())
            expected.append((tuple(ids[0]), classes.names.index(item.answer), media_id))
    batches = take(config, 24 * 6 // 4, classes=classes)
    asked = []
    for batch in batches:
        assert batch.targets.shape == (4, len(classes.names))
        assert (batch.targets.sum(axis=1) == 1).all() and batch.valid.all()
        answers = batch.targets.argmax(axis=1)
        asked += zip(map(tuple, batch.text_ids), answers, batch.media_ids, strict=True)
    assert sorted(asked) == sorted(expected)
    assert_equal(take(config, 1, start_step=7, classes=classes), batches[7:8])


@pytest.mark.parametrize("task", ["captions", "questions"])
def test_every_row_draws_anew_for_its_frames_and_for_its_crop(shapes_config, task, monkeypatch):
    """No two draws begin at the same state of a generator: in no row, epoch or source."""
    source = shapes_config.train[0]
    twice = (source, dataclasses.replace(source, num_frames=3))
    config = dataclasses.replace(shapes_config, task=task, train=twice)
    states = []

    def record(module, name, place):
        real = getattr(module, name)

        def drawing(*args):
            states.append(repr(args[place].bit_generator.state))
            return real(*args)

        monkeypatch.setattr(module, name, drawing)

    record(sampling, "segment_times", 2)
    record(transforms, "random_box", 3)
    batches = take(config, 14)
    ids = [np.concatenate([batch.media_ids for batch in batches[i::2]]) for i in (0, 1)]
    assert not np.array_equal(*ids), "sources are shuffled apart"
    assert len(states) >= 2 * 14 * 4 and len(set(states)) == len(states)


def test_answers_that_are_no_class_have_no_target(questions_config):
    every = classes_for(questions_config)
    one = Classes({every.names[0]: every.counts[every.names[0]]})
    share = sum(one.counts[one.names[0]].values()) / (24 * 6)
    batches = take(questions_config, 24 * 6 // 4, classes=one)
    assert np.mean([batch.targets.mean() for batch in batches]) == pytest.approx(share)


def test_labels_are_targets_in_training_and_evaluation(shapes_config):
    config = with_split(dataclasses.replace(shapes_config, task="labels"), "train")
    classes = classes_for(config)
    texts = read_texts(config.train[0], config.data_dir)
    expected = {}
    for text in texts:
        row = tuple(name in text.labels for name in classes.names)
        expected[rows.match_hash(text.match_id.encode())] = row
    for batch in take(config, 6, classes=classes):
        for media_id, targets in zip(batch.media_ids, batch.targets, strict=True):
            assert tuple(targets) == expected[media_id]
    data = eval_data(config, classes)
    targets = np.concatenate([batch.targets for batch in data.batches()])
    for text, row in zip(texts, targets[: len(texts)], strict=True):
        assert tuple(row) == expected[rows.match_hash(text.match_id.encode())]
    assert data.questions is None and data.classes == classes


def test_evaluation_lists_all_questions(questions_config):
    data = eval_data(questions_config, classes_for(questions_config))
    texts = read_texts(questions_config.eval_source, questions_config.data_dir)
    asked = [item for text in texts for item in text.questions]
    assert len(asked) == 60 and data.questions.answers == tuple(q.answer for q in asked)
    assert data.questions.kinds == tuple(q.kind for q in asked)
    assert data.questions.texts.captions == tuple(q.question for q in asked)
    np.testing.assert_array_equal(data.questions.texts.media_ids, np.repeat(data.media_ids, 6))
    np.testing.assert_array_equal(data.questions.texts.rows, np.repeat(np.arange(10), 6))
    assert all(batch.targets is None for batch in data.batches())  # only captions are said there


@pytest.fixture(scope="module")
def quiz_dir(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("quiz")
    build(Quiz(data_dir=data_dir))
    return data_dir


@pytest.fixture
def quiz_config(shapes_config, quiz_dir):
    sources = [SourceConfig("quiz", split, num_frames=1) for split in ("train", "test")]
    return dataclasses.replace(
        shapes_config,
        train=(sources[0],),
        eval=sources[1],
        data_dir=str(quiz_dir),
        task="options",
        num_others=3,
        batch_size=5,
    )


def test_a_question_comes_with_its_wrong_options(quiz_config):
    """The text is the question with the right option; the others have the wrong ones."""
    tokenizer = tokenizer_for(quiz_config)
    [batch] = take(quiz_config, 1)
    said = [tokenizer.decode(ids) for ids in batch.text_ids]
    assert sorted(said) == [f"which number {i}? two" for i in range(5)]
    for text, others, mask in zip(said, batch.other_ids, batch.other_mask, strict=True):
        wrong = [text.replace("two", option) for option in ("one", "three", "four")]
        assert [tokenizer.decode(ids) for ids in others] == wrong
        assert mask.any(axis=1).all()
    assert batch.targets is None


@pytest.mark.parametrize("text_len", [7, 6, 5, 4, 3])
def test_a_question_that_is_too_long_gives_way_to_its_options(quiz_config, text_len):
    """Of `which number 3 ? two` the question loses its end, in training and in evaluation."""
    config = dataclasses.replace(quiz_config, text_len=text_len)
    tokenizer = tokenizer_for(config)
    options = np.array([tokenizer.encode([x], 3)[0][0, 1] for x in ("one", "two", "three", "four")])
    [batch] = take(config, 1)
    for ids, others in zip(batch.text_ids, batch.other_ids, strict=True):
        words = [row[row > 0][1:-1] for row in (ids, *others)]
        assert {row[-1] for row in words} == set(options)
        assert all(len(row) <= text_len - 2 for row in words)
        assert len({tuple(row[:-1]) for row in words}) == 1, "one question"
    choices = eval_data(config).choices
    last = choices.option_mask.sum(axis=2) - 2
    for row, there in enumerate(choices.option_mask.any(axis=2)):
        found = choices.option_ids[row, there, last[row, there]]
        assert set(found) <= set(options) and len(set(found)) == there.sum()
    assert choices.cut == (0 if text_len >= 7 else 6)


def test_questions_of_another_number_of_options_are_named(quiz_config):
    config = dataclasses.replace(quiz_config, train=(quiz_config.eval,))
    with pytest.raises(
        ValueError, match=r"still/5: a question with 2 wrong options, but data\.num"
    ):
        take(config, 1)


def test_evaluation_has_the_options_and_the_place_of_the_answer(quiz_config):
    data, tokenizer = eval_data(quiz_config), tokenizer_for(quiz_config)
    choices = data.choices
    assert choices.option_ids.shape[:2] == (6, 4) and choices.skipped == 0
    np.testing.assert_array_equal(choices.media_ids, data.media_ids[choices.rows])
    by_clip = {int(media): row for row, media in enumerate(choices.media_ids)}
    for name, media in zip(data.names, data.media_ids, strict=True):
        number, row = int(name.split("/")[1]), by_clip[int(media)]
        there = choices.option_mask[row].any(axis=1)
        right, _ = tokenizer.encode([f"which number {number}? two"], quiz_config.text_len)
        np.testing.assert_array_equal(choices.option_ids[row, choices.answer[row]], right[0])
        assert there.tolist() == [True, True, True, number != 5]
        assert choices.kinds[row] == f"kind{number % 2}"
    assert data.questions is None
