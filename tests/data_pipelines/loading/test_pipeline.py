import dataclasses
import itertools

import jax
import numpy as np
import pytest
from batches import Stills, assert_equal, take, with_split

from data_pipelines.loading import evaluation, rows
from data_pipelines.loading.evaluation import eval_data
from data_pipelines.loading.pipeline import BatchIterator
from data_pipelines.media import decode, transforms
from data_pipelines.schema.checks import UserError
from data_pipelines.schema.classes import Classes
from data_pipelines.schema.config import SourceConfig
from data_pipelines.schema.records import Batch, Example
from data_pipelines.storage.build import build
from data_pipelines.storage.builders import base
from data_pipelines.storage.stored import newest_version, open_source, tokenizer_for


class Damaged(base.VideoTextBuilder):
    """Two good clips and one that decodes to nothing; stored because the check is off."""

    def __init__(self, *, clips, **kwargs):
        super().__init__(**kwargs)
        self.clips = clips

    def examples(self):
        items = [
            Example(media, "video", ["a clip"], str(i), f"clip{i}.mp4")
            for i, media in enumerate(self.clips)
        ]
        return {"train": items, "test": items}


@pytest.fixture(scope="session")
def damaged_dir(tmp_path_factory, write_clip):
    data_dir = tmp_path_factory.mktemp("damaged")
    good = write_clip(range(0, 1000, 100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "check_media", lambda *args: None)
        clips = [good, good[: len(good) // 2], good]
        build(Damaged(data_dir=data_dir, clips=clips))
    return data_dir


@pytest.fixture
def damaged_config(shapes_config, damaged_dir):
    return dataclasses.replace(
        shapes_config,
        train=(SourceConfig("damaged"),),
        eval=SourceConfig("damaged", "test"),
        data_dir=str(damaged_dir),
        batch_size=3,
    )


def test_batches_have_the_promised_shapes(shapes_config):
    [batch] = take(shapes_config, 1)
    assert isinstance(batch, Batch)
    assert batch.video.shape == (4, 4, 32, 32, 3) and batch.video.dtype == np.uint8
    assert batch.text_ids.shape == (4, 16) and batch.text_ids.dtype == np.int32
    assert batch.text_mask.dtype == bool and batch.text_mask.any(axis=1).all()
    assert batch.media_ids.dtype == np.int32 and (batch.media_ids >= 0).all()
    assert batch.valid.dtype == bool and batch.valid.all()


def test_an_epoch_has_every_clip_once_and_captions_match(shapes_config):
    source = open_source(shapes_config.train[0], shapes_config.data_dir)
    tokenizer = tokenizer_for(shapes_config)
    captions = {}
    for i in range(len(source)):
        texts = [text.decode() for text in source[i]["captions"]]
        ids, _ = tokenizer.encode(texts, 16)
        captions[rows.match_hash(source[i]["match_id"])] = {tuple(row) for row in ids.tolist()}
    assert len(captions) == 24
    epochs = [take(shapes_config, 6, start) for start in (0, 6)]
    orders = [np.concatenate([batch.media_ids for batch in epoch]).tolist() for epoch in epochs]
    assert set(orders[0]) == set(orders[1]) == set(captions) and orders[0] != orders[1]
    seen = set()
    for batch in itertools.chain(*epochs):
        for media_id, ids in zip(batch.media_ids, batch.text_ids, strict=True):
            assert tuple(ids) in captions[media_id]
            seen.add(tuple(ids))
    assert len(seen) > 24  # more than one of a clip's captions is drawn


def test_restart_gives_the_batches_of_an_unbroken_run(shapes_config):
    unbroken = take(shapes_config, 9)
    assert_equal(take(shapes_config, 4, start_step=5), unbroken[5:])


def test_colors_are_drawn_for_a_clip_and_change_nothing_else(shapes_config, monkeypatch):
    plain, config = take(shapes_config, 3), dataclasses.replace(shapes_config, color_jitter=0.5)
    unbroken = take(config, 3)
    assert_equal(take(config, 2, start_step=1), unbroken[1:])
    for batch, other in zip(unbroken, plain, strict=True):
        assert (batch.video != other.video).any(axis=(1, 2, 3, 4)).all()
        assert_equal([batch._replace(video=other.video)], [other])

    factors = []

    def halved(strength, rng):
        factors.append(strength)
        return transforms.Jitter({"brightness": 0.5})

    monkeypatch.setattr(transforms, "draw_jitter", halved)
    for batch, other in zip(take(config, 3), plain, strict=True):
        np.testing.assert_array_equal(batch.video, np.rint(other.video / 2).astype(np.uint8))
    assert set(factors) == {0.5} and len(factors) >= 12, "one draw for all frames of a clip"


@pytest.mark.e2e
@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(shapes_config, num_workers):
    config = dataclasses.replace(shapes_config, num_workers=num_workers)
    assert_equal(take(config, 5, start_step=3), take(shapes_config, 5, start_step=3))


def test_seeds_matter(shapes_config):
    first, second = (take(shapes_config, 2, seed=seed) for seed in (1, 2))
    assert not np.array_equal(first[0].video, second[0].video)
    assert_equal(take(shapes_config, 2, seed=2**40), take(shapes_config, 2, seed=2**40))


@pytest.fixture
def mixed_config(shapes_config, shapes_dir):
    if not (shapes_dir / "stills").exists():
        build(Stills(data_dir=shapes_dir))
    sources = (
        SourceConfig("shapes", num_frames=3, weight=3.0),
        SourceConfig("stills", num_frames=1, weight=1.0),
    )
    return dataclasses.replace(shapes_config, train=sources)


def test_processes_share_the_global_batch(mixed_config):
    whole = take(mixed_config, 6, start_step=2)
    parts = [take(mixed_config, 6, 2, part=i, parts=2) for i in range(2)]
    joined = [
        jax.tree.map(lambda x, y: np.concatenate([x, y]), a, b) for a, b in zip(*parts, strict=True)
    ]
    assert_equal(joined, whole)


def test_sources_alternate_by_weight(mixed_config):
    batches = take(mixed_config, 16)
    num_frames = [batch.video.shape[1] for batch in batches]
    assert num_frames.count(3) == 12 and num_frames.count(1) == 4
    assert num_frames[:4].count(1) == num_frames[4:8].count(1) == 1
    still = next(batch for batch in batches if batch.video.shape[1] == 1)
    # The picture's red says which one it is: batches never mix up clips and ids.
    numbers = np.round(still.video[:, 0, 16, 16, 0] / 40).astype(int)
    ids = [rows.match_hash(f"still{number}".encode()) for number in numbers]
    assert still.media_ids.tolist() == ids


def test_batches_larger_than_the_data_set_work(mixed_config):
    config = dataclasses.replace(mixed_config, train=mixed_config.train[1:], batch_size=8)
    [batch] = take(config, 1)
    assert batch.valid.all() and len(set(batch.media_ids.tolist())) == 6


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.e2e)])
def test_undecodable_clips_become_invalid_rows(damaged_config, num_workers, capfd):
    if num_workers == 0:
        rows._reported.clear()
    batches = take(dataclasses.replace(damaged_config, num_workers=num_workers), 4)
    for batch in batches:
        assert batch.valid.sum() == 2
        [bad] = np.flatnonzero(~batch.valid)
        assert (batch.video[bad] == 0).all() and batch.text_mask[bad].sum() == 2
        assert batch.media_ids[bad] == rows.NO_MATCH
        assert (batch.video[batch.valid].max(axis=(1, 2, 3, 4)) > 200).all()
    assert capfd.readouterr().err.count("damaged: clip1.mp4 cannot be used: not a readable") == 1


