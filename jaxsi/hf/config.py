"""Hugging Face's config.json, in the dialects of transformers 4 and 5, to and from ``ModelConfig``.

Only this folder knows Hugging Face's names. A key that could change the numbers is refused; see ``_check_key``.
"""

import functools
import json
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxsi.model.decoder import ModelConfig, Rope
from jaxsi.runs.errors import InputError
from jaxsi.runs.records import LFS_POINTER

_log = logging.getLogger(__name__)

MAX_JSON_BYTES = 64 * 2**20  # an index of a few thousand tensors takes a few hundred kB


class HFError(InputError, ValueError):
    """A Hugging Face folder cannot be read or written; names the file, the key or tensor, its value and the fix."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


class Family(NamedTuple):
    """The peculiarities of one ``model_type``: its class, the keys that only it has, and the values of absent keys."""

    architecture: str
    keys: frozenset[str]
    defaults: Mapping[str, Any]
    max_positions: int  # if the file does not say


# Values that transformers assumes if the key is absent; a key that is neither here nor in the file is an error.
_DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}
_QWEN_DEFAULTS = _DEFAULTS | {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
_QWEN_KEYS = frozenset({"use_sliding_window", "sliding_window", "max_window_layers"})

FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        frozenset({"attention_bias"}),
        _DEFAULTS | {"num_key_value_heads": None, "attention_bias": False},
        2048,
    ),
    "mistral": Family(
        "MistralForCausalLM",
        frozenset({"sliding_window"}),
        _DEFAULTS | {"num_key_value_heads": 8, "sliding_window": 4096},
        131_072,
    ),
    "qwen2": Family("Qwen2ForCausalLM", _QWEN_KEYS, _QWEN_DEFAULTS, 32_768),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        _QWEN_KEYS | {"attention_bias"},
        _QWEN_DEFAULTS | {"attention_bias": False, "head_dim": 128},
        32_768,
    ),
}
# Names that the first converters wrote.
_OLD_ARCHITECTURES = {"LLaMAForCausalLM": "LlamaForCausalLM"}

# Keys of config.json that change the function of the decoder and are read.
_USED_KEYS = _words(
    "model_type architectures vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim max_position_embeddings rms_norm_eps tie_word_embeddings rope_theta rope_scaling "
    "rope_parameters original_max_position_embeddings layer_types"
)
# Keys with only one supported value, which means that the feature is off.
_ONLY: Mapping[str, Any] = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "attention_bias": False,
    "partial_rotary_factor": 1.0,
    "use_sliding_window": False,
    "use_mrope": False,
    "rope_interleaved": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
}
# Keys that cannot change the logits: token ids and sampling (the tokenizer and generation_config.json decide those),
# training, initialisation, outputs, classification heads, how and where the model runs, and notes of the program that
# wrote the file.
_IRRELEVANT = _words(
    "bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id unk_token_id decoder_start_token_id "
    "forced_bos_token_id forced_eos_token_id prefix suppress_tokens begin_suppress_tokens bad_words_ids badwordsids "
    "do_sample temperature top_p top_k typical_p min_length max_length max_new_tokens num_beams num_beam_groups "
    "diversity_penalty length_penalty repetition_penalty encoder_no_repeat_ngram_size no_repeat_ngram_size "
    "num_return_sequences early_stopping exponential_decay_length_penalty remove_invalid_values "
    "attention_dropout hidden_dropout embd_pdrop resid_pdrop initializer_range use_cache dtype torch_dtype "
    "output_attentions output_hidden_states output_scores return_dict return_dict_in_generate torchscript use_bfloat16 "
    "keys_to_ignore_at_inference chunk_size_feed_forward is_decoder id2label label2id num_labels problem_type "
    "finetuning_task task_specific_params tf_legacy_loss cross_attention_hidden_size gradient_checkpointing "
    "name_or_path is_llama_config transformers.js_config pretraining_tp value_head_prefix summary_dropout_prob "
    "max_sequence_length model_max_length context_window_size prefill_chunk_size "
    "sequence_parallel_enabled selective_checkpoint_enabled move_model_to_device attn_implementation"
)
_IRRELEVANT_NAMES = re.compile(
    r"_.*|tokenizer_.*|.*_version|unsloth.*|neftune.*|use_flash_attn.*|use_flash_attention.*"
)
# A feature without parameters would change the logits and leave no trace in the weights. Its key has a name like these.
_SUSPICIOUS = re.compile(
    "cap|multiplier|scal|rope|rotary|alibi|position|window|sink|chunk|pattern|causal|bidirectional|norm|moe|mup|expert"
    "|draft|residual|temperature_tuning|parallel|attention|attn|activation|act_fn|skip|shift|clip|clamp|prune|quant"
)
_QUANTISED = "quantised weights are not supported; get the model in bfloat16, float16 or float32"
_REFUSED = {
    "quantization_config": _QUANTISED,
    "quantization": _QUANTISED,
    "peft_config": "the folder belongs to an adapter; merge it into its base model, and save that with transformers",
}


# ---------------------------------------------------------------------------------------------------------- config.json


def read_config(folder: Path) -> ModelConfig:
    """The decoder that ``folder/config.json`` describes, in the dialect of transformers 4 or 5.

    Raises:
      HFError: if the file is absent or broken, the model_type is not in ``FAMILIES``, or a key is neither used nor
        known to have no effect.
    """
    file = Path(folder) / "config.json"
    raw = read_json(file)
    try:
        return parse_config(raw)
    except ValueError as error:  # HFError, or from ModelConfig's own checks
        raise HFError(f"{file}: {error}") from error


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The decoder that the contents of a config.json describe. Raises: HFError, ModelError."""
    config, doubts = _parse(raw)
    for doubt in doubts:
        _tell_once(doubt)
    return config


