"""The parser of all commands: its errors are ours, and short."""

import difflib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger

from ildistil.commands._classes import allow
from ildistil.commands._config import as_config, places
from ildistil.errors import ConfigError
from ildistil.mappings import LayerMapping
from ildistil.objectives import Objective
from ildistil.schedules import Schedule
from ildistil.students.sources import ModelSource

__all__ = ["Parser", "call", "own_errors", "suggestion", "with_flags"]

# Lines of jsonargparse's messages that list types which were tried, or repeat a value as it holds it.
_NOISE = re.compile(
    r"(Parser key \"[^\"]+\":)?\s*(- )?(Does not validate against any of the Union subtypes|Subtypes: .*|Errors:|"
    r"Given value type: .*|Given value: (NestedArg|Namespace|\{).*|Expected a <class 'NoneType'>.*|"
    r"Expected a path but .* invalid)?$"
)

_PLAIN = {
    r'Parser key "([^"]+)":\s*': r"\1: ",
    r"\s*Subclass types expect.*": ". Name one by class_path, its options by init_args.",
    r"Importing '([^']+)' is not allowed, .*? to allow it\.": (
        r"\1 is not imported: classes come from installed packages, and from modules beside the YAML file or in the "
        "working folder"
    ),
    r"Expected a dot import path string: ?([^\n]*)(\nGiven value:[^\n]*)?": (
        r"there is no class '\1' for this. Name one of those that --help lists, or module.Class for one of your own"
    ),
    r"Expected an instantiatable class, but (\S+) is abstract": r"Name one of the subclasses of \1",
    r"a typing\.Literal\[(.*?)\]": r"one of \1",
    r"<class '(?:\w+\.)*(\w+)'>": r"\1",
}


class _Carried(BaseException):
    """Carries an error out of jsonargparse, which would catch it and try the next type that a value may have."""

    def __init__(self, error: Exception) -> None:
        self.error = error


@contextmanager
def own_errors() -> Iterator[None]:
    """Raise what a `Parser` refuses, and what a constructor raises, as it was raised first."""
    try:
        yield
    except _Carried as carried:
        raise carried.error from carried.error.__cause__


