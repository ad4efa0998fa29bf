"""Style control of Arena-Hard: features by hand, the fit against a direct one, what changes nothing, the command."""

import csv
import dataclasses
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize, stats

from jaxsi.cli.main import main
from jaxsi.evals import arena_hard, arena_style
from jaxsi.evals.answer_cache import EvaluationError
from jaxsi.evals.arena_hard import Games
from jaxsi.evals.arena_style import Style, bradley_terry, controlled_scores, differences, read_styles, style_of
from jaxsi.evals.length_controlled import FitError, Rows
from jaxsi.runs.records import RecordError

DATA = Path(__file__).parents[3] / "shared" / "data" / "arena_hard"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="Arena-Hard's data are not here")
BOTH = ("length", "markdown")
MIRRORED = {"A>>B": "B>>A", "A>B": "B>A", "A=B": "A=B", "B>A": "A>B", "B>>A": "A>>B"}


def games(first, second, uid="1", model="m"):
    return Games(uid=uid, model=model, judge="j", category="c", labels=(first, second))


def judgment(uid, first, second, model="m", **more):
    return {"uid": uid, "model": model, "judge": "j", "games": [{"score": first}, {"score": second}]} | more


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_marks_are_counted_outside_of_code():
    text = (
        "# One\n## Two\n#no header\n- a\n  * b\n+ c\n10. d\n1) no\n**bold** and __too__, not ** this\n"
        "```md\n# code\n- code\n**code**\n```\n###### Six\n"
    )
    assert style_of(text, 40) == Style(tokens=40, headers=3, lists=4, bold=2)
    assert style_of("", 0) == Style(0, 0, 0, 0)


def test_features_worked_out_by_hand():
    a, b = np.asarray([[30.0, 3, 0, 31]]), np.asarray([[10.0, 0, 0, 11]])
    # densities 3/31, 0, 1 and 0, 0, 1
    assert differences(a, b) == pytest.approx(np.asarray([[0.5, (3 / 31) / (3 / 31 + 1), 0, 0]]))
    assert differences(b, a) == pytest.approx(-differences(a, b))
    assert differences(np.zeros((1, 4)), np.zeros((1, 4))) == pytest.approx(np.zeros((1, 4)))


def made(models=("m1", "m2", "m3"), prompts=60, seed=0, style_effect=1.5):
    """Judgments of models of rising strength, which wordy answers help, and the styles of all answers."""
    rng = np.random.default_rng(seed)

    def styles(wordy):
        return {
            f"u{i}": Style(int(rng.integers(20, 200) * wordy), *map(int, rng.integers(0, 9, 3))) for i in range(prompts)
        }

    baseline = styles(1.0)
    answered = {model: styles(2.0 - 0.5 * k) for k, model in enumerate(models)}
    rows = []
    for k, model in enumerate(models):
        for uid, style in answered[model].items():
            pair = (np.asarray([dataclasses.astuple(s)], np.float64) for s in (style, baseline[uid]))
            z = k - 1 + style_effect * float(differences(*pair)[0, 0])
            labels = []
            for _ in range(2):
                won = rng.random() < 1 / (1 + np.exp(-z))
                strong = rng.random() < 0.3
                label = "A=B" if rng.random() < 0.1 else "A>>B" if strong else "A>B"
                labels.append(label if won else MIRRORED[label])
            rows.append(games(MIRRORED[labels[0]], labels[1], uid, model=model))
    return rows, answered, baseline


def direct(rows, answered, baseline, columns):
    """The same fit by a general minimiser on one row a weighted game, with the features in a loop."""
    models = sorted(answered)
    x, y = [], []
    points = {"A>>B": [1] * 3, "A>B": [1], "A=B": [0.5], "B>A": [0], "B>>A": [0] * 3}
    for row in rows:
        model, base = answered[row.model][row.uid], baseline[row.uid]
        counts = [(style.headers, style.lists, style.bold) for style in (model, base)]
        features = [(model.tokens - base.tokens) / (model.tokens + base.tokens)]
        for mine, theirs in zip(*counts, strict=True):
            a, b = mine / (model.tokens + 1), theirs / (base.tokens + 1)
            features.append((a - b) / (a + b + 1))
        for outcome in [1 - p for p in points[row.labels[0]]] + points[row.labels[1]]:
            x.append([float(row.model == name) for name in models] + [features[k] for k in columns])
            y.append(outcome)
    x, y = np.asarray(x), np.asarray(y)
    style = x[:, len(models) :]
    x[:, len(models) :] = (style - style.mean(axis=0)) / style.std(axis=0, ddof=1)

    def loss(theta):
        z = x @ theta
        return np.logaddexp(0, z).sum() - y @ z, x.T @ (1 / (1 + np.exp(-z)) - y)

    theta = optimize.minimize(loss, np.full(x.shape[1], 0.5), jac=True, method="BFGS", options={"gtol": 1e-9}).x
    return dict(zip(models, 1 / (1 + np.exp(-theta)), strict=False)), theta[len(models) :]


