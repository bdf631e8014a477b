"""Retrieval with a tiny model: against scoring every pair alone, and whatever the batches are."""

import re
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
import pytest
from helpers import CLS, FIRST_WORD, SEP, SMALL, VOCAB
from scipy.special import log_softmax, logsumexp

from data_pipelines.loading.evaluation import EvalData
from data_pipelines.schema.records import Batch, Texts
from vlmae.config.experiment import EvaluationConfig, MeshConfig
from vlmae.evaluation import metrics, retrieval
from vlmae.evaluation.encode import (
    Encoded,
    EvalInputs,
    Temperatures,
    encode_clips,
    encode_texts,
    select_texts,
    take_texts,
)
from vlmae.evaluation.intervals import mean_interval
from vlmae.evaluation.result import Result
from vlmae.evaluation.retrieval import (
    evaluate_retrieval,
    format_retrieval,
    make_directions,
    rank,
    score_pairs,
    unique_texts,
)
from vlmae.models.video_language import VideoLanguageModel, build_model
from vlmae.parallel.sharding import make_mesh
from vlmae.runs.inference import EvalContext, _shared_program
from vlmae.runs.metric_registry import metric_of
from vlmae.training.step import make_init

FRAMES, SIZE, LENGTH = 2, SMALL.data.image_size, SMALL.data.text_len
CLIP_IDS = np.array([0, 1, 2, 3, 3, 4, 5], "int32")  # two clips show the same
TEXT_IDS = np.array([0, 0, 0, 1, 2, 3, 4, 5, 5], "int32")  # some clips have several captions
TEXT_ROWS = np.array([0, 0, 0, 1, 2, 4, 5, 6, 6], "int32")


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
    return FakeData(video, Texts(ids, mask, TEXT_IDS, TEXT_ROWS, captions), batch_size, bad)


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
    context = EvalContext(model, params, mesh, batch_size)
    clips = encode_clips(context, data, keep_features=top_k > 0)
    config = EvaluationConfig(rerank_top_k=top_k, **{"rerank_by": "match"} | changes)
    result = evaluate_retrieval(context, EvalInputs(data, clips, config, SMALL.objectives))
    captions = select_texts(data.texts, np.isin(data.texts.media_ids, clips.media_ids))
    first, of_caption = unique_texts(captions)
    texts = encode_texts(context, first, keep_features=top_k > 0)
    directions = make_directions(texts, of_caption, captions, clips)
    ones = dict.fromkeys(directions, 1.0)
    ensemble = config.frame_ensemble
    ranked = rank(
        directions,
        of_caption,
        ones,
        top_k,
        lambda pairs: score_pairs(context, texts, clips, pairs, ensemble),
        keep=99,
    )["t2v"]
    scores = np.empty(ranked.best.shape)
    np.put_along_axis(scores, ranked.best, ranked.scores, axis=1)
    assert all(metric_of(f"retrieval/{name}") for name in result.metrics), "all are registered"
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
                jax.tree.map(lambda x: x[cols], clips), jax.tree.map(lambda x: x[rows], texts)
            )
            logits = model.match(fused)
            vtc = (model.embed_text(texts)[:, None, None] * frames[None]).sum(-1).mean(-1)
            return vtc, (logits[:, 1] - logits[:, 0]).reshape(len(TEXT_IDS), len(CLIP_IDS))

        return model.apply({"params": params}, method=run)

    vtc, vtm = score(params, data.video, data.texts.text_ids, data.texts.text_mask)
    return {"vtc": np.asarray(vtc), "vtm": np.asarray(vtm)}


CORRECT = TEXT_IDS[:, None] == CLIP_IDS[None, :]


def dense_metrics(scores: np.ndarray, correct: np.ndarray) -> dict[str, float]:
    return metrics.rank_metrics(metrics.best_ranks(scores, correct))


def test_vtc_alone(model, params, pair_scores):
    result = evaluate(model, params, make_data())
    np.testing.assert_allclose(result.scores, pair_scores["vtc"], rtol=1e-4, atol=1e-5)
    expected = dense_metrics(pair_scores["vtc"], CORRECT)
    assert {k: v for k, v in result.metrics.items() if k[4:] in expected and k[:3] == "t2v"} == {
        f"t2v_{name}": value for name, value in expected.items()
    }


