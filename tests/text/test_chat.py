"""Chat rendering: golden ids of each template, parity with apply_chat_template, control strings in text stay text."""

import copy
import time

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from jaxsi.text import chat_template
from jaxsi.text.chat import render_prompt, render_response
from jaxsi.text.chat_template import ChatTemplateError, compile_template, render_text
from tests.text.test_tokenizer import FAMILIES, HF_FAMILIES, INJECTIONS, reference_of, tokenizer_of

FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXT = st.text(max_size=40) | st.lists(
    st.sampled_from(
        ["hello", " ", "  ", "\n", "\n\n", "é", "日本", "🙂", "12345", "<", ">", "|", "a<", "\t", "[INST]"]
    ),
    max_size=12,
).map("".join)
HOSTILE = st.lists(st.sampled_from([*INJECTIONS, "hi", " ", "\n", "é", "<", "s>", "|>", "<|im_end|"]), max_size=8).map(
    "".join
)


def chat_ids(tokenizer, messages, **options):
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


GOLDEN_PROMPTS = {
    "llama3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "chatml": "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n",
    "chatml_pad_eos": "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n",
    "gemma": "<bos><start_of_turn>user\nhello<end_of_turn>\n<start_of_turn>model\n",
    "llama2": "<s>[INST] hello [/INST]",
    "plain": "<s>User:\nhello\n\nAssistant:\n",
    "plain_no_bos": "User:\nhello\n\nAssistant:\n",
}
GOLDEN_ENDS = {
    "llama3": "<|eot_id|>",
    "chatml": "<|im_end|>",
    "chatml_pad_eos": "<|im_end|>",
    "gemma": "<end_of_turn>",
    "llama2": "</s>",
    "plain": "</s>",
    "plain_no_bos": "</s>",
}


@pytest.mark.parametrize("family", GOLDEN_PROMPTS)
def test_golden_prompt_and_response(family):
    """One BOS if the model has one, else zero; exactly one end-of-turn, at the end."""
    tokenizer = tokenizer_of(family)
    prompt, response = render_prompt(tokenizer, [user("hello")]), render_response(tokenizer, "how are you")
    assert prompt == tokenizer.encode_trusted(GOLDEN_PROMPTS[family])
    end = tokenizer.encode_trusted(GOLDEN_ENDS[family])[-1]
    assert end in tokenizer.control_ids
    assert response[-1] == end
    assert response.count(end) == 1
    assert [token for token in response if token in tokenizer.control_ids] == [end]
    assert tokenizer.stop_ids.count(end) == 1
    expected_bos = 0 if family in ("chatml", "chatml_pad_eos", "plain_no_bos") else 1
    if tokenizer.bos_id is not None:
        assert (prompt + response).count(tokenizer.bos_id) == expected_bos
        assert prompt.index(tokenizer.bos_id) == 0 if expected_bos else True
    assert tokenizer.decode(response).strip() == "how are you"


def test_literal_ids_of_one_template():
    """Numbers, not strings: a character-level ChatML tokenizer's ids can be read off its vocabulary."""
    tokenizer = tokenizer_of("characters")
    ids = {text: tokenizer.controls.ids[text] for text in ("<|im_start|>", "<|im_end|>")}
    letters = [*range(ord("a"), ord("z") + 1)]
    asker = [3 + letters.index(ord(c)) for c in "user"]
    newline, hi = 30, [3 + letters.index(ord(c)) for c in "hi"]
    writer = [3 + letters.index(ord(c)) for c in "assistant"]
    start, end = ids["<|im_start|>"], ids["<|im_end|>"]
    assert (start, end) == (1, 2)
    assert render_prompt(tokenizer, [user("hi")]) == [
        start,
        *asker,
        newline,
        *hi,
        end,
        newline,
        start,
        *writer,
        newline,
    ]
    assert render_response(tokenizer, "hi") == [*hi, end]
    assert tokenizer.pad_id == tokenizer.eos_id == end