@pytest.mark.parametrize(
    ("controls", "columns"), [(BOTH, [0, 1, 2, 3]), (("length",), [0]), (("markdown",), [1, 2, 3])]
)
def test_scores_are_those_of_a_direct_fit(controls, columns):
    rows, answered, baseline = made()
    found = controlled_scores(rows, answered, baseline, controls, samples=2)
    scores, beta = direct(rows, answered, baseline, columns)
    assert {model: row["score"] for model, row in found["models"].items()} == pytest.approx(scores, abs=1e-6)
    assert list(found["coefficients"].values()) == pytest.approx(beta, abs=1e-5)
    assert list(found["coefficients"]) == [arena_style.FEATURES[k] for k in columns]


def test_wordy_models_lose_what_their_length_gave_them():
    """m1 is the weakest and the wordiest: the controlled scores are those of the strengths, the plain ones are not."""
    rows, answered, baseline = made(prompts=400, style_effect=4.0)
    plain = arena_hard.scores(rows)
    found = controlled_scores(rows, answered, baseline, BOTH, samples=20)
    truth = {model: 1 / (1 + np.exp(1.0 - k)) for k, model in enumerate(answered)}
    equal = {model: row["score_at_equal_style"] for model, row in found["models"].items()}
    assert equal == pytest.approx(truth, abs=0.06)
    assert plain["m1"]["score"] > truth["m1"] + 0.15
    assert found["coefficients"]["length"] > 0.5 > 3 * abs(found["coefficients"]["bold"])
    for row in found["models"].values():
        assert row["interval"][0] < row["score"] < row["interval"][1]
        assert np.diff(row["interval_by_prompt"]) > 0.8 * np.diff(row["interval"])


def test_without_style_or_without_a_difference_of_it_the_score_is_the_plain_one():
    rows, answered, baseline = made()
    plain = {model: row["score"] for model, row in arena_hard.scores(rows).items()}
    same = dict.fromkeys(baseline, Style(7, 1, 2, 3))
    for found in (
        controlled_scores(rows, answered, baseline, (), samples=2),
        controlled_scores(rows, dict.fromkeys(answered, same), same, BOTH, samples=2),
    ):
        assert {m: row["score"] for m, row in found["models"].items()} == pytest.approx(plain, abs=1e-9)
        assert {m: row["score_at_equal_style"] for m, row in found["models"].items()} == pytest.approx(plain, abs=1e-9)
        assert found["coefficients"] == {} and found["without_optimum"] == 0


def test_names_and_the_order_of_rows_change_nothing():
    rows, answered, baseline = made()
    found = controlled_scores(rows, answered, baseline, BOTH, samples=2)
    names = {"m1": "z", "m2": "a", "m3": "k"}
    renamed = [dataclasses.replace(row, model=names[row.model]) for row in rows][::-1]
    other = controlled_scores(renamed, {names[m]: s for m, s in answered.items()}, baseline, BOTH, samples=2)
    for model, name in names.items():
        for figure in ("score", "score_at_equal_style", "games"):
            assert other["models"][name][figure] == pytest.approx(found["models"][model][figure], abs=1e-9)
    assert other["coefficients"] == pytest.approx(found["coefficients"], abs=1e-8)


def test_a_model_and_its_baseline_may_change_places():
    rows, answered, baseline = made(models=("m1",))
    found = controlled_scores(rows, answered, baseline, BOTH, samples=2)
    swapped = [dataclasses.replace(row, labels=tuple(MIRRORED[label] for label in row.labels)) for row in rows]
    other = controlled_scores(swapped, {"m1": baseline}, answered["m1"], BOTH, samples=2)
    for figure in ("score", "score_at_equal_style"):
        assert other["models"]["m1"][figure] == pytest.approx(1 - found["models"]["m1"][figure], abs=1e-9)
    assert other["coefficients"] == pytest.approx(found["coefficients"], abs=1e-8)


