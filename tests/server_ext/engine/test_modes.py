"""Each launch mode works or is refused: SGLang's own reading of the arguments against the table."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

import tests.server_ext.cache.scheduler  # noqa: F401  prepares sglang for the CPU
from ibtree.errors import FieldError
from server_ext.engine.arguments import Resolved, check, server_arguments
from server_ext.engine.modes import MODES, Launch
from tests import ROOT

MODEL = ROOT / "examples/arith/model"
DETERMINISTIC = "--enable-deterministic-inference"


def resolved(*arguments: str, model: Path = MODEL, **more) -> Resolved:
    return Resolved(server_arguments(str(model), "cpu", "float32", "ibtree", arguments, **more))


def refusal(*arguments: str, model: Path = MODEL) -> str:
    with pytest.raises(FieldError) as caught:
        resolved(*arguments, model=model)
    return str(caught.value)


REFUSED = {
    "another model folder": ["--tokenizer-path=elsewhere"],
    "another precision": ["--dtype=bfloat16"],
    "a label for the weights": ["--weight-version=7"],
    "other weights than the folder's": ["--load-format=dummy"],
    "adapters": ["--enable-lora", "--max-lora-rank=8", "--lora-target-modules=q_proj"],
    "preferred sampling parameters": ['--preferred-sampling-params={"top_k": 1}'],
    "prompts cut to length": ["--allow-auto-truncate"],
    "deterministic mode on a CPU": [DETERMINISTIC],
    "pages of several tokens on a CPU": ["--page-size=16"],
    "a cache that keeps no prefixes": ["--disable-radix-cache"],
    "an eviction order other than lru": ["--radix-eviction-policy=lfu"],
    "a cache with more storeys": ["--enable-lmcache"],
    "sessions in the cache": ["--enable-streaming-session"],
    "data parallelism without data-parallel attention": ["--dp-size=2"],
    "data parallelism on a CPU": ["--tp-size=2", "--dp-size=2", "--enable-dp-attention"],
    "pipeline parallelism": ["--pp-size=2"],
    "several nodes": ["--nnodes=2", "--node-rank=0", "--dist-init-addr=127.0.0.1:5000"],
    "prefill and decode apart": ["--disaggregation-mode=prefill"],
    "several tokenizer processes": ["--tokenizer-worker-num=2"],
    "no tokenizer in SGLang": ["--skip-tokenizer-init"],
    "a model that does not generate": ["--is-embedding"],
    "speculative decoding": ["--speculative-algorithm=NGRAM"],
    "quantised weights": ["--quantization=fp8"],
}
"""By the arguments that SGLang itself takes on a CPU."""


@pytest.mark.parametrize("mode", REFUSED)
def test_refused(mode):
    says = refusal(*REFUSED[mode])
    (row,) = (row for row in MODES if row.name == mode)
    assert says.startswith(f"--: {mode} (")
    assert row.why in says and says.endswith(f"allowed: {row.instead}")


WORKS = [
    ["--tp-size=2"],
    ["--context-length=128"],
    ["--attention-backend=torch_native"],
    ["--enable-mixed-chunk", "--chunked-prefill-size=128"],
]


@pytest.mark.parametrize("arguments", WORKS, ids=" ".join)
def test_not_refused(arguments):
    assert resolved(*arguments).context_tokens in (512, 128)


@pytest.mark.parametrize(
    "arguments",
    [["--hicache-storage-backend=file", "--enable-hierarchical-cache"], ["--dcp-size=2"],
     ["--attn-cp-size=2"], ["--enable-flexkv"], ["--device=cuda"]],
    ids=" ".join,
)  # fmt: skip
def test_refused_by_whoever_sees_it_first(arguments):
    """On this machine SGLang's own checks may come before the table's."""
    assert refusal(*arguments).startswith("--: ")


def test_what_sglang_decides_itself_counts_like_what_was_asked_for():
    """Its record of the arguments says what was asked for only. Here the radix cache was asked for,
    and SGLang puts it off: it does not know that the backend takes both."""
    from sglang.srt.server_args import prepare_server_args

    backend = "--attention-backend=flashinfer"
    line = [f"--model-path={MODEL}", "--device=cpu", backend, DETERMINISTIC]
    server_args = prepare_server_args(line)
    server_args.resolve_once()
    assert not server_args.disable_radix_cache
    assert Resolved(server_args).values["disable_radix_cache"]


# ---- models


def folder(tmp_path: Path, **changes) -> Path:
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return model


def saved(tmp_path: Path, config) -> Path:
    model = folder(tmp_path)
    config.save_pretrained(model)
    return model


SMALL = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "max_position_embeddings": 512,
}  # fmt: skip


def test_sliding_windows_with_a_pool_of_their_own_are_refused_by_name(tmp_path):
    from transformers import GptOssConfig

    config = GptOssConfig(
        **SMALL, num_local_experts=2, num_experts_per_tok=1, sliding_window=16,
        layer_types=["sliding_attention", "full_attention"], architectures=["GptOssForCausalLM"],
    )  # fmt: skip
    model = saved(tmp_path, config)
    says = refusal(model=model)
    assert "(GptOssForCausalLM)" in says and says.endswith("-- --disable-hybrid-swa-memory")


def test_a_window_that_the_model_does_not_use_is_none(tmp_path):
    """Qwen2's folders name one, and switch it off."""
    model = folder(tmp_path, sliding_window=16, use_sliding_window=False)
    assert resolved(model=model).context_tokens == 512


