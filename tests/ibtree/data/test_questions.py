"""Prompts from JSONL with named fields, GSM8K, Parquet and Hugging Face datasets."""

from __future__ import annotations

import json
import math
import re
import sys
from decimal import Decimal

import pyarrow as pa
import pytest
from pyarrow import parquet

from ibtree.data.questions import Question, read_questions
from ibtree.errors import FieldError
from tests.data import data
from tests.ibtree.data.reading import jsonl, read, refused, table

WORKED = {"question": "How many?", "answer": "He has 6 * 3 = <<6*3=18>>18.\n#### 18"}


# --- fields and template ------------------------------------------------------------------------


def test_fields_are_taken_by_name(tmp_path):
    path = jsonl(tmp_path, {"problem": "1 + 1", "solution": "2", "prompt": "no", "answer": "no"})
    assert read(path, "problem", "solution") == [Question("1 + 1", "2")]
    assert read(path, "problem") == [Question("1 + 1", "no")]
    assert read_questions(path) == [Question("no", "no")]


def test_a_named_field_must_be_there(tmp_path):
    path = jsonl(tmp_path, {"prompt": "p", "gold": None}, {"prompt": "p"})
    message = refused(path, None, "gold")
    assert f"{path}:2: no field 'gold' in ['prompt']" in message
    assert f"{path}:1: no field 'text' in ['prompt', 'gold']" in refused(path, "text")
    assert read_questions(path) == [Question("p", "")] * 2


def test_the_template_holds_the_prompt(tmp_path):
    path = jsonl(tmp_path, {"prompt": r"\frac{1}{2} {prompt} {0}", "answer": "1"})
    template = "Q: {prompt}\nPut it in \\boxed{}.\n"
    (question,) = read(path, prompt_template=template)
    assert question.prompt == "Q: \\frac{1}{2} {prompt} {0}\nPut it in \\boxed{}.\n"
    with pytest.raises(FieldError, match=re.escape("prompt_template: got 'Q: {}'; allowed: ")):
        read(path, prompt_template="Q: {}")


@pytest.mark.parametrize(
    ("answer", "want"),
    [("a", "a"), (12, "12"), (0.5, "0.5"), (None, ""), ("", ""), ("#### 3", "3")],
)
def test_answers(tmp_path, answer, want):
    assert read_questions(jsonl(tmp_path, {"prompt": "p", "answer": answer}))[0].answer == want


@pytest.mark.parametrize("answer", [True, ["2"], {"value": 2}, math.nan, -math.inf, "so\n####\n"])
def test_bad_answers_are_named(tmp_path, answer):
    good = {"prompt": "p", "answer": "2"}
    message = refused(jsonl(tmp_path, good, good, {"prompt": "p", "answer": answer}))
    assert "rows.jsonl:3: the answer " in message


@pytest.mark.parametrize("field", ["prompt", "answer"])
def test_half_a_character_is_refused_at_the_door(tmp_path, field):
    row = {"prompt": "p", "answer": "2"} | {field: "so \ud83d"}
    assert "rows.jsonl:1: 'utf-8' codec can't encode" in refused(jsonl(tmp_path, row))


def test_json_that_nests_too_deep_is_named(tmp_path):
    (tmp_path / "deep.jsonl").write_text("[" * 10**6)
    assert "deep.jsonl:1: RecursionError" in refused(tmp_path / "deep.jsonl")


# --- GSM8K --------------------------------------------------------------------------------------


def test_gsm8ks_own_format(tmp_path):
    want = [Question("How many?", "18")]
    assert read_questions(jsonl(tmp_path, WORKED)) == want
    assert read(jsonl(tmp_path, WORKED), "question", "answer") == want


def test_only_a_last_line_is_a_final_answer(tmp_path):
    answers = ["#### 1\nno, 2", "see #### 3", "it is\n#### 1,600 \n", "a ####\n####4"]
    rows = [{"prompt": "p", "answer": answer} for answer in answers]
    answers = [q.answer for q in read_questions(jsonl(tmp_path, *rows))]
    assert answers == ["1", "see #### 3", "1,600", "4"]


