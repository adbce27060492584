"""Emoji scenes, whose truth is known, so that what is right in captions and reconstructions can be counted.

A scene is a background colour and one to three objects of different kinds in a 3x3 grid. This module draws a scene,
writes a caption for it, reads a caption back, and splits scenes by their specification: a specification that was seen
in training is never in the test set, and some pairs of kinds are in the test set only.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from vlv.io.images import Pixels

Split = Literal["train", "validation", "test"]

# Kind -> file name (code point) of its Twemoji sprite.
KINDS: dict[str, str] = {
    "apple": "1f34e", "banana": "1f34c", "dog": "1f436", "cat": "1f431", "car": "1f697", "bus": "1f68c",
    "bicycle": "1f6b2", "rocket": "1f680", "tulip": "1f337", "sunflower": "1f33b", "cactus": "1f335",
    "pine tree": "1f332", "strawberry": "1f353", "watermelon": "1f349", "grapes": "1f347", "lemon": "1f34b",
    "carrot": "1f955", "mushroom": "1f344", "hamburger": "1f354", "pizza": "1f355", "doughnut": "1f369",
    "frog": "1f438", "pig": "1f437", "panda": "1f43c",
}  # fmt: skip
NAMES = list(KINDS)
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245), "light blue": (150, 205, 245), "dark blue": (25, 40, 110),
    "green": (95, 185, 95), "yellow": (250, 225, 110), "pink": (250, 170, 200), "gray": (125, 125, 130),
    "purple": (125, 70, 165),
}  # fmt: skip
COLOURS = list(BACKGROUNDS)
PLACES = [
    "top left", "top center", "top right", "middle left", "center", "middle right",
    "bottom left", "bottom center", "bottom right",
]  # fmt: skip

SIZE = 64  # pixels, both sides
_SPRITE_SIZES = (22, 24, 26)
_CENTRES = (12, 32, 52)
_MAX_OBJECTS = 3


@dataclass(frozen=True)
class Scene:
    """What a scene shows. `background` indexes `COLOURS`; `objects` are (place, kind), sorted by place.

    A scene read from a caption or a picture may hold -1 for a word that names no known place or kind.
    """

    background: int
    objects: tuple[tuple[int, int], ...]

    def to_json(self) -> dict[str, Any]:
        """Names instead of indices, for the sample's metadata."""
        return {
            "background": COLOURS[self.background],
            "objects": [{"place": PLACES[place], "kind": NAMES[kind]} for place, kind in self.objects],
        }

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Scene":
        """Inverse of `to_json`."""
        objects = tuple((PLACES.index(o["place"]), NAMES.index(o["kind"])) for o in value["objects"])
        return Scene(COLOURS.index(value["background"]), objects)


def _bucket(text: str, buckets: int) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") % buckets


def has_held_out_pair(scene: Scene) -> bool:
    """Whether two of its kinds form one of the pairs (about 1 in 16) that only the test set shows."""
    kinds = sorted(kind for _, kind in scene.objects)
    return any(_bucket(f"pair {NAMES[a]} {NAMES[b]}", 16) == 0 for i, a in enumerate(kinds) for b in kinds[i + 1 :])


def split_of(scene: Scene) -> Split:
    """The split a specification belongs to, by its hash: 2 % validation, 10 % and held-out pairs test."""
    if has_held_out_pair(scene):
        return "test"
    bucket = _bucket(f"scene {scene.background} {scene.objects}", 50)
    return "test" if bucket < 5 else "validation" if bucket == 5 else "train"


def draw_specification(rng: np.random.Generator, max_objects: int = _MAX_OBJECTS) -> Scene:
    """A random specification of any split; one object is half as likely as two or three.

    There are only 1,728 specifications with one object, and without this they would repeat too often.
    """
    weights = np.array([1.0, 2.0, 2.0])[:max_objects]
    count = 1 + int(rng.choice(max_objects, p=weights / weights.sum()))
    places = np.sort(rng.choice(len(PLACES), count, replace=False))
    kinds = rng.choice(len(NAMES), count, replace=False)
    objects = tuple((int(place), int(kind)) for place, kind in zip(places, kinds, strict=True))
    return Scene(int(rng.integers(len(COLOURS))), objects)


def specifications(
    split: Split, rng: np.random.Generator, max_objects: int = _MAX_OBJECTS, unique: bool = False
) -> Iterator[Scene]:
    """Endless specifications of one split; `unique` never repeats one (and so can run dry: ask for few)."""
    seen: set[Scene] = set()
    while True:
        scene = draw_specification(rng, max_objects)
        if split_of(scene) != split or scene in seen:
            continue
        if unique:
            seen.add(scene)
        yield scene


