"""Settings of both daemons: precedence, unknown keys, bad values, printing and reading back."""

from __future__ import annotations

import math
import os

import pytest
import yaml

import ibtree
from ibtpo_settings import Settings
from learner.config import LearnerConfig
from server_ext.config import ServerConfig

BOTH = pytest.mark.parametrize(
    ("kind", "needed"),
    [
        (LearnerConfig, ["--model", "m", "--prompts", "p"]),
        (ServerConfig, ["--model", "m"]),
    ],
    ids=["learner", "server"],
)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in os.environ:
        if name.upper().startswith("IBTPO_"):
            monkeypatch.delenv(name)


def prefix(kind: type[Settings]) -> str:
    return str(kind.model_config["env_prefix"])


def refused(kind: type[Settings], argv: list[str]) -> str:
    """The one line it exits with."""
    with pytest.raises(SystemExit) as caught:
        kind.load("prog", argv)
    message = caught.value.code
    assert isinstance(message, str) and "\n" not in message
    assert message.startswith("prog: ") and "prog --help" in message
    return message


def yaml_file(folder, text: str) -> list[str]:
    path = folder / "settings.yaml"
    path.write_text(text)
    return ["--config", str(path)]


@BOTH
def test_command_line_over_environment_over_file_over_default(kind, needed, tmp_path, monkeypatch):
    default = kind.load("prog", needed)
    assert (default.lease_s, default.beta, default.rounds) == (default.lease_s, 5.0, 9)
    file = yaml_file(tmp_path, "lease_s: 11.5\nbeta: 2.5\nrounds: 3\n")
    monkeypatch.setenv(f"{prefix(kind)}BETA", "3.5")
    monkeypatch.setenv(f"{prefix(kind)}ROUNDS", "4")
    loaded = kind.load("prog", [*needed, *file, "--rounds", "5"])
    assert (loaded.lease_s, loaded.beta, loaded.rounds) == (11.5, 3.5, 5)
    untouched = set(kind.model_fields) - {"lease_s", "beta", "rounds", "config"}
    assert all(getattr(loaded, name) == getattr(default, name) for name in untouched)


@BOTH
def test_the_file_may_come_from_the_environment_or_after_an_equals_sign(
    kind, needed, tmp_path, monkeypatch
):
    path = yaml_file(tmp_path, "model: other\nrounds: 3\n")[1]
    assert kind.load("prog", [*needed, f"--config={path}"]).rounds == 3
    monkeypatch.setenv(f"{prefix(kind)}CONFIG", path)
    loaded = kind.load("prog", needed)
    assert loaded.rounds == 3 and str(loaded.model) == "m"
    assert str(kind.load("prog", needed[2:]).model) == "other"
    assert kind.load("prog", [*needed, *yaml_file(tmp_path, "rounds: 8\n")]).rounds == 8


@BOTH
def test_an_unknown_key_is_named_in_each_source(kind, needed, tmp_path, monkeypatch, capsys):
    assert "roundz" in refused(kind, [*needed, *yaml_file(tmp_path, "roundz: 3\n")])
    with pytest.raises(SystemExit) as caught:
        kind.load("prog", [*needed, "--roundz", "3"])
    assert caught.value.code not in (0, None)
    assert "--roundz" in f"{caught.value.code}{capsys.readouterr().err}"
    monkeypatch.setenv(f"{prefix(kind)}ROUNDZ", "3")
    assert f"{prefix(kind)}ROUNDZ" in refused(kind, needed)


@BOTH
def test_another_programs_environment_is_none_of_its_business(kind, needed, monkeypatch):
    monkeypatch.setenv("IBTPO_SOMETHING", "1")
    monkeypatch.setenv("ROUNDS", "77")
    assert kind.load("prog", needed).rounds == 9


@BOTH
def test_print_config_reads_back_to_the_same_settings(kind, needed, tmp_path, capsys):
    odd = ["--lease-s", "77.25", "--beta", "1e-3", "--top-k", "-1"]
    if kind is ServerConfig:
        odd += ["--separator", " \n# ü'\"", "--answer-marker", "####"]
    else:
        odd += ["--max-staleness", "3", "--no-skip-uniform-trees", "--grader", "off"]
    want = kind.load("prog", [*needed, *odd])
    with pytest.raises(SystemExit) as caught:
        kind.load("prog", [*needed, *odd, "--print-config"])
    assert caught.value.code in (0, None)
    printed = capsys.readouterr().out
    assert list(yaml.safe_load(printed)) == [
        name for name in kind.model_fields if name not in ("config", "print_config")
    ]
    loaded = kind.load("prog", yaml_file(tmp_path, printed))
    assert loaded.model_dump() == want.model_dump()


@BOTH
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "hot"])
def test_temperature_must_be_a_number(kind, needed, value):
    assert "--temperature" in refused(kind, [*needed, f"--temperature={value}"])


@BOTH
def test_a_temperature_that_is_none_for_the_engine(kind, needed):
    """Below 1e-6 its log-probabilities are those at temperature 1."""
    field = "limit-temperature" if kind is ServerConfig else "temperature"
    assert f"--{field}" in refused(kind, [*needed, f"--{field}=9.9e-7"])
    assert getattr(kind.load("prog", [*needed, f"--{field}=1e-6"]), field.replace("-", "_")) == 1e-6


