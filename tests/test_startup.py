"""What a process loads: commands and imports start fast by leaving out what they do not need."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import environment

#: Runs the first argument and prints which of the packages, the other arguments, were loaded.
LOADED = """
import sys
code, *packages = sys.argv[1:]
try:
    exec(code)
except SystemExit as end:
    assert not end.code, end.code
print("loaded:", *(name for name in packages if name in sys.modules))
"""
COMMAND = "from calib.cli.main import main; main({})"
#: Slow to import, each in tenths of a second, some in seconds.
HEAVY = ("mlx", "diffusionkit", "transformers", "huggingface_hub", "hydra", "scipy", "matplotlib", "jinja2", "beartype")


def loaded(code: str, *packages: str) -> list[str]:
    """Which of ``packages`` a process that runs ``code`` has loaded."""
    command = [sys.executable, "-c", LOADED, code, *packages]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()[1:]


@pytest.mark.parametrize("argument", ["--version", "--help"])
def test_help(argument: str) -> None:
    assert loaded(COMMAND.format([argument]), "numpy", "h5py", "yaml", "tqdm", *HEAVY) == []


def test_verify(data_dir: Path) -> None:
    assert loaded(COMMAND.format(["verify", str(data_dir)]), *HEAVY) == []


def test_reader() -> None:
    assert loaded("import calib.activations.reader", "PIL", "yaml", *HEAVY) == []


def test_job() -> None:
    assert loaded("import calib.stages.stages", *HEAVY) == ["mlx"]


def test_model() -> None:
    """T5 and downloads import transformers and huggingface_hub at use; tests of the stand-ins do."""
    assert loaded("import calib.models.emoji", *HEAVY) == ["mlx", "diffusionkit"]
