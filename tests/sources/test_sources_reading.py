from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest

from luthier.errors import DataError
from luthier.sources.columns import Columns
from luthier.sources.data import read, read_unlabelled
from luthier.sources.tables import read_table
from tests.tinyfolder import tiny_tokenizer

# What a careless reader loses: a separator, quotes, a line break, U+2028, words that pandas takes for nothing.
TEXTS = [
    'a, "quoted" word',
    "two\nlines",
    "NA",
    "null",
    "None",
    "nan",
    "caf\u00e9 \u2028 \U0001f600",
    "tab\there",
    " x ",
    "1e5",
]
LABELS = ["pos", "neg"] * 5
ROWS = [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS, strict=True)]
FORMATS = [".csv", ".tsv", ".jsonl", ".json", ".parquet"]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    frame = pd.DataFrame(rows)
    kind = next(suffix for suffix in path.suffixes if suffix in FORMATS)
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    if kind in (".csv", ".tsv"):
        frame.to_csv(plain, index=False, sep="\t" if kind == ".tsv" else ",")
    elif kind == ".jsonl":
        plain.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    elif kind == ".json":
        plain.write_text(json.dumps(rows), encoding="utf-8")
    else:
        frame.to_parquet(plain)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    return path


def many(n: int) -> list[dict[str, Any]]:
    return [{"text": f"text number {i}", "label": "ab"[i % 2]} for i in range(n)]


@pytest.mark.parametrize("ending", [kind + gz for kind in FORMATS for gz in ("", ".gz")])
def test_every_format_gives_back_each_cell_as_it_was(tmp_path: Path, ending: str) -> None:
    table = read_table(write(tmp_path / f"rows{ending}", ROWS))
    assert table == {"text": TEXTS, "label": LABELS}


def test_every_format_has_the_same_digest(tmp_path: Path) -> None:
    rows = [{"text": row["text"], "label": i % 2} for i, row in enumerate(ROWS * 3)]
    digests = {read(write(tmp_path / f"rows{kind}", rows)).digest for kind in FORMATS}
    assert digests == {read(pd.DataFrame(rows)).digest}


def test_the_digest_changes_with_one_letter_and_with_one_label() -> None:
    rows = many(20)
    base = read(pd.DataFrame(rows)).digest
    other_text = read(pd.DataFrame([{**rows[0], "text": "Text number 0"}, *rows[1:]])).digest
    assert len({base, other_text, read({"train": pd.DataFrame(rows), "validation": pd.DataFrame(rows)}).digest}) == 3


def test_a_byte_order_mark_is_not_part_of_the_first_column_name(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbftext,label\nx,1\n")
    assert list(read_table(path)) == ["text", "label"]


@pytest.mark.parametrize("coding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl"])
def test_utf_16_is_known_by_its_byte_order_mark(tmp_path: Path, name: str, coding: str) -> None:
    told = {"a.csv": "text,label\r\ncaf\u00e9,1\r\n", "a.tsv": "text\tlabel\r\ncaf\u00e9\t1\r\n"}
    path = tmp_path / name
    path.write_bytes(("\ufeff" + told.get(name, '{"text": "caf\u00e9", "label": "1"}\n')).encode(coding))
    assert read_table(path) == {"text": ["caf\u00e9"], "label": ["1"]}