@BOTH
@pytest.mark.parametrize("more", [[], ["--colour=red"], ["--config=nowhere"]])
def test_the_version(kind, needed, more, capsys):
    """Whatever else is there, or missing."""
    for argv in ([*more, "--version"], [*needed, "--version", *more]):
        with pytest.raises(SystemExit) as caught:
            kind.load("prog", argv)
        assert caught.value.code == 0
        assert capsys.readouterr().out == f"prog {ibtree.__version__}\n"


@BOTH
def test_a_nan_in_the_file_or_environment_is_refused_too(kind, needed, tmp_path, monkeypatch):
    assert math.isnan(yaml.safe_load(".nan"))
    assert "--temperature" in refused(kind, [*needed, *yaml_file(tmp_path, "temperature: .nan\n")])
    monkeypatch.setenv(f"{prefix(kind)}TEMPERATURE", "nan")
    assert "--temperature" in refused(kind, needed)


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("lr", "-1e-6", "greater than 0"),
        ("lr", "0", "greater than 0"),
        ("temperature", "0", "greater than 0"),
        ("top-p", "1.5", "less than or equal to 1"),
        ("steps", "0", "greater than or equal to 1"),
        ("steps", "2.5", "integer"),
        ("clip-low", "1.5", "less than or equal to 1"),
        ("length-norm", "mean", "'trajectory', 'token' or 'constant'"),
        ("std", "unbiased", "'population' or 'sample'"),
        ("value-estimator", "median", "'mean' or 'backup'"),
        ("confidence", "high", "'geometric'"),
        ("trajectory-weight", "equal", "'visits' or 'draws'"),
        ("old-logprobs", "server", "'engine' or 'trainer'"),
        ("local-scale", "tree", "'token' or 'step'"),
        ("resume", "always", "'auto' or 'never'"),
        ("device", "tpu", "'auto', 'cpu' or 'cuda'"),
        ("dtype", "float16", "'float32'"),
    ],
)
def test_the_learner_names_field_value_and_remedy(field, value, word):
    message = refused(LearnerConfig, ["--model", "m", "--prompts", "p", f"--{field}={value}"])
    assert f"--{field}" in message and word in message and repr(value) in message


@pytest.mark.parametrize(
    ("field", "value"),
    [("port", "70000"), ("dtype", "int8"), ("device", "tpu"), ("separator", ""), ("lease-s", "0")],
)
def test_the_server_names_field_and_value(field, value):
    message = refused(ServerConfig, ["--model", "m", f"--{field}={value}"])
    assert f"--{field}" in message and repr(value) in message


@pytest.mark.parametrize("missing", ["model", "prompts"])
def test_what_is_required_is_named(missing):
    argv = [f"--{name}=x" for name in ("model", "prompts") if name != missing]
    assert f"--{missing}" in refused(LearnerConfig, argv)


@BOTH
def test_a_file_that_cannot_be_used_is_named(kind, needed, tmp_path):
    missing = str(tmp_path / "none.yaml")
    assert missing in refused(kind, [*needed, "--config", missing])
    assert missing in refused(kind, [*needed, f"--config={missing}"])
    assert "settings.yaml" in refused(kind, [*needed, *yaml_file(tmp_path, "rounds: [")])
    assert kind.load("prog", [*needed, *yaml_file(tmp_path, "# nothing\n")]).rounds == 9


@BOTH
@pytest.mark.parametrize("text", ["- rounds\n", "rounds\n", "17\n"])
def test_a_file_that_is_no_mapping_is_named(kind, needed, tmp_path, text):
    assert "settings.yaml" in refused(kind, [*needed, *yaml_file(tmp_path, text)])


@BOTH
def test_the_last_config_on_the_command_line_counts(kind, needed, tmp_path):
    """The same as for every other option, and as the field `config` itself says."""
    first, last = tmp_path / "first.yaml", tmp_path / "last.yaml"
    first.write_text("rounds: 3\n")
    last.write_text("rounds: 4\n")
    loaded = kind.load("prog", [*needed, "--config", str(first), "--config", str(last)])
    assert loaded.config == last and loaded.rounds == 4
    assert kind.load("prog", [*needed, "--rounds", "3", "--rounds", "4"]).rounds == 4


@pytest.mark.parametrize("word", ["null"])
def test_no_bound_can_be_said_over_a_file_that_has_one(tmp_path, word):
    """`max_staleness`: "null: no bound"."""
    argv = ["--model", "m", "--prompts", "p", *yaml_file(tmp_path, "max_staleness: 3\n")]
    assert LearnerConfig.load("prog", argv).max_staleness == 3
    assert LearnerConfig.load("prog", [*argv, f"--max-staleness={word}"]).max_staleness is None


@pytest.mark.parametrize("text", ["one\ntwo = 2\n", "\n", "a\n--lr=3", "- a list\n- of two"])
def test_a_text_of_several_lines_arrives_whole(text):
    for words in ([f"--system-prompt={text}"], ["--system-prompt", text]):
        config = LearnerConfig.resolve("p", ["--model=m", "--prompts=p", *words])
        assert (
            config.system_prompt == text and config.lr == LearnerConfig.model_fields["lr"].default
        )