class Parser(LightningArgumentParser):
    """A parser whose errors are `ConfigError`, and suggest the word that was meant; to be used within `own_errors`."""

    _owner: str | None = None
    _reading: tuple[str, Mapping[str, Any]] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def add_class_arguments(self, theclass: type, nested_key: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """Remember the class that this parser parses the arguments of, for its messages."""
        if nested_key is None:
            self._owner = theclass.__name__
        return super().add_class_arguments(theclass, nested_key, *args, **kwargs)

    def parse_args(self, args: Any = None, *others: Any, **kwargs: Any) -> Any:
        """Parse the words of a command line."""
        if self._owner is None:
            args = as_config(args)
            values = (re.sub(r"^--[\w.]+=?", "", word) for word in args)
            allow((name for value in values for name in re.findall(r"[^\W\d]\w*(?:\.[^\W\d]\w*)+", value)), Path.cwd())
        return super().parse_args(args, *others, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the message and close matches of the words it doesn't know."""
        text = self._placed(_plain(message)) if self._owner is None else f"{self._owner}: {_plain(message)}"
        raise _Carried(ConfigError("\n".join(filter(None, [text, suggestion(text, self._known_words())])))) from ex

    @contextmanager
    def reading(self, source: str, given: Mapping[str, Any]) -> Iterator[None]:
        """Name the file, and the term where it is known, in what is refused while a configuration is read."""
        self._reading = (source, given)
        try:
            yield
        except _Carried as carried:
            if isinstance(carried.error, ConfigError):
                text = self._placed(str(carried.error))
                raise _Carried(ConfigError(text)) from carried.error.__cause__
            raise
        self._reading = None

    def _placed(self, text: str) -> str:
        if self._reading is None:
            return text
        (source, given), self._reading = self._reading, None
        owner = text.split(":")[0]
        where = places(given, owner)
        named = {name: each for name, each in (given.get("objectives") or {}).items() if _class(each)} if (
            owner == "objectives" and isinstance(given.get("objectives"), Mapping)) else {}  # fmt: skip
        terms = [name for name, each in named.items() if re.search(rf"(?<!\w){re.escape(_class(each))}(?!\w)", text)]
        if len(where) == 1:
            text = f"{where[0]}: {text}"
        elif len(terms) == 1:
            text = f"objectives.{terms[0]}{text.removeprefix('objectives')}"
        return f"{source}: {text}" if source else text

    def instantiate_classes(self, cfg: Namespace, **kwargs: Any) -> Any:
        """Make the objects of a configuration."""
        return self.instantiate(cfg, instantiators=[(_make, object, True)], **kwargs)

    def validate(self, namespace: Namespace, *args: Any, **kwargs: Any) -> None:
        """Check all values; null is one too, which jsonargparse takes for any type."""
        super().validate(namespace, *args, **kwargs)
        super().validate(namespace, skip_unset=False, skip_required=True)

    def _known_words(self) -> set[str]:
        options = [option.strip("-+") for action in self._actions for option in action.option_strings]
        words = {part for option in options for part in option.split(".")}
        for base in (Objective, LayerMapping, Schedule, ModelSource, L.LightningDataModule, L.Callback, Logger):
            for cls in _subclasses(base):
                words |= {cls.__name__, *inspect.signature(cls).parameters}
        return words


def _class(given: Any) -> str:
    """Return the class that a value in a configuration names, or nothing."""
    return str(given.get("class_path") or "") if isinstance(given, Mapping) else str(given or "")


def _make(cls: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return cls(*args, **kwargs)
    except Exception as error:
        raise _Carried(error) from None


def _subclasses(cls: type[Any]) -> set[type[Any]]:
    return {s for direct in cls.__subclasses__() for s in (direct, *_subclasses(direct))}


def _plain(message: str) -> str:
    r"""Return a message of jsonargparse without its types.

    >>> tried = "Does not validate against any of the Union subtypes\nErrors:\n  - Expected a <class 'int'>"
    >>> print(_plain(f'Parser key "trainer.max_epochs":\n{tried}\nGiven value type: str\nGiven value: many'))
    trainer.max_epochs: Expected a int
    Given value: many
    """
    keys = re.findall(r'^Parser key "([^"]+)":\s', message)
    lines = [re.sub(r"^\s*- |^\s+", "", line) for line in message.splitlines() if not _NOISE.match(line)]
    text = ": ".join([*keys, "\n".join(dict.fromkeys(lines))])
    for pattern, plain in _PLAIN.items():
        text = re.sub(pattern, plain, text, flags=re.DOTALL)
    return text


def suggestion(message: str, known: set[str]) -> str:
    """Find the words of an error message that are close to a known word, but aren't one.

    >>> suggestion("Option 'wieght' is not accepted", {"weight", "name"})
    "Did you mean 'weight' instead of 'wieght'?"
    """
    choices = {word for listed in re.findall(r"one of (.*?)\. Got", message) for word in re.findall(r"'(.*?)'", listed)}
    unknown = re.findall(r"'([\w.]+)'|\"([\w.]+)\"|--([\w.]+)|: (\w+)$", message, re.MULTILINE)
    parts = [part for groups in unknown for word in groups for part in word.split(".") if part]
    for part in reversed([part for part in parts if part not in known | choices]):  # what was given stands last
        close = difflib.get_close_matches(part, choices or known, n=2, cutoff=0.75)
        if close:
            return f"Did you mean {' or '.join(map(repr, close))} instead of {part!r}?"
    return ""


def with_flags(words: Sequence[str], *flags: str) -> list[str]:
    """Return words in which a switch without a value is on.

    >>> with_flags(["--estimate", "--overwrite", "false"], "estimate", "overwrite")
    ['--estimate=true', '--overwrite', 'false']
    """
    bare = {f"--{flag}" for flag in flags}
    pairs = zip(words, [*words, ""][1:], strict=True)
    return [f"{word}=true" if word in bare and after not in ("true", "false") else word for word, after in pairs]


def call(function: Callable[..., None], command: str, arguments: Sequence[str], *flags: str) -> None:
    """Call a function with arguments of the command line."""
    with own_errors():
        parser = Parser(prog=f"ildistil {command}", description=(inspect.getdoc(function) or "").splitlines()[0])
        parser.add_function_arguments(function, as_group=False, as_positional=True)
        config = parser.parse_args(with_flags(arguments, *flags))
    function(**config)
