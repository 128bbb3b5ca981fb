"""Coverage-guided fuzzing of the readers, by atheris: python tests/guided.py READER FOLDER [libFuzzer's options]

The bytes of a file are what the fuzzer finds; FOLDER holds the file and, in `seeds`, a good one to begin with. A reader
returns or raises an error of the engine's own; anything else ends the run with the input that did it. Without an end of
its own it goes on until -max_total_time=SECONDS.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["engine.data", "engine.model", "engine.run"]):
    from hostile import TOKENIZER, only_ours, save_small

    import engine.run.checkpoint
    from engine.data.prompts import load_prompts
    from engine.data.rankings import load_rankings
    from engine.data.rows import DataSource
    from engine.data.text import load_sft
    from engine.model.architectures import read_architecture
    from engine.model.folder import read_json
    from engine.run.log import RunLog

Reader = tuple[list[bytes], Callable[[bytes], None]]  # good files, and what reads one
ROW = {"prompt": "a", "completion": "b", "responses": ["x", "y"], "ranks": [1, 2], "messages": []}
LLAMA = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}


def rows(folder: Path) -> Reader:
    path = folder / "rows.jsonl"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        for load in (load_sft, load_rankings, load_prompts):
            only_ours(load, [DataSource(str(path))], TOKENIZER, max_length=80, bad_rows="skip")

    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    return [json.dumps(ROW).encode() + b"\n", json.dumps(chat).encode() + b"\n"], read


def model(folder: Path) -> Reader:
    path = folder / "config.json"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        found = only_ours(lambda: read_architecture(read_json(path)))
        assert found is None or found.num_layers <= 10_000

    return [json.dumps(LLAMA).encode()], read


def manifest(folder: Path) -> Reader:
    path = save_small(folder / "run")

    def read(content: bytes) -> None:
        (path / "manifest.json").write_bytes(content)
        only_ours(engine.run.checkpoint.load, path)
        only_ours(engine.run.checkpoint.newest_whole, folder / "run")

    return [(path / "manifest.json").read_bytes()], read


def record(folder: Path) -> Reader:
    path = folder / "log" / "metrics.jsonl"
    path.parent.mkdir(exist_ok=True)

    def read(content: bytes) -> None:
        path.write_bytes(content)
        with RunLog(path.parent, quiet=True) as log:
            log.resume(3)

    return [b'{"step": 1, "loss": 2.0}\n{"step": 4, "loss": 1.0}\n'], read


READERS = {"rows": rows, "model": model, "manifest": manifest, "record": record}


def main() -> None:
    name, place, *options = sys.argv[1:]
    folder = Path(place)
    good, read = READERS[name](folder)
    seeds = folder / "seeds"
    shutil.rmtree(seeds, ignore_errors=True)
    seeds.mkdir()
    for number, content in enumerate(good):
        (seeds / str(number)).write_bytes(content)
    prefix = f"-artifact_prefix={folder}/found-"
    atheris.Setup([sys.argv[0], str(seeds), prefix, "-rss_limit_mb=4000", "-timeout=20", *options], read)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