@functools.cache
def _tell_once(doubt: str) -> None:
    _log.warning("config.json: %s", doubt)


def _parse(raw: Mapping[str, Any]) -> tuple[ModelConfig, list[str]]:
    """The decoder, and what a user should be told about it."""
    raw = {key: value for key, value in raw.items() if value != []}
    family = _family(raw)
    model_type = raw["model_type"]
    given = {key: value for key, value in raw.items() if value is not None}
    ignored = [key for key, value in given.items() if not _check_key(key, value, model_type, family)]
    doubts = (
        [f"unknown keys are ignored: {', '.join(f'{key} = {raw[key]!r:.60}' for key in ignored)}"] if ignored else []
    )
    if "max_position_embeddings" not in given:
        raw["max_position_embeddings"] = given.get("max_sequence_length", family.max_positions)
        doubts.append(f"max_position_embeddings is absent, so it is taken as {raw['max_position_embeddings']}")
    raw = {**family.defaults, **raw}
    heads, embed = _count(raw, "num_attention_heads"), _count(raw, "hidden_size")
    if raw.get("head_dim") is None and embed % heads:
        raise HFError(f"hidden_size {embed} is not a multiple of num_attention_heads {heads}, and head_dim is absent")
    if "num_key_value_heads" not in raw:
        raise HFError("num_key_value_heads is absent")
    attention_bias = _flag(raw, "attention_bias") if "attention_bias" in family.keys else False
    layers = _count(raw, "num_hidden_layers")
    config = ModelConfig(
        family=model_type,
        vocab_size=_count(raw, "vocab_size"),
        embed_dim=embed,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads if raw["num_key_value_heads"] is None else _count(raw, "num_key_value_heads"),
        head_dim=embed // heads if raw.get("head_dim") is None else _count(raw, "head_dim"),
        mlp_dim=_count(raw, "intermediate_size"),
        max_positions=_count(raw, "max_position_embeddings"),
        rope=_rope(raw),
        norm_eps=_number(raw, "rms_norm_eps"),
        tie_embeddings=_flag(raw, "tie_word_embeddings"),
        qkv_bias=attention_bias or model_type == "qwen2",
        o_bias=attention_bias,
        qk_norm=model_type == "qwen3",
        windows=_windows(raw, model_type, layers),
        scalar_head=_scalar_head(raw, family),
    )
    return config, doubts