def test_several_correct_items(model, params, pair_scores):
    """A caption of media 3 is right with either clip; a clip is right with any of its captions."""
    result = evaluate(model, params, make_data()).metrics
    expected = dense_metrics(pair_scores["vtc"].T, CORRECT.T)
    assert result["v2t_mean_rank"] == expected["mean_rank"]
    assert result["num_clips"] == 7 and result["bad_clips"] == 0
    one_of_seven, two_of_seven = 100 / 7, 200 / 7
    assert result["t2v_chance_r1"] == pytest.approx((8 * one_of_seven + two_of_seven) / 9)
    right_captions = [3, 1, 1, 1, 1, 1, 2]
    assert result["v2t_chance_r1"] == pytest.approx(100 * np.mean(right_captions) / 9)


@pytest.mark.parametrize("top_k", [0, 2])
def test_copies_of_a_caption_are_one_candidate(model, params, top_k):
    """As in data sets of templates: three of each caption rank as one of each, for the clips."""
    once, often = make_data(), make_data()
    copies = np.tile(np.arange(len(TEXT_IDS)), 3)
    object.__setattr__(often, "texts", take_texts(once.texts, copies))
    expected = evaluate(model, params, once, top_k=top_k)
    found = evaluate(model, params, often, top_k=top_k)
    ranks = [name for name in expected.metrics if name[:3] == "v2t"]
    assert {"v2t_chance_r5", "v2t_info_nce"} < {*ranks}
    assert {name: found.metrics[name] for name in ranks} == {
        name: expected.metrics[name] for name in ranks
    }
    np.testing.assert_array_equal(found.scores, expected.scores[copies])


def test_recalls_of_templates_that_many_clips_share(model, monkeypatch):
    """Fifty templates of twenty clips each: 26.0, 52.2 and 65.3 % of the clips have fewer than 1,
    5 and 10 wrong templates above their own. Were all 1,000 captions candidates, the copies of a
    wrong one would fill ranks 1 to 20: 26.0 % for every recall."""
    templates, clips = 50, 1000
    template = np.arange(clips) % templates
    above = np.repeat([0, 3, 7, 30], [260, 262, 131, 347])  # wrong templates above each clip's
    place = (np.arange(templates) - template[:, None]) % templates  # 0: its own
    similarities = np.where(place == 0, above[:, None] + 0.5, place).astype("float32")
    ids = np.stack([np.full(clips, CLS), FIRST_WORD + template], axis=1).astype("int32")
    texts = Texts(
        ids, np.ones(ids.shape, bool), template.astype("int32"), np.arange(clips), ("",) * clips
    )

    def encode(context, texts: Texts, *, keep_features: bool):
        """Encodes a template as its unit vector, so that clips hold their similarities."""
        embeddings = np.eye(templates, dtype="float32")[texts.text_ids[:, 1] - FIRST_WORD]
        return Encoded(embeddings, None, texts.media_ids, np.arange(len(embeddings)))

    monkeypatch.setattr(retrieval, "encode_texts", encode)
    encoded = Encoded(-similarities, None, template.astype("int32"), np.arange(clips))
    data = EvalData(clips, encoded.media_ids, ("",) * clips, texts, *[None] * 5)
    context = EvalContext(model, {}, make_mesh(MeshConfig(data=1), jax.devices()[:1]), 4)
    inputs = EvalInputs(data, encoded, EvaluationConfig(), SMALL.objectives)
    found, intervals, *_ = evaluate_retrieval(context, inputs)
    assert intervals["v2t_r5"] == mean_interval(above < 5, template), "a template is one group"
    assert [found[f"v2t_r{k}"] for k in (1, 5, 10)] == pytest.approx([26.0, 52.2, 65.3])
    assert found["v2t_mean_rank"] == pytest.approx(1 + above.mean())
    assert found["v2t_chance_r1"] == pytest.approx(100 / templates)


