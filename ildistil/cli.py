"""The command ``ildistil``: parse the first word, and dispatch."""

import difflib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

import ildistil
from ildistil.errors import ConfigError, IldistilError, Stopped

__all__ = ["main"]

# Each command, the file in ildistil/commands/ that runs it, and its line of help.
COMMANDS = {
    "quickstart": ("quickstart", "the whole story in three minutes, without any download"),
    "finetune": ("finetune", "fine-tune a pretrained model on a task: the teacher"),
    "fit": ("fit", "distil a student from a teacher"),
    "study": ("study", "run many distillations, and compare them"),
    "precompute": ("precompute", "store what a teacher says of the training set, for many runs without it"),
    "validate": ("evaluate", "measure a student on the validation set"),
    "test": ("evaluate", "measure a student on the test set"),
    "predict": ("predict", "write a student's predictions to a file"),
    "compare": ("compare", "compare exported students with their teacher: quality, differences, cost"),
    "export": ("export", "write the student of a checkpoint as a plain transformers folder"),
    "presets": ("presets", "list the named configurations for 'fit --preset NAME': TinyBERT, MiniLM, PKD ..."),
}
_HELP = f"""\
usage: ildistil COMMAND [options]

Distil a Transformer into a smaller one.

{chr(10).join(f"  {name:<12} {line}" for name, (_, line) in COMMANDS.items())}

'ildistil COMMAND --help' shows the options of a command; '--print_config' with fit, validate,
test, predict, precompute or finetune prints its whole configuration as YAML, to edit and pass back with
'--config FILE'.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; wrong input ends with a message and exit code 2, not with a traceback."""
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("--help", "-h"):
        print(_HELP, end="")
        return
    if command == "--version":
        others = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning", "transformers"))
        print(f"ildistil {ildistil.__version__}, {others}")
        return
    _quieten()
    try:
        import_module(f"ildistil.commands.{_file(command)}").main(command, rest)
    except Stopped as stopped:
        raise SystemExit(stopped.code) from None  # it is said already
    except KeyboardInterrupt:
        print(f"ildistil {command}: stopped by Ctrl-C", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # whoever reads what is printed has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except PermissionError as error:
        print(f"ildistil {command}: error: {error.filename} can't be used: {error.strerror}.", file=sys.stderr)
        raise SystemExit(2) from None
    except IldistilError as error:
        if os.environ.get("ILDISTIL_TRACEBACK"):
            raise
        print(f"ildistil {command}: error: {error}", file=sys.stderr)
        known = f"{command} " if command in COMMANDS else ""
        print(f"('ildistil {known}--help' shows what there is, ILDISTIL_TRACEBACK=1 shows where.)", file=sys.stderr)
        raise SystemExit(2) from None


def _file(command: str) -> str:
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"Commands: {', '.join(COMMANDS)}."
        raise ConfigError(f"There is no command {command!r}. {hint}")
    return COMMANDS[command][0]


def _quieten() -> None:
    """Silence what users can do nothing about: other libraries' tips and deprecations."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
    warnings.filterwarnings("ignore", message="The `srun` command is available")  # told on every login node
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*is smaller than the logging interval.*")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(
            lambda record: "litlogger" not in record.getMessage() and "litmodels" not in record.getMessage()
        )


if __name__ == "__main__":
    main()
