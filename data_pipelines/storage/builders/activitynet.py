"""ActivityNet: long YouTube videos with paragraphs (Krishna et al. 2017) and questions (Yu 2019).

Videos: `videos/v_<YouTube id>` with any ending, or without the `v_`. The formats were checked in
the code of CLIP4Clip (paragraphs) and in github.com/MILVLG/activitynet-qa (questions).
"""

from collections.abc import Iterator
from typing import ClassVar

from data_pipelines.schema.checks import UserError
from data_pipelines.schema.records import Question
from data_pipelines.storage.builders import readers
from data_pipelines.storage.builders.annotated import AnnotatedBuilder
from data_pipelines.storage.builders.annotation import Annotation, Counts, merge, paragraph

# By the number in `type`: three types of questions, then six of answers.
QUESTION_KINDS = (
    "motion",
    "spatial relationship",
    "temporal relationship",
    "yes/no",
    "color",
    "object",
    "location",
    "number",
    "other",
)


class ActivityNet(AnnotatedBuilder):
    """ActivityNet Captions, paragraph retrieval: the sentences about a video are one caption.

    Expects `train.json` and `val_1.json`: objects whose keys are videos (`v_<id>`), each with a
    list `sentences`. Retrieval is reported on `val_1`; `val_2` describes the same videos again.
    """

    name = "activitynet"
    origin = "captions.zip of cs.stanford.edu/people/ranjaykrishna/densevid"
    published: ClassVar = {"train": Counts(clips=10_009), "val_1": Counts(clips=4917)}

    def annotations(self, split: str) -> Iterator[Annotation]:
        """Yield one paragraph for each video."""
        path = self.file(f"{split}.json")
        for video, entry in readers.read_json(path, dict).items():
            place = f"{path}[{video!r}]"
            sentences = readers.texts_field(entry, "sentences", place)
            yield Annotation(video, place, (paragraph(sentences),))

    def media_names(self, annotation: Annotation) -> tuple[str, ...]:
        """Return the id with and without the one "v_" of the annotations."""
        video = annotation.media.removeprefix("v_")
        return (f"v_{video}", video)


class ActivityNetQA(ActivityNet):
    """ActivityNet-QA: ten open questions about each video, on videos and splits of its own.

    Expects `train_q.json`, `val_q.json` and `test_q.json` (lists of `video_name`, `question` and
    `question_id`) and `train_a.json`, `val_a.json` and `test_a.json` (lists of `answer`, `type`
    and `question_id`).
    """

    name = "activitynet_qa"
    origin = "the folder dataset/ of github.com/MILVLG/activitynet-qa"
    published: ClassVar = {
        "train": Counts(clips=3200, questions=32_000),
        "val": Counts(clips=1800, questions=18_000),
        "test": Counts(clips=800, questions=8000),
    }

    def annotations(self, split: str) -> Iterator[Annotation]:
        """Yield all questions about a video together."""
        return merge(self._questions(split))

    def media_names(self, annotation: Annotation) -> tuple[str, ...]:
        """Return the id with and without "v_"; an id may begin with "v_" itself."""
        return (f"v_{annotation.media}", annotation.media)

    def _questions(self, split: str) -> Iterator[Annotation]:
        answers = self._answers(split)
        for place, entry in readers.read_entries(self.file(f"{split}_q.json")):
            question_id = readers.field(entry, "question_id", str, place)
            if question_id not in answers:
                raise UserError(f"{place}: no answer to {question_id} in {split}_a.json")
            question = readers.field(entry, "question", str, place)
            media = readers.field(entry, "video_name", str, place)
            yield Annotation(media, place, questions=(Question(question, *answers[question_id]),))

    def _answers(self, split: str) -> dict[str, tuple[str, str]]:
        """Return answer and kind by the id of the question."""
        answers = {}
        for place, entry in readers.read_entries(self.file(f"{split}_a.json")):
            number = readers.field(entry, "type", int, place)
            if not 0 <= number < len(QUESTION_KINDS):
                raise UserError(f"{place}: field 'type' must be one of 0 to 8, not {number}")
            answer = readers.field(entry, "answer", str, place)
            question_id = readers.field(entry, "question_id", str, place)
            answers[question_id] = (answer, QUESTION_KINDS[number])
        return answers
