"""A trained model in Python: clips and sentences in, NumPy arrays out (`vlmae.load`).

Every method takes the clips first: a list of paths of videos and images, a list of uint8 frames
[t h w 3], or one array [n t h w 3]. Files are sampled, resized and cropped as in the run's own
evaluation.
"""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from data_pipelines.schema.checks import UserError, check
from data_pipelines.schema.classes import CLASSES_FILE, Classes, load_classes
from data_pipelines.text.tokenize import Tokenizer, load_tokenizer
from vlmae.config.experiment import ExperimentConfig, MeshConfig
from vlmae.config.objectives import objectives_with
from vlmae.models.scoring import choice_logits, match_options, match_scores, rank_answers
from vlmae.models.video_language import VideoLanguageModel, build_model
from vlmae.ops.multiple_choice import Caption
from vlmae.parallel.sharding import batch_shards, check_batch_size, make_mesh, replicated
from vlmae.runs.best import load_chosen
from vlmae.runs.inference import EvalContext, jit_method, map_rows, take_rows
from vlmae.runs.inputs import as_frames, tokenize, tokenize_options
from vlmae.runs.load import find_run, load_run, title_of, tokenizer_of

Clips = np.ndarray | Sequence[Any]


class Answers(NamedTuple):
    """Answer to n questions, with the scores of all c answers that the run knows."""

    best: tuple[str, ...]  # the answer of the highest score, for each question
    scores: Float[np.ndarray, "n c"]  # logits of the classifier, log-probabilities of the decoder
    names: tuple[str, ...]  # the answer of each column


class Choice(NamedTuple):
    """Chosen options of n questions with up to c options."""

    index: Int[np.ndarray, " n"]  # type: ignore[assignment]  # of the option of the highest score
    scores: Float[np.ndarray, "n c"]  # -inf where a question has fewer options


