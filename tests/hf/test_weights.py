"""Hugging Face folders without transformers: both dialects of config.json, hostile files, slices, export."""

import dataclasses
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from safetensors.numpy import load_file, save_file

from jaxsi.hf import config as config_module, export
from jaxsi.hf.config import FAMILIES, HFError, config_json, parse_config, read_config
from jaxsi.hf.weights import INDEX, WEIGHTS, _open, load_weights
from jaxsi.model import decoder, mesh as meshlib
from jaxsi.model.decoder import ModelConfig, Rope
from jaxsi.model.mesh import MeshConfig, make_mesh

RAW: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 36,
    "intermediate_size": 52,
    "max_position_embeddings": 128,
    "num_attention_heads": 6,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 98,
}
LLAMA = ModelConfig(
    family="llama",
    vocab_size=98,
    embed_dim=36,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=6,
    mlp_dim=52,
    max_positions=128,
    rope=Rope(theta=500_000.0),
)
QWEN3 = dataclasses.replace(
    LLAMA, family="qwen3", head_dim=10, qk_norm=True, qkv_bias=True, o_bias=True, windows=(None, 5)
)
QWEN2 = dataclasses.replace(LLAMA, family="qwen2", qkv_bias=True, tie_embeddings=True)
MISTRAL = dataclasses.replace(LLAMA, family="mistral", windows=(4, 4))
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}


def raw_of(model_type: str, **changes: Any) -> dict[str, Any]:
    architecture = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[model_type]
    return RAW | {"model_type": model_type, "architectures": [f"{architecture}ForCausalLM"]} | changes


