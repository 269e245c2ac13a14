"""What is pushed and exported has the names of the model's files, however transformers holds it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ibtree import Client
from ibtree.errors import FieldError
from ibtree.weights.model_folder import INDEX, checkpoint_specs
from learner.dist.process_group import ALONE
from learner.io.checkpoint import TrainState
from learner.io.export import Exports
from learner.io.publish import Publisher
from learner.run import new_trainer
from learner.train.model import load_policy, vocabulary_of
from learner.train.names import check_architecture, check_names
from tests.learner.recorded import RecordedServer
from tests.learner.tiny import CPU, causal_lm, config

SHAPE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings",
)  # fmt: skip
WEIGHTS = "model.safetensors"
EXPERTS: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def saved(folder: Path, kind: str, **options: Any) -> Path:
    shard = options.pop("max_shard_size", "1GB")
    causal_lm(kind, **options).save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer.json").write_text('{"model": {}, "added_tokens": []}')
    return folder


def beside(folder: Path, **tensors: torch.Tensor) -> Path:
    """The folder with these tensors in its file, too."""
    content = load_file(folder / WEIGHTS)
    save_file({**content, **tensors}, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def with_head(folder: Path) -> Path:
    return beside(saved(folder, "Qwen2", tied=True), **{"lm_head.weight": torch.randn(40, 16)})


def with_rotary_tables(folder: Path) -> Path:
    names = [f"model.layers.{n}.self_attn.rotary_emb.inv_freq" for n in range(2)]
    return beside(saved(folder, "Llama"), **{name: torch.ones(4) for name in names})


def sharded(folder: Path) -> Path:
    saved(folder, "Llama", tied=False, max_shard_size="5KB")
    assert (folder / INDEX).is_file() and len(list(folder.glob("*.safetensors"))) > 2
    return folder


def with_old_file(folder: Path) -> Path:
    """transformers prefers model.safetensors to the index, SGLang the index."""
    causal_lm("Llama", seed=1, tied=False).save_pretrained(folder)
    (folder / WEIGHTS).rename(folder / "kept")
    sharded(folder)
    (folder / "kept").rename(folder / WEIGHTS)
    return folder


def with_other_formats(folder: Path) -> Path:
    saved(folder, "Llama")
    for name in ("consolidated", "adapter_model"):
        save_file({"layers.0.attention.wq.weight": torch.ones(3)}, folder / f"{name}.safetensors")
    return folder


FOLDERS: dict[str, Callable[[Path], Path]] = {
    "Qwen3-MoE": lambda folder: saved(folder, "Qwen3Moe", tied=False, **EXPERTS["Qwen3Moe"]),
    "Mixtral": lambda folder: saved(folder, "Mixtral", tied=False, **EXPERTS["Mixtral"]),
    "tied": lambda folder: saved(folder, "Qwen2"),
    "tied beside a head": with_head,
    "rotary tables": with_rotary_tables,
    "shards": sharded,
    "an old file beside shards": with_old_file,
    "other formats": with_other_formats,
}


@pytest.mark.parametrize("write", FOLDERS.values(), ids=FOLDERS)
def test_what_is_trained_comes_back_from_what_is_pushed_and_exported(tmp_path, write):
    model, out_dir = write(tmp_path / "model"), tmp_path / "run"
    specs = checkpoint_specs(model)
    check_architecture(model)
    policy = load_policy(model, CPU, "float32")
    check_names(policy, model)
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.25 * torch.randn(weight.shape)
    with (
        RecordedServer(tmp_path / "server", model, []) as server,
        Client(server.target, timeout_s=20) as client,
    ):
        publisher, state = Publisher(client, model, out_dir, patience_s=20), TrainState(version=1)
        publisher.stage(policy, state)
        publisher.push()
        assert server.updater.serving.version == 1
        pushed = server.updater._engine.weights
    assert {name: tuple(tensor.shape) for name, tensor in pushed.items()} == {
        name: spec.shape for name, spec in specs.items()
    }
    Exports(model, out_dir, publisher.staged, publisher.dtype).write("last", state)
    again = load_policy(out_dir / "last", CPU, "float32")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, policy(ids).logits)
    assert not torch.equal(policy(ids).logits, load_policy(model, CPU, "float32")(ids).logits)


def test_loaded_is_what_the_server_loads(tmp_path):
    """The files of the index, and a head that is tied whatever lies beside it."""
    folder = with_old_file(tmp_path / "shards")
    right, wrong = (causal_lm("Llama", seed=seed, tied=False) for seed in (0, 1))
    loaded = load_policy(folder, CPU, "float32").lm_head.weight
    assert torch.equal(loaded, right.lm_head.weight)
    assert not torch.equal(loaded, wrong.lm_head.weight)
    tied = load_policy(with_head(tmp_path / "tied"), CPU, "float32")
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def test_a_loaded_policy_can_be_saved_in_another_form(tmp_path):
    load_policy(sharded(tmp_path / "shards"), CPU, "float32").save_pretrained(tmp_path / "one")
    assert not (tmp_path / "one" / INDEX).exists()
    load_policy(tmp_path / "one", CPU, "float32")


def test_a_configuration_in_parts(tmp_path):
    """Gemma 3 has its vocabulary in `text_config`, and another prefix in its files."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    image = {"image_size": 28, "patch_size": 14, "intermediate_size": 16, "num_hidden_layers": 1}
    image |= {"hidden_size": 16, "num_attention_heads": 2}
    text = causal_lm("Qwen2").config.to_dict() | {"head_dim": 8, "vocab_size": 300}
    text = {name: text[name] for name in (*SHAPE, "head_dim")}
    ids = {"image_token_index": 299, "boi_token_index": 298, "eoi_token_index": 297}
    shape = Gemma3Config(text_config=text, vision_config=image, mm_tokens_per_image=4, **ids)
    Gemma3ForConditionalGeneration(shape).save_pretrained(tmp_path)
    check_architecture(tmp_path)
    policy = load_policy(tmp_path, CPU, "float32")
    check_names(policy, tmp_path)
    assert vocabulary_of(policy) == 300 and not hasattr(policy.config, "vocab_size")


def without(folder: Path, name: str) -> None:
    content = load_file(folder / WEIGHTS)
    del content[name]
    save_file(content, folder / WEIGHTS, metadata={"format": "pt"})


def reshaped(folder: Path) -> None:
    content = load_file(folder / WEIGHTS)
    content["model.norm.weight"] = torch.ones(17)
    save_file(content, folder / WEIGHTS, metadata={"format": "pt"})


def untied(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": False}))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: beside(folder, mtp=torch.ones(3)), "transformers' model has no mtp"),
        (lambda folder: without(folder, "model.norm.weight"), "files hold no model.norm.weight"),
        (reshaped, r"model.norm.weight is \[16\] in transformers' model and \[17\] in the files"),
        (untied, "files hold no lm_head.weight"),
    ],
    ids=["one more", "one less", "another shape", "no head"],
)
def test_a_folder_whose_weights_could_not_be_pushed_is_refused_unloaded(
    tmp_path, monkeypatch, spoil, said
):
    folder = saved(tmp_path, "Qwen2")
    spoil(folder)
    monkeypatch.setattr("learner.run.load_policy", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(FieldError, match=f"model: .*{said}"):
        new_trainer(config().model_copy(update={"model": folder, "device": "cpu"}), ALONE)


def test_a_missing_shard_is_named(tmp_path):
    folder = sharded(tmp_path)
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(FieldError, match=f"model: .*{gone.name} is missing"):
        new_trainer(config().model_copy(update={"model": folder, "device": "cpu"}), ALONE)
