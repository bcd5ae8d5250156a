"""starter: a first recipe for one's own data, every choice explained in its comments."""

from __future__ import annotations

import json
import re
import shlex
from typing import Any

from luthier.call import Call
from luthier.sources.data import read
from luthier.sources.tasks import decide

_TEMPLATE = """\
# A starter recipe for {source}: {sentence}
# {sizes}
# {command}     shows what it will do; trains nothing
# luthier methods     lists what else can be put under 'ingredients'
name: {name}
seed: 0
task: {task}
max_length: {length}          # tokens kept of each text; longer ones are cut, and counted
stages:
  - name: probe
    solver: exact            # the head alone, solved on cached features: seconds, not minutes
    ingredients:
      - freeze: {{keep: [head]}}
  - name: finetune
    epochs: {epochs}               # {why}
    learning_rate: 2e-5
    batch_size: {batch}           # rows in one step; 'micro_batch: 4' would split it to save memory
    ingredients:
      - anneal: {{shape: linear, warmup: 0.1}}
      - adamw: {{weight_decay: 0.01}}
      - clip: {{max_norm: 1.0}}
      # - llrd: {{decay: 0.95}}        # smaller rates for lower layers
      # - swa: {{start: 0.75}}         # average the last quarter's weights{calibration}
"""

# Letters of Chinese, Japanese and Korean, and their punctuation.
_IDEOGRAPHS = re.compile("[\u3000-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]")


def starter(
    source: Any,
    *,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    file: str = "recipe.yaml",
) -> tuple[str, list[str]]:
    """A recipe as text, and the lines to print: what was inferred, and the next command.

    Raises:
        DataError: the data cannot be read or learned from.
    """
    data = read(source, text=text, text_pair=text_pair, label=label)
    task, sentence = decide(data)
    train = data.splits["train"]
    rows = len(train)
    tokens = sorted(map(sum, zip(*(map(_tokens, cells) for cells in (train.texts, train.pairs) if cells), strict=True)))
    long = tokens[int(0.95 * (len(tokens) - 1))]
    length = next((size for size in (64, 128, 256) if long < size), 512)
    few = rows < 1000
    asked = Call.of(model="MODEL", data=source, text=text, text_pair=text_pair, label=label)
    command = f"luthier plan --recipe {shlex.quote(file)} {asked.options()}"
    made = _TEMPLATE.format(
        source=_line(str(source)),
        sentence=_line(sentence),
        sizes=_line(", ".join(f"{name} {len(split)} rows" for name, split in data.splits.items())),
        command=_line(command),
        name=json.dumps(_line(file.rpartition("/")[2].removesuffix(".yaml")), ensure_ascii=False),
        task=task.kind,
        length=length,
        epochs=10 if few else 3,
        why=f"{rows} rows are few: more passes at a small rate are steadier" if few else f"{rows} rows",
        batch=16,
        calibration="\n      - temperature" if task.kind == "classification" else "",
    )
    lines = [*data.notes, sentence, f"wrote {file}", "", "next:"]
    return made, [*lines, f"  {command}"]


def _tokens(text: str) -> float:
    """About how many tokens ``text`` is: three for two words, or one for four letters, where that is more; each ideograph is one."""
    words = text.split()
    letters, alone = sum(map(len, words)), len(_IDEOGRAPHS.findall(text))
    return max(1.5 * len(words), alone + (letters - alone) / 4)


def _line(text: str) -> str:
    """``text`` with a blank for each letter that would end a comment of YAML, or that YAML does not have."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
