"""The base of all builders: checks every example, stores it with TFDS, trains a vocabulary.

A builder turns one data set into `Example`s; everything that must hold for all data sets is
here. It works without TensorFlow, because records are stored in the ArrayRecord format and
media stay encoded bytes.
"""

import abc
import collections
import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import tensorflow_datasets as tfds

from data_pipelines import decode, tokenize
from data_pipelines.records import Example
from data_pipelines.reencode import Reencode, reencode
from data_pipelines.stored import REENCODE_KEY

VOCABULARY_SIZE = 8192
SKIPPED_FILE = "skipped.jsonl"
_SHOWN_SOURCES = 3


@dataclasses.dataclass(frozen=True)
class Skipped:
    """An example that could not be used, or a part of one: where it came from and why.

    A builder yields one in place of an `Example` that it cannot make (say, a missing file), or
    with `whole` False beside an example, for a text of it that is left out (say, an empty
    caption). `reason` is one of few short phrases, which are counted; `detail` is free text.
    """

    source: str
    reason: str
    detail: str = ""
    split: str = ""
    whole: bool = True  # only whole examples count against max_bad_ratio


class VideoTextBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A TFDS builder whose subclasses implement only `examples` (ours).

    Prepared folders hold, beside the records, `vocab.txt` (a WordPiece vocabulary trained on the
    texts of `vocabulary_splits`, or of all splits where none of these exists) and
    `skipped.jsonl` (one line for each example left out). The metadata of TFDS hold under
    `reencode` how media were encoded again, if they were.
    """

    VERSION = tfds.core.Version("1.0.0")
    vocabulary_splits: tuple[str, ...] = ("train",)

    def __init_subclass__(cls, skip_registration: bool = True, **kwargs):
        super().__init_subclass__(skip_registration=skip_registration, **kwargs)

    def __init__(
        self,
        *,
        data_dir: str | pathlib.Path,
        max_bad_ratio: float = 0.01,
        reencode: Reencode | None = None,
        **kwargs,
    ):
        """Args:
        data_dir: where prepared data sets lie.
        max_bad_ratio: the largest share of examples that may be skipped.
        reencode: encode media again so; by default they are stored as they are.
        **kwargs: those of TFDS.
        """
        data_dir = pathlib.Path(data_dir).expanduser()
        self.reencode = reencode
        super().__init__(data_dir=data_dir, file_format="array_record", **kwargs)
        self.max_bad_ratio = max_bad_ratio
        self._audit = _Audit()

    @abc.abstractmethod
    def examples(self) -> Mapping[str, Iterable[Example | Skipped]]:
        """Split name -> its examples, produced lazily and in a fixed order."""

    def _info(self) -> tfds.core.DatasetInfo:
        form = {REENCODE_KEY: dataclasses.asdict(self.reencode)} if self.reencode else {}
        metadata = tfds.core.MetadataDict(form)
        return tfds.core.DatasetInfo(builder=self, features=_features(), metadata=metadata)

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        del dl_manager
        splits = self.examples()
        self._choose_vocabulary_splits(splits)
        return {name: self._generate_examples(name, split) for name, split in splits.items()}

    def _generate_examples(self, split: str, examples: Iterable[Example | Skipped]) -> Iterator:
        """Yields (key, features) of the good examples and notes the bad ones."""
        num_stored = 0
        for item in examples:
            item = stored_form(item, self.reencode)
            if isinstance(item, Skipped):
                self._note_skipped(item, split)
                continue
            self._note_texts(item, split)
            yield f"{num_stored:09d}", to_features(item)
            num_stored += 1
        self._audit.num_stored[split] = num_stored
        if num_stored == 0:
            self._refuse_empty(split)

    def _choose_vocabulary_splits(self, splits: Iterable[str]) -> None:
        self._audit.vocabulary_splits = set(self.vocabulary_splits) & set(splits) or set(splits)

    def _note_skipped(self, item: Skipped, split: str) -> None:
        self._audit.skipped.append(dataclasses.replace(item, split=split))

    def _note_texts(self, item: Example, split: str) -> None:
        if split in self._audit.vocabulary_splits:
            self._audit.texts.update(dict.fromkeys(_texts(item)))

    def _refuse_empty(self, split: str) -> None:
        raise ValueError(f"{self.name}: split {split!r} has no usable example{self._why()}")

    def _after_generation(self) -> None:
        """For builders whose examples are not made in this process: completes the audit."""

    def _download_and_prepare(self, dl_manager, download_config) -> None:
        # TFDS calls this with `data_path` set to a temporary folder, which it renames only when
        # this returns: whatever raises here leaves nothing behind that counts as prepared.
        self._audit = _Audit()
        tfds.display_progress_bar(sys.stderr.isatty())
        super()._download_and_prepare(dl_manager, download_config)
        self._after_generation()
        self._check_bad_ratio()
        vocabulary = tokenize.train_vocabulary(list(self._audit.texts), VOCABULARY_SIZE)
        folder = pathlib.Path(self.data_path)
        (folder / tokenize.VOCABULARY_FILE).write_text("\n".join(vocabulary) + "\n", "utf-8")
        lines = [json.dumps(dataclasses.asdict(item)) + "\n" for item in self._audit.skipped]
        (folder / SKIPPED_FILE).write_text("".join(lines), "utf-8")

    def _check_bad_ratio(self) -> None:
        """Reports skipped examples on stderr; raises ValueError if they are too many."""
        self._report_parts()
        num_bad = len(self._audit.skipped_examples())
        total = num_bad + sum(self._audit.num_stored.values())
        message = f"{self.name}: {num_bad} of {total} examples cannot be used{self._why()}"
        if num_bad > self.max_bad_ratio * total:
            raise ValueError(f"{message}; more than max_bad_ratio = {self.max_bad_ratio} allows")
        if num_bad:
            print(f"{message}; skipped, see {SKIPPED_FILE}", file=sys.stderr)

    def _report_parts(self) -> None:
        """Says on stderr how many texts were left out of examples that are stored."""
        parts = [item for item in self._audit.skipped if not item.whole]
        for reason, count in collections.Counter(item.reason for item in parts).most_common():
            print(f"{self.name}: left out {count} {reason}, see {SKIPPED_FILE}", file=sys.stderr)

    def _why(self) -> str:
        """The reasons with their counts and the first few sources, for a one-line message."""
        skipped = self._audit.skipped_examples()
        if not skipped:
            return ""
        counts = collections.Counter(item.reason for item in skipped)
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
        first = ", ".join(item.source for item in skipped[:_SHOWN_SOURCES])
        return f" ({reasons}; first: {first})"

    def _log_download_bytes(self) -> None:
        print(f"{self.name}: preparing {self.data_dir}", file=sys.stderr)

    def _log_download_done(self) -> None:
        counts = ", ".join(f"{name} {count}" for name, count in self._audit.num_stored.items())
        print(f"{self.name}: stored {counts}", file=sys.stderr)


@dataclasses.dataclass
class _Audit:
    """What one preparation has seen so far."""

    skipped: list[Skipped] = dataclasses.field(default_factory=list)
    num_stored: dict[str, int] = dataclasses.field(default_factory=dict)
    vocabulary_splits: set[str] = dataclasses.field(default_factory=set)
    texts: dict[str, None] = dataclasses.field(default_factory=dict)  # an ordered set

    def skipped_examples(self) -> list[Skipped]:
        return [item for item in self.skipped if item.whole]


def _features() -> tfds.features.FeaturesDict:
    text = tfds.features.Text
    return tfds.features.FeaturesDict(
        {
            # Encoded bytes: the Video feature of TFDS would need TensorFlow.
            "media": tfds.features.Tensor(shape=(), dtype=np.object_),
            "media_type": text(),
            "match_id": text(),
            "source": text(),
            "captions": tfds.features.Sequence(text()),
            "labels": tfds.features.Sequence(text()),
            # Options as a JSON list: a sequence in a sequence would need TensorFlow.
            "questions": tfds.features.Sequence(
                {"question": text(), "answer": text(), "kind": text(), "options": text()}
            ),
        }
    )


def check(item: Example | Skipped) -> Example | Skipped:
    """The example itself if it can be used, else why it cannot."""
    if isinstance(item, Skipped):
        return item
    if not (item.captions or item.questions or item.labels):
        return Skipped(item.source, "without a caption")
    if any(not caption.strip() for caption in item.captions):
        return Skipped(item.source, "with an empty caption")
    try:
        decode.check_media(item.media, item.media_type)
    except decode.DecodeError as error:
        return Skipped(item.source, error.reason, error.detail)
    return item


def stored_form(item: Example | Skipped, setting: Reencode | None) -> Example | Skipped:
    """The example as it is stored, its media encoded again if so wished, or why it cannot be."""
    item = check(item)
    if isinstance(item, Skipped):
        return item
    try:
        return dataclasses.replace(item, media=reencode(item.media, item.media_type, setting))
    except decode.DecodeError as error:
        return Skipped(item.source, error.reason, error.detail)


def to_features(example: Example) -> dict:
    """One example as the nested dict that `_features` describes."""
    features = {key.name: getattr(example, key.name) for key in dataclasses.fields(example)}
    features["captions"] = list(example.captions)
    features["labels"] = list(example.labels)
    features["questions"] = [
        dataclasses.asdict(question) | {"options": json.dumps(question.options)}
        for question in example.questions
    ]
    return features


def _texts(example: Example) -> list[str]:
    """Everything in an example that a tokenizer will have to read."""
    parts = [(item.question, item.answer, *item.options) for item in example.questions]
    return [*example.captions, *(text for part in parts for text in part)]
