"""predict: a finished run's model on new rows: label, probability of each class, calibrated."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from luthier.core.ingredient import Findings, Outputs
from luthier.core.scores import softmax
from luthier.errors import DataError, Fault, LuthierError
from luthier.jsonfile import write_whole
from luthier.narrate import Narrator, Silent
from luthier.outputs import adjusted, logits
from luthier.report import Report
from luthier.sources.columns import Columns
from luthier.sources.data import read_unlabelled
from luthier.sources.limits import pad_id
from luthier.sources.models import reload, reload_tokenizer
from luthier.sources.text import encode


@dataclass(frozen=True)
class Predictions:
    """What a model says of rows.

    Args:
        columns: the rows' own columns.
        labels: the predicted label, or number, of each row.
        probabilities: shape (n, classes), calibrated where the run was; None for a regression.
        names: the classes.
    """

    columns: dict[str, list[Any]]
    labels: list[Any]
    probabilities: np.ndarray[Any, Any] | None
    names: tuple[str, ...]

    def table(self) -> dict[str, list[Any]]:
        """The rows' own columns, then ``prediction`` and one ``p_NAME`` a class."""
        found = {**self.columns, "prediction": self.labels}
        if self.probabilities is not None:
            for at, name in enumerate(self.names):
                found[f"p_{name}"] = [float(value) for value in self.probabilities[:, at]]
        return found

    def save(self, path: str | Path) -> None:
        """Writes a .csv, .tsv or .jsonl, whole or not at all.

        Raises:
            DataError: the ending is none of these.
        """
        import pandas as pd

        path = Path(path)
        if path.suffix not in (".csv", ".tsv", ".jsonl"):
            raise DataError.of(
                [Fault(str(path), "must end in .csv, .tsv or .jsonl", path.suffix or "no ending")], "--out"
            )
        frame = pd.DataFrame(self.table())
        if path.suffix == ".jsonl":
            lines = (json.dumps(row, ensure_ascii=False, default=str) for row in frame.to_dict("records"))
            text = "".join(line + "\n" for line in lines)
        else:
            text = frame.to_csv(index=False, sep="\t" if path.suffix == ".tsv" else ",")
        write_whole(path, text)


def predict(run: str | Path, data: Any, *, narrator: Narrator | None = None) -> Predictions:
    """The predictions of a finished run's model for ``data``.

    Args:
        run: the run folder.
        data: one file or DataFrame with the text columns the run was trained on; labels are not needed.
        narrator: who says what happens.
    Raises:
        LuthierError: the run has not ended, or the data lacks a column.
    """
    say = narrator or Silent()
    folder = Path(run)
    if not (folder / "report.json").is_file():
        raise LuthierError(
            f"{folder} holds no finished run (no report.json).  Finish it with luthier fit ... --resume."
        )
    report = Report.load(folder)
    columns = report.data["columns"]
    split, frame = read_unlabelled(data, Columns(columns["text"], columns.get("text_pair")))
    model, tokenizer = reload(folder / "model"), reload_tokenizer(folder / "model")
    encoded = encode(tokenizer, split, max_length=report.model["max_length"])
    if encoded.truncated:
        say.line(
            f"{encoded.truncated} of {len(encoded)} texts are longer than {report.model['max_length']} tokens and are cut"
        )
    with say.bar("predicting", len(encoded)) as bar:
        out = logits(model, encoded, pad_id=pad_id(model, tokenizer), tick=bar.advance)
    kept = {str(name): frame[name].tolist() for name in frame}
    if report.task == "regression":
        return Predictions(kept, [float(value) for value in out[:, 0]], None, ())
    told = report.calibration
    changed = adjusted(Outputs(out, np.zeros(len(out))), Findings.of(told))
    likely = softmax(changed.logits)
    return Predictions(kept, [report.labels[at] for at in likely.argmax(axis=1)], likely, tuple(report.labels))
