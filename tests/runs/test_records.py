"""Records and their files: exact round trips, errors that name the place, atomic writes, and prompts of users."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from jaxsi.runs import records
from jaxsi.runs.records import (
    Judgment,
    PreferencePair,
    Prompt,
    RankedResponses,
    RecordError,
    Response,
    SFTExample,
    from_json,
    read_jsonl,
    to_json,
    write_atomically,
    write_jsonl,
)

REPO = Path(__file__).parents[2]

texts = st.text(max_size=30) | st.sampled_from(
    ["\u2028", "\x85", "\r", "a\nb\r\nc", '"\\', "\ufeff", "<|im_end|>", "\ud800"]
)
floats = st.floats(allow_nan=False, allow_infinity=False)
messages = st.lists(st.fixed_dictionaries({"role": st.sampled_from(records.ROLES), "content": texts}), max_size=3).map(
    tuple
)
responses = st.builds(
    Response,
    id=texts,
    prompt_id=texts,
    sample=st.integers(0, 100),
    text=texts,
    token_ids=st.lists(st.integers(0, 2**31), max_size=5).map(tuple),
    logps=st.lists(floats, max_size=5).map(tuple),
    finish_reason=st.sampled_from(["stop", "length"]),
    fingerprint=texts,
    template=texts,
)
scores = st.none() | floats
any_record = st.one_of(
    st.builds(Prompt, id=texts, messages=messages),
    responses,
    st.builds(
        Judgment,
        id=texts,
        prompt_id=texts,
        scores=st.lists(scores, max_size=4).map(tuple),
        score=scores,
        texts=st.lists(texts, max_size=3).map(tuple),
        fingerprint=texts,
        template=texts,
    ),
    st.builds(
        PreferencePair,
        id=texts,
        messages=messages,
        chosen=responses,
        rejected=responses,
        chosen_score=floats,
        rejected_score=floats,
    ),
    st.builds(SFTExample, id=texts, messages=messages, response=texts),
    st.builds(
        RankedResponses,
        id=texts,
        messages=messages,
        responses=st.lists(texts, max_size=3).map(tuple),
        ranks=st.lists(st.integers(0, 9), max_size=3).map(tuple),
    ),
)


def prompt(number: int, text: str = "Hi") -> Prompt:
    return Prompt.of(str(number), text)


# ---- round trip ------------------------------------------------------------------------------------------------------


@given(record=any_record, copies=st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_records_survive_a_round_trip_and_rewrite_to_the_same_bytes(record, copies, tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    write_jsonl(folder / "a.jsonl", [record] * copies)
    back = read_jsonl(folder / "a.jsonl", type(record))
    assert back == [record] * copies
    write_jsonl(folder / "b.jsonl", back)
    assert (folder / "a.jsonl").read_bytes() == (folder / "b.jsonl").read_bytes()
    assert (folder / "a.jsonl").read_bytes().count(b"\n") == copies


def test_floats_are_bit_for_bit_and_text_is_readable(tmp_path):
    logps = (-0.1, -1e-300, -0.0, -123456.78901234567, 5e-324)
    record = Response(
        id="1#0",
        prompt_id="1",
        sample=0,
        text="né 字",
        token_ids=(1,),
        logps=logps,
        finish_reason="stop",
        fingerprint="f",
        template="t",
    )
    write_jsonl(tmp_path / "r.jsonl", [record])
    (back,) = read_jsonl(tmp_path / "r.jsonl", Response)
    assert [math.copysign(1, x) for x in back.logps] == [math.copysign(1, x) for x in logps]
    assert [x.hex() for x in back.logps] == [x.hex() for x in logps]
    assert "né 字" in (tmp_path / "r.jsonl").read_text("utf-8")


def test_whole_number_in_a_float_field_becomes_a_float():
    value = to_json(Judgment(id="a", prompt_id="a", scores=(), score=None, texts=(), fingerprint="", template=""))
    judgment = from_json(Judgment, value | {"scores": [4, None], "score": 4})
    assert judgment.scores == (4.0, None)
    assert isinstance(judgment.score, float)
    assert isinstance(judgment.scores[0], float)


# ---- wrong records ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"colour": 1}, "unknown key 'colour'"),
        ({"text": None}, "text is None"),
        ({"sample": True}, "sample is True"),
        ({"sample": 1.5}, "sample is 1.5"),
        ({"token_ids": [1, "2"]}, r"token_ids\[1\] is '2'"),
        ({"logps": [None]}, r"logps\[0\] is None"),
        ({"token_ids": "12"}, "token_ids is '12'"),
        ({"finish_reason": "eos"}, "finish_reason is 'eos'"),
    ],
)
def test_error_names_a_wrong_field_and_its_line(change, names, tmp_path):
    good = {
        "id": "1#0",
        "prompt_id": "1",
        "sample": 0,
        "text": "t",
        "token_ids": [1],
        "logps": [-1.0],
        "finish_reason": "stop",
        "fingerprint": "f",
        "template": "t",
    }
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps(good | change) + "\n")
    with pytest.raises(RecordError, match=f"r.jsonl:2: .*{names}"):
        read_jsonl(path, Response)


def test_error_names_a_missing_key(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"id": "1"}\n')
    with pytest.raises(RecordError, match=r"p\.jsonl:1: key 'messages' of a Prompt is missing"):
        read_jsonl(tmp_path / "p.jsonl", Prompt)


@pytest.mark.parametrize("score", [math.nan, math.inf, {1, 2}])
def test_value_that_json_lacks_is_an_error_and_no_file_appears(score, tmp_path):
    bad = Judgment(id="a", prompt_id="a", scores=(), score=score, texts=(), fingerprint="", template="")
    with pytest.raises(RecordError, match=r"j\.jsonl:2: Judgment cannot be written"):
        write_jsonl(tmp_path / "j.jsonl", [Judgment(**to_json(bad) | {"score": 1.0}), bad])
    assert list(tmp_path.iterdir()) == []


# ---- atomic files ----------------------------------------------------------------------------------------------------


def test_failed_write_keeps_the_earlier_file(tmp_path):
    write_jsonl(tmp_path / "p.jsonl", [prompt(1)])

    def breaking():
        yield prompt(2)
        raise RuntimeError("the stage broke")

    with pytest.raises(RuntimeError):
        write_jsonl(tmp_path / "p.jsonl", breaking())
    assert read_jsonl(tmp_path / "p.jsonl", Prompt) == [prompt(1)]
    assert [file.name for file in tmp_path.iterdir()] == ["p.jsonl"]


def test_kill_during_a_write_keeps_the_earlier_file(tmp_path):
    path = tmp_path / "p.jsonl"
    write_jsonl(path, [prompt(1)])
    program = (
        "import os, signal, sys; from jaxsi.runs.records import write_atomically\n"
        "def chunks():\n    yield b'x' * 10_000_000\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_atomically(sys.argv[1], chunks())"
    )
    result = subprocess.run([sys.executable, "-c", program, str(path)], cwd=REPO, check=False)
    assert result.returncode == -signal.SIGKILL
    assert read_jsonl(path, Prompt) == [prompt(1)]
    assert len(list(tmp_path.glob(".*.tmp"))) == 1  # the run removes it when it is opened again


def test_atomic_write_follows_the_order_write_sync_rename(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: order.append("sync"))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (order.append("rename"), replace(*paths)))
    write_atomically(tmp_path / "f", [b"a", b"b"])
    assert order == ["sync", "rename", "sync"]
    assert (tmp_path / "f").read_bytes() == b"ab"


def test_importing_records_does_not_import_jax():
    program = "import sys, jaxsi.runs.records; print('jax' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], cwd=REPO, check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "False"
