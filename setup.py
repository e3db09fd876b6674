"""Only what pyproject.toml cannot say: all of calib's packages, found, plus the folder conf/ as calib/conf."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["calib", "calib.*"]), "calib.conf"], package_dir={"calib.conf": "conf"})
