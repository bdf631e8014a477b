"""Evaluation of a run on a split: tables, predictions, and pictures.

vlmae evaluate WORKDIR [--split val test] [--data OTHER] [--rerank-top-k 16]
vlmae evaluate WORKDIR --data kinetics --prompts "a video of {}" [--labels names.txt]
"""

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jaxtyping import PyTree

from data_pipelines.loading.evaluation import EvalData, eval_data
from data_pipelines.schema.checks import UserError, check
from data_pipelines.schema.classes import CLASSES_FILE
from data_pipelines.storage.class_counts import classes_for
from vlmae.config.experiment import ExperimentConfig, MeshConfig
from vlmae.config.tree import override
from vlmae.evaluation.encode import EvalInputs, Temperatures, encode_clips
from vlmae.evaluation.evaluators import EVALUATORS, chosen_evaluators
from vlmae.evaluation.result import Result
from vlmae.evaluation.zero_shot import read_classes
from vlmae.figures.answer_page import draw_page, spread
from vlmae.figures.clip_figure import save_picture
from vlmae.models.video_language import build_model
from vlmae.parallel.processes import is_main_process
from vlmae.parallel.sharding import check_batch_size, gather, make_mesh
from vlmae.runs.atomic_files import write_json, write_whole
from vlmae.runs.best import load_chosen
from vlmae.runs.inference import EvalContext, OnProgress
from vlmae.runs.load import load_run, title_of, tokenizer_of
from vlmae.runs.metric_registry import PRUNED
from vlmae.runs.waiting import waiting

PICTURED_CLIPS = 4


def evaluate(
    config: ExperimentConfig,
    params: PyTree,
    mesh: jax.sharding.Mesh,
    data: EvalData,
    out_dir: Path,
    on_progress: OnProgress = lambda **_: None,
    temperatures: Temperatures | None = None,
) -> dict[str, float]:
    """Evaluate what the objectives trained, and write it to `out_dir`.

    Each evaluator that the config asks for writes NAME.json (metrics, confidence intervals),
    NAME.md (a table), NAME.jsonl (predictions) and NAME.png (some of them). Objectives that
    reconstruct patches write `reconstruction.png`. With `evaluation.also_pruned` all evaluators run
    again at the keep rate of training, and their names begin with `pruned_`. Of several processes
    all must call this; the first one writes. `on_progress` is called after each batch, see
    `OnProgress`. `temperatures` of InfoNCE come from another split; None fits them on this one.

    Returns:
      Metrics named `retrieval/t2v_r1`, ..., `multiple_choice/match_accuracy`, ...
    """
    if config.objectives.need("removed_patches"):
        host_params = gather(params)  # a collective, so all processes take part
        if is_main_process():
            picture_first_clips(config, host_params, data, out_dir / "reconstruction.png")
    batch_size = config.data.eval_batch_size
    metrics = {}
    temperatures = temperatures or Temperatures(config.data.eval.split)
    for prefix, rated in at_keep_rates(config).items():
        context = EvalContext(build_model(rated), params, mesh, batch_size, on_progress)
        for name, result in run_evaluators(rated, context, data, temperatures):
            if is_main_process():
                write_result(name, result, data, out_dir, config.evaluation.pictures, prefix)
            metrics |= {f"{prefix}{name}/{key}": value for key, value in result.metrics.items()}
    return metrics


def at_keep_rates(config: ExperimentConfig) -> dict[str, ExperimentConfig]:
    """Return the configs to evaluate by the prefix of their results."""
    sparsify = config.model.video.sparsify
    rated = override(config, {"model.video.sparsify.eval_keep_rate": sparsify.keep_rate})
    is_other = sparsify.keep_rate != sparsify.eval_keep_rate
    return {"": config} | ({PRUNED: rated} if config.evaluation.also_pruned and is_other else {})