@pytest.mark.parametrize("family", HF_FAMILIES)
@FUZZ
@given(data=st.data())
def test_text_without_control_strings_gets_the_ids_of_apply_chat_template(family, data):
    tokenizer = tokenizer_of(family)
    question, answer, more = data.draw(TEXT), data.draw(TEXT), data.draw(TEXT)
    for control in tokenizer.controls.ids:
        question, answer, more = (text.replace(control, "") for text in (question, answer, more))
    if any(control in text for control in tokenizer.controls.ids for text in (question, answer, more)):
        return
    messages = [user(question), assistant(answer), user(more)]
    if family not in ("gemma", "llama2"):
        messages.insert(0, {"role": "system", "content": answer})
    theirs = reference_of(family)
    options = {"chat_template": tokenizer.chat_template}
    assert render_prompt(tokenizer, messages) == chat_ids(theirs, messages, add_generation_prompt=True, **options)
    whole = chat_ids(theirs, [user(question), assistant(answer)], **options)
    prompt = render_prompt(tokenizer, [user(question)])
    ours = prompt + render_response(tokenizer, answer)
    if whole[: len(prompt)] != prompt:
        # In the whole text, "…assistant\n" + "\n…" shares one token; a sampler has read the prompt's newline by then.
        assert answer[:1].isspace()
        assert tokenizer.decode(whole).startswith(tokenizer.decode(ours))
        return
    assert whole[: len(ours)] == ours
    assert tokenizer.decode(whole[len(ours) :]).strip() == ""
    assert not tokenizer.control_ids.intersection(whole[len(ours) :])


@pytest.mark.parametrize("family", FAMILIES)
@FUZZ
@given(data=st.data())
def test_text_never_becomes_a_control_token(family, data):
    """For any text of a user, system or assistant, the control ids are those of the same conversation of "hello"s."""
    tokenizer = tokenizer_of(family)
    texts = [data.draw(HOSTILE) for _ in range(3)]
    messages = [user(texts[0]), assistant(texts[1]), user(texts[2])]
    if family not in ("gemma", "gemma_sp", "llama2", "llama2_sp"):
        messages.insert(0, {"role": "system", "content": texts[1]})
    harmless = [{"role": message["role"], "content": "hello"} for message in messages]
    control = tokenizer.control_ids
    assert [t for t in render_prompt(tokenizer, messages) if t in control] == [
        t for t in render_prompt(tokenizer, harmless) if t in control
    ]
    response = render_response(tokenizer, texts[0])
    assert [t for t in response if t in control] == [tokenizer.assistant_turn.end_of_turn]
    assert response[-1] == tokenizer.assistant_turn.end_of_turn


@pytest.mark.parametrize("family", FAMILIES)
def test_every_control_string_stays_text(family):
    tokenizer = tokenizer_of(family)
    assert tokenizer.controls.ids
    for control in tokenizer.controls.ids:
        prompt = render_prompt(tokenizer, [user(f"a{control}b")])
        harmless = render_prompt(tokenizer, [user("ab")])
        assert sum(t in tokenizer.control_ids for t in prompt) == sum(t in tokenizer.control_ids for t in harmless)
        if family not in ("characters", "unigram"):  # these lack letters for some control strings
            assert control in tokenizer.decode(prompt)
        if control != "<unk>":
            response = render_response(tokenizer, control)
            assert sum(t in tokenizer.control_ids for t in response) == 1


@pytest.mark.parametrize("family", HF_FAMILIES)
@FUZZ
@given(text=TEXT)
def test_encoding_by_parts_equals_direct_encoding(family, text):
    """For conversations without control strings."""
    tokenizer = tokenizer_of(family)
    for control in tokenizer.controls.ids:
        text = text.replace(control, "")
    rendered = tokenizer.encode_trusted(GOLDEN_PROMPTS["chatml"])
    parts = tokenizer.controls.parts(GOLDEN_PROMPTS["chatml"].replace("hello", text), ())
    assert tokenizer.encode_parts(tokenizer.controls.parts(GOLDEN_PROMPTS["chatml"], ())) == rendered
    if tokenizer.controls.pattern.search(text) is None:
        joined = "".join(p if isinstance(p, str) else "" for p in parts)
        assert tokenizer.encode_parts([joined] if joined else []) == tokenizer.encode_trusted(joined)


def test_control_string_split_between_text_and_template_stays_text():
    """`<|im_end|` at the end of a message must not join with the template's text after it."""
    tokenizer = copy.copy(tokenizer_of("chatml"))
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m['content'] }}|><|im_end|>{% endfor %}"
    ids = render_prompt(tokenizer, [user("x<|im_end"), user("|im_start|")])
    assert [t for t in ids if t in tokenizer.control_ids] == render_prompt_controls(tokenizer, 2)
    assert tokenizer.decode(ids) == "x<|im_end|>|im_start||>"


def test_control_string_split_between_template_and_text_stays_text():
    """The same at the front: the template's own `<` must not turn a message that starts with `/s>` into `</s>`."""
    tokenizer = copy.copy(tokenizer_of("llama2"))
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    ids = render_prompt(tokenizer, [user("/s>"), user("s")])
    assert [t for t in ids if t in tokenizer.control_ids] == [tokenizer.bos_id]
    assert tokenizer.decode(ids) == "</s>><s>"


def render_prompt_controls(tokenizer, messages):
    return [tokenizer.controls.ids[t] for t in ("<|im_start|>", "<|im_end|>")] * messages


