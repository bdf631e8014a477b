"""Export formats and components by name: a new one is a function and a line in its table."""

import functools
import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from PIL import Image

from data_pipelines.schema.checks import UserError
from data_pipelines.schema.checksum import write_sums
from vlmae.config.experiment import ExperimentConfig
from vlmae.config.tree import override
from vlmae.export.folders import (
    Checkpoint,
    open_checkpoint,
    write_json,
    write_tensors,
    write_tokenizer,
    write_words,
)
from vlmae.export.model_card import Usage, model_card, model_usage, programs_usage, stock_usage
from vlmae.export.programs import programs, write_signatures
from vlmae.export.stablehlo import write_stablehlo
from vlmae.export.stock import Stock, stock_text, stock_video
from vlmae.runs.atomic_files import new_folder
from vlmae.weights.export_format import check_parameters, describe, exported_of
from vlmae.weights.torch_names import torch_views

PREPROCESSOR = "preprocessor_config.json"
CODE = ("modeling_vlmae.py", "auto_vlmae.py")  # files of this room that a torch export carries


class Format(NamedTuple):
    """A way to write a whole model."""

    write: Callable[[Checkpoint, Path], Usage]  # writes into the folder; how its files are called
    packages: tuple[str, ...] = ()  # beside those that vlmae requires; the extra has its name


def export_run(
    workdir: Path,
    out_dir: Path,
    format: str = "torch",
    component: str = "all",
    checkpoint: str = "newest",
) -> int:
    """Write a checkpoint of a run as a folder, which appears whole or not at all.

    Args:
      workdir: a run, or an export of one.
      out_dir: the folder to make; it must not exist, or be empty.
      format: a key of `FORMATS`.
      component: "all", or a key of `COMPONENTS`: that encoder alone.
      checkpoint: see `load_chosen`.

    Returns:
      The step of the checkpoint.

    Raises:
      MissingError: no config, no checkpoint, or no tokenizer.
      UserError: `out_dir` is not empty, a name is unknown, `component` does not go with `format`,
        a package is missing, the checkpoint does not fit its config, or a file does not give the
        model's outputs: says why.
    """
    # Also for callers from Python, whom the command line's choices do not guard.
    _check_known("format", format, FORMATS)
    _check_known("component", component, ("all", *COMPONENTS))
    if component != "all" and format != "torch":
        raise UserError(f"component is {component}, but format {format} holds the whole model")
    # Asked before the checkpoint is read, which takes long.
    packages = FORMATS[format].packages
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        needs = ", ".join(missing)
        raise UserError(f"format {format} needs {needs}: pip install 'vlmae[{format}]'")
    opened = open_checkpoint(workdir, checkpoint)
    with new_folder(out_dir) as folder:
        if component == "all":
            # A config that was edited by hand after training would export a broken model.
            exported = exported_of(opened.config, opened.params, opened.step)
            check_parameters(opened.params, exported, workdir)
            usage = FORMATS[format].write(opened, folder)
        else:
            stock = COMPONENTS[component](opened.config, opened.params)
            usage = write_component(opened, stock, folder)
            name = f"{component}_encoder"
            # The card counts only the parameters that are in the folder.
            opened = opened._replace(params={name: opened.params[name]})
        (folder / "README.md").write_text(model_card(opened, usage), "utf-8")
        write_sums(folder)  # last, as it covers all files
    return opened.step


def write_torch(checkpoint: Checkpoint, folder: Path) -> Usage:
    """Write tensors, config, tokenizer and classes with the PyTorch code that runs them."""
    config, params = checkpoint.config, checkpoint.params
    write_json(folder / "config.json", describe(config, params, checkpoint.step))
    write_json(folder / PREPROCESSOR, clip_processor(config))
    write_tensors(folder, torch_views(params))
    for name in CODE:
        shutil.copyfile(Path(__file__).parent / name, folder / name)
    write_words(checkpoint, folder)
    return model_usage(config, params)


def write_programs(library: Literal["jax", "onnx"], checkpoint: Checkpoint, folder: Path) -> Usage:
    """Write StableHLO or ONNX programs, their signatures, tokenizer and classes."""
    write = write_stablehlo
    if library == "onnx":
        from vlmae.export.onnx import write_onnx as write  # torch is an extra

        # The files come from the PyTorch module, which computes in float32 alone.
        config = override(checkpoint.config, {"model.dtype": "float32"})
        checkpoint = checkpoint._replace(config=config)
    # Found once, for signatures and files alike.
    found = programs(checkpoint.config, checkpoint.params)
    write_words(checkpoint, folder)
    write_signatures(found, folder)
    write(found, checkpoint, folder)
    return programs_usage(found, library)


def write_component(checkpoint: Checkpoint, stock: Stock, folder: Path) -> Usage:
    """Write one encoder for a class of transformers, with its tokenizer or image processor."""
    write_json(folder / "config.json", stock.config)
    write_tensors(folder, stock.tensors)
    if stock.part == "text":
        write_tokenizer(checkpoint, folder)
    else:
        processor = image_processor(checkpoint.config)
        write_json(folder / PREPROCESSOR, processor)
    return stock_usage(stock)


def clip_processor(config: ExperimentConfig) -> dict:
    """Describe how clips become inputs: `image_processor` and how frames are chosen."""
    return image_processor(config) | {
        "image_processor_type": "VlmaeImageProcessor",
        "auto_map": {"AutoImageProcessor": "auto_vlmae.VlmaeImageProcessor"},
        "num_frames": config.data.eval.num_frames,
        "frame_sampling": "middles of equal parts",
    }


def image_processor(config: ExperimentConfig) -> dict:
    """Describe size, crop and normalization of frames: the contents of preprocessor_config.json.

    The class is the one of transformers that resizes the short side and takes the center.
    """
    layout, side = config.model.video.layout, config.data.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": int(Image.Resampling.BICUBIC),
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_convert_rgb": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(layout.pixel_mean),
        "image_std": list(layout.pixel_std),
    }


def _check_known(field: str, name: str, known: object) -> None:
    if name not in known:
        raise UserError(f"{field} is {name!r}, not one of {', '.join(known)}")


FORMATS: dict[str, Format] = {
    "torch": Format(write_torch),
    "stablehlo": Format(functools.partial(write_programs, "jax")),
    "onnx": Format(
        functools.partial(write_programs, "onnx"), ("onnx", "onnxruntime", "onnxscript", "torch")
    ),
}
COMPONENTS: dict[str, Callable[..., Stock]] = {"text": stock_text, "video": stock_video}
