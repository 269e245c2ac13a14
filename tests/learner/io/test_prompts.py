"""Prompt files and the seeded stream over them."""

from __future__ import annotations

import json

import pytest

from ibtree.data.questions import Question, read_questions
from ibtree.errors import FieldError
from ibtree.messages import Chat, ChatMessage
from learner.io.prompts import PromptStream, questions_of
from tests.learner.tiny import config


def write(folder, *lines: str | bytes):
    path = folder / "questions.jsonl"
    path.write_bytes(b"".join((x.encode() if isinstance(x, str) else x) + b"\n" for x in lines))
    return path


GOOD = '{"prompt": "1 + 1 =", "answer": "2"}'


def test_good_lines(tmp_path):
    lines = [GOOD, "", "   ", '{"prompt": "ü?\\n\\n", "id": 7}', '{"prompt": "p", "answer": 12}']
    assert read_questions(write(tmp_path, *lines)) == [
        Question("1 + 1 =", "2"),
        Question("ü?\n\n", ""),
        Question("p", "12"),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "{prompt: 1}",
        '{"prompt": "cut off',
        "[1, 2]",
        '"only text"',
        "17",
        "null",
        '{"question": "1 + 1 ="}',
        '{"prompt": ""}',
        '{"prompt": ["1 + 1 ="]}',
        '{"prompt": null, "answer": "2"}',
    ],
)
def test_a_bad_line_is_named_with_what_is_allowed(tmp_path, line):
    with pytest.raises(FieldError) as caught:
        read_questions(write(tmp_path, GOOD, "", line, GOOD))
    message = str(caught.value)
    assert message.startswith("prompts") and ":3: " in message
    assert "; allowed: " in message and "text" in message.split("; allowed: ")[1]
    assert "\n" not in message


def test_a_line_that_is_not_utf8_is_named(tmp_path):
    with pytest.raises(FieldError, match=r":2\b"):
        read_questions(write(tmp_path, GOOD, b'{"prompt": "\xff"}'))


def test_a_bad_line_is_named_with_its_file(tmp_path):
    """Training and held-out prompts are two files."""
    with pytest.raises(FieldError, match=r"questions\.jsonl"):
        read_questions(write(tmp_path, GOOD, "{"))


def test_a_null_answer_is_no_answer(tmp_path):
    questions = read_questions(write(tmp_path, '{"prompt": "p", "answer": null}'))
    assert questions == [Question("p", "")]


@pytest.mark.parametrize("lines", [[], ["", "  "]])
def test_an_empty_file_is_named(tmp_path, lines):
    path = write(tmp_path, *lines)
    with pytest.raises(FieldError, match="holds no prompts") as caught:
        read_questions(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FieldError, match="prompts: no file") as caught:
        read_questions(tmp_path / "none.jsonl")
    assert "none.jsonl" in str(caught.value)
    with pytest.raises(FieldError, match="prompts: no file"):
        read_questions(tmp_path)


def test_the_place_in_an_error_is_left_as_it_is():
    error = FieldError("prompts /some_data/a_b.jsonl:3", "no text", "text")
    assert error.as_option() == "--prompts /some_data/a_b.jsonl:3: no text; allowed: text"
    assert FieldError("out_dir", "p", "a").as_option() == "--out-dir: p; allowed: a"


def test_a_run_reads_both_of_its_files_by_its_fields(tmp_path):
    path = write(tmp_path, '{"task": "1 + 1", "gold": 2, "prompt": "no"}')
    named = {"prompt_field": "task", "answer_field": "gold", "prompt_template": "{prompt} ="}
    assert questions_of(str(path), config(**named)) == [Question("1 + 1 =", "2")]
    assert questions_of(str(path), config()) == [Question("no", "")]


def test_a_run_makes_conversations_and_drops_repeats(tmp_path):
    path = write(tmp_path, GOOD, GOOD, "{", '{"prompt": [{"role": "user", "content": "a"}]}')
    choices = {"system_prompt": "Sum.", "chat_template_args": {"enable_thinking": False}}
    first, second = questions_of(
        str(path), config(drop_repeats=True, skip_bad_rows=True, **choices)
    )
    rules = ChatMessage("system", "Sum.")
    expected = Chat((rules, ChatMessage("user", "1 + 1 =")), {"enable_thinking": False})
    assert (first.prompt, first.answer) == (expected, "2")
    assert second.prompt.messages == (rules, ChatMessage("user", "a"))
    assert questions_of(str(write(tmp_path, GOOD)), config(chat=True))[0].prompt == Chat(
        (ChatMessage("user", "1 + 1 ="),)
    )


QUESTIONS = [Question(f"q{i}", json.dumps(i)) for i in range(11)]


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_every_epoch_is_a_permutation(seed):
    stream = PromptStream(QUESTIONS, seed, "run")
    epochs = [tuple(stream[n][1] for n in range(11 * e, 11 * e + 11)) for e in range(6)]
    assert all(sorted(e, key=QUESTIONS.index) == QUESTIONS for e in epochs)
    assert len(set(epochs)) == 6


def test_the_same_seed_gives_the_same_stream_in_any_order_of_asking():
    first, second = (PromptStream(QUESTIONS, 3, "run") for _ in range(2))
    want = {n: first[n] for n in range(50)}
    assert {n: second[n] for n in reversed(range(50))} == want
    assert [second[n] for n in (40, 2, 40, 13)] == [want[n] for n in (40, 2, 40, 13)]
    other = PromptStream(QUESTIONS, 4, "run")
    assert [other[n][1] for n in range(11)] != [want[n][1] for n in range(11)]


def test_the_order_is_the_same_in_every_process_and_version():
    """Written down once: a resumed run must go on in it."""
    stream = PromptStream(QUESTIONS[:6], 0, "run")
    assert [stream[n][1].prompt for n in range(6)] == ["q0", "q5", "q1", "q4", "q3", "q2"]


def test_ids_are_stable_and_unique():
    stream = PromptStream(QUESTIONS, 0, "a1b2")
    ids = [stream[n][0] for n in range(40)]
    assert ids[0] == "a1b2/0" and ids[39] == "a1b2/39" and len(set(ids)) == 40


def test_one_question_repeats():
    stream = PromptStream(QUESTIONS[:1], 0, "run")
    assert {stream[n][1] for n in range(5)} == {QUESTIONS[0]}


def test_ids_lead_back_to_their_numbers_and_others_to_none():
    stream = PromptStream(QUESTIONS, 0, "a1/b2")
    assert [stream.number_of(stream[n][0]) for n in (0, 7, 40)] == [0, 7, 40]
    for other in ("", "7", "a1/7", "b2/7", "a1/b2/", "a1/b2/x", "a1/b2/-1", "a1/b2/7/1"):
        assert stream.number_of(other) is None
