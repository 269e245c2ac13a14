"""What a user's machine gets: extras that pip can resolve, imports that work, and one line where
an extra is missing."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from base64 import b64encode
from collections.abc import Callable
from importlib.metadata import packages_distributions, requires
from pathlib import Path
from textwrap import dedent

import pytest

import learner.__main__
import server_ext.__main__
from tests import ROOT

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
RESOLVES = pytest.mark.skipif(
    os.environ.get("IBTPO_RESOLVE") != "1", reason="IBTPO_RESOLVE=1 downloads gigabytes"
)
OURS = {"ibtree", "ibtpo_settings", "ibtpo_torchvision", "server_ext", "learner"}
BASE = {"grpc", "google", "numpy", "typing_extensions"}
NEEDED = {
    "server": (*server_ext.__main__.NEEDED, *server_ext.__main__.ENGINE),
    "learner": learner.__main__.NEEDED,
    "cli": ("rich",),
}


def python(code: str, *arguments: str, folder: Path, **variables: str) -> str:
    """What the code prints in a fresh process outside the checkout."""
    done = subprocess.run(
        [sys.executable, "-c", dedent(code), *arguments],
        cwd=folder, env=os.environ | variables, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- what pip is asked for


def resolve(*arguments: str) -> None:
    line = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "-q"]
    done = subprocess.run([*line, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def empty_wheel(folder: Path, requirement: str) -> None:
    name, version = requirement.replace("-", "_").split("==")
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@RESOLVES
@pytest.mark.timeout(1200)
def test_the_extras_of_a_gpu_resolve(tmp_path: Path) -> None:
    # On PyPI this one is a script that downloads the wheel from NVIDIA, so it has no metadata.
    (stub,) = (line for line in requires("sglang") or [] if line.startswith("cuda-tile=="))
    empty_wheel(tmp_path, stub)
    resolve(f"--find-links={tmp_path}", ".[gpu,learner,cli,data]")


@RESOLVES
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_the_pinned_versions_have_wheels_for_each_python(version: str, tmp_path: Path) -> None:
    """Also with the torch that PyPI has, which asks for a triton of its own."""
    wheels = [f"--python-version={version}", "--only-binary=:all:", f"--target={tmp_path}"]
    resolve(*wheels, "--constraint=constraints.txt", "torch==2.13.0", *requirements())


def requirements() -> list[str]:
    """What `make setup` installs: all that `dev` stands for."""
    lines, todo = set(), ["dev"]
    while todo:
        for line in EXTRAS[todo.pop()]:
            if line.startswith("ibtpo["):
                todo += line.removeprefix("ibtpo[").removesuffix("]").split(",")
            else:
                lines.add(line)
    return sorted(lines)


def test_pins_are_exact_and_triton_is_the_one_that_torch_asks_for() -> None:
    """A CPU build of torch asks for none: with another pin it takes one with CUDA to see it."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert pins["torch"] == "2.13.0" and pins["triton"] == "3.7.1"


def test_versions_are_the_makefiles() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for path in (ROOT / "README.md", *sorted((ROOT / "deploy/images").glob("server-cpu.*file"))):
        pins = re.findall(r"(torch|sglang|torchvision)==([\d.]+)", path.read_text())
        assert len(pins) >= 3
        assert all(f"{name}=={version}" in makefile for name, version in pins), path.name


# --- torchvision


def test_a_users_own_script_imports_a_model(tmp_path: Path) -> None:
    """Nothing of ours is imported by it: `make setup` saw to it."""
    python("from transformers import Qwen2ForCausalLM", folder=tmp_path)


def fake_torchvision(folder: Path, extension: str) -> None:
    package = folder / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("from . import extension, needs_it\n")
    (package / "extension.py").write_text(dedent(extension))
    fake = "import torch\n\n@torch.library.register_fake('torchvision::nms')\ndef nms(*_): ...\n"
    (package / "needs_it.py").write_text(fake)


USES = """
    import sys
    import ibtpo_torchvision
    ibtpo_torchvision.install()
    ibtpo_torchvision.install()
    assert sys.meta_path.count(ibtpo_torchvision._Finder) == 1
    import torchvision, torch
    assert torchvision.__file__.startswith(sys.argv[1]), torchvision.__file__
    print(torch.ops.torchvision.nms.default._schema)
"""


