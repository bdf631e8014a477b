"""Retrieval with a tiny model: against scoring every pair alone, and whatever the batches are."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
import pytest
from helpers import CLS, FIRST_WORD, SEP, SMALL, VOCAB

from data_pipelines.evaluation import EvalData
from data_pipelines.records import Batch, Texts
from vlmae.config import EvaluationConfig, MeshConfig
from vlmae.evaluators import metrics
from vlmae.evaluators.encode import Trained, encode_clips, select_texts
from vlmae.evaluators.result import Result
from vlmae.evaluators.retrieval import evaluate_retrieval, format_retrieval, rank
from vlmae.models.video_language import VideoLanguageModel, build_model
from vlmae.sharding import make_mesh
from vlmae.train import make_init

FRAMES, SIZE, LENGTH = 2, SMALL.data.image_size, SMALL.data.text_len
CLIP_IDS = np.array([0, 1, 2, 3, 3, 4, 5], "int32")  # two clips show the same
TEXT_IDS = np.array([0, 0, 0, 1, 2, 3, 4, 5, 5], "int32")  # some clips have several captions


NAMES = tuple(f"clip{i}.mp4" for i in range(len(CLIP_IDS)))


class FakeData(EvalData):
    """Clips from memory, in batches of any size."""

    def __init__(self, video: np.ndarray, texts: Texts, batch_size: int, bad: tuple[int, ...] = ()):
        super().__init__(len(video), CLIP_IDS, NAMES, texts, *[None] * 5)
        self.video, self.batch_size = video, batch_size
        self.bad = bad  # clips that cannot be decoded

    def batches(self, part: int, parts: int) -> Iterator[Batch]:
        """Padding and bad clips are filled with noise, which nothing may depend on."""
        rng = np.random.default_rng(self.batch_size)
        for start in range(0, self.num_clips, self.batch_size):
            rows = np.arange(start, start + self.batch_size)
            valid = (rows < self.num_clips) & ~np.isin(rows, self.bad)
            rows = np.minimum(rows, self.num_clips - 1)
            noise = rng.integers(0, 256, (len(rows), *self.video.shape[1:]), "uint8")
            yield Batch(
                video=np.where(valid[:, None, None, None, None], self.video[rows], noise),
                text_ids=rng.integers(0, VOCAB, (len(rows), LENGTH), "int32"),
                text_mask=np.ones((len(rows), LENGTH), bool),
                media_ids=np.where(valid, CLIP_IDS[rows], -1).astype("int32"),
                valid=valid,
            )


def make_data(batch_size: int = 4, bad: tuple[int, ...] = ()) -> FakeData:
    rng = np.random.default_rng(0)
    video = rng.integers(0, 256, (len(CLIP_IDS), FRAMES, SIZE, SIZE, 3), "uint8")
    mask = np.arange(LENGTH) < rng.integers(3, LENGTH + 1, len(TEXT_IDS))[:, None]
    ids = np.where(mask, rng.integers(FIRST_WORD, VOCAB, mask.shape), 0).astype("int32")
    ids[:, 0] = CLS
    ids[np.arange(len(ids)), mask.sum(axis=1) - 1] = SEP
    captions = tuple(f"caption {i}" for i in range(len(ids)))
    return FakeData(video, Texts(ids, mask, TEXT_IDS, captions), batch_size, bad)


@pytest.fixture(scope="module")
def model() -> VideoLanguageModel:
    return build_model(SMALL)


@pytest.fixture(scope="module")
def params(model) -> dict:
    """Scaled up, so that scores lie far from each other."""
    values = jax.jit(make_init(SMALL))(0).params
    return jax.tree.map(lambda x: 4 * x if x.ndim == 2 else x, values)


class Evaluated(NamedTuple):
    scores: np.ndarray  # text to video
    metrics: dict[str, float]
    result: Result


def evaluate(
    model, params, data: FakeData, batch_size: int = 4, top_k: int = 0, **changes
) -> Evaluated:
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    trained = Trained(model, params, mesh, batch_size)
    clips = encode_clips(trained, data, keep_features=top_k > 0)
    config = EvaluationConfig(rerank_top_k=top_k, resamples=50, **changes)
    result = evaluate_retrieval(trained, data, clips, config)
    scores = rank(trained, select_texts(data.texts, clips.media_ids), clips, config)["t2v"].scores
    return Evaluated(scores, result.metrics, result)


@pytest.fixture(scope="module")
def pair_scores(model, params) -> dict[str, np.ndarray]:
    """The oracle: [texts, clips] scores of VTC and VTM, all pairs at once, nothing padded."""
    data = make_data()

    @jax.jit
    def score(params, video, ids, mask):
        def run(model):
            clips, texts = model.encode_video(video), model.encode_text(ids, mask)
            frames = model.embed_video(clips)
            rows, cols = np.indices((len(TEXT_IDS), len(CLIP_IDS))).reshape(2, -1)
            fused = model.fuse(
                jax.tree.map(lambda x: x[rows], texts), jax.tree.map(lambda x: x[cols], clips)
            )
            logits = model.match(fused)
            vtc = (model.embed_text(texts)[:, None, None] * frames[None]).sum(-1).mean(-1)
            return vtc, (logits[:, 1] - logits[:, 0]).reshape(len(TEXT_IDS), len(CLIP_IDS))

        return model.apply({"params": params}, method=run)

    vtc, vtm = score(params, data.video, data.texts.text_ids, data.texts.text_mask)
    return {"vtc": np.asarray(vtc), "vtm": np.asarray(vtm)}


CORRECT = TEXT_IDS[:, None] == CLIP_IDS[None, :]


def test_vtc_alone(model, params, pair_scores):
    result = evaluate(model, params, make_data())
    np.testing.assert_allclose(result.scores, pair_scores["vtc"], rtol=1e-4, atol=1e-5)
    expected = metrics.retrieval_metrics(pair_scores["vtc"], CORRECT)
    assert {k: v for k, v in result.metrics.items() if k[4:] in expected and k[:3] == "t2v"} == {
        f"t2v_{name}": value for name, value in expected.items()
    }


def test_several_correct_items(model, params, pair_scores):
    """A caption of media 3 is right with either clip; a clip is right with any of its captions."""
    result = evaluate(model, params, make_data()).metrics
    expected = metrics.retrieval_metrics(pair_scores["vtc"].T, CORRECT.T)
    assert result["v2t_mean_rank"] == expected["mean_rank"]
    assert result["num_clips"] == 7 and result["bad_clips"] == 0
    one_of_seven, two_of_seven = 100 / 7, 200 / 7
    assert result["t2v_chance_r1"] == pytest.approx((8 * one_of_seven + two_of_seven) / 9)
    right_captions = [3, 1, 1, 1, 1, 1, 2]
    assert result["v2t_chance_r1"] == pytest.approx(100 * np.mean(right_captions) / 9)


def test_reranking_everything_is_exhaustive_matching(model, params, pair_scores):
    """The order is that of the matching head alone, in both directions."""
    result = evaluate(model, params, make_data(), top_k=len(TEXT_IDS))
    vtm = pair_scores["vtm"]
    np.testing.assert_array_equal(np.argsort(-result.scores), np.argsort(-vtm))
    for direction, scores, correct in (("t2v", vtm, CORRECT), ("v2t", vtm.T, CORRECT.T)):
        for name, value in metrics.retrieval_metrics(scores, correct).items():
            assert result.metrics[f"{direction}_{name}"] == value
    assert not np.array_equal(np.argsort(-vtm), np.argsort(-pair_scores["vtc"]))


def test_reranking_some(model, params, pair_scores):
    """The two best by VTC stay the two best, ordered by VTM; the others keep their order."""
    order = np.argsort(-evaluate(model, params, make_data(), top_k=2).scores)
    first = np.argsort(-pair_scores["vtc"])
    for row, (ours, vtc) in enumerate(zip(order, first, strict=True)):
        best = sorted(vtc[:2], key=lambda clip, row=row: -pair_scores["vtm"][row, clip])
        assert [*ours] == [*best, *vtc[2:]]


@pytest.mark.parametrize("batch_size", [1, 3, 7, 16])
def test_batch_size_changes_nothing(model, params, pair_scores, batch_size):
    """Batches that fit, that do not, and that are larger than the data; padding never counts."""
    data = make_data(batch_size)
    for top_k in (0, 2):
        ours = evaluate(model, params, data, batch_size, top_k)
        theirs = evaluate(model, params, make_data(4), 4, top_k)
        np.testing.assert_allclose(ours.scores, theirs.scores, rtol=1e-4, atol=1e-5)
        assert ours.metrics == theirs.metrics


def test_bad_clips_go_with_their_captions(model, params, pair_scores):
    """Clip 5 (media 4) is left out with its caption; clip 3 leaves its twin to media 3."""
    result = evaluate(model, params, make_data(bad=(3, 5)))
    texts, clips = TEXT_IDS != 4, ~np.isin(np.arange(7), (3, 5))
    kept = pair_scores["vtc"][texts][:, clips]
    np.testing.assert_allclose(result.scores, kept, rtol=1e-4, atol=1e-5)
    assert result.metrics["num_clips"] == 5 and result.metrics["bad_clips"] == 2


def test_no_usable_clip():
    with pytest.raises(ValueError, match="none of the 9 captions has a usable clip"):
        select_texts(make_data().texts, np.array([], "int32"))


def test_table(model, params):
    result = evaluate(model, params, make_data()).metrics
    lines = format_retrieval(result).splitlines()
    assert lines[0].startswith("| | R@1 | R@5 | R@10 |") and len(lines) == 5
    assert f"| text to video | {result['t2v_r1']:.1f} |" in lines[2]
    assert f"| chance, text to video (7 clips) | {result['t2v_chance_r1']:.1f} |" in lines[4]


@pytest.mark.parametrize("ensemble", ["mean", "max", "lse"])
def test_frames_matched_one_by_one(model, params, ensemble):
    """The score of a pair from its frames as clips of their own, for every pair."""
    data = make_data()

    @jax.jit
    def score(params, frames, ids, mask):
        def run(model):
            clips, texts = model.encode_video(frames), model.encode_text(ids, mask)
            rows, cols = np.indices((len(TEXT_IDS), len(CLIP_IDS))).reshape(2, -1)
            text = jax.tree.map(lambda x: x[rows], texts)
            return model.match(model.fuse(text, jax.tree.map(lambda x: x[cols], clips)))

        logits = model.apply({"params": params}, method=run)
        return (logits[:, 1] - logits[:, 0]).reshape(len(TEXT_IDS), len(CLIP_IDS))

    texts = data.texts
    of_frames = np.stack(
        [score(params, data.video[:, [t]], texts.text_ids, texts.text_mask) for t in range(FRAMES)]
    )
    expected = {
        "mean": of_frames.mean(axis=0),
        "max": of_frames.max(axis=0),
        "lse": np.log(np.exp(of_frames).sum(axis=0)),
    }[ensemble]
    found = evaluate(model, params, data, top_k=len(TEXT_IDS), frame_ensemble=ensemble)
    np.testing.assert_allclose(found.scores, expected, rtol=1e-4, atol=1e-4)


def test_dual_softmax_is_reported_apart(model, params, pair_scores):
    plain = evaluate(model, params, make_data()).metrics
    found = evaluate(model, params, make_data(), dual_softmax=True).metrics
    assert {name: found[name] for name in plain} == plain
    vtc = pair_scores["vtc"].astype(float)
    weights = np.exp(vtc / 0.01) / np.exp(vtc / 0.01).sum(axis=0)
    expected = metrics.retrieval_metrics(vtc * weights, CORRECT)
    assert found["dual_softmax_t2v_mean_rank"] == expected["mean_rank"]
    assert "text to video, dual softmax" in format_retrieval(found)
    assert "dual" not in format_retrieval(plain)


def test_predictions_and_intervals(model, params, pair_scores):
    data = make_data(bad=(0,))
    result = evaluate(model, params, data).result
    usable = [row for row in range(9) if TEXT_IDS[row] != 0]
    assert [item["caption"] for item in result.predictions] == [f"caption {i}" for i in usable]
    for row, item, drawn in zip(usable, result.predictions, result.items, strict=True):
        scores = pair_scores["vtc"][row, 1:]
        best = 1 + np.argsort(-scores)[:5]
        np.testing.assert_allclose([*item["clips"].values()], np.sort(scores)[::-1][:5], atol=1e-3)
        assert [*item["clips"]] == [data.names[clip] for clip in best]
        assert [shown.row for shown in drawn.clips] == best.tolist()
        right = CLIP_IDS[best] == TEXT_IDS[row]
        assert [shown.right for shown in drawn.clips] == right.tolist()
    for name, (low, high) in result.intervals.items():
        assert low <= result.metrics[name] <= high
