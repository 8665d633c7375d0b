"""From a dataset's class numbers to a model's: the same list, the same names, the same WordNet ids, or an error.

Positions are compared first: ImageNet has two classes named "crane", and a casefolded search would send the dog
"Cardigan" to the garment. Names decide only where the order differs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

BACKGROUND = {"background", "__background__", "dummy"}
SYNSET = re.compile(r"n\d{8}$")
PLACEHOLDER = re.compile(r"(?:label|class|cls)?[ _-]?(\d+)$", re.IGNORECASE)  # LABEL_3, class 3, 3
AGREE = 0.9  # share of positions with a common name from which on two lists are the same classes in the same order


class LabelMap(NamedTuple):
    classes: list[int]  # dataset class -> model class
    note: str | None  # what was assumed, for the reader of the figures


class Name(NamedTuple):
    """One class: "n01484850 great white shark, white shark" -> its synset and its synonyms, first one first."""

    synset: str | None
    words: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Name:
        text = text.strip()
        head, _, rest = text.partition(" ")
        synset = head if SYNSET.match(head) else None
        rest = rest if synset else text
        return cls(synset, tuple(word.strip() for word in rest.split(",") if word.strip()))

    @property
    def text(self) -> str:
        return ", ".join(self.words)

    def same(self, other: Name) -> bool:
        """Whether two names standing at the same position mean the same class."""
        if self.synset and other.synset:
            return self.synset == other.synset
        mine = {_plain(word) for word in self.words}
        return not mine.isdisjoint(_plain(word) for word in other.words)


def label_map(dataset_names: Sequence[str] | None, model_labels: Sequence[str] | None) -> list[int]:
    """Dataset class number -> model class number; see `match`. Raises ValueError when there is no such map."""
    return match(dataset_names, model_labels).classes


def match(
    dataset_names: Sequence[str] | None, model_labels: Sequence[str] | None, num_classes: int | None = None
) -> LabelMap:
    """Match a dataset's classes with a model's, each dataset class to exactly one model class.

    dataset_names, model_labels: class names by number; None where there are none. num_classes: of the model, needed
    where model_labels is None. Raises ValueError with examples of both sides when it cannot be done: a wrong map would
    be reported as an accuracy near zero.
    """
    count = len(model_labels) if model_labels is not None else num_classes
    if count is None:
        raise ValueError("the model has neither class names nor a number of classes; accuracy cannot be measured.")
    if dataset_names is not None and model_labels is not None and list(dataset_names) == list(model_labels):
        return LabelMap(list(range(count)), None)
    theirs, ours = _usable(model_labels), _usable(dataset_names)
    numbers = _numbers(dataset_names) if ours is not None else None  # numbers, but not in order
    if numbers is not None and (theirs is None or _numbers(model_labels) is None):
        return _numbered(numbers, theirs, count)
    if ours is None or theirs is None:
        return _unnamed(dataset_names, ours, theirs, count)
    shift = 1 if _plain(theirs[0].text) in BACKGROUND and _plain(ours[0].text) not in BACKGROUND else 0
    note = "the model's class 0, background, is none of the dataset's: that answer is always wrong." if shift else None
    if len(ours) + shift == len(theirs):
        differing = [i for i, name in enumerate(ours) if not name.same(theirs[i + shift])]
        if len(differing) <= (1 - AGREE) * len(ours) and not _elsewhere(ours, theirs, differing):
            if differing:
                first = differing[0]
                named = f"{len(differing)} of {len(ours)} classes are named differently, e.g. {ours[first].text!r} and "
                note = " ".join(filter(None, [note, named + f"{theirs[first + shift].text!r}; the order is the same."]))
            return LabelMap([i + shift for i in range(len(ours))], note)
    return LabelMap(_by_name(ours, _with_synsets(theirs, shift)), note)


def _usable(names: Sequence[str] | None) -> list[Name] | None:
    """Parsed names; None where they say nothing, such as LABEL_0, LABEL_1, ... or 0, 1, 2, ... in order."""
    if not names or _numbers(names) == list(range(len(names))):
        return None
    return [Name.parse(str(name)) for name in names]


def _numbers(names: Sequence[str] | None) -> list[int] | None:
    """The numbers that all names consist of, if they do."""
    found = [PLACEHOLDER.match(str(name).strip()) for name in names or []]
    return [int(each[1]) for each in found if each] if found and all(found) else None


def _numbered(numbers: list[int], theirs: list[Name] | None, count: int) -> LabelMap:
    """Folders named 0, 1, 10, 2 (the order they are sorted in): their names are the model's class numbers."""
    background = theirs is not None and _plain(theirs[0].text) in BACKGROUND
    if len(set(numbers)) < len(numbers) or max(numbers) >= count or background:
        raise ValueError(
            f"the dataset names its classes by numbers from {min(numbers)} to {max(numbers)}, which are not those of "
            f"the model's {count} classes. {_examples([str(number) for number in numbers], theirs)}"
        )
    return LabelMap(numbers, "the dataset names its classes by numbers; they are taken as the model's.")


