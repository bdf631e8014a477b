"""Prepares a data set: `python -m data_pipelines.prepare shapes --data-dir DIR`.

Your own data come in through manifests (see `builders/manifest.py`):

    python -m data_pipelines.prepare manifest --name mine --split train=train.jsonl \\
        --split test=test.jsonl

Published data sets are read from a folder that you fill; the docstring of each builder says with
which files:

    python -m data_pipelines.prepare msrvtt_qa --manual-dir MSRVTT

Any data set is stored as it is, or encoded again so that sampling a few frames is cheap (one value
is enough; a clip keeps what the others would change):

    python -m data_pipelines.prepare msrvtt_qa --manual-dir MSRVTT --short-side 256 --fps 8 \\
        --key-frames 8

A data set lies once in a `--data-dir`, in one form, which is part of what is stored. Asking for
another form than the one that is there is an error; asking for none takes what is there.
"""

import argparse
import contextlib
import fcntl
import importlib
import pathlib
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence

from data_pipelines.config import DataConfig
from data_pipelines.reencode import Reencode
from data_pipelines.stored import read_form

# name -> "module:class"; imported only when wanted.
PUBLISHED = {
    "msrvtt_9k": "data_pipelines.builders.msrvtt:Msrvtt9k",
    "msrvtt_7k": "data_pipelines.builders.msrvtt:Msrvtt7k",
    "msrvtt_qa": "data_pipelines.builders.msrvtt:MsrvttQA",
    "msrvtt_mc": "data_pipelines.builders.msrvtt:MsrvttMC",
    "msvd": "data_pipelines.builders.msvd:Msvd",
    "msvd_qa": "data_pipelines.builders.msvd:MsvdQA",
    "tgif_action": "data_pipelines.builders.tgif:TgifAction",
    "tgif_transition": "data_pipelines.builders.tgif:TgifTransition",
    "tgif_frame": "data_pipelines.builders.tgif:TgifFrame",
    "didemo": "data_pipelines.builders.didemo:Didemo",
    "activitynet": "data_pipelines.builders.activitynet:ActivityNet",
    "activitynet_qa": "data_pipelines.builders.activitynet:ActivityNetQA",
    "ssv2_label": "data_pipelines.builders.ssv2:Ssv2Label",
    "ssv2_template": "data_pipelines.builders.ssv2:Ssv2Template",
    "lsmdc": "data_pipelines.builders.lsmdc:Lsmdc",
    "hvu": "data_pipelines.builders.hvu:Hvu",
    "webvid_2m": "data_pipelines.builders.web:WebVid2M",
    "webvid_10m": "data_pipelines.builders.web:WebVid10M",
    "cc3m": "data_pipelines.builders.web:CC3M",
    "cc12m": "data_pipelines.builders.web:CC12M",
    "sbu": "data_pipelines.builders.web:Sbu",
    "coco": "data_pipelines.builders.images:Coco",
    "visual_genome": "data_pipelines.builders.images:VisualGenome",
}
_NAMED = ("manifest", "json_layout")
# Which data sets take a flag.
_FLAGS_OF = {
    "name": _NAMED,
    "split": _NAMED,
    "paragraphs": ("json_layout",),
    "match_captions": ("json_layout",),
    "manual_dir": (*PUBLISHED, "json_layout"),
    "allow_other_counts": tuple(PUBLISHED),
    "beam_options": (*PUBLISHED, "json_layout"),
}
_FORM_FLAGS = ("short_side", "fps", "key_frames")
BUILDERS = {
    "shapes": "data_pipelines.builders.shapes:Shapes",
    "emojivid": "data_pipelines.builders.emojivid:EmojiVid",
    "easy_vqa": "data_pipelines.builders.easy_vqa:EasyVqa",
    "manifest": "data_pipelines.builders.manifest:Manifest",
    "json_layout": "data_pipelines.builders.json_layout:JsonLayout",
} | PUBLISHED


def prepare(
    name: str,
    /,
    data_dir: str | pathlib.Path = DataConfig.data_dir,
    *,
    max_bad_ratio: float = DataConfig.max_bad_ratio,
    reencode: Reencode | None = None,
    **options,
) -> pathlib.Path:
    """Builds a data set unless it is there already, and returns its folder.

    Several processes may call it at once: one builds, the others wait. What an interrupted run
    left behind is removed.

    Args:
      name: a key of `BUILDERS`.
      data_dir: where prepared data sets lie.
      max_bad_ratio: the largest share of unusable examples.
      reencode: how media are encoded again; None: they are not, or the form does not matter if
        the data set is there already.
      **options: further arguments of the builder.

    Raises:
      ValueError: an unknown name, too many unusable examples, or the data set is there already in
        another form than `reencode`.
    """
    if name not in BUILDERS:
        raise ValueError(
            f"unknown data set {name!r}; known: {', '.join(BUILDERS)}. Data sets without a builder "
            "come in through JSON-lines files: python -m data_pipelines.prepare manifest "
            f"--name {name} --split train=PATH"
        )
    module, _, class_name = BUILDERS[name].partition(":")
    builder_class = getattr(importlib.import_module(module), class_name)
    common = {"data_dir": data_dir, "max_bad_ratio": max_bad_ratio, "reencode": reencode}
    builder = builder_class(**common, **options)
    folder = pathlib.Path(builder.data_path)
    with _lock(folder.parent):
        if not folder.exists():
            for leftover in folder.parent.glob("incomplete.*"):
                shutil.rmtree(leftover)
            builder.download_and_prepare()
        elif reencode is not None:
            _check_form(name, folder, reencode)
    return folder


