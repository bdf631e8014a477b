"""How long the texts of training are, for a config that leaves their length to the data."""

import itertools
from collections.abc import Iterator

from data_pipelines.schema.config import DataConfig
from data_pipelines.storage.records import RecordTexts
from data_pipelines.storage.stored import read_texts
from data_pipelines.text.tokenize import Tokenizer

_AT_ONCE = 65_536  # records


def longest_text(config: DataConfig, tokenizer: Tokenizer) -> int:
    """Count the tokens of the longest text that training reads, with [CLS] and [SEP].

    Raises: as `open_source`.
    """
    longest = 2
    for source in config.train:
        records = iter(read_texts(source, config.data_dir))
        while some := [*itertools.islice(records, _AT_ONCE)]:
            texts = [text for item in some for text in _texts_of(item, config.task)]
            longest = max(longest, tokenizer.longest([*texts, ""]))
    return longest


def _texts_of(item: RecordTexts, task: str) -> Iterator[str]:
    if task in ("captions", "labels"):
        yield from item.captions
    for question in item.questions if task in ("questions", "options") else ():
        yield question.question
        if task == "options":
            yield from map(question.text_of, question.options)
