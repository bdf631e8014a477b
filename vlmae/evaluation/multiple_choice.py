"""Multiple choice: the correct one of several texts for a clip (as MuLTI's MCM)."""

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from data_pipelines.loading.evaluation import EvalData
from data_pipelines.schema.checks import UserError
from data_pipelines.schema.records import Choices, Texts
from vlmae.config.experiment import ObjectivesConfig
from vlmae.evaluation.clip_features import map_pairs
from vlmae.evaluation.encode import Encoded, EvalInputs, select_texts
from vlmae.evaluation.intervals import mean_interval
from vlmae.evaluation.metrics import accuracy_by_kind, info_nce
from vlmae.evaluation.result import Result
from vlmae.figures.answer_page import Item, Line, Shown
from vlmae.models.scoring import choice_logits, match_options
from vlmae.ops.multiple_choice import Caption, are_cut
from vlmae.runs.inference import EvalContext
from vlmae.runs.tables import markdown_table


def evaluate_multiple_choice(context: EvalContext, inputs: EvalInputs) -> Result:
    """Compute the accuracy of the matching head and of MCM's head, as far as they are trained.

    The questions are those of the split, or else each caption among negatives. Those about clips
    that cannot be decoded are left out; the clips must hold features.

    Returns:
      Metrics in percent: `match_accuracy` and `mcm_accuracy`, with `_KIND` behind them for each
      kind of question, and `chance_accuracy`. `match_nll` and `mcm_nll`: the negative log of the
      softmax over the options at the correct one, in nats, which tells models apart when their
      accuracies do not; `chance_nll` by chance. Also `num_questions`, `skipped_questions`, and
      `cut_questions`, whose options are too long for `data.text_len` or for MCM's list.

    Raises:
      UserError: no question can be asked, or the split's have another number of options.
    """
    data, clips, config, objectives, _ = inputs
    questions = usable_questions(data, clips, config.choices)
    option_exists = questions.option_mask.any(axis=2)
    num_options = option_exists.sum(axis=1)
    metrics = {
        "chance_accuracy": 100 * float((1 / num_options).mean()),
        "chance_nll": float(np.log(num_options).mean()),
        "num_questions": float(len(questions.answer)),
        "skipped_questions": float(questions.skipped),
        "cut_questions": float(max(questions.cut, cut_by_list(questions, objectives))),
    }
    heads = {}
    if objectives.vtm:
        heads["match"] = functools.partial(match_options, ensemble=config.frame_ensemble)
    if objectives.mcm:
        heads["mcm"] = functools.partial(choice_logits, config=objectives)
    is_answer = np.arange(option_exists.shape[1]) == questions.answer[:, None]
    intervals, chosen = {}, {}
    for name, head in heads.items():
        scores = score_options(context, head, questions, clips)
        # Questions of fewer options are filled up with empty ones, which no head may choose.
        scores = np.where(option_exists, scores, -np.inf)
        chosen[name] = scores.argmax(axis=1)
        correct = chosen[name] == questions.answer
        metrics[f"{name}_nll"] = float(info_nce(scores, is_answer, temperature=1.0).mean())
        metrics[f"{name}_accuracy"] = 100 * float(correct.mean())
        by_kind = accuracy_by_kind(correct, questions.kinds)
        metrics |= {f"{name}_accuracy_{kind}": x for kind, x in by_kind.items() if kind}
        intervals[f"{name}_accuracy"] = mean_interval(correct, questions.media_ids)
    return Result(metrics, intervals, *describe(questions, chosen, data))


def usable_questions(data: EvalData, clips: Encoded, num_options: int) -> Choices:
    """Select the questions whose clip can be decoded; draw some if the split has none.

    Raises:
      UserError: see `evaluate_multiple_choice`.
    """
    if data.choices is None:
        texts = select_texts(data.texts, np.isin(data.texts.rows, clips.rows))
        questions = draw_questions(texts, num_options)
        if not len(questions.answer):
            raise UserError(f"no caption has {num_options - 1} negatives for multiple choice")
        return questions
    found = data.choices.option_ids.shape[1]
    if found != num_options:
        raise UserError(
            f"the split's questions have {found} options: set evaluation.choices={found}"
        )
    usable = np.isin(data.choices.rows, clips.rows)
    if not usable.any():
        raise UserError(f"none of the {len(usable)} questions has a usable clip")
    *arrays, kinds, skipped, cut = data.choices
    kinds = tuple(kind for kind, keep in zip(kinds, usable, strict=True) if keep)
    return Choices(*(x[usable] for x in arrays), kinds, skipped + int((~usable).sum()), cut)


