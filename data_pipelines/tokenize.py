"""Fixed-length WordPiece tokenization (BERT, Devlin et al. 2019), on the `tokenizers` library."""

import collections
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers
from jaxtyping import Bool, Int32
from tokenizers import models, normalizers, pre_tokenizers, trainers

VOCABULARY_FILE = "vocab.txt"
TOKENIZER_FILE = "tokenizer.json"
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class Tokenizer:
    """Captions to token ids and back; made by `load_tokenizer` or from a list of words."""

    def __init__(self, backend: tokenizers.Tokenizer, origin: str = "vocabulary"):
        """Args: `origin` names the tokenizer in error messages.

        Raises:
          ValueError: a special token is missing.
        """
        missing = [token for token in SPECIAL_TOKENS if backend.token_to_id(token) is None]
        if missing:
            raise ValueError(f"{origin}: the special tokens {' '.join(missing)} are missing")
        # A stored tokenizer may cut or pad by itself; the length is an argument here.
        backend.no_truncation()
        backend.no_padding()
        backend.add_special_tokens(list(SPECIAL_TOKENS))
        self._backend = backend
        ids = [backend.token_to_id(token) for token in SPECIAL_TOKENS]
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = ids

    @classmethod
    def from_vocabulary(cls, words: Sequence[str], origin: str = "vocabulary") -> "Tokenizer":
        """The lower-casing BERT tokenizer whose ids are the places in `words`."""
        vocabulary = {word: i for i, word in enumerate(words)}
        backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        backend.normalizer = normalizers.BertNormalizer(lowercase=True)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = tokenizers.decoders.WordPiece()
        return cls(backend, origin)

    @property
    def vocab_size(self) -> int:
        """Number of token ids, special ones included."""
        return self._backend.get_vocab_size()

    def encode(
        self, texts: Sequence[str], text_len: int
    ) -> tuple[Int32[np.ndarray, "n {text_len}"], Bool[np.ndarray, "n {text_len}"]]:
        """Ids `[CLS] words [SEP] [PAD] ...` and the mask of real tokens.

        Texts that are too long lose their last words, never the [SEP].
        """
        ids = np.full((len(texts), text_len), self.pad_id, np.int32)
        mask = np.zeros((len(texts), text_len), bool)
        for row, encoding in enumerate(
            self._backend.encode_batch(list(texts), add_special_tokens=False)
        ):
            tokens = [self.cls_id, *encoding.ids[: text_len - 2], self.sep_id]
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = True
        return ids, mask

    def encode_template(self, template: str, slot: int) -> tuple[int, ...]:
        """Ids of `[CLS] template [SEP]`, with `slot` at each {}; it may hold special tokens."""
        pieces = [
            self._backend.encode(piece, add_special_tokens=False).ids
            for piece in template.split("{}")
        ]
        filled = [token for piece in pieces for token in (slot, *piece)][1:]
        return (self.cls_id, *filled, self.sep_id)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of one row of ids, without special tokens."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def words(self) -> list[str]:
        """The vocabulary, in the order of its ids."""
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        return sorted(vocabulary, key=vocabulary.get)

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes `tokenizer.json` and `vocab.txt` into a folder, which is made if need be."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / VOCABULARY_FILE).write_text("\n".join(self.words()) + "\n", "utf-8")
        self._backend.save(str(folder / TOKENIZER_FILE))


def load_tokenizer(path: str | pathlib.Path) -> Tokenizer:
    """A tokenizer from a `vocab.txt`, a `tokenizer.json`, or a folder that holds one of them.

    `tokenizer.json` goes first, because it also says whether case matters.

    Raises:
      FileNotFoundError: no such file, or a folder with neither.
      ValueError: a special token is missing.
    """
    path = pathlib.Path(path).expanduser()
    if path.is_dir():
        found = [path / name for name in (TOKENIZER_FILE, VOCABULARY_FILE)]
        found = [file for file in found if file.is_file()]
        if not found:
            raise FileNotFoundError(f"{path}: holds neither {TOKENIZER_FILE} nor {VOCABULARY_FILE}")
        path = found[0]
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such tokenizer file")
    if path.suffix == ".json":
        return Tokenizer(tokenizers.Tokenizer.from_file(str(path)), str(path))
    return Tokenizer.from_vocabulary(path.read_text("utf-8").splitlines(), str(path))


def train_vocabulary(texts: Sequence[str], size: int) -> list[str]:
    """A lower-case WordPiece vocabulary of at most `size` tokens, [PAD] first.

    At most a quarter of it are single letters, the most frequent ones. The same texts always give
    the same list: the trainer numbers continuation pieces (`##a`) in no fixed order, so the
    single ones are handed to it beforehand as fixed tokens.
    """
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    letters = _frequent_letters(map(backend.normalizer.normalize_str, texts), size // 4)
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        special_tokens=[*SPECIAL_TOKENS, *(f"##{letter}" for letter in letters)],
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    vocabulary = backend.get_vocab()
    return sorted(vocabulary, key=vocabulary.get)


def _frequent_letters(texts: Iterable[str], limit: int) -> list[str]:
    counts = collections.Counter(letter for text in texts for letter in text)
    letters = sorted(counts, key=lambda letter: (-counts[letter], letter))
    return sorted([letter for letter in letters if not letter.isspace()][:limit])
