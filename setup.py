"""pyproject.toml has everything but this: the folder data travels inside the package, as hat_lib/data."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["hat_lib*", "studies*"]), "hat_lib.data"],
    package_dir={"hat_lib.data": "data"},
)
