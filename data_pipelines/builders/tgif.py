"""TGIF-QA: questions about animated GIFs (Jang et al. 2017, 2019).

Videos: `videos/<gif_name>.gif`, or the same as MP4. Formats and counts are those of
github.com/YunseokJANG/tgif-qa, whose tables are separated by tabs although they end in .csv.
"""

from collections.abc import Iterator
from typing import ClassVar

from data_pipelines.builders import readers
from data_pipelines.builders.annotated import AnnotatedBuilder, Annotation, Counts, merge
from data_pipelines.records import Question

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
    task = "action"
    columns: tuple[str, ...] = ("gif_name", "question", *OPTION_COLUMNS, "answer")

    def annotations(self, split: str) -> Iterator[Annotation]:
        """All questions about a GIF together."""
        return merge(self._questions(split))

    def _questions(self, split: str) -> Iterator[Annotation]:
        path = self.file(f"{split.capitalize()}_{self.task}_question.csv")
        for place, row in readers.read_table(path, self.columns, delimiter="\t"):
            yield Annotation(row["gif_name"], place, questions=(self.question(row, place),))

    def question(self, row: dict[str, str], place: str) -> Question:
        """One row of the table."""
        options = tuple(row[column] for column in OPTION_COLUMNS)
        answer = readers.whole_number(row, "answer", place, len(options))
        return Question(row["question"], options[answer], self.task, options)


class TgifTransition(TgifAction):
    """What happens before or after something: five options.

    Expects `Train_transition_question.csv` and `Test_transition_question.csv`, with the columns
    of `tgif_action`.
    """

    name = "tgif_transition"
    published: ClassVar = {"train": Counts(questions=52_704), "test": Counts(questions=6232)}
    task = "transition"


class TgifFrame(TgifAction):
    """Open questions that one frame can answer.

    Expects `Train_frameqa_question.csv` and `Test_frameqa_question.csv` with the columns
    `gif_name`, `question`, `answer` (a word) and `type` (0 to 3: object, number, color, location).
    """

    name = "tgif_frame"
    published: ClassVar = {"train": Counts(questions=39_392), "test": Counts(questions=13_691)}
    task = "frameqa"
    columns = ("gif_name", "question", "answer", "type")

    def question(self, row: dict[str, str], place: str) -> Question:
        """One row of the table."""
        kind = readers.whole_number(row, "type", place, len(FRAME_KINDS))
        return Question(row["question"], row["answer"], FRAME_KINDS[kind])