def test_winners_of_everything_and_fits_without_an_optimum():
    rows, answered, baseline = made()
    won = [dataclasses.replace(row, labels=("B>A", "A>>B")) if row.model == "m3" else row for row in rows]
    found = controlled_scores(won, answered, baseline, BOTH, samples=5)
    assert found["models"]["m3"]["score"] == found["models"]["m3"]["score_at_equal_style"] == 1.0
    assert found["models"]["m3"]["interval"] == [1.0, 1.0] and found["models"]["m1"]["score"] < 1
    separated = Rows(
        features_NK=np.asarray([[1.0, -1.0], [1.0, 1.0]]), labels_N=np.asarray([0.0, 1.0]), weights_N=np.ones(2)
    )
    with pytest.raises(FitError, match="separate all wins from all losses"):
        bradley_terry(separated)
    constant = dataclasses.replace(separated, features_NK=np.ones((2, 2)))
    with pytest.raises(FitError, match="cannot be told apart"):
        bradley_terry(constant)
    with pytest.raises(EvaluationError, match="no prompt has two games"):
        controlled_scores([games(None, "A>B")], answered, baseline, BOTH)
    with pytest.raises(EvaluationError, match="needs the answers of the baseline, and there is none to the prompt u0"):
        controlled_scores(rows, answered, {}, BOTH)


@needs_data
def test_real_battles_have_the_strengths_of_a_direct_fit():
    """2,136 battles of one model against four: strengths without style give the mean of the games, and order the models
    as the leaderboard against another baseline does."""
    with gzip.open(DATA / "battles_20240718.jsonl.gz", "rt") as file:
        battles = [json.loads(line) for line in file]
    others = sorted({row["model_b"] for row in battles})
    x = np.asarray([[float(row["model_b"] == name) for name in others] for row in battles])
    y = np.asarray([{"model_a": 0.0, "model_b": 1.0, "tie": 0.5}[row["winner"]] for row in battles])
    theta = bradley_terry(Rows(features_NK=x, labels_N=y, weights_N=np.ones(len(y))))
    plain = arena_hard.battle_scores(DATA / "battles_20240718.jsonl.gz")
    for name, strength in zip(others, theta, strict=True):
        (row,) = (row for pair, row in plain.items() if pair.endswith(f"vs {name}"))
        assert 1 / (1 + np.exp(strength)) == pytest.approx(row["score"], abs=1e-9)
    z = np.random.default_rng(0).normal(size=(len(y), 2))  # with features, against a general minimiser
    both = np.concatenate([x, z], axis=1)
    found = bradley_terry(Rows(features_NK=both, labels_N=y, weights_N=np.ones(len(y))))

    def loss(t):
        return float(np.logaddexp(0, both @ t).sum() - y @ (both @ t))

    assert found == pytest.approx(optimize.minimize(loss, np.zeros(6), options={"gtol": 1e-6}).x, abs=1e-4)
    with open(DATA / "leaderboard" / "arena_hard_leaderboard_20240731.csv") as file:
        board = {row["model"]: float(row["score"]) for row in csv.DictReader(file)}
    published = [next(score for model, score in board.items() if model.startswith(name)) for name in others]
    assert stats.spearmanr(theta, published).statistic > 0.75


@needs_data
def test_real_answers_have_a_style_and_no_metadata():
    folder = DATA / "arena-hard-v0.1" / "model_answer"
    with pytest.raises(RecordError, match=r"gpt-4-0314.*:1: an answer without metadata.*give --style-tokenizer MODEL"):
        read_styles(folder / "gpt-4-0314.jsonl.gz")
    styles = {}
    for name in ("gpt-4-0314", "gpt-3.5-turbo-0125"):
        model, styles[name] = read_styles(folder / f"{name}.jsonl.gz", lambda text: len(text.split()))
        assert model == name and len(styles[name]) == 500
    ours, base = styles["gpt-3.5-turbo-0125"], styles["gpt-4-0314"]

    def label(uid):  # a judge that only counts words
        gap = ours[uid].tokens - base[uid].tokens + 60 * np.random.default_rng(int(uid, 16) % 2**32).normal()
        return "A>B" if gap > 0 else "B>A"

    rows = [games(MIRRORED[label(uid)], label(uid), uid, model="x") for uid in ours]
    found = controlled_scores(rows, {"x": ours}, base, BOTH, samples=10)["models"]["x"]
    plain = arena_hard.scores(rows)["x"]["score"]
    assert plain < 0.4 and abs(found["score_at_equal_style"] - 0.5) < 0.1 < 0.5 - plain


