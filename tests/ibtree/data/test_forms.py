"""The forms that prompts come in: conversations, arrays, folders, gzip; repeats and bad rows."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from ibtree.data.questions import Question, Reading, read_questions
from ibtree.messages import Chat, ChatMessage
from tests.ibtree.data.reading import jsonl, read, refused, table

VERL = {
    "data_source": "math_dapo",
    "prompt": [{"role": "user", "content": "What is 1 + 1?"}],
    "reward_model": {"ground_truth": "2", "style": "rule"},
}
ASKED = Question(Chat((ChatMessage("user", "What is 1 + 1?"),)), "2")


def test_verls_rows_are_read_as_they_are(tmp_path):
    """DAPO-Math-17k and others: chat lists, and the answer in a field of a field."""
    assert read_questions(jsonl(tmp_path, VERL)) == [ASKED]
    parquet.write_table(pa.Table.from_pylist([VERL] * 3), tmp_path / "rows.parquet")
    assert read_questions(tmp_path / "rows.parquet") == [ASKED] * 3
    path = tmp_path / "rows.parquet"
    assert read(path, "prompt", "reward_model.style")[0].answer == "rule"
    assert "no field 'reward_model.gold'" in refused(path, None, "reward_model.gold")


def test_a_template_is_put_around_the_last_message(tmp_path):
    (asked,) = read(jsonl(tmp_path, VERL), prompt_template="{prompt} Think.")
    assert asked.prompt.messages[-1].content == "What is 1 + 1? Think."


SYSTEM = ChatMessage("system", "Be brief.")


@pytest.mark.parametrize("choices", [{"chat": True}, {"chat_template_args": {"think": False}}])
def test_a_text_becomes_a_conversation(tmp_path, choices):
    path = jsonl(tmp_path, {"prompt": "1 + 1"})
    (asked,) = read(path, prompt_template="{prompt} =", **choices)
    assert asked.prompt.messages == (ChatMessage("user", "1 + 1 ="),)
    assert asked.prompt.template_args == choices.get("chat_template_args", {})
    assert read(path)[0].prompt == "1 + 1"


def test_a_system_prompt_stands_before_texts_and_in_the_place_of_a_rows_own(tmp_path):
    own = {"role": "system", "content": "Be long."}
    rows = [{"prompt": "1 + 1"}, VERL, VERL | {"prompt": [own, *VERL["prompt"]]}]
    first, *others = read(jsonl(tmp_path, *rows), system_prompt="Be brief.")
    assert first.prompt.messages == (SYSTEM, ChatMessage("user", "1 + 1"))
    assert [asked.prompt.messages for asked in others] == [(SYSTEM, *ASKED.prompt.messages)] * 2


def test_the_template_is_put_around_what_the_user_says_last(tmp_path):
    """The model may have begun to answer."""
    begun = [*VERL["prompt"], {"role": "assistant", "content": "Well,"}]
    (asked,) = read(jsonl(tmp_path, VERL | {"prompt": begun}), prompt_template="Q: {prompt}")
    assert [turn.content for turn in asked.prompt.messages] == ["Q: What is 1 + 1?", "Well,"]


@pytest.mark.parametrize("prompt", [[], ["text"], [{"role": "user"}], [{"content": "x"}], 3])
def test_messages_without_role_and_content_are_refused(tmp_path, prompt):
    assert "rows.jsonl:1" in refused(jsonl(tmp_path, {"prompt": prompt}))


def test_a_byte_order_mark_and_an_array(tmp_path):
    rows = [{"prompt": "a", "answer": 2.0}, {"prompt": "b", "answer": 1e20}]
    lines = "\n".join(map(json.dumps, rows))
    array = json.dumps(rows, indent=1)
    expected = [Question("a", "2"), Question("b", "100000000000000000000")]
    for name, text in [
        ("a.jsonl", lines),
        ("b.json", array),
        ("c.json", lines),
        ("d.jsonl", array),
    ]:
        for mark in ("", "\ufeff"):
            path = tmp_path / name
            path.write_text(mark + text, encoding="utf-8")
            assert read_questions(path) == expected, (name, mark)
    (tmp_path / "b.json").write_text(json.dumps([{"prompt": "a"}, 3]))
    assert "b.json row 2: no JSON object" in refused(tmp_path / "b.json")


def test_a_folder_or_a_glob_of_files(tmp_path):
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": name}))
    (tmp_path / "README.md").write_text("not a row")
    both = [Question("a", ""), Question("b", "")]
    assert read_questions(tmp_path) == both
    assert read_questions(tmp_path / "*.jsonl") == both
    assert "no file" in refused(tmp_path / "*.csv")
    (tmp_path / "empty").mkdir()
    assert "no file *.jsonl, *.jsonl.gz, *.json, *.json.gz, *.parquet in" in refused(
        tmp_path / "empty"
    )


def test_gzip_and_what_is_wrong_with_it(tmp_path):
    row = json.dumps({"prompt": "a", "answer": 1}).encode()
    for name, content in [("b.jsonl.gz", row), ("c.json.gz", b"[" + row + b"]")]:
        (tmp_path / name).write_bytes(gzip.compress(content))
    assert read_questions(tmp_path) == [Question("a", "1")] * 2
    for name in ("b.jsonl.gz", "c.json.gz"):
        whole = (tmp_path / name).read_bytes()
        for broken in (whole[:-9], b"not this", whole[:12] + b"\xff" * 20):
            (tmp_path / name).write_bytes(broken)
            assert f"prompts {tmp_path / name}: " in refused(tmp_path / name)


# --- repeats and bad rows -----------------------------------------------------------------------


def told(source: str | Path, **choices: object) -> tuple[list[Question], list[str]]:
    lines: list[str] = []
    return read_questions(source, Reading(**choices), lines.append), lines


def test_the_first_of_equal_prompts_is_kept(tmp_path):
    rows = [VERL | {"reward_model": {"ground_truth": str(n)}} for n in range(3)]
    path = jsonl(tmp_path, *rows, {"prompt": "a", "reward_model": {"ground_truth": "3"}})
    questions, (line,) = told(path, drop_repeats=True)
    assert [asked.answer for asked in questions] == ["0", "3"]
    assert line == f"prompts {path}: 2 of 4 rows repeat a prompt and are dropped"
    questions, lines = told(path)
    assert [asked.answer for asked in questions] == ["0", "1", "2", "3"]
    assert not lines, "half of the rows"
    (line,) = told(jsonl(tmp_path, *rows))[1]
    assert "2 of 3 rows repeat a prompt; --drop-repeats keeps the first" in line


def test_dapos_size_and_form(tmp_path):
    """17,917 conversations, each 20 times here and 100 times in DAPO-Math-17k."""
    rows = [
        {"prompt": [{"content": f"{n}?", "role": "user"}], "reward_model": {"ground_truth": f"{n}"}}
        for n in range(17_917)
    ]
    parquet.write_table(pa.Table.from_pylist(rows * 20), tmp_path / "rows.parquet")
    questions, (line,) = told(tmp_path / "rows.parquet", drop_repeats=True)
    assert [asked.answer for asked in questions] == [str(n) for n in range(17_917)]
    assert "340423 of 358340 rows" in line
    questions, (line,) = told(tmp_path / "rows.parquet")
    assert len(questions) == 358_340 and len({id(asked) for asked in questions}) == 17_917


BAD = ["{", "3", '{"prompt": ""}', '{"text": "x"}', '{"prompt": "p", "answer": [1]}', '"\xff"']


def test_bad_rows_are_skipped_and_counted(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes("\n".join(['{"prompt": "a"}', *BAD, '{"prompt": "b"}']).encode("latin-1"))
    questions, (line,) = told(path, skip_bad_rows=True)
    assert [asked.prompt for asked in questions] == ["a", "b"]
    assert line.startswith(f"prompts {path}: 6 of 8 rows skipped: prompts {path}:2: ")
    assert f"{path}:2: " in refused(path)
    path.write_bytes("\n".join(BAD).encode("latin-1"))
    assert "holds no prompts; 6 of 6 rows skipped: " in refused(path, skip_bad_rows=True)


def test_bad_rows_of_tables_and_arrays_are_skipped(tmp_path):
    path = table(tmp_path, prompt=["a", None, "c"], answer=[1.0, 2.0, math.nan])
    questions, (line,) = told(path, skip_bad_rows=True)
    assert questions == [Question("a", "1")] and f"{path} row 2: " in line
    (tmp_path / "rows.json").write_text('[{"prompt": "a"}, 3, {"prompt": ""}]')
    questions, (line,) = told(tmp_path / "rows.json", skip_bad_rows=True)
    assert len(questions) == 1 and "2 of 3 rows skipped: " in line and "row 2: " in line


def test_a_file_that_cannot_be_read_is_not_skipped(tmp_path):
    path = table(tmp_path, prompt=["a" * 1000])
    path.write_bytes(path.read_bytes()[:500])
    assert "not readable" in refused(path, skip_bad_rows=True)
    (tmp_path / "rows.json").write_text('[{"prompt": "a"}, ')
    assert "rows.json:1: " in refused(tmp_path / "rows.json", skip_bad_rows=True)
