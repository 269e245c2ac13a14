"""The Dockerfiles, read without an engine: pinned, not root, nothing missing, nothing secret."""

from __future__ import annotations

import fnmatch
import re
import tomllib

import pytest

from tests.deploy.manifests import DEPLOY, DOCKERFILES, ROOT, arguments_of, expanded, instructions

PATHS = sorted((DEPLOY / "images").glob("*.Dockerfile"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SECRET = re.compile(r"password|passwd|secret|token|api_?key|credential|private", re.IGNORECASE)


@pytest.fixture(params=PATHS, ids=lambda path: path.name)
def dockerfile(request):
    return request.param


def words(dockerfile, keyword):
    return [rest for word, rest in instructions(dockerfile) if word == keyword]


def sources(dockerfile):
    return [source for copy in words(dockerfile, "COPY") for source in copy.split()[:-1]]


def test_there_is_one_for_every_image():
    assert {path.name for path in PATHS} == set(DOCKERFILES.values())


def test_the_base_is_pinned(dockerfile):
    for base in words(dockerfile, "FROM"):
        image = expanded(base.split()[0], arguments_of(dockerfile))
        assert re.search(r":[\w.-]*\d[\w.-]*$|@sha256:", image), image
        assert "latest" not in image


def test_it_runs_as_a_named_user_that_is_not_root(dockerfile):
    users = words(dockerfile, "USER")
    uid, gid = users[-1].split(":")
    assert int(uid) == int(gid) == 10001
    made = " ".join(words(dockerfile, "RUN"))
    assert f"useradd --uid {uid} --gid {gid}" in made
    assert f"install -d -o {uid} -g {gid} /data" in made
    assert words(dockerfile, "VOLUME") == ['["/data"]']
    keywords = [word for word, _ in instructions(dockerfile)]
    assert "RUN" not in keywords[keywords.index("USER") :]


def test_home_is_the_users(dockerfile):
    assert "HOME=/home/ibtpo" in words(dockerfile, "ENV")[-1].split()
    assert "--home-dir /home/ibtpo" in " ".join(words(dockerfile, "RUN"))


def test_sources_exist_and_reach_the_builder(dockerfile):
    assert sources(dockerfile)
    ignore = dockerfile.with_name(f"{dockerfile.name}.dockerignore").read_text().splitlines()
    let_through = {line[1:] for line in ignore if line.startswith("!")}
    assert "*" in ignore
    assert let_through == set(sources(dockerfile))
    for source in sources(dockerfile):
        assert (ROOT / source).exists(), source


def test_the_whole_distribution_is_copied(dockerfile):
    """pip installs what is there: a package that is not copied would be missing without a word."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    include = tool["packages"]["find"]["include"]
    packages = [
        path.parent.name
        for path in ROOT.glob("*/__init__.py")
        if any(fnmatch.fnmatch(path.parent.name, pattern) for pattern in include)
    ]
    assert packages
    needed = [*packages, *(f"{name}.py" for name in tool.get("py-modules", []))]
    needed += [PROJECT["readme"], *PROJECT["license-files"], "pyproject.toml"]
    assert set(needed) <= set(sources(dockerfile))


def test_the_entry_point_and_the_extra_exist(dockerfile):
    (command,) = words(dockerfile, "ENTRYPOINT")
    assert command.strip('[]"') in PROJECT["scripts"]
    extras = re.findall(r'"\.\[(\w+)\]"', " ".join(words(dockerfile, "RUN")))
    assert extras and set(extras) <= PROJECT["optional-dependencies"].keys()


def test_versions_are_the_projects(dockerfile):
    """torch, sglang and torchvision are what the extras and the engine are written against."""
    extras = {name for extra in PROJECT["optional-dependencies"].values() for name in extra}
    text = " ".join(words(dockerfile, "RUN")) + " ".join(arguments_of(dockerfile).values())
    pins = re.findall(r"(torch|sglang)(?:==|:v)([\d.]+)", text)
    assert pins
    for name, version in pins:
        assert f"{name}=={version}" in extras


def test_ports_are_exposed():
    for path in PATHS:
        exposed = words(path, "EXPOSE")
        assert exposed == (["7300 7301 7302"] if path.name.startswith("server") else [])


def test_nothing_secret_nothing_floating(dockerfile):
    for word, rest in instructions(dockerfile):
        assert ":latest" not in rest
        assert word != "ADD", "COPY takes files of the repository and nothing else"
        if word in ("ENV", "ARG"):
            assert not SECRET.search(rest)
        if word == "RUN":
            assert "pip install" not in rest or "--no-cache-dir" in rest
            assert "curl" not in rest and "wget" not in rest
