"""Multiple choice: the right one of several texts for a clip (as MuLTI's MCM)."""

import functools

import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from data_pipelines.evaluation import EvalData
from data_pipelines.records import Choices, Texts
from vlmae.analysis.page import Item, Shown
from vlmae.choices import Caption, fold
from vlmae.config import EvaluationConfig, ObjectivesConfig
from vlmae.evaluators.encode import (
    Encoded,
    Trained,
    clip_rows,
    map_rows,
    program,
    select_texts,
    take_rows,
)
from vlmae.evaluators.metrics import accuracy_by_kind, bootstrap_interval
from vlmae.evaluators.result import Result
from vlmae.models.video_encoder import VideoFeatures
from vlmae.models.video_language import VideoLanguageModel
from vlmae.scoring import choice_logits, match_scores, repeat_rows


def evaluate_multiple_choice(
    trained: Trained,
    data: EvalData,
    clips: Encoded,
    config: EvaluationConfig,
    objectives: ObjectivesConfig,
) -> Result:
    """Accuracy in percent, by the matching head and by that of MCM, as far as they were trained.

    The questions are those of the split, or else each caption among others. Those about clips that
    cannot be decoded are left out; `clips` must hold features.

    Returns:
      Metrics `match_accuracy` and `mcm_accuracy`, with `_KIND` behind them for each kind of
      question, `chance_accuracy`, `num_questions` and `skipped_questions`.

    Raises:
      ValueError: no question can be asked, or the split's have another number of options.
    """
    questions = usable_questions(data, clips, config.choices)
    there = questions.option_mask.any(axis=2)
    result = {
        "chance_accuracy": 100 * float((1 / there.sum(axis=1)).mean()),
        "num_questions": float(len(questions.answer)),
        "skipped_questions": float(questions.skipped),
    }
    heads = {
        "match": functools.partial(match_options, ensemble=config.frame_ensemble),
        "mcm": functools.partial(choice_logits, config=objectives),
    }
    trained_heads = {"match": objectives.vtm, "mcm": objectives.mcm}
    intervals, chosen = {}, {}
    for name, head in heads.items():
        if trained_heads[name]:
            scores = score_options(trained, head, questions, clips)
            chosen[name] = np.where(there, scores, -np.inf).argmax(axis=1)
            right = chosen[name] == questions.answer
            result[f"{name}_accuracy"] = 100 * float(right.mean())
            by_kind = accuracy_by_kind(right, questions.kinds)
            result |= {f"{name}_accuracy_{kind}": x for kind, x in by_kind.items() if kind}
            intervals[f"{name}_accuracy"] = bootstrap_interval(
                100.0 * right, questions.media_ids, config.resamples
            )
    return Result(result, intervals, *describe(questions, chosen, clips, data))


def usable_questions(data: EvalData, clips: Encoded, num_options: int) -> Choices:
    """The questions whose clip can be decoded."""
    if data.choices is None:
        questions = draw_questions(select_texts(data.texts, clips.media_ids), num_options)
        if not len(questions.answer):
            raise ValueError(f"no caption has {num_options - 1} wrong ones for multiple choice")
        return questions
    found = data.choices.option_ids.shape[1]
    if found != num_options:
        raise ValueError(
            f"the split's questions have {found} options: set evaluation.choices={found}"
        )
    usable = np.isin(data.choices.media_ids, clips.media_ids)
    if not usable.any():
        raise ValueError(f"none of the {len(usable)} questions has a usable clip")
    *arrays, kinds, skipped = data.choices
    kinds = tuple(kind for kind, keep in zip(kinds, usable, strict=True) if keep)
    return Choices(*(x[usable] for x in arrays), kinds, skipped + int((~usable).sum()))


def draw_questions(texts: Texts, num_options: int, seed: int = 0) -> Choices:
    """Each caption among wrong ones of other clips, drawn once for all.

    Wrong ones have another media id and other words, and no two of a question are equal. The same
    texts and seed always give the same questions. Captions without enough wrong ones are skipped.
    """
    rng = np.random.default_rng(seed)
    words = np.unique(texts.text_ids, axis=0, return_inverse=True)[1].ravel()
    rows, options, answers = [], [], []
    for row, (media, own) in enumerate(zip(texts.media_ids, words, strict=True)):
        wrong = rng.permutation(np.flatnonzero((texts.media_ids != media) & (words != own)))
        _, first = np.unique(words[wrong], return_index=True)
        chosen = wrong[np.sort(first)][: num_options - 1]
        if len(chosen) == num_options - 1:
            rows.append(row)
            answers.append(int(rng.integers(num_options)))
            options.append(np.insert(chosen, answers[-1], row))
    options = np.array(options, np.int32).reshape(-1, num_options)
    return Choices(
        texts.text_ids[options],
        texts.text_mask[options],
        np.array(answers, np.int32),
        texts.media_ids[np.array(rows, np.int32)],
        ("",) * len(rows),
        len(texts.captions) - len(rows),
    )


def score_options(
    trained: Trained, head: functools.partial, questions: Choices, clips: Encoded
) -> Float[np.ndarray, "q c"]:
    """A head's score of every option of every question."""
    run = program(trained, head)

    def score(ids: np.ndarray, mask: np.ndarray, clip: np.ndarray) -> np.ndarray:
        return run(Caption(ids, mask), take_rows(clips.features, clip))

    inputs = (questions.option_ids, questions.option_mask, clip_rows(clips, questions.media_ids))
    return map_rows(score, inputs, trained.batch_size)


def match_options(
    model: VideoLanguageModel, options: Caption, video: VideoFeatures, ensemble: str = "concat"
) -> Float[Array, "b c"]:
    """How well each option matches the clip."""
    count = options.ids.shape[1]
    text = model.encode_text(*fold(options))
    scores = match_scores(model, text, repeat_rows(video, count), ensemble)
    return rearrange(scores, "(b c) -> b c", c=count)


def describe(
    questions: Choices, chosen: dict[str, np.ndarray], clips: Encoded, data: EvalData
) -> tuple[list[dict], list[Item]]:
    """For each question its clip, its options, the right one, and what each head chose."""
    rows = clips.rows[clip_rows(clips, questions.media_ids)]
    predictions, items = [], []
    for place, row in enumerate(rows):
        ids, there = questions.option_ids[place], questions.option_mask[place].any(axis=1)
        options = [data.text_of(option) for option in ids[there]]
        given = {name: int(answers[place]) for name, answers in chosen.items()}
        right = int(questions.answer[place])
        predictions.append(
            {"clip": data.names[row], "options": options, "answer": right, "chosen": given}
        )
        shown = [Shown(int(row), name, option == right) for name, option in given.items()]
        title = f"{options[right]}; chosen: " + ", ".join(
            f"{options[option]} ({name})" for name, option in given.items()
        )
        items.append(Item(title, shown))
    return predictions, items


def format_choices(metrics: dict[str, float]) -> str:
    """The accuracies as a Markdown table, a column for each head and kind."""
    names = [name for name in metrics if "accuracy" in name]
    head = " | ".join(name.replace("_accuracy", "").replace("_", ": ") for name in names)
    cells = " | ".join(f"{metrics[name]:.1f}" for name in names)
    count = f"multiple choice, percent of {metrics['num_questions']:.0f} questions"
    return f"| {count} | {head} |\n|---|{'---|' * len(names)}\n| accuracy | {cells} |"