def test_sentinels_survive_template_string_methods():
    tokenizer = copy.copy(tokenizer_of("chatml"))
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ (m['content'] | trim).split('||')[-1] | tojson }}<|im_end|>{% endfor %}"
    )
    ids = render_prompt(tokenizer, [user("a||  <|im_end|>é ")])
    assert [t for t in ids if t in tokenizer.control_ids] == render_prompt_controls(tokenizer, 1)
    assert tokenizer.decode(ids) == '"  <|im_end|>é"'


def test_refusals_name_the_message_and_the_reason():
    gemma = tokenizer_of("gemma")
    with pytest.raises(ChatTemplateError, match=r"message 0 of 2 \(system: 'be kind'\): System role not supported"):
        render_prompt(gemma, [{"role": "system", "content": "be kind"}, user("hello")])
    with pytest.raises(ChatTemplateError, match=r"message 1 of 3 \(user: 'again'\).*must alternate"):
        render_prompt(gemma, [user("hello"), user("again"), assistant("yes")])
    with pytest.raises(ChatTemplateError, match=r"message 1 of 2 \(tool:"):
        render_prompt(tokenizer_of("plain"), [user("a"), {"role": "tool", "content": "b"}])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "has no message"),
        ([{"role": "user"}], "message 0 is .*role"),
        ([user("a"), {"role": "user", "content": None}], "message 1 is"),
        ([{"role": "user<|im_end|>", "content": "a"}], "message 0 has the role"),
        ([user("a\ud800b")], "message 0 .user. is not valid Unicode: .* character 1"),
    ],
)
def test_malformed_conversation_is_refused(messages, message):
    with pytest.raises(ChatTemplateError, match=message):
        render_prompt(tokenizer_of("chatml"), messages)


def test_hostile_templates_end_in_an_error(monkeypatch):
    monkeypatch.setattr(chat_template, "FIRST_RENDER_SECONDS", 0.2)
    loops = "".join(f"{{% for a{n} in range(300) %}}" for n in range(3)) + "{% endfor %}" * 3
    with pytest.raises(ChatTemplateError, match=r"did not finish within 0\.2 s"):
        render_text(loops, [user("a")], {}, add_generation_prompt=True)
    with pytest.raises(ChatTemplateError, match="beyond 1000000 characters"):
        render_text("{{ 'a' * 10000000 }}", [user("a")], {}, add_generation_prompt=True)
    with pytest.raises(ChatTemplateError, match="unsafe"):
        render_text("{{ ''.__class__.__mro__ }}", [user("a")], {}, add_generation_prompt=True)
    with pytest.raises(ChatTemplateError, match="does not parse: line 1"):
        compile_template("{% for %}")


def test_templates_with_generation_blocks_and_loop_controls():
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}<|im_start|>{{ m.role }}\n"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endfor %}"
    )
    tokenizer = copy.copy(tokenizer_of("chatml"))
    tokenizer.chat_template = template
    messages = [{"role": "system", "content": "x"}, user("hello"), assistant("hi")]
    expected = chat_ids(reference_of("chatml"), messages, chat_template=template)
    assert render_prompt(tokenizer, messages, add_generation_prompt=False) == expected


def test_reasoning_template_whose_finished_turn_differs():
    """The prompt opens a thought that the history drops: the response is the text and the end of the turn."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    tokenizer = tokenizer_of("chatml", template)
    response = render_response(tokenizer, "why</think>\nbecause <|im_end|>")
    assert tokenizer.decode(response) == "why</think>\nbecause <|im_end|>"
    assert [t for t in response if t in tokenizer.control_ids] == [tokenizer.controls.ids["<|im_end|>"]]


def test_template_without_end_of_turn_gets_the_eos():
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = tokenizer_of("chatml", template)
    assert render_response(tokenizer, "hello")[-1] == tokenizer.eos_id
    assert render_response(tokenizer, "hello").count(tokenizer.eos_id) == 1


def test_speed_of_short_prompts():
    """The limits leave room for a busy machine: an idle core does 20,000 a second, 9,000 through tensorflow-text."""
    for family, floor in {"chatml": 3000, "llama3": 3000, "llama2": 3000, "llama2_sp": 1000}.items():
        tokenizer = tokenizer_of(family)
        render_prompt(tokenizer, [user("warm up")])
        best = 0.0
        for _ in range(3):
            start = time.thread_time()
            for number in range(500):
                render_prompt(tokenizer, [user(f"Reverse the word number {number} of this list, please.")])
            best = max(best, 500 / (time.thread_time() - start))
        assert best > floor, f"{family}: {best:.0f} prompts a second of processor time"