# ---------------------------------------------------------------------------------------------------------- config.json


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (RAW, LLAMA),
        ({k: v for k, v in RAW.items() if k != "num_key_value_heads"}, dataclasses.replace(LLAMA, num_kv_heads=6)),
        (raw_of("llama", rope_theta=10_000, rope_scaling=None), dataclasses.replace(LLAMA, rope=Rope())),
        (
            {k: v for k, v in RAW.items() if k != "rope_theta"} | {"rope_parameters": {"rope_theta": 500_000}},
            LLAMA,
        ),
        (raw_of("llama", attention_bias=True), dataclasses.replace(LLAMA, qkv_bias=True, o_bias=True)),
        (raw_of("llama", head_dim=8, pretraining_tp=1, mlp_bias=False), dataclasses.replace(LLAMA, head_dim=8)),
        (raw_of("mistral", sliding_window=5), dataclasses.replace(LLAMA, family="mistral", windows=(5, 5))),
        (raw_of("mistral"), dataclasses.replace(LLAMA, family="mistral", windows=(4096, 4096))),
        (raw_of("mistral", sliding_window=None), dataclasses.replace(LLAMA, family="mistral")),
        (raw_of("qwen2", sliding_window=9), dataclasses.replace(LLAMA, family="qwen2", qkv_bias=True)),
        (
            raw_of("qwen2", use_sliding_window=True, sliding_window=9, max_window_layers=1),
            dataclasses.replace(LLAMA, family="qwen2", qkv_bias=True, windows=(None, 9)),
        ),
        (
            raw_of(
                "qwen3", use_sliding_window=True, sliding_window=9, layer_types=["sliding_attention", "full_attention"]
            ),
            dataclasses.replace(LLAMA, family="qwen3", head_dim=128, qk_norm=True, windows=(9, None)),
        ),
    ],
)
def test_config_is_read_in_both_dialects(raw: dict[str, Any], expected: ModelConfig, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert read_config(tmp_path) == expected


@pytest.mark.parametrize("dialect", ["old", "older", "new", "both"])
@pytest.mark.parametrize(
    ("kind", "keys", "scaling"),
    [
        ("linear", {"factor": 2}, ("linear", 2.0)),
        ("llama3", LLAMA3, ("llama3", 8.0, 1.0, 4.0, 32)),
        ("yarn", YARN, ("yarn", 4.0, 32.0, 1.0, 32, 0.1 * np.log(4.0) + 1.0, True)),
        (
            "yarn",
            YARN | {"attention_factor": 0.5, "beta_fast": 16, "beta_slow": 2, "truncate": False},
            ("yarn", 4.0, 16.0, 2.0, 32, 0.5, False),
        ),
        (
            "yarn",
            YARN | {"mscale": 0.5, "mscale_all_dim": 2.0},
            ("yarn", 4.0, 32.0, 1.0, 32, (0.05 * np.log(4.0) + 1.0) / (0.2 * np.log(4.0) + 1.0), True),
        ),
        ("yarn", {"factor": None}, ("yarn", 1.0, 32.0, 1.0, 128, 1.0, True)),
    ],
)
def test_rope_scaling_is_read_in_every_dialect(dialect: str, kind: str, keys: dict[str, Any], scaling: tuple) -> None:
    old = {"type" if dialect == "older" else "rope_type": kind, **keys}
    new = {"rope_type": kind, "rope_theta": 500_000.0, **keys}
    raw = {k: v for k, v in RAW.items() if k != "rope_theta" or dialect != "new"}
    raw |= {"rope_parameters": new} if dialect in ("new", "both") else {}
    raw |= {"rope_scaling": old} if dialect != "new" else {}
    rope = parse_config(raw).rope
    assert rope.theta == 500_000.0
    assert rope.scaling == pytest.approx(scaling)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, "model_type = 'gemma' is not supported; supported are llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "model_type = None"),
        ({"model_type": ["llama"]}, "model_type = "),
        ({"architectures": ["LlamaForSequenceClassification"], "num_labels": 2}, "a classifier of 2 labels"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported .* only 'silu'"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = .* quantised"),
        ({"quantization": {"bits": 4, "group_size": 64}}, "quantization = .* quantised"),
        ({"peft_config": {"default": {"r": 8}}}, "peft_config = .* adapter; merge it"),
        ({"architectures": ["LlamaForCausalLMEagle3"]}, "architectures = .* only .*LlamaForCausalLM"),
        ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}, "architectures": ["EvilLM"]}, "architectures = "),
        ({"logit_scale": 0.1}, "logit_scale = 0.1 is not known .* could change the model's numbers"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ({"residual_multiplier": 0.2}, "residual_multiplier = 0.2"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers = "),
        ({"sliding_window": 5}, "sliding_window = 5 is not known for model_type 'llama'"),
        ({"layer_types": ["sliding_attention"] * 2}, "only full_attention in every layer"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types = .* must have 2 entries"),
        ({"rope_scaling": {"type": "dynamic", "alpha": 1000.0}}, "alpha = 1000.0 is not known for rope .*'dynamic'"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, "rope type 'longrope' is not"),
        ({"rope_scaling": [1.0]}, r"rope_scaling = \[1.0\] must be an object"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta": 3}}, "beta = 3 is not known for rope .*'linear'"),
        ({"rope_scaling": {"type": "linear"}}, "factor = None must be a positive number"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "factor = -1 must be a positive number"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "full_attention = .* is not known for rope"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1.0}}, "rope_theta is both 500000.0 and 1.0"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"hidden_size": "36"}, "hidden_size = '36' must be a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0 must be a positive integer"),
        ({"num_hidden_layers": True}, "num_hidden_layers = True"),
        ({"vocab_size": None}, "vocab_size = None"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes' must be true or false"),
        ({"num_attention_heads": 5}, "hidden_size 36 is not a multiple of num_attention_heads 5"),
        ({"num_key_value_heads": 4}, "num_heads 6 is not a multiple of num_kv_heads 4"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        (raw_of("mistral", attention_bias=True), "attention_bias = True is not supported for model_type 'mistral'"),
        (raw_of("mistral", layer_types=["full_attention"] * 2), "only sliding_attention in every layer"),
        (raw_of("qwen2", layer_types=["sliding_attention"] * 2), "use_sliding_window is False"),
        (raw_of("qwen3", layer_types=["full_attention"]), "layer_types = .* must have 2 entries"),
        (raw_of("qwen3", layer_types=["full_attention", "linear_attention"]), "layer_types = "),
        (raw_of("qwen2", use_sliding_window=True, max_window_layers=-1), "max_window_layers = -1"),
    ],
)
def test_unsupported_config_is_refused_by_name(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(RAW | changes))
    with pytest.raises(HFError, match=message) as error:
        read_config(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


# Keys of real files that have no part in the logits, and other spellings of what is supported.
HARMLESS: list[dict[str, Any]] = [
    {"_model_name_or_path": "/home/me/model.gguf", "_attn_implementation": "sdpa", "_flash_attn_2_enabled": True},
    {"use_flash_attention_2": True, "attn_implementation": "eager", "neftune_noise_alpha": 5.0},
    {"keys_to_ignore_at_inference": ["past_key_values"], "pretraining_tp": 2, "value_head_prefix": "v_head"},
    {"sequence_parallel_enabled": False, "selective_checkpoint_enabled": True, "move_model_to_device": True},
    {"eos_token": "</s>", "pad_token": "<pad>", "tokenizer_padding_side": "left", "internal_version": 3},
    {"model_max_length": 4096, "context_window_size": 2048, "prefill_chunk_size": 512, "badwordsids": [[1]]},
    {"architectures": ["LLaMAForCausalLM"]},
    {"architectures": []},
    {"layer_types": ["full_attention"] * 2},
    {"rope_scaling": {"type": "dynamic", "factor": 2.0}},  # it scales positions beyond the model's own only
    {"logit_scale": 1, "attention_sinks": False, "residual_multiplier": 1.0, "use_window": 0},
]


@pytest.mark.parametrize("keys", HARMLESS, ids=lambda keys: next(iter(keys)))
def test_harmless_keys_are_accepted(keys: dict[str, Any]) -> None:
    assert parse_config(RAW | keys) == LLAMA


def test_rope_keys_that_transformers_does_not_read_are_accepted() -> None:
    linear = {"type": "linear", "factor": 2.0, "original_max_position_embeddings": 64}
    assert parse_config(RAW | {"rope_scaling": linear}).rope.scaling == ("linear", 2.0)
    yarn = parse_config(RAW | {"rope_scaling": {"type": "yarn", **YARN, "finetuned": True}})
    assert yarn == parse_config(RAW | {"rope_scaling": {"type": "yarn", **YARN}})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"auto_map": {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}},
            "unknown keys are ignored: auto_map",
        ),
        ({"hobby": "chess", "shoe_size": 44}, "ignored: hobby = 'chess', shoe_size = 44"),
        ({"max_position_embeddings": None}, "max_position_embeddings is absent, so it is taken as 2048"),
        ({"max_position_embeddings": None, "max_sequence_length": 96}, "taken as 96"),
    ],
)
def test_doubtful_keys_are_told_once(changes: dict[str, Any], told: str, caplog: pytest.LogCaptureFixture) -> None:
    config_module._tell_once.cache_clear()
    positions = [parse_config(RAW | changes).max_positions for _ in range(2)]
    assert positions[0] == positions[1]
    [record] = caplog.records
    assert told in record.getMessage()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version https://git-lfs.github.com/spec/v1", "a Git LFS pointer"),
        ("{", "not JSON"),
        ("[1]", "holds a list"),
        ("\udcff", "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_broken_config_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(HFError, match=message):
        read_config(tmp_path)


def test_missing_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HFError, match=r"config\.json: cannot be read"):
        read_config(tmp_path / "nowhere")


