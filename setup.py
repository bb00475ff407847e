"""Only an editable install is supported: any other build stops here, with one line. pyproject.toml has the rest.

The C kernels are compiled now if a compiler is there, else at first use; an install never fails for lack of them.
"""

import runpy
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class EditableOnly(build_py):
    def run(self) -> None:
        if not self.editable_mode:
            raise SystemExit(
                "qlora-anatomy is a repository to read: install it with `pip install -e .` "
                "(a copy would put folders with common names, kernels/ and data/ among them, into site-packages)"
            )
        super().run()
        try:
            runpy.run_path(str(Path(__file__).parent / "kernels" / "cpu" / "build.py"))["build"]()
        except Exception as reason:
            print(f"qlora-anatomy: the C kernels are left for later: {reason}")


setup(cmdclass={"build_py": EditableOnly})
