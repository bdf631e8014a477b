"""Images with captions by people: COCO and Visual Genome."""

from collections.abc import Iterator
from typing import ClassVar

from data_pipelines.storage.builders import readers
from data_pipelines.storage.builders.annotated import AnnotatedBuilder
from data_pipelines.storage.builders.annotation import Annotation, Counts


class Coco(AnnotatedBuilder):
    """COCO captions, five an image, with the splits of Karpathy and Fei-Fei 2015.

    Expects `dataset_coco.json` (`images`: `filepath`, `filename`, `split` and `sentences`, each
    with `raw`) and the 2014 images as `images/train2014/` and `images/val2014/`. `restval` counts
    as training.
    """

    name = "coco"
    origin = "caption_datasets.zip of cs.stanford.edu/people/karpathy/deepimagesent"
    published: ClassVar = {
        "train": Counts(clips=113_287, captions=566_747),
        "val": Counts(clips=5000, captions=25_010),
        "test": Counts(clips=5000, captions=25_010),
    }
    media_folder = "images"
    media_type = "image"

    def annotations(self, split: str) -> Iterator[Annotation]:
        """Yield all captions of the images of a split."""
        path = self.file("dataset_coco.json")
        images = readers.field(readers.read_json(path, dict), "images", list, str(path))
        # As all systems train that report on Karpathy's test split.
        wanted = ("train", "restval") if split == "train" else (split,)
        for index, image in enumerate(images):
            place = f"{path}: images[{index}]"
            if readers.field(image, "split", str, place) in wanted:
                yield self._annotation(image, place)

    def _annotation(self, image: dict, place: str) -> Annotation:
        folder = readers.field(image, "filepath", str, place)
        name = readers.field(image, "filename", str, place)
        sentences = readers.field(image, "sentences", list, place)
        captions = tuple(readers.field(item, "raw", str, place) for item in sentences)
        return Annotation(f"{folder}/{name}", place, captions, match_id=name)


class VisualGenome(AnnotatedBuilder):
    """Visual Genome: about 50 described regions an image (Krishna et al. 2017).

    Expects `region_descriptions.json` (a list of `id` and `regions`, each with a `phrase`) and the
    images as `images/VG_100K/<id>.jpg` and `images/VG_100K_2/<id>.jpg`. The phrases of an image are
    its captions.
    """

    name = "visual_genome"
    origin = "region_descriptions.json.zip of homes.cs.washington.edu/~ranjay/visualgenome"
    published: ClassVar = {"train": Counts(clips=108_077)}
    media_folder = "images"
    media_type = "image"

    def annotations(self, split: str) -> Iterator[Annotation]:
        """Yield all phrases about an image."""
        for place, entry in readers.read_entries(self.file("region_descriptions.json")):
            regions = readers.field(entry, "regions", list, place)
            phrases = tuple(readers.field(item, "phrase", str, place) for item in regions)
            yield Annotation(str(readers.field(entry, "id", int, place)), place, phrases)
