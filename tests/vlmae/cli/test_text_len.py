"""Texts whose length the config leaves to the data."""

import string

from vlmae.cli.run_experiment import resolve
from vlmae.config.tree import override


def test_texts_are_measured_by_the_tokenizer_in_use(tiny_config, tmp_path):
    config = override(tiny_config, {"data.text_len": 0, "model.text.max_len": 128})
    known = resolve(config)[0].data.text_len
    # Of another run, whose vocabulary has none of these words: a piece for each letter.
    letters = [*string.ascii_lowercase, ",", ":"]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{x}" for x in letters)]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n")
    letter_by_letter = override(config, {"data.tokenizer": str(tmp_path / "vocab.txt")})
    spelled = resolve(letter_by_letter)[0].data.text_len
    assert known % 8 == spelled % 8 == 0 and known < 24 < spelled < 100
    short = override(letter_by_letter, {"model.text.max_len": 20})
    assert resolve(short)[0].data.text_len == 20
