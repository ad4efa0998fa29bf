"""Constraints on a response that IFEval's checkers decide: what they ask for in words, and how a text is mended.

A kind of constraint has the name and the arguments of its checker (``evals.ifeval``), so the exact grade of a response
is the share of its constraints that the checkers find met.
"""

import itertools
import random
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Arguments = Mapping[str, Any]

ENDINGS = (
    "That is all I have to say.", "I hope this helps!", "Ask me again any time.", "What do you think?",
    "Have a nice day!", "There is nothing more to add.",
)  # fmt: skip
WORDS = ("time", "water", "light", "home", "green", "quiet", "morning", "careful", "friend", "small", "world", "warm")
AVOIDED = ("very", "but", "can", "will", "when", "like", "also", "most", "because", "which")
LANGUAGES = {"es": "Spanish", "fr": "French", "de": "German"}
OPENINGS = ("First", "Today", "Imagine", "Well", "Perhaps", "Listen")


class Kind(NamedTuple):
    """A kind of constraint.

    Attributes:
      checker: the name of the checker.
      group: a prompt has at most one constraint of a group; those of one group contradict each other.
      draw: (rng, request) -> the checker's arguments.
      say: arguments -> how a prompt asks for it.
      mend: (text, arguments) -> the text, changed as little as needed so that it meets the constraint. (A text in
        another language than asked for stays as it is: no program translates it.)
    """

    checker: str
    group: str
    draw: Callable[[random.Random, str], Arguments]
    say: Callable[[Arguments], str]
    mend: Callable[[str, Arguments], str]


def _nothing(_: random.Random, __: str) -> Arguments:
    return {}


def _count(number: int, noun: str) -> str:
    return f"{('one', 'two', 'three')[number - 1]} {noun}{'s' * (number > 1)}"


def _sentences(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"(?<=[.!?])\s+", text.strip()) if part.strip()] or [""]


def _in_parts(text: str, number: int) -> list[str]:
    """The text in ``number`` parts of about as many sentences each, or of words if it has fewer sentences."""
    pieces = _sentences(text) if len(_sentences(text)) >= number else text.split()
    pieces += ["and so on"] * (number - len(pieces))
    bounds = [round(i * len(pieces) / number) for i in range(number + 1)]
    return [" ".join(pieces[a:b]) for a, b in itertools.pairwise(bounds)]


def _plain(text: str) -> str:
    """The text as one paragraph, without marks of lists, headings and emphasis."""
    text = re.sub(r"^\s*(?:[-*#]+|\d+[.)])\s*", "", text, flags=re.MULTILINE)
    return re.sub(r"\s+", " ", text.replace("*", "")).strip()


def _bullets(text: str, a: Arguments) -> str:
    return "\n".join(f"* {part}" for part in _in_parts(_plain(text), a["num_bullets"]))


def _paragraphs(text: str, a: Arguments) -> str:
    return "\n***\n".join(_in_parts(_plain(text), a["num_paragraphs"]))


def _sections(text: str, a: Arguments) -> str:
    parts = _in_parts(_plain(text), a["num_sections"])
    return "\n".join(f"{a['section_spliter']} {i}\n{part}" for i, part in enumerate(parts, 1))


def _opened(text: str, a: Arguments) -> str:
    rest = _plain(text)
    return f"{a['first_word']} {rest}" if rest.split(" ")[0].strip(".,!?").lower() != a["first_word"].lower() else rest


def _shortened(text: str, a: Arguments) -> str:
    """The first sentences that fit, else the first words; other constraints may add some more."""
    most, kept = a["num_words"] * 3 // 5, ""
    for sentence in _sentences(_plain(text)):
        longer = f"{kept} {sentence}".strip()
        if len(re.findall(r"\w+", longer)) > most:
            break
        kept = longer
    return kept or " ".join(_plain(text).split()[:most]).rstrip(".,;:") + "."


def _with_words(text: str, a: Arguments) -> str:
    missing = [word for word in a["keywords"] if not re.search(word, text, flags=re.IGNORECASE)]
    return f"{text} Think of {' and '.join(missing)}." if missing else text


def _without_words(text: str, a: Arguments) -> str:
    for word in a["forbidden_words"]:
        text = re.sub(rf"\b{word}\b\s?", "", text, flags=re.IGNORECASE)
    return text


def _highlighted(text: str, a: Arguments) -> str:
    words = text.split()
    places = [round((i + 1) * len(words) / (a["num_highlights"] + 1)) for i in range(a["num_highlights"])]
    for place in places:
        if place < len(words):
            words[place] = f"*{words[place].strip('*')}*"
    return " ".join(words)


def _with_placeholders(text: str, a: Arguments) -> str:
    missing = a["num_placeholders"] - len(re.findall(r"\[.*?\]", text))
    return f"{text} Contact: {' '.join(('[name]', '[date]', '[place]')[:missing])}." if missing > 0 else text


