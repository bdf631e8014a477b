"""Fixed-length tokenization on the `tokenizers` library.

WordPiece as in BERT (Devlin et al. 2019), or what published weights bring, such as CLIP's BPE.
"""

import collections
import contextlib
import hashlib
import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Bool, Int32
from tokenizers import models, normalizers, pre_tokenizers, trainers

from data_pipelines.schema.checks import MissingError, UserError
from data_pipelines.schema.json_files import read_json, read_text
from data_pipelines.text.unicode import well_formed

VOCABULARY_FILE = "vocab.txt"
TOKENIZER_FILE = "tokenizer.json"
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # BERT's names
# Their names in other tokenizers (CLIP's, with one token for several), by these files.
SPECIAL_FILES = ("special_tokens_map.json", "tokenizer_config.json")
SPECIAL_FIELDS = dict(zip(SPECIAL_TOKENS[:4], ("pad", "unk", "bos", "eos"), strict=True))
_PARTS_OF_TEMPLATE = re.compile("({})".format("|".join(map(re.escape, ("{}", *SPECIAL_TOKENS)))))
LONGEST_WORD = 100  # letters; a longer one becomes [UNK], as in BERT
_MAYBE_LONGER = re.compile(rf"\S{{{LONGEST_WORD + 1},}}")


class Tokenizer:
    """Captions to token ids and back; made by `load_tokenizer` or from a list of words."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        origin: str = "vocabulary",
        special: Mapping[str, str] | None = None,
    ):
        """Wrap a tokenizer.

        Args:
          backend: the tokenizer.
          origin: its name in error messages.
          special: the token in the place of each of `SPECIAL_TOKENS`; [MASK] may lack. None: those
            themselves, BERT's.

        Raises:
          UserError: a special token is missing.
        """
        self.special = dict(special or {token: token for token in SPECIAL_TOKENS})
        found = {role: backend.token_to_id(token) for role, token in self.special.items()}
        missing = [self.special[role] for role, token_id in found.items() if token_id is None]
        if missing:
            raise UserError(f"{origin}: the special tokens {' '.join(missing)} are missing")
        # A stored tokenizer may cut or pad by itself; the length is an argument here.
        backend.no_truncation()
        backend.no_padding()
        backend.add_special_tokens(list(dict.fromkeys(self.special.values())))
        backend.encode_special_tokens = True  # "[MASK]" in a caption is text
        self._backend = backend
        self._special_ids = {role: i for role, i in found.items() if i is not None}
        self.pad_id, self.unk_id, self.cls_id, self.sep_id = (
            self._special_ids[role] for role in SPECIAL_TOKENS[:4]
        )
        self.mask_id = self._special_ids.get("[MASK]")  # None: no masked language modeling

    @classmethod
    def from_vocabulary(cls, words: Sequence[str], origin: str = "vocabulary") -> "Tokenizer":
        """Return the lower-casing BERT tokenizer whose ids are the places in `words`."""
        backend = _bert_backend({word: i for i, word in enumerate(words)})
        backend.decoder = tokenizers.decoders.WordPiece()
        return cls(backend, origin)

    @property
    def is_bert(self) -> bool:
        """True if the special tokens are BERT's."""
        return self.special == {token: token for token in SPECIAL_TOKENS}

    @property
    def vocab_size(self) -> int:
        """Number of token ids, special ones included."""
        return self._backend.get_vocab_size()

    def encode(
        self, texts: Sequence[str], text_len: int, question: str = ""
    ) -> tuple[Int32[np.ndarray, "n {text_len}"], Bool[np.ndarray, "n {text_len}"]]:
        """Tokenize to ids `[CLS] words [SEP] [PAD] ...` and the mask of real tokens.

        Texts that are too long lose their last words, never the [SEP]. If all begin with a
        `question`, it loses its last words first: what follows tells options apart.
        """
        lead = len(self._words([question])[0]) if question else 0
        ids = np.full((len(texts), text_len), self.pad_id, np.int32)
        mask = np.zeros((len(texts), text_len), bool)
        for row, words in enumerate(self._words(texts)):
            kept = max(lead - max(len(words) - (text_len - 2), 0), 0)
            words = [*words[:kept], *words[lead:]]
            tokens = [self.cls_id, *words[: text_len - 2], self.sep_id]
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = True
        return ids, mask

    def longest(self, texts: Sequence[str]) -> int:
        """Count the tokens of the longest text, with [CLS] and [SEP]."""
        return 2 + max(map(len, self._words(texts)))

    def _words(self, texts: Sequence[str]) -> list[list[int]]:
        # Special tokens by hand: a stored tokenizer may add others, or none.
        encodings = self._backend.encode_batch(
            list(map(well_formed, texts)), add_special_tokens=False
        )
        return [encoding.ids for encoding in encodings]

    def encode_template(self, template: str, slot: int) -> tuple[int, ...]:
        """Tokenize `[CLS] template [SEP]`, with `slot` at each {}; it may hold special tokens."""
        tokens: list[int] = []
        special = self._special_ids | {"{}": slot}
        for piece in _PARTS_OF_TEMPLATE.split(template):
            tokens += [special[piece]] if piece in special else self._words([piece])[0]
        return (self.cls_id, *tokens, self.sep_id)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of one row of ids, without special tokens."""
        text = self._backend.decode([int(i) for i in ids], skip_special_tokens=True)
        # CLIP's byte pairs mark the ends of words, which its stored decoder leaves in.
        suffix = getattr(self._backend.model, "end_of_word_suffix", None)
        return text.replace(suffix, " ").strip() if suffix else text

    def words(self) -> list[str]:
        """Return the vocabulary, in the order of its ids."""
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        return sorted(vocabulary, key=vocabulary.__getitem__)

    def digest(self) -> str:
        """Hash the ids of all words, and what becomes of case and accents."""
        probe = self._words(["A dog, Él 漢 \U0001f436"])
        return hashlib.sha256(json.dumps([self.words(), probe]).encode()).hexdigest()[:32]

    def save(self, folder: str | pathlib.Path) -> None:
        """Write `tokenizer.json` into a folder, which is made if need be.

        Beside it `vocab.txt` or, for special tokens that are not BERT's, a file of their names.
        """
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.is_bert:
            (folder / VOCABULARY_FILE).write_text("\n".join(self.words()) + "\n", "utf-8")
        else:
            names = {f"{SPECIAL_FIELDS[role]}_token": name for role, name in self.special.items()}
            (folder / SPECIAL_FILES[0]).write_text(json.dumps(names, indent=2) + "\n", "utf-8")
        self._backend.save(str(folder / TOKENIZER_FILE))


def load_tokenizer(path: str | pathlib.Path) -> Tokenizer:
    """Load a tokenizer from a `vocab.txt`, a `tokenizer.json`, or a folder with one of them.

    `tokenizer.json` goes first, because it also says whether case matters. If its special tokens
    are not BERT's, a file of `SPECIAL_FILES` beside it names them.

    Raises:
      MissingError: no such file, or a folder with neither.
      UserError: the file is damaged, or a special token is missing.
    """
    path = pathlib.Path(path).expanduser()
    if path.is_dir():
        found = [path / name for name in (TOKENIZER_FILE, VOCABULARY_FILE)]
        found = [file for file in found if file.is_file()]
        if not found:
            raise MissingError(f"{path}: holds neither {TOKENIZER_FILE} nor {VOCABULARY_FILE}")
        path = found[0]
    if not path.is_file():
        raise MissingError(f"{path}: no such tokenizer file")
    if path.suffix == ".json":
        read_json(path)  # whose messages are clearer
        with _damage_named(path):
            backend = tokenizers.Tokenizer.from_file(str(path))
    else:
        backend = _bert_backend({word: i for i, word in enumerate(read_text(path).splitlines())})
        backend.decoder = tokenizers.decoders.WordPiece()
    special = None if backend.token_to_id("[CLS]") is not None else _special_names(path.parent)
    with _damage_named(path):
        tokenizer = Tokenizer(backend, str(path), special)
        tokenizer.digest()  # encodes known and unknown words: some damage shows only then
    return tokenizer


def _special_names(folder: pathlib.Path) -> dict[str, str] | None:
    """Read the names of special tokens that published weights give; None without such a file."""
    for name in SPECIAL_FILES:
        if not (folder / name).is_file():
            continue
        fields = read_json(folder / name)
        names = {role: _token(fields.get(f"{kind}_token")) for role, kind in SPECIAL_FIELDS.items()}
        if all(names.values()):
            return names
    return None


def _token(field: Any) -> str:
    """Return the token that a field gives, as text or as an object with its content."""
    content = field.get("content") if isinstance(field, dict) else field
    return content if isinstance(content, str) else ""


@contextlib.contextmanager
def _damage_named(path: pathlib.Path) -> Iterator[None]:
    """Raise UserError, naming the file, for whatever the library raises; it has no class for it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: not a tokenizer: {error}") from error
    except BaseException as error:  # a panic of its Rust code
        if "Panic" not in type(error).__name__:
            raise
        raise UserError(f"{path}: not a tokenizer: {error}") from error


