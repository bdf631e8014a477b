"""A run as files for others: the whole model for PyTorch, or an encoder for transformers.

python -m vlmae.export WORKDIR OUT_DIR [--format torch] [--component text|video]
"""

from pathlib import Path
from typing import Literal

from vlmae.command import run_command
from vlmae.interop.export import export_component, export_model


def export(
    workdir: Path,
    out_dir: Path,
    format: Literal["torch"] = "torch",
    component: Literal["all", "text", "video"] = "all",
) -> None:
    """Exports the newest checkpoint of a run.

    The folder holds safetensors, `config.json`, the tokenizer, a model card and, for the whole
    model, one PyTorch file that needs nothing but torch. It appears whole or not at all.

    Args:
      workdir: a run.
      out_dir: the folder to make; it must not exist, or be empty.
      format: torch: for plain torch and for transformers' AutoModel.
      component: all: the model; text, video: that encoder alone, as a class that transformers has.

    Raises:
      FileNotFoundError: no config, no checkpoint, or no tokenizer.
      ValueError: `out_dir` is not empty, or no class of transformers computes what the encoder
        does: says why.
    """
    if component == "all":
        step = export_model(workdir, out_dir)
    else:
        step = export_component(workdir, out_dir, component)
    print(f"step {step}: written to {out_dir}")


if __name__ == "__main__":
    run_command(export)
