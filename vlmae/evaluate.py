"""Evaluation of a run on a split: tables, predictions, and a picture of what the model does.

python -m vlmae.evaluate WORKDIR [--split val] [--rerank-top-k 16]
"""

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import PyTree

from data_pipelines.classes import CLASSES_FILE, classes_for
from data_pipelines.pipeline import EvalData, eval_data
from vlmae.analysis.picture import save_picture
from vlmae.checkpoint import load_params
from vlmae.command import run_command
from vlmae.config import ExperimentConfig, MeshConfig, load_config
from vlmae.config_tree import override
from vlmae.evaluators.encode import Trained, encode_clips
from vlmae.evaluators.labels import evaluate_labels, format_labels
from vlmae.evaluators.multiple_choice import evaluate_multiple_choice, format_choices
from vlmae.evaluators.question_answering import evaluate_answers, format_answers
from vlmae.evaluators.retrieval import evaluate_retrieval, format_retrieval
from vlmae.files import write_whole
from vlmae.models.video_language import build_model
from vlmae.sharding import check_batch_size, make_mesh

PICTURED_CLIPS = 4


def evaluate(
    config: ExperimentConfig,
    params: PyTree,
    mesh: jax.sharding.Mesh,
    data: EvalData,
    out_dir: Path,
) -> dict[str, float]:
    """Evaluates what the objectives trained, and writes it to `out_dir`.

    With VTC `retrieval`, if the config asks for choices `multiple_choice`, with questions
    `answers`, with labels `labels`: each a `.json` and a `.md`. The last two write what was
    predicted as well, a JSON line each. With MVM: `reconstruction.png`.

    Returns:
      Metrics named `retrieval/t2v_r1`, ..., `multiple_choice/match_accuracy`, ...
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    if config.objectives.mvm:
        picture_first_clips(config, params, data, out_dir / "reconstruction.png")
    trained = Trained(build_model(config), params, mesh, config.data.eval_batch_size)
    objectives, evaluation = config.objectives, config.evaluation
    metrics = {}
    if objectives.label:
        labels = evaluate_labels(trained, data)
        metrics |= report(out_dir, "labels", labels.metrics, format_labels)
        write_predictions(out_dir / "label_predictions.jsonl", labels.predictions)
    fused = bool(evaluation.rerank_top_k or evaluation.choices or objectives.answer)
    if not (objectives.vtc or evaluation.choices or objectives.answer):
        return metrics
    clips = encode_clips(trained, data, embed=objectives.vtc > 0, keep_features=fused)
    if objectives.vtc:
        top_k = evaluation.rerank_top_k
        result = evaluate_retrieval(trained, data, clips, rerank_top_k=top_k).metrics
        metrics |= report(out_dir, "retrieval", result, format_retrieval)
    if evaluation.choices:
        result = evaluate_multiple_choice(
            trained, data, clips, num_options=evaluation.choices, objectives=objectives
        )
        metrics |= report(out_dir, "multiple_choice", result, format_choices)
    if objectives.answer:
        answers = evaluate_answers(trained, data, clips)
        metrics |= report(out_dir, "answers", answers.metrics, format_answers)
        write_predictions(out_dir / "answer_predictions.jsonl", answers.predictions)
    return metrics


def report(
    out_dir: Path, name: str, metrics: dict[str, float], table: Callable[[dict], str]
) -> dict[str, float]:
    """Writes NAME.json and NAME.md, and returns the metrics with "NAME/" before their names."""
    write_whole(out_dir / f"{name}.json", json.dumps(metrics, indent=2) + "\n")
    write_whole(out_dir / f"{name}.md", table(metrics) + "\n")
    return {f"{name}/{key}": value for key, value in metrics.items()}


def write_predictions(path: Path, predictions: Sequence[dict]) -> None:
    """One JSON object a line."""
    write_whole(path, "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in predictions))


def print_tables(out_dir: Path) -> None:
    """The tables that `evaluate` wrote."""
    for name in ("retrieval", "multiple_choice", "answers", "labels"):
        path = out_dir / f"{name}.md"
        if path.is_file():
            print(path.read_text())


def picture_first_clips(
    config: ExperimentConfig, params: PyTree, data: EvalData, path: Path
) -> None:
    """Draws the first clips of the evaluation data: masked, thinned, chosen for, painted.

    Raises:
      ValueError: no clip can be decoded.
    """
    with contextlib.closing(data.batches()) as batches:
        batch = next((batch for batch in batches if batch.valid.any()), None)
    if batch is None:
        raise ValueError(f"none of the {data.num_clips} evaluation clips can be decoded")
    batch = jax.tree.map(lambda x: x[batch.valid][:PICTURED_CLIPS], batch)
    captions = [data.texts.captions[_first(data.texts.media_ids, i)] for i in batch.media_ids]
    save_picture(config, jax.device_get(params), batch, captions, path)


def _first(values: np.ndarray, wanted: np.int32) -> int:
    return int(np.argmax(values == wanted))


def evaluate_workdir(
    workdir: Path,
    split: str | None = None,
    rerank_top_k: int | None = None,
    choices: int | None = None,
) -> dict[str, float]:
    """Evaluates the newest checkpoint of a work directory, with the config found there.

    All devices of this machine share the work, whatever mesh the run was trained on.

    Args:
      workdir: a run.
      split: another split of the evaluation data set; default the config's.
      rerank_top_k: candidates to score again with VTM; default the config's.
      choices: options of multiple-choice questions, 0 for none; default the config's.

    Raises:
      FileNotFoundError: no config, no checkpoint, or no data.
    """
    config = load_config(workdir / "config.json")
    params, step = load_params(workdir)
    wanted = {
        "data.eval.split": split,
        "evaluation.rerank_top_k": rerank_top_k,
        "evaluation.choices": choices,
    }
    given = {field: value for field, value in wanted.items() if value is not None}
    own = {"data.tokenizer": workdir / "tokenizer", "data.classes": workdir / CLASSES_FILE}
    config = override(config, {field: str(path) for field, path in own.items()} | given)
    mesh = make_mesh(MeshConfig())
    check_batch_size(config.data.eval_batch_size, mesh, "data.eval_batch_size")
    out_dir = workdir / f"evaluation_{config.data.eval.split}"
    with jax.set_mesh(mesh):
        data = eval_data(config.data, classes_for(config.data))
        result = evaluate(config, params, mesh, data, out_dir)
    print(f"step {step}, split {config.data.eval.split}: written to {out_dir}")
    print_tables(out_dir)
    return result


if __name__ == "__main__":
    run_command(evaluate_workdir)
