"""MSR-VTT: 10,000 web clips of 10 to 30 s with 20 captions each (Xu et al. 2016).

Videos: `videos/video0.mp4` to `video9999.mp4`, from train_val_videos.zip and test_videos.zip of
the 2016 and 2017 challenges. The formats were checked in the code of CLIP4Clip (retrieval), of
Xu et al. 2017 (questions) and of Singularity (multiple choice).
"""

from collections.abc import Iterator
from typing import ClassVar

from data_pipelines.schema.checks import UserError
from data_pipelines.schema.records import Question
from data_pipelines.storage.builders import readers
from data_pipelines.storage.builders.annotated import AnnotatedBuilder
from data_pipelines.storage.builders.annotation import Annotation, Counts, merge
from data_pipelines.storage.builders.annotation_files import read_annotations

QUESTION_WORDS = ("what", "who", "how", "when", "where")


class Msrvtt9k(AnnotatedBuilder):
    """Retrieval, 9k train / 1k-A test.

    Expects `MSRVTT_data.json` (all captions: `sentences` of `video_id` and `caption`),
    `MSRVTT_train.9k.csv` (a column `video_id`) and `MSRVTT_JSFUSION_test.csv` (`video_id` and
    `sentence`, one a clip: the 1k-A test split of JSFusion).
    """

    name = "msrvtt_9k"
    origin = "msrvtt_data.zip, release v0.0 of github.com/ArrowLuo/CLIP4Clip"
    published: ClassVar = {
        "train": Counts(clips=9000, captions=180_000),
        "test": Counts(clips=1000, captions=1000),
    }
    train_file = "MSRVTT_train.9k.csv"

    def annotations(self, split: str) -> Iterator[Annotation]:
        """Yield all captions of the listed training clips, one of each listed test clip."""
        # Of each test clip one sentence, the one that the 1k-A list names.
        if split == "test":
            path = self.file("MSRVTT_JSFUSION_test.csv")
            for place, row in readers.read_table(path, ["video_id", "sentence"]):
                yield Annotation(row["video_id"], place, captions=(row["sentence"],))
            return
        captions = self._captions()
        for place, row in readers.read_table(self.file(self.train_file), ["video_id"]):
            if row["video_id"] not in captions:
                raise UserError(f"{place}: no caption of {row['video_id']} in MSRVTT_data.json")
            yield Annotation(row["video_id"], place, captions=tuple(captions[row["video_id"]]))

    def _captions(self) -> dict[str, list[str]]:
        path = self.file("MSRVTT_data.json")
        sentences = readers.field(readers.read_json(path, dict), "sentences", list, str(path))
        captions: dict[str, list[str]] = {}
        for index, entry in enumerate(sentences):
            place = f"{path}: sentences[{index}]"
            caption = readers.field(entry, "caption", str, place)
            captions.setdefault(readers.field(entry, "video_id", str, place), []).append(caption)
        return captions


class Msrvtt7k(Msrvtt9k):
    """Retrieval, 7k train (the official train and val splits) / 1k-A test.

    Expects the files of `msrvtt_9k`, with `MSRVTT_train.7k.csv` in place of the 9k list.
    """

    name = "msrvtt_7k"
    published: ClassVar = {
        "train": Counts(clips=7010, captions=140_200),
        "test": Counts(clips=1000, captions=1000),
    }
    train_file = "MSRVTT_train.7k.csv"


class MsrvttQA(AnnotatedBuilder):
    """MSRVTT-QA: open questions made from the captions (Xu et al. 2017; counts: table 1).

    Expects `train_qa.json`, `val_qa.json` and `test_qa.json`: lists of `question`, `answer` and
    `video_id` (a number: 0 is video0). The kind of a question is its first word.
    """

    name = "msrvtt_qa"
    origin = "the MSRVTT-QA archive of github.com/xudejing/video-question-answering"
    published: ClassVar = {
        "train": Counts(clips=6513, questions=158_581),
        "val": Counts(clips=497, questions=12_278),
        "test": Counts(clips=2990, questions=72_821),
    }
    prefix = "video"

    def annotations(self, split: str) -> Iterator[Annotation]:
        """Yield all questions about a clip together."""
        return merge(self._questions(split))

    def _questions(self, split: str) -> Iterator[Annotation]:
        for place, entry in readers.read_entries(self.file(f"{split}_qa.json")):
            question = readers.field(entry, "question", str, place)
            answer = readers.field(entry, "answer", str, place)
            media = f"{self.prefix}{readers.field(entry, 'video_id', int, place)}"
            # As Xu et al. report them.
            kind = first_word(question)
            yield Annotation(media, place, questions=(Question(question, answer, kind),))


class MsrvttMC(AnnotatedBuilder):
    """Multiple choice: which of five captions is the clip's (Yu et al. 2018, JSFusion).

    Expects `msrvtt_mc_test.json`: a list of `video` (a file name), `caption` (five texts) and
    `answer` (the place of the right one, from 0). The caption that is right is also stored as
    the clip's caption; the questions are empty. There is no training split: models of
    `msrvtt_7k` are used.
    """

    name = "msrvtt_mc"
    origin = "anno_downstream.tar.gz of github.com/jayleicn/singularity"
    published: ClassVar = {"test": Counts(clips=2990, questions=2990)}

    def annotations(self, split: str) -> Iterator[Annotation]:
        """Yield one question for each clip."""
        return read_annotations(self.file("msrvtt_mc_test.json"))


def first_word(question: str) -> str:
    """Return one of `QUESTION_WORDS`, the types of questions in reports, or "other"."""
    word = question.split(maxsplit=1)[0].lower() if question.strip() else ""
    return word if word in QUESTION_WORDS else "other"
