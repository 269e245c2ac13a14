"""The launch modes that the server does not work in: one table, read from the top.

What is not in it works, or SGLang refuses it itself. The start ends with the first row that is
used, and says what to do instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Launch:
    """What a start would run: `values` are SGLang's arguments with what it decided itself, `model`
    is its ModelConfig, `stored_types` the safetensors dtype of each tensor in the folder."""

    values: Mapping[str, Any]
    model: Any
    device: str
    dtype: str
    folder: str
    backend: str
    stored_types: Mapping[str, str]


@dataclass(frozen=True)
class Mode:
    """A mode that is refused. `found`: what of the launch puts it into the mode, empty if nothing
    does."""

    name: str
    found: Callable[[Launch], str]
    why: str
    instead: str
    field: str = "--"


def _given(name: str, *fine: Any) -> Callable[[Launch], str]:
    """Found where the argument is something else than the values in `fine`."""

    def found(launch: Launch) -> str:
        value = launch.values[name]
        return "" if value in fine else _option(name, value)

    return found


def _any(*names: str) -> Callable[[Launch], str]:
    """Found where one of the arguments is given: not None, not False, not empty."""

    def found(launch: Launch) -> str:
        given = [_option(name, launch.values[name]) for name in names if launch.values[name]]
        return ", ".join(given)

    return found


def _more_than_one(*names: str) -> Callable[[Launch], str]:
    def found(launch: Launch) -> str:
        sizes = [(name, launch.values[name]) for name in names]
        return ", ".join(_option(name, size) for name, size in sizes if (size or 1) > 1)

    return found


def _option(name: str, value: Any) -> str:
    option = f"--{name.replace('_', '-')}"
    return option if value is True else f"{option}={value}"


# ---- what takes more than one argument to see


def _other_folder(launch: Launch) -> str:
    own = Path(launch.folder).resolve()
    paths = {name: launch.values[name] for name in ("model_path", "tokenizer_path")}
    other = [_option(name, path) for name, path in paths.items()
             if path is not None and Path(path).resolve() != own]  # fmt: skip
    return ", ".join(other)


def _other_dtype(launch: Launch) -> str:
    dtype = launch.values["dtype"]
    return "" if dtype == launch.dtype else _option("dtype", dtype)


def _other_device(launch: Launch) -> str:
    device = launch.values["device"]
    return "" if device in (launch.device, None) else _option("device", device)


def _other_radix_cache(launch: Launch) -> str:
    chosen = launch.values["radix_cache_backend"] or ""
    return "" if chosen == launch.backend else _option("radix_cache_backend", chosen)


def _chunk_cache(launch: Launch) -> str:
    if launch.values["disable_radix_cache"]:
        return "--disable-radix-cache, or SGLang's own choice for this model and these arguments"
    if launch.model.is_multimodal and launch.values["model_impl"] == "transformers":
        return "--model-impl=transformers with a multimodal model"
    return ""


def _plain_data_parallel(launch: Launch) -> str:
    several = (launch.values["dp_size"] or 1) > 1
    return _option("dp_size", launch.values["dp_size"]) if several and not launch.values[
        "enable_dp_attention"
    ] else ""  # fmt: skip


def _deterministic_on_cpu(launch: Launch) -> str:
    on = launch.device == "cpu" and launch.values["enable_deterministic_inference"]
    return "--enable-deterministic-inference" if on else ""


def _data_parallel_on_cpu(launch: Launch) -> str:
    size = launch.values["dp_size"] or 1
    return _option("dp_size", size) if launch.device == "cpu" and size > 1 else ""


def _pages_on_cpu(launch: Launch) -> str:
    page_size = launch.values["page_size"]
    several = launch.device == "cpu" and (page_size or 1) > 1
    return _option("page_size", page_size) if several else ""


def _quantised(launch: Launch) -> str:
    method = launch.model.quantization
    given = _any("modelopt_quant", "quantize_and_serve", "rl_quant_profile")(launch)
    return given or (f"quantization {method}" if method else "")


def _windows_in_a_pool_of_their_own(launch: Launch) -> str:
    return _architecture(launch) if launch.model.is_hybrid_swa else ""


def _recurrent_layers(launch: Launch) -> str:
    return _architecture(launch) if launch.values["uses_mamba_radix_cache"] else ""


def _not_generating(launch: Launch) -> str:
    return "" if launch.model.is_generation else _architecture(launch)


def _architecture(launch: Launch) -> str:
    return ", ".join(launch.model.hf_config.architectures)


_WIDTHS = {"F8_E4M3": 1, "F8_E5M2": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8}
_SERVED_WIDTHS = {"float16": 2, "bfloat16": 2, "float32": 4}


def _wider_than_served(launch: Launch) -> str:
    """In a folder of several types the wide ones are wide on purpose: routers, say."""
    floats = {n: t for n, t in launch.stored_types.items() if t in _WIDTHS}
    served = _SERVED_WIDTHS[launch.dtype]
    wide = [name for name, stored in floats.items() if _WIDTHS[stored] > served]
    if not wide or len(wide) == len(floats):
        return ""
    return f"{len(wide)} of {len(floats)} tensors, {wide[0]} is {floats[wide[0]]}"


MODES: tuple[Mode, ...] = (
    # ---- what is ibtpo-server's own to say
    Mode("another model folder", _other_folder,
         "weights are stored and checked against the server's", "leave it out; --model says it"),
    Mode("another precision", _other_dtype,
         "learners are told the server's", "leave it out; --dtype of ibtpo-server says it"),
    Mode("another device", _other_device,
         "the server prepares for its own", "leave it out; --device of ibtpo-server says it"),
    Mode("a label for the weights", _given("weight_version", "0"),
         "the server numbers its versions", "leave --weight-version out"),
    Mode("other weights than the folder's", _given("load_format", "auto", "safetensors"),
         "version 0 is the folder", "leave --load-format out"),
    Mode("adapters", _any("enable_lora", "lora_paths"),
         "log-probabilities would be those of other weights", "merge the adapter into the model"),
    Mode("preferred sampling parameters", _any("preferred_sampling_params"),
         "a prompt's options say how tokens are drawn", "leave it out"),
    Mode("prompts cut to length", _any("allow_auto_truncate"),
         "a tree would grow from another prompt", "leave it out"),
    # ---- the cache
    Mode("another radix cache", _other_radix_cache,
         "the server's keeps the prefixes of growing trees", "leave it out: it is ours"),
    Mode("deterministic mode on a CPU", _deterministic_on_cpu,
         "SGLang has no kernels for it there", "a GPU, or leave it out"),
    Mode("pages of several tokens on a CPU", _pages_on_cpu,
         "SGLang gives them out with Triton, which has no CPU", "a GPU, or leave --page-size out"),
    Mode("a cache that keeps no prefixes", _chunk_cache,
         "trees are grown on cached prefixes", "leave it out, or another attention backend"),
    Mode("an eviction order other than lru", _given("radix_eviction_policy", "lru"),
         "open trees are kept by being the most recently used", "leave it out"),
    Mode("a cache with more storeys", _any(
        "enable_hierarchical_cache", "hicache_storage_backend", "enable_lmcache", "enable_flexkv",
        "enable_unified_cache_external_linker", "enable_hisparse"),
         "what comes back from there may be of other weights", "leave it out"),
    Mode("sessions in the cache", _any("enable_streaming_session", "enable_session_radix_cache"),
         "they put another cache around the server's", "leave it out"),
    Mode("a pool of its own for sliding windows", _windows_in_a_pool_of_their_own,
         "windows go that open trees branch from", "-- --disable-hybrid-swa-memory"),
    Mode("recurrent layers", _recurrent_layers,
         "their state cannot be taken up in the middle of a path", "a model of attention layers"),
    # ---- parallel
    Mode("data parallelism without data-parallel attention", _plain_data_parallel,
         "SGLang updates the weights of one rank only",
         "add --enable-dp-attention, or start more servers"),
    Mode("data parallelism on a CPU", _data_parallel_on_cpu,
         "it pads batches, which the attention backends for a CPU do not take",
         "--tp-size, or start more servers"),
    Mode("pipeline parallelism", _more_than_one("pp_size"),
         "weight updates reach the first stage only", "--tp-size"),
    Mode("several nodes", _more_than_one("nnodes"),
         "weight updates reach the ranks of one machine only", "a server on each node"),
    Mode("context parallelism", _more_than_one("dcp_size", "attn_cp_size"),
         "a path's slots lie on several ranks", "--tp-size"),
    Mode("prefill and decode apart", _given("disaggregation_mode", "null"),
         "a tree's prefixes must stay where it grows", "leave it out"),
    Mode("several tokenizer processes",
         _more_than_one("tokenizer_worker_num", "detokenizer_worker_num"),
         "the server itself is the tokenizer's process", "leave it out"),
    # ---- the model and its weights
    Mode("no tokenizer in SGLang", _any("skip_tokenizer_init"),
         "it looks for stop strings", "leave it out"),
    Mode("a model that does not generate", _not_generating,
         "trees are made of generated tokens", "a causal language model"),
    Mode("diffusion", _any("dllm_algorithm"),
         "tokens have no log-probability given those before", "a causal language model"),
    Mode("speculative decoding", _any("speculative_algorithm"),
         "a draft's weights are not updated, and branches could not join decode steps",
         "leave it out"),
    Mode("quantised weights", _quantised,
         "learners push bfloat16, float16 or float32, and no canary knows the rounding",
         "weights that are not quantised, and no --quantization"),
    Mode("weights of several types", _wider_than_served,
         "weights are pushed in one type, which would cut these off", "--dtype float32", "model"),
)  # fmt: skip
