"""Lists of texts: a word of the command line is one of them as it stands."""

from __future__ import annotations

import pytest

from learner.config import LearnerConfig

NEEDED = ["--model", "m", "--prompts", "p"]


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        ([], ()),
        (["--stop", "END"], ("END",)),
        (["--stop=a, b"], ("a, b",)),
        (["--stop", "</s>\n"], ("</s>\n",)),
        (["--stop", " x "], (" x ",)),
        (["--stop=[INST]"], ("[INST]",)),
        (["--stop=null"], ("null",)),
        (["--stop=42"], ("42",)),
        (['--stop="'], ('"',)),
        (["--stop=--"], ("--",)),
        (["--stop=[1]"], ("[1]",)),
        (["--stop", "a", "--seed=3", "--stop=b,"], ("a", "b,")),
        (["--stop", '["a", "\\n\\n"]', "--stop", "c"], ("a", "\n\n", "c")),
    ],
)
def test_words(words, texts):
    assert LearnerConfig.load("prog", [*NEEDED, *words]).stop == texts


def test_line_breaks_close_steps():
    words = ["--separators", "\n\n", "--separators=. "]
    assert LearnerConfig.load("prog", [*NEEDED, *words]).separators == ("\n\n", ". ")


@pytest.mark.parametrize(("value", "texts"), [("a, b", ("a, b",)), ('["a", "b"]', ("a", "b"))])
def test_environment_and_file(monkeypatch, tmp_path, value, texts):
    with monkeypatch.context() as patch:
        patch.setenv("IBTPO_LEARNER_STOP", value)
        assert LearnerConfig.load("prog", NEEDED).stop == texts
    path = tmp_path / "settings.yaml"
    path.write_text(f"stop: {value if value.startswith('[') else repr(value)}\n")
    loaded = LearnerConfig.load("prog", [*NEEDED, "--config", str(path)])
    assert loaded.stop == texts


@pytest.mark.parametrize("words", [["--stop"], ["--stop", "--seed=3"]])
def test_an_option_without_its_text_is_refused(words, capsys):
    with pytest.raises(SystemExit) as caught:
        LearnerConfig.load("prog", [*NEEDED, *words])
    assert "--stop" in f"{caught.value.code}{capsys.readouterr().err}"