def _check_key(key: str, value: Any, model_type: str, family: Family) -> bool:
    """Whether the meaning of a key is known here: it is read, or it cannot change the logits.

    Parameters that the decoder lacks, or that the file lacks, are found when the weights are loaded. So only a feature
    without parameters could change the logits unnoticed. An unknown key that might be one, by its name, may only have a
    value that means "off".

    Raises: HFError if a key changes the logits in a way that is not supported, or if it might.
    """
    if key in _REFUSED:
        raise HFError(f"{key} = {value!r:.200}: {_REFUSED[key]}")
    if key in _USED_KEYS or key in family.keys or key in _IRRELEVANT or _IRRELEVANT_NAMES.fullmatch(key):
        return True
    if key in _ONLY:
        if value != _ONLY[key]:
            raise HFError(f"{key} = {value!r} is not supported for model_type {model_type!r}, only {_ONLY[key]!r} is")
        return True
    if isinstance(value, str) and key.endswith("_token"):
        return True
    if _SUSPICIOUS.search(key) and value not in (False, 0, 1, "", {}):
        raise HFError(
            f"{key} = {value!r:.200} is not known for model_type {model_type!r}, and by its name it could change the "
            "model's numbers; if it does not, remove the key"
        )
    return False


def config_json(config: ModelConfig, *, dtype: Any) -> dict[str, Any]:
    """The contents of a config.json that transformers (5.3 and later) and ``parse_config`` turn back into ``config``.

    Args:
      dtype: of the weights beside it.

    Raises:
      HFError: if Hugging Face's class of the family cannot express ``config``.
    """
    raw: dict[str, Any] = {
        "model_type": config.family,
        "architectures": [_architecture(_family({"model_type": config.family}), config.scalar_head)],
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": None,  # otherwise transformers takes the family's default
        "eos_token_id": None,
        "pad_token_id": None,
        "dtype": jnp.dtype(dtype).name,
        "torch_dtype": jnp.dtype(dtype).name,
    } | _rope_json(config)
    if config.scalar_head:
        raw |= {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    if config.family in ("llama", "qwen3"):
        raw["attention_bias"] = config.o_bias
    windows = config.windows or (None,) * config.num_layers
    width = next((w for w in windows if w is not None), None)
    if config.family == "mistral":
        raw["sliding_window"] = width
    if config.family in ("qwen2", "qwen3"):
        first = next((i for i, w in enumerate(windows) if w is not None), config.num_layers)
        raw |= {"use_sliding_window": width is not None, "sliding_window": width, "max_window_layers": first}
        raw["layer_types"] = ["full_attention" if w is None else "sliding_attention" for w in windows]
    if parse_config(raw) != config:
        raise HFError(f"a config.json of model_type {config.family!r} cannot express {config}")
    return raw


def _family(raw: Mapping[str, Any]) -> Family:
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise HFError(f"model_type = {model_type!r} is not supported; supported are {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    architectures = raw.get("architectures")
    if isinstance(architectures, list):
        architectures = [_OLD_ARCHITECTURES.get(name, name) for name in architectures]
    known = [[_architecture(family, scalar_head)] for scalar_head in (False, True)]
    if architectures is not None and architectures not in known:
        raise HFError(
            f"architectures = {architectures!r} is not supported for {model_type!r}, only {known[0]!r} and {known[1]!r}"
        )
    return family


def _architecture(family: Family, scalar_head: bool) -> str:
    """The family's class with a language-model head, or with a scalar head (in transformers: one label)."""
    return family.architecture.replace("CausalLM", "SequenceClassification") if scalar_head else family.architecture


def _scalar_head(raw: Mapping[str, Any], family: Family) -> bool:
    if raw.get("architectures") != [_architecture(family, True)]:
        return False
    labels = len(raw["id2label"]) if isinstance(raw.get("id2label"), dict) else raw.get("num_labels", 2)
    if labels != 1:
        raise HFError(f"a classifier of {labels} labels (id2label) is not supported; a reward model must have 1")
    return True


def _count(raw: Mapping[str, Any], key: str) -> int:
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise HFError(f"{key} = {value!r} must be a positive integer")
    return value


def _number(raw: Mapping[str, Any], key: str) -> float:
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise HFError(f"{key} = {value!r} must be a positive number")
    return float(value)


def _flag(raw: Mapping[str, Any], key: str) -> bool:
    value = raw.get(key)
    if not isinstance(value, bool):
        raise HFError(f"{key} = {value!r} must be true or false")
    return value


def _windows(raw: Mapping[str, Any], model_type: str, layers: int) -> tuple[int | None, ...] | None:
    """The window of each layer, or None if all layers have full attention."""
    types = raw.get("layer_types")
    known = ("full_attention", "sliding_attention")
    if types is not None and (
        not isinstance(types, list) or len(types) != layers or any(t not in known for t in types)
    ):
        raise HFError(f"layer_types = {types!r} must have {layers} entries, each one of {', '.join(known)}")
    if model_type in ("llama", "mistral"):
        width = None if raw.get("sliding_window") is None or model_type == "llama" else _count(raw, "sliding_window")
        only = "full_attention" if width is None else "sliding_attention"
        if types is not None and set(types) != {only}:
            raise HFError(
                f"layer_types = {types!r} is not supported for model_type {model_type!r} and this sliding_window, only "
                f"{only} in every layer is"
            )
        return None if width is None else (width,) * layers
    on = _flag(raw, "use_sliding_window")
    if types is None:
        first = raw["max_window_layers"]
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            raise HFError(f"max_window_layers = {first!r} must be an integer, at least 0")
        types = ["sliding_attention" if on and i >= first else "full_attention" for i in range(layers)]
    if "sliding_attention" not in types:
        return None
    if not on or raw["sliding_window"] is None:
        raise HFError(
            "layer_types has sliding_attention, but use_sliding_window is "
            f"{raw['use_sliding_window']} and sliding_window is {raw['sliding_window']}; set both or neither"
        )
    width = _count(raw, "sliding_window")
    return tuple(width if t == "sliding_attention" else None for t in types)


# ----------------------------------------------------------------------------------------------------------------- rope

_ROPE_KEYS = {
    "default": frozenset(),
    # Scales only positions beyond max_position_embeddings, which are refused here.
    "dynamic": frozenset({"factor", "original_max_position_embeddings"}),
    "linear": frozenset({"factor", "original_max_position_embeddings"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": _words(
        "factor beta_fast beta_slow original_max_position_embeddings attention_factor mscale mscale_all_dim truncate "
        "finetuned"  # not read by transformers
    ),
}


def _rope(raw: Mapping[str, Any]) -> Rope:
    """Reads both dialects: ``rope_parameters`` with theta in it, or ``rope_theta`` beside ``rope_scaling``."""
    old, new = raw.get("rope_scaling") or {}, raw.get("rope_parameters") or {}
    for key, value in (("rope_scaling", old), ("rope_parameters", new)):
        if not isinstance(value, dict):
            raise HFError(f"{key} = {value!r} must be an object")
    rope: dict[str, Any] = {"rope_theta": raw.get("rope_theta")}
    for key, value in [*old.items(), *new.items()]:
        if rope.get(key) is not None and value is not None and rope[key] != value:
            raise HFError(f"{key} is both {rope[key]!r} and {value!r} in rope_theta, rope_scaling and rope_parameters")
        rope[key] = value if rope.get(key) is None else rope[key]
    rope = {key: value for key, value in rope.items() if value is not None}
    theta = _number(rope, "rope_theta") if "rope_theta" in rope else 10_000.0
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        raise HFError(f"rope type {kind!r} is not supported; supported are {', '.join(_ROPE_KEYS)}")
    for key, value in rope.items():
        if key == "partial_rotary_factor" and value != 1:
            raise HFError(f"partial_rotary_factor = {value!r} is not supported, only 1.0 is")
        if key not in _ROPE_KEYS[kind] | {"rope_theta", "rope_type", "type", "partial_rotary_factor"}:
            raise HFError(f"{key} = {value!r} is not known for rope type {kind!r}, and it could change the model")
    # As in transformers: the key beside the object overrides the one in it; the default is the model's own length.
    original = raw.get("original_max_position_embeddings")
    rope["original"] = original or rope.get("original_max_position_embeddings") or raw.get("max_position_embeddings")
    match kind:
        case "linear":
            return Rope(theta=theta, scaling=("linear", _number(rope, "factor")))
        case "llama3":
            factors = (_number(rope, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
            return Rope(theta=theta, scaling=("llama3", *factors, _count(rope, "original")))
        case "yarn":
            return Rope(theta=theta, scaling=_yarn(rope, raw))
        case _:
            return Rope(theta=theta)


def _yarn(rope: Mapping[str, Any], raw: Mapping[str, Any]) -> tuple[Any, ...]:
    original = _count(rope, "original")
    factor = _number(rope, "factor") if "factor" in rope else _count(raw, "max_position_embeddings") / original

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if "attention_factor" in rope:
        attention_factor = _number(rope, "attention_factor")
    elif rope.get("mscale") and rope.get("mscale_all_dim"):
        attention_factor = mscale(_number(rope, "mscale")) / mscale(_number(rope, "mscale_all_dim"))
    else:
        attention_factor = mscale(1.0)
    fast = _number(rope, "beta_fast") if rope.get("beta_fast") else 32.0
    slow = _number(rope, "beta_slow") if rope.get("beta_slow") else 1.0
    truncate = _flag(rope, "truncate") if "truncate" in rope else True
    return ("yarn", factor, fast, slow, original, attention_factor, truncate)


def _rope_json(config: ModelConfig) -> dict[str, Any]:
    theta = {"rope_theta": config.rope.theta}
    match config.rope.scaling:
        case None:
            return {**theta, "rope_parameters": {"rope_type": "default", **theta}}
        case ("linear", factor):
            scaling: dict[str, Any] = {"rope_type": "linear", "factor": factor}
        case ("llama3", factor, low, high, original):
            scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
            scaling["original_max_position_embeddings"] = original
        case ("yarn", factor, fast, slow, original, attention_factor, truncate):
            scaling = {"rope_type": "yarn", "factor": factor, "beta_fast": fast, "beta_slow": slow}
            scaling |= {"original_max_position_embeddings": original, "attention_factor": attention_factor}
            scaling["truncate"] = truncate
        case other:
            raise HFError(f"rope scaling {other!r} cannot be written into config.json")
    # In both dialects: a reader of the old one would silently replace a missing rope_theta by 10000.
    return {**theta, "rope_scaling": scaling, "rope_parameters": scaling | theta}


def read_json(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise HFError(f"{file}: {file.stat().st_size} bytes, over the limit of {MAX_JSON_BYTES}")
        raw = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise HFError(f"{file}: cannot be read ({error.strerror}); give a Hugging Face model folder") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        if file.read_bytes().startswith(LFS_POINTER):
            raise HFError(
                f"{file}: a Git LFS pointer, not the file itself; run `git lfs pull` in the folder"
            ) from error
        raise HFError(f"{file}: not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise HFError(f"{file}: holds a {type(raw).__name__}, not an object")
    return raw