def test_a_caption_of_two_media_is_right_for_both():
    """A clip's words are right for it, whichever copy of them comes first."""
    texts = take_texts(make_data().texts, np.array([3, 4, 3, 0]))
    texts = texts._replace(media_ids=np.array([1, 2, 5, 0]))
    kept, of_caption = unique_texts(texts)
    assert kept.captions == ("caption 3", "caption 4", "caption 0")
    assert of_caption.tolist() == [0, 1, 0, 2]


def test_reranking_everything_is_exhaustive_matching(model, params, pair_scores):
    """The order is that of the matching head alone, in both directions."""
    result = evaluate(model, params, make_data(), top_k=len(TEXT_IDS))
    vtm = pair_scores["vtm"]
    np.testing.assert_array_equal(np.argsort(-result.scores), np.argsort(-vtm))
    for direction, scores, correct in (("t2v", vtm, CORRECT), ("v2t", vtm.T, CORRECT.T)):
        for name, value in dense_metrics(scores, correct).items():
            assert result.metrics[f"{direction}_{name}"] == value
    assert not np.array_equal(np.argsort(-vtm), np.argsort(-pair_scores["vtc"]))


def test_reranking_some(model, params, pair_scores):
    """The two best by VTC stay the two best, ordered by VTM; the others keep their order."""
    order = np.argsort(-evaluate(model, params, make_data(), top_k=2).scores)
    first = np.argsort(-pair_scores["vtc"])
    for row, (ours, vtc) in enumerate(zip(order, first, strict=True)):
        best = sorted(vtc[:2], key=lambda clip, row=row: -pair_scores["vtm"][row, clip])
        assert [*ours] == [*best, *vtc[2:]]


def test_reranking_by_the_sum(model, params, pair_scores):
    """VTC's logits at the temperature and VTM's log-odds, in both directions."""
    found = evaluate(model, params, make_data(), top_k=len(TEXT_IDS), rerank_by="sum").metrics
    for direction, turn, correct in (
        ("t2v", np.asarray, CORRECT),
        ("v2t", np.transpose, CORRECT.T),
    ):
        logits = turn(pair_scores["vtc"]) / found[f"{direction}_temperature"]
        for name, value in dense_metrics(logits + turn(pair_scores["vtm"]), correct).items():
            assert found[f"{direction}_{name}"] == value


@pytest.mark.parametrize("batch_size", [1, 3, 7, 16])
def test_batch_size_changes_nothing(model, params, pair_scores, batch_size):
    """Batches that fit, that do not, and that are larger than the data; padding never counts."""
    data = make_data(batch_size)
    for top_k in (0, 2):
        ours = evaluate(model, params, data, batch_size, top_k)
        theirs = evaluate(model, params, make_data(4), 4, top_k)
        np.testing.assert_allclose(ours.scores, theirs.scores, rtol=1e-4, atol=1e-5)
        # Of temperatures the inverse, which multiplies scores: of hundreds it is nearly zero.
        ours_scaled, theirs_scaled = (
            {k: 1 / v if k.endswith("temperature") else v for k, v in x.metrics.items()}
            for x in (ours, theirs)
        )
        assert ours_scaled == pytest.approx(theirs_scaled, rel=1e-3, abs=1e-5)
        ranks = [name for name in ours.metrics if not re.search("info_nce|temperature", name)]
        assert all(ours.metrics[name] == theirs.metrics[name] for name in ranks)


def test_bad_clips_go_with_their_captions(model, params, pair_scores):
    """Clip 5 (media 4) is left out with its caption; clip 3 leaves its twin to media 3."""
    result = evaluate(model, params, make_data(bad=(3, 5)))
    texts, clips = TEXT_IDS != 4, ~np.isin(np.arange(7), (3, 5))
    kept = pair_scores["vtc"][texts][:, clips]
    np.testing.assert_allclose(result.scores, kept, rtol=1e-4, atol=1e-5)
    assert result.metrics["num_clips"] == 5 and result.metrics["bad_clips"] == 2


def test_no_usable_clip():
    with pytest.raises(ValueError, match="none of the 9 captions has a usable clip"):
        select_texts(make_data().texts, np.zeros(9, bool))


