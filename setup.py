"""Refuse to build a wheel: the project runs from its checkout, which an editable install links to."""

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel


class RefuseWheel(bdist_wheel):
    """A wheel would hold the command without the code that it runs."""

    def run(self) -> None:
        raise SystemExit("error: NoR-MAE runs from its checkout and is not built into a wheel. Use: pip install -e .")


setup(cmdclass={"bdist_wheel": RefuseWheel})