# In the order in which a text is mended: a later change keeps what an earlier one did.
KINDS: Mapping[str, Kind] = {
    "few words": Kind(
        "length_constraints:number_words",
        "length",
        lambda rng, _: {"relation": "less than", "num_words": rng.choice((20, 25, 30, 40))},
        lambda a: f"Use less than {a['num_words']} words.",
        _shortened,
    ),
    "avoided words": Kind(
        "keywords:forbidden_words",
        "words",
        lambda rng, _: {"forbidden_words": rng.sample(AVOIDED, 2)},
        lambda a: f"Do not use the words {' and '.join(a['forbidden_words'])}.",
        _without_words,
    ),
    "given words": Kind(
        "keywords:existence",
        "words",
        lambda rng, _: {"keywords": rng.sample(WORDS, 2)},
        lambda a: f"Use the words {' and '.join(a['keywords'])}.",
        _with_words,
    ),
    "bullets": Kind(
        "detectable_format:number_bullet_lists",
        "form",
        lambda rng, _: {"num_bullets": rng.choice((2, 3, 4))},
        lambda a: f"Answer with exactly {a['num_bullets']} bullet points that begin with * and nothing else.",
        _bullets,
    ),
    "paragraphs": Kind(
        "length_constraints:number_paragraphs",
        "form",
        lambda rng, _: {"num_paragraphs": rng.choice((2, 3))},
        lambda a: f"Write {a['num_paragraphs']} paragraphs and put *** between them.",
        _paragraphs,
    ),
    "sections": Kind(
        "detectable_format:multiple_sections",
        "form",
        lambda rng, _: {"section_spliter": rng.choice(("Section", "Part")), "num_sections": 2},
        lambda a: f"Write {a['num_sections']} sections. Begin each with {a['section_spliter']} and its number.",
        _sections,
    ),
    "first word": Kind(
        "length_constraints:nth_paragraph_first_word",
        "start",
        lambda rng, _: {"num_paragraphs": 1, "nth_paragraph": 1, "first_word": rng.choice(OPENINGS)},
        lambda a: f"Write one paragraph that begins with the word {a['first_word']}.",
        _opened,
    ),
    "highlights": Kind(
        "detectable_format:number_highlighted_sections",
        "form",
        lambda rng, _: {"num_highlights": rng.choice((1, 2))},
        lambda a: f"Put at least {_count(a['num_highlights'], 'word')} between asterisks like *this*.",
        _highlighted,
    ),
    "placeholders": Kind(
        "detectable_content:number_placeholders",
        "content",
        lambda rng, _: {"num_placeholders": rng.choice((1, 2))},
        lambda a: f"Use at least {_count(a['num_placeholders'], 'placeholder')} in square brackets such as [name].",
        _with_placeholders,
    ),
    "title": Kind(
        "detectable_format:title",
        "start",
        _nothing,
        lambda a: "Give your answer a title in double angular brackets such as <<my title>>.",
        lambda text, a: f"<<My answer>>\n{text}",
    ),
    "repeat": Kind(
        "combination:repeat_prompt",
        "start",
        lambda _, request: {"prompt_to_repeat": request},
        lambda a: "First repeat my request word for word. Then answer it.",
        lambda text, a: f"{a['prompt_to_repeat']}\n{text}",
    ),
    "postscript": Kind(
        "detectable_content:postscript",
        "end",
        lambda *_: {"postscript_marker": "P.S."},
        lambda a: "At the end add a postscript that begins with P.S.",
        lambda text, a: f"{text}\nP.S. Take care.",
    ),
    "ending": Kind(
        "startend:end_checker",
        "end",
        lambda rng, _: {"end_phrase": rng.choice(ENDINGS)},
        lambda a: f"End your answer with this exact phrase: {a['end_phrase']}",
        lambda text, a: f"{text} {a['end_phrase']}",
    ),
    "no commas": Kind(
        "punctuation:no_comma",
        "punctuation",
        _nothing,
        lambda a: "Do not use any commas.",
        lambda text, a: text.replace(",", ""),
    ),
    "small letters": Kind(
        "change_case:english_lowercase",
        "case",
        _nothing,
        lambda a: "Write in English and only in small letters.",
        lambda text, a: text.lower(),
    ),
    "capital letters": Kind(
        "change_case:english_capital",
        "case",
        _nothing,
        lambda a: "Write in English and only in capital letters.",
        lambda text, a: text.upper(),
    ),
    "language": Kind(
        "language:response_language",
        "case",
        lambda rng, _: {"language": rng.choice(tuple(LANGUAGES))},
        lambda a: f"Answer in {LANGUAGES[a['language']]} only.",
        lambda text, a: text,
    ),
    "quotation": Kind(
        "startend:quotation",
        "around",
        _nothing,
        lambda a: "Put double quotation marks around your whole answer.",
        lambda text, a: '"' + text.strip('"') + '"',
    ),
}

# Pairs of different groups that cannot both be met, or that say nothing together.
CLASHES = {
    "first word": ("bullets", "paragraphs", "sections", "quotation"),
    "few words": ("bullets", "sections", "paragraphs"),
    "repeat": ("avoided words", "quotation", "bullets", "language"),
    "sections": ("small letters", "capital letters"),  # the checker wants "Section" and "Part" as they are written
    "bullets": ("quotation",),
}


def fit(kinds: tuple[str, ...]) -> bool:
    """Whether one response can meet constraints of all these kinds."""
    groups = [KINDS[kind].group for kind in kinds]
    clashes = any(other in kinds for kind in kinds for other in CLASHES.get(kind, ()))
    return len(set(groups)) == len(groups) and not clashes
