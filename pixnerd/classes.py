"""The names of a model's classes: "golden retriever" for label 207, from label to name and back."""

import difflib
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .errors import InputError

MOST_NAMED = 6  # classes that a sentence lists


@dataclass(frozen=True)
class ClassNames:
    """What each label means. Labels are 0 … len(names) − 1."""

    names: Sequence[str]
    """as the data set has them; ImageNet's are WordNet ids"""
    words: Sequence[str]
    """as people call them; mostly the same"""

    def __len__(self) -> int:
        return len(self.names)

    def title(self, label: int) -> str:
        """A label for people, no two alike: "golden retriever (207)", or "7" where the name is the number."""
        word = self.words[label].encode(errors="backslashreplace").decode()  # a folder's name need not be UTF-8
        return word if word == str(label) else f"{word} ({label})"

    def label(self, asked: str) -> int:
        """The label that a number or a name stands for, where a whole number is always the label itself.

        A name is one of `names` or `words`, upper and lower case alike unless that leaves two. The label may also be
        len(self), which means no label.

        Raises:
            InputError: no class has that name, or several have; or the number is beyond the labels.
        """
        found = self._called(asked)
        if re.fullmatch(r"-?[0-9]{1,18}", asked):
            return self._numbered(int(asked), found)
        found = found or self._called(asked, str.casefold)
        if len(found) > 1:
            raise InputError(f"class {asked!r} is ambiguous ({self._list(found)}): give its number")
        if not found:
            raise InputError(f"class {asked!r} is unknown; {self._nearest(asked)}")
        return found[0]

    def _numbered(self, number: int, called: list[int]) -> int:
        """`number` as a label, where the classes `called` have that number for a name."""
        if not 0 <= number <= len(self):
            hint = f"; the class of that name is label {called[0]}" if called else ""
            raise InputError(f"label {number} is outside 0 … {len(self)} ({len(self)} itself means no label){hint}")
        if called and number not in called:
            warnings.warn(f"{number} is taken as a label; the class of that name is label {called[0]}", stacklevel=2)
        return number

    def _called(self, asked: str, form: Callable[[str], str] = str) -> list[int]:
        """The labels of the classes with that name, compared in a form."""
        pairs = enumerate(zip(self.names, self.words, strict=True))
        return [label for label, both in pairs if form(asked) in map(form, both)]

    def _nearest(self, asked: str) -> str:
        """Which classes may have been meant, as the end of a sentence."""
        if all(word == str(label) for label, word in enumerate(self.words)):
            return f"these classes have no names: give a number, 0 … {len(self) - 1}"
        folded = [word.casefold() for word in self.words]
        near = [word for word in folded if asked and asked.casefold() in word]
        near += difflib.get_close_matches(asked.casefold(), folded, MOST_NAMED)  # the nearest first
        found = [label for one in dict.fromkeys(near) for label, word in enumerate(folded) if word == one]
        if found:
            return f"near it: {self._list(found)}"
        return f"there are {self._list(range(len(self)))}"

    def _list(self, labels: Sequence[int]) -> str:
        named = []
        for label in labels[:MOST_NAMED]:
            name, word = self.names[label], self.words[label]
            named.append(f"{self.title(label)}{f', {name}' * (name not in (word, str(label)))}")
        return f"{'; '.join(named)}{'; …' * (len(labels) > MOST_NAMED)}"


def numbered(count: int) -> ClassNames:
    """Classes of which nothing but the number is known."""
    names = [str(label) for label in range(count)]
    return ClassNames(names, names)
