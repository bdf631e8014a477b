"""The model card of an export: what the model is, what it was trained on, how good it is."""

import json
from pathlib import Path
from typing import Literal, NamedTuple

import jax
from jaxtyping import PyTree

from vlmae.config import ExperimentConfig
from vlmae.interop.programs import Program, described
from vlmae.interop.stock import Stock
from vlmae.result import read_result
from vlmae.workdir import ENVIRONMENT

HEADER = """---
library_name: {library}
tags:
- vlmae
- video-language
---
"""
ABOUT = """# {name}

{what}, trained by vlmae, a reimplementation of SMAUG
(Lin et al., ICCV 2023) and MuLTI (Xu et al., AAAI 2024).
"""
USE_MODEL = """```python
from transformers import AutoModel
model = AutoModel.from_pretrained("FOLDER", trust_remote_code=True)
```

or, with nothing but torch and safetensors, from within the folder:

```python
from modeling_vlmae import VideoLanguageModel
model = VideoLanguageModel.from_folder(".")
```

Then, with `video = model.encode_video(frames)` and `text = model.encode_text(ids, mask)`:

{calls}

`frames` are uint8 [b, {frames}, {size}, {size}, 3], the middles of equal parts of each clip; `ids`
and `mask` are [b, up to {words}], by `tokenizer.json`. The docstrings of `modeling_vlmae.py` say
the rest. vlmae itself takes the folder as `--train.init-from FOLDER`.
"""
CALLS = {  # part that is needed -> what it does
    "temperature": "`model.similarity(video, text)`: how alike every clip and every text are",
    "match_head": "`model.match(text, video)`: how well text i fits clip i",
    "choice_head": "`model.choose(text, video)`: which option of the question i fits clip i",
    "classifier": "`model.answer(text, video)`: logits of the names in `classes.json`",
    "answer_decoder": "`model.answer(text, video, answers)`: log-probabilities of answers",
    "word_transform": "`model.word_logits(text, video)`: the words at every place of text i",
    "pixel_decoder": "`model.decode_pixels(video)`: the patches, also those that were masked",
}
USE_STOCK = """```python
from transformers import {model_class}
model = {model_class}.from_pretrained("FOLDER"{options})
```

It is the {part} encoder alone; what was trained on top of it is not here.
"""
USE_PROGRAMS = """From within the folder, with {needs} alone:

```python
{load}

{calls}
```

{programs}

`b` is any batch size. `frames` are uint8, the middles of equal parts of each clip; `ids` and
`mask` are texts by `tokenizer.json`, [CLS] words [SEP] and then padding, where the mask is False.
Row i of `match` and `answer` is about text i and clip i. `programs.json` holds the same list.
"""
LOADERS = {
    "jax": """from pathlib import Path
from jax import export

def load(name):
    return export.deserialize(Path(f"{name}.stablehlo").read_bytes()).call""",
    "onnx": """import onnxruntime

def load(name):
    session = onnxruntime.InferenceSession(f"{name}.onnx")
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, inputs)))""",
}
ENCODE = """video = load("encode_video")({"video": frames})
text = load("encode_text")({"ids": ids, "mask": mask})"""
PAIR = """pair = {
    "text_tokens": text["tokens"],
    "text_mask": mask,
    "video_tokens": video["tokens"],
    "frame_cls": video["frame_cls"],
}"""
MATCH = 'scores = load("match")(pair)["scores"]'
CLASSIFY = 'logits = load("answer")(pair)["logits"]  # of the names in classes.json'
SCORE_ANSWERS = """# One answer, [CLS] words [SEP], for each row:
answers = {"answer_ids": answer_ids, "answer_mask": answer_mask}
log_probs = load("answer")(answers | pair)["log_probs"]"""
LICENSE = """The code of vlmae, which any Python files here are part of, is under Apache-2.0.
What may be done with the weights depends on the data they were trained on: it is for those who
publish them to say.
"""


class Usage(NamedTuple):
    """What an export is good for, as its card says it."""

    what: str  # it is
    library: str  # that opens it, by its name on the Hugging Face hub
    text: str  # how it is called


def model_card(
    workdir: Path, config: ExperimentConfig, params: PyTree, step: int, usage: Usage
) -> str:
    """The text of a `README.md`.

    Args:
      workdir: the run, whose result and environment are told.
      config: of the run.
      params: the parameters that are exported.
      step: of the checkpoint.
      usage: how the export is used.
    """
    sections = {
        "Use": usage.text,
        "Model": _table(_model_rows(config, params)),
        "Data": _table(_data_rows(config)),
        "Metrics": _metrics(workdir, step),
        "Provenance": _table(_provenance_rows(workdir, config, step)),
        "License": LICENSE,
    }
    header = HEADER.format(library=usage.library)
    body = "\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    return f"{header}{ABOUT.format(name=config.name, what=usage.what)}\n{body}"