def test_a_quantised_folder_is_refused(tmp_path):
    model = folder(tmp_path, quantization_config={"quant_method": "fp8", "fmt": "e4m3"})
    assert "quantised weights" in refusal(model=model)


# ---- rows that no argument on this machine leads to


def launch(**facts) -> Launch:
    """A launch of the arith model in which these are so."""
    got = resolved()
    model = SimpleNamespace(**{
        name: getattr(got.model, name)
        for name in ("is_hybrid_swa", "is_generation", "is_multimodal", "quantization", "hf_config")
    })  # fmt: skip
    for name in list(facts):
        if hasattr(model, name):
            setattr(model, name, facts.pop(name))
    device = facts.pop("on", "cpu")
    stored = facts.pop("stored_types", {})
    dtype = facts.pop("dtype_", "float32")
    assert set(facts) <= set(got.values)
    return Launch({**got.values, **facts}, model, device, dtype, str(MODEL), "ibtree", stored)


@pytest.mark.parametrize(
    ("facts", "mode"),
    [
        ({"enable_hierarchical_cache": True}, "storeys"),
        ({"hicache_storage_backend": "file"}, "storeys"),
        ({"dcp_size": 2}, "context parallelism"),
        ({"attn_cp_size": 4}, "context parallelism"),
        ({"detokenizer_worker_num": 2}, "tokenizer processes"),
        ({"uses_mamba_radix_cache": True}, "recurrent layers"),
        ({"dllm_algorithm": "LowConfidence"}, "diffusion"),
        ({"is_multimodal": True, "model_impl": "transformers"}, "keeps no prefixes"),
        ({"disable_radix_cache": True}, "keeps no prefixes"),
        ({"radix_cache_backend": "flexkv"}, "another radix cache"),
        ({"device": "cuda"}, "another device"),
        ({"rl_quant_profile": "x"}, "quantised"),
        ({"enable_session_radix_cache": True}, "sessions"),
        ({"dtype_": "bfloat16", "dtype": "bfloat16",
          "stored_types": {"a": "BF16", "router": "F32", "steps": "I64"}}, "several types"),
        ({"dtype_": "float16", "dtype": "float16",
          "stored_types": {"a": "F16", "router": "F32"}}, "several types"),
    ],
    ids=str,
)  # fmt: skip
def test_refused_rows(facts, mode):
    with pytest.raises(FieldError, match=mode):
        check(launch(**facts))


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"on": "cuda", "device": "cuda", "enable_deterministic_inference": True},
        {"on": "cuda", "device": "cuda", "page_size": 64},
        {"on": "cuda", "device": "cuda", "dp_size": 2, "enable_dp_attention": True},
        {"is_multimodal": True},
        {"stored_types": {"a": "BF16", "router": "F32"}},
        {"dtype_": "bfloat16", "dtype": "bfloat16", "stored_types": {"a": "F32", "b": "F32"}},
        {"dtype_": "bfloat16", "dtype": "bfloat16", "stored_types": {"a": "BF16", "b": "I64"}},
    ],
    ids=str,
)
def test_rows_that_are_not_met(facts):
    check(launch(**facts))


def test_every_row_is_tried_here():
    tried = set(REFUSED) | {"another device", "another radix cache", "context parallelism",
                            "a pool of its own for sliding windows", "recurrent layers",
                            "diffusion", "weights of several types"}  # fmt: skip
    assert {row.name for row in MODES} == tried


# ---- the environment


@pytest.mark.parametrize("value", ["1", "true", "TRUE", "yes", "on", "2"])
def test_log_probabilities_at_temperature_1_are_refused(monkeypatch, value):
    monkeypatch.setenv("SGLANG_RETURN_ORIGINAL_LOGPROB", value)
    assert "temperature 1" in refusal() and "unset SGLANG_RETURN_ORIGINAL_LOGPROB" in refusal()


@pytest.mark.parametrize("value", ["", "0", "false"])
def test_a_variable_that_is_off_is_none(monkeypatch, value):
    monkeypatch.setenv("SGLANG_RETURN_ORIGINAL_LOGPROB", value)
    resolved()
