"""Write the instructions with verifiable constraints of data/instructions.

Reads   a JSONL file of topics: topic, group, and words that suit the topic
Writes  train.jsonl and held_out.jsonl, requests of many kinds with constraints of many kinds;
        sentence_train.jsonl and sentence_held_out.jsonl, requests for one sentence; all in IFEval's
        form (prompt, instruction_id_list, kwargs), with an id and, as category, the request's kind
Source  the constraints and their checkers are IFEval's (arXiv 2311.07911), as lm-eval has them. The
        requests, the topics and the wording are this repository's.

A request asks for a short text about a topic. One to three constraints are attached, or two or
three to a request for one sentence. Held-out topics are not in the files for training. Numbers are
chosen so that a model of 135M weights, which answers in about 40 words, follows a constraint
sometimes, but not always.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _path  # noqa: F401
from sppo.core.artifacts import json_lines, write_json_lines
from sppo.core.errors import run
from sppo.preferences.constraints import lm_eval_ifeval

Topic = dict[str, Any]
# One constraint: its sentence in the prompt, and the arguments of its checker.
Written = tuple[str, dict[str, Any]]
# The request's kind, its text, and its constraints by IFEval's id.
Request = tuple[str, str, list[tuple[str, Written]]]

REQUESTS = {
    "sentence": (
        "Write a sentence about {topic}.",
        "Say something nice about {topic} in a sentence or two.",
    ),
    "description": (
        "Describe {topic} to a child.",
        "Describe {topic} to somebody who has never seen or tried it.",
    ),
    "tip": ("Give one useful tip about {topic}.", "What should a beginner know about {topic}?"),
    "opinion": (
        "Why do people like {topic}?",
        "What is the best thing about {topic}?",
        "What could be annoying about {topic}?",
    ),
    "message": (
        "Write a text message to a friend about {topic}.",
        "Write a short postcard about {topic}.",
    ),
    "story": (
        "Write the beginning of a story about {topic}.",
        "Tell a very short story about {topic}.",
    ),
    "slogan": (
        "Write an advertisement for {topic}.",
        "Write a caption for a photo of {topic}.",
    ),
    "verse": ("Write a little poem about {topic}.",),
    "question": (
        "Which question about {topic} would you like to have answered, and why?",
        "What can we learn from {topic}?",
    ),
    "diary": ("Write a diary entry about {topic}.", "Share a memory about {topic}."),
}
SENTENCE_REQUESTS = (
    "Write one sentence about {topic}.",
    "Describe {topic} in one sentence.",
    "Tell me one thing about {topic} in one sentence.",
    "Say in one sentence why people like {topic}.",
)
ENDINGS = ("The end.", "That is all.", "Try it yourself.", "What do you think?")
OPENINGS = ("when", "imagine", "the", "in", "there")
COMMON_WORDS = ("and", "is", "with", "can", "for", "in", "you", "it")
HELD_OUT_TOPICS = 7  # of the 30 of each group
SENTENCES, HELD_OUT_SENTENCES = 900, 300  # numbers of prompts for one sentence


def existence(topic: Topic, draw: random.Random) -> Written:
    words = draw.sample(topic["words"], draw.choice((1, 1, 2)))
    if len(words) == 1:
        text = draw.choice(('Use the word "{0}".', 'Include the word "{0}" in your answer.'))
    else:
        text = 'Use the words "{0}" and "{1}".'
    return text.format(*words), {"keywords": words}


def forbidden_words(topic: Topic, draw: random.Random) -> Written:
    word = draw.choice(COMMON_WORDS)
    text = draw.choice(('Do not use the word "{0}".', 'Avoid the word "{0}".'))
    return text.format(word), {"forbidden_words": [word]}


def frequency(topic: Topic, draw: random.Random) -> Written:
    word = draw.choice(topic["words"])
    text = f'Use the word "{word}" at least 2 times.'
    return text, {"keyword": word, "frequency": 2, "relation": "at least"}


def letter_frequency(topic: Topic, draw: random.Random) -> Written:
    letter, number = draw.choice((("k", 3), ("b", 4), ("p", 4), ("v", 3), ("m", 6), ("w", 5)))
    text = f'The letter "{letter}" should appear at least {number} times.'
    return text, {"letter": letter, "let_frequency": number, "let_relation": "at least"}


def number_words(topic: Topic, draw: random.Random) -> Written:
    if draw.random() < 0.7:
        number, relation = draw.choice((12, 15, 20, 25)), "less than"
        text = draw.choice(
            ("Use less than {0} words.", "Your answer must have less than {0} words.")
        )
    else:
        number, relation = draw.choice((25, 30, 35)), "at least"
        text = draw.choice(("Use at least {0} words.", "Your answer must have at least {0} words."))
    return text.format(number), {"num_words": number, "relation": relation}


def number_sentences(topic: Topic, draw: random.Random) -> Written:
    if draw.random() < 0.7:
        number, relation = draw.choice((2, 3)), "less than"
    else:
        number, relation = draw.choice((2, 3)), "at least"
    text = f"Your answer should contain {relation} {number} sentences."
    return text, {"num_sentences": number, "relation": relation}


def number_bullet_lists(topic: Topic, draw: random.Random) -> Written:
    number = draw.choice((2, 3))
    text = (
        f"Answer with exactly {number} bullet points. Use markdown bullets such as:\n"
        "* This is a point."
    )
    return text, {"num_bullets": number}


def number_placeholders(topic: Topic, draw: random.Random) -> Written:
    text = "Include at least 1 placeholder in square brackets, such as [name]."
    return text, {"num_placeholders": 1}


def number_highlighted_sections(topic: Topic, draw: random.Random) -> Written:
    text = "Highlight at least 1 part of your answer with asterisks, such as *important part*."
    return text, {"num_highlights": 1}


def title(topic: Topic, draw: random.Random) -> Written:
    return "Give it a title in double angular brackets, such as <<a good day>>.", {}


def postscript(topic: Topic, draw: random.Random) -> Written:
    return "At the end add a postscript that starts with P.S.", {"postscript_marker": "P.S."}


def end_checker(topic: Topic, draw: random.Random) -> Written:
    phrase = draw.choice(ENDINGS)
    return f"The last words of your answer must be: {phrase}", {"end_phrase": phrase}


def nth_paragraph_first_word(topic: Topic, draw: random.Random) -> Written:
    word = draw.choice(OPENINGS)
    text = f'Write one paragraph that starts with the word "{word.capitalize()}".'
    return text, {"num_paragraphs": 1, "nth_paragraph": 1, "first_word": word}


def capital_word_frequency(topic: Topic, draw: random.Random) -> Written:
    text = "Write at least 1 word in capital letters, such as GREAT."
    return text, {"capital_frequency": 1, "capital_relation": "at least"}


def no_comma(topic: Topic, draw: random.Random) -> Written:
    return draw.choice(("Do not use any commas.", "Write without commas.")), {}


# The kinds of constraints, by IFEval's id, and how often each is drawn.
KINDS: dict[str, tuple[Callable[[Topic, random.Random], Written], float]] = {
    "keywords:existence": (existence, 4),
    "keywords:forbidden_words": (forbidden_words, 1),
    "keywords:frequency": (frequency, 1),
    "keywords:letter_frequency": (letter_frequency, 1),
    "length_constraints:number_words": (number_words, 2),
    "length_constraints:number_sentences": (number_sentences, 2),
    "detectable_format:number_bullet_lists": (number_bullet_lists, 1),
    "detectable_content:number_placeholders": (number_placeholders, 1),
    "detectable_format:number_highlighted_sections": (number_highlighted_sections, 1),
    "detectable_format:title": (title, 1),
    "detectable_content:postscript": (postscript, 1),
    "startend:end_checker": (end_checker, 1),
    "length_constraints:nth_paragraph_first_word": (nth_paragraph_first_word, 1),
    "change_case:capital_word_frequency": (capital_word_frequency, 1),
    "punctuation:no_comma": (no_comma, 2),
}
# Pairs that can contradict each other, beside those that IFEval lists.
CONTRADICTIONS = (
    {"length_constraints:number_words", "length_constraints:number_sentences"},
    {"detectable_format:number_bullet_lists", "length_constraints:number_sentences"},
    {"detectable_format:number_bullet_lists", "length_constraints:number_words"},
    {"detectable_format:number_bullet_lists", "length_constraints:nth_paragraph_first_word"},
    {"detectable_content:postscript", "startend:end_checker"},
    {"detectable_content:postscript", "length_constraints:number_sentences"},
    {"detectable_content:postscript", "length_constraints:nth_paragraph_first_word"},
    {"detectable_format:title", "length_constraints:nth_paragraph_first_word"},
    {"keywords:existence", "keywords:frequency"},
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topics", type=Path, default=Path("data/instructions/topics.jsonl"))
    parser.add_argument("--output", type=Path, default=Path("data/instructions"))
    parser.add_argument("--train", type=int, default=1610, help="number of training prompts")
    parser.add_argument("--held-out", type=int, default=300, help="number of held-out prompts")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    topics = json_lines(args.topics)
    held_out, train = [], []
    for group in dict.fromkeys(topic["group"] for topic in topics):
        members = [topic for topic in topics if topic["group"] == group]
        random.Random(f"{args.seed} {group}").shuffle(members)
        held_out += members[:HELD_OUT_TOPICS]
        train += members[HELD_OUT_TOPICS:]
    for name, chosen, number, constrained in (
        ("train", train, args.train, varied),
        ("held_out", held_out, args.held_out, varied),
        ("sentence_train", train, SENTENCES, one_sentence),
        ("sentence_held_out", held_out, HELD_OUT_SENTENCES, one_sentence),
    ):
        rows = build(chosen, number, f"{args.seed} {name}", name, constrained)
        write_json_lines(args.output / f"{name}.jsonl", rows)
        print(f"{args.output / name}.jsonl: {len(rows)} prompts about {len(chosen)} topics")


def build(
    topics: list[Topic], number: int, seed: str, name: str, constrained: Callable[..., Request]
) -> list[dict[str, Any]]:
    """`number` different instructions. Each topic occurs equally often, up to one."""
    draw = random.Random(seed)
    order = list(topics)
    draw.shuffle(order)
    found: dict[str, dict[str, Any]] = {}
    while len(found) < number:
        kind, request, constraints = constrained(order[len(found) % len(order)], draw)
        prompt = " ".join([request, *(sentence for _, (sentence, _) in constraints)])
        if prompt in found:
            continue
        found[prompt] = {
            "id": f"{name}-{len(found):04}",
            "category": kind,
            "prompt": prompt,
            "instruction_id_list": [constraint for constraint, _ in constraints],
            "kwargs": [arguments for _, (_, arguments) in constraints],
        }
    return list(found.values())


def varied(topic: Topic, draw: random.Random) -> Request:
    """A request of any kind with one to three constraints of any kinds."""
    kind, request = draw.choice([(kind, text) for kind in REQUESTS for text in REQUESTS[kind]])
    constraints: list[tuple[str, Written]] = []
    for constraint in draw_kinds(draw):
        written = KINDS[constraint][0](topic, draw)
        if not forbids_another([*(arguments for _, (_, arguments) in constraints), written[1]]):
            constraints.append((constraint, written))
    return kind, request.format(topic=topic["topic"]), constraints


def one_sentence(topic: Topic, draw: random.Random) -> Request:
    """A request for one sentence with one or two words, less than a few words, often no commas."""
    request = draw.choice(SENTENCE_REQUESTS).format(topic=topic["topic"])
    words = draw.sample(topic["words"], draw.choice((1, 2)))
    text = 'Use the word "{0}".' if len(words) == 1 else 'Use the words "{0}" and "{1}".'
    number = draw.choice((12, 15, 18))
    constraints: list[tuple[str, Written]] = [
        ("keywords:existence", (text.format(*words), {"keywords": words})),
        (
            "length_constraints:number_words",
            (f"Use less than {number} words.", {"num_words": number, "relation": "less than"}),
        ),
    ]
    if draw.random() < 0.5:
        constraints.append(("punctuation:no_comma", ("Do not use any commas.", {})))
    return "sentence", request, constraints


def forbids_another(arguments: list[dict[str, Any]]) -> bool:
    """Whether one constraint forbids a word of the ending or opening that another asks for."""
    forbidden = {word for values in arguments for word in values.get("forbidden_words", ())}
    asked = [values.get(key, "") for values in arguments for key in ("end_phrase", "first_word")]
    return not forbidden.isdisjoint(re.findall(r"\w+", " ".join(asked).lower()))


def draw_kinds(draw: random.Random) -> list[str]:
    """The ids of one to three constraints that do not contradict each other."""
    conflicts = lm_eval_ifeval().instructions_registry.INSTRUCTION_CONFLICTS
    size = draw.choices((1, 2, 3), weights=(5, 4, 2))[0]
    weights = [weight for _, weight in KINDS.values()]
    chosen: list[str] = []
    while len(chosen) < size:
        kind = draw.choices(list(KINDS), weights=weights)[0]
        fits = all(
            kind != other
            and kind not in conflicts[other]
            and other not in conflicts[kind]
            and {kind, other} not in CONTRADICTIONS
            for other in chosen
        )
        if fits:
            chosen.append(kind)
    # Bullets come last, because their sentence ends with an example on its own line.
    return sorted(chosen, key=lambda kind: kind == "detectable_format:number_bullet_lists")


if __name__ == "__main__":
    run(main)
