"""TGIF-QA: questions about animated GIFs (Jang et al. 2017, 2019).

Videos: `videos/<gif_name>.gif`, or the same as MP4. Formats and counts are those of
github.com/YunseokJANG/tgif-qa, whose tables are separated by tabs although they end in .csv.
"""

from collections.abc import Iterator
from typing import ClassVar

from data_pipelines.schema.records import Question
from data_pipelines.storage.builders import readers
from data_pipelines.storage.builders.annotated import AnnotatedBuilder
from data_pipelines.storage.builders.annotation import Annotation, Counts, merge

# Commit a43d8c3 of the repository took their rows out of all training tables.
REMOVED_GIFS = frozenset(
    f"tumblr_{name}"
    for name in (
        *("nquoaffUkx1r6d0kro1_250", "npmzcaH9bz1tswawvo1_250"),
        *("ncn8i0OBGi1u01wm2o1_400", "nf0ee5yQHb1sm4j8do1_250"),
    )
)
OPTION_COLUMNS = ("a1", "a2", "a3", "a4", "a5")
FRAME_KINDS = ("object", "number", "color", "location")


class TgifAction(AnnotatedBuilder):
    """Repeated actions: five options.

    Expects `Train_action_question.csv` and `Test_action_question.csv` with the columns
    `gif_name`, `question`, `a1` to `a5` and `answer` (the place of the right option, from 0).
    """

    name = "tgif_action"
    origin = "the folder dataset/ of github.com/YunseokJANG/tgif-qa"
    published: ClassVar = {"train": Counts(questions=20_475), "test": Counts(questions=2274)}
    removed_rows: range = range(4, 5)
    task = "action"
    columns: tuple[str, ...] = ("gif_name", "question", *OPTION_COLUMNS, "answer")

    def annotations(self, split: str) -> Iterator[Annotation]:
        """Yield all questions about a GIF together."""
        return merge(self._questions(split))

    def edition(self, split: str, found: Counts) -> str | None:
        """Recognize the training tables without the four removed GIFs by their names."""
        fewer = self.published[split].questions - found.questions
        if split != "train" or fewer not in self.removed_rows:
            return None
        # By name as well as by number: a table cut short has fewer rows, too.
        if any(item.media in REMOVED_GIFS for item in self.annotations(split)):
            return None
        return f"since commit a43d8c3, which removed the {fewer} rows of four GIFs"

    def _questions(self, split: str) -> Iterator[Annotation]:
        path = self.file(f"{split.capitalize()}_{self.task}_question.csv")
        for place, row in readers.read_table(path, self.columns, delimiter="\t"):
            yield Annotation(row["gif_name"], place, questions=(self.question(row, place),))

    def question(self, row: dict[str, str], place: str) -> Question:
        """Read one row of the table."""
        options = tuple(row[column] for column in OPTION_COLUMNS)
        answer = readers.whole_number(row, "answer", place, len(options))
        return Question(row["question"], options[answer], self.task, options)


class TgifTransition(TgifAction):
    """State transitions (what happens before or after something): five options.

    Expects `Train_transition_question.csv` and `Test_transition_question.csv`, with the columns
    of `tgif_action`.
    """

    name = "tgif_transition"
    published: ClassVar = {"train": Counts(questions=52_704), "test": Counts(questions=6232)}
    removed_rows = range(1, 17)  # not seen; a GIF has a few
    task = "transition"


class TgifFrame(TgifAction):
    """Open questions that one frame can answer.

    Expects `Train_frameqa_question.csv` and `Test_frameqa_question.csv` with the columns
    `gif_name`, `question`, `answer` (a word) and `type` (0 to 3: object, number, color, location).
    """

    name = "tgif_frame"
    published: ClassVar = {"train": Counts(questions=39_392), "test": Counts(questions=13_691)}
    removed_rows = range(1, 17)  # not seen; a GIF has a few
    task = "frameqa"
    columns = ("gif_name", "question", "answer", "type")

    def question(self, row: dict[str, str], place: str) -> Question:
        """Read one row of the table."""
        kind = readers.whole_number(row, "type", place, len(FRAME_KINDS))
        return Question(row["question"], row["answer"], FRAME_KINDS[kind])
