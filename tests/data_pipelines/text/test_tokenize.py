import subprocess
import sys

import numpy as np
import pytest

from data_pipelines.text.tokenize import (
    SPECIAL_TOKENS,
    Tokenizer,
    load_tokenizer,
    train_vocabulary,
)

TEXTS = [
    "A small red square moves left, then up",
    "Nature's naïve café — déjà-vu!",
    "日本語 text, emoji \U0001f600 and\ttabs\u00a0and\u200bzero width",
    "unbelievableness of un##able [words] (don't)",
    "mask here: [mask] and [words].",
    "x" * 150,
    "",
    "  ",
]
WORDS = [
    *SPECIAL_TOKENS,
    *"a small red square moves left , then up text and tabs of don mask here : . ! ( ) [ ]".split(),
    *"nature ' s naive cafe deja - vu — un ##bel ##ie ##va ##ble ##ness ##able words # b t".split(),
    *"日 本 語 width zero ##zero able".split(),
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_vocabulary(WORDS)


def test_equals_transformers(tokenizer, tmp_path):
    from transformers import BertTokenizer

    tokenizer.save(tmp_path)
    reference = BertTokenizer(vocab=str(tmp_path / "vocab.txt"))
    for text in TEXTS:
        expected = reference(text)["input_ids"]
        ids, mask = tokenizer.encode([text], 64)
        assert ids[0][mask[0]].tolist() == expected, text


def test_rows_have_fixed_length_and_end_in_sep(tokenizer):
    ids, mask = tokenizer.encode(TEXTS, 6)
    assert ids.dtype == np.int32 and mask.dtype == bool and ids.shape == mask.shape == (8, 6)
    lengths = mask.sum(axis=1)
    assert (mask == (np.arange(6) < lengths[:, None])).all()
    assert (ids[:, 0] == tokenizer.cls_id).all()
    assert (ids[np.arange(8), lengths - 1] == tokenizer.sep_id).all()
    assert (ids[~mask] == tokenizer.pad_id).all()
    assert lengths[0] == 6 and lengths[6] == 2  # one that is cut, an empty one


def test_decode_joins_pieces(tokenizer):
    ids, _ = tokenizer.encode(["A small unbelievable square"], 16)
    assert tokenizer.decode(ids[0]) == "a small unbelievable square"


@pytest.mark.parametrize("file", ["", "vocab.txt", "tokenizer.json"])
def test_saved_tokenizers_load(tokenizer, tmp_path, file):
    tokenizer.save(tmp_path / "folder")
    loaded = load_tokenizer(tmp_path / "folder" / file)
    assert loaded.vocab_size == tokenizer.vocab_size == len(WORDS)
    assert loaded.words() == WORDS
    for got, expected in zip(loaded.encode(TEXTS, 20), tokenizer.encode(TEXTS, 20), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_cutting_stored_in_a_file_does_not_count(tmp_path):
    import tokenizers

    Tokenizer.from_vocabulary(WORDS).save(tmp_path)
    file = str(tmp_path / "tokenizer.json")
    backend = tokenizers.Tokenizer.from_file(file)
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    backend.save(file)
    _, mask = load_tokenizer(file).encode(TEXTS[:1], 20)
    assert mask.sum() == 11  # nine words and comma, [CLS], [SEP]


def test_missing_special_tokens_are_named(tmp_path):
    file = tmp_path / "vocab.txt"
    file.write_text("[PAD]\n[UNK]\n[CLS]\nword\n")
    with pytest.raises(ValueError, match=r"vocab.txt: the special tokens \[SEP\] \[MASK\] are"):
        load_tokenizer(file)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.txt: no such tokenizer file"):
        load_tokenizer(tmp_path / "none.txt")
    with pytest.raises(FileNotFoundError, match=r"holds neither tokenizer.json nor vocab.txt"):
        load_tokenizer(tmp_path)


def test_trained_vocabulary_covers_its_texts():
    words = train_vocabulary(TEXTS[:1] * 3, 100)
    assert tuple(words[:5]) == SPECIAL_TOKENS and len(words) == len(set(words)) <= 100
    assert {"square", "moves", "left", ","} <= set(words)
    ids, _ = Tokenizer.from_vocabulary(words).encode([TEXTS[0]], 16)
    assert words.index("[UNK]") not in ids
    assert len(train_vocabulary(TEXTS, 70)) <= 70


@pytest.mark.e2e
def test_training_gives_the_same_list_in_every_process():
    code = (
        "import numpy as np; from data_pipelines.text.tokenize import train_vocabulary;"
        "rng = np.random.default_rng(0);"
        "words = [''.join(rng.choice(list('abcdef'), rng.integers(2, 9))) for _ in range(900)];"
        "print(train_vocabulary(words, 300))"
    )
    command = [sys.executable, "-c", code]
    runs = [subprocess.run(command, capture_output=True, check=True) for _ in range(2)]
    assert runs[0].stdout == runs[1].stdout and runs[0].stdout.count(b"'") == 600


def test_templates_have_slots_and_special_tokens(tokenizer):
    slot = -1
    ids = tokenizer.encode_template("text here: [SEP] (a) {} (red) {}", slot)
    expected = "[CLS] text here : [SEP] ( a ) {} ( red ) {} [SEP]".split()
    assert [slot if w == "{}" else WORDS.index(w) for w in expected] == list(ids)
    assert tokenizer.encode_template("{}{}", slot) == (tokenizer.cls_id, -1, -1, tokenizer.sep_id)


@pytest.mark.parametrize("stored", [False, True])
def test_special_tokens_in_a_caption_are_text(tokenizer, tmp_path, stored):
    if stored:
        tokenizer.save(tmp_path)
        tokenizer = load_tokenizer(tmp_path)
    text = "a [MASK] and [SEP][CLS] [PAD]"
    ids, mask = tokenizer.encode([text], 30)
    specials = {WORDS.index(token) for token in SPECIAL_TOKENS if token != "[UNK]"}
    words = ids[0][mask[0]]
    assert words[0] == tokenizer.cls_id and words[-1] == tokenizer.sep_id
    assert not specials & set(words[1:-1].tolist())
    assert tokenizer.decode(words[:6]) == "a [ mask ] and"


def test_half_of_an_emoji_can_be_tokenized(tokenizer):
    ids, mask = tokenizer.encode(["a \ud83d red square"], 8)
    expected, _ = tokenizer.encode(["a ? red square"], 8)
    np.testing.assert_array_equal(ids, expected)
    assert mask.sum() == 6


@pytest.mark.parametrize("unit", ["ab", "\U0001f600", "é"])
def test_a_word_of_very_many_letters_is_no_part_of_the_vocabulary(unit):
    """The trainer's time grows with its square; beyond 100 letters BERT knows no word anyway."""
    texts = ["a small red square", "a 日本 square, moves"] * 3
    long = unit * 20_000
    assert train_vocabulary([*texts, f"{long} red, square"], 60) == train_vocabulary(
        [*texts, "red, square"], 60
    )
    # A long text without blanks is no long word: marks and Chinese letters part it.
    assert "日" in train_vocabulary([*texts, "日本語" * 100], 60)
    assert "moves" in train_vocabulary([*texts, "moves," * 100], 60)
