"""The decoder against transformers, on tiny random models: logits, greedy generation, export (needs torch)."""

import copy
import dataclasses
import functools
import json
import shutil
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity with transformers needs torch: install jaxsi[parity]")

import transformers  # noqa: E402

import tiny  # noqa: E402
from jaxsi.hf import export  # noqa: E402
from jaxsi.hf.config import read_config  # noqa: E402
from jaxsi.hf.weights import load_weights  # noqa: E402
from jaxsi.lm import LM, export as lm_export  # noqa: E402
from jaxsi.model import decoder  # noqa: E402
from jaxsi.model.mesh import make_mesh  # noqa: E402
from jaxsi.sampling.generate import generate_ids  # noqa: E402
from jaxsi.text.tokenizer import load_tokenizer  # noqa: E402
from jaxsi.training import losses, reward, train  # noqa: E402
from jaxsi.training.batches import Sequence_, encode, pairs  # noqa: E402
from jaxsi.training.packing import supervised  # noqa: E402

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 3.0}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
MSCALED = YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}
ODD = {
    "vocab_size": 97,
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
}
THREE = {"num_attention_heads": 3, "num_key_value_heads": 1}
MIXED = {
    "use_sliding_window": True,
    "sliding_window": 5,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("Llama", {"head_dim": 10, "rms_norm_eps": 1e-5}),
    "llama31": ("Llama", {"head_dim": 14, "rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama_bias": ("Llama", THREE | {"attention_bias": True, "rope_parameters": LINEAR}),
    "mistral": ("Mistral", THREE | {"head_dim": 8, "sliding_window": 5}),
    "mistral_full": ("Mistral", {"head_dim": 10, "sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2_yarn": ("Qwen2", MIXED | {"rope_parameters": YARN}),
    "qwen3": ("Qwen3", {"head_dim": 14, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3_mixed": ("Qwen3", THREE | MIXED | {"head_dim": 8, "attention_bias": True, "rope_parameters": MSCALED}),
}
FAMILIES = ("llama31", "mistral", "qwen2_yarn", "qwen3")


@functools.cache
def torch_model(case: str) -> Any:
    family, changes = CASES[case]
    config = getattr(transformers, f"{family}Config")(**ODD | changes, attn_implementation="eager")
    torch.manual_seed(len(case))
    reference = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, p in reference.named_parameters():
            p.copy_(torch.randn_like(p) * 0.2 + ("norm" in name))
    return reference


def one_device() -> jax.sharding.Mesh:
    return make_mesh(devices=jax.devices()[:1])


def rows(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, ODD["vocab_size"], shape).astype(np.int32)


@torch.no_grad()
def torch_logits(reference: Any, tokens: np.ndarray) -> np.ndarray:
    return reference(torch.tensor(tokens, dtype=torch.long)).logits.float().numpy()


def our_logits(folder: Path, tokens: np.ndarray) -> tuple[np.ndarray, Any, Any]:
    config = read_config(folder)
    weights = load_weights(folder, config, one_device())
    return np.asarray(decoder.full_logits(weights, config, jnp.asarray(tokens), jnp.dtype("float32"))), config, weights


@pytest.mark.parametrize("case", CASES)
def test_logits_agree_and_export_keeps_them(case: str, tmp_path: Path) -> None:
    """A folder of transformers gives our logits; our export gives the logits of transformers."""
    reference, tokens = torch_model(case), rows(2, 41)
    reference.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    expected = torch_logits(reference, tokens)
    ours, config, weights = our_logits(tmp_path / "theirs", tokens)
    assert np.abs(expected).max() > 1  # logits worth comparing
    np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=0)

    generation = {"eos_token_id": [3, 5], "pad_token_id": 0}
    export.write_folder(tmp_path / "ours", config, weights, dtype="float32", generation=generation)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, attn_implementation="eager"
    )
    assert type(again) is type(reference)
    assert again.generation_config.eos_token_id == [3, 5]
    np.testing.assert_allclose(torch_logits(again, tokens), expected, atol=1e-5, rtol=0)
    again.save_pretrained(tmp_path / "again")
    assert read_config(tmp_path / "again") == config


def torch_logps(reference: Any, tokens: np.ndarray) -> Any:
    """[B, T]: the log-probability of each token after those before it; 0 at the first."""
    ids = torch.tensor(tokens, dtype=torch.long)
    logps = reference(ids).logits.float().log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    return torch.nn.functional.pad(logps, (1, 0))


@pytest.mark.parametrize("case", FAMILIES)
@pytest.mark.parametrize(("objective", "remat"), [("sft", "full"), ("dpo", "none"), ("dpo shared", "products")])
def test_gradients_agree(case: str, objective: str, remat: str, tmp_path: Path) -> None:
    """Gradients of every weight agree to 1e-4 of their largest entry.

    This includes pairs whose prompt lies in one row with both responses ("dpo shared").
    """
    reference, tokens = torch_model(case), rows(4, 41)
    reference.save_pretrained(tmp_path)
    config = read_config(tmp_path)
    weights = load_weights(tmp_path, config, one_device())
    starts = np.asarray([11, 11, 30, 30])
    tokens[1, :11], tokens[3, :30] = tokens[0, :11], tokens[2, :30]
    mask = np.arange(41)[None] >= starts[:, None]
    refs = np.asarray([[-80.0, -90.0], [-30.0, -31.0]], np.float32)

    logps = torch_logps(reference, tokens) * torch.tensor(mask)
    if objective == "sft":
        loss = -logps.sum() / mask.sum()
    else:
        chosen, rejected = (logps.sum(1).reshape(2, 2) - torch.tensor(refs)).T
        loss = -torch.nn.functional.logsigmoid(0.01 * (chosen - rejected)).mean()
    reference.zero_grad()
    loss.backward()

    common = (config, one_device(), "float32", remat)
    texts = [encode(row[:start], row[start:]) for row, start in zip(tokens.tolist(), starts, strict=True)]
    order: dict[str, Any] = {"epochs": 1, "seed": 0}
    if objective == "sft":
        ours, batches = train.SFTLoss(*common), supervised(texts, 41, 4, one_device(), **order)
    else:
        ours, encoded = train.PairLoss(*common, losses.dpo, 0.01, 0.0), list(zip(texts[::2], texts[1::2], strict=True))
        order |= {"min_length": 1, "shared": objective == "dpo shared"}
        batches = pairs(encoded, refs.tolist(), 2, one_device(), **order)
    batch = batches[0]

    def mean(weights: Any) -> jax.Array:
        (total, count), _ = ours(weights, batch)
        return total / count

    value, gradients = jax.jit(jax.value_and_grad(mean))(weights)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    theirs = {name: p.grad.numpy() for name, p in reference.named_parameters()}
    float32 = np.dtype("float32")
    named = {
        tensor.name: export._as_in_file(tensor, export._gathered(tensor, gradients), float32)
        for tensor in export._tensors(config)
    }
    assert named.keys() == theirs.keys()
    for name, expected in theirs.items():
        np.testing.assert_allclose(named[name], expected, rtol=0, atol=1e-4 * np.abs(expected).max(), err_msg=name)


@functools.cache
def torch_classifier(case: str) -> Any:
    """A reward model: one label, read at the last token that is not padding."""
    family, changes = CASES[case]
    labels = {"num_labels": 1, "pad_token_id": 0, "attn_implementation": "eager"}
    config = getattr(transformers, f"{family}Config")(**ODD | changes | labels)
    torch.manual_seed(1 + len(case))
    reference = getattr(transformers, f"{family}ForSequenceClassification")(config).eval()
    with torch.no_grad():
        for name, p in reference.named_parameters():
            p.copy_(torch.randn_like(p) * 0.2 + ("norm" in name))
    return reference


@pytest.mark.parametrize("case", ["llama2", "mistral", "qwen3"])
def test_rewards_agree_and_export_keeps_them(case: str, tmp_path: Path) -> None:
    """A folder of a classifier with one label gives our rewards, for texts of different lengths; our export gives its
    scores again."""
    reference = torch_classifier(case)
    texts = [np.random.default_rng(n).integers(1, ODD["vocab_size"], n).astype(np.int32) for n in (3, 17, 1, 41)]
    with torch.no_grad():
        expected = [float(reference(torch.tensor(row[None], dtype=torch.long)).logits[0, 0]) for row in texts]
    assert np.ptp(expected) > 0.5  # scores worth comparing
    reference.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")

    def ours(folder: Path) -> tuple[np.ndarray, LM]:
        config = read_config(folder)
        lm = LM(
            config=config,
            weights=load_weights(folder, config, one_device()),
            tokenizer=types.SimpleNamespace(pad_id=0, stop_ids=()),
            mesh=one_device(),
            dtype=jnp.dtype("float32"),
        )
        return reward.rewards(lm, [Sequence_(row, np.ones(len(row), bool)) for row in texts], batch_size=4), lm

    values, lm = ours(tmp_path / "theirs")
    assert lm.config.scalar_head
    np.testing.assert_allclose(values, expected, atol=1e-4, rtol=0)
    export.write_folder(tmp_path / "ours", lm.config, lm.weights, dtype="float32", generation={"pad_token_id": 0})
    again = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, attn_implementation="eager"
    )
    assert type(again) is type(reference) and again.config.num_labels == 1
    with torch.no_grad():
        scores = [float(again(torch.tensor(row[None], dtype=torch.long)).logits[0, 0]) for row in texts]
    np.testing.assert_allclose(scores, expected, atol=1e-5, rtol=0)
    once_more, same = ours(tmp_path / "ours")
    assert same.config == lm.config
    np.testing.assert_array_equal(once_more, values)


def test_padded_batch_of_texts_has_our_rewards(tmp_path: Path) -> None:
    """Also if the tokenizer pads with the token that ends every turn, as many do."""
    folder = Path(shutil.copytree(tiny.tokenizer_folder(), tmp_path / "tokenizer"))
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"pad_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    lm = reward.with_scalar_head(dataclasses.replace(tiny.make_lm(), tokenizer=load_tokenizer(folder)))
    head = np.random.default_rng(0).normal(size=lm.config.embed_dim).astype(np.float32)
    lm = lm.replace(lm.weights | {"score": jax.device_put(head, lm.weights["score"].sharding)})
    conversations = [
        [{"role": "user", "content": f"Reverse: cat {word}"}, {"role": "assistant", "content": answer}]
        for word, answer in (("axe", "axe cat."), ("red dog pie", "pie dog red cat."), ("sun", "sun"))
    ]
    sequences = [reward.reward_sequence(lm.tokenizer, [x], y["content"]) for x, y in conversations]
    lm_export(lm, tmp_path / "rm", dtype="float32")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "rm")
    texts = [tokenizer.apply_chat_template(conversation, tokenize=False) for conversation in conversations]
    batch = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
    assert batch["input_ids"].shape[1] > min(len(sequence.tokens) for sequence in sequences)
    with torch.no_grad():
        values = theirs.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    np.testing.assert_allclose(values.numpy(), reward.rewards(lm, sequences), atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", ["llama31", "qwen2_yarn"])
def test_logits_agree_with_a_config_of_transformers_4(case: str, tmp_path: Path) -> None:
    """The same model, with a config.json as transformers 4 writes it."""
    reference, tokens = torch_model(case), rows(1, 41)
    reference.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    rope = raw.pop("rope_parameters")
    raw |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": raw.pop("dtype")}
    if rope["rope_type"] != "default":
        raw["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    np.testing.assert_allclose(our_logits(tmp_path, tokens)[0], torch_logits(reference, tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize("mixed", [False, True])
def test_logits_agree_for_bfloat16_and_mixed_files(mixed: bool, tmp_path: Path) -> None:
    low, tokens = copy.deepcopy(torch_model("qwen3")), rows(2, 21)
    for name, p in low.named_parameters():  # not low.to(): it would round the rotary frequencies too
        other = torch.float32 if "norm" in name else torch.float16 if "mlp" in name else torch.bfloat16
        p.data = p.data.to(other if mixed else torch.bfloat16)
    low.save_pretrained(tmp_path, max_shard_size="20KB")
    expected = torch_logits(low.to(torch.float32), tokens)  # the values of the files, computed in float32
    np.testing.assert_allclose(our_logits(tmp_path, tokens)[0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", FAMILIES)
def test_greedy_generation_of_64_prompts_agrees(case: str, tmp_path: Path) -> None:
    """All tokens agree, or the top two logits at the first difference are closer than 1e-5."""
    reference, new = torch_model(case), 12
    reference.save_pretrained(tmp_path)
    config = read_config(tmp_path)
    lm = LM(
        config=config,
        weights=load_weights(tmp_path, config, one_device()),
        tokenizer=types.SimpleNamespace(pad_id=0, stop_ids=()),
        mesh=one_device(),
        dtype=jnp.dtype("float32"),
    )
    by_length = [rows(16, n) for n in (1, 4, 9, 16)]
    prompts = [row.tolist() for group in by_length for row in group]
    keys = jax.random.split(jax.random.key(0), len(prompts))
    sampled = generate_ids(lm, prompts, keys, temperature=0.0, max_new_tokens=new, stop_ids=(), batch_size=64)
    ours = [samples[0][0] for samples in sampled]
    theirs: list[list[int]] = []
    for group in by_length:
        tokens = torch.tensor(group, dtype=torch.long)
        generated = reference.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, do_sample=False, pad_token_id=0
        )
        theirs += generated[:, group.shape[1] :].tolist()
    assert len(ours) == len(theirs) == 64
    for prompt, a, b in zip(prompts, ours, theirs, strict=True):
        assert len(a) == len(b) == new
        difference = next((i for i in range(new) if a[i] != b[i]), None)
        if difference is not None:
            last = np.sort(torch_logits(reference, np.asarray([prompt + b[:difference]]))[0, -1])
            assert last[-1] - last[-2] < 1e-5, (prompt, a, b)