floats = st.floats(0.25, 64.0)
ropes = st.one_of(
    st.none(),
    st.tuples(st.just("linear"), floats),
    st.tuples(st.just("llama3"), floats, floats, floats, st.integers(1, 10_000)),
    st.tuples(st.just("yarn"), floats, floats, floats, st.integers(1, 10_000), floats, st.booleans()),
)


@st.composite
def configs(draw: Callable) -> ModelConfig:
    family = draw(st.sampled_from(sorted(FAMILIES)))
    layers, heads = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    width = draw(st.integers(1, 4096))
    some = st.lists(st.sampled_from([None, width]), min_size=layers, max_size=layers).map(tuple)
    windows = {"llama": st.none(), "mistral": st.sampled_from([None, (width,) * layers])}
    o_bias = draw(st.booleans()) if family in ("llama", "qwen3") else False
    chosen = draw(windows.get(family, some))
    return ModelConfig(
        family=family,
        vocab_size=draw(st.integers(1, 200_000)),
        embed_dim=heads * draw(st.integers(1, 64)),
        num_layers=layers,
        num_heads=heads * draw(st.integers(1, 3)),
        num_kv_heads=heads,
        head_dim=2 * draw(st.integers(1, 64)),
        mlp_dim=draw(st.integers(1, 500)),
        max_positions=draw(st.integers(1, 2**20)),
        rope=Rope(theta=draw(st.floats(1.0, 1e7)), scaling=draw(ropes)),
        norm_eps=draw(st.floats(1e-8, 1e-2)),
        tie_embeddings=draw(st.booleans()),
        qkv_bias=o_bias or family == "qwen2",
        o_bias=o_bias,
        qk_norm=family == "qwen3",
        windows=None if chosen is None or set(chosen) == {None} else chosen,
    )


