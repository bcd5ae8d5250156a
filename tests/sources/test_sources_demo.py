from __future__ import annotations

import sys
from pathlib import Path

import pytest

from luthier.errors import MissingExtra
from luthier.sources import demo


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of the corpus's shape that must not be imported: two classes, one Latin-1 file, one double."""
    package = tmp_path / "tiny_corpus_package"
    for folder, files in {"b": {"001": b"b one", "002": b"a one", "003": b"b three"},
                          "a": {"001": b"a one\n", "002": b"caf\xe9"}}.items():  # fmt: skip
        (package / "bbcnews" / "data" / folder).mkdir(parents=True)
        for name, held in files.items():
            (package / "bbcnews" / "data" / folder / f"{name}.txt").write_bytes(held)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(demo, "TEXT_PACKAGE", package.name)
    return package


def test_rows_come_class_by_class_in_turn_without_doubles(corpus: Path) -> None:
    # "a one" is in both folders; a comes first and keeps it.
    assert demo.rows().to_dict("list") == {
        "text": ["a one", "b one", "caf\u00e9", "b three"],
        "label": ["a", "b", "a", "b"],
    }
    assert corpus.name not in sys.modules


def test_the_limit_is_per_class(corpus: Path) -> None:
    assert demo.rows(1)["text"].tolist() == ["a one", "b one"]


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "TEXT_PACKAGE", "luthier_no_such_package")
    with pytest.raises(MissingExtra, match=r'luthier-no-such-package.  pip install "luthier\[demo\]"'):
        demo.rows()
