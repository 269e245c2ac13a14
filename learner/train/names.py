"""A policy's tensors under the names of its model folder.

transformers holds some models otherwise than their files do, such as the experts of a mixture in
one tensor; `save_pretrained` turns that back, and so does this.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ibtree.errors import FieldError
from ibtree.weights.manifest import TensorSpec
from ibtree.weights.model_folder import checkpoint_specs
from learner.dist.state import untied
from learner.train.model import mend_torchvision


def as_stored(model: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's tensors (of its state dict, tied ones once) as `save_pretrained` would name and
    cut them."""
    from transformers.core_model_loading import revert_weight_conversion

    unsaved = model._keys_to_ignore_on_save or ()
    kept = {name: tensor for name, tensor in weights.items() if name not in unsaved}
    stored: dict[str, Tensor] = revert_weight_conversion(model, kept)
    return stored


def check_architecture(folder: Path) -> None:
    """Raises FieldError, before anything is loaded, if this architecture's weights would not have
    the names and shapes of the folder's."""
    mend_torchvision()
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise FieldError("model", f"{folder} does not load: {error}", "a HF folder") from error
    conversions = get_model_conversion_mapping(model)
    if not any(isinstance(conversion, PrefixChange) for conversion in conversions):
        check_names(model, folder)  # else loading tells which prefix the files have


def check_names(model: Any, folder: Path) -> None:
    """Raises FieldError, with the first difference, unless the names and shapes of what is pushed
    are those of the model folder, which the server expects."""
    weights = untied(model, model.state_dict())
    blank = {name: torch.empty(w.shape, device="meta") for name, w in weights.items()}
    pushed = {name: tuple(w.shape) for name, w in as_stored(model, blank).items()}
    difference = _difference(pushed, checkpoint_specs(folder))
    if difference:
        problem = f"{folder}: {difference}, so its weights could not be pushed"
        raise FieldError("model", problem, f"the tensors of {type(model).__name__}")


def _difference(pushed: Mapping[str, tuple[int, ...]], expected: Mapping[str, TensorSpec]) -> str:
    for name in sorted(pushed.keys() | expected.keys()):
        if name not in pushed:
            return f"transformers' model has no {name}"
        if name not in expected:
            return f"the files hold no {name}"
        if pushed[name] != expected[name].shape:
            shapes = list(pushed[name]), list(expected[name].shape)
            return f"{name} is {shapes[0]} in transformers' model and {shapes[1]} in the files"
    return ""
