"""A pretrained model with a head of its own seed, and its tokenizer. Where transformers is imported for models."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from logging import ERROR
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from luthier.core.anatomy import Anatomy
from luthier.core.families import Family
from luthier.core.heads import two_layers
from luthier.core.seeds import borrowed
from luthier.errors import Fault, did_you_mean
from luthier.sources.demo import model_folder
from luthier.sources.heads import draw, names_of, outputs, same_classes
from luthier.sources.limits import error, max_length_of, pad, rows_for, types
from luthier.sources.places import is_hub_id, not_found
from luthier.sources.tasks import Task

# Hub ids from before organisations had names; all other ids have one slash, so that a mistyped folder asks nobody.
BARE_IDS = (
    "bert-base-uncased", "bert-base-cased", "bert-large-uncased", "bert-base-multilingual-cased", "roberta-base",
    "roberta-large", "distilbert-base-uncased", "distilroberta-base", "albert-base-v2", "xlm-roberta-base", "gpt2",
    "t5-small", "t5-base",
)  # fmt: skip
# What transformers, tokenizers and safetensors raise when a folder or an id is not what they can load.
_BROKEN = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError, SafetensorError)


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model ready to be planned.

    Args:
        model: in eval mode, on the CPU.
        tokenizer: with a pad token.
        source: what the user named.
        digest: sha256 over the start weights, pretrained and head.
        fresh: weights that were drawn, not loaded: the head's, as a rule.
        max_length: tokens at which texts are cut.
        notes: what a user should know of how it was loaded, a line each.
        pretrained: sha256 over the weights that were loaded, without those drawn.
    """

    model: Any  # a transformers.PreTrainedModel
    tokenizer: Any
    source: str
    digest: str
    fresh: tuple[str, ...]
    max_length: int
    notes: tuple[str, ...] = ()
    pretrained: str = ""


def load(
    source: Any,
    task: Task,
    *,
    seed: int,
    max_length: int | None = None,
    head: Literal["own", "mlp"] = "own",
    family: Family | None = None,
) -> Loaded:
    """The model and tokenizer at ``source``, for ``task``.

    Weights that the checkpoint lacks are drawn by the model's own rule from the stream ``head`` of ``seed``; loaded
    weights are the same for every seed, and the global generator is as it was. A checkpoint's own head is kept when its
    classes are the task's, else drawn anew.

    Args:
        source: a folder; a hub id; ``demo`` (a folder of that name is ``./demo``); or (model, tokenizer), taken as is,
            but for what is done in place: half precision becomes single, and the head is drawn anew where its config
            names other labels, or the same in another order, or where ``head`` is mlp.
        max_length: tokens; None takes what tokenizer and model allow, 512 at most.
        head: ``mlp`` draws all of a head of two layers anew (``two_layers``), even where the checkpoint has one.
        family: where the parts of a model are, for families that Luthier does not know.
    Raises:
        ModelError: nothing is there, it is no model for sequence classification, ``max_length`` is beyond it, it
            cannot have the head that is asked for, or its tokenizer knows more tokens than it has embeddings for.
        MissingExtra: ``demo`` without ``luthier[demo]``.
    """
    fresh: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    cast: tuple[str, ...] = ()
    if isinstance(source, tuple):
        model, tokenizer = _given(source, task)
        cast = _single(model)
        fresh, notes = _renamed(model, task, seed)
        name = f"a {type(model).__name__} in memory"
    elif not isinstance(source, (str, Path)):
        do = "Give model=(model, tokenizer), with the tokenizer that it was pretrained with."
        must = "must be a folder, a hub id or (model, tokenizer)"
        raise error(Fault("model", must, type(source).__name__, do), "the model")
    else:
        name = str(source)
        place, local = _place(source)
        model, tokenizer, fresh, notes = _loaded(place, task, name=name, local=local, seed=seed)
    if head == "mlp":
        fresh, notes = _drawn(model, fresh, seed, family)
    pad(model, tokenizer, name)
    rows_for(model, tokenizer, name)
    types(model, tokenizer)
    width = max_length_of(model, tokenizer, max_length, name)
    state = model.state_dict()
    loaded = digest({name: value for name, value in state.items() if name not in fresh})
    return Loaded(model, tokenizer, name, digest(state), fresh, width, (*cast, *notes), loaded)