def _unnamed(
    dataset_names: Sequence[str] | None, ours: list[Name] | None, theirs: list[Name] | None, count: int
) -> LabelMap:
    """One side has no names: the numbers must be meant, and the counts must agree."""
    which = "the dataset" if ours is None else "the model"
    assumed = f"{which} does not name its classes; they are taken to be in the order of the other side."
    background = theirs is not None and _plain(theirs[0].text) in BACKGROUND
    if dataset_names is None:  # bare integers: not even their number is known
        if background:
            raise ValueError(
                "the dataset's labels are bare numbers and the model's class 0 is background: it is not known "
                "whether they count it. Use a dataset that names its classes."
            )
        return LabelMap(list(range(count)), "the dataset's labels are bare numbers; they are taken as the model's.")
    if len(dataset_names) == count:
        same = ours is None and theirs is None
        return LabelMap(list(range(count)), None if same else assumed)
    if background and len(dataset_names) + 1 == count:
        return LabelMap([i + 1 for i in range(len(dataset_names))], assumed + " The model's class 0 is background.")
    raise ValueError(
        f"the dataset has {len(dataset_names)} classes and the model {count}, and {which} does not name them: they "
        f"cannot be matched. {_examples(dataset_names, theirs)}"
    )


def _elsewhere(ours: list[Name], theirs: list[Name], differing: list[int]) -> bool:
    """Whether a class that differs at its own position has its exact name at another one: then the order differs."""
    texts = {name.text for name in theirs if name.text}
    return any(ours[i].text in texts for i in differing)


def _with_synsets(theirs: list[Name], shift: int) -> list[Name]:
    """The model's names with WordNet ids added where they are those of ImageNet-1k in its usual order."""
    if len(theirs) - shift != 1000 or any(name.synset for name in theirs):
        return theirs
    known = _imagenet()
    plain = theirs[shift:]
    if sum(name.same(other) for name, other in zip(plain, known, strict=True)) < AGREE * len(known):
        return theirs
    return theirs[:shift] + [Name(other.synset, name.words) for name, other in zip(plain, known, strict=True)]


def _imagenet() -> list[Name]:
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    described = info.label_descriptions(as_dict=True)
    return [Name.parse(f"{synset} {described[synset]}") for synset in info.label_names()]


def _by_name(ours: list[Name], theirs: list[Name]) -> list[int]:
    """Match by synset, then whole name, then a synonym; in the given spelling first, casefolded last."""
    if any(name.synset and not name.words for name in ours) and not any(name.synset for name in theirs):
        words = {name.synset: name.words for name in _imagenet()}
        ours = [Name(name.synset, name.words or words.get(name.synset, ())) for name in ours]
    found: list[int | None] = [None] * len(ours)
    keys = (
        lambda name: [name.synset] if name.synset else [],
        lambda name: [name.text],
        lambda name: list(name.words[:1]),
        lambda name: list(name.words),
        lambda name: [_plain(name.text)],
        lambda name: [_plain(word) for word in name.words[:1]],
        lambda name: [_plain(word) for word in name.words],
    )
    for key in keys:
        table: dict[str, set[int]] = {}
        for index, name in enumerate(theirs):
            for word in key(name):
                table.setdefault(word, set()).add(index)
        wanted: dict[int, list[int]] = {}
        for index, name in enumerate(ours):
            if found[index] is None:
                hits = set().union(*(table.get(word, set()) for word in key(name) if word))
                hits -= {other for other in found if other is not None}
                if len(hits) == 1:
                    wanted.setdefault(hits.pop(), []).append(index)
        for goal, claimants in wanted.items():
            if len(claimants) == 1:  # two classes of the dataset that claim one of the model are both left unmatched
                found[claimants[0]] = goal
    lost = [i for i, goal in enumerate(found) if goal is None]
    if lost:
        raise ValueError(
            f"{len(lost)} of the dataset's {len(ours)} classes have no counterpart among the model's {len(theirs)}, "
            f"e.g. {', '.join(repr(_show(ours[i])) for i in lost[:3])}. {_examples([_show(n) for n in ours], theirs)}"
        )
    return [goal for goal in found if goal is not None]


def _examples(dataset_names: Sequence[str], theirs: list[Name] | None) -> str:
    dataset = ", ".join(repr(str(name)) for name in dataset_names[:3])
    model = ", ".join(repr(_show(name)) for name in theirs[:3]) if theirs else "unnamed"
    return (
        f"The dataset's classes begin with {dataset}; the model's with {model}. Evaluate on a dataset of the model's "
        f"classes, choose its label column (--label-column), or leave evaluation out (--no-eval)."
    )


def _show(name: Name) -> str:
    return " ".join(filter(None, [name.synset, name.text]))


def _plain(word: str) -> str:
    """Casefolded, and with one kind of separator: "great_white-shark" -> "great white shark"."""
    return re.sub(r"[\s_-]+", " ", word).strip().casefold()
