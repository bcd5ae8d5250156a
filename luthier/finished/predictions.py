"""predict: a finished run's model on new rows: label, probability of each class, calibrated."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from luthier.core.conformal import Sets
from luthier.core.ingredient import Findings, Outputs
from luthier.core.scores import Array, softmax
from luthier.errors import DataError, Fault, LuthierError
from luthier.finished.weights import weightless
from luthier.jsonfile import expanded, plain, write_whole
from luthier.narrate import Narrator, Silent
from luthier.outputs import adjusted, logits, scores
from luthier.report import Report
from luthier.sources.columns import Columns
from luthier.sources.data import named_rows, read_unlabelled
from luthier.sources.labels import as_labels, as_number, is_empty, pointed
from luthier.sources.limits import pad_id
from luthier.sources.models import reload, reload_tokenizer
from luthier.sources.tasks import Classification, Regression, Task, label_name
from luthier.sources.text import encode


@dataclass(frozen=True)
class Predictions:
    """What a model says of rows.

    Args:
        columns: the rows' own columns.
        labels: the predicted label, or number, of each row.
        probabilities: shape (n, classes), calibrated where the run was; None for a regression.
        names: the classes.
        sets: of each row the classes that cannot be ruled out, the likeliest first; None where the run has no ``conformal``.
    """

    columns: dict[str, list[Any]]
    labels: list[Any]
    probabilities: np.ndarray[Any, Any] | None
    names: tuple[str, ...]
    sets: list[list[str]] | None = None

    def table(self) -> dict[str, list[Any]]:
        """The rows' own columns, then ``prediction``, ``prediction_set`` where there are sets, and one ``p_NAME`` a class."""
        found = {**self.columns, "prediction": self.labels}
        if self.sets is not None:
            found["prediction_set"] = self.sets
        if self.probabilities is not None:
            for at, name in enumerate(self.names):
                found[f"p_{name}"] = [float(value) for value in self.probabilities[:, at]]
        return found

    def save(self, path: str | Path) -> None:
        """Writes a .csv, .tsv or .jsonl, whole or not at all.

        Raises:
            DataError: the ending is none of these.
        """
        path = expanded(path)
        if path.suffix not in (".csv", ".tsv", ".jsonl"):
            raise DataError.of(
                [Fault(str(path), "must end in .csv, .tsv or .jsonl", path.suffix or "no ending")], "--out"
            )
        if path.suffix == ".jsonl":
            table = self.table()
            told = (plain(dict(zip(table, row, strict=True))) for row in zip(*table.values(), strict=True))
            lines = iter([json.dumps(row, ensure_ascii=False) for row in told])
        else:
            lines = self.lines("\t" if path.suffix == ".tsv" else ",")
        write_whole(path, "".join(f"{line}\n" for line in lines))

    def lines(self, delimiter: str = ",") -> Iterator[str]:
        """The table as CSV, a row at a time, the columns' names first; half a surrogate pair becomes ``?``, a set ``one|other``."""
        table = self.table()
        if self.sets is not None:
            table["prediction_set"] = ["|".join(names) for names in self.sets]
        for row in (table, *zip(*table.values(), strict=True)):
            text = io.StringIO()
            # it quotes letters of its own row's end, "\r\n", which a lone "\r" needs
            csv.writer(text, delimiter=delimiter).writerow(row)
            yield text.getvalue().removesuffix("\r\n").encode("utf-8", "replace").decode("utf-8")


