"""The tokenizer of the embedded world: a small byte-fallback BPE in Llama 2 style, written as a Hugging Face folder.

Every word of the world and every number of a response is one token, both at the beginning of a text and after a space.
Any other text is spelt with characters, and with bytes if a character is unknown.
"""

import json
import random
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxsi.runs.records import write_atomically
from jaxsi.stages.prompts import load_rubric
from jaxsi.toyworld.corpus import pretraining_documents
from jaxsi.toyworld.world import RESPONSE_NUMBERS, WORDS

PAD, BOS, END, USER, ASSISTANT, SYSTEM = SPECIAL_TOKENS = (
    "<pad>",
    "<s>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
)
ENTRIES = 704  # a multiple of 64, which any usual mesh divides
SPACE = "\u2581"
# Each of these is always a token of its own.
ISOLATED = r"""[\n.,:;!?"'()\[\]{}<>|/*=+-]"""
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer(folder: Path | str, seed: int = 0) -> None:
    """Writes `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja` to `folder`, the same bytes every time.

    `seed` draws the documents from which the merges are learnt. `AutoTokenizer.from_pretrained` loads the folder.
    The template writes the only `<s>` of a chat; encoding a text adds none. `<|end|>` ends a turn and is the EOS.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    spelling = [SPACE, *sorted(set(string.printable) - set(string.whitespace))]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    fixed = [*SPECIAL_TOKENS, *byte_tokens]
    normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(ISOLATED), "isolated"),
            pre_tokenizers.Split(SPACE, "merged_with_next"),
        ]
    )
    pieces = _learn_merges(_training_texts(seed), normalizer, pre_tokenizer, spelling, ENTRIES - len(fixed))
    learned = sorted(pieces["vocab"], key=pieces["vocab"].__getitem__)
    vocabulary = {token: index for index, token in enumerate([*fixed, *learned])}
    merges = [tuple(merge) for merge in pieces["merges"]]

    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "chat_template.jinja", [CHAT_TEMPLATE.encode()])
    write_atomically(folder / "tokenizer_config.json", [_config().encode()])
    write_atomically(folder / "tokenizer.json", [tokenizer.to_str(pretty=True).encode() + b"\n"])


def _learn_merges(
    texts: Iterator[str], normalizer: Any, pre_tokenizer: Any, alphabet: list[str], entries: int
) -> dict[str, Any]:
    """The vocabulary and merges of a BPE trained on `texts`, as the `model` of a tokenizer.json."""
    from tokenizers import Tokenizer, models, trainers

    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizer
    learner.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=entries,
        min_frequency=2,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        special_tokens=[],
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    return json.loads(learner.to_str())["model"]


def _training_texts(seed: int) -> Iterator[str]:
    # The items come first and often, so that each becomes one token before the entries are used up.
    items = [*WORDS, *RESPONSE_NUMBERS]
    rng = random.Random(f"jaxsi/toyworld/vocabulary/{seed}")
    for _ in range(50):
        rng.shuffle(items)
        yield " ".join(items)
    # Plain English, so that the merges fill all remaining entries.
    yield load_rubric().template
    for messages, response in pretraining_documents(2000, seed):
        yield from (message["content"] for message in messages)
        yield response


def _config() -> str:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": [USER, ASSISTANT, SYSTEM],
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
    }
    return json.dumps(config, indent=2) + "\n"
