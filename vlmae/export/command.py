"""Writes a run for other libraries: PyTorch and transformers, StableHLO or ONNX.

vlmae export WORKDIR OUT_DIR [--format torch|stablehlo|onnx] [--component text|video]
"""

from pathlib import Path
from typing import Literal

from vlmae.export.formats import COMPONENTS, FORMATS, export_run
from vlmae.runs.load import load_run, title_of
from vlmae.runs.waiting import waiting

# Made from the tables, so that the command line offers whatever they hold.
FormatName = Literal[tuple(FORMATS)]  # type: ignore[valid-type]
ComponentName = Literal[("all", *COMPONENTS)]  # type: ignore[valid-type]


def export(
    workdir: Path,
    out_dir: Path,
    format: FormatName = "torch",
    component: ComponentName = "all",
    checkpoint: str = "newest",
) -> None:
    """Export a checkpoint of a run.

    The folder holds the model, the tokenizer and a model card that says how to call it. It appears
    whole or not at all.

    Args:
      workdir: a run.
      out_dir: the folder to make; it must not exist, or be empty.
      format: torch: safetensors and one Python file, for plain torch and for transformers'
        AutoModel; stablehlo: programs for jax alone; onnx: programs for onnxruntime and others,
        which needs the extra `onnx`.
      component: all: the model; text, video: that encoder alone, as a class that transformers has
        (format torch only).
      checkpoint: newest, best (by `train.best_metric`) or the number of a step.

    Raises:
      MissingError: no config, no checkpoint, or no tokenizer.
      UserError: `out_dir` is not empty, `component` does not go with `format`, no class of
        transformers computes the encoder, or a program does not give the model's outputs: says why.
    """
    with waiting(f"exporting as {format}"):
        step = export_run(workdir, out_dir, format, component, checkpoint)
    print(f"{title_of(load_run(workdir), step)}: written to {out_dir}")
