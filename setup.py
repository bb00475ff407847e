"""Only an editable install is supported: any other build stops here, with one line. pyproject.toml has the rest."""

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


setup(cmdclass={"build_py": EditableOnly})