def _check_form(name: str, folder: pathlib.Path, wanted: Reencode) -> None:
    stored = read_form(folder)
    if stored != wanted:
        raise ValueError(
            f"{name}: {folder} holds media {_describe(stored)}, not {_describe(wanted)}; give "
            "another --data-dir, or remove that folder"
        )


def _describe(form: Reencode | None) -> str:
    return f"encoded again ({form})" if form else "as they were"


@contextlib.contextmanager
def _lock(folder: pathlib.Path) -> Iterator[None]:
    """One process at a time; the lock ends with the process that holds it, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def parse_args(arguments: Sequence[str] | None = None) -> tuple[str, dict]:
    """Command line -> the name of the builder and the keyword arguments of `prepare`."""
    parser = _make_parser()
    args = parser.parse_args(arguments)
    options = {"data_dir": args.data_dir, "max_bad_ratio": args.max_bad_ratio}
    for flag, datasets in _FLAGS_OF.items():
        given = getattr(args, flag)
        if args.dataset in datasets:
            options[flag] = given
        elif given:
            parser.error(f"--{flag.replace('_', '-')} does not belong to {args.dataset}")
    if args.dataset in _NAMED:
        pairs = [pair.partition("=") for pair in options.pop("split") or []]
        if not args.name or not pairs or not all(path for *_, path in pairs):
            parser.error(f"{args.dataset} needs --name NAME and --split SPLIT=PATH")
        options["splits"] = {split: path for split, _, path in pairs}
    form = {name: getattr(args, name) for name in _FORM_FLAGS}
    form = {name: value for name, value in form.items() if value is not None}
    if form:
        try:
            options["reencode"] = Reencode(**form)
        except ValueError as error:
            parser.error(str(error))
    return args.dataset, options


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.prepare", description="Prepares a data set for training."
    )
    parser.add_argument("dataset", help=f"one of: {', '.join(BUILDERS)}")
    parser.add_argument("--data-dir", default=DataConfig.data_dir, help="default: %(default)s")
    parser.add_argument(
        "--max-bad-ratio",
        type=float,
        default=DataConfig.max_bad_ratio,
        help="largest share of unusable examples that is skipped (default: %(default)s)",
    )
    parser.add_argument(
        "--manual-dir", help="published data sets: the folder with annotation files and media"
    )
    parser.add_argument(
        "--allow-other-counts",
        action="store_true",
        help="published data sets: accept splits of another size than the published one",
    )
    parser.add_argument(
        "--beam-options",
        type=shlex.split,
        metavar="OPTIONS",
        help="read media in an Apache Beam pipeline, as in --beam-options='--runner=FlinkRunner'",
    )
    parser.add_argument("--name", help="manifest, json_layout: what to call the data set")
    parser.add_argument(
        "--split",
        action="append",
        metavar="SPLIT=PATH",
        help="manifest, json_layout: an annotation file; once for each split",
    )
    parser.add_argument(
        "--paragraphs",
        action="store_true",
        help="json_layout: the captions of a clip are the sentences of one",
    )
    parser.add_argument(
        "--match-captions",
        action="store_true",
        help="json_layout: clips of equal caption are right answers to each other's",
    )
    _add_form_flags(parser)
    return parser


def _add_form_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "media encoded again", "none of these: media are stored as they are"
    )
    group.add_argument("--short-side", type=int, metavar="PIXELS", help="of clips and images, even")
    group.add_argument("--fps", type=float, help="frames per second of clips, at most")
    group.add_argument(
        "--key-frames",
        type=int,
        metavar="FRAMES",
        help=f"from one key frame of a clip to the next (default: {Reencode.key_frames})",
    )


def main() -> None:
    """Runs the command line; a problem with the data ends it with one line on stderr."""
    name, options = parse_args()
    try:
        folder = prepare(name, **options)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    print(f"{name}: media {_describe(read_form(folder))}", file=sys.stderr)
    print(folder)


if __name__ == "__main__":
    main()
