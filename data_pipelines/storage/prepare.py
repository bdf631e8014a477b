r"""Prepare a data set: `vlmae prepare shapes --data-dir DIR`.

Your own data come in through manifests (tables or JSON, see `builders/manifest.py`), or as a folder
of clips with texts beside them or sorted into classes (`builders/folder.py`):

    vlmae prepare manifest --name mine --split train=train.csv --split test=test.csv
    vlmae prepare folder --name mine --split train=clips

Annotation files of other public code bases, in any usual form, and media in tar shards or Parquet:

    vlmae prepare annotations --name msrvtt_qa --split train=train.jsonl \
        --split test=test.jsonl --media MSRVTT/videos
    vlmae prepare webdataset --name cc12m --split 'train=cc12m/{00000..01242}.tar'

A folder in place of a name says what lies there and how to prepare it: `vlmae prepare DIR`.

Published data sets are read from a folder that you fill; the docstring of each builder says with
which files:

    vlmae prepare msrvtt_qa --manual-dir MSRVTT

Any data set is stored as it is, or encoded again so that sampling a few frames is cheap (one value
is enough; a clip keeps what the others would change), as H.264 or as JPEG pictures:

    vlmae prepare msrvtt_qa --manual-dir MSRVTT --short-side 256 --fps 8 \
        --key-frames 8
    vlmae prepare msrvtt_qa --manual-dir MSRVTT --store frames --short-side 224 --fps 4

A data set lies once in a `--data-dir`, in one form, which is part of what is stored. Asking for
another form than the one that is there, or for other inputs, is an error; asking for none takes
what is there.

However a preparation ends before its time, the same command goes on with the shards that are
there. `--workers 8` reads media in eight processes. Machines that share a file system divide the
shards, as a job array does, and the command without `--shards` then finishes:

    vlmae prepare webvid_2m --manual-dir WEBVID --workers 16 --shards $SLURM_ARRAY_TASK_ID/20
    vlmae prepare webvid_2m --manual-dir WEBVID

Further clips are added to a data set as a part of their own; the records that are there stay:

    vlmae prepare manifest --name mine --split train=more.jsonl --add

After an edit of what they were made from, `--overwrite` prepares them again, as a new version.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from data_pipelines.media.reencode import Reencode
from data_pipelines.schema.checks import UserError, check, visible
from data_pipelines.schema.config import DataConfig
from data_pipelines.storage.build import build
from data_pipelines.storage.builders.recognize import describe_folder
from data_pipelines.storage.builders.registry import BUILDERS, PUBLISHED, builder_class
from data_pipelines.storage.plan import check_same_set
from data_pipelines.storage.stored import read_form

_NAMED = ("manifest", "folder", "annotations", "webdataset", "parquet")
_OF_NAMED = ", ".join(_NAMED)
# Which data sets take a flag.
_FLAGS_OF = {
    "name": _NAMED,
    "split": _NAMED,
    "list": ("annotations",),
    "field": ("manifest", "annotations", "webdataset", "parquet"),
    "paragraphs": ("annotations",),
    "match_captions": ("annotations",),
    "manual_dir": (*PUBLISHED, "manifest", "annotations"),
    "allow_other_counts": tuple(PUBLISHED),
}
_PAIRS = {"split": "splits", "list": "lists", "field": "fields"}  # flag -> argument
_WORK_FLAGS = ("workers", "num_shards", "part", "add", "overwrite")
_FORM_FLAGS = ("short_side", "fps", "key_frames", "store", "quality")


def prepare(
    name: str,
    /,
    data_dir: str | pathlib.Path = DataConfig.data_dir,
    *,
    max_bad_ratio: float = DataConfig.max_bad_ratio,
    reencode: Reencode | None = None,
    workers: int = 1,
    num_shards: int | None = None,
    part: tuple[int, int] | None = None,
    add: bool = False,
    overwrite: bool = False,
    **options,
) -> pathlib.Path:
    """Build a data set unless it is there already, and return its folder.

    Args:
      name: a key of `BUILDERS`.
      data_dir: the folder of prepared data sets.
      max_bad_ratio: the largest share of unusable examples.
      reencode: how media are encoded again; None: they are not, or the form does not matter if
        the data set is there already.
      workers: see `build`.
      num_shards: see `build`.
      part: see `build`.
      add: see `build`.
      overwrite: see `build`.
      **options: further arguments of the builder.

    Raises:
      UserError: an unknown name, too many unusable examples, or the data set is there already,
        from other inputs than `options` or in another form than `reencode`.
    """
    if name not in BUILDERS:
        raise UserError(
            f"unknown data set {name!r}; known: {', '.join(BUILDERS)}. Data sets without a builder "
            "come in through tables, JSON or folders: vlmae prepare manifest "
            f"--name {name} --split train=PATH"
        )
    common = {"data_dir": data_dir, "max_bad_ratio": max_bad_ratio, "reencode": reencode}
    builder = builder_class(name)(**common, **options)
    check(not (add and overwrite), "--add keeps what is there: not with --overwrite")
    work = {"workers": workers, "num_shards": num_shards, "part": part}
    folder = build(builder, **work, add=add, overwrite=overwrite)
    # Asked for no inputs: whatever is there will do.
    if any(options.values()) and part is None and not add:
        check_same_set(builder, folder)
    # Asked for no form: whatever is there will do.
    if reencode is not None and part is None:
        _check_form(name, folder, reencode)
    return folder


def _check_form(name: str, folder: pathlib.Path, wanted: Reencode) -> None:
    stored = read_form(folder)
    if stored != wanted:
        raise UserError(
            f"{name}: {folder} holds media {_describe(stored)}, not {_describe(wanted)}; give "
            "another --data-dir, or remove that folder"
        )


def _describe(form: Reencode | None) -> str:
    return f"encoded again ({form})" if form else "as they were"


def parse_args(arguments: Sequence[str] | None = None) -> tuple[str, dict]:
    """Parse the command line: the name of the builder and the keyword arguments of `prepare`."""
    parser = _make_parser()
    args = parser.parse_args(arguments)
    given = {name: getattr(args, name) for name in _WORK_FLAGS}
    options = {"data_dir": args.data_dir, "max_bad_ratio": args.max_bad_ratio}
    options |= {name: value for name, value in given.items() if value}
    # Refused, not ignored: a flag that does nothing hides a misunderstanding.
    for flag, datasets in _FLAGS_OF.items():
        given = getattr(args, flag)
        if args.dataset in datasets:
            options[flag] = given
        elif given:
            parser.error(f"--{flag.replace('_', '-')} does not belong to {args.dataset}")
    for flag, name in _PAIRS.items():
        if flag in options:
            options[name] = _read_pairs(parser, flag, options.pop(flag) or [])
    if args.dataset in _NAMED and not (args.name and options["splits"]):
        parser.error(f"{args.dataset} needs --name NAME and --split SPLIT=PATH")
    form = {name: getattr(args, name) for name in _FORM_FLAGS}
    form = {name: value for name, value in form.items() if value is not None}
    for flag, store in (("key_frames", "video"), ("quality", "frames")):
        if flag in form and form.get("store", "video") != store:
            parser.error(f"--{flag.replace('_', '-')} belongs to --store {store}")
    if form:
        try:
            options["reencode"] = Reencode(**form)
        except UserError as error:
            parser.error(str(error))
    return args.dataset, options


def _read_pairs(parser: argparse.ArgumentParser, flag: str, words: Sequence[str]) -> dict:
    """Read `KEY=VALUE` words of a flag, each key once."""
    pairs = [word.partition("=") for word in words]
    keys = [key for key, *_ in pairs]
    if not all(key and value for key, _, value in pairs) or len(set(keys)) < len(keys):
        parser.error(f"--{flag} takes NAME=VALUE, each name once")
    return {key: value for key, _, value in pairs}


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vlmae prepare", description="Prepares a data set for training."
    )
    parser.add_argument(
        "dataset", help=f"a folder, to see what lies there; or one of: {', '.join(BUILDERS)}"
    )
    parser.add_argument("--data-dir", default=DataConfig.data_dir, help="default: %(default)s")
    parser.add_argument(
        "--max-bad-ratio",
        type=float,
        default=DataConfig.max_bad_ratio,
        help="largest share of unusable examples that is skipped (default: %(default)s)",
    )
    parser.add_argument(
        "--manual-dir",
        "--media",
        help="published data sets: the folder with annotation files and media; manifest, "
        "annotations: the folder of the media",
    )
    parser.add_argument(
        "--allow-other-counts",
        action="store_true",
        help="published data sets: accept splits of another size than the published one",
    )
    parser.add_argument("--name", help=f"{_OF_NAMED}: what to call the data set")
    parser.add_argument(
        "--split",
        action="append",
        metavar="SPLIT=PATH",
        help=f"{_OF_NAMED}: a file, a folder, or several such as 'a/{{00..99}}.tar'; once for each "
        "split",
    )
    parser.add_argument(
        "--list",
        action="append",
        metavar="SPLIT=PATH",
        help="annotations: a list of the clips of a split, where the annotation file holds others",
    )
    parser.add_argument(
        "--field",
        action="append",
        metavar="ROLE=NAME",
        help="manifest, annotations, webdataset, parquet: the field or column of the media, "
        "caption, question, answer, options or kind, where it has an unusual name",
    )
    parser.add_argument(
        "--paragraphs",
        action="store_true",
        help="annotations: the captions of a clip are the sentences of one",
    )
    parser.add_argument(
        "--match-captions",
        action="store_true",
        help="annotations: clips of equal caption are right answers to each other's",
    )
    _add_work_flags(parser)
    _add_form_flags(parser)
    return parser


def _add_work_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("work", "none of these changes the stored records")
    group.add_argument(
        "--workers",
        type=_positive,
        metavar="N",
        help="processes that read and check media (default: 1)",
    )
    group.add_argument(
        "--num-shards",
        type=_positive,
        metavar="N",
        help="files of each split (default: of at most 5,000 records and 256 MiB)",
    )
    group.add_argument(
        "--shards",
        dest="part",
        type=_part,
        metavar="I/N",
        help="write the I-th of N shares of the shards (from 0), for a job array; the command "
        "without this flag finishes",
    )
    group.add_argument(
        "--add", action="store_true", help="add the clips to the data set of that name"
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="prepare the data set again, say after an edit, as a new version; the old one stays",
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a number from 1 on, not {text!r}")
    return int(text)


def _part(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 0 to N - 1, not {text!r}")
    return int(index), int(count)


def _add_form_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "media encoded again", "none of these: media are stored as they are"
    )
    group.add_argument(
        "--store",
        choices=("video", "frames"),
        help="clips as H.264, or as JPEG pictures with their times, which are larger and several "
        "times faster to sample (default: video)",
    )
    group.add_argument(
        "--quality",
        type=int,
        help=f"of the JPEG pictures, 1 to 100 (default: {Reencode.quality})",
    )
    group.add_argument("--short-side", type=int, metavar="PIXELS", help="of clips and images, even")
    group.add_argument("--fps", type=float, help="frames per second of clips, at most")
    group.add_argument(
        "--key-frames",
        type=int,
        metavar="FRAMES",
        help=f"from one key frame of a clip to the next (default: {Reencode.key_frames})",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a problem with the data ends it with one line on stderr."""
    name, options = parse_args(arguments)
    try:
        if name not in BUILDERS and pathlib.Path(name).is_dir():
            print(visible(describe_folder(pathlib.Path(name))))
            return
        folder = prepare(name, **options)
    except UserError as error:
        sys.exit(f"error: {error}")
    if "part" not in options:
        print(f"{name}: media {_describe(read_form(folder))}", file=sys.stderr)
    print(folder)


if __name__ == "__main__":
    main()
