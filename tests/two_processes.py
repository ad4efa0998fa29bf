"""What test_multihost runs in one process with eight devices and in two processes with four devices each.

    python tests/two_processes.py INDEX PORT FOLDER

is process INDEX of the two. It prints what each function of PARTS returns, as one JSON object.
"""

import dataclasses
import hashlib
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np


def sampled(folder: Path) -> dict[str, Any]:
    """Responses, judgments, scores and new prompts of the shipped model."""
    import jaxsi
    from jaxsi.model.mesh import make_mesh
    from jaxsi.runs.records import to_json
    from jaxsi.sampling.scoring import score_choices
    from jaxsi.stages.judge import JudgeConfig, judge
    from jaxsi.stages.self_instruct import SelfInstruct, new_prompts
    from jaxsi.text.chat import render_prompt
    from jaxsi.toyworld import world
    from jaxsi.toyworld.corpus import NEW_INSTRUCTION, RUBRIC
    from jaxsi.toyworld.seed import SHIPPED

    lm = jaxsi.load(SHIPPED, make_mesh(devices=jax.devices()[::4]), dtype="float32")  # one device a process
    prompts = world.prompts(6, seed=3, held_out=False)
    responses = jaxsi.generate(lm, prompts, num_samples=2, max_new_tokens=16, batch_size=8)
    judging = JudgeConfig(num_samples=2, max_new_tokens=24)
    judgments = judge(lm, prompts, responses, RUBRIC, judging, jax.random.key(0))
    scores = jaxsi.score(lm, [prompt for prompt in prompts for _ in range(2)], responses)
    texts = [render_prompt(lm.tokenizer, prompt.messages) for prompt in prompts]
    choices = score_choices(lm, texts, [[[7], [8]]] * len(texts))
    writing = SelfInstruct(num_prompts=6, max_new_tokens=16, batch_size=8, min_words=3, format=NEW_INSTRUCTION)
    written = new_prompts(lm, world.prompts(16, seed=4, held_out=False), writing, jax.random.key(1))
    return {
        "prompts": [to_json(prompt) for prompt in written],
        "records": [to_json(record) for record in [*responses, *judgments]],
        "scores": [*scores.tolist(), *choices.ravel().tolist()],
        "fingerprint": lm.fingerprint,
    }


def saved(folder: Path) -> list[str]:
    """The hashes of a training state after a step on a batch, of which each process makes its own rows."""
    import tiny
    from jaxsi.model import mesh
    from jaxsi.runs import checkpoint
    from jaxsi.training import batches as data, packing, train
    from jaxsi.training.optim import OptimConfig

    lm = tiny.make_lm("2x2x2")
    optimizer = OptimConfig(learning_rate=1e-2)
    loss = train.SFTLoss(lm.config, lm.mesh, "float32", "none")
    sequences = [data.encode_pair(lm.tokenizer, pair)[0] for pair in tiny.preference_pairs(12)]
    batches = packing.supervised(sequences, 64, 12, lm.mesh, epochs=1, seed=0)
    parts: list[tuple[int, int]] = []
    collate = batches.collate
    batch = dataclasses.replace(batches, collate=lambda part: parts.append(part[1:]) or collate(part))[0]
    rows = -(-len(batches.plan[0]) // batches.multiple) * batches.multiple // jax.process_count()
    assert parts == [(rows * jax.process_index(), rows * (jax.process_index() + 1))], parts
    state, _ = train.train_step(
        train.initial_state(lm.weights, optimizer), batch, 1e-2, loss=loss, optimizer=optimizer, accumulate=1
    )
    checkpoint.save(folder / "state", state._asdict(), {})
    return [hashlib.sha256(np.asarray(x).tobytes()).hexdigest() for x in jax.tree.leaves(mesh.fetch(state._asdict()))]


def exported(folder: Path) -> dict[str, Any]:
    """Which files of an export this process writes, and how many bytes of them it reads to load them again."""
    import tiny
    from jaxsi.hf import export, weights

    lm = tiny.make_lm("1x8x1")
    files: list[str] = []
    sizes: list[int] = []
    save_file, open_file = export.save_file, weights._open

    def save_and_note(tensors: Any, path: Path, **rest: Any) -> None:
        files.append(path.name)
        save_file(tensors, path, **rest)

    class Slices:
        def __init__(self, tensor: Any):
            self.tensor = tensor

        def __getitem__(self, index: Any) -> Any:
            sizes.append(self.tensor[index].nbytes)
            return self.tensor[index]

    class File:
        def __init__(self, file: Any):
            self.file = file

        def get_slice(self, name: str) -> Slices:
            return Slices(self.file.get_slice(name))

    with mock.patch.object(export, "save_file", save_and_note):
        export.write_folder(folder / "model", lm.config, lm.weights, dtype="float32", max_shard_bytes=50_000)
    with mock.patch.object(weights, "_open", lambda stack, file: File(open_file(stack, file))):
        loaded = jax.tree.leaves(weights.load_weights(folder / "model", lm.config, lm.mesh))
    same = all(bool((a == b).all()) for a, b in zip(loaded, jax.tree.leaves(lm.weights), strict=True))
    whole = sum(w.nbytes for w in loaded if w.sharding.is_fully_replicated)
    return {"files": files, "read": sum(sizes) - whole, "size": sum(w.nbytes for w in loaded) - whole, "same": same}


def asked(folder: Path) -> dict[str, Any]:
    """A model's answers in an evaluation, each asked once: twice in this process, then from the file."""
    import tiny
    from jaxsi.evals.answer_cache import AnswerCache
    from jaxsi.evals.judging import ask_texts
    from jaxsi.runs.progress import processes
    from jaxsi.runs.records import Prompt
    from jaxsi.stages.verdicts import JudgeConfig, LocalWriter

    writer = LocalWriter(tiny.make_lm("1x8x1"))
    requests = [
        Prompt.of(f"q{i}", f"Reverse: cat {word}") for i, word in enumerate(("red", "dog", "owl", "axe", "red"))
    ]
    cfg = JudgeConfig(num_samples=1, max_new_tokens=4, temperature=1.0, batch_size=2)
    path = folder / "answers.jsonl"
    first, cache = processes()[0] == 0, AnswerCache(path)
    # A process that sees the file later than the first one does knows more than that: it may not go by it.
    early = AnswerCache(path if first else folder / "unknown.jsonl")
    requests.append(Prompt.of("long", "cat " * 9_999))  # no room, so it is a failure each time
    found = [ask_texts(one, writer, requests, cfg) for one in (cache, cache, early, AnswerCache(path))]
    return {
        "values": [dict(sorted(one.values.items())) for one in found], "asked": [one.asked for one in found],
        "failures": [dict(one.failures) for one in found], "lines": len(path.read_text().splitlines()),
    }  # fmt: skip


PARTS = (sampled, saved, exported, asked)


if __name__ == "__main__":
    index, port = map(int, sys.argv[1:3])
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
    print(json.dumps({part.__name__: part(Path(sys.argv[3])) for part in PARTS}))
