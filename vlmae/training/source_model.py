"""What the shapes of initial parameters do not show: the rest of their model's config (ours)."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_pipelines.schema.checks import UserError, check
from data_pipelines.text.tokenize import load_tokenizer
from vlmae.config.experiment import ExperimentConfig
from vlmae.config.model import TextLayout, VitLayout
from vlmae.config.tree import flatten, override
from vlmae.parallel.processes import print_on_main_process
from vlmae.runs.load import load_run, tokenizer_of
from vlmae.weights.huggingface import open_published

LAYOUTS = {"video": VitLayout, "text": TextLayout}
TOKENIZER = "data.tokenizer"
# Fields that change what a model computes but no shape of a parameter. The layout is taken over,
# since nobody trains with another one on purpose; these are refused. Ratios of masks, keep rates,
# dropout and targets are chosen anew by each stage of training.
UNSEEN = (
    "model.video.num_heads",
    "model.video.positions",
    "model.video.adapter.num_heads",
    "model.text.num_heads",
    "model.text.pooling",
    "model.text.adapter.num_heads",
    "model.selector.num_heads",
    "model.fusion.sampler.guidance",
    "model.pixel_decoder.num_heads",
)


def with_source_model(config: ExperimentConfig) -> ExperimentConfig:
    """Take over the layout of the model whose parameters `train.init_from` or `train.init` names.

    Fields in `train.init_differs` stay as they are. A source that does not exist is left for the
    code that reads its parameters.

    Raises:
      UserError: another field of UNSEEN or the words differ; names each with both values.
    """
    train = config.train
    layouts = [
        f"model.{part}.layout.{name}" for part, kind in LAYOUTS.items() for name in asdict(kind())
    ]
    known = (*layouts, *UNSEEN, TOKENIZER)
    for name in train.init_differs:
        check(name in known, f"--train.init-differs={name} is none of {', '.join(known)}")
    if train.init_from:
        source = Path(train.init_from).expanduser()
        if not source.is_dir():
            return config
        theirs = load_run(source)
        _check_unseen(config, theirs, source)
        layouts = {part: getattr(theirs.model, part).layout for part in LAYOUTS}
        return _with_layouts(config, layouts, {part: train.init_from for part in LAYOUTS})
    names = {part: name for part, name in asdict(train.init).items() if name}
    opened = {part: open_published(name, part) for part, name in names.items()}
    layouts = {part: x.fields["layout"] for part, x in opened.items() if x.family.part == part}
    return _with_layouts(config, layouts, names)


def _check_unseen(config: ExperimentConfig, theirs: ExperimentConfig, source: Path) -> None:
    ours, given = flatten(config), flatten(theirs)
    wrong = {
        name: (ours[name], given[name])
        for name in UNSEEN
        if ours[name] != given[name] and name not in config.train.init_differs
    }
    words = tokenizer_of(source)
    if config.data.tokenizer and TOKENIZER not in config.train.init_differs and words.is_dir():
        own = load_tokenizer(Path(config.data.tokenizer).expanduser())
        if own.digest() != load_tokenizer(words).digest():
            wrong[TOKENIZER] = (config.data.tokenizer, words)
    if wrong:
        raise UserError(_refusal(wrong, source))


def _refusal(wrong: Mapping[str, tuple[Any, Any]], source: Path) -> str:
    lines = [f"  {name} is {own}, there {there}" for name, (own, there) in wrong.items()]
    return (
        f"the parameters of {source} belong to another model, which no shape shows:\n"
        + "\n".join(lines)
        + f"\nset them as there, or --train.init-differs {' '.join(wrong)} if that is meant"
    )


def _with_layouts(
    config: ExperimentConfig,
    layouts: Mapping[str, VitLayout | TextLayout],
    sources: Mapping[str, str],
) -> ExperimentConfig:
    """Replace the fields of each part's layout that are not meant to differ, and say so."""
    changes = {}
    for part, layout in layouts.items():
        own = asdict(getattr(config.model, part).layout)
        for field, value in asdict(layout).items():
            name = f"model.{part}.layout.{field}"
            if value != own[field] and name not in config.train.init_differs:
                changes[name] = value
                print_on_main_process(f"{name} is {value}, as in {sources[part]}")
    return override(config, changes)
