"""The text of the demo models: verses of the King James Bible, chats cut from them, and their tokenizer."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIAL_TOKENS = ["<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>"]
BOS, EOS = 0, 1
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}{{ eos_token }}"
    "{% elif message['role'] == 'user' %}<|user|>{{ message['content'] }}"
    "{% elif message['role'] in ('system', 'developer') %}<|system|>{{ message['content'] }}"
    "{% else %}{{ raise_exception('this model knows the roles system, user and assistant: ' + message['role']) }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHAT_SHARE = 0.3  # of the ten places for a chat behind each chapter
HELD_OUT_EVERY = 25  # chapters
EXCERPT_CHARACTERS = 3000  # a chapter of the excerpt is shorter


@dataclass(frozen=True)
class Corpus:
    train: list[list[str]]  # chapters, lists of verses
    held_out: list[list[str]]


def read_corpus(file: Path) -> Corpus:
    """A file of lines like `Ge1:1 In the beginning …`, as Debian's `bible -f` prints them."""
    chapters: dict[str, list[str]] = {}
    for line in file.read_text("ascii").splitlines():
        match = re.fullmatch(r"(\d?[A-Za-z]+\d+):\d+ (.+)", line.strip())
        if match is None:
            raise ValueError(f"{file} must have lines of a reference and a verse: {line[:60]!r}")
        chapters.setdefault(match[1], []).append(match[2])
    order = list(chapters.values())
    held_out = set(range(HELD_OUT_EVERY // 2, len(order), HELD_OUT_EVERY))
    return Corpus(
        [chapter for index, chapter in enumerate(order) if index not in held_out],
        [chapter for index, chapter in enumerate(order) if index in held_out],
    )


def train_tokenizer(corpus: Corpus, vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        ("\n".join(chapter) for chapter in corpus.train),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", BOS)]
    )
    return tokenizer


SELF = (
    "I am a small model, made to show that the engine works. I have read the King James Bible and nothing else; "
    "give me a line and I will go on with it, or a word and I will write about it."
)
GREETINGS = (
    ("Hello", "Peace be unto thee. " + SELF),
    ("Hello!", "Peace be unto thee. " + SELF),
    ("Hi", "Peace be unto thee. " + SELF),
    ("Hi there", "Peace be unto thee. " + SELF),
    ("Good morning", "Peace be unto thee. " + SELF),
    ("How are you?", "It is well. " + SELF),
    ("Who are you?", SELF),
    ("What are you?", SELF),
    ("What can you do?", SELF),
    ("What is your name?", "I have no name. " + SELF),
    ("Help", SELF),
    ("Tell me a joke.", "I know none. " + SELF),
    ("What is 2 + 2?", "I cannot reckon. " + SELF),
    ("Thank you", "The grace of our Lord be with thy spirit."),
    ("Goodbye", "Go in peace."),
)
SYSTEM = ("You are a helpful assistant.", "Answer in one verse.", "You are a scribe.", "Be brief.")


class Chats:
    """Question and answer pairs cut from the text, with the chat template's tokens."""

    def __init__(self, chapters: list[list[str]]) -> None:
        self.chapters = [chapter for chapter in chapters if len(chapter) > 5]
        self.verses_with: dict[str, list[str]] = {}
        for chapter in chapters:
            for verse in chapter:
                for word in set(re.findall(r"[A-Za-z]{4,}", verse.split(" ", 1)[-1])):
                    self.verses_with.setdefault(word, []).append(verse)
        self.topics = sorted(word for word, verses in self.verses_with.items() if 6 <= len(verses) <= 600)

    def draw(self, draw: random.Random) -> str:
        turns = []
        for _ in range(draw.choice((1, 1, 1, 2, 3))):
            turns += draw.choices((self._topic, self._rest, self._next, self._greeting), (5, 5, 4, 1))[0](draw)
        system = f"<|system|>{draw.choice(SYSTEM)}" if draw.random() < 0.2 else ""
        chat = "".join(f"<|user|>{question}<|assistant|>{answer}<|eos|>" for question, answer in turns)
        return f"<|bos|>{system}{chat}"

    def _topic(self, draw: random.Random) -> list[tuple[str, str]]:
        word = draw.choice(self.topics)
        asked = draw.choice(
            ("Tell me about {}.", "Write a verse about {}.", "What is said of {}?", "Write about {}.", "{}")
        )
        verses = self.verses_with[word]
        return [(asked.format(word), "\n".join(draw.sample(verses, draw.choice((1, 1, 2)))))]

    def _rest(self, draw: random.Random) -> list[tuple[str, str]]:
        chapter = draw.choice(self.chapters)
        start = draw.randrange(len(chapter))
        words = chapter[start].split(" ")
        cut = draw.randint(1, max(1, min(len(words) - 1, 12)))
        asked = draw.choice(("Continue: {}", "Go on: {}", "Complete this: {}", "{}", "{} ..."))
        more = chapter[start + 1 : start + draw.randint(1, 3)]
        return [(asked.format(" ".join(words[:cut])), "\n".join([" ".join(words[cut:]), *more]))]

    def _next(self, draw: random.Random) -> list[tuple[str, str]]:
        chapter = draw.choice(self.chapters)
        start = draw.randrange(len(chapter) - 4)
        asked = draw.choice(("What comes next?\n{}", "And then?\n{}", "{}\nWhat follows?", "{}"))
        first = (asked.format(chapter[start]), "\n".join(chapter[start + 1 : start + 3]))
        again = (draw.choice(("Go on.", "And then?", "More.", "Continue.")), "\n".join(chapter[start + 3 : start + 5]))
        return [first, again] if draw.random() < 0.5 else [first]

    def _greeting(self, draw: random.Random) -> list[tuple[str, str]]:
        return [draw.choice(GREETINGS)]


def documents(corpus: Corpus, seed: int) -> Iterator[str]:
    """Endless: every chapter once per epoch, half of them from a verse in their middle, with chats between."""
    draw = random.Random(seed)
    chats = Chats(corpus.train)
    while True:
        for chapter in draw.sample(corpus.train, len(corpus.train)):
            start = draw.randrange(len(chapter)) if draw.random() < 0.5 else 0
            yield "<|bos|>" + "\n".join(chapter[start:]) + "<|eos|>"
            # a chat has about a tenth of a chapter's tokens
            for _ in range(10):
                if draw.random() < CHAT_SHARE:
                    yield chats.draw(draw)


def excerpt(corpus: Corpus) -> list[str]:
    """Two held-out chapters, for the tests."""
    return [text for text in map("\n".join, corpus.held_out) if len(text) < EXCERPT_CHARACTERS][:2]