class Model:
    """Trained video-language model on all devices of this machine; made by `vlmae.load`.

    Attributes:
      config: the run's experiment.
      params: the parameters, whole on every device; of a run with `optim.ema_decay` their averages.
      step: training step of the checkpoint.
      tokenizer: the run's tokenizer.
      classes: answers or labels that the run tells apart; None if it was trained on captions.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        params: PyTree,
        step: int,
        tokenizer: Tokenizer,
        classes: Classes | None = None,
    ):
        """Put the parameters on the devices.

        Raises:
          UserError: the number of devices does not divide `data.eval_batch_size`.
        """
        self._mesh = make_mesh(MeshConfig())
        check_batch_size(config.data.eval_batch_size, self._mesh, "data.eval_batch_size")
        self.config, self.step, self.tokenizer, self.classes = config, step, tokenizer, classes
        self.params = jax.device_put(params, replicated(self._mesh))
        # A jitted function of its own for each score: jit's cache goes by the function's identity.
        self._jitted: dict[Callable, Callable] = {}

    def __repr__(self) -> str:
        """Show the run and the methods that its heads allow."""
        able = [name for name, heads in HEADS.items() if any(h.part in self.params for h in heads)]
        title = title_of(self.config, self.step)
        return f"<vlmae.Model {self.config.name!r}, {title}: {', '.join(able)}>"

    def embed_video(self, video: Clips) -> Float[np.ndarray, "n e"]:
        """Embed clips into the space shared with texts: the mean of their frames' unit vectors.

        Raises:
          UserError: the run has no `objectives.vtc`, or a clip cannot be read; names it.
        """
        return self._map_clips(self._head("embed_video").score, video)

    def embed_frames(self, video: Clips) -> Float[np.ndarray, "n t e"]:
        """Embed each frame of clips of equally many frames, or each tubelet, as unit vectors.

        Raises:
          UserError: see `embed_video`.
        """
        return self._map_clips(self._head("embed_frames").score, video)

    def embed_text(self, texts: Sequence[str]) -> Float[np.ndarray, "n e"]:
        """Embed sentences into the space shared with clips, as unit vectors.

        Raises:
          UserError: the run has no `objectives.vtc`, or `texts` is no list of sentences.
        """
        return self._map_rows(self._head("embed_text").score, self._tokenize(texts))

    def similarity(self, video: Clips, texts: Sequence[str]) -> Float[np.ndarray, "n m"]:
        """Compare every clip with every sentence by VTC: the mean over frames of their cosines.

        Raises:
          UserError: the run has no `objectives.vtc`, or an input cannot be used.
        """
        return self.embed_video(video) @ self.embed_text(texts).T

    def logits(self, video: Clips, texts: Sequence[str]) -> Float[np.ndarray, "n m"]:
        """Divide similarities by the learned temperature; after a sigmoid loss, add its bias.

        A softmax over a row ranks the sentences for a clip, one over a column the clips for a
        sentence. After a sigmoid loss the sigmoid is the probability that both belong together.

        Raises:
          UserError: see `similarity`.
        """
        temperature, bias = self._jit(self._head("logits").score)()
        return self.similarity(video, texts) / temperature + bias

    def match(self, video: Clips, texts: Sequence[str]) -> Float[np.ndarray, " n"]:
        """Score how well text i fits clip i: the logit of a match minus that of no match (VTM).

        Frames are read together or one by one, as `evaluation.frame_ensemble` says.

        Raises:
          UserError: the run has no `objectives.vtm`, there are not as many texts as clips, or an
            input cannot be used.
        """
        return self._map_clips(self._head("match").score, video, self._tokenize(texts))

    def answer(self, video: Clips, questions: Sequence[str]) -> Answers:
        """Answer question i about clip i, by one of the answers that training knew.

        The classifier scores all of them; the decoder only the `evaluation.answers_top_k` with the
        likeliest first token, and the others get a very low score. Of a run trained on labels the
        texts are captions, and the scores are those of the labels.

        Raises:
          UserError: the run has neither `objectives.answer` nor `objectives.label`, there are not
            as many questions as clips, or an input cannot be used.
        """
        head = self._head("answer")
        if self.classes is None:
            raise UserError(f"run {self.config.name!r} has no {CLASSES_FILE} beside its config")
        scores = self._map_clips(head.score, video, self._tokenize(questions))
        names = self.classes.names
        return Answers(tuple(names[i] for i in scores.argmax(axis=1)), scores, names)

    def choose(self, video: Clips, options: Sequence[Sequence[str]]) -> Choice:
        """Choose among the texts `options[i]` the one that describes clip i.

        Reads the head of multiple-choice modeling (MCM), or without one the matching head.

        Raises:
          UserError: the run has neither `objectives.mcm` nor `objectives.vtm`, there are not as
            many lists of options as clips, or an input cannot be used.
        """
        head = self._head("choose")
        captions, there = tokenize_options(options, self.tokenizer, self.config.data.text_len)
        wanted, found = self.config.objectives, there.shape[1]
        if head.part == "choice_head" and wanted.mcm_kind != "score":
            count = wanted.mcm_template.count("{}")
            check(found == count, f"the run chooses among {count} options, not {found}")
        scores = np.where(there, self._map_clips(head.score, video, captions), -np.inf)
        return Choice(scores.argmax(axis=1), scores)

    def _head(self, method: str) -> "Head":
        """Find the first head that the checkpoint holds."""
        for head in HEADS[method]:
            if head.part in self.params:
                return head
        names = [name for head in HEADS[method] for name in objectives_with("heads", head.part)]
        missing = " and ".join(f"objectives.{name}" for name in dict.fromkeys(names))
        raise UserError(f"run {self.config.name!r} cannot {method}: trained without {missing}")

    def _tokenize(self, texts: Sequence[str]) -> Caption:
        return tokenize(texts, self.tokenizer, self.config.data.text_len)

    def _map_clips(self, score: Callable, video: Clips, *rows: PyTree) -> np.ndarray:
        """Run a score of `HEADS` on all clips and their texts, decoding batch by batch."""
        check(not isinstance(video, str | Path), "video must be a list of paths, not one path")
        check(len(video) > 0, "video has no clip")
        for x in jax.tree.leaves(rows):
            check(len(x) == len(video), f"{len(video)} clips, but {len(x)} rows of texts")
        read = functools.partial(as_frames, config=self.config.data)
        size, parts = self.config.data.eval_batch_size, []
        # Threads, since decoders release the GIL; one batch ahead, since a list may not fit memory.
        with ThreadPoolExecutor() as pool:
            following = pool.map(read, video[:size])
            for start in range(0, len(video), size):
                clips = list(following)
                # The next batch is decoded while this one is on the device.
                following = pool.map(read, video[start + size : start + 2 * size])
                batch = take_rows(rows, slice(start, start + size))
                parts.append(self._map_lengths(score, clips, batch))
        return np.concatenate(parts)

    def _map_lengths(self, score: Callable, clips: list, rows: PyTree) -> np.ndarray:
        """Run clips of equal length together, as an image and a video do not stack."""
        lengths, order, parts = np.array([len(clip) for clip in clips]), [], []
        for length in np.unique(lengths):
            same = np.flatnonzero(lengths == length)
            frames = np.stack([clips[i] for i in same])
            parts.append(self._map_rows(score, frames, *take_rows(rows, same)))
            order.append(same)
        return np.concatenate(parts)[np.argsort(np.concatenate(order))]  # back to the given order

    def _map_rows(self, score: Callable, *inputs: PyTree) -> np.ndarray:
        # Batches of 1, 2, 4, ... rows a device: one query is not padded to a whole batch, and no
        # more than a few sizes are ever compiled.
        count, rows = len(jax.tree.leaves(inputs)[0]), batch_shards(self._mesh)
        while rows < count:
            rows *= 2
        return map_rows(self._jit(score), inputs, min(rows, self.config.data.eval_batch_size))

    def _jit(self, score: Callable) -> Callable:
        """Jit a score once; later calls with equal shapes only run it."""
        if score not in self._jitted:
            size = self.config.data.eval_batch_size
            trained = EvalContext(build_model(self.config), self.params, self._mesh, size)
            run = jit_method(trained, functools.partial(score, self))

            def on_mesh(*inputs: PyTree) -> PyTree:
                with jax.set_mesh(self._mesh):  # for the sharding constraints inside the model
                    return run(*inputs)

            self._jitted[score] = on_mesh
        return self._jitted[score]


def load(source: str | Path, checkpoint: str = "newest") -> Model:
    """Load a checkpoint of a run, or an export of one, onto all devices.

    Args:
      source: a work directory, a folder that `vlmae export` wrote, or OWNER/NAME of such a folder
        on the Hugging Face hub; local folders go first.
      checkpoint: newest, best (by `train.best_metric`) or the number of a step.

    Raises:
      MissingError: no config, checkpoint or tokenizer.
      UserError: a file is damaged or of another version; names it. Or there is neither such a
        folder nor such a model.
    """
    folder = find_run(source)
    config = load_run(folder)
    params, step = load_chosen(folder, checkpoint)
    names = folder / CLASSES_FILE
    classes = load_classes(names) if names.is_file() else None
    return Model(config, params, step, load_tokenizer(tokenizer_of(folder)), classes)


# Scores: functions of the loaded run, the bound model and a batch of frames [b t h w 3], texts or
# both. They run under jit.


def _match(run: Model, model: VideoLanguageModel, frames: Array, text: Caption) -> Array:
    ensemble = run.config.evaluation.frame_ensemble
    return match_scores(model, model.encode_video(frames), model.encode_text(*text), ensemble)


def _scalars(run: Model, model: VideoLanguageModel) -> tuple[Array, Array]:
    bias = model.logit_bias() if "logit_bias" in run.params else jnp.zeros(())
    return model.temperature(), bias


def _classify(_: Model, model: VideoLanguageModel, frames: Array, question: Caption) -> Array:
    return model.classify(model.fuse(model.encode_video(frames), model.encode_text(*question)))


def _decode(run: Model, model: VideoLanguageModel, frames: Array, question: Caption) -> Array:
    names = run.classes.names  # type: ignore[union-attr]  # a run with a decoder has them
    answers = run.tokenizer.encode(names, run.config.data.answer_len)
    return rank_answers(
        model,
        model.encode_video(frames),
        model.encode_text(*question),
        Caption(*map(jnp.asarray, answers)),
        run.config.evaluation.answers_top_k,
    )


def _choose(run: Model, model: VideoLanguageModel, frames: Array, options: Caption) -> Array:
    return choice_logits(model, model.encode_video(frames), options, run.config.objectives)


def _match_options(run: Model, model: VideoLanguageModel, frames: Array, options: Caption) -> Array:
    ensemble = run.config.evaluation.frame_ensemble
    return match_options(model, model.encode_video(frames), options, ensemble)


class Head(NamedTuple):
    """A part of a checkpoint that lets a method of `Model` work."""

    part: str  # name of its parameters
    score: Callable[..., PyTree]


# Method -> its heads, the preferred one first. VTC's projections come with its temperature.
HEADS: dict[str, tuple[Head, ...]] = {
    "embed_video": (
        # The mean of the frames' unit vectors, as evaluation compares clips.
        Head(
            "temperature", lambda _, m, frames: m.embed_video(m.encode_video(frames)).mean(axis=1)
        ),
    ),
    "embed_frames": (
        Head("temperature", lambda _, m, frames: m.embed_video(m.encode_video(frames))),
    ),
    "embed_text": (Head("temperature", lambda _, m, text: m.embed_text(m.encode_text(*text))),),
    "logits": (Head("temperature", _scalars),),
    "match": (Head("match_head", _match),),
    "answer": (Head("classifier", _classify), Head("answer_decoder", _decode)),
    "choose": (Head("choice_head", _choose), Head("match_head", _match_options)),
}
