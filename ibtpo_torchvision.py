"""Lets transformers and SGLang be imported where torchvision's own library does not load.

SGLang asks for torchvision, and PyPI's build wants CUDA: beside a CPU torch its library does not
load, the operator `torchvision::nms` is missing, and torchvision, and with it every model of
transformers, fails to import. `install` declares the operator when that has happened and not
before; where torchvision is whole, or is never imported, nothing is done. Nobody here calls the
operator; a call raises NotImplementedError.

`python -m ibtpo_torchvision` does so for every start of this Python, by a `.pth` file, so that
users' own scripts run too. That costs each start a millisecond or two: only importlib is imported.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader

TYPE_CHECKING = False  # typing's own would have to be imported
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

_MODULE = "torchvision.extension"
"""Loads torchvision's library, or notes that it does not load; what needs it comes after."""

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

_LINE = (
    'import sys; exec("try: import ibtpo_torchvision\\nexcept ModuleNotFoundError: pass\\n'
    'else: ibtpo_torchvision.install()")\n'
)
"""What the file holds; silent once ibtpo is uninstalled."""


class _Loader(SourceFileLoader):
    """Runs the module, then declares the operator if the library has not."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        import torch

        if not hasattr(torch.ops.torchvision, "nms"):
            torch.library.define("torchvision::nms", _SCHEMA)


class _Finder:
    """Finds that one module, as Python would, with our loader."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _MODULE:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def install() -> None:
    """Has the operator declared, if it is missing, when this process imports torchvision."""
    if _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)


def main() -> None:
    """Writes the `.pth` file into this Python's site-packages."""
    import sysconfig
    from pathlib import Path

    Path(sysconfig.get_path("purelib"), "ibtpo_torchvision.pth").write_text(_LINE)


if __name__ == "__main__":
    main()