def model_usage(config: ExperimentConfig, params: PyTree) -> Usage:
    """How the whole model is called with PyTorch."""
    text = USE_MODEL.format(
        calls="\n".join(f"- {call}" for part, call in CALLS.items() if part in params),
        frames=config.data.eval.num_frames,
        size=config.data.image_size,
        words=config.data.text_len,
    )
    return Usage("A video-language model", "transformers", text)


def stock_usage(stock: Stock) -> Usage:
    """How an encoder is opened with transformers."""
    pooled = stock.model_class in ("BertModel", "ViTModel", "DeiTModel")  # has one beside
    options = ", add_pooling_layer=False" if pooled else ""
    text = USE_STOCK.format(model_class=stock.model_class, part=stock.part, options=options)
    return Usage(f"The {stock.part} encoder of a video-language model", "transformers", text)


def programs_usage(found: dict[str, Program], library: Literal["jax", "onnx"]) -> Usage:
    """How programs are called, by `jax.export` from StableHLO or by onnxruntime."""
    calls = [ENCODE]
    if {"match", "answer"} & found.keys():
        calls.append(PAIR)
    if "match" in found:
        calls.append(MATCH)
    if "answer" in found:
        calls.append(CLASSIFY if "logits" in found["answer"].outputs else SCORE_ANSWERS)
    text = USE_PROGRAMS.format(
        needs={"jax": "jax", "onnx": "onnxruntime"}[library],
        load=LOADERS[library],
        calls="\n".join(calls),
        programs="\n".join(f"- `{name}`: {_signature(x)}" for name, x in found.items()),
    )
    return Usage("The programs of a video-language model", library, text)


def _signature(program: Program) -> str:
    sides = (described(program.inputs), described(program.outputs))
    return " -> ".join(", ".join(f"{key} {kind}" for key, kind in side.items()) for side in sides)


def _table(rows: dict[str, object]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines]) + "\n"


def _model_rows(config: ExperimentConfig, params: PyTree) -> dict[str, object]:
    video, text, fusion = config.model.video, config.model.text, config.model.fusion
    size = config.data.image_size
    rows: dict[str, object] = {
        "video encoder": f"{video.depth} blocks, width {video.width}, {video.num_heads} heads, "
        f"patches of {video.patch_size}, {config.data.eval.num_frames} frames of {size} x {size}",
        "text encoder": f"{text.depth} layers, width {text.width}, {text.num_heads} heads, "
        f"{text.vocab_size} words, texts of {config.data.text_len}",
        "fusion": f"{fusion.kind}, depth {fusion.depth}",
        "masked in training": f"{video.mask.scheme}, {video.mask.ratio}",
        "kept by a stage": f"{video.sparsify.keep_rate} in training, "
        f"{video.sparsify.eval_keep_rate} in evaluation",
        "frame selector": config.model.selector.kind,
    }
    counts = {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in params.items()}
    parts = ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()))
    return rows | {"parameters": f"{sum(counts.values()):,}: {parts}"}


def _data_rows(config: ExperimentConfig) -> dict[str, object]:
    data = config.data
    return {
        "trained on": ", ".join(f"{source.name} ({source.split})" for source in data.train),
        "evaluated on": f"{data.eval.name} ({data.eval.split})",
        "task": data.task,
        "batch": f"{data.batch_size} clips",
    }


def _metrics(workdir: Path, step: int) -> str:
    result = read_result(workdir)
    if result is None or result["step"] != step:
        return "Not evaluated at this step.\n"
    return _table({name: f"{value:.2f}" for name, value in sorted(result["metrics"].items())})


def _provenance_rows(workdir: Path, config: ExperimentConfig, step: int) -> dict[str, object]:
    objectives = ("vtc", "vtm", "mlm", "mvm", "mcm", "answer", "label")
    weights = {name: getattr(config.objectives, name) for name in objectives}
    init = config.train.init
    published = ", ".join(name for name in (init.text, init.video) if name)
    path = workdir / ENVIRONMENT
    environment = json.loads(path.read_text()) if path.is_file() else {}
    packages = environment.get("packages", {})
    return {
        "step": step,
        "seed": config.seed,
        "objectives": ", ".join(f"{name} {weight:g}" for name, weight in weights.items() if weight),
        "learning rate": f"{config.optim.learning_rate:g}, {config.optim.schedule}",
        "started from": config.train.init_from or published or "scratch",
        "python": environment.get("python", "not recorded"),
        "packages": ", ".join(f"{name} {v}" for name, v in packages.items()) or "not recorded",
    }
