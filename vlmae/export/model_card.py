"""Model cards of exports: what the model is, its data, its metrics, and the code that calls it."""

import dataclasses
from pathlib import Path
from typing import Literal, NamedTuple

import jax
from jaxtyping import PyTree

from data_pipelines.schema.checks import check
from data_pipelines.schema.json_files import read_json
from vlmae.config.experiment import ExperimentConfig
from vlmae.config.objectives import HEADS
from vlmae.export.folders import Checkpoint
from vlmae.export.programs import PAIR_PROGRAMS, Program, Shapes, described
from vlmae.export.stock import Stock
from vlmae.runs.load import title_of
from vlmae.runs.result import read_result
from vlmae.runs.tables import markdown_table
from vlmae.runs.workdir import ENVIRONMENT

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

`frames` are uint8 [b, {frames}, {size}, {size}, 3], the middles of equal parts of each clip, and of
each the center square, resized bicubically. `model.prepare(clips)` makes them, from uint8 frames of
any number and size; it needs Pillow. `ids` and `mask` are [b, up to {words}], by `tokenizer.json`.

With transformers, as its CLIP classes:

```python
from transformers import AutoImageProcessor, AutoTokenizer
processor = AutoImageProcessor.from_pretrained("FOLDER", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
pixels = processor(clips)["pixel_values"]  # a list of uint8 frames [t, h, w, 3]
words = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
video = model.get_video_features(pixels)  # [b, e]
text = model.get_text_features(**words)  # [c, e]; model(pixels, **words) gives both, and logits
```

The docstrings of `modeling_vlmae.py` say
the rest. vlmae itself opens the folder with `vlmae.load("FOLDER")`, which takes paths and
sentences, and continues training from it with `--train.init-from FOLDER`.
"""
CALLS = {  # head of an objective, as in `vlmae.config.objectives.HEADS` -> the call that needs it
    "temperature": "`model.similarity(video, text)`: cosines of every clip and every text; "
    "`model.logits`: over the learned temperature, plus the bias of a sigmoid loss",
    "match_head": "`model.match(video, text)`: how well text i fits clip i",
    "choice_head": "`model.choose(video, text)`: which option of the question i fits clip i",
    "classifier": "`model.answer(video, text)`: logits of the names in `classes.json`",
    "answer_decoder": "`model.answer(video, text, answers)`: log-probabilities of answers",
    "word_transform": "`model.word_logits(video, text)`: logits of the words of text i",
    "pixel_decoder": "`model.decode_pixels(video)`: the patches, masked ones included",
}
USE_STOCK = """```python
from transformers import {model_class}
model = {model_class}.from_pretrained("FOLDER"{options})
```

It is the {part} encoder alone; the parts that were trained on top of it are not here.
"""
USE_PROGRAMS = """From within the folder, with {needs} alone:

```python
{load}

{calls}
```

{programs}

`b` is any batch size. `frames` are uint8, the middles of equal parts of each clip; `ids` and
`mask` are texts by `tokenizer.json`, [CLS] words [SEP] and then padding, where the mask is False.
Row i of `match` and `answer` is about clip i and text i. `programs.json` holds the same list.
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
PAIR = """pair = {
    "video_tokens": video["tokens"],
    "frame_cls": video["frame_cls"],
    "text_tokens": text["tokens"],
    "text_mask": mask,
}"""
LICENSE = """The code of vlmae, which any Python files here are part of, is under Apache-2.0.
The license of the weights depends on the data they were trained on: it is for those who publish
them to say.
"""


class Usage(NamedTuple):
    """How an export is opened and called."""

    what: str  # noun phrase for the exported thing
    library: str  # that opens it, by its name on the Hugging Face hub
    text: str  # Markdown


def model_card(checkpoint: Checkpoint, usage: Usage) -> str:
    """Write the text of a `README.md`.

    Args:
      checkpoint: the parameters that are exported, and the run whose result and environment are
        reported.
      usage: how the export is called.
    """
    workdir, config, params, step = checkpoint
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
    """Explain how the whole model is called with PyTorch."""
    text = USE_MODEL.format(
        calls="\n".join(f"- {CALLS[head]}" for head in HEADS if head in params),
        frames=config.data.eval.num_frames,
        size=config.data.image_size,
        words=config.data.text_len,
    )
    return Usage("A video-language model", "transformers", text)


def stock_usage(stock: Stock) -> Usage:
    """Explain how an encoder is opened with transformers."""
    # These classes add a pooler with random weights unless they are told not to.
    pooled = stock.model_class in ("BertModel", "ViTModel", "DeiTModel")
    options = ", add_pooling_layer=False" if pooled else ""
    text = USE_STOCK.format(model_class=stock.model_class, part=stock.part, options=options)
    return Usage(f"The {stock.part} encoder of a video-language model", "transformers", text)


def programs_usage(found: dict[str, Program], library: Literal["jax", "onnx"]) -> Usage:
    """Explain how programs are called: StableHLO by `jax.export`, ONNX by onnxruntime."""
    of_pairs = {program.name for program in PAIR_PROGRAMS.values()}
    encoders = [program.usage for name, program in found.items() if name not in of_pairs]
    pairs = [program.usage for name, program in found.items() if name in of_pairs]
    signatures = [
        f"- `{name}`: {list_arrays(program.inputs)} -> {list_arrays(program.outputs)}"
        for name, program in found.items()
    ]
    text = USE_PROGRAMS.format(
        needs={"jax": "jax", "onnx": "onnxruntime"}[library],
        load=LOADERS[library],
        calls="\n".join([*encoders, PAIR, *pairs] if pairs else encoders),
        programs="\n".join(signatures),
    )
    return Usage("The programs of a video-language model", library, text)


def list_arrays(shapes: Shapes) -> str:
    """Format named arrays as in "ids int32[b, 32], mask bool[b, 32]"."""
    return ", ".join(f"{name} {kind}" for name, kind in described(shapes).items())


def _table(rows: dict[str, object]) -> str:
    return markdown_table([("", ""), *rows.items()]) + "\n"


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
    # Counted in what is exported, not in the config: a checkpoint may lack parts.
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
    # The newest checkpoint may be of a later step than the last evaluation.
    if result is None or result["step"] != step:
        return "Not evaluated at this step.\n"
    return _table({name: f"{value:.2f}" for name, value in sorted(result["metrics"].items())})


def _provenance_rows(workdir: Path, config: ExperimentConfig, step: int) -> dict[str, object]:
    weights = config.objectives.weights.items()
    published = ", ".join(name for name in dataclasses.astuple(config.train.init) if name)
    path = workdir / ENVIRONMENT
    environment = read_json(path) if path.is_file() else {}
    packages = environment.get("packages", {})
    check(isinstance(packages, dict), f"{path}: packages must be an object")
    return {
        "step": title_of(config, step).removeprefix("step "),
        "seed": config.seed,
        "objectives": ", ".join(f"{name} {weight:g}" for name, weight in weights),
        "learning rate": f"{config.optim.learning_rate:g}, {config.optim.schedule}",
        "started from": config.train.init_from or published or "scratch",
        "python": environment.get("python", "not recorded"),
        "packages": ", ".join(f"{name} {v}" for name, v in packages.items()) or "not recorded",
    }