def test_table(model, params):
    result = evaluate(model, params, make_data()).metrics
    lines = format_retrieval(result).splitlines()
    assert lines[0].startswith("| | R@1 | R@5 | R@10 | MRR |") and len(lines) == 5
    assert lines[0].endswith("| mean log rank | InfoNCE |")
    assert lines[3].endswith(
        f"| {result['v2t_mean_log_rank']:.3f} | {result['v2t_info_nce']:.3f} |"
    )
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
            return model.match(model.fuse(jax.tree.map(lambda x: x[cols], clips), text))

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
    expected = dense_metrics(vtc / 0.01 + log_softmax(vtc / 0.01, axis=0), CORRECT)
    assert found["dual_softmax_t2v_mean_rank"] == expected["mean_rank"]
    assert "text to video, dual softmax" in format_retrieval(found)
    assert "dual" not in format_retrieval(plain)


def test_an_evaluation_that_is_repeated_compiles_nothing(params, caplog):
    """As during training: model and functions are made anew, but equal."""

    def compiled() -> list[str]:
        caplog.clear()
        with jax.log_compiles():
            evaluate(build_model(SMALL), params, make_data(), top_k=2)
        return [x.getMessage() for x in caplog.records if "XLA compilation" in x.getMessage()]

    _shared_program.cache_clear()
    assert any("apply" in message for message in compiled())
    assert not compiled()


def test_host_stages_report_progress(model, params):
    """The watchdog must not take ranking for a process that hangs."""
    calls = []
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    context = EvalContext(model, params, mesh, 4, lambda **_: calls.append(1))
    data, config = make_data(), EvaluationConfig(dual_softmax=True)
    clips = encode_clips(context, data)
    encoded = len(calls)
    evaluate_retrieval(context, EvalInputs(data, clips, config, SMALL.objectives))
    texts, directions = 3, 4  # batches of texts; each direction is fitted and ranked
    assert len(calls) > encoded + texts + 10 * directions


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
    measures = ("r1", "r5", "r10", "mrr", "mean_log_rank", "info_nce")
    assert {*result.intervals} == {f"{way}_{name}" for way in ("t2v", "v2t") for name in measures}


def test_another_clip_of_the_same_caption_is_not_drawn_as_wrong(model, params):
    data = make_data()
    texts = data.texts._replace(captions=("the same",) * len(data.texts.captions))
    same = FakeData(data.video, texts, data.batch_size, bad=())
    result = evaluate(model, params, same).result
    shown = [shown for item in result.items for shown in item.clips]
    assert {x.right for x in shown if "same caption" in x.label} == {None}
    described = {*data.texts.rows.tolist()}
    assert {x.right for x in shown if x.row in described} == {True, None}


def test_info_nce_at_a_temperature_of_another_split(model, params, pair_scores):
    """Against SciPy's softmax over all pairs; the copies of a right caption count together."""
    data, mesh = make_data(), make_mesh(MeshConfig(data=1), jax.devices()[:1])
    context = EvalContext(model, params, mesh, 4)
    given = Temperatures("val", {"t2v": 0.1, "v2t": 0.02})
    inputs = EvalInputs(
        data, encode_clips(context, data), EvaluationConfig(), SMALL.objectives, given
    )
    result = evaluate_retrieval(context, inputs)
    vtc = pair_scores["vtc"].astype(float)
    for name, scores, correct in (("t2v", vtc, CORRECT), ("v2t", vtc.T, CORRECT.T)):
        of_all = log_softmax(scores / given.by_direction[name], axis=1)
        expected = -logsumexp(np.where(correct, of_all, -np.inf), axis=1).mean()
        assert result.metrics[f"{name}_info_nce"] == pytest.approx(expected, rel=1e-3)
        assert result.metrics[f"{name}_temperature"] == given.by_direction[name]
    assert result.facts == {"temperature_split": "val"}
    own = evaluate_retrieval(context, inputs._replace(temperatures=Temperatures("test")))
    for name in ("t2v", "v2t"):
        assert own.metrics[f"{name}_info_nce"] < result.metrics[f"{name}_info_nce"]