def test_torn_utf_16_is_told_as_such(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("\ufefftext,label\n".encode("utf-16-le")[:-1])
    with pytest.raises(DataError, match="a.csv  must be UTF-16, as its first two bytes say; got .*-f utf-16 -t utf-8"):
        read_table(path)


def test_semicolons_separate_when_the_header_has_no_comma(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text;label\na, b;1\n")
    assert read_table(path) == {"text": ["a, b"], "label": ["1"]}


def test_a_tsv_with_stray_quotes_is_read_as_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('text\tlabel\n"tis the season\t1\nsay "no" to\t0\n')
    assert read_table(path) == {"text": ['"tis the season', 'say "no" to'], "label": ["1", "0"]}


def test_a_quote_that_opens_one_tsv_line_and_closes_the_next_does_not_join_them(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('text\tlabel\n"one\t1\ntwo"\t0\n')
    assert read_table(path) == {"text": ['"one', 'two"'], "label": ["1", "0"]}


def test_a_json_file_may_hold_columns_or_a_list_under_one_key_or_lines(tmp_path: Path) -> None:
    wanted = {"text": ["a", "b"], "label": [0, 1]}
    for number, held in enumerate(
        ['{"text": ["a", "b"], "label": [0, 1]}', '{"data": [{"text": "a", "label": 0}, {"text": "b", "label": 1}]}',
         '{"text": "a", "label": 0}\n{"text": "b", "label": 1}']
    ):  # fmt: skip
        path = tmp_path / f"{number}.json"
        path.write_text(held)
        assert read_table(path) == wanted


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.csv", b"text,label\na,1\nb\n", "a.csv, line 3  must have 2 fields, as the first line has; got 1"),
        ("a.csv", b"text,label\na,1,2\n", "a.csv, line 2  must have 2 fields, as the first line has; got 3"),
        ("a.csv", b'text,label\n"a"b,1\n', "a.csv, line 2  must be quoted as csv is"),
        ("a.csv", b"text,label\na,1\ncaf\xe9,0\n", "a.csv, line 3  must be UTF-8; got byte 0xe9"),
        ("a.csv", b"", "a.csv  must have a first line with column names; got an empty file"),
        ("a.csv", b"text,text\na,1\n", "a.csv, line 1  must name each column once; got 'text' more than once"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl, line 2  must be one JSON object a line"),
        ("a.jsonl", b"[1]\n", "a.jsonl, line 1  must be one JSON object a line; got list"),
        ("a.json", b"3", "a.json  must hold a list of objects, or one list a column; got int"),
        ("a.json", b"{", "a.json  must be JSON"),
        ("a.parquet", b"nothing", "a.parquet  must be a parquet file"),
        ("a.csv.gz", b"nothing", "a.csv.gz  must be a readable file; got BadGzipFile"),
        ("a.xlsx", b"nothing", "a.xlsx  must end in .csv, .tsv, .jsonl, .json or .parquet"),
    ],
)
def test_a_broken_file_is_told_with_its_name_and_line(tmp_path: Path, name: str, data: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        read(path)
    assert said in str(caught.value)


def test_ragged_lines_are_told_together_and_the_rest_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "a\n" * 7)
    with pytest.raises(DataError) as caught:
        read(path)
    assert [fault.where for fault in caught.value.faults] == [*(f"a.csv, line {i}" for i in range(2, 7)), "a.csv"]
    assert "has 2 more such lines" in str(caught.value)


def test_a_folder_of_mixed_formats_becomes_splits_in_order(tmp_path: Path) -> None:
    write(tmp_path / "ood_tweets.parquet", many(4))
    write(tmp_path / "train.csv.gz", many(12))
    write(tmp_path / "dev.jsonl", many(6))
    write(tmp_path / "test.tsv", many(5))
    write(tmp_path / "extra.csv", many(5))
    data = read(tmp_path)
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 12, "validation": 6, "test": 5, "ood_tweets": 4,
    }  # fmt: skip
    assert list(data.splits) == ["train", "validation", "test", "ood_tweets"]
    assert "not read: extra.csv (read are train, validation, test, ood_NAME, out_domain)" in data.notes


def test_shards_of_one_split_are_joined(tmp_path: Path) -> None:
    for number in range(2):
        write(tmp_path / f"train-0000{number}-of-00002.parquet", many(10 + number))
    write(tmp_path / "validation.csv", many(4))
    assert len(read(tmp_path).splits["train"]) == 21
    (tmp_path / "train-00000-of-00002.parquet").rename(tmp_path / "train-00000-of-00002-0123456789abcdef.parquet")
    assert len(read(tmp_path).splits["train"]) == 21  # as older hubs named them


def test_a_shard_that_is_not_there_or_twice_is_told(tmp_path: Path) -> None:
    for name in ("train-00000-of-00003", "train-00001-of-00003", "train-00001-of-00003-0123456789abcdef"):
        write(tmp_path / f"{name}.parquet", many(10))
    must = "must have each shard of train once; got no train-00002-of-00003, twice train-00001-of-00003"
    with pytest.raises(DataError, match=must):
        read(tmp_path)


def test_a_folder_without_train_or_with_two_of_one_split_is_refused_with_both_told(tmp_path: Path) -> None:
    write(tmp_path / "dev.csv", many(4))
    write(tmp_path / "valid.csv", many(4))
    with pytest.raises(DataError) as caught:
        read(tmp_path)
    assert [fault.must for fault in caught.value.faults] == [
        "must have one file for validation",
        "must have a train file",
    ]


def test_train_and_test_without_validation_takes_a_tenth_of_train(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", many(100))
    write(tmp_path / "test.csv", many(7))
    data = read(tmp_path)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 90, "validation": 10, "test": 7}
    assert "validation: 10 % of train, stratified by label, seed 0" in data.notes


def test_train_and_validation_without_test_says_that_there_is_none(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", many(10))
    write(tmp_path / "validation.csv", many(7))
    data = read(tmp_path)
    assert list(data.splits) == ["train", "validation"]
    assert "test: there is none, so nothing is measured on unseen rows" in data.notes


def test_a_test_without_labels_is_left_out_and_said(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", many(10))
    write(tmp_path / "validation.csv", many(7))
    write(tmp_path / "test.csv", [{"text": "a"}, {"text": "b"}])
    data = read(tmp_path)
    assert "test" not in data.splits
    assert any(note.startswith("test: has no labels, so it is left out") for note in data.notes)


def test_empty_labels_are_told_with_file_rows_and_count_in_every_split(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", [*many(4), {"text": "x", "label": " "}, {"text": "y", "label": ""}])
    write(tmp_path / "dev.jsonl", [*many(2), {"text": "x", "label": None}])
    with pytest.raises(DataError) as caught:
        read(tmp_path)
    assert [(fault.where, fault.got) for fault in caught.value.faults] == [
        ("train.csv, rows 5, 6", "none in 2 of 6 rows"),
        ("dev.jsonl, row 3", "none in 1 of 3 rows"),
    ]


def test_a_label_named_na_is_a_label(tmp_path: Path) -> None:
    data = read(write(tmp_path / "a.csv", [{"text": f"t{i}", "label": ["NA", "None"][i % 2]} for i in range(20)]))
    assert set(data.splits["train"].labels or ()) == {"NA", "None"}


def test_a_column_that_one_split_lacks_is_told_with_a_guess(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", many(4))
    write(tmp_path / "dev.csv", [{"txt": "x", "label": "a"}])
    with pytest.raises(DataError, match=r"dev.csv  must have the column 'text'; got txt, label.  Did you mean 'txt'"):
        read(tmp_path)


def test_a_split_without_rows_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", many(4))
    (tmp_path / "dev.csv").write_text("text,label\n")
    with pytest.raises(DataError, match="validation  must have rows; got 0"):
        read(tmp_path)


def test_a_file_without_column_names_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("what a fine film,good\n" + "\n".join(f"film {i},{['good', 'bad'][i % 2]}" for i in range(20)))
    with pytest.raises(DataError, match="must begin with column names; got 'good', which is a label below"):
        read(path)


def test_a_label_column_may_be_named_like_a_class_where_a_header_cannot_be_missing(tmp_path: Path) -> None:
    rows = [{"text": f"text number {i}", "toxic": ["toxic", "clean"][i % 2]} for i in range(20)]
    for kind in (".jsonl", ".json", ".parquet"):
        assert read(write(tmp_path / f"a{kind}", rows)).columns.label == "toxic"
    frame = pd.DataFrame(rows)
    assert read(frame, ood={"x": frame}).columns.label == read(datasets.Dataset.from_list(rows)).columns.label
    for kind in (".csv", ".tsv", ".csv.gz"):
        path = write(tmp_path / f"a{kind}", rows)
        with pytest.raises(DataError, match="must begin with column names.*or say --label toxic if it is one"):
            read(path)
        with pytest.raises(DataError, match=r"a\..*must begin with column names"):
            read({"train": path})
        assert set(read(path, label="toxic").splits["train"].labels or ()) == {"toxic", "clean"}


def test_a_frame_with_a_column_name_twice_is_refused_as_csv_is() -> None:
    frame = pd.DataFrame([["a", 0, 1]] * 20, columns=["text", "label", "label"])
    with pytest.raises(DataError, match="the DataFrame  must name each column once; got 'label' more than once"):
        read(frame)
    with pytest.raises(DataError, match="got '1' more than once"):
        read(pd.DataFrame([["a", 0, 1]], columns=["text", 1, "1"]))


def test_half_a_surrogate_pair_is_a_question_mark_in_texts_labels_and_what_is_written_of_them(tmp_path: Path) -> None:
    half = "good \ud83d"
    rows = [{"text": f"{half} {i}", "pair": half, "label": ["x\ud83d", "y"][i % 2]} for i in range(20)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    for source in (path, pd.DataFrame(rows, dtype=object)):
        data = read(source, text_pair="pair", ood={"same": source})
        for split in (data.splits["train"], data.splits["ood_same"]):
            assert all(text.startswith("good ? ") for text in split.texts)
            assert (set(split.pairs or ()), set(split.labels or ())) == ({"good ?"}, {"x?", "y"})
        split, frame = read_unlabelled(source, Columns("text", "pair"))
        tiny_tokenizer()(list(split.texts), list(split.pairs or ()))
        frame.to_csv(tmp_path / "said.csv")
    path.write_text("\n".join(json.dumps({**row, "text": f"\U0001f600 {i}"}) for i, row in enumerate(rows)))
    assert read(path).splits["train"].texts[0].startswith("\U0001f600")  # a whole pair stays


def test_ood_sources_are_added_by_name_and_one_given_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", many(20))
    shifted = write(tmp_path / "shifted.jsonl", many(3))
    data = read(path, ood={"tweets": str(shifted), "frame": pd.DataFrame(many(2))})
    assert [len(data.splits[name]) for name in ("ood_tweets", "ood_frame")] == [3, 2]
    with pytest.raises(DataError, match="ood_x  must be given once"):
        read({"train": pd.DataFrame(many(20)), "ood_x": pd.DataFrame(many(2))}, ood={"x": str(shifted)})


def test_out_domain_rows_given_twice_are_refused_with_both_places_and_a_cure(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "train.csv", many(20))
    write(folder / "out_domain.csv", many(3))
    other = write(tmp_path / "theirs.csv", many(3))
    with pytest.raises(DataError) as caught:
        read(folder, out_domain=other)
    (fault,) = caught.value.faults
    assert fault.got == f"out_domain.csv of {folder}, and {other}" and "--set data=null" in fault.do


def test_frames_datasets_and_dicts_of_them_are_read_alike() -> None:
    rows = many(30)
    frame, dataset = pd.DataFrame(rows), datasets.Dataset.from_list(rows)
    assert read(frame).digest == read(dataset).digest == read({"train": frame}).digest
    both = {"train": rows[:20], "test": rows[20:]}
    as_dict = datasets.DatasetDict({name: datasets.Dataset.from_list(part) for name, part in both.items()})
    as_frames = {name: pd.DataFrame(part) for name, part in both.items()}
    assert read(as_dict).digest == read(as_frames).digest


def test_named_classes_of_a_dataset_come_as_names_and_minus_one_as_no_label() -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )

    def part(labels: list[int]) -> datasets.Dataset:
        return datasets.Dataset.from_dict(
            {"text": [f"t{i}" for i in range(len(labels))], "label": labels}, features=features
        )

    data = read({"train": part([0, 1] * 5), "validation": part([1, 0]), "test": part([-1, -1])})
    assert data.splits["validation"].labels == ("good", "bad")
    assert "test" not in data.splits


def test_missing_cells_of_a_frame_are_empty_not_the_word_nan() -> None:
    frame = pd.DataFrame({"text": ["a", None, float("nan")] * 4, "label": [0.0, 1.0, float("nan")] * 4})
    with pytest.raises(DataError, match="must have a label in 'label'; got none in 4 of 12 rows"):
        read(frame)
    split, _ = read_unlabelled(frame, Columns("text"))
    assert split.texts[:3] == ("a", "", "")


def test_a_dict_without_train_and_a_thing_that_holds_no_rows_are_refused() -> None:
    with pytest.raises(DataError, match=r"must have a 'train' split; got 'trian'.  Did you mean 'train'"):
        read({"trian": pd.DataFrame(many(3))})
    with pytest.raises(DataError, match="must be something that holds rows; got a int in memory"):
        read(3)


def test_whole_numbers_are_ints_whatever_the_format_and_a_leading_zero_is_text(tmp_path: Path) -> None:
    def labels(cells: list[Any], kind: str) -> set[Any]:
        rows = [{"text": f"t {i}", "label": cell} for i, cell in enumerate(cells * 10)]
        return {
            (type(label).__name__, label)
            for label in read(write(tmp_path / f"a{kind}", rows)).splits["train"].labels or ()
        }

    for kind in FORMATS:
        assert labels([0, 1], kind) == {("int", 0), ("int", 1)}
        assert labels([0.5, 1.0], kind) == {("float", 0.5), ("float", 1.0)}
        assert labels(["01", "02"], kind) == {("str", "01"), ("str", "02")}
        assert labels(["1", "one"], kind) == {("str", "1"), ("str", "one")}


def test_unlabelled_rows_come_with_their_own_columns_in_their_own_order(tmp_path: Path) -> None:
    path = tmp_path / "new.csv"
    path.write_text("id,text,text2\n07,one,uno\n08,NA,\n")
    split, frame = read_unlabelled(path, Columns("text", "text2", "label"))
    assert (split.texts, split.pairs, split.labels) == (("one", "NA"), ("uno", ""), None)
    assert frame.to_dict("list") == {"id": ["07", "08"], "text": ["one", "NA"], "text2": ["uno", ""]}


def test_unlabelled_rows_without_the_text_column_are_refused_with_a_guess(tmp_path: Path) -> None:
    path = tmp_path / "new.csv"
    path.write_text("texts\none\n")
    with pytest.raises(DataError, match=r"must have the column 'text'; got texts.  Did you mean 'texts'"):
        read_unlabelled(path, Columns("text"))


def test_a_list_is_no_text_to_learn_from_or_to_predict() -> None:
    rows: list[dict[str, Any]] = [*many(20), {"text": ["a", "b"], "label": "a"}]
    source = pd.DataFrame(rows)
    must = r"row 21 +must have one text in 'text'; got list.  Join each into one text, or drop them."
    with pytest.raises(DataError, match=must):
        read(source, text="text", label="label")
    with pytest.raises(DataError, match=must):
        read_unlabelled(source, Columns("text"))
