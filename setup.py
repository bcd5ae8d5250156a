"""Puts the cards of docs/methods into the package when it is built, so that ``luthier card`` has them once installed."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithCards(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shutil.copytree(Path("docs/methods"), Path(self.build_lib) / "luthier" / "cards", dirs_exist_ok=True)


setup(cmdclass={"build_py": WithCards})