@settings(max_examples=100, deadline=None)
@given(configs())
def test_config_json_round_trip(config: ModelConfig) -> None:
    raw = json.loads(json.dumps(config_json(config, dtype="bfloat16")))
    assert parse_config(raw) == config
    assert raw["dtype"] == raw["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(LLAMA, windows=(3, 3)),
        dataclasses.replace(LLAMA, qkv_bias=True),
        dataclasses.replace(MISTRAL, windows=(3, None)),
        dataclasses.replace(MISTRAL, windows=(3, 4)),
        dataclasses.replace(QWEN2, qkv_bias=False),
        dataclasses.replace(QWEN3, qk_norm=False),
    ],
)
def test_config_that_the_family_cannot_express_is_refused(config: ModelConfig) -> None:
    with pytest.raises(HFError, match=f"model_type '{config.family}' cannot express"):
        config_json(config, dtype="float32")


# ----------------------------------------------------------------------------------------------------------------- load


def tensors_of(config: ModelConfig) -> dict[str, np.ndarray]:
    """The tensors of a random model, with Hugging Face's names and layouts written out by hand."""
    rng = np.random.default_rng(0)
    embed, heads, kv = config.embed_dim, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, embed),
        "model.norm.weight": (embed,),
    }
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, embed)
    for i in range(config.num_layers):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (embed,),
            f"{layer}.post_attention_layernorm.weight": (embed,),
            f"{layer}.self_attn.q_proj.weight": (heads, embed),
            f"{layer}.self_attn.k_proj.weight": (kv, embed),
            f"{layer}.self_attn.v_proj.weight": (kv, embed),
            f"{layer}.self_attn.o_proj.weight": (embed, heads),
            f"{layer}.mlp.gate_proj.weight": (config.mlp_dim, embed),
            f"{layer}.mlp.up_proj.weight": (config.mlp_dim, embed),
            f"{layer}.mlp.down_proj.weight": (embed, config.mlp_dim),
        }
        if config.qkv_bias:
            shapes |= {f"{layer}.self_attn.q_proj.bias": (heads,), f"{layer}.self_attn.k_proj.bias": (kv,)}
            shapes |= {f"{layer}.self_attn.v_proj.bias": (kv,)}
        if config.o_bias:
            shapes[f"{layer}.self_attn.o_proj.bias"] = (embed,)
        if config.qk_norm:
            shapes |= {f"{layer}.self_attn.{x}_norm.weight": (config.head_dim,) for x in "qk"}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def stacked(config: ModelConfig, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """Our tree of these tensors, by the rules of the architecture, written out by hand."""
    D, H, K, C = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim

    def layers(name: str, convert: Callable[[np.ndarray], np.ndarray] = lambda x: x) -> np.ndarray:
        arrays = [tensors[f"model.layers.{i}.{name}"] for i in range(config.num_layers)]
        return np.stack([convert(x.astype(np.float32)) for x in arrays])

    tree = {
        "attention_norm": layers("input_layernorm.weight"),
        "mlp_norm": layers("post_attention_layernorm.weight"),
        "q": layers("self_attn.q_proj.weight", lambda x: np.moveaxis(x.reshape(H, C, D), 2, 0)),
        "k": layers("self_attn.k_proj.weight", lambda x: np.moveaxis(x.reshape(K, C, D), 2, 0)),
        "v": layers("self_attn.v_proj.weight", lambda x: np.moveaxis(x.reshape(K, C, D), 2, 0)),
        "o": layers("self_attn.o_proj.weight", lambda x: np.moveaxis(x.reshape(D, H, C), 0, 2)),
        "gate": layers("mlp.gate_proj.weight", np.transpose),
        "up": layers("mlp.up_proj.weight", np.transpose),
        "down": layers("mlp.down_proj.weight", np.transpose),
    }
    if config.qkv_bias:
        tree["q_bias"] = layers("self_attn.q_proj.bias", lambda x: x.reshape(H, C))
        tree["k_bias"] = layers("self_attn.k_proj.bias", lambda x: x.reshape(K, C))
        tree["v_bias"] = layers("self_attn.v_proj.bias", lambda x: x.reshape(K, C))
    if config.o_bias:
        tree["o_bias"] = layers("self_attn.o_proj.bias")
    if config.qk_norm:
        tree |= {"q_norm": layers("self_attn.q_norm.weight"), "k_norm": layers("self_attn.k_norm.weight")}
    whole: dict[str, Any] = {"embed": tensors["model.embed_tokens.weight"].astype(np.float32), "layers": tree}
    whole["final_norm"] = tensors["model.norm.weight"].astype(np.float32)
    if not config.tie_embeddings:
        whole["lm_head"] = tensors["lm_head.weight"].astype(np.float32).T
    return whole


def one_device() -> jax.sharding.Mesh:
    return make_mesh(devices=jax.devices()[:1])


def mesh_222() -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


def assert_equal(weights: Any, expected: Any) -> None:
    assert jax.tree.structure(weights) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, weights, expected)


