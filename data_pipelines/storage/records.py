"""Stored records: one clip or image with all that is said about it, as a `tf.train.Example`.

TFDS reads them, and so does anything that knows that format. Its own conversion of each field takes
longer than reading a small image, so records are packed and unpacked here.
"""

import json
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

from data_pipelines.schema.checks import UserError
from data_pipelines.schema.records import Example, Question

DAMAGED = b"damaged"  # media type of a record that cannot be read; its media say why
_TEXTS = ("media_type", "match_id", "source")
_LISTS = ("captions", "labels")
_QUESTION = ("question", "answer", "kind", "options")


def features() -> tfds.features.FeaturesDict:
    """Describe a record to TFDS."""
    text = tfds.features.Text
    return tfds.features.FeaturesDict(
        {
            # Encoded bytes: the Video feature of TFDS would need TensorFlow.
            "media": tfds.features.Tensor(shape=(), dtype=np.object_),
            **{name: text() for name in _TEXTS},
            **{name: tfds.features.Sequence(text()) for name in _LISTS},
            # Options as a JSON list: a sequence in a sequence would need TensorFlow.
            "questions": tfds.features.Sequence({name: text() for name in _QUESTION}),
        }
    )


def pack(example: Example) -> bytes:
    """Serialize an example; the same one always gives the same bytes."""
    values = {"media": [example.media]}
    values |= {name: [getattr(example, name).encode()] for name in _TEXTS}
    values |= {name: [text.encode() for text in getattr(example, name) or ()] for name in _LISTS}
    for name in _QUESTION:
        values[f"questions/{name}"] = [_text(item, name).encode() for item in example.questions]
    feature = {
        name: tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=value))
        for name, value in values.items()
    }
    record = tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=feature))
    # Maps have no order in protobuf; digests of shards need one.
    return record.SerializeToString(deterministic=True)


def _text(question: Question, name: str) -> str:
    value = getattr(question, name)
    return json.dumps(value) if name == "options" else value


def unpack(record: bytes) -> dict:
    """Parse a record: bytes, lists of bytes, and `questions`, a dict of lists.

    Data sets prepared before questions had options are read as well: theirs are empty lists.
    """
    feature = tf_example_pb2.Example.FromString(record).features.feature
    fields = {name: feature[name].bytes_list.value[0] for name in ("media", *_TEXTS)}
    fields |= {name: list(feature[name].bytes_list.value) for name in _LISTS}
    fields["questions"] = questions = {
        name: list(feature[f"questions/{name}"].bytes_list.value) for name in _QUESTION
    }
    if not questions["options"]:
        questions["options"] = [b"[]"] * len(questions["question"])
    return fields


def damaged_record(source: str, reason: str) -> dict:
    """Stand in for a record that cannot be read: a clip that cannot be decoded, without texts."""
    fields: dict = {"media": reason.encode(), "media_type": DAMAGED, "source": source.encode()}
    fields |= {"match_id": source.encode(), **{name: [] for name in _LISTS}}
    return fields | {"questions": {name: [] for name in _QUESTION}}


def questions_of(record: dict) -> list[Question]:
    """Return the questions of a record."""
    rows = zip(*(record["questions"][name] for name in _QUESTION), strict=True)
    return [
        Question(question.decode(), answer.decode(), kind.decode(), tuple(json.loads(options)))
        for question, answer, kind, options in rows
    ]


class RecordTexts(NamedTuple):
    """A record without its media."""

    match_id: str
    source: str
    captions: tuple[str, ...]
    questions: tuple[Question, ...]
    labels: tuple[str, ...]


def texts_of(record: dict) -> RecordTexts:
    """Return the texts of a record.

    Raises:
      UserError: the record is damaged; names it.
    """
    if record["media_type"] == DAMAGED:
        raise UserError(f"{record['source'].decode()}: {record['media'].decode()}")
    return RecordTexts(
        record["match_id"].decode(),
        record["source"].decode(),
        tuple(text.decode() for text in record["captions"]),
        tuple(questions_of(record)),
        tuple(text.decode() for text in record["labels"]),
    )
