"""The newest checkpoint of a run as a folder for others.

The whole model for PyTorch or as programs, or a part of it as a stock model of transformers.
"""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import tokenizers
from jaxtyping import PyTree
from safetensors.numpy import save

from vlmae.checkpoint import load_params
from vlmae.config import ExperimentConfig
from vlmae.config_tree import override
from vlmae.files import new_folder
from vlmae.interop.card import model_card, model_usage, programs_usage, stock_usage
from vlmae.interop.exported import check_parameters, describe, exported_of
from vlmae.interop.programs import programs, write_signatures
from vlmae.interop.published import WEIGHTS
from vlmae.interop.stablehlo import write_stablehlo
from vlmae.interop.stock import Stock, stock_text, stock_video
from vlmae.interop.torch_names import Tensors, to_torch
from vlmae.workdir import load_run, tokenizer_of

HERE = Path(__file__).parent
CODE = {"torch_model.py": "modeling_vlmae.py", "auto_vlmae.py": "auto_vlmae.py"}  # file -> copy
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript", "torch")
TOKENIZER, VOCABULARY, CLASSES = "tokenizer.json", "vocab.txt", "classes.json"


def export_model(workdir: Path, out_dir: Path) -> int:
    """Writes a whole model: tensors, config, tokenizer, classes, card and its PyTorch code.

    Returns:
      The step of the checkpoint.

    Raises:
      FileNotFoundError: no config, no checkpoint, or no tokenizer.
      ValueError: `out_dir` is not empty, or the checkpoint does not fit its config.
    """
    config, (params, step) = load_run(workdir), load_params(workdir)
    with new_folder(out_dir) as folder:
        check_parameters(params, exported_of(config, params, step), workdir)
        write_json(folder / "config.json", describe(config, params, step))
        write_tensors(folder, to_torch(params))
        for name, copy in CODE.items():
            shutil.copyfile(HERE / name, folder / copy)
        write_words(workdir, folder, config)
        card = model_card(workdir, config, params, step, model_usage(config, params))
        (folder / "README.md").write_text(card, "utf-8")
    return step


def export_programs(workdir: Path, out_dir: Path, format: Literal["stablehlo", "onnx"]) -> int:
    """Writes a whole model as programs: their files and names, tokenizer, classes, card.

    Returns:
      The step of the checkpoint.

    Raises:
      FileNotFoundError, ValueError: as `export_model`; or a package is missing, or a file does not
        give what the model gives, or cannot be written.
    """
    write = writer_of(format)
    config, (params, step) = load_run(workdir), load_params(workdir)
    with new_folder(out_dir) as folder:
        check_parameters(params, exported_of(config, params, step), workdir)
        write_words(workdir, folder, config)
        if format == "onnx":  # whose files come from the PyTorch module, which knows but float32
            config = override(config, {"model.dtype": "float32"})
        found = programs(config, params)
        write_signatures(found, folder)
        usage = programs_usage(found, "jax" if format == "stablehlo" else "onnx")
        card = model_card(workdir, config, params, step, usage)
        (folder / "README.md").write_text(card, "utf-8")
        write(found, config, params, step, folder)
    return step


def writer_of(format: Literal["stablehlo", "onnx"]) -> Callable[..., None]:
    """What writes programs in a format; torch is imported only for those of ONNX.

    Raises:
      ValueError: a package that ONNX needs is missing; names it.
    """
    if format == "stablehlo":
        return write_stablehlo
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"ONNX needs {', '.join(missing)}: pip install 'vlmae[onnx]'")
    from vlmae.interop.onnx_files import write_onnx

    return write_onnx


def export_component(workdir: Path, out_dir: Path, component: str) -> int:
    """Writes the text or the video encoder as a folder of transformers' own classes.

    Args:
      workdir: a run.
      out_dir: the folder to make.
      component: "text" or "video".

    Returns:
      The step of the checkpoint.

    Raises:
      FileNotFoundError, ValueError: as `export_model`; or no class computes what the encoder does:
        says why.
    """
    config, (params, step) = load_run(workdir), load_params(workdir)
    stock = {"text": stock_text, "video": stock_video}[component](config, params)
    with new_folder(out_dir) as folder:
        write_json(folder / "config.json", stock.config)
        write_tensors(folder, stock.tensors)
        if component == "text":
            write_tokenizer(tokenizer_of(workdir), folder, config)
        else:
            write_json(folder / "preprocessor_config.json", image_processor(config))
        card = model_card(workdir, config, part_of(params, stock), step, stock_usage(stock))
        (folder / "README.md").write_text(card, "utf-8")
    return step


def part_of(params: PyTree, stock: Stock) -> PyTree:
    """The parameters of the encoder that became a stock model."""
    name = f"{stock.part}_encoder"
    return {name: params[name]}


def write_json(path: Path, value: dict) -> None:
    """Writes an object, indented."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def write_tensors(folder: Path, tensors: Tensors) -> None:
    """Writes `model.safetensors`; the metadata is what transformers asks for."""
    (folder / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))


def write_words(workdir: Path, folder: Path, config: ExperimentConfig) -> None:
    """Writes the run's tokenizer, and the names of its classes if it has any.

    Raises:
      FileNotFoundError: the run has no tokenizer.
    """
    write_tokenizer(tokenizer_of(workdir), folder, config)
    if (workdir / CLASSES).is_file():
        shutil.copyfile(workdir / CLASSES, folder / CLASSES)


def write_tokenizer(source: Path, folder: Path, config: ExperimentConfig) -> None:
    """Writes the run's tokenizer so that every reader of it adds [CLS] and [SEP].

    Raises:
      FileNotFoundError: the run has none.
    """
    if not (source / TOKENIZER).is_file():
        raise FileNotFoundError(f"{source / TOKENIZER}: no such file")
    tokenizer = tokenizers.Tokenizer.from_file(str(source / TOKENIZER))
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=ends
    )
    tokenizer.save(str(folder / TOKENIZER))
    shutil.copyfile(source / VOCABULARY, folder / VOCABULARY)
    names = ("pad", "unk", "cls", "sep", "mask")
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config.data.text_len,
            "model_input_names": ["input_ids", "attention_mask"],
            **{f"{name}_token": f"[{name.upper()}]" for name in names},
        },
    )


def image_processor(config: ExperimentConfig) -> dict:
    """The contents of a `preprocessor_config.json`: size and normalization of the frames."""
    layout, side = config.model.video.layout, config.data.image_size
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(layout.pixel_mean),
        "image_std": list(layout.pixel_std),
    }
