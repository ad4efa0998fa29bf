"""`jaxsi chat` with a tiny model: lines from a pipe and from a keyboard, the history, and what is shown."""

import dataclasses
import io
import json
import logging

import jax
import pytest

import tiny
from jaxsi import lm as lmlib
from jaxsi.cli import chat
from jaxsi.cli.chat import DIM, PLAIN, Shown, _settled
from jaxsi.cli.main import main
from jaxsi.sampling import generate as generation
from jaxsi.text.chat_config import Thought, split_thought
from jaxsi.training.reward import with_scalar_head


@pytest.fixture(autouse=True)
def _on_one_device(monkeypatch):
    monkeypatch.setattr(chat, "mesh_for", lambda *_: tiny.mesh())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "model"
    lmlib.export(tiny.make_lm(), folder, dtype="float32")
    return folder


class Keyboard(io.StringIO):
    def isatty(self):
        return True


def talked(capsys, monkeypatch, model, lines, *more, keyboard=False):
    """(exit code, stdout, stderr) of a chat in which the user writes ``lines``."""
    monkeypatch.setattr("sys.stdin", (Keyboard if keyboard else io.StringIO)("".join(f"{x}\n" for x in lines)))
    words = ["chat", model, "--dtype", "float32", "--max-new-tokens", 8, "--temperature", 1, "--top-p", 1, *more]
    code = main([str(word) for word in words])
    return code, *capsys.readouterr()


@pytest.fixture
def asked(monkeypatch):
    """The conversations that the model was given; with planted answers it samples nothing."""
    seen, planted, real = [], [], generation.generate

    def generate(lm, prompts, **options):
        seen.append([message["content"] for message in prompts[0].messages])
        if not planted:
            return real(lm, prompts, **options)
        if isinstance(answer := planted.pop(0), BaseException):
            raise answer
        response = tiny.response(prompts[0], 0, [5, 6], stopped=not answer.endswith("~"))
        thought = split_thought(answer.rstrip("~"))
        return [dataclasses.replace(response, text=thought.answer, reasoning=thought.reasoning)]

    monkeypatch.setattr(generation, "generate", generate)
    return seen, planted


def test_lines_from_a_pipe_are_turns_with_a_history(model, capsys, monkeypatch, asked):
    words = ("Reverse: cat", "", "Reverse: dog", "/reset", "Reverse: cat", "/quit", "never")
    code, out, err = talked(capsys, monkeypatch, model, words, "--json")
    assert code == 0, err
    turns = json.loads(out)["turns"]
    assert [turn["prompt"] for turn in turns] == ["Reverse: cat", "Reverse: dog", "Reverse: cat"]
    answers = [turn["text"] for turn in turns]
    assert asked[0] == [["Reverse: cat"], ["Reverse: cat", answers[0], "Reverse: dog"], ["Reverse: cat"]]
    assert all(0 < turn["tokens"] <= 8 for turn in turns) and answers[0] != answers[2]  # each turn has noise of its own
    assert "[the conversation is forgotten]" in err and answers[0] in err
    code, plain, _ = talked(capsys, monkeypatch, model, words)
    assert code == 0 and plain == "".join(f"{answer}\n" for answer in answers)  # the same seed, the same answers
    code, other, _ = talked(capsys, monkeypatch, model, words, "--seed", 1)
    assert code == 0 and other != plain


def test_later_turns_compile_nothing_new(model, capsys, monkeypatch):
    """As long as the conversation stays below the next power of two."""
    compiled = []

    class Listen(logging.Handler):
        def emit(self, record):
            compiled.append(record.getMessage())

    listen = Listen()
    logger = logging.getLogger("jax._src.interpreters.pxla")
    counts = []
    real = generation.generate

    def counting(*args, **options):
        result = real(*args, **options)
        counts.append(len(compiled))
        return result

    monkeypatch.setattr(generation, "generate", counting)
    logger.addHandler(listen)
    try:
        with jax.log_compiles():
            code, _, err = talked(capsys, monkeypatch, model, ["cat dog axe pie " * 17, "cat", "dog"])
    finally:
        logger.removeHandler(listen)
    assert code == 0, err
    assert len(counts) == 3 and counts[0] > 0 and counts[1:] == [counts[0]] * 2, compiled[counts[0] :]


