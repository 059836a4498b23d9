"""The package list: `tasks/` lies at the root, where people look for it, and in the wheel as `orchestra._tasks`."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["orchestra", "orchestra.*"]), "orchestra._tasks"],
    package_dir={"orchestra._tasks": "tasks"},
    package_data={"orchestra": ["py.typed", "assets/**/*"], "orchestra._tasks": ["**/*"]},
)
