"""SGLang as this package was written against it: checked at the start, in every process of it.

SGLang's internals move fast, and what goes by another name, or takes other arguments, need not
fail at once: a hook that nobody calls protects no tree. So whatever is overridden, patched or
called past its public face stands in `names_of_0_5_21.py`, with its arguments, and the start ends
with the first that differs.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import sys
import textwrap
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from server_ext.engine.names_of_0_5_21 import CALLED, HELD, SGLANG
from server_ext.errors import OtherSglangError

ANY_VERSION_VARIABLE = "IBTPO_ANY_SGLANG"
"""Environment variable for `make test-newest`: only the names are checked, not the version."""


def check() -> None:
    """Raises OtherSglangError that names the version, or the first name that differs."""
    import sglang

    if sglang.__version__ != SGLANG and os.environ.get(ANY_VERSION_VARIABLE) != "1":
        raise OtherSglangError(
            f"SGLang {sglang.__version__} is installed, and this is written against {SGLANG}; "
            f"pip install sglang=={SGLANG}"
        )
    for problem in differences(CALLED, HELD):
        raise OtherSglangError(f"SGLang {sglang.__version__}: {problem}")


def differences(called: Mapping[str, Mapping[str, str]], held: Mapping[str, str]) -> Iterator[str]:
    """What is not as the tables say, in their order: a line a name."""
    for owner, functions in called.items():
        for name, arguments in functions.items():
            path = f"sglang.{owner}.{name}" if owner else f"sglang.{name}"
            try:
                now = face(_find(path))
            except LookupError:
                yield f"there is no {path}"
            else:
                if now != arguments:
                    yield f"{path} takes {now}, not {arguments}"
    for owner, names in held.items():
        path = f"sglang.{owner}" if owner else "sglang"
        try:
            there = _holds(_find(path))
        except LookupError:
            yield f"there is no {path}"
            continue
        yield from (f"{path} has no {name}" for name in names.split() if name not in there)


def face(function: Any) -> str:
    """The arguments a function or class takes, such as `(self, one, two=, *, three=, **more)`:
    names and kinds, and whether there is a default; neither types nor the defaults themselves."""
    stars: dict[Any, str] = {
        inspect.Parameter.VAR_POSITIONAL: "*",
        inspect.Parameter.VAR_KEYWORD: "**",
    }
    words = []
    keywords = False
    # behind our own hooks, where they have been put in already
    for parameter in inspect.signature(inspect.unwrap(function)).parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not keywords:
            words.append("*")
        keywords |= parameter.kind in (
            inspect.Parameter.KEYWORD_ONLY,
            inspect.Parameter.VAR_POSITIONAL,
        )
        default = "" if parameter.default is inspect.Parameter.empty else "="
        words.append(f"{stars.get(parameter.kind, '')}{parameter.name}{default}")
    return f"({', '.join(words)})"


def _find(path: str) -> Any:
    """The thing with this dotted path. Raises LookupError."""
    parts = path.split(".")
    for split in range(len(parts), 0, -1):
        try:
            thing: Any = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError as error:
            if not path.startswith(error.name or path):
                raise  # a package that SGLang itself imports
            continue
        for name in parts[split:]:
            if not hasattr(thing, name):
                raise LookupError(path)
            thing = getattr(thing, name)
        return thing
    raise LookupError(path)


def _holds(thing: Any) -> set[str]:
    """What a module, or the objects of a class, have: what is there now, what is declared, and
    what methods of the class assign to self."""
    names = set(dir(thing))
    for cls in thing.__mro__ if isinstance(thing, type) else ():
        names |= set(getattr(cls, "__annotations__", ()))
        if cls.__module__.startswith("sglang"):
            names |= _assigned(cls)
    return names


@cache
def _assigned(cls: type) -> set[str]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


def main() -> None:
    """`python -m server_ext.engine.names`: prints every name that differs; exits 1 if one does."""
    from server_ext.engine import cpu

    cpu.select()
    import sglang

    found = list(differences(CALLED, HELD))
    print(
        f"SGLang {sglang.__version__}: {len(found)} names differ from {SGLANG}", *found, sep="\n  "
    )
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