class Painter:
    """Draws scenes from sprites. All arithmetic is on integers: equal on every machine.

    Args:
        sprites: folder with Twemoji's 72x72 PNG files, named by code point.
    """

    def __init__(self, sprites: Path) -> None:
        self._sprites: dict[tuple[int, int], Pixels] = {}
        for kind, code in enumerate(KINDS.values()):
            with Image.open(sprites / f"{code}.png") as opened:
                # "RGBa" is premultiplied alpha: without it, resizing bleeds the colour of transparent pixels.
                image = opened.convert("RGBA").convert("RGBa")
                for size in _SPRITE_SIZES:
                    resized = image.resize((size, size), Image.Resampling.LANCZOS)
                    data = np.frombuffer(resized.tobytes(), np.uint8)
                    self._sprites[kind, size] = data.reshape(size, size, 4)

    def draw(self, scene: Scene, rng: np.random.Generator) -> Pixels:
        """(64, 64, 3) uint8. Colour, sprite size and position vary a little with `rng`."""
        colour = np.clip(np.array(BACKGROUNDS[COLOURS[scene.background]]) + rng.integers(-5, 6, 3), 0, 255)
        canvas = np.broadcast_to(colour.astype(np.int32), (SIZE, SIZE, 3)).copy()
        for place, kind in scene.objects:
            size = _SPRITE_SIZES[int(rng.integers(len(_SPRITE_SIZES)))]
            top = _CENTRES[place // 3] - size // 2 + int(rng.integers(-1, 2))
            left = _CENTRES[place % 3] - size // 2 + int(rng.integers(-1, 2))
            top, left = (min(max(v, 0), SIZE - size) for v in (top, left))
            sprite = self._sprites[kind, size].astype(np.int32)
            region = canvas[top : top + size, left : left + size]
            region[...] = sprite[..., :3] + (region * (255 - sprite[..., 3:]) + 127) // 255
        return canvas.clip(0, 255).astype(np.uint8)


def _article(noun: str, capital: bool) -> str:
    article = "an" if noun[0] in "aeiou" else "a"
    return f"{article.capitalize() if capital else article} {noun}"


def _relation(place: int, other: int) -> str:
    """Where `place` lies, seen from `other`: "below and to the right of"."""
    (row, column), (other_row, other_column) = divmod(place, 3), divmod(other, 3)
    vertical = "below" if row > other_row else "above" if row < other_row else ""
    right, left = "to the right of", "to the left of"
    horizontal = right if column > other_column else left if column < other_column else ""
    return " and ".join(part for part in (vertical, horizontal) if part)


def _first_sentence(kind: str, place: str, form: int) -> str:
    return (
        f"{_article(kind, True)} is at the {place}.",
        f"There is {_article(kind, False)} at the {place}.",
        f"At the {place} is {_article(kind, False)}.",
    )[form % 3]


def _next_sentence(kind: str, place: str, relation: str, previous: str, inverse: str, form: int) -> str:
    return (
        f"{_article(kind, True)} is {relation} the {previous}, at the {place}.",
        f"At the {place}, {relation} the {previous}, is {_article(kind, False)}.",
        f"There is {_article(kind, False)} {relation} the {previous}, at the {place}.",
        f"The {previous} is {inverse} {_article(kind, False)} at the {place}.",
    )[form % 4]


def write_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption in one of many forms (the background first or last, several sentences for each object)."""
    colour = COLOURS[scene.background]
    background = (
        f"The background is {colour}.",
        f"The scene has {_article(colour, False)} background.",
        f"Everything is on {_article(colour, False)} background.",
    )[int(rng.integers(3))]
    sentences: list[str] = []
    for i, (place, kind) in enumerate(scene.objects):
        form = int(rng.integers(12))
        if i == 0:
            sentences.append(_first_sentence(NAMES[kind], PLACES[place], form))
        else:
            before, previous = scene.objects[i - 1]
            relation, inverse = _relation(place, before), _relation(before, place)
            sentences.append(_next_sentence(NAMES[kind], PLACES[place], relation, NAMES[previous], inverse, form))
    sentences.insert(0 if rng.integers(2) else len(sentences), background)
    return " ".join(sentences)


def _longest_first(words: list[str]) -> str:
    return "|".join(sorted(words, key=len, reverse=True))


_PLACE = re.compile(rf"\bat the ({_longest_first(PLACES)})\b")
_OBJECT = re.compile(rf"\ban? ({_longest_first(NAMES)})\b")
_BACKGROUND = re.compile(rf"\b({_longest_first(COLOURS)})\b")


def read_caption(text: str) -> Scene:
    """Read a caption back, whatever its form; also free text, where anything unreadable counts as wrong.

    A sentence about an object introduces it by "a" or "an" and places it by "at the". A sentence without a
    readable object yields kind -1 (a false object), one without a readable place yields place -1.
    """
    background, objects = -1, []
    for sentence in re.split(r"[.!?]", text.lower()):
        if not sentence.strip():
            continue
        if "background" in sentence:
            match = _BACKGROUND.search(sentence)
            background = COLOURS.index(match.group(1)) if match else -1
            continue
        kind, place = _OBJECT.search(sentence), _PLACE.search(sentence)
        objects.append((PLACES.index(place.group(1)) if place else -1, NAMES.index(kind.group(1)) if kind else -1))
    return Scene(background, tuple(sorted(objects)))


_GRAMMAR = (
    *("The", "A", "An", "At", "There", "Everything", "the", "a", "an", "at", "is", "has", "on", "to", "of"),
    *("scene", "background", "right", "left", "below", "above", "and", ",", "."),
)


def vocabulary() -> list[str]:
    """All words and signs a caption can hold, sorted."""
    words = set(_GRAMMAR)
    for phrase in (*NAMES, *COLOURS, *PLACES):
        words.update(phrase.split())
    return sorted(words)


def targets(scenes: list[Scene]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Class labels: backgrounds (N,) and cells (N, 9), where `len(NAMES)` means an empty cell."""
    cells = np.full((len(scenes), len(PLACES)), len(NAMES))
    for i, scene in enumerate(scenes):
        for place, kind in scene.objects:
            cells[i, place] = kind
    return np.array([scene.background for scene in scenes]), cells


def from_targets(background: int, cells: np.ndarray[Any, Any]) -> Scene:
    """Inverse of `targets` for one scene: `cells` (9,)."""
    return Scene(int(background), tuple((i, int(k)) for i, k in enumerate(cells) if k < len(NAMES)))