def save_sharded(folder: Path, tensors: dict[str, np.ndarray], parts: int) -> dict[str, str]:
    names = list(tensors)
    files = {f"model-{i + 1:05d}-of-{parts:05d}.safetensors": names[i::parts] for i in range(parts)}
    for file, members in files.items():
        save_file({name: tensors[name] for name in members}, folder / file)
    weight_map = {name: file for file, members in files.items() for name in members}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


@pytest.mark.parametrize("config", [LLAMA, QWEN2, QWEN3, MISTRAL], ids=lambda c: c.family)
@pytest.mark.parametrize("make", [one_device, mesh_222])
def test_loaded_weights_equal_the_file_on_any_mesh(config: ModelConfig, make: Callable, tmp_path: Path) -> None:
    tensors, mesh = tensors_of(config), make()
    save_file(tensors, tmp_path / WEIGHTS)
    weights = load_weights(tmp_path, config, mesh)
    assert_equal(weights, stacked(config, tensors))
    shardings = decoder.weight_shardings(config, mesh)
    jax.tree.map(lambda w, s: w.sharding == s or pytest.fail(f"{w.sharding} is not {s}"), weights, shardings)


def test_shards_of_mixed_dtypes_are_loaded(tmp_path: Path) -> None:
    dtypes = (np.float32, np.float16, jnp.bfloat16)
    tensors = {n: x.astype(dtypes[i % 3]) for i, (n, x) in enumerate(tensors_of(QWEN3).items())}
    save_sharded(tmp_path, tensors, 3)
    assert_equal(load_weights(tmp_path, QWEN3, mesh_222()), stacked(QWEN3, tensors))
    low = load_weights(tmp_path, QWEN3, mesh_222(), dtype=jnp.bfloat16, rules=meshlib.SAMPLING_RULES)
    assert {w.dtype for w in jax.tree.leaves(low)} == {np.dtype(jnp.bfloat16)}
    assert_equal(low, jax.tree.map(lambda w: w.astype(jnp.bfloat16), stacked(QWEN3, tensors)))