def test_an_image_is_no_clip(mixed_config, capfd):
    rows._reported.clear()
    source = dataclasses.replace(mixed_config.train[1], num_frames=2)
    [batch] = take(dataclasses.replace(mixed_config, train=(source,)), 1)
    assert not batch.valid.any()
    assert "image where a video is expected: num_frames=2" in capfd.readouterr().err


def test_evaluation_reads_each_clip_once_in_order(shapes_config):
    data = eval_data(shapes_config)
    batches = list(data.batches())
    assert data.num_clips == 10 and len(batches) == 3
    valid = np.concatenate([batch.valid for batch in batches])
    assert valid.tolist() == [True] * 10 + [False] * 2
    ids = np.concatenate([batch.media_ids for batch in batches])
    np.testing.assert_array_equal(ids[:10], data.media_ids)
    assert sorted(ids[:10]) == list(range(10)) and (ids[10:] == rows.NO_MATCH).all()
    assert (batches[-1].video[2:] == 0).all() and batches[-1].video[:2].any()
    text_ids = np.concatenate([batch.text_ids for batch in batches])[:10]
    np.testing.assert_array_equal(text_ids, data.texts.text_ids)  # one caption a clip
    assert all(name.startswith("shapes/test/") for name in data.names)
    assert_equal(list(data.batches()), batches)