def train_vocabulary(texts: Sequence[str], size: int) -> list[str]:
    """Return a lower-case WordPiece vocabulary of at most `size` tokens, [PAD] first.

    At most a quarter of it are single letters, the most frequent ones. The same texts always give
    the same list: the trainer numbers continuation pieces (`##a`) in no fixed order, so the
    single ones are handed to it beforehand as fixed tokens. Words of more than `LONGEST_WORD`
    letters, which no vocabulary holds, are left out: the trainer's time grows with their square.
    """
    backend = _bert_backend({})
    texts = [_without_long_words(well_formed(text), backend) for text in texts]
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
    # In the order of ids, as a `vocab.txt` has its lines; the dict itself has no fixed order.
    return sorted(vocabulary, key=vocabulary.__getitem__)


def _bert_backend(vocabulary: dict[str, int]) -> tokenizers.Tokenizer:
    """Make BERT's lower-casing WordPiece tokenizer."""
    backend = tokenizers.Tokenizer(
        models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=LONGEST_WORD)
    )
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return backend


def _without_long_words(text: str, backend: tokenizers.Tokenizer) -> str:
    normal = backend.normalizer.normalize_str(text)
    if not _MAYBE_LONGER.search(normal):
        return text
    words = (word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normal))
    return " ".join(word for word in words if len(word) <= LONGEST_WORD)


def _frequent_letters(texts: Iterable[str], limit: int) -> list[str]:
    counts = collections.Counter(letter for text in texts for letter in text)
    letters = sorted(counts, key=lambda letter: (-counts[letter], letter))
    return sorted([letter for letter in letters if not letter.isspace()][:limit])
