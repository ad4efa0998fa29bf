"""The table of published architectures: numbers of weights, agreement with config.json, and similar names."""

import pytest

from jaxsi.hf.config import config_json, parse_config
from jaxsi.model import decoder
from jaxsi.perf.architectures import PUBLISHED, ArchitectureError, published

# The number of weights that the hub shows for the files of each model (a tied head counts once).
COUNTS = {
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "allenai/tulu-2-7b": 6_738_415_616,
    "allenai/tulu-2-13b": 13_015_864_320,
    "allenai/tulu-2-70b": 68_976_648_192,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3-4B-Instruct-2507": 4_022_468_096,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-14B-Instruct": 14_770_033_664,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
}


@pytest.mark.parametrize("name", COUNTS)
def test_architecture_has_published_number_of_weights(name):
    assert decoder.count_parameters(published(name)) == COUNTS[name]


def test_counts_cover_every_architecture():
    assert {published(name) for name in COUNTS} == set(PUBLISHED.values())


@pytest.mark.parametrize("name", PUBLISHED)
def test_architecture_survives_config_json(name):
    assert parse_config(config_json(PUBLISHED[name], dtype="bfloat16")) == PUBLISHED[name]


def test_architecture_matches_config_json_of_the_hub():
    """Counts do not show positions, rotary base and scaling, or windows. The models are those of shipped configs."""
    raw = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": False, "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3",
                         "original_max_position_embeddings": 8192},
        "rope_theta": 500000.0, "tie_word_embeddings": False, "vocab_size": 128256,
    }  # fmt: skip
    assert parse_config(raw) == published("meta-llama/Llama-3.1-8B")
    raw = {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 2560, "intermediate_size": 9728, "max_position_embeddings": 262144,
        "max_window_layers": 36, "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 5000000, "sliding_window": None,
        "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936,
    }  # fmt: skip
    assert parse_config(raw) == published("Qwen/Qwen3-4B-Instruct-2507")
    raw = {
        "model_type": "mistral", "architectures": ["MistralForCausalLM"], "hidden_act": "silu", "hidden_size": 4096,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
        "sliding_window": 4096, "tie_word_embeddings": False, "vocab_size": 32000,
    }  # fmt: skip
    assert parse_config(raw) == published("mistralai/Mistral-7B-v0.1")


def test_revision_does_not_change_the_architecture():
    assert published("Qwen/Qwen3-8B@b968826d9c46dd6066d109eabc6255188de91218") == PUBLISHED["Qwen/Qwen3-8B"]


def test_unknown_name_is_refused_with_similar_names():
    with pytest.raises(ArchitectureError, match=r"unknown architecture 'qwen/qwen3-8b'.*Qwen/Qwen3-8B"):
        published("qwen/qwen3-8b")
    with pytest.raises(ArchitectureError, match=r"folder with its config\.json, or one of meta-llama/Llama-2-7b-hf"):
        published("####")