def draw_questions(texts: Texts, num_options: int, seed: int = 0) -> Choices:
    """Draw a question for each caption: itself among captions of other clips (ours).

    Negatives have another media id and another text, and no two of a question are equal. The same
    texts and seed always give the same questions. Captions without enough negatives are skipped.
    """
    rng = np.random.default_rng(seed)
    # Equal captions of other clips would be as true, so texts are compared, not rows.
    text_numbers = np.unique(texts.text_ids, axis=0, return_inverse=True)[1].ravel()
    rows, options, answers = [], [], []
    for row in range(len(texts.captions)):
        chosen = draw_negatives(rng, row, texts.media_ids, text_numbers, num_options - 1)
        if len(chosen) == num_options - 1:
            rows.append(row)
            answers.append(int(rng.integers(num_options)))
            options.append(np.insert(chosen, answers[-1], row))
    options = np.array(options, np.int32).reshape(-1, num_options)
    rows = np.array(rows, np.int32)
    return Choices(
        texts.text_ids[options],
        texts.text_mask[options],
        np.array(answers, np.int32),
        texts.media_ids[rows],
        texts.rows[rows],
        ("",) * len(rows),
        len(texts.captions) - len(rows),
    )


def draw_negatives(
    rng: np.random.Generator,
    row: int,
    media_ids: Int[np.ndarray, " q"],
    text_numbers: Int[np.ndarray, " q"],
    wanted: int,
) -> Int[np.ndarray, " _"]:
    """Draw at most `wanted` captions of other media and texts than those of a row, all different.

    A few are drawn first; all are put into a random order only if those do not suffice.
    """
    everything = len(media_ids)
    for drawn in (rng.integers(everything, size=8 * wanted), None):
        drawn = rng.permutation(everything) if drawn is None else drawn
        negative = (media_ids[drawn] != media_ids[row]) & (text_numbers[drawn] != text_numbers[row])
        drawn = drawn[negative]
        _, first = np.unique(text_numbers[drawn], return_index=True)
        if len(first) >= wanted:
            break
    return drawn[np.sort(first)][:wanted]


def score_options(
    context: EvalContext, head: functools.partial, questions: Choices, clips: Encoded
) -> Float[np.ndarray, "q c"]:
    """Score every option of every question with a head."""

    def options_of(rows: Int[np.ndarray, " b"]) -> tuple[Caption]:
        return (Caption(questions.option_ids[rows], questions.option_mask[rows]),)

    features, static = clips.features, head.keywords
    return map_pairs(context, head.func, features, questions.rows, options_of, **static)


def cut_by_list(questions: Choices, config: ObjectivesConfig) -> int:
    """Count the questions of which MCM's list of all options cuts one."""
    if not config.mcm or config.mcm_kind != "concat":
        return 0
    options = Caption(jnp.asarray(questions.option_ids), jnp.asarray(questions.option_mask))
    return int(are_cut(config.mcm_template_ids, options, config.mcm_len).sum())


def describe(
    questions: Choices, chosen: dict[str, np.ndarray], data: EvalData
) -> tuple[list[dict], list[Item]]:
    """List each question with the correct option and each head's choice, also to be drawn."""
    predictions, items = [], []
    for question, row in enumerate(questions.rows):
        ids, mask = questions.option_ids[question], questions.option_mask[question]
        options = [data.text_of(option) for option in ids[mask.any(axis=1)]]
        given = {name: int(answers[question]) for name, answers in chosen.items()}
        correct = int(questions.answer[question])
        predictions.append(
            {"clip": data.names[row], "options": options, "answer": correct, "chosen": given}
        )
        lines = [Line(f"truth: {options[correct]}")]
        lines += [
            Line(f"chosen by {name}: {options[option]}", option == correct)
            for name, option in given.items()
        ]
        title = f"{data.names[row]}: which of {len(options)} texts?"
        items.append(Item(title, [Shown(int(row), "", None)], lines))
    return predictions, items


def format_choices(metrics: dict[str, float]) -> str:
    """Format the accuracies as a Markdown table, a column for each head and kind."""
    names = [name for name in metrics if "accuracy" in name]
    count = f"multiple choice, percent of {metrics['num_questions']:.0f} questions"
    head = [name.replace("_accuracy", "").replace("_", ": ") for name in names]
    cells = [f"{metrics[name]:.1f}" for name in names]
    table = markdown_table([[count, *head], ["accuracy", *cells]])
    if not metrics.get("cut_questions"):
        return table
    return (
        f"{table}\n\n{metrics['cut_questions']:.0f} questions are cut, their end last: raise "
        "data.text_len or objectives.mcm_len."
    )