def test_gsm8k_itself(tmp_path):
    path = data("gsm8k/test.jsonl")
    questions = read_questions(path)
    assert len(questions) == 1319
    assert questions[0].prompt.startswith("Janet’s ducks lay 16 eggs per day.")
    assert questions[0].answer == "18"
    assert all(re.fullmatch(r"-?[\d,]+(\.\d+)?", q.answer) for q in questions)
    rows = [json.loads(line) for line in path.open(encoding="utf-8")]
    assert read_questions(table(tmp_path, 100, **pa.Table.from_pylist(rows).to_pydict())) == (
        questions
    )


# --- Parquet ------------------------------------------------------------------------------------


def test_parquet_in_several_row_groups(tmp_path):
    path = table(tmp_path, prompt=list("abcde"), answer=[1, 2, None, 4, 5], other=[[0]] * 5)
    want = [Question(p, a) for p, a in zip("abcde", ["1", "2", "", "4", "5"], strict=True)]
    assert read_questions(path) == want
    assert [q.answer for q in read(str(path), "prompt", "prompt")] == list("abcde")


def test_parquet_decimals_and_worked_answers(tmp_path):
    path = table(tmp_path, task=["a"], gold=[Decimal("1.50")])
    assert read(path, "task", "gold") == [Question("a", "1.50")]
    path = table(tmp_path, question=["How many?"], answer=[WORKED["answer"]])
    assert read_questions(path) == [Question("How many?", "18")]


def test_a_bad_parquet_row_is_named(tmp_path):
    path = table(tmp_path, prompt=["a", "b", "", "d"])
    assert f"prompts {path} row 3: the prompt is empty" in refused(path)
    path = table(tmp_path, prompt=["a", None])
    assert f"prompts {path} row 2: the prompt is empty or no text" in refused(path)
    path = table(tmp_path, text=["a"])
    assert f"prompts {path}: no field 'prompt' in ['text']" in refused(path)
    assert "holds no prompts" in refused(table(tmp_path, prompt=pa.array([], pa.string())))


def test_a_broken_parquet_file_is_named(tmp_path):
    path = table(tmp_path, prompt=["a" * 1000, "b" * 1000])
    whole = path.read_bytes()
    path.write_bytes(b"not this")
    assert f"prompts {path}: not readable after row 0: " in refused(path)
    path.write_bytes(whole[: len(whole) // 2])
    assert f"prompts {path}: not readable after row 0: " in refused(path)


@pytest.mark.parametrize("module", ["pyarrow", "pyarrow.parquet"])
def test_parquet_without_pyarrow_names_the_package(tmp_path, monkeypatch, module):
    path = table(tmp_path, prompt=["a"])
    monkeypatch.setitem(sys.modules, module, None)
    message = refused(path)
    assert "the package pyarrow" in message and "pip install '.[data]'" in message


# --- Hugging Face datasets ----------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A dataset of two configurations in a folder, read by the real library without a network."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "owner" / "name"
    for config, split, number in [("main", "train", 1), ("main", "test", 2), ("more", "train", 3)]:
        (folder / config).mkdir(parents=True, exist_ok=True)
        rows = [WORKED | {"question": f"{i}?", "extra": i} for i in range(number)]
        parquet.write_table(pa.Table.from_pylist(rows), folder / config / f"{split}.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  default: true\n  data_files:\n"
        "  - {split: train, path: main/train.parquet}\n  - {split: test, path: main/test.parquet}\n"
        "- config_name: more\n  data_files: more/*.parquet\n---\n"
    )
    monkeypatch.chdir(tmp_path)
    return "hf:owner/name"


@pytest.mark.parametrize(
    ("spec", "count"), [("", 1), (":main", 1), (":main:test", 2), ("::test", 2), (":more", 3)]
)
def test_a_dataset_by_name_configuration_and_split(hub, spec, count):
    want = [Question(f"{i}?", "18") for i in range(count)]
    assert read_questions(hub + spec) == want


def test_what_is_wrong_with_a_dataset_is_one_line(hub, monkeypatch):
    assert refused("hf:owner/nothing").startswith("prompts hf:owner/nothing: ")
    assert "valid" in refused(f"{hub}:main:valid")
    assert "others" in refused(f"{hub}:others")
    assert f"{hub}: no field 'text' in ['question', 'answer', 'extra']" in refused(hub, "text")
    assert f"{hub}:more row 1: the prompt is empty or no text" in refused(f"{hub}:more", "extra")
    for spec in ("hf:", "hf::main", f"{hub}:a:b:c"):
        assert f"prompts: got {spec}; allowed: " in refused(spec)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "the package datasets" in refused(hub)
