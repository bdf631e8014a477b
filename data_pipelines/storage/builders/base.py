"""The base of all builders: a builder turns one data set into `Example`s, or into tasks.

All that must hold for every data set (checks, shards, texts, vocabulary, metadata) is the business
of `data_pipelines.storage.build`.
"""

import abc
import dataclasses
import pathlib
import re
from collections.abc import Iterable, Mapping

from data_pipelines.media.reencode import Reencode
from data_pipelines.schema.records import Example
from data_pipelines.storage.tasks import Skipped, Task


class VideoTextBuilder(abc.ABC):
    """A data set to be prepared; subclasses implement `examples`.

    It travels to worker processes, so whatever it holds must be picklable where there are several.
    """

    name: str  # the folder; by default the class's own in snake case
    version: str = "1.0.0"
    vocabulary_splits: tuple[str, ...] = ("train",)  # all of them where none of these exists
    shuffled: bool = True  # store in random order; False: in that of the source, to read it so
    workers: int = 1  # processes that `examples` may use; `build` sets it
    drop_repeats: bool = False  # skip tasks that differ from earlier ones only in their source

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # Of the class itself: an inherited name would store two data sets in one folder.
        if "name" not in vars(cls):
            cls.name = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()

    def __init__(
        self,
        *,
        data_dir: str | pathlib.Path,
        max_bad_ratio: float = 0.01,
        reencode: Reencode | None = None,
    ):
        """Take the settings of every data set.

        Args:
          data_dir: the folder of prepared data sets.
          max_bad_ratio: the largest share of examples that may be skipped.
          reencode: encode media again so; by default they are stored as they are.
        """
        self.data_dir = pathlib.Path(data_dir).expanduser()
        self.max_bad_ratio = max_bad_ratio
        self.reencode = reencode

    @abc.abstractmethod
    def examples(self) -> Mapping[str, Iterable[Example | Task | Skipped]]:
        """Return the examples of each split, produced lazily and in a fixed order.

        Tasks are better than examples: their media are read by the workers.
        """

    def load(self, task: Task) -> Example | Skipped:
        """Read the media of a task; runs in the workers."""
        try:
            with open(task.path, "rb") as file:
                file.seek(task.start)
                media = file.read(task.size)
        except OSError as error:
            detail = f"{task.path}: {error.strerror}"
            return Skipped(task.source, "without a readable media file", detail)
        return to_example(task, media)

    def inputs(self) -> tuple[pathlib.Path, ...]:
        """Return the annotation files that were read; a change of one is noticed."""
        return ()

    def notes(self) -> Mapping[str, str]:
        """Return further files of the prepared folder, name to text; called after `examples`."""
        return {}


def to_example(task: Task, media: bytes) -> Example:
    """Join the texts of a task with its media."""
    names = [field.name for field in dataclasses.fields(Example) if field.name != "media"]
    return Example(media=media, **{name: getattr(task, name) for name in names})
