"""The folder `helpers` is installed as the package `sparcom`, the profiles beside it. What it needs
are the pins of requirements.txt as lower bounds: no older version has been tried.
"""

from pathlib import Path

from setuptools import find_packages, setup

NOTEBOOKS = {"papermill", "nbval", "nbformat", "nbclient", "ipykernel", "jupyterlab"}
TESTS = {"pytest", "pytest-xdist", "hypothesis", "ruff"}

lines = (Path(__file__).parent / "requirements.txt").read_text("utf-8").splitlines()
pins = [line.split("#")[0].strip() for line in lines]
needed = [pin for pin in pins if pin and pin.split("==")[0] not in NOTEBOOKS | TESTS]

setup(
    packages=["sparcom", "sparcom.profiles", *(f"sparcom.{n}" for n in find_packages("helpers"))],
    package_dir={"sparcom": "helpers", "sparcom.profiles": "notebooks/profiles"},
    package_data={
        "sparcom": ["py.typed"],
        "sparcom.plots": ["*.html"],
        "sparcom.run": ["pages/*"],
        "sparcom.profiles": ["*"],
    },
    include_package_data=False,
    install_requires=[pin.replace("==", ">=") for pin in needed],
)
