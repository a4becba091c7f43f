"""Configuration files: read strictly, and never mixed where one says a thing anew."""

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml
from jsonargparse import ActionConfigFile, Namespace  # type: ignore[attr-defined]

from ildistil.commands._classes import allow, dotted
from ildistil.errors import ConfigError

__all__ = ["ConfigFile", "as_config", "places", "read"]

_CLASS = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
_BESIDE_A_CLASS = {"class_path", "init_args", "dict_kwargs"}


class ConfigFile(ActionConfigFile):
    """The option ``--config``: a YAML file that replaces what earlier ones say."""

    #: The parts that a command takes of the file, and passes over the others; None for all of them.
    parts: ClassVar[frozenset[str] | None] = None

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Check a file and apply it.

        Raises:
            ConfigError: There is no such file, or it is no YAML, has a key twice, or a value for a part.
        """
        given, passed = read(values), values
        if self.parts is not None:
            given = {name: value for name, value in given.items() if name in self.parts}
            passed = json.dumps(given)
        _forget(given, cfg)
        folders = () if values.startswith("{") else (Path(values).expanduser().absolute().parent,)
        allow(dotted(given), *folders, Path.cwd())
        with parser.reading("" if values.startswith("{") else values, given):
            super().__call__(parser, cfg, passed, option_string)  # type: ignore[no-untyped-call]
        for part in parser.groups:
            if not isinstance(cfg.get(part), Namespace) and cfg.get(part) != parser.get_defaults().get(part):
                raise ConfigError(f"{values}: {part!r} is {cfg[part]!r}. It holds values by their names.")


def _forget(given: Mapping[str, Any], earlier: Any) -> None:
    """Drop earlier lists, and earlier objectives that get a class anew: jsonargparse would keep values of theirs."""
    for name, value in given.items():
        if name not in earlier:
            continue
        if isinstance(value, list):
            earlier[name] = None
        elif isinstance(value, Mapping) and isinstance(earlier[name], Namespace):
            _forget(value, earlier[name])
        elif isinstance(value, Mapping) and isinstance(earlier[name], dict):  # the objectives, by name
            for key, one in value.items():
                if isinstance(one, str) or (isinstance(one, Mapping) and "class_path" in one):
                    earlier[name].pop(key, None)


def read(source: str) -> dict[str, Any]:
    """Return what a configuration file, or YAML in its place, holds."""
    path = Path(source).expanduser()
    inline = source.startswith("{")
    if not inline and not path.is_file():
        files = sorted(str(path.parent / p.name) for p in path.parent.glob("*.y*ml"))
        close = difflib.get_close_matches(source, files, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"YAML files beside it: {', '.join(files[:8]) or 'none'}."
        raise ConfigError(f"There is no file {source!r}. {hint}")
    where = "The value given" if inline else source
    try:
        text = source if inline else path.read_text(encoding="utf-8")
        root, found = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where} can't be read as YAML: {error}") from error
    if not isinstance(found, dict):
        what = "nothing" if found is None else f"a {type(found).__name__}"
        raise ConfigError(f"{where} holds {what}. A configuration names its parts, such as 'model:' and 'data:'.")
    _check_keys(root, where)
    return found


def _check_keys(node: yaml.Node, where: str) -> None:
    """Refuse two equal keys, of which YAML would drop the first without a word, and options beside a class."""
    if isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check_keys(value, where)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in lines:
            raise ConfigError(f"{where} has {name!r} twice, in lines {lines[name]} and {line}. Remove one of them.")
        lines[name] = line
        _check_keys(value, where)
    for key, value in node.value:
        good = isinstance(value, yaml.ScalarNode) and value.tag.endswith(":str") and _CLASS.fullmatch(value.value)
        if key.value == "class_path" and not good:
            got = repr(value.value) if isinstance(value, yaml.ScalarNode) else f"a {value.id}"
            raise ConfigError(
                f"{where}, line {lines['class_path']}: class_path is {got}. Name a class, such as AttentionKL; one of "
                "your own as module.Class."
            )
        if key.value == "init_args" and "class_path" in lines and not isinstance(value, yaml.MappingNode):
            raise ConfigError(
                f"{where}, line {lines['init_args']}: init_args holds no options by their names. Leave it out, or "
                "write {name: value}."
            )
    if "class_path" in lines and (beside := lines.keys() - _BESIDE_A_CLASS):
        name = min(beside)
        raise ConfigError(f"{where}, line {lines[name]}: write {name!r} under init_args, not beside class_path.")


def places(given: Any, name: str, at: str = "") -> list[str]:
    """Return where a configuration names a class.

    >>> places({"objectives": {"a": "HiddenMSE", "b": {"class_path": "mine.KL"}}}, "KL")
    ['objectives.b']
    """
    if isinstance(given, dict):
        found = [at] if str(given.get("class_path")).split(".")[-1] == name else []
        parts = [(f"{at}.{key}".removeprefix(".").removesuffix(".init_args"), value) for key, value in given.items()]
        return found + [place for path, value in parts if path.split(".")[-1] != "class_path"
                        for place in places(value, name, path)]  # fmt: skip
    if isinstance(given, list):
        return [place for number, value in enumerate(given) for place in places(value, name, f"{at}[{number}]")]
    return [at] if isinstance(given, str) and at and given.split(".")[-1] == name else []


def as_config(words: Iterable[str]) -> list[str]:
    """Return words of a command line in which a list of objects, and all objectives at once, stand behind ``--config``.

    So they replace what files say, as another file would.

    >>> as_config(["--model.stages", "[{epochs: 1}]", "--model.warmup=0"])
    ['--config={model: {stages: [{epochs: 1}]}}', '--model.warmup=0']
    """
    found, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        if rest and re.fullmatch(r"--[\w.]+", word) and rest[0].startswith(("[{", "{")):
            word = f"{word}={rest.pop(0)}"
        option = re.fullmatch(r"--([\w.]+)=(\[\s*\{.*\]|\{.*\})", word, re.DOTALL)
        if option and (option[2].startswith("[") or option[1] == "objectives"):
            keys = option[1].split(".")
            word = f"--config={''.join(f'{{{key}: ' for key in keys)}{option[2]}{'}' * len(keys)}"
        found.append(word)
    return found
