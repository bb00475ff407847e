"""Where a model lies: a built-in name, a .gguf file, a Hugging Face folder, or a repository of the hub."""

import re
from pathlib import Path

from .builtin import BUILTIN, builtin_path

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
TOKENIZER_FILES = ("*.json", "*.jinja")
MODEL_FILES = (*TOKENIZER_FILES, "*.safetensors")
IGNORED = ("*/*", "consolidated*")  # folders of other formats, and Mistral's own copy of the weights


def locate(source: str | Path, files: tuple[str, ...] = MODEL_FILES) -> Path:
    """A .gguf file or a folder. Downloads `files` of a hub repository, when source is org/name and no folder here.

    Raises ValueError when there is nothing there, and when the hub does not answer.
    """
    name = str(source)
    if name in BUILTIN:
        return builtin_path(name)
    path = Path(source)
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{path}: a model is a folder or a .gguf file, not this file")
        return path
    if not HUB_ID.fullmatch(name) or path.suffix in (".gguf", ".json", ".safetensors") or path.parent.is_dir():
        raise ValueError(f"{name}: no such folder or file; built-in models: {', '.join(BUILTIN)}; on the hub: org/name")
    return _downloaded(name, files)


def _downloaded(repo_id: str, files: tuple[str, ...]) -> Path:
    from huggingface_hub import errors, snapshot_download  # slow to import, and most sources are local

    try:
        return Path(snapshot_download(repo_id, allow_patterns=list(files), ignore_patterns=list(IGNORED)))
    except errors.GatedRepoError:
        reason = "it is gated: accept its terms on its page there, then log in with `hf auth login`"
    except errors.RepositoryNotFoundError:
        reason = "there is no such repository, or it is private: then log in with `hf auth login`"
    except errors.LocalEntryNotFoundError:
        reason = "it cannot be reached from here, and no copy is in its cache; a folder works offline"
    except Exception as error:  # the client passes on whatever its HTTP library raises
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    raise ValueError(f"{repo_id}: no such folder here, and the hub did not give it: {reason}") from None
