"""What a run was called with, so that it can be called again: call.json in its folder, beside recipe.yaml."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from luthier.errors import Fault, LuthierError
from luthier.jsonfile import read_as, write_whole

NAME = "call.json"
SCHEMA = 1  # a field more is a new number


@dataclass(frozen=True)
class Call:
    """Sources and columns of one call of ``fit``; the recipe, its seed and its task are in recipe.yaml.

    A source is what the caller named: a path, a hub id, or ``demo``. None = nothing was given, or it was in memory.

    Args:
        model, data, out_domain: sources.
        splits: instead of ``data``, when that was a dict of sources by split.
        text, text_pair, label: columns of the data; None infers them.
        ood: name -> source.
        label_map: name of a shifted test -> {its label: the run's}.
        memory: what was an object in memory, which no file can name: ``model``, ``data``, ``out_domain``, ``ood.NAME``.
        paths: source -> its absolute path, of those that were on disk.
    """

    model: str | None = None
    data: str | None = None
    splits: dict[str, str] = field(default_factory=dict)
    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    ood: dict[str, str | None] = field(default_factory=dict)
    out_domain: str | None = None
    label_map: dict[str, dict[str, str]] = field(default_factory=dict)
    memory: tuple[str, ...] = ()
    paths: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        *,
        model: Any,
        data: Any,
        text: str | None = None,
        text_pair: str | None = None,
        label: str | None = None,
        ood: Mapping[str, Any] | None = None,
        out_domain: Any = None,
        label_map: Mapping[str, Mapping[str, str]] | None = None,
    ) -> Call:
        """The call that these arguments of ``fit`` make; a path is looked up from where the process now is."""
        memory: list[str] = []
        paths: dict[str, str] = {}

        def named(where: str, source: Any) -> str | None:
            if source is None:
                return None
            if not isinstance(source, (str, Path)):
                memory.append(where)
                return None
            place = os.path.expanduser(source)
            if source != "demo" and os.path.exists(place):
                paths[str(source)] = os.path.abspath(place)
            return str(source)

        on_disk = isinstance(data, Mapping) and all(isinstance(one, (str, Path)) for one in data.values())
        return cls(
            model=named("model", model),
            data=None if on_disk else named("data", data),
            splits={str(split): str(named("data", one)) for split, one in data.items()} if on_disk else {},
            text=text,
            text_pair=text_pair,
            label=label,
            ood={str(name): named(f"ood.{name}", one) for name, one in (ood or {}).items()},
            out_domain=named("out_domain", out_domain),
            label_map={str(name): dict(one) for name, one in (label_map or {}).items()},
            memory=tuple(memory),
            paths=paths,
        )

    def save(self, folder: str | Path) -> Path:
        """Writes call.json into ``folder``, whole or not at all.

        Raises:
            RunError: it cannot be written.
        """
        path = Path(folder) / NAME
        write_whole(path, json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1, ensure_ascii=False) + "\n")
        return path

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """The call that the run in ``folder`` was.

        Raises:
            LuthierError: there is no call.json, or it cannot be read as one of this version.
        """
        path = Path(folder) / NAME
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            do = "The run was made by a Luthier that did not write it: repeat it with luthier fit --recipe recipe.yaml."
            raise LuthierError.of([Fault(str(path), "must be there", do=do)], "the run folder") from None
        except (OSError, ValueError) as error:
            raise LuthierError.of([Fault(str(path), "must be JSON", str(error))], "the run folder") from None
        if not isinstance(told, dict) or told.pop("schema", None) != SCHEMA:
            do = "Read it with the version of luthier that wrote it."
            raise LuthierError.of([Fault(str(path), f"must have schema {SCHEMA}", do=do)], "the run folder")
        return read_as(cls, told, inside=str(path))

    def arguments(self) -> dict[str, Any]:
        """What ``fit`` takes, by name. None stands for what was in memory."""
        return {
            "model": self.place(self.model),
            "data": {split: self.place(one) for split, one in self.splits.items()} or self.place(self.data),
            "text": self.text,
            "text_pair": self.text_pair,
            "label": self.label,
            "ood": {name: self.place(one) for name, one in self.ood.items()},
            "out_domain": self.place(self.out_domain),
            "label_map": self.label_map,
        }

    def options(self, *more: tuple[str, str | None]) -> str:
        """The call as options of the command line, quoted for a shell; what was in memory is left out.

        Args:
            more: further options and their values, which come last; one without a value is left out.
        """
        told = [
            *(("--model", self.model), ("--data", self.data), ("--text", self.text), ("--text-pair", self.text_pair)),
            ("--label", self.label),
            *(("--ood", f"{name}={source}") for name, source in self.ood.items() if source is not None),
            ("--out-domain", self.out_domain),
            *(
                ("--map", f"{name}:{theirs}={ours}")
                for name, named in self.label_map.items()
                for theirs, ours in named.items()
            ),
            *more,
        ]
        return shlex.join(word for option, value in told if value is not None for word in (option, value))

    def place(self, source: str | None) -> str | None:
        """Where ``source`` is: as it was given where that leads to the same file or the file has gone, else its absolute path."""
        path = self.paths.get(source or "")
        if source is None or path is None:
            return source
        given = os.path.expanduser(source)
        moved = not os.path.exists(path) and os.path.exists(given)
        source = f".{os.sep}demo" if source == "demo" else source  # a folder of that name
        return source if moved or os.path.abspath(given) == path else path
