"""SGLang's names: the table is true, complete, and a start fails where it is not true."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import tests.server_ext.cache.scheduler  # noqa: F401  prepares sglang for the CPU
from server_ext.attention import registry
from server_ext.cache import plugin
from server_ext.engine import loading, names
from server_ext.engine.names_of_0_5_21 import CALLED, HELD, SGLANG
from server_ext.errors import OtherSglangError
from tests import ROOT

FILES = sorted(
    path
    for room in ("engine", "cache", "attention")
    for path in (ROOT / "server_ext" / room).glob("*.py")
    if not path.name.startswith("names")
)
PATHS = {f"sglang.{owner}.{name}" for owner, functions in CALLED.items() for name in functions}
ATTRIBUTES = {f"sglang.{owner}.{name}" for owner, words in HELD.items() for name in words.split()}
OWNERS = {f"sglang.{owner}" for owner in (*CALLED, *HELD)}
KNOWN = PATHS | ATTRIBUTES | OWNERS


def test_the_installed_one_is_as_the_table_says():
    names.check()


# ---- it fails where it should


def test_another_version_is_named(monkeypatch):
    monkeypatch.setattr("sglang.__version__", "0.5.99")
    with pytest.raises(OtherSglangError, match=rf"0\.5\.99 is installed.*{SGLANG}"):
        names.check()
    monkeypatch.setenv(names.ANY_VERSION_VARIABLE, "1")
    names.check()


@pytest.mark.parametrize(
    "path",
    [
        "sglang.srt.managers.scheduler.Scheduler.get_next_batch_to_run",
        "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache._evict_device_leaf",
        "sglang.srt.layers.sampler.Sampler._sync_token_ids_across_tp",
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._dispatch_to_scheduler",
    ],
)
def test_a_function_that_takes_something_else(monkeypatch, path):
    owner, _, name = path.rpartition(".")
    monkeypatch.setattr(names._find(owner), name, lambda self, another: None)
    with pytest.raises(OtherSglangError, match=rf"{path} takes \(self, another\), not"):
        names.check()
    monkeypatch.undo()
    names.check()


def test_a_function_and_an_attribute_that_are_gone(monkeypatch):
    from sglang.srt.layers import sampler
    from sglang.srt.managers import schedule_batch

    monkeypatch.delattr(sampler, "register_sampler_backend")
    with pytest.raises(OtherSglangError, match=r"there is no .*register_sampler_backend"):
        names.check()
    monkeypatch.undo()

    class NextBatchPlan:
        def __init__(self, batch_to_run, running_batch):
            pass

    monkeypatch.setattr(schedule_batch, "NextBatchPlan", NextBatchPlan)
    with pytest.raises(OtherSglangError, match="NextBatchPlan has no batch_to_run"):
        names.check()


def test_a_package_that_sglang_lacks_is_not_taken_for_a_name_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "lacking.py").write_text("import nowhere_to_be_found")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="nowhere_to_be_found"):
        names._find("lacking.name")
    with pytest.raises(LookupError):
        names._find("nowhere_at_all.name")


def test_our_own_hooks_are_seen_through():
    import functools

    def stock(self, one, *, two=2):
        pass

    @functools.wraps(stock)
    def hooked(*args, **kwargs):
        pass

    assert names.face(hooked) == names.face(stock) == "(self, one, *, two=)"
    assert names.face(lambda *args, key, **more: 0) == "(*args, key, **more)"


def test_the_plug_in_registers_nothing_then(monkeypatch):
    from server_ext import plugin as entry_point

    def differs() -> None:
        raise OtherSglangError("differs")

    monkeypatch.setattr(names, "check", differs)
    monkeypatch.setattr(entry_point, "register_sampler", lambda: pytest.fail("registered"))
    with pytest.raises(OtherSglangError):
        entry_point.register()


# ---- nothing is missing in it


def imported(tree: ast.AST) -> dict[str, str]:
    """SGLang's paths by the names that the file gives them."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sglang":
            found |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        if isinstance(node, ast.Import):
            found |= {a.asname or a.name: a.name for a in node.names if a.name == "sglang"}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_is_imported_stands_in_it(path: Path) -> None:
    for name in imported(ast.parse(path.read_text())).values():
        below = any(known.startswith(f"{name}.") for known in KNOWN)
        assert name in KNOWN or below, name


def subclasses() -> Iterator[tuple[ast.ClassDef, str]]:
    for path in FILES:
        tree = ast.parse(path.read_text())
        stock = imported(tree)
        for node in ast.walk(tree):
            for base in node.bases if isinstance(node, ast.ClassDef) else ():
                module, _, name = ast.unparse(base).rpartition(".")
                if (module or name) in stock:
                    yield node, f"{stock[module]}.{name}" if module else stock[name]


def test_what_is_overridden_or_called_in_a_subclass_stands_in_it() -> None:
    checked = 0
    for node, base in subclasses():
        module, _, name = base.rpartition(".")
        stock = getattr(importlib.import_module(module), name)
        own = {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
        used = {method for method in own if hasattr(stock, method) and method != "__init__"}
        for part in ast.walk(node):
            if isinstance(part, ast.Attribute):
                of = ast.unparse(part.value)
                inherited = of == "super()" or (of == "self" and part.attr not in own)
                used |= {part.attr} if inherited and hasattr(stock, part.attr) else set()
        missing = {f"{base}.{method}" for method in used} - KNOWN
        assert not missing
        checked += len(used)
    assert checked >= 20


def test_hooks_stand_in_it() -> None:
    assert {f"{plugin._SCHEDULER}.{method}" for method in plugin._HOOKS} <= PATHS
    assert set(registry._HOOKS) <= PATHS
    assert {f"{loading._MANAGER}.{method}" for method in loading._ANSWERS} <= PATHS
    assert loading._UNWRAP in PATHS


def test_private_names_of_others_stand_in_it() -> None:
    """Whatever begins with an underscore and is nowhere set in this package is SGLang's."""
    trees = [ast.parse(path.read_text()) for path in (ROOT / "server_ext").rglob("*.py")]
    ours = {n.attr for tree in trees for n in ast.walk(tree)
            if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)
            and ast.unparse(n.value) == "self"}  # fmt: skip
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    ours |= {n.name for tree in trees for n in ast.walk(tree) if isinstance(n, functions)}
    known = {path.rpartition(".")[2] for path in KNOWN}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
                private = not node.attr.startswith("__")
                assert not private or node.attr in ours | known, (path.name, node.attr)


OBJECTS = {
    "scheduler": "sglang.srt.managers.scheduler.Scheduler",
    "plan": "sglang.srt.managers.schedule_batch.NextBatchPlan",
    "new": "sglang.srt.managers.schedule_batch.ScheduleBatch",
    "running": "sglang.srt.managers.schedule_batch.ScheduleBatch",
    "request": "sglang.srt.managers.schedule_batch.Req",
}
"""What joining.py calls SGLang's objects."""


def test_what_joining_reads_and_sets_stands_in_it() -> None:
    tree = ast.parse((ROOT / "server_ext/cache/joining.py").read_text())
    checked = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in OBJECTS:
            if node.attr.startswith("ibtree_"):
                continue
            path = f"{OBJECTS[ast.unparse(node.value)]}.{node.attr}"
            assert path in KNOWN, path
            checked.add(path)
    assert len(checked) > 30
