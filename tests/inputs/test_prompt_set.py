"""Prompts of a sweep: files of every kind say the same, and every error names its place."""

from __future__ import annotations

import json

import pytest
import torch

from depass_fast import LogProb, PromptSet
from depass_fast.inputs.prompt_set import Item
from depass_fast.inputs.tables import open_table

pytest.importorskip("pyarrow")
RECORDS = [
    {"prompt": "a b", "target": " c", "id": "one", "position": 1},
    {"prompt": 'she said "d,\ne"', "target": " f", "id": "two", "position": -1},
]


def written(folder, ending):
    """The same records in a file of a kind."""
    import pandas

    path = folder / f"prompts{ending}"
    frame = pandas.DataFrame(RECORDS)
    if ending in (".jsonl", ".ndjson"):
        path.write_text("\n".join(map(json.dumps, RECORDS)) + "\n\n", encoding="utf-8-sig")
    elif ending == ".json":
        path.write_text(json.dumps(RECORDS, indent=1))
    elif ending == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False, sep="," if ending == ".csv" else "\t")
    return path


@pytest.mark.parametrize("ending", [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"])
def test_every_kind_of_file_says_the_same(tmp_path, ending):
    prompts = PromptSet.read(written(tmp_path, ending))
    assert [(one.id, one.prompt, one.target, one.position) for one in prompts] == [
        ("one", "a b", " c", 1),
        ("two", 'she said "d,\ne"', " f", -1),
    ]
    assert [one.id for one in prompts] == ["one", "two"], "it can be gone through again"
    assert prompts.checked() == PromptSet.read(written(tmp_path, ".jsonl")).checked()


def test_a_folder_of_parquet_files_is_one_set(tmp_path):
    written(tmp_path, ".parquet").rename(tmp_path / "b.parquet")
    written(tmp_path, ".parquet").rename(tmp_path / "a.parquet")
    assert len(list(PromptSet.read(tmp_path))) == 4


def test_fields_by_name_ids_messages_and_lists(tmp_path):
    path = tmp_path / "x.jsonl"
    chat = [{"role": "user", "content": "Hello"}]
    path.write_text(json.dumps({"text": chat, "answers": [" a", 7], "foil": 3, "at": [0, -1], "key": 9}) + "\n")
    names = {"prompt": "text", "target": "answers", "contrast": "foil", "position": "at", "id": "key"}
    (item,) = PromptSet.read(path, **names)
    assert item == Item("9", chat, [" a", 7], 3, [0, -1], "x.jsonl, line 1")
    path.write_text('"a text alone"\n{"input_ids": [1, 2]}\n')
    assert [one.prompt for one in PromptSet.read(path)] == ["a text alone", [1, 2]]


def test_cells_of_a_table_are_read_as_what_they_stand_for(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('input_ids,target,position\n1 5 9,"["" a"", "" b""]","0,2"\n"[2, 3]",[,\n')
    first, second = PromptSet.read(path)
    assert (first.prompt, first.target, first.position) == ([1, 5, 9], [" a", " b"], [0, 2])
    assert (second.prompt, second.target, second.position) == ([2, 3], "[", -1)


def test_a_space_is_put_before_targets_that_follow_a_word(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(
        '{"prompt": "The capital is", "target": ["Paris", " Rome", 5]}\n{"prompt": "(", "target": "Paris"}\n'
    )
    assert [one.target for one in PromptSet.read(path, target_space=True)] == [[" Paris", " Rome", 5], "Paris"]
    assert next(iter(PromptSet.read(path))).target == ["Paris", " Rome", 5]


BAD = {
    '{"prompt": "a"}\n{"prompt": }': "line 2, column 12: no JSON",
    '{"prompt": "a"}\n7': "line 2: expected an object with fields, or a text, got int",
    '{"prompt": "a", "id": 1}\n{"prompt": "b", "id": 1}': "line 2: the id '1' is there twice; x.jsonl, line 1",
    '{"prompt": "a"}\n{"text": "b"}': "line 2: the field 'prompt' is missing; there are text",
    '{"prompt": ""}': "line 1: the field 'prompt' is empty",
    '{"prompt": "a"}\n{"prompt": [1, 2]}': "line 2: the prompt is token ids; that of x.jsonl, line 1 is a text",
    '{"prompt": "a", "target": 1.5}': "line 1: the target is 1.5; expected a text or an id",
    '{"prompt": "a", "target": []}': "line 1: the target is an empty list",
    '{"prompt": "a", "position": "x"}': "line 1: the position is 'x'; expected an integer",
    '{"prompt": "a", "position": [true]}': "line 1: the position is .True.; expected an integer",
    '{"prompt": [1, "b"]}': "line 1: the field 'prompt' is no prompt",
    '{"prompt": "a", "id": [1]}': "line 1: the id is .1.; expected a text or a number",
    "\n": "x.jsonl: it holds no prompts",
}


@pytest.mark.parametrize("text", BAD)
def test_an_error_names_its_place(tmp_path, text):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=BAD[text]):
        PromptSet.read(path).checked()


def test_a_field_that_is_named_must_be_there(tmp_path):
    with pytest.raises(ValueError, match=r"line 1: the field 'answer' is missing; there are prompt, target, id"):
        PromptSet.read(written(tmp_path, ".jsonl"), target="answer").checked()


def test_tables_that_cannot_be_read(tmp_path):
    cases = {
        "a.csv": (b"prompt,prompt\na,b\n", "line 1: the column 'prompt' is there twice"),
        "b.csv": (b"prompt,target\na,b\nc,d,e\n", "line 3: 3 cells, and the head has 2"),
        "c.csv": (b'prompt\n"a\n', "line 2: no table"),
        "d.csv": (b"prompt\n\xff\n", "no text in UTF-8"),
        "e.jsonl": (b'{"prompt": "\xff"}\n', "no text in UTF-8"),
        "f.parquet": (b"PAR1 is no file", "no Parquet file that can be read"),
        "g.txt": (b"a\n", "the kind of the file is not known; its name ends in one of .jsonl"),
        "h.csv": (b"messages\n[{\n", "the field 'messages' is no JSON"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            PromptSet.read(tmp_path / name).checked()
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        open_table(tmp_path / "missing.jsonl")
    with pytest.raises(ValueError, match="split: 'test' belongs to a data set"):
        open_table(tmp_path / "a.csv", "test")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no Parquet files"):
        open_table(tmp_path / "empty")


def test_python_objects():
    prompts = PromptSet.of(["a", "b"], targets=[" c", LogProb(" d")], ids=["x", "y"])
    assert [(one.id, one.target) for one in prompts] == [("x", " c"), ("y", LogProb(" d"))]
    again = PromptSet.of(iter(["a", "b"]))
    assert [one.id for one in again] == [one.id for one in again] == ["0", "1"]
    assert PromptSet.of(again) is again
    (item,) = PromptSet.of([{"prompt": "a", "target": " b", "id": 3}])
    assert (item.id, item.prompt, item.target) == ("3", "a", " b")
    with pytest.raises(ValueError, match=r"targets: expected one per prompt \(2\), got 1"):
        PromptSet.of(["a", "b"], targets=[" c"])
    for wrong in ("a text", 5, {"prompt": "a"}):
        with pytest.raises(TypeError, match="prompts: expected a list of prompts"):
            PromptSet.of(wrong)
    with pytest.raises(ValueError, match="targets: the prompts of"):
        PromptSet.of(again, targets=[1, 2])


def test_the_hash_is_of_all_that_is_said():
    def digest(*args, **kwargs):
        return PromptSet.of(*args, **kwargs).checked().sha256

    vector = torch.ones(3)
    plain = digest(["a", "b"])
    others = [
        digest(["a", "c"]),
        digest(["a", "b"], targets=[1, 2]),
        digest(["a", "b"], targets=[vector, vector]),
        digest(["a", "b"], targets=[vector, 2 * vector]),
        digest(["a", "b"], targets=[LogProb(1), LogProb(2)]),
        digest(["a", "b"], positions=[0, 0]),
        digest(["a", "b"], ids=["0", "2"]),
        digest(["b", "a"]),
    ]
    assert len({plain, *others}) == 9 and plain == digest(["a", "b"])


def test_a_data_set_in_a_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(RECORDS)
    data.save_to_disk(tmp_path / "one")
    assert [one.id for one in PromptSet.read(tmp_path / "one")] == ["one", "two"]
    both = datasets.DatasetDict({"train": data, "test": data.select([1])})
    both.save_to_disk(tmp_path / "both")
    assert [one.id for one in PromptSet.read(tmp_path / "both", split="test")] == ["two"]
    assert len(list(PromptSet.read(tmp_path / "both"))) == 2
    with pytest.raises(ValueError, match="split: 'validation' is none of those of .*: train, test"):
        PromptSet.read(tmp_path / "both", split="validation")
