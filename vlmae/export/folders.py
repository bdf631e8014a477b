"""Files that exported folders have in common: tensors, tokenizer, classes, JSON."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from jaxtyping import PyTree

from data_pipelines.schema.checks import MissingError
from data_pipelines.schema.classes import CLASSES_FILE
from data_pipelines.text.tokenize import (
    SPECIAL_FIELDS,
    SPECIAL_FILES,
    SPECIAL_TOKENS,
    TOKENIZER_FILE,
    VOCABULARY_FILE,
    load_tokenizer,
)
from vlmae.config.experiment import ExperimentConfig
from vlmae.runs.best import load_chosen
from vlmae.runs.load import load_run, tokenizer_of
from vlmae.weights.huggingface import WEIGHTS
from vlmae.weights.torch_names import Tensors


class Checkpoint(NamedTuple):
    """Checkpoint of a run, as the source of an export."""

    workdir: Path
    config: ExperimentConfig
    params: PyTree
    step: int


def open_checkpoint(workdir: Path, checkpoint: str = "newest") -> Checkpoint:
    """Read config and parameters of a run, or of an export of one; see `load_chosen`.

    Raises:
      MissingError: no config or no checkpoint.
      UserError: a file is damaged; names it.
    """
    # Config first: it is read in a moment, and says at once that a folder is no run.
    config, (params, step) = load_run(workdir), load_chosen(workdir, checkpoint)
    return Checkpoint(workdir, config, params, step)


def write_json(path: Path, value: dict) -> None:
    """Write an object, indented."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def write_tensors(folder: Path, tensors: Tensors) -> None:
    """Write `model.safetensors` of float32 tensors, byte for byte as the library does.

    One tensor at a time: the library holds two more copies of all of them. Transposed views are
    taken as they are.
    """
    header: dict = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
    end = 0
    for name in sorted(tensors):
        begin, end = end, end + tensors[name].nbytes
        shape = list(tensors[name].shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    with (folder / WEIGHTS).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(tensors):
            file.write(np.ascontiguousarray(tensors[name], "<f4").data)


def write_words(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the run's tokenizer, and the names of its classes if it has any.

    Raises:
      MissingError: the run has no tokenizer.
    """
    write_tokenizer(checkpoint, folder)
    classes = checkpoint.workdir / CLASSES_FILE
    if classes.is_file():
        shutil.copyfile(classes, folder / CLASSES_FILE)


def write_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the run's tokenizer so that every library adds what begins and ends a text.

    Raises:
      MissingError: the run has no tokenizer.
    """
    source = tokenizer_of(checkpoint.workdir)
    if not (source / TOKENIZER_FILE).is_file():
        raise MissingError(f"{source / TOKENIZER_FILE}: no such file")
    words = load_tokenizer(source)  # names the file if it is damaged
    tokenizer = tokenizers.Tokenizer.from_file(str(source / TOKENIZER_FILE))
    # The run adds these two itself, so its own file need not.
    begin, end = (words.special[role] for role in ("[CLS]", "[SEP]"))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=[begin, "$A", end],
        pair=[begin, "$A", end, "$B", end],
        special_tokens=[(begin, words.cls_id), (end, words.sep_id)],
    )
    tokenizer.save(str(folder / TOKENIZER_FILE))
    # vocab.txt for libraries that read no tokenizer.json, or the names of other special tokens.
    beside = VOCABULARY_FILE if words.is_bert else SPECIAL_FILES[0]
    shutil.copyfile(source / beside, folder / beside)
    # transformers has a field for each of BERT's, and others for what begins and ends a text.
    fields = {role: role[1:-1].lower() for role in SPECIAL_TOKENS}
    fields |= {} if words.is_bert else SPECIAL_FIELDS
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": checkpoint.config.data.text_len,
            "model_input_names": ["input_ids", "attention_mask"],
            **{f"{fields[role]}_token": name for role, name in words.special.items()},
        },
    )