def test_only_the_needed_slices_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(LLAMA, embed_dim=32, vocab_size=64, mlp_dim=64, num_heads=8, num_kv_heads=4)
    tensors = tensors_of(config)
    save_file(tensors, tmp_path / WEIGHTS)
    reads: list[tuple[str, int]] = []

    class Recorded:
        def __init__(self, name: str, tensor: Any) -> None:
            self.name, self.tensor = name, tensor

        def __getitem__(self, index: Any) -> np.ndarray:
            out = self.tensor[index]
            reads.append((self.name, out.size))
            return out

    class Opened:
        def __init__(self, file: Any) -> None:
            self.file = file

        def get_slice(self, name: str) -> Recorded:
            return Recorded(name, self.file.get_slice(name))

    monkeypatch.setattr("jaxsi.hf.weights._open", lambda stack, file: Opened(_open(stack, file)))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    load_weights(tmp_path, config, mesh)
    for name, array in tensors.items():
        sizes = [size for read, size in reads if read == name]
        parts = 1 if array.ndim == 1 and "norm" not in name else 2 if array.ndim == 1 else 4
        assert sizes == [array.size // parts] * parts, name  # each slice is read once, although two replicas hold it


def test_known_extra_tensors_are_ignored(tmp_path: Path) -> None:
    tensors = tensors_of(QWEN2)
    extras = {
        "lm_head.weight": tensors["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3),
    }
    save_file(tensors | extras, tmp_path / WEIGHTS)
    assert_equal(load_weights(tmp_path, QWEN2, one_device()), stacked(QWEN2, tensors))


def test_head_that_differs_from_a_tied_embedding_is_refused(tmp_path: Path) -> None:
    tensors = tensors_of(QWEN2)
    head = tensors["model.embed_tokens.weight"].copy()
    head[-1, -1] += 1
    save_file(tensors | {"lm_head.weight": head}, tmp_path / WEIGHTS)
    with pytest.raises(HFError, match=r"lm_head\.weight differs from the embedding.* set it to false"):
        load_weights(tmp_path, QWEN2, one_device())
    untied = dataclasses.replace(QWEN2, tie_embeddings=False)
    loaded = load_weights(tmp_path, untied, one_device())
    np.testing.assert_array_equal(loaded["lm_head"], head.T)


GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {n: x for n, x in t.items() if n != GATE}, rf"1 of 21 tensors are missing: {GATE}"),
        (lambda t: {n: x for n, x in t.items() if "layers.1" not in n}, r"9 of 21 tensors are missing: .*, \.\.\."),
        (
            lambda t: t | {"model.layers.2.mlp.gate_proj.weight": t[GATE]},
            r"1 tensors do not belong to a llama .*layers\.2",
        ),
        (lambda t: t | {"model.layers.0.self_attn.q_proj.bias": np.ones(36)}, r"q_proj\.bias"),
        (lambda t: t | {"../../outside": np.ones(1)}, "outside"),
        (lambda t: t | {GATE: t[GATE].T.copy()}, rf"tensor {GATE} has shape \(36, 52\), .*asks for \(52, 36\)"),
        (lambda t: t | {GATE: t[GATE].astype(np.int8)}, f"tensor {GATE} has dtype I8; supported are F32, F16, BF16"),
        (lambda t: t | {GATE: np.where(t[GATE] > 3, np.float32(np.nan), t[GATE])}, f"{GATE} has values not"),
        (lambda t: t | {GATE: np.full_like(t[GATE], np.inf)}, f"{GATE} has values not finite"),
    ],
)
def test_wrong_tensor_is_refused_by_name(change: Callable, message: str, tmp_path: Path) -> None:
    save_file(change(tensors_of(LLAMA)), tmp_path / WEIGHTS)
    with pytest.raises(HFError, match=message):
        load_weights(tmp_path, LLAMA, mesh_222())


