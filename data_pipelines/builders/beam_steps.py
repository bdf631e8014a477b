"""Reading and checking media with Apache Beam, for data sets that one machine is slow for.

The launching process reads the annotations and writes one task a line: what is said about a clip,
and where its file is. Workers, which must see the same folders, do the rest. `apache_beam` is
imported here only, and this module only when it is wanted.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Iterator

import apache_beam as beam

from data_pipelines.builders import base
from data_pipelines.builders.annotated import Annotation, load
from data_pipelines.records import Question
from data_pipelines.reencode import Reencode


class ReadMedia(beam.PTransform):
    """A file of tasks -> (key, features) of the good examples; the others go to a file."""

    def __init__(self, tasks: pathlib.Path, reencode: Reencode | None = None):
        super().__init__()
        self.tasks = str(tasks)
        self.reencode = reencode

    def expand(self, pipeline):
        """Called by Beam."""
        results = (
            pipeline
            | "Read tasks" >> beam.io.ReadFromText(self.tasks)
            | "Spread" >> beam.Reshuffle()
            | "Load" >> beam.ParDo(_load_task, self.reencode).with_outputs("skipped", main="stored")
        )
        skipped = results.skipped | "Write skipped" >> beam.io.WriteToText(f"{self.tasks}.skipped")
        del skipped
        return results.stored


def write_tasks(path: pathlib.Path, tasks: Iterable[tuple[Annotation, pathlib.Path]]) -> int:
    """Writes one task a line, numbered, and returns how many."""
    number = 0
    with path.open("w", encoding="utf-8") as file:
        for number, (annotation, media) in enumerate(tasks, start=1):
            fields = dataclasses.asdict(annotation)
            file.write(json.dumps([number, fields, str(media.absolute())]) + "\n")
    return number


def read_results(path: pathlib.Path) -> Iterator[Annotation | base.Skipped]:
    """What became of each task of a finished run: its annotation if stored, else why not.

    The files of the run are removed at the end.
    """
    files = sorted(path.parent.glob(f"{path.name}.skipped*"))
    lines = (json.loads(line) for file in files for line in file.read_text("utf-8").splitlines())
    skipped = {number: base.Skipped(**fields) for number, fields in lines}
    with path.open(encoding="utf-8") as tasks:
        for line in tasks:
            number, fields, _ = json.loads(line)
            yield skipped.get(number) or _annotation(fields)
    for file in (path, *files):
        file.unlink()


def _load_task(line: str, reencode: Reencode | None) -> Iterator:
    number, fields, media = json.loads(line)
    item = base.stored_form(load(_annotation(fields), pathlib.Path(media)), reencode)
    if isinstance(item, base.Skipped):
        yield beam.pvalue.TaggedOutput("skipped", json.dumps([number, dataclasses.asdict(item)]))
    else:
        yield f"{number:09d}", base.to_features(item)


def _annotation(fields: dict) -> Annotation:
    questions = [
        Question(**question | {"options": tuple(question["options"])})
        for question in fields["questions"]
    ]
    texts = {name: tuple(fields[name]) for name in ("captions", "labels")}
    return Annotation(**fields | texts | {"questions": tuple(questions)})
