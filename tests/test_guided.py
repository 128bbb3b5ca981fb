"""Coverage-guided fuzzing of the readers (guided.py), where atheris is installed: `make fuzz`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("atheris", reason="pip install 'rlhf-engine[fuzz]' where atheris has a wheel")
SECONDS = os.environ.get("FUZZ_SECONDS", "5")
HERE = Path(__file__).parent


def fuzz(reader: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(HERE / "guided.py"), reader, str(folder), f"-max_total_time={SECONDS}", *options]
    path = os.pathsep.join(filter(None, [str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH")]))
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})


@pytest.mark.parametrize("reader", ["rows", "model", "manifest", "record"])
def test_a_reader_returns_or_refuses(reader, tmp_path):
    done = fuzz(reader, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    runs = re.search(r"Done (\d+) runs", done.stderr)
    assert runs and int(runs[1]) > 20, done.stderr[-2000:]
    assert "cov:" in done.stderr and not list(tmp_path.glob("found-*"))