def test_keyboard_shows_a_prompt_and_goes_on_after_an_error(model, capsys, monkeypatch, asked):
    asked[1].extend(["Hello.", KeyboardInterrupt(), "Fine.", "", "cut~"])
    lines = ["Hi", "/help", "stop", "again", "nothing", "end"]
    code, out, err = talked(capsys, monkeypatch, model, lines, "--system", "Be brief.", keyboard=True)
    assert code == 0
    assert out.startswith("\n> Hello.\n\n> ") and out.count("> ") == 7
    assert "[/help is not a command; the commands are /reset, /quit]" in err
    assert "[stopped; this turn is not part of the conversation]" in err
    assert "[an empty answer; this turn is not part of the conversation]" in err
    assert "[cut off at --max-new-tokens 8]" in err
    history = ["Be brief.", "Hi", "Hello."]
    assert asked[0] == [
        history[:2], [*history, "stop"], [*history, "again"], [*history, "again", "Fine.", "nothing"],
        [*history, "again", "Fine.", "end"],
    ]  # fmt: skip


def test_conversation_without_room_drops_nothing_silently(model, capsys, monkeypatch, asked):
    asked[1].extend(["short.", "again."])
    lines = ["Hi", "cat " * 250, "Hi"]
    code, out, err = talked(capsys, monkeypatch, model, lines, keyboard=True)
    assert code == 0 and out.count("short.") == 1
    assert "tokens, and --max-new-tokens 8 for the answer make more than the 256 positions" in err
    assert asked[0] == [["Hi"], ["Hi", "short.", "Hi"]]  # the long turn is left out, and was said to be
    code, out, err = talked(capsys, monkeypatch, model, lines)  # a pipe has nobody who could read the message
    assert code == 2 and "256 positions of the model" in err and "Traceback" not in err
    code, out, err = talked(capsys, monkeypatch, model, [], "--max-new-tokens", 256)
    assert code == 2 and out == "" and "--max-new-tokens 256" in err


def test_thoughts_are_apart_from_answers_and_not_in_the_history(model, capsys, monkeypatch, asked):
    asked[1].extend(["<think>Let me see.</think>\n\nBlue.", "Red."])
    code, out, err = talked(capsys, monkeypatch, model, ["Why?", "And?"])
    assert (code, out) == (0, "Blue.\nRed.\n") and "Let me see." in err
    assert asked[0][1] == ["Why?", "Blue.", "And?"]
    asked[1].extend(["<think>Let me see.</think>\n\nBlue."])
    _, out, _ = talked(capsys, monkeypatch, model, ["Why?"], "--json")
    (turn,) = json.loads(out)["turns"]
    assert (turn["reasoning"], turn["text"], turn["finish_reason"]) == ("Let me see.", "Blue.", "stop")


def grown(text, screen):
    """What is on the screen after an answer that came character by character."""
    shown = Shown(screen)
    for n in range(len(text) + 1):
        shown.update(split_thought(text[:n]))
    shown.finish(split_thought(text))
    return screen.getvalue()


@pytest.mark.parametrize("text", ["Blue <b>sky</b>.\n\n", "a < b", "grün\n\n\nübel", "", "<thin", "ends in <"])
def test_growing_answer_is_shown_once(text):
    assert grown(text, io.StringIO()) == f"{text}\n"


def test_growing_thought_is_dim_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    text = grown("<think>\nA < b, so\nyes.\n</think>\n\nYes.", Terminal())
    assert text.replace(f"{PLAIN}{DIM}", "") == f"{DIM}A < b, so\nyes.{PLAIN}\n\nYes.\n"


def test_unfinished_characters_and_tags_are_held_back():
    assert [_settled(text) for text in ("gr\ufffd", "so </thi", "so <", "<think", "a b ", "a")] == [
        "gr", "so", "so", "", "a b", "a"
    ]  # fmt: skip
    shown = Shown(screen := io.StringIO())
    shown.update(Thought("", "Hello", closed=True))
    shown.finish(Thought("", "Other.", closed=True))  # never seen, but nothing may be lost
    assert "Other." in screen.getvalue()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--temperature", "-1"), "temperature is -1.0"),
        (("--top-p", "0"), "top_p is 0.0"),
        (("--chat.date", "today"), "date is 'today'"),
    ],
)
def test_settings_that_cannot_work_are_refused(model, capsys, monkeypatch, more, message):
    code, out, err = talked(capsys, monkeypatch, model, ["Hi"], *more)
    assert (code, out) == (2, "") and message in " ".join(err.split())


def test_reward_model_is_refused(capsys, monkeypatch, tmp_path):
    lmlib.export(with_scalar_head(tiny.make_lm()), tmp_path / "rm", dtype="float32")
    code, out, err = talked(capsys, monkeypatch, tmp_path / "rm", ["Hi"])
    assert (code, out) == (2, "") and "is a reward model, which writes no text" in err
