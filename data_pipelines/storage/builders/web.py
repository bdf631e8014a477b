"""Pairs from the web for pre-training: WebVid, Conceptual Captions, SBU.

Links die: much is missing from any download made today, so expect to need `--max-bad-ratio`.
"""

import zlib
from collections.abc import Iterator
from typing import ClassVar

from data_pipelines.schema.checks import UserError
from data_pipelines.storage.builders import readers
from data_pipelines.storage.builders.annotated import AnnotatedBuilder
from data_pipelines.storage.builders.annotation import Annotation, Counts


class WebVid2M(AnnotatedBuilder):
    """WebVid-2M: 2.5 million stock clips with their titles (Bain et al. 2021).

    Expects `results_2M_train.csv` and `results_2M_val.csv` with the columns `videoid`, `name` and
    `page_dir`, and the clips as `videos/<page_dir>/<videoid>.mp4`, as the script of the
    repository stores them. The exact counts are not published.
    """

    name = "webvid_2m"
    origin = "github.com/m-bain/webvid"
    published: ClassVar = {"train": Counts(), "val": Counts()}
    # Millions of files: listing their folders would take hours.
    exact_paths = True
    subset = "2M"

    def annotations(self, split: str) -> Iterator[Annotation]:
        """Yield one title for each clip."""
        path = self.file(f"results_{self.subset}_{split}.csv")
        for place, row in readers.read_table(path, ["videoid", "name", "page_dir"]):
            media = f"{row['page_dir']}/{row['videoid']}.mp4"
            yield Annotation(media, place, (row["name"],), match_id=row["videoid"])


class WebVid10M(WebVid2M):
    """WebVid-10M: 10 million clips.

    Expects `results_10M_train.csv` and `results_10M_val.csv`, as `webvid_2m`.
    """

    name = "webvid_10m"
    subset = "10M"


class CC3M(AnnotatedBuilder):
    """Conceptual Captions 3M: images with cleaned alt texts (Sharma et al. 2018).

    Expects `Train_GCC-training.tsv` and `Validation_GCC-1.1.0-Validation.tsv` (caption, tab, link)
    and the images as `images/training/<row>_<n>` and `images/validation/<row>_<n>`, or without
    the row or the folder; rows count from 0, <n> is the CRC-32 of the link, as the scripts of
    github.com/igorbrigadir/DownloadConceptualCaptions name them (without the row until 2019).
    """

    name = "cc3m"
    origin = "ai.google.com/research/ConceptualCaptions/download"
    published: ClassVar = {"train": Counts(clips=3_318_333), "val": Counts(clips=15_840)}
    files: ClassVar = {
        "train": "Train_GCC-training.tsv",
        "val": "Validation_GCC-1.1.0-Validation.tsv",
    }
    folders: ClassVar = {"train": "training", "val": "validation"}
    columns: tuple[str, ...] = ("caption", "link")
    media_folder = "images"
    media_type = "image"
    exact_paths = True

    def annotations(self, split: str) -> Iterator[Annotation]:
        """Yield one caption for each link."""
        path = self.file(self.files[split])
        rows = readers.read_table(path, self.columns, delimiter="\t", header=False, quoted=False)
        for index, (place, row) in enumerate(rows):
            number = zlib.crc32(row["link"].strip().encode())
            media = f"{self.folders[split]}/{index}_{number}"
            yield Annotation(media, place, (row["caption"],), match_id=str(number))

    def media_names(self, annotation: Annotation) -> tuple[str, ...]:
        """Return the name with and without the row, the folder and the commonest ending."""
        folder, name = annotation.media.split("/")
        number = annotation.match_id
        names = (annotation.media, name, f"{folder}/{number}", number)
        return (*names, *(f"{name}.jpg" for name in names))


class CC12M(CC3M):
    """Conceptual 12M (Changpinyo et al. 2021).

    Expects `cc12m.tsv` (link, tab, caption) and the images as `images/training/<row>_<n>` or
    other names of `cc3m`.
    """

    name = "cc12m"
    origin = "github.com/google-research-datasets/conceptual-12m"
    published: ClassVar = {"train": Counts(clips=12_423_374)}
    files: ClassVar = {"train": "cc12m.tsv"}
    columns = ("link", "caption")


class Sbu(AnnotatedBuilder):
    """SBU Captions: Flickr photos with their users' captions (Ordonez et al. 2011).

    Expects `sbu-captions-all.json` (an object with the lists `image_urls` and `captions`) and the
    photos under the last part of their links (`images/4385058960_b0f291553e.jpg`).
    """

    name = "sbu"
    origin = "sbu-captions-all.tar.gz of www.cs.rice.edu/~vo9/sbucaptions"
    published: ClassVar = {"train": Counts(clips=1_000_000)}
    media_folder = "images"
    media_type = "image"

    def annotations(self, split: str) -> Iterator[Annotation]:
        """Yield one caption for each photo."""
        path = self.file("sbu-captions-all.json")
        content = readers.read_json(path, dict)
        links = readers.texts_field(content, "image_urls", str(path))
        captions = readers.texts_field(content, "captions", str(path))
        if len(links) != len(captions):
            raise UserError(f"{path}: {len(links)} image_urls but {len(captions)} captions")
        for index, (link, caption) in enumerate(zip(links, captions, strict=True)):
            yield Annotation(link.rsplit("/", 1)[-1], f"{path}[{index}]", (caption,))