def test_value_too_large_for_the_dtype_is_refused(tmp_path: Path) -> None:
    tensors = tensors_of(LLAMA)
    save_file(tensors | {GATE: tensors[GATE] + np.float32(1e6)}, tmp_path / WEIGHTS)
    with pytest.warns(RuntimeWarning, match="overflow"), pytest.raises(HFError, match="not finite in float16"):
        load_weights(tmp_path, LLAMA, one_device(), dtype=jnp.float16)


def header(entries: str, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(entries)) + entries.encode() + data


ONE = '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated, or not safetensors"),
        (b"PK\x03\x04 a pickle in a zip archive", "truncated, or not safetensors"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "a Git LFS pointer.*git lfs pull"),
        (struct.pack("<Q", 2**62) + b"{}", "header claims 4611686018427387904 bytes"),
        (header(" " * 2_000_000), "its header has 2000000 bytes, over the "),
        (header("not json"), "not that of a safetensors file"),
        (header("[1]"), "not that of a safetensors file"),
        (header('{"a": 1}'), "not that of a safetensors file"),
        (header("[" * 50_000), "not that of a safetensors file"),
        (header(ONE + ',"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"\0" * 4), "appears twice"),
        (header(ONE + "}", b"\0" * 2), "truncated or extended"),
        (header(ONE + "}", b"\0" * 9), "truncated or extended"),
    ],
    ids=range(12),
)
def test_hostile_file_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(HFError, match=message):
        load_weights(tmp_path, LLAMA, one_device())


def test_overlapping_offsets_are_refused(tmp_path: Path) -> None:
    """Our check of the header does not see them; the check of the library must."""
    tensors = tensors_of(LLAMA)
    save_file(tensors, tmp_path / WEIGHTS)
    raw = (tmp_path / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    entries = json.loads(raw[8 : 8 + length])
    up = GATE.replace("gate", "up")
    entries[GATE]["data_offsets"] = entries[up]["data_offsets"]
    (tmp_path / WEIGHTS).write_bytes(header(json.dumps(entries), raw[8 + length :]))
    with pytest.raises(HFError, match=r"model\.safetensors"):
        load_weights(tmp_path, LLAMA, one_device())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: {}, "no weight_map"),
        (
            lambda m: m | {GATE: "../model.safetensors"},
            "'../model.safetensors' is not a safetensors file of this folder",
        ),
        (lambda m: m | {GATE: "model-00009-of-00002.safetensors"}, "00009.* is not a safetensors file of this folder"),
        (lambda m: m | {GATE: 7}, "'7' is not a safetensors file"),
        (
            lambda m: m | {GATE: next(f for f in m.values() if f != m[GATE])},
            f"contains tensor {GATE}, but the index says",
        ),
        (lambda m: m | {"model.extra": m[GATE]}, r"tensor model\.extra .* is not in the file that it says"),
    ],
)
def test_broken_index_is_refused(change: Callable, message: str, tmp_path: Path) -> None:
    weight_map = change(save_sharded(tmp_path, tensors_of(LLAMA), 2))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(HFError, match=message):
        load_weights(tmp_path, LLAMA, one_device())


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl"])
def test_pickles_are_refused_without_opening_them(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(HFError, match=f"there is {name}, a pickle.* convert it to safetensors"):
        load_weights(tmp_path, LLAMA, one_device())


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HFError, match="no weights"):
        load_weights(tmp_path, LLAMA, one_device())


def test_mesh_is_checked_before_the_files_are_read(tmp_path: Path) -> None:
    with pytest.raises(meshlib.MeshError, match="is not divisible by 8"):
        load_weights(tmp_path, LLAMA, make_mesh(MeshConfig(fsdp=8)))


# --------------------------------------------------------------------------------------------------------------- export


def weights_of(config: ModelConfig, mesh: jax.sharding.Mesh) -> decoder.Weights:
    return jax.device_put(stacked(config, tensors_of(config)), decoder.weight_shardings(config, mesh))