def answer(uid, model, text, metadata=None):
    (row,) = arena_hard.answer_rows(model, {uid: ("q", "c")}, {uid: text}, now=0.0)
    return row if metadata is None else row | {"metadata": metadata}


def test_counts_are_taken_from_the_metadata_of_answers(tmp_path):
    metadata = {"token_len": 9, "header_count": {"h1": 1, "h2": 2}, "list_count": {"ordered": 0}, "bold_count": 4}
    path = written(tmp_path / "m.jsonl", [answer("1", "m", "# text", metadata)])
    assert read_styles(path) == ("m", {"1": Style(9, 3, 0, 4)})
    assert read_styles(path, len) == ("m", {"1": Style(6, 1, 0, 0)})
    written(path, [answer("1", "m", "# text", metadata | {"bold_count": "four"})])
    with pytest.raises(RecordError, match=r"m\.jsonl:1: the metadata hold 'four'"):
        read_styles(path)


def test_command_controls_style_and_names_what_is_missing(tmp_path, capsys):
    rng = np.random.default_rng(0)
    labels = list(MIRRORED)
    rows = [judgment(f"u{i}", *rng.choice(labels, 2), model=m, category="hard") for m in ("m", "n") for i in range(30)]
    path = written(tmp_path / "j.jsonl", rows)
    files = {}
    for model in ("m", "n", "base"):
        texts = ["word " * int(rng.integers(1, 30)) + "\n- item" * int(rng.integers(0, 4)) for _ in range(30)]
        none = {"header_count": 0, "bold_count": 0}
        counts = [none | {"token_len": len(text.split()), "list_count": text.count("-")} for text in texts]
        files[model] = written(
            tmp_path / f"{model}.jsonl",
            [answer(f"u{i}", model, t, c) for i, (t, c) in enumerate(zip(texts, counts, strict=True))],
        )
    words = ["eval", "arena-hard", "--judgments", path, "--style-control", "length", "markdown"]
    base, both = ["--baseline", files["base"]], ["--style-answers", files["m"], files["n"]]

    def called(*more):
        code = main([str(word) for word in (*words, *more, "--json")])
        out, err = capsys.readouterr()
        return code, json.loads(out) if code == 0 else None, err

    code, value, err = called(*base, *both)
    assert code == 0, err
    assert value["style_control"]["controls"] == ["length", "markdown"] and value["style_control"]["warnings"] == []
    assert set(value["style_control"]["coefficients"]) == {"length", "lists"}  # the others never differ
    judgments = arena_hard.read_judgments([path])
    styles = dict(read_styles(files[name]) for name in ("m", "n"))
    expected = controlled_scores(judgments, styles, read_styles(files["base"])[1], BOTH)
    assert value["style_control"]["models"] == expected["models"]
    for more, fault in (
        (both, "--style-control needs the baseline's answers: give its file of model_answer, --baseline FILE"),
        ([*base, *both[:-1]], "needs the answers of n: give their files of model_answer, such as model_answer/n.jsonl"),
        (["--category", "easy", *base, *both], "--category easy: the judgments have hard"),
    ):
        code, _, err = called(*more)
        assert code == 2 and fault in err, err
    assert main([str(word) for word in [*words, *base, *both]]) == 0
    assert "controlled for length and markdown" in capsys.readouterr().out
    written(files["m"], [answer("u0", "m", "text")])
    code, _, err = called(*base, *both)
    assert code == 2 and "give --style-tokenizer MODEL" in err
    battles = written(tmp_path / "b.jsonl", [{"model_a": "x", "model_b": "y", "winner": "tie"}])
    assert main(["eval", "arena-hard", "--battles", str(battles), "--style-control", "length"]) == 2
    assert "battles do not say which answers they are about" in capsys.readouterr().err
