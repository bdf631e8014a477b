"""Evaluation of a run: retrieval on a split, its table, and a picture of what the model does.

python -m vlmae.evaluate WORKDIR [--split val] [--rerank-top-k 16]
"""

import contextlib
import json
from pathlib import Path

import jax
import numpy as np
from jaxtyping import PyTree

from data_pipelines.pipeline import EvalData, eval_data
from vlmae.analysis.picture import save_picture
from vlmae.checkpoint import load_params
from vlmae.command import run_command
from vlmae.config import ExperimentConfig, MeshConfig, load_config
from vlmae.config_tree import override
from vlmae.evaluators.multiple_choice import evaluate_multiple_choice
from vlmae.evaluators.retrieval import evaluate_retrieval, format_table
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

    With VTC: `retrieval.json` and `retrieval.md`. With MVM: `reconstruction.png`. If the config
    asks for choices: `multiple_choice.json`.

    Returns:
      Metrics named `retrieval/t2v_r1`, ..., `multiple_choice/match_accuracy`, ...
    """
    model = build_model(config)
    out_dir.mkdir(parents=True, exist_ok=True)
    if config.objectives.mvm:
        picture_first_clips(config, params, data, out_dir / "reconstruction.png")
    run = (model, params, data, mesh)
    size, metrics = config.data.eval_batch_size, {}
    if config.objectives.vtc:
        top_k = config.evaluation.rerank_top_k
        result = evaluate_retrieval(*run, batch_size=size, rerank_top_k=top_k).metrics
        write_whole(out_dir / "retrieval.json", json.dumps(result, indent=2) + "\n")
        write_whole(out_dir / "retrieval.md", format_table(result) + "\n")
        metrics |= {f"retrieval/{name}": value for name, value in result.items()}
    if config.evaluation.choices:
        result = evaluate_multiple_choice(
            *run,
            batch_size=size,
            num_options=config.evaluation.choices,
            objectives=config.objectives,
        )
        write_whole(out_dir / "multiple_choice.json", json.dumps(result, indent=2) + "\n")
        metrics |= {f"multiple_choice/{name}": value for name, value in result.items()}
    return metrics


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
    config = override(config, {"data.tokenizer": str(workdir / "tokenizer"), **given})
    mesh = make_mesh(MeshConfig())
    check_batch_size(config.data.eval_batch_size, mesh, "data.eval_batch_size")
    out_dir = workdir / f"evaluation_{config.data.eval.split}"
    with jax.set_mesh(mesh):
        result = evaluate(config, params, mesh, eval_data(config.data), out_dir)
    print(f"step {step}, split {config.data.eval.split}: written to {out_dir}")
    if config.objectives.vtc:
        print((out_dir / "retrieval.md").read_text())
    if config.evaluation.choices:
        print((out_dir / "multiple_choice.json").read_text())
    return result


if __name__ == "__main__":
    run_command(evaluate_workdir)
