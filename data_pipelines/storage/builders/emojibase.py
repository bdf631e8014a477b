"""Names of emoji, and groups that show the same thing, from the emojibase data (MIT).

A file name such as `1f44b-1f3fb.webp` is a sequence of code points. It joins the table here once
`fe0f` (a hint for text rendering that some sets write and others do not) is dropped on both sides.
"""

import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from data_pipelines.schema.checks import UserError
from data_pipelines.schema.records import Question

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
SKIN_TONES = frozenset({"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"})
GENDER_SIGNS = frozenset({"2640", "2642"})

# One code point or word for man, woman and person; boy, girl and child; the old ones.
NEUTRAL_CODE = {
    "1f468": "1f9d1",
    "1f469": "1f9d1",
    "1f466": "1f9d2",
    "1f467": "1f9d2",
    "1f474": "1f9d3",
    "1f475": "1f9d3",
}
NEUTRAL_WORD = {
    "man": "person",
    "woman": "person",
    "men": "people",
    "women": "people",
    "boy": "child",
    "girl": "child",
}
# Variants of one picture that neither the code points nor the words reveal.
SAME_PICTURE = {
    "Mrs. Claus": "Santa Claus",
    "Mx Claus": "Santa Claus",
    "prince": "person with crown",
    "princess": "person with crown",
    "woman and man holding hands": "people holding hands",
    "breast-feeding": "person feeding baby",
}
# "kiss: woman, man" and "kiss" are one picture; "person: beard" and "person: bald" are two.
MERGED_PREFIXES = frozenset({"kiss", "couple with heart", "family"})


@dataclass(frozen=True)
class Emoji:
    """One emoji, with the CLDR data that captions, questions and labels are made of."""

    code: str  # lower-case code points joined by "-", without fe0f
    label: str  # CLDR short name: "waving hand: light skin tone"
    base_label: str  # the same without the skin tone: "waving hand"
    tags: tuple[str, ...]
    tone: str | None  # "" if two persons of different tones are shown, None if there is no tone
    gender: str | None
    group: str
    subgroup: str
    family: str  # emoji of one family show the same thing


def code_key(name: str) -> str:
    """Write code points in the form that joins all sources (ours).

    >>> code_key("23-FE0F-20E3"), code_key("1F3C3-200D-2642-FE0F")
    ('0023-20e3', '1f3c3-200d-2642')
    """
    codes = (code.zfill(4) for code in name.lower().split("-"))
    return "-".join(code for code in codes if code != "fe0f")


def load_emoji(archive: Path) -> dict[str, Emoji]:
    """Read the English table of an `emojibase-data` archive: every emoji by its `code`.

    Raises:
        UserError: the archive lacks a file, or two entries have one code.
    """
    table = _read_json(archive, "package/en/data.json")
    groups = _read_json(archive, "package/meta/groups.json")
    emoji: dict[str, Emoji] = {}
    for entry in table:
        for variant in [entry, *entry.get("skins", [])]:
            item = _parse(variant, entry, groups)
            if item.code in emoji:
                raise UserError(f"{archive}: two entries for {item.code}")
            emoji[item.code] = item
    families = merge_families(emoji.values())
    return {code: replace(item, family=families[code]) for code, item in emoji.items()}


def _read_json(archive: Path, member: str):
    with tarfile.open(archive, "r:gz") as tar:
        try:
            return json.load(tar.extractfile(member))
        except KeyError:
            raise UserError(f"{archive} holds no {member}") from None


def _parse(variant: dict, base: dict, groups: dict) -> Emoji:
    """Read an entry of the table, or one of its skin tones; `family` is filled in later."""
    tone = variant.get("tone")
    return Emoji(
        code=code_key(variant["hexcode"]),
        label=variant["label"],
        base_label=base["label"],
        tags=tuple(base.get("tags", ())),
        tone=None if tone is None else "" if isinstance(tone, list) else TONES[tone - 1],
        gender={0: "woman", 1: "man"}.get(base.get("gender")),
        group=groups["groups"].get(str(base.get("group")), ""),
        subgroup=groups["subgroups"].get(str(base.get("subgroup")), ""),
        family="",
    )


def merge_families(emoji: Iterable[Emoji]) -> dict[str, str]:
    """Name the family of each emoji: one for all variants of skin tone and of person (ours).

    Two emoji are of one family if their neutral code points or their neutral labels agree, also
    by way of others. Either rule alone misses some ("man dancing" and "woman dancing" have
    unrelated code points, "mermaid" and "merman" unrelated labels).
    """
    # Union-find without ranks: the table has a few thousand keys.
    root: dict[str, str] = {}

    def find(key: str) -> str:
        while root.setdefault(key, key) != key:
            key = root[key]
        return key

    keys = {item.code: (_neutral_code(item), _neutral_label(item.base_label)) for item in emoji}
    for by_code, by_label in keys.values():
        # The smaller name becomes the root, so the order of the table does not matter.
        first, second = sorted((find(by_code), find(by_label)))
        root[second] = first
    return {code: find(by_label) for code, (_, by_label) in keys.items()}


def _neutral_code(item: Emoji) -> str:
    """Drop tone and gender from code points; a lone tone or gender sign stays what it is.

    The "~" keeps them apart from labels, and sorts them after, so that a label names the family.
    """
    parts = []
    for part in item.code.split("-200d-"):
        kept = [c for c in part.split("-") if c not in SKIN_TONES | GENDER_SIGNS]
        parts.append("-".join(NEUTRAL_CODE.get(c, c) for c in kept))
    return "~" + ("-200d-".join(part for part in parts if part) or item.code)


def _neutral_label(base_label: str) -> str:
    """Return the label with man, woman, ... replaced by person.

    >>> _neutral_label("man running"), _neutral_label("kiss: woman, man")
    ('person running', 'kiss')
    """
    prefix = base_label.split(":")[0]
    label = prefix if prefix in MERGED_PREFIXES else SAME_PICTURE.get(base_label, base_label)
    return re.sub(r"\w+", lambda word: NEUTRAL_WORD.get(word[0], word[0]), label)


def person_type(item: Emoji) -> str | None:
    """Return man, woman or person where the label says so of exactly one, else None (ours)."""
    words = [w for w in re.findall(r"\w+", item.base_label) if w in {*NEUTRAL_WORD, "person"}]
    alone = len(words) == 1 and item.base_label.startswith(words[0])
    if alone and words[0] in ("man", "woman", "person"):
        return words[0]
    return item.gender if not words else None


def captions(item: Emoji, num_extra: int) -> tuple[str, ...]:
    """Return the CLDR label, then up to `num_extra` captions "LABEL, TAG, TAG" of new tags."""
    # A tag that repeats the label adds a word and no meaning.
    said = set(re.findall(r"\w+", item.label.lower()))
    tags = [tag for tag in item.tags if tag not in said]
    pairs = [tags[start : start + 2] for start in range(0, len(tags), 2)]
    return (item.label, *(", ".join([item.label, *pair]) for pair in pairs[:num_extra]))


def questions(item: Emoji) -> tuple[Question, ...]:
    """Ask questions whose answer the CLDR data states (ours)."""
    return tuple(_questions(item))


def _questions(item: Emoji) -> Iterator[Question]:
    if item.tone:
        yield Question("which skin tone is shown?", item.tone, "skin_tone")
    if person := person_type(item):
        yield Question("is it a man, a woman or a person?", person, "person_type")
    if item.subgroup:
        kind = item.subgroup.replace("-", " ")
        yield Question("what kind of thing is shown?", kind, "subgroup")
        yield Question("what is shown?", item.base_label, "content")