def reload(folder: str | Path) -> Any:
    """The model that a run saved, as it is, in eval mode, on the CPU; nothing is drawn and the network is not asked.

    Raises:
        ModelError: there is no model in ``folder``, or it is torn.
    """
    place, _ = _place(Path(folder))
    with _quiet(bars=False), _told(str(folder)):
        model = AutoModelForSequenceClassification.from_pretrained(
            place, local_files_only=True, trust_remote_code=False
        )
    _align(model)
    return model.eval()  # type: ignore[no-any-return]


def reload_tokenizer(folder: str | Path) -> Any:
    """The tokenizer that a run saved beside its model.

    Raises:
        ModelError: there is none in ``folder``.
    """
    place, _ = _place(Path(folder))
    with _quiet(bars=False), _told(str(folder)):
        return AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)


def store(model: Any, tokenizer: Any, folder: Path) -> None:
    """Saves model and tokenizer as plain transformers loads them."""
    with _quiet(bars=False):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def digest(state: Mapping[str, torch.Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes of the tensors, in the order of their names."""
    told = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        told.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        told.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return told.hexdigest()


def _place(source: str | Path) -> tuple[str, bool]:
    """A folder on this machine (and True), or a hub id (and False)."""
    if source == "demo":
        return str(model_folder()), True
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            there = ", ".join(sorted(each.name for each in path.iterdir())[:6]) or "an empty folder"
            inner = "  Did you mean its folder model/?" if (path / "model" / "config.json").exists() else ""
            do = f"Name a folder that save_pretrained wrote.{inner}"
            raise error(Fault(str(source), "must have a config.json", there, do), "the model")
        return str(path), True
    if not path.exists() and isinstance(source, str) and (is_hub_id(source) or source in BARE_IDS):
        return source, False
    got = "a file" if path.exists() else "nothing there"
    do = "Name the folder it is in." if path.exists() else did_you_mean(str(source), BARE_IDS) or not_found(str(source))
    raise error(Fault(str(source), "must be a model's folder, or a hub id", got, do), "the model")


def _loaded(
    place: str, task: Task, *, name: str, local: bool, seed: int
) -> tuple[nn.Module, Any, tuple[str, ...], tuple[str, ...]]:
    own: dict[str, Any] = {"local_files_only": True} if local else {}
    own["trust_remote_code"] = False
    with _told(name), _quiet(bars=not local), borrowed(seed, "head"):
        config = AutoConfig.from_pretrained(place, **own)
        had = dict(config.id2label or {})
        tokenizer = AutoTokenizer.from_pretrained(place, **own)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            place, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **names_of(task), **own
        )
    fresh = {key if isinstance(key, str) else key[0] for key in (*info["missing_keys"], *info["mismatched_keys"])}
    fresh &= {key for key, _ in model.named_parameters()}
    notes = []
    ends = set(outputs(model, task))
    if info["mismatched_keys"] or not (ends & fresh or same_classes(had, task)):
        fresh |= ends
        notes.append(f"the checkpoint's head is for other labels ({_few(had)}): a new one is drawn")
    if not fresh:
        notes.append("the checkpoint's head is for these labels, and is kept")
    with borrowed(seed, "head"):
        draw(model, fresh)
    _align(model)
    return model.eval(), tokenizer, tuple(key for key, _ in model.named_parameters() if key in fresh), tuple(notes)


def _drawn(
    model: Any, fresh: tuple[str, ...], seed: int, family: Family | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Draws both layers of the head anew, in place; gives the names of all weights that were drawn, and what to say.

    What is ``fresh`` already is drawn once more from the start of the stream, so that nothing changes where it is the
    whole head.
    """
    if not isinstance(model, PreTrainedModel):
        do = "Give its folder or id, or say head: own."
        raise error(
            Fault("head", "can be mlp for transformers' own models only", type(model).__name__, do), "the model"
        )
    anatomy = Anatomy.of(model, two_layers(model, family))
    head = [part.name for part in anatomy.parts if part.role == "head"]
    with borrowed(seed, "head"):
        draw(model, {*fresh, *head})
    layers = dict.fromkeys(name.rpartition(".")[0] for name in head)
    names = tuple(name for name, _ in model.named_parameters() if name in {*fresh, *head})
    return names, (f"the head is {', '.join(layers)}, drawn anew",)


def _given(source: tuple[Any, ...], task: Task) -> tuple[Any, Any]:
    """A (model, tokenizer) pair as it is, once it is known to have an output a label."""
    if len(source) != 2 or not isinstance(source[0], nn.Module) or not callable(source[1]):
        told = ", ".join(type(each).__name__ for each in source) or "nothing"
        raise error(Fault("model", "must be (model, tokenizer)", told), "the model")
    model, tokenizer = source
    config = getattr(model, "config", None)
    if config is None or getattr(config, "num_labels", None) != task.num_labels:
        got = f"{getattr(config, 'num_labels', 'no config')}"
        do = f"Load it with num_labels={task.num_labels}, or give its folder or id instead."
        raise error(Fault("model", f"must have {task.num_labels} outputs, one a label", got, do), "the model")
    return model, tokenizer


def _single(model: nn.Module) -> tuple[str, ...]:
    """Casts what is in half precision to single, in place, as a folder's weights are; gives what to say of it."""
    found = [each for each in (*model.parameters(), *model.buffers()) if each.dtype in (torch.float16, torch.bfloat16)]
    told = ", ".join(sorted({str(each.dtype).removeprefix("torch.") for each in found}))
    for each in found:
        each.grad = None
        each.data = each.data.float()
    return (f"the model is in half precision ({told}): it is cast to single, in place",) if found else ()


def _renamed(model: Any, task: Task, seed: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Writes the label names into a given model's config, in place; gives the weights drawn anew, and what to say.

    A head whose names are other ones, or in another order, is drawn anew, as a checkpoint's is. A head without names
    (LABEL_0, ...) is the caller's own, and taken for the task's.
    """
    had = dict(getattr(model.config, "id2label", None) or {})
    kept = all(str(name) == f"LABEL_{i}" for i, name in had.items()) or same_classes(had, task)
    ends = set() if kept or not isinstance(model, PreTrainedModel) else set(outputs(model, task))
    if not kept and not ends:
        do = "Give its config the data's labels in this order, with a head that is for them."
        raise error(Fault("model", f"must be for the labels {', '.join(task.label_names)}", _few(had), do), "the model")
    if ends:
        with borrowed(seed, "head"):
            draw(model, ends)
    model.config.id2label, model.config.label2id = names_of(task)["id2label"], names_of(task)["label2id"]
    model.config.problem_type = task.problem_type
    notes = (f"the model's head is for other labels ({_few(had)}): a new one is drawn, in place",) if ends else ()
    return tuple(name for name, _ in model.named_parameters() if name in ends), notes


def _few(names: Mapping[int, Any]) -> str:
    """The first five of a config's label names."""
    return ", ".join(map(str, list(names.values())[:5]))


@contextmanager
def _quiet(*, bars: bool) -> Iterator[None]:
    """No reports of newly drawn weights on the terminal, and no bars but for downloads; the levels come back."""
    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(ERROR)
    if shown and not bars:
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def _told(name: str) -> Iterator[None]:
    """What transformers raises about ``name``, as one line and what to do."""
    try:
        yield
    except _BROKEN as broken:
        said = str(broken).strip().split("\n")[0] or type(broken).__name__
        do = "It needs config, weights and tokenizer, of a family that AutoModelForSequenceClassification knows."
        raise error(Fault(name, "must load with transformers", said.rstrip("."), do), "the model") from broken


def _align(model: nn.Module) -> None:
    """Weights at addresses that are multiples of 64, in place.

    A file's weights are mapped where its header ends, and CPU kernels round in another order at another alignment: the
    same weights from two files gave logits that differ in the last bit.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()
