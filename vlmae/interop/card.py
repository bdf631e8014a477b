"""The model card of an export: what the model is, what it was trained on, how good it is."""

import json
from pathlib import Path

import jax
from jaxtyping import PyTree

from vlmae.config import ExperimentConfig
from vlmae.interop.stock import Stock
from vlmae.result import read_result
from vlmae.workdir import ENVIRONMENT

HEADER = """---
library_name: transformers
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
LICENSE = """The code of vlmae, which any Python files here are part of, is under Apache-2.0.
What may be done with the weights depends on the data they were trained on: it is for those who
publish them to say.
"""


def model_card(
    workdir: Path, config: ExperimentConfig, params: PyTree, step: int, stock: Stock | None = None
) -> str:
    """The text of a `README.md`.

    Args:
      workdir: the run, whose result and environment are told.
      config: of the run.
      params: the parameters that are exported.
      step: of the checkpoint.
      stock: the encoder, where it alone is exported.
    """
    whole = "video-language model"
    what = f"The {stock.part} encoder of a {whole}" if stock else f"A {whole}"
    sections = {
        "Use": _use(config, params, stock),
        "Model": _table(_model_rows(config, params)),
        "Data": _table(_data_rows(config)),
        "Metrics": _metrics(workdir, step),
        "Provenance": _table(_provenance_rows(workdir, config, step)),
        "License": LICENSE,
    }
    body = "\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    return f"{HEADER}{ABOUT.format(name=config.name, what=what)}\n{body}"


def _use(config: ExperimentConfig, params: PyTree, stock: Stock | None) -> str:
    if stock is None:
        return USE_MODEL.format(
            calls="\n".join(f"- {call}" for part, call in CALLS.items() if part in params),
            frames=config.data.eval.num_frames,
            size=config.data.image_size,
            words=config.data.text_len,
        )
    pooled = stock.model_class in ("BertModel", "ViTModel", "DeiTModel")  # has one beside
    options = ", add_pooling_layer=False" if pooled else ""
    return USE_STOCK.format(model_class=stock.model_class, part=stock.part, options=options)


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
