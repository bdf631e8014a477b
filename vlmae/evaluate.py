"""Evaluation of a run on a split: tables, predictions, and a picture of what the model does.

python -m vlmae.evaluate WORKDIR [--split val] [--rerank-top-k 16]
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from jaxtyping import PyTree

from data_pipelines.classes import CLASSES_FILE, classes_for
from data_pipelines.evaluation import EvalData, eval_data
from vlmae.analysis.page import draw_page, spread
from vlmae.analysis.picture import save_picture
from vlmae.checkpoint import load_params
from vlmae.command import run_command
from vlmae.config import ExperimentConfig, MeshConfig
from vlmae.config_tree import override
from vlmae.evaluators.encode import Trained, encode_clips
from vlmae.evaluators.labels import evaluate_labels, format_labels
from vlmae.evaluators.multiple_choice import evaluate_multiple_choice, format_choices
from vlmae.evaluators.question_answering import evaluate_answers, format_answers
from vlmae.evaluators.result import Result
from vlmae.evaluators.retrieval import evaluate_retrieval, format_retrieval
from vlmae.files import write_whole
from vlmae.models.video_language import build_model
from vlmae.processes import is_first
from vlmae.sharding import check_batch_size, gather, make_mesh
from vlmae.workdir import load_run, tokenizer_of

PICTURED_CLIPS = 4
TABLES: dict[str, Callable[[dict[str, float]], str]] = {
    "retrieval": format_retrieval,
    "multiple_choice": format_choices,
    "answers": format_answers,
    "labels": format_labels,
}


def evaluate(
    config: ExperimentConfig,
    params: PyTree,
    mesh: jax.sharding.Mesh,
    data: EvalData,
    out_dir: Path,
    on_progress: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Evaluates what the objectives trained, and writes it to `out_dir`.

    With VTC `retrieval`, if the config asks for choices `multiple_choice`, with questions
    `answers`, with labels `labels`: each a `.json` (metrics, confidence intervals), a `.md` (a
    table), a `.jsonl` (predictions) and a `.png` (some of them). With MVM: `reconstruction.png`.
    Of several processes all must call this; the first one writes. `on_progress` is called after
    each batch.

    Returns:
      Metrics named `retrieval/t2v_r1`, ..., `multiple_choice/match_accuracy`, ...
    """
    if config.objectives.mvm:
        host_params = gather(params)
        if is_first():
            picture_first_clips(config, host_params, data, out_dir / "reconstruction.png")
    batch_size = config.data.eval_batch_size
    trained = Trained(build_model(config), params, mesh, batch_size, on_progress)
    metrics = {}
    for name, result in run_evaluators(config, trained, data):
        if is_first():
            write_result(config, data, result, out_dir / name)
        metrics |= {f"{name}/{key}": value for key, value in result.metrics.items()}
    return metrics


def run_evaluators(
    config: ExperimentConfig, trained: Trained, data: EvalData
) -> Iterator[tuple[str, Result]]:
    """What the config asks for, one after the other; clips are encoded once for all."""
    objectives, evaluation = config.objectives, config.evaluation
    if objectives.label:
        yield "labels", evaluate_labels(trained, data, evaluation)
    fuses = bool(evaluation.rerank_top_k or evaluation.choices or objectives.answer)
    if not (objectives.vtc or fuses):
        return
    clips = encode_clips(trained, data, embed=objectives.vtc > 0, keep_features=fuses)
    if objectives.vtc:
        yield "retrieval", evaluate_retrieval(trained, data, clips, evaluation)
    if evaluation.choices:
        result = evaluate_multiple_choice(trained, data, clips, evaluation, objectives)
        yield "multiple_choice", result
    if objectives.answer:
        yield "answers", evaluate_answers(trained, data, clips, evaluation, objectives)


def write_result(config: ExperimentConfig, data: EvalData, result: Result, stem: Path) -> None:
    """STEM.json: metrics and intervals; .md: a table; .jsonl: predictions; .png: some of them."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    values = result.metrics | {"intervals": result.intervals}
    write_whole(stem.with_suffix(".json"), json.dumps(values, indent=2) + "\n")
    write_whole(stem.with_suffix(".md"), TABLES[stem.name](result.metrics) + "\n")
    lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in result.predictions]
    write_whole(stem.with_suffix(".jsonl"), "".join(lines))
    if config.evaluation.pictures:
        items = [result.items[i] for i in spread(len(result.items), config.evaluation.pictures)]
        draw_page(items, data.clip).save(stem.with_suffix(".png"))


def print_tables(out_dir: Path) -> None:
    """The tables that `evaluate` wrote."""
    for name in TABLES:
        path = out_dir / f"{name}.md"
        if path.is_file():
            print(path.read_text())


def picture_first_clips(
    config: ExperimentConfig, params: PyTree, data: EvalData, path: Path
) -> None:
    """Draws the first clips of the evaluation data: masked, thinned, chosen for, painted.

    In this process alone, whatever mesh is set.

    Raises:
      ValueError: no clip can be decoded.
    """
    with contextlib.closing(data.batches()) as batches:
        batch = next((batch for batch in batches if batch.valid.any()), None)
    if batch is None:
        raise ValueError(f"none of the {data.num_clips} evaluation clips can be decoded")
    batch = jax.tree.map(lambda x: x[batch.valid][:PICTURED_CLIPS], batch)
    captions = [data.texts.captions[_first(data.texts.media_ids, i)] for i in batch.media_ids]
    path.parent.mkdir(parents=True, exist_ok=True)
    with jax.set_mesh(make_mesh(MeshConfig(), jax.local_devices()[:1])):
        save_picture(config, params, batch, captions, path)


def _first(values: np.ndarray, wanted: np.int32) -> int:
    return int(np.argmax(values == wanted))


def evaluate_workdir(
    workdir: Path,
    split: str | None = None,
    rerank_top_k: int | None = None,
    choices: int | None = None,
    backwards: bool = False,
) -> dict[str, float]:
    """Evaluates the newest checkpoint of a work directory, with the config found there.

    All devices of this machine share the work, whatever mesh the run was trained on.

    Args:
      workdir: a run, or an export of one.
      split: another split of the evaluation data set; default the config's.
      rerank_top_k: candidates to score again with VTM; default the config's.
      choices: options of multiple-choice questions, 0 for none; default the config's.
      backwards: play the clips in reverse, as a control for the order of time.

    Raises:
      FileNotFoundError: no config, no checkpoint, or no data.
    """
    config = load_run(workdir)
    params, step = load_params(workdir)
    wanted = {
        "data.eval.split": split,
        "evaluation.rerank_top_k": rerank_top_k,
        "evaluation.choices": choices,
    }
    given = {field: value for field, value in wanted.items() if value is not None}
    own = {"data.tokenizer": tokenizer_of(workdir), "data.classes": workdir / CLASSES_FILE}
    config = override(config, {field: str(path) for field, path in own.items()} | given)
    config = override(config, {"data.eval.backwards": config.data.eval.backwards or backwards})
    mesh = make_mesh(MeshConfig())
    check_batch_size(config.data.eval_batch_size, mesh, "data.eval_batch_size")
    suffix = "_backwards" if backwards else ""
    out_dir = workdir / f"evaluation_{config.data.eval.split}{suffix}"
    with jax.set_mesh(mesh):
        data = eval_data(config.data, classes_for(config.data))
        result = evaluate(config, params, mesh, data, out_dir)
    print(f"step {step}, split {config.data.eval.split}: written to {out_dir}")
    print_tables(out_dir)
    return result


if __name__ == "__main__":
    run_command(evaluate_workdir)