@pytest.mark.parametrize("whole", [False, True])
def test_the_operator_is_declared_only_where_the_library_has_not(
    whole: bool, tmp_path: Path
) -> None:
    library = 'import torch\ntorch.library.define("torchvision::nms", "(Tensor mine) -> Tensor")\n'
    fake_torchvision(tmp_path, library if whole else "")
    printed = python(USES, str(tmp_path), folder=tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert ("mine" in printed) == whole and ("iou_threshold" in printed) != whole


def test_the_hook_costs_an_interpreter_next_to_nothing(tmp_path: Path) -> None:
    code = """
        import json, sys, time
        before, start_s = set(sys.modules), time.perf_counter()
        sys.path.insert(0, sys.argv[1])
        import ibtpo_torchvision
        ibtpo_torchvision.install()
        print(json.dumps([time.perf_counter() - start_s, sorted(set(sys.modules) - before)]))
    """
    lines = [json.loads(python(code, str(ROOT), folder=tmp_path)) for _ in range(5)]
    assert min(seconds for seconds, _ in lines) < 0.005
    assert all(name.startswith(("ibtpo_", "importlib")) for _, names in lines for name in names)


def test_the_file_that_python_reads_is_one_line_that_bears_a_missing_package(
    tmp_path: Path,
) -> None:
    code = """
        import sys, sysconfig
        import ibtpo_torchvision
        sysconfig.get_path = lambda name: sys.argv[1]
        ibtpo_torchvision.main()
    """
    python(code, str(tmp_path), folder=tmp_path, PYTHONPATH=str(ROOT))
    text = (tmp_path / "ibtpo_torchvision.pth").read_text()
    assert text.count("\n") == 1 and text.startswith("import ")
    bare = [sys.executable, "-S", "-c", f"import sys; sys.path = sys.path[1:]\n{text}"]
    done = subprocess.run(bare, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert not done.stdout + done.stderr


# --- the order of the server's start


def llama(folder: Path) -> None:
    """The arith model's tokenizer under Llama's class."""
    made = (ROOT / "examples/arith/model/tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(made)
    settings = {"tokenizer_class": "LlamaTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 320}))


def tekken(folder: Path) -> None:
    """Mistral's own file: each byte a token."""
    special = [
        {"rank": i, "token_str": f"<{name}>", "is_control": True}
        for i, name in enumerate(("unk", "s", "/s"))
    ]
    size = 256 + len(special)
    config = {"pattern": r"\p{L}+|\p{N}|[^\p{L}\p{N}]", "num_vocab_tokens": 256, "version": "v3"}
    config |= {"default_vocab_size": size, "default_num_special_tokens": len(special)}
    vocab = [{"rank": i, "token_bytes": b64encode(bytes([i])).decode()} for i in range(256)]
    content = {"config": config, "vocab": vocab, "special_tokens": special}
    (folder / "tekken.json").write_text(json.dumps(content))
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral", "vocab_size": size}))


@pytest.mark.parametrize("write", [llama, tekken])
def test_the_stand_ins_are_there_before_the_tokenizer(
    write: Callable[[Path], None], tmp_path: Path
) -> None:
    """As in the server's start, and without the help of the set-up's file."""
    write(tmp_path)
    code = """
        import sys
        sys.meta_path[:] = [f for f in sys.meta_path if f.__module__ != "ibtpo_torchvision"]
        import server_ext.__main__ as daemon
        assert "torch" not in sys.modules and "transformers" not in sys.modules

        import server_ext.app
        from server_ext.trees.text import Tokenizer

        async def serve(config, arguments):
            print(config.device, Tokenizer(config.model).encode("3+4"))
        server_ext.app.serve = serve
        daemon.main()
    """
    printed = python(
        code, "--model", str(tmp_path), "--device", "auto", folder=tmp_path, PYTHONPATH=str(ROOT),
        CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    assert printed.startswith("cpu (")


# --- extras that are missing


@pytest.fixture
def base_only(tmp_path: Path) -> Path:
    """A folder of the packages that the project always brings, and nothing else."""
    folder = tmp_path / "site"
    folder.mkdir()
    for path in Path(sys.modules["pytest"].__file__ or "").parents[1].iterdir():
        if re.match(r"(grpc|google|numpy|numpy\.libs|typing_extensions\.py)$", path.name):
            (folder / path.name).symlink_to(path)
    return folder


def start(module: str, base: Path, *arguments: str, blocked: str = "") -> list[str]:
    """What a command says that must end with status 1; `blocked`: a package it cannot find."""
    code = f"""
        import sys
        sys.argv[0] = "x"
        if {blocked!r}:
            import site
            site.main()
            from importlib.machinery import PathFinder
            class Without(PathFinder):
                @classmethod
                def find_spec(cls, name, path=None, target=None):
                    if name.partition(".")[0] == {blocked!r}:
                        return None
                    return super().find_spec(name, path, target)
            sys.meta_path[:] = [Without if f is PathFinder else f for f in sys.meta_path]
        from {module} import main
        main()
    """
    environment = os.environ | {"PYTHONPATH": f"{base}:{ROOT}", "CUDA_VISIBLE_DEVICES": ""}
    line = [sys.executable, "-S", "-c", dedent(code), *arguments]
    done = subprocess.run(
        line, cwd=base, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1, (done.returncode, done.stderr)
    return done.stderr.splitlines()


@pytest.mark.parametrize(
    ("module", "arguments", "prog", "names", "extra"),
    [
        ("server_ext.__main__", ["--model", "m"], "ibtpo-server", "pydantic_settings, ", "gpu"),
        ("learner.__main__", ["--model", "m"], "ibtpo-learner", "pydantic_settings, ", "learner"),
        ("ibtree.cli", ["sample", "--prompt", "x"], "ibtpo", "rich is", "cli"),
        ("ibtree.cli", ["queue"], "ibtpo", "rich is", "cli"),
    ],
)
def test_one_line_says_which_extra_is_missing(module, arguments, prog, names, extra, base_only):
    (line,) = start(module, base_only, *arguments)
    assert line.startswith(f"{prog}: {names}") and "not installed" in line
    assert f"pip install '.[{extra}]' in the checkout of ibtpo" in line and "ibtpo[" not in line


def test_a_client_with_nothing_more_installed_answers_in_json(base_only: Path) -> None:
    (line,) = start("ibtree.cli", base_only, "queue", "--json", "--server=127.0.0.1:1")
    assert "UNAVAILABLE" in line


@pytest.mark.parametrize(
    ("blocked", "extra"), [("math_verify", "server"), ("sglang", "gpu"), ("zmq", "cpu")]
)
def test_one_line_says_which_package_of_the_server_is_missing(
    blocked: str, extra: str, base_only: Path
) -> None:
    model = ROOT / "examples/arith/model"
    ports = ["--port=0", "--health-port=0", "--web-port=0", f"--data-dir={base_only}/data"]
    lines = start(
        "server_ext.__main__", base_only, f"--model={model}", "--device=cpu", *ports,
        blocked=blocked,
    )  # fmt: skip
    assert lines[-1].startswith(f"ibtpo-server: {blocked} is not installed;")
    assert f"pip install '.[{extra}]'" in lines[-1]
    assert not any("Traceback" in line for line in lines)


def imported(folders: list[str]) -> set[str]:
    """Top-level modules that are imported anywhere below, those of Python and ours left out."""
    names = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add((node.module or "").partition(".")[0])
    return names - set(sys.stdlib_module_names) - OURS - BASE


@pytest.mark.parametrize(
    ("command", "folders"),
    [
        ("server", ["server_ext", "ibtpo_settings", "ibtree/weights"]),
        ("learner", ["learner", "ibtpo_settings", "ibtree/weights"]),
        ("cli", ["ibtree/cli"]),
    ],
)
def test_each_command_knows_all_that_it_imports(command: str, folders: list[str]) -> None:
    missing = imported(folders) - set(NEEDED[command])
    # pydantic comes with pydantic_settings, msgspec with SGLang, datasets are asked for by prompts
    assert missing <= {"pydantic", "pydantic_core", "msgspec", "pyarrow", "datasets"}


@pytest.mark.parametrize("extra", ["server", "learner", "cli"])
def test_the_extra_brings_what_the_command_asks_for(extra: str) -> None:
    dists = packages_distributions()
    brought = {re.split(r"[\[<>=]", line)[0].lower() for line in EXTRAS[extra]}
    brought |= {"pyyaml"} if any("pydantic-settings[yaml]" in x for x in EXTRAS[extra]) else set()
    brought |= {"sglang", "torch"} if extra == "server" else set()
    for module in NEEDED[extra]:
        names = {name.lower().replace("_", "-") for name in dists[module]}
        assert names & brought, (module, names)