@pytest.mark.parametrize("config", [LLAMA, QWEN2, QWEN3, MISTRAL], ids=lambda c: c.family)
@pytest.mark.parametrize("limit", [export.MAX_SHARD_BYTES, 20_000])
def test_export_then_load_returns_the_same_bits(config: ModelConfig, limit: int, tmp_path: Path) -> None:
    mesh = mesh_222()
    weights, folder = weights_of(config, mesh), tmp_path / "deep" / "out"
    export.write_folder(folder, config, weights, dtype="float32", max_shard_bytes=limit)
    assert read_config(folder) == config
    assert_equal(load_weights(folder, config, mesh), weights)
    files = sorted(p.name for p in folder.iterdir())
    written = {n: x for f in files if f.endswith(".safetensors") for n, x in load_file(folder / f).items()}
    assert_equal(written, tensors_of(config))
    if limit == 20_000:
        index = json.loads((folder / INDEX).read_text())
        assert set(index["weight_map"]) == set(written)
        assert index["metadata"]["total_size"] == sum(x.nbytes for x in written.values())
        assert files[2] == f"model-00002-of-{len(files) - 2:05d}.safetensors"
    else:
        assert files == ["config.json", "model.safetensors"]


def test_export_in_bfloat16_with_all_other_files(tmp_path: Path) -> None:
    weights = weights_of(QWEN2, one_device())
    (tmp_path / "out").mkdir()  # an empty folder may already exist
    export.write_folder(
        tmp_path / "out",
        QWEN2,
        weights,
        generation={"eos_token_id": [3, 5], "bos_token_id": None, "pad_token_id": 0},
        extras=lambda folder: (folder / "tokenizer.json").write_text("{}"),
    )
    files = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert files == ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == {
        "eos_token_id": [3, 5],
        "pad_token_id": 0,
    }
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["eos_token_id"], config["bos_token_id"], config["dtype"]) == ([3, 5], None, "bfloat16")
    loaded = load_weights(tmp_path / "out", QWEN2, one_device(), dtype=jnp.bfloat16)
    assert_equal(loaded, jax.tree.map(lambda w: np.asarray(w).astype(jnp.bfloat16), weights))
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


class StopError(Exception):
    pass


def test_export_appears_complete_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, seen = weights_of(LLAMA, one_device()), []

    def fail(folder: Path) -> None:
        seen.append(((tmp_path / "out").exists(), (folder / WEIGHTS).exists()))
        raise StopError

    with pytest.raises(StopError):
        export.write_folder(tmp_path / "out", LLAMA, weights, extras=fail)
    assert seen == [(False, True)]
    assert list(tmp_path.iterdir()) == []

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(HFError, match=r"out: cannot be written .*No space left.* nothing is left there"):
        export.write_folder(tmp_path / "out", LLAMA, weights)
    assert list(tmp_path.iterdir()) == []


def test_value_beyond_the_dtype_of_an_export_is_refused(tmp_path: Path) -> None:
    weights = weights_of(LLAMA, one_device())
    large = weights | {"final_norm": jnp.asarray(weights["final_norm"]).at[0].set(1e5)}
    with pytest.raises(HFError, match=r"model\.norm\.weight has a value of 100000, beyond the 65504 of float16"):
        export.write_folder(tmp_path / "out", LLAMA, large, dtype="float16")
    assert list(tmp_path.iterdir()) == []
    export.write_folder(tmp_path / "out", LLAMA, large, dtype="bfloat16")
    lost = weights | {"final_norm": jnp.asarray(weights["final_norm"]).at[0].set(jnp.nan)}
    with pytest.raises(HFError, match=r"model\.norm\.weight has a value of nan.* training of this model has failed"):
        export.write_folder(tmp_path / "other", LLAMA, lost)


def test_export_does_not_overwrite_a_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").write_text("1")
    with pytest.raises(HFError, match="is not an empty folder"):
        export.write_folder(tmp_path / "out", LLAMA, weights_of(LLAMA, one_device()))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["precious"]
    with pytest.raises(HFError, match="dtype 'int8' is not supported"):
        export.write_folder(tmp_path / "other", LLAMA, weights_of(LLAMA, one_device()), dtype="int8")
