"""Does an export compute what its run computes? All clips, texts and questions of the test split.

    python -m vlmae.export RUN EXPORT
    python -m venv torchenv && torchenv/bin/pip install torch safetensors
    python -m experiments.benchmarks.exported RUN EXPORT --python torchenv/bin/python

The export runs in that other environment, by `run_exported.py`, which gets frames and word ids.
Compared are: unit vectors of clips and texts, the rank of every text's own clip, the matching score
of each text with several clips, and for questions the scores of all answers and the best one.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors.numpy import save_file

from data_pipelines.classes import CLASSES_FILE, classes_for
from data_pipelines.evaluation import EvalData, eval_data
from experiments.benchmarks.report import print_report, write_report
from vlmae.checkpoint import load_params
from vlmae.choices import Caption
from vlmae.command import run_command
from vlmae.config import ExperimentConfig, MeshConfig
from vlmae.config_tree import override
from vlmae.evaluators.encode import (
    Trained,
    encode_clips,
    encode_texts,
    map_rows,
    program,
    take_rows,
)
from vlmae.evaluators.question_answering import classify_scores, decode_scores, score_questions
from vlmae.models.video_language import build_model
from vlmae.scoring import match_scores
from vlmae.sharding import make_mesh
from vlmae.workdir import load_run, tokenizer_of

Arrays = dict[str, np.ndarray]
RUNNER = Path(__file__).with_name("run_exported.py")
CLIPS_EACH = 8  # with which a text is matched, its own among them


def inputs_of(config: ExperimentConfig, data: EvalData) -> Arrays:
    """What both sides get: frames, word ids, and for questions those of the answers."""
    batches = list(data.batches())
    arrays = {"video": np.concatenate([batch.video[batch.valid] for batch in batches])}
    if len(arrays["video"]) != data.num_clips:
        raise ValueError(f"{data.num_clips - len(arrays['video'])} clips cannot be decoded")
    asked = data.questions.texts if config.objectives.answer else data.texts
    arrays |= {"ids": asked.text_ids, "mask": asked.text_mask}
    arrays["own"] = (data.media_ids == asked.media_ids[:, None]).argmax(axis=1)
    if config.objectives.answer and config.objectives.answer_kind == "decoder":
        arrays["answer_ids"], arrays["answer_mask"] = data.answers()
    if config.objectives.vtm:
        shifts = np.arange(CLIPS_EACH) * (data.num_clips // CLIPS_EACH)
        arrays["matched"] = (arrays["own"][:, None] + shifts) % data.num_clips
    return arrays


def outputs_of(config: ExperimentConfig, params: Any, data: EvalData, inputs: Arrays) -> Arrays:
    """What the run makes of them."""
    mesh = make_mesh(MeshConfig())
    trained = Trained(build_model(config), params, mesh, config.data.eval_batch_size)
    objectives, outputs = config.objectives, {}
    clips = encode_clips(trained, data, embed=objectives.vtc > 0, keep_features=True)
    if objectives.vtc:
        outputs["clips"] = clips.embeddings
        outputs["texts"] = encode_texts(trained, data.texts).embeddings
    if objectives.vtm:

        def match(model, ids, mask, video):
            return match_scores(model, model.encode_text(ids, mask), video)

        run = program(trained, match)
        rows = np.repeat(np.arange(len(inputs["ids"])), CLIPS_EACH)
        pairs = (inputs["ids"][rows], inputs["mask"][rows], inputs["matched"].ravel())
        outputs["matches"] = map_rows(
            lambda ids, mask, clip: run(ids, mask, take_rows(clips.features, clip)),
            pairs,
            trained.batch_size,
        )
    if objectives.answer:
        outputs["answers"] = score_questions(
            trained, answering(config, data), data.questions, clips
        )
    return outputs


def answering(config: ExperimentConfig, data: EvalData) -> Any:
    """The evaluator's method: the classifier, or the decoder with all answers."""
    if config.objectives.answer_kind != "decoder":
        return classify_scores
    answers, top_k = Caption(*data.answers()), config.evaluation.answers_top_k
    return lambda *inputs: decode_scores(*inputs, answers=answers, top_k=top_k)


def run_export(python: Path, export: Path, inputs: Arrays, top_k: int) -> Arrays:
    """What the export makes of them, in a process of another environment."""
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "in.safetensors", Path(folder) / "out.json"
        save_file({name: np.ascontiguousarray(x) for name, x in inputs.items()}, given)
        command = [python, RUNNER, export, given, made, top_k]
        subprocess.run([str(x) for x in command], check=True)
        made = json.loads(made.read_text())
    return {name: np.array(x, np.float32) for name, x in made.items()}


def ranks(outputs: Arrays, own: np.ndarray) -> Float[np.ndarray, " q"]:
    """The place of each text's own clip among all clips, 0 the first."""
    scores = outputs["texts"] @ outputs["clips"].T
    return (scores > scores[np.arange(len(own)), own][:, None]).sum(axis=1)


def compare(ours: Arrays, theirs: Arrays, inputs: Arrays) -> list[dict[str, Any]]:
    """A row for each output: how many values, the largest difference, equal choices."""
    rows = []
    for name, expected in ours.items():
        seen = np.abs(expected) < 1e8  # answers that were not scored whole hold NEVER
        difference = float(np.abs(np.where(seen, theirs[name] - expected, 0.0)).max())
        rows.append({"what": name, "values": expected.size, "difference": difference})
    if "texts" in ours:
        equal = ranks(ours, inputs["own"]) == ranks(theirs, inputs["own"])
        rows.append({"what": "ranks", "values": len(equal), "equal": int(equal.sum())})
    if "answers" in ours:
        equal = ours["answers"].argmax(axis=1) == theirs["answers"].argmax(axis=1)
        rows.append({"what": "best answers", "values": len(equal), "equal": int(equal.sum())})
    return rows


def format_rows(rows: list[dict[str, Any]]) -> str:
    """A Markdown table."""
    lines = ["| | values | largest difference | equal |", "|---|---|---|---|"]
    for row in rows:
        difference = f"{row['difference']:.1e}" if "difference" in row else ""
        lines.append(
            f"| {row['what']} | {row['values']:,} | {difference} | {row.get('equal', '')} |"
        )
    return "\n".join(lines)


def main(workdir: Path, export: Path, python: Path = Path(sys.executable)) -> None:
    """Compares an export with its run on the evaluation split.

    Args:
      workdir: the run.
      export: what `python -m vlmae.export` made of it.
      python: an interpreter that has torch and safetensors.
    """
    config = override(load_run(workdir), {"data.tokenizer": str(tokenizer_of(workdir))})
    if (workdir / CLASSES_FILE).is_file():
        config = override(config, {"data.classes": str(workdir / CLASSES_FILE)})
    data = eval_data(config.data, classes_for(config.data))
    inputs = inputs_of(config, data)
    params, _ = load_params(workdir)
    theirs = run_export(python, export, inputs, config.evaluation.answers_top_k)
    rows = compare(outputs_of(config, params, data, inputs), theirs, inputs)
    settings = {"workdir": str(workdir), "export": str(export), "python": str(python)}
    write_report(Path("runs/benchmarks"), "exported", format_rows(rows), settings, rows=rows)
    print_report(format_rows(rows), settings)


if __name__ == "__main__":
    run_command(main)
