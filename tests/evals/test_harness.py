"""lm-evaluation-harness runs a task offline through our interface as through `transformers`: the same figures."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="the interface needs lm-eval: pip install 'jaxsi[lm-eval]'")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

import tiny
from jaxsi.cli.main import main
from jaxsi.evals.answer_cache import EvaluationError
from jaxsi.evals.harness import encode, generated, harness_model, loglikelihoods
from jaxsi.lm import load
from jaxsi.sampling.generate import generate_ids
from jaxsi.sampling.scoring import score_greedy, score_ids

SEED_MODEL = Path(sys.modules["jaxsi"].__file__).parent / "toyworld" / "seed_model"
CHOICE = """
task: {task}
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: {kind}
doc_to_text: "{text}"
{more}
metadata:
  version: 1.0
"""


def request(kind, *arguments):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with a task of each kind, on data of the embedded world."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": f"Reverse: {a} {b}", "choices": [f"{b} {a}", f"{a} {b}", a], "gold": n % 3, "answer": f"{b} {a}"}
        for n, (a, b) in enumerate([("cat", "dog"), ("red", "axe"), ("pie", "saw"), ("cow", "egg"), ("fox", "hat")])
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    choice = 'doc_to_choice: "{{choices}}"\ndoc_to_target: gold\nmetric_list:\n  - metric: acc\n  - metric: acc_norm'
    free = 'doc_to_target: "{{answer}}"\ngeneration_kwargs:\n  until: ["\\n"]\n  max_gen_toks: 12\n  do_sample: false\n'
    free += "metric_list:\n  - metric: exact_match"
    rolling = 'doc_to_target: "{{question}} {{answer}}"\nmetric_list:\n  - metric: word_perplexity'
    for name, kind, text, more in (
        ("ours_choice", "multiple_choice", "{{question}}\\n", choice),
        ("ours_free", "generate_until", "{{question}}\\n", free),
        ("ours_rolling", "loglikelihood_rolling", "", rolling),
    ):
        text = CHOICE.format(task=name, data=data, kind=kind, text=text, more=more)
        (folder / f"{name}.yaml").write_text(text)
    return folder


NAMES = ["ours_choice", "ours_free", "ours_rolling"]


def evaluated(model, tasks, **settings):
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=model, tasks=NAMES, task_manager=manager, bootstrap_iters=0, log_samples=True, **settings
    )
    return found["results"], found["samples"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("chat", [False, True])
def test_tasks_have_the_figures_that_transformers_gives(tasks, chat):
    pytest.importorskip("torch", reason="the comparison needs PyTorch")
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="the comparison needs accelerate and peft")
    settings = {"apply_chat_template": chat}
    theirs, their_samples = evaluated(
        huggingface.HFLM(pretrained=str(SEED_MODEL), dtype="float32", device="cpu", batch_size=4), tasks, **settings
    )
    ours, our_samples = evaluated(harness_model(load(str(SEED_MODEL), tiny.mesh(), "float32")), tasks, **settings)
    for name in NAMES:
        for metric, figure in theirs[name].items():
            if isinstance(figure, float):
                assert ours[name][metric] == pytest.approx(figure, rel=1e-4), (name, metric)
        for mine, other in zip(our_samples[name], their_samples[name], strict=True):
            assert mine["arguments"] == other["arguments"]
            for (a,), (b,) in zip(mine["resps"], other["resps"], strict=True):
                if isinstance(a, str):
                    assert a == b
                else:
                    a, b = np.atleast_1d(a), np.atleast_1d(b)
                    assert a[0] == pytest.approx(b[0], rel=1e-4, abs=1e-4)
                    assert list(a[1:]) == list(b[1:])  # whether it is the greedy one


def test_loglikelihood_is_the_sum_of_scores_and_greedy_is_what_sampling_writes():
    lm = tiny.make_lm()
    prompt = encode(lm, "Reverse: cat dog")
    ((ids, logps, _),) = generate_ids(
        lm, [prompt], tiny.jax.random.split(tiny.jax.random.key(0), 1), temperature=0.0, max_new_tokens=6
    )[0]
    other = [*ids[:-1], (ids[-1] + 1) % lm.tokenizer.vocab_size]
    (total, greedy), (_, not_greedy) = loglikelihoods(lm, [(prompt, ids), (prompt, other)], 4)
    assert total == pytest.approx(sum(logps), rel=1e-4)
    assert (greedy, not_greedy) == (True, False)
    scored = score_greedy(lm, [prompt, prompt[:3]], [ids, prompt[3:]])
    plain = score_ids(lm, [prompt, prompt[:3]], [ids, prompt[3:]])
    for (mine, _), theirs in zip(scored, plain, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


def test_long_texts_are_read_in_windows_and_contexts_are_cut_off_from_the_left():
    lm = tiny.make_lm()
    model = harness_model(lm, batch_size=4)
    text = "cat dog red axe pie saw cow egg " * 40
    ids = encode(lm, text)
    assert len(ids) > lm.config.max_positions
    (total,) = model.loglikelihood_rolling([request("loglikelihood_rolling", text)])
    most = lm.config.max_positions
    first = loglikelihoods(lm, [([model.prefix_token_id], ids[:most])], 4)[0][0]
    rest = len(ids) - most
    assert rest < most
    second = loglikelihoods(lm, [(ids[len(ids) - most - 1 : most], ids[most:])], 4)[0][0]
    assert total == pytest.approx(first + second, rel=1e-4)
    assert loglikelihoods(lm, [([*ids[:20], *ids[:253]], ids[:4])], 4) == loglikelihoods(lm, [(ids[:253], ids[:4])], 4)
    with pytest.raises(EvaluationError, match="a continuation has 257 tokens; the model has 256 positions"):
        loglikelihoods(lm, [([1], [1] * 257)], 4)


def test_a_continuation_without_a_token_has_no_score():
    """Such as "b" after "a", if the tokenizer has a token "ab": an empty sum would be a log-prob of 0, the best one."""
    lm = tiny.make_lm()
    with pytest.raises(
        EvaluationError, match="no token of its own: the tokenizer joins it with the end of its context"
    ):
        loglikelihoods(lm, [(encode(lm, "cat"), [])], 4)


def test_generation_ends_before_the_first_stop_text_and_refuses_settings_that_it_does_not_have():
    lm = load(str(SEED_MODEL), tiny.mesh(), "float32")
    whole, cut = (
        generated(lm, ["Reverse: cat dog"], {"until": until, "max_gen_toks": 8, "do_sample": False}, batch_size=2)[0]
        for until in ([], [" "])
    )
    assert " " in whole.strip() and cut == whole.split(" ")[0]
    with pytest.raises(EvaluationError, match="'num_beams' of the task is not supported"):
        generated(lm, ["a"], {"num_beams": 4}, batch_size=2)
    with pytest.raises(EvaluationError, match="the task generates 9999 tokens"):
        generated(lm, ["a"], {"max_gen_toks": 9999}, batch_size=2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_command_runs_a_local_task_offline(tasks, tmp_path, capsys):
    words = ["eval", "lm-eval", str(SEED_MODEL), "--tasks", "ours_choice", "--include-path", str(tasks)]
    out = tmp_path / "out"
    assert main([*words, "--dtype", "float32", "--limit", "3", "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 <= found["results"]["ours_choice"]["acc,none"] <= 1
    assert (
        json.loads((out / "results.json").read_text())["results"]["ours_choice"]["acc,none"]
        == found["results"]["ours_choice"]["acc,none"]
    )
    words[words.index("ours_choice")] = "no_such_task"
    assert main(words) == 2
    assert "there is no task 'no_such_task'" in capsys.readouterr().err
