"""A run as files for others: for PyTorch and transformers, as StableHLO or as ONNX.

python -m vlmae.export WORKDIR OUT_DIR [--format torch|stablehlo|onnx] [--component text|video]
"""

from pathlib import Path
from typing import Literal

from vlmae.command import run_command
from vlmae.interop.export import export_component, export_model, export_programs


def export(
    workdir: Path,
    out_dir: Path,
    format: Literal["torch", "stablehlo", "onnx"] = "torch",
    component: Literal["all", "text", "video"] = "all",
) -> None:
    """Exports the newest checkpoint of a run.

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

    Raises:
      FileNotFoundError: no config, no checkpoint, or no tokenizer.
      ValueError: `out_dir` is not empty, `component` does not go with `format`, no class of
        transformers computes what the encoder does, or a program does not give what the model
        gives: says why.
    """
    if component != "all" and format != "torch":
        raise ValueError(f"component is {component}, but format {format} holds the whole model")
    if format != "torch":
        step = export_programs(workdir, out_dir, format)
    elif component == "all":
        step = export_model(workdir, out_dir)
    else:
        step = export_component(workdir, out_dir, component)
    print(f"step {step}: written to {out_dir}")


if __name__ == "__main__":
    run_command(export)