def run_evaluators(
    config: ExperimentConfig, context: EvalContext, data: EvalData, temperatures: Temperatures
) -> Iterator[tuple[str, Result]]:
    """Run the evaluators that the config asks for; clips are encoded once for all of them."""
    evaluators = chosen_evaluators(config)
    embed = any(evaluator.embeds for evaluator in evaluators.values())
    fuse = any(evaluator.fuses(config.evaluation) for evaluator in evaluators.values())
    clips = None
    if embed or fuse:
        clips = encode_clips(context, data, embed=embed, keep_features=fuse)
    inputs = EvalInputs(data, clips, config.evaluation, config.objectives, temperatures)
    for name, evaluator in evaluators.items():
        yield name, evaluator.evaluate(context, inputs)


def write_result(
    name: str, result: Result, data: EvalData, out_dir: Path, pictures: int, prefix: str = ""
) -> None:
    """Write the files of an evaluator, see `evaluate`; at most `pictures` items are drawn.

    Names of files begin with `prefix`.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    values = result.metrics | {"intervals": result.intervals, **result.facts}
    write_json(out_dir / f"{prefix}{name}.json", values)
    notes = [f"\n\n{fact}: {value}" for fact, value in result.facts.items()]
    table = EVALUATORS[name].format(result.metrics)
    write_whole(out_dir / f"{prefix}{name}.md", "".join([table, *notes, "\n"]))
    lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in result.predictions]
    write_whole(out_dir / f"{prefix}{name}.jsonl", "".join(lines))
    if pictures:
        items = [result.items[i] for i in spread(len(result.items), pictures)]
        draw_page(items, data.clip).save(out_dir / f"{prefix}{name}.png")


def print_tables(out_dir: Path) -> None:
    """Print the tables that `evaluate` wrote."""
    for prefix in ("", PRUNED):
        for name in EVALUATORS:
            path = out_dir / f"{prefix}{name}.md"
            if path.is_file():
                if prefix:
                    print("At the keep rate of training:\n")
                print(path.read_text())


def picture_first_clips(
    config: ExperimentConfig, params: PyTree, data: EvalData, path: Path
) -> None:
    """Draw the first clips of the evaluation data with masks, kept patches and reconstruction.

    Runs in this process alone, whatever mesh is set.

    Raises:
      UserError: no clip can be decoded.
    """
    with contextlib.closing(data.batches(num_workers=0)) as batches:
        number, batch = next(((i, x) for i, x in enumerate(batches) if x.valid.any()), (0, None))
    if batch is None:
        raise UserError(f"none of the {data.num_clips} evaluation clips can be decoded")
    rows = np.flatnonzero(batch.valid)[:PICTURED_CLIPS]
    captions = [data.first_caption(number * len(batch.valid) + row) for row in rows]
    batch = jax.tree.map(lambda x: x[rows], batch)
    path.parent.mkdir(parents=True, exist_ok=True)
    # On one device: a mesh of several need not divide a few clips, and other processes do not draw.
    with jax.set_mesh(make_mesh(MeshConfig(), jax.local_devices()[:1])):
        save_picture(config, params, batch, captions, path)


def evaluate_workdir(
    workdir: Path,
    split: tuple[str, ...] = (),
    data: str = "",
    rerank_top_k: int | None = None,
    choices: int | None = None,
    keep_rate: float | None = None,
    backwards: bool = False,
    temperature_split: str | None = None,
    checkpoint: str = "newest",
    prompts: tuple[str, ...] = (),
    labels: Path | None = None,
    num_frames: int | None = None,
) -> dict[str, dict[str, float]]:
    """Evaluate a checkpoint of a work directory, with the config found there.

    All devices of this machine share the work, whatever mesh the run was trained on.

    Args:
      workdir: a run, or an export of one.
      split: other splits of the evaluation data set; default the config's.
      data: another prepared data set, which the run has not seen (zero-shot); default the config's.
      rerank_top_k: candidates to score again with VTM; default the config's.
      choices: options of multiple-choice questions, 0 for none; default the config's.
      keep_rate: fraction of the tokens that each pruning stage keeps; default the config's rate of
        evaluation.
      backwards: play the clips in reverse, as a control for the order of time.
      temperature_split: of the splits, the one on which InfoNCE's temperatures are fitted for all.
        Default: val if it is one of several; else each split's own.
      checkpoint: newest, best (by `train.best_metric`) or the number of a step.
      prompts: classify the clips by such prompts instead, zero-shot: templates such as "a video of
        {}", or files with one in each line.
      labels: file of the classes that prompts tell apart, a label of the data in each line, or a
        label, a tab and its name in prompts; default: the labels of the split.
      num_frames: frames of a clip, 1 for a data set of pictures; default the config's.

    Returns:
      The metrics of each split.

    Raises:
      MissingError: no config, no checkpoint, or no data.
      UserError: `temperature_split` is none of the splits, or the run cannot be asked what it was
        not trained for.
    """
    example = "--prompts 'a video of {}'"
    check(not labels or bool(prompts), f"--labels {labels} needs --prompts, such as {example}")
    config = load_run(workdir)
    splits = [*dict.fromkeys(split)] or [config.data.eval.split]
    fitted = temperature_split or ("val" if "val" in splits else "")
    if fitted and fitted not in splits:
        raise UserError(f"--temperature-split {fitted} is none of --split {' '.join(splits)}")
    params, step = load_chosen(workdir, checkpoint)
    wanted = {
        "evaluation.rerank_top_k": rerank_top_k,
        "evaluation.choices": choices,
        "model.video.sparsify.eval_keep_rate": keep_rate,
        "data.eval.num_frames": num_frames,
    }
    given = {field: value for field, value in wanted.items() if value is not None}
    # Those of the run: the data may have been prepared again with others since.
    own = {
        "data.tokenizer": str(tokenizer_of(workdir)),
        "data.classes": str(workdir / CLASSES_FILE),
        "data.eval.name": data or config.data.eval.name,
        "data.eval.backwards": config.data.eval.backwards or backwards,
        # Of this command alone: a run that was evaluated by prompts has its own retrieval.
        "evaluation.prompts": prompts,
        "evaluation.labels": str(labels or ""),
    }
    config = override(config, own | given)
    mesh = make_mesh(MeshConfig())
    check_batch_size(config.data.eval_batch_size, mesh, "data.eval_batch_size")
    results, temperatures = {}, None
    for name in sorted(splits, key=lambda name: name != fitted):  # the fitted one comes first
        of_split = override(config, {"data.eval.split": name})
        kind = "zero_shot" if prompts else "evaluation"
        parts = [kind, *filter(None, [data]), name, *(["backwards"] if backwards else [])]
        parts += [checkpoint] if checkpoint != "newest" else []
        out_dir = workdir / "_".join(parts)
        with jax.set_mesh(mesh), waiting(f"evaluating {name}"):
            clips = open_split(of_split)
            results[name] = evaluate(
                of_split, params, mesh, clips, out_dir, temperatures=temperatures
            )
        if name == fitted:
            temperatures = temperatures_of(name, results[name])
        print(f"{title_of(config, step)}, split {name}: written to {out_dir}")
        print_tables(out_dir)
    return {name: results[name] for name in splits}


def open_split(config: ExperimentConfig) -> EvalData:
    """Open the evaluation split, for prompts as clips alone, whatever the run's task reads."""
    if not config.evaluation.prompts:
        return eval_data(config.data, classes_for(config.data))
    data = eval_data(dataclasses.replace(config.data, task="captions", num_others=0))
    read_classes(data, config.evaluation)  # a name that does not fit shows before clips are read
    return data


def temperatures_of(split: str, values: dict[str, float]) -> Temperatures:
    """Read the temperatures of InfoNCE from the metrics of a split."""
    found = {re.fullmatch(r"retrieval/(.+)_temperature", name): x for name, x in values.items()}
    return Temperatures(split, {name[1]: value for name, value in found.items() if name})