def predict(run: str | Path, data: Any, *, narrator: Narrator | None = None) -> Predictions:
    """The predictions of a finished run's model, or of a soup's, for ``data``.

    Args:
        run: the folder of the run, or of the soup; a soup is not calibrated.
        data: one file or DataFrame with the text columns the run was trained on; labels are not needed, and where there are some
            the narrator tells how the predictions fit.
        narrator: who says what happens.
    Raises:
        LuthierError: the run has not ended, or the data lacks a column, holds what is no text, or has a column of the
            predictions' names.
    """
    say = narrator or Silent()
    folder = expanded(run)
    report, calibration = _trained(folder)
    if faults := weightless(folder):
        raise LuthierError.of(faults, "predict")
    columns = report.data["columns"]
    texts = Columns(columns["text"], columns.get("text_pair"))
    split, frame = read_unlabelled(data, texts)
    kept = {str(name): frame[name].tolist() for name in frame}
    found = Findings.of(calibration)
    own = [] if report.task == "regression" else [f"p_{name}" for name in report.labels]
    _free(kept, ["prediction", *(["prediction_set"] if found.sets else []), *own])
    for name, cells in ((texts.text, split.texts), (texts.text_pair, split.pairs or ())):
        empty = [row for row, text in enumerate(cells, 1) if not text.strip()]
        if empty:
            say.line(f"warning: no text in {name!r}, {named_rows(empty)}: predictions there mean nothing")
    model, tokenizer = reload(folder / "model"), reload_tokenizer(folder / "model")
    encoded = encode(tokenizer, split, max_length=report.model["max_length"])
    if encoded.truncated:
        say.line(
            f"{encoded.truncated} of {len(encoded)} texts are longer than {report.model['max_length']} tokens and are cut"
        )
    with say.bar("predicting", len(encoded)) as bar:
        out = logits(model, encoded, pad_id=pad_id(model, tokenizer), tick=bar.advance)
    changed = adjusted(Outputs(out, np.zeros(len(out))), found)
    _score(report, changed, kept.get(columns["label"]), say)
    if report.task == "regression":
        return Predictions(kept, [float(value) for value in out[:, 0]], None, ())
    likely = softmax(changed.logits)
    predicted = [report.labels[at] for at in likely.argmax(axis=1)]
    sets = None if found.sets is None else _named(found.sets, out, report.labels)
    return Predictions(kept, predicted, likely, tuple(report.labels), sets)


def _named(sets: Sets, out: Array, labels: Sequence[str]) -> list[list[str]]:
    likely = softmax(out)
    order = np.argsort(-likely, axis=1, kind="stable")
    return [[labels[at] for at in ranked if held[at]] for ranked, held in zip(order, sets.of(likely), strict=True)]


def _trained(folder: Path) -> tuple[Report, Mapping[str, Any]]:
    """What is known of the model in ``folder``, and its calibration; of a soup, what is known of its first run that is still there."""
    if (folder / "report.json").is_file():
        report = Report.load(folder)
        return report, report.calibration
    soup = folder / "soup.json"
    if not soup.is_file():
        raise LuthierError(
            f"{folder} holds no finished run (no report.json) and no soup.  Finish it with luthier fit ... --resume."
        )
    runs = [Path(run) for run in json.loads(soup.read_text(encoding="utf-8"))["runs"]]
    there = next((run for run in runs if (run / "report.json").is_file()), None)
    if there is None:
        do = "Call from the folder where the soup was made, or put one of them back: it knows columns and labels."
        got = f"none of {', '.join(map(str, runs))}"
        raise LuthierError.of([Fault(str(soup), "must name a run that is still there", got, do)], "the soup")
    return Report.load(there), {}


def _free(columns: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuses data with a column where a prediction would stand."""
    taken = [name for name in names if name in columns]
    if taken:
        faults = [Fault(f"column {name!r}", "must be free for predictions", do="Rename or drop it.") for name in taken]
        raise DataError.of(faults, "the data")


def _score(report: Report, out: Outputs, cells: Sequence[Any] | None, say: Narrator) -> None:
    """Tells the report's first metric on rows that have labels, all of them such as the run learned."""
    if not cells or any(is_empty(cell) for cell in cells):
        return
    task: Task
    if report.task == "classification":
        task, labels = Classification(report.labels), as_labels({"train": cells})["train"]
        fit = {label_name(label) for label in labels} <= set(report.labels)
    else:
        task, labels = Regression(), as_labels({"train": [pointed(cell) for cell in cells]})["train"]
        fit = all(as_number(label) is not None for label in labels)
    found = scores(task, Outputs(out.logits, task.targets(labels)))[report.metric] if fit else None
    if found is not None:
        say.line(f"{report.metric} {found:.4f} on these {len(cells)} rows, by {report.data['columns']['label']!r}")