def test_evaluation_lists_all_captions_of_another_split(shapes_config):
    data = eval_data(with_split(shapes_config, "train"))
    assert data.num_clips == 24 and len(data.texts.captions) == 72
    np.testing.assert_array_equal(data.texts.media_ids, np.repeat(data.media_ids, 3))
    tokenizer = tokenizer_for(shapes_config)
    ids, mask = tokenizer.encode(data.texts.captions, 16)
    np.testing.assert_array_equal(data.texts.text_ids, ids)
    np.testing.assert_array_equal(data.texts.text_mask, mask)


def test_evaluation_gives_equal_ids_to_equal_matches(mixed_config, tmp_path, write_clip):
    clips = [write_clip(range(0, 1000, 100))] * 3

    class Repeated(Damaged):
        def examples(self):
            items = super().examples()["test"]
            same = [
                dataclasses.replace(item, match_id=str(int(item.match_id) % 2)) for item in items
            ]
            return {"train": same, "test": same}

    build(Repeated(data_dir=tmp_path, clips=clips))
    source = SourceConfig("repeated", "test")
    config = dataclasses.replace(mixed_config, data_dir=str(tmp_path), train=(source,), eval=source)
    data = eval_data(config)
    by_name = dict(zip(data.names, data.media_ids.tolist(), strict=True))
    assert by_name == {"clip0.mp4": 0, "clip1.mp4": 1, "clip2.mp4": 0}


def test_evaluation_shares_rows_between_processes(shapes_config):
    data = eval_data(shapes_config)
    parts = [list(data.batches(i, 2)) for i in range(2)]
    joined = [
        jax.tree.map(lambda x, y: np.concatenate([x, y]), a, b) for a, b in zip(*parts, strict=True)
    ]
    assert_equal(joined, list(data.batches()))


@pytest.mark.parametrize("clips_a_worker, expected", [(11, 0), (10, 1)])
def test_evaluation_starts_no_worker_for_few_clips(
    shapes_config, monkeypatch, clips_a_worker, expected
):
    started = []
    monkeypatch.setattr(evaluation, "CLIPS_A_WORKER", clips_a_worker)
    monkeypatch.setattr(evaluation, "iterate", lambda _, num_workers: started.append(num_workers))
    eval_data(dataclasses.replace(shapes_config, num_workers=1)).batches()  # of ten clips
    assert started == [expected]


@pytest.mark.e2e
def test_evaluation_with_workers_and_bad_clips(damaged_config):
    batches = list(eval_data(damaged_config).batches(num_workers=1))
    assert_equal(batches, list(eval_data(damaged_config).batches(num_workers=0)))
    assert sum(batch.valid.sum() for batch in batches) == 2


def test_missing_data_sets_say_how_to_make_them(shapes_config, tmp_path):
    config = dataclasses.replace(shapes_config, data_dir=str(tmp_path))
    command = f"vlmae prepare shapes --data-dir {tmp_path}"
    for call in (lambda: take(config, 1), lambda: eval_data(config)):
        with pytest.raises(FileNotFoundError, match=command):
            call()


def test_unfinished_folders_do_not_count(tmp_path):
    folder = tmp_path / "shapes" / "incomplete.ABCDEF_1.0.0"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="is not prepared"):
        open_source(SourceConfig(), tmp_path)


def test_the_newest_version_is_the_largest_by_number(tmp_path):
    for version in ("1.9.0", "1.10.0", "1.2.11"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "dataset_info.json").write_text("{}")
    assert newest_version(tmp_path) == tmp_path / "1.10.0"
    assert newest_version(tmp_path, "1.10.0") == tmp_path / "1.10.0"
    assert newest_version(tmp_path, "1.10.1") is None


