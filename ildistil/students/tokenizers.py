"""Where tokenizers come from: the one place that loads them, and knows one that transformers made of nothing."""

import os
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ildistil import storage
from ildistil.errors import DataError, MissingFileError

__all__ = ["check_words", "load_tokenizer"]


def load_tokenizer(source: str | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a local folder or of a model on the hub; a loaded one is returned as it is.

    Raises:
        MissingFileError: The folder does not exist, or neither it nor the hub has a tokenizer that can be loaded.
        DataError: The folder has none, or it was changed since it was exported.
    """
    if not isinstance(source, str):
        return source
    path = Path(os.path.expanduser(source))
    looks_local = source.startswith((".", "/", "~")) or source.count("/") > 1
    if looks_local and not path.is_dir():
        raise MissingFileError(f"The tokenizer folder {source} does not exist. Name one that does, or a hub model.")
    storage.verify_folder(path, DataError, storage.CHANGED, skip=(".safetensors", ".bin"))
    try:
        # Without the last argument a folder with code of its own makes transformers ask on the terminal.
        found = AutoTokenizer.from_pretrained(str(path) if path.is_dir() else source, trust_remote_code=False)
    except Exception as error:  # many libraries deep: connections, missing packages, damaged files of any format
        raise MissingFileError(
            f"No tokenizer could be loaded from {source!r}: {error}\nName a folder that save_pretrained wrote, a model "
            "of the hub (which needs a network the first time), or pass a loaded tokenizer."
        ) from error
    assert isinstance(found, PreTrainedTokenizerBase)
    check_words(found)
    return found


def check_words(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer for which every word is unknown.

    Raises:
        DataError: It knows special tokens only.
    """
    words = {word.strip("▁") for word in tokenizer.get_vocab()}
    if words <= {"", *tokenizer.all_special_tokens}:
        raise DataError(
            f"The tokenizer {tokenizer.name_or_path!r} knows no words, only special tokens: transformers makes such a "
            "one of a folder without tokenizer files. Save the right one there with tokenizer.save_pretrained(folder), "
            "or name another."
        )
