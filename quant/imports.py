"""Is the `kernels` that Python finds this repository's? Hugging Face publishes a package of the same import name."""

import importlib.util
from pathlib import Path

OURS = Path(__file__).resolve().parent.parent / "kernels"


def check_kernels_import() -> None:
    """Raises ImportError, naming both paths, when `import kernels` would bring another package."""
    spec = importlib.util.find_spec("kernels")
    if spec is None or spec.origin is None:
        raise ImportError(
            f"this repository's kernels/ at {OURS} is not on Python's path: install with `pip install -e .`"
        )
    found = Path(spec.origin).resolve().parent
    if found != OURS:
        raise ImportError(
            f"`import kernels` finds {found}, another package of that name (Hugging Face's, perhaps), before this "
            f"repository's {OURS}: uninstall it from this environment, or run from the repository's folder"
        )