@pytest.mark.parametrize("split", ["dev", "dev[:10%]", "train+dev", "train[:"])
def test_unknown_splits_list_the_known_ones(shapes_config, split):
    with pytest.raises(
        ValueError, match=r"is unknown or empty; known: train \(24\), val \(4\), te"
    ):
        eval_data(with_split(shapes_config, split))


def test_parts_of_splits_and_empty_parts(shapes_config):
    assert eval_data(with_split(shapes_config, "train[:50%]")).num_clips == 12
    with pytest.raises(ValueError, match=r"'train\[:1%\]' is unknown or empty"):
        eval_data(with_split(shapes_config, "train[:1%]"))


def test_batches_must_be_divisible(shapes_config):
    with pytest.raises(ValueError, match=r"data\.batch_size = 4 is not divisible by 3 processes"):
        take(shapes_config, 1, parts=3)
    with pytest.raises(ValueError, match=r"data\.eval_batch_size = 4 is not divisible by 3"):
        eval_data(shapes_config).batches(0, 3)


def test_tokenizer_of_the_config_goes_first(shapes_config, tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "moves"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    config = dataclasses.replace(shapes_config, tokenizer=str(tmp_path / "vocab.txt"))
    assert tokenizer_for(config).vocab_size == 6
    assert take(config, 1)[0].text_ids.max() <= 5


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.e2e)])
def test_wrong_captions_come_from_other_clips_of_the_source(shapes_config, num_workers):
    config = dataclasses.replace(shapes_config, num_others=3, num_workers=num_workers)
    plain, batches = take(shapes_config, 3), take(config, 3)
    assert_equal(take(config, 1, start_step=2), batches[2:])
    records = open_source(config.train[0], config.data_dir)
    tokenizer, known = tokenizer_for(config), {}
    for i in range(len(records)):
        ids, _ = tokenizer.encode([c.decode() for c in records[i]["captions"]], config.text_len)
        for caption in map(tuple, ids):
            known.setdefault(caption, set()).add(rows.match_hash(records[i]["match_id"]))
    for batch, without in zip(batches, plain, strict=True):
        np.testing.assert_array_equal(batch.text_ids, without.text_ids)
        assert without.other_ids is None
        assert batch.other_ids.shape == (config.batch_size, 3, config.text_len)
        assert batch.other_mask.any(axis=2).all()
        for row in range(config.batch_size):
            texts = [tuple(ids) for ids in (batch.text_ids[row], *batch.other_ids[row])]
            assert len(set(texts)) == 4
            assert all(known[text] - {batch.media_ids[row]} for text in texts[1:])


def test_a_source_of_one_caption_has_no_wrong_ones(mixed_config):
    stills = dataclasses.replace(mixed_config.train[1], split="train[:1]")
    config = dataclasses.replace(mixed_config, train=(stills,), num_others=2)
    batch = take(config, 1)[0]
    assert batch.valid.all()
    assert not batch.other_mask.any()


def test_a_split_without_questions_is_named(mixed_config):
    stills = mixed_config.train[1]
    config = dataclasses.replace(mixed_config, train=(stills,), task="questions")
    with pytest.raises(ValueError, match="data set 'stills': split 'train' has no question"):
        take(config, 1, classes=Classes({"a": {}}))


def test_clips_played_backwards(shapes_config):
    config = dataclasses.replace(
        shapes_config, eval=dataclasses.replace(shapes_config.eval, backwards=True)
    )
    forwards, backwards = eval_data(shapes_config), eval_data(config)
    for row in range(3):
        clip = forwards.clip(row)
        assert (clip[0] != clip[-1]).any()
        np.testing.assert_array_equal(backwards.clip(row), clip[::-1])


def test_a_full_shared_memory_says_what_to_set():
    """grain says that a worker has crashed; SIGBUS is what a full /dev/shm gives."""

    class Dying:
        def __init__(self, code):
            self.code = code

        def __next__(self):
            raise RuntimeError(
                f"Worker process was terminated unexpectedly with exit code {self.code}."
            )

        def close(self):
            pass

    with pytest.raises(UserError, match=r"/dev/shm, .* has [\d,]+ MiB; .*--shm-size.*num-workers"):
        next(BatchIterator(Dying(-7)))
    with pytest.raises(RuntimeError, match="exit code -9"):
        next(BatchIterator(Dying(-9)))
