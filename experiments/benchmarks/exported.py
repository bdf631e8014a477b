"""Comparison of an export with its run on all clips, texts and questions of the test split.

    vlmae export RUN EXPORT
    python -m venv torchenv && torchenv/bin/pip install torch safetensors
    python -m experiments.benchmarks.exported RUN EXPORT --python torchenv/bin/python

The export runs in that other environment, by `run_exported.py`, which gets frames and token ids.
The table compares embeddings of clips and texts, the rank of every text's own clip, the matching
score of each text with several clips, and for questions the scores of all answers and the best.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from jaxtyping import Float
from safetensors.numpy import save_file

from data_pipelines.loading.evaluation import EvalData, eval_data
from data_pipelines.schema.checks import UserError
from data_pipelines.schema.classes import CLASSES_FILE
from data_pipelines.storage.class_counts import classes_for
from experiments.benchmarks.report import print_report, write_report
from vlmae.config.experiment import ExperimentConfig, MeshConfig
from vlmae.config.tree import override
from vlmae.evaluation.clip_features import map_pairs
from vlmae.evaluation.encode import encode_clips, encode_texts
from vlmae.evaluation.question_answering import answering, score_questions
from vlmae.models.scoring import match_scores
from vlmae.models.video_language import build_model
from vlmae.parallel.sharding import make_mesh
from vlmae.runs.checkpoint import load_params
from vlmae.runs.inference import EvalContext
from vlmae.runs.load import load_run, tokenizer_of
from vlmae.runs.tables import markdown_table

Arrays = dict[str, np.ndarray]
RUNNER = Path(__file__).with_name("run_exported.py")
CLIPS_EACH = 8  # with which a text is matched, its own among them


def inputs_of(config: ExperimentConfig, data: EvalData) -> Arrays:
    """Collect the inputs of both sides: frames and token ids, and the answers of questions."""
    batches = list(data.batches())
    arrays = {"video": np.concatenate([batch.video[batch.valid] for batch in batches])}
    if len(arrays["video"]) != data.num_clips:
        raise UserError(f"{data.num_clips - len(arrays['video'])} clips cannot be decoded")
    asked = data.questions.texts if config.objectives.answer else data.texts
    arrays |= {"ids": asked.text_ids, "mask": asked.text_mask}
    arrays["own"] = asked.rows
    if config.objectives.answer and config.objectives.answer_kind == "decoder":
        arrays["answer_ids"], arrays["answer_mask"] = data.answers()
    if config.objectives.vtm:
        shifts = np.arange(CLIPS_EACH) * (data.num_clips // CLIPS_EACH)
        arrays["matched"] = (arrays["own"][:, None] + shifts) % data.num_clips
    return arrays


def outputs_of(config: ExperimentConfig, params: Any, data: EvalData, inputs: Arrays) -> Arrays:
    """Compute the outputs of the run."""
    mesh = make_mesh(MeshConfig())
    trained = EvalContext(build_model(config), params, mesh, config.data.eval_batch_size)
    objectives, outputs = config.objectives, {}
    clips = encode_clips(trained, data, embed=objectives.vtc > 0, keep_features=True)
    if objectives.vtc:
        outputs["clips"] = clips.embeddings
        outputs["texts"] = encode_texts(trained, data.texts).embeddings
    if objectives.vtm:

        def match(model, video, ids, mask):
            return match_scores(model, video, model.encode_text(ids, mask))

        def text_of(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return inputs["ids"][rows // CLIPS_EACH], inputs["mask"][rows // CLIPS_EACH]

        matched = inputs["matched"].ravel()
        outputs["matches"] = map_pairs(trained, match, clips.features, matched, text_of)
    if objectives.answer:
        method = answering(data, objectives, config.evaluation)
        number = len(data.classes.names)
        best, scores = score_questions(trained, method, data.questions, clips, top_k=number)
        outputs["answers"] = np.take_along_axis(scores, best.argsort(axis=1), axis=1)
    return outputs


def run_export(python: Path, export: Path, inputs: Arrays, top_k: int) -> Arrays:
    """Compute the outputs of the export, in a process of another environment."""
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "in.safetensors", Path(folder) / "out.json"
        save_file({name: np.ascontiguousarray(x) for name, x in inputs.items()}, given)
        command = [python, RUNNER, export, given, made, top_k]
        # Another environment, so that nothing of vlmae can help the export.
        subprocess.run([str(x) for x in command], check=True)
        made = json.loads(made.read_text())
    return {name: np.array(x, np.float32) for name, x in made.items()}


def ranks(outputs: Arrays, own: np.ndarray) -> Float[np.ndarray, " q"]:
    """Rank of each text's own clip among all clips, 0 the first."""
    scores = outputs["texts"] @ outputs["clips"].T
    return (scores > scores[np.arange(len(own)), own][:, None]).sum(axis=1)


def compare(ours: Arrays, theirs: Arrays, inputs: Arrays) -> list[dict[str, Any]]:
    """Compare each output: number of values, largest difference, equal choices."""
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
    """Format the result of `compare`."""
    cells = [
        (
            row["what"],
            f"{row['values']:,}",
            f"{row['difference']:.1e}" if "difference" in row else "",
            str(row.get("equal", "")),
        )
        for row in rows
    ]
    return markdown_table([["", "values", "largest difference", "equal"], *cells])


def main(
    workdir: Path,
    export: Path,
    python: Path = Path(sys.executable),
    out_dir: Path = Path("runs/benchmarks"),
) -> None:
    """Compare an export with its run on the evaluation split; write exported.md and exported.json.

    Args:
      workdir: the run.
      export: the folder that `vlmae export` wrote.
      python: an interpreter that has torch and safetensors.
      out_dir: where the table goes.
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
    write_report(out_dir, "exported", format_rows(rows), settings, rows=rows)
    print_report(format_rows(rows), settings)


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.PositionalRequiredArgs,))
