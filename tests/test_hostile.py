"""Nothing that is read is executed, and text is data: in the network, on a terminal, in a page."""

import ast
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import yaml
from hostile import TOKENIZER, as_lines, only_ours, resealed, save_small
from run import faulty
from small_engines import SPECIAL
from test_layout import tracked

import engine
from engine.data.prompts import load_prompts
from engine.data.rows import DataSource
from engine.data.text import load_sft
from engine.data.tokenizer import load_tokenizer
from engine.errors import EngineError
from engine.model.weights import load_policy
from engine.run import checkpoint
from engine.train import main, parse


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> dict[str, str]:
    return faulty.make_setting(tmp_path_factory.mktemp("setting"))


# --- nothing is executed


class Bomb:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def loaders(setting, tmp_path):
    model = shutil.copytree(setting["model"], tmp_path / "model")
    bare = shutil.copytree(setting["model"], tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    saved = save_small(tmp_path / "run")
    parts = {p.name: p for p in saved.iterdir()}

    def of_checkpoint(name):
        def load():
            if name != "manifest.json":
                resealed(saved)
            checkpoint.load(saved)

        return parts[name], load

    def rows(name):
        return tmp_path / name, lambda: load_sft([DataSource(str(tmp_path / name))], TOKENIZER)

    folder = tmp_path / "folder"
    folder.mkdir()
    yaml_file = tmp_path / "config.yaml"
    base = [
        "--stage",
        "sft",
        "--config",
        str(yaml_file),
        "--model_name_or_path",
        "m",
        "--output_dir",
        "o",
    ]
    return {
        "weights": (model / "model.safetensors", lambda: load_policy(model)),
        "config.json": (model / "config.json", lambda: load_policy(model)),
        "pytorch_model.bin": (bare / "pytorch_model.bin", lambda: load_policy(bare)),
        "tokenizer.json": (model / "tokenizer.json", lambda: load_tokenizer(model)),
        "checkpoint tensors": of_checkpoint("model.safetensors"),
        "checkpoint state": of_checkpoint("state.json"),
        "checkpoint manifest": of_checkpoint("manifest.json"),
        "rows.jsonl": rows("rows.jsonl"),
        "rows.jsonl.gz": rows("rows.jsonl.gz"),
        "rows.parquet": rows("rows.parquet"),
        "rows.pkl": rows("rows.pkl"),
        "saved data set": (
            folder / "state.json",
            lambda: load_sft([DataSource(str(folder))], TOKENIZER),
        ),
        "config file": (yaml_file, lambda: parse(base)),
    }


NAMES = ("weights", "config.json", "pytorch_model.bin", "tokenizer.json", "checkpoint tensors", "checkpoint state",
         "checkpoint manifest", "rows.jsonl", "rows.jsonl.gz", "rows.parquet", "rows.pkl", "saved data set",
         "config file")  # fmt: skip


def test_the_bomb_works(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("protocol", [0, 4])
def test_no_loader_unpickles(name, protocol, setting, tmp_path):
    path, load = loaders(setting, tmp_path)[name]
    path.write_bytes(pickle.dumps(Bomb(tmp_path / "mark"), protocol=protocol))
    with pytest.raises((EngineError, SystemExit)):
        load()
    assert not (tmp_path / "mark").exists()


def test_code_of_a_model_folder_is_not_run(setting, tmp_path):
    """`auto_map` and a module beside the weights, as repositories with remote code have them."""
    folder = shutil.copytree(setting["model"], tmp_path / "model")
    mark = tmp_path / "mark"
    (folder / "modeling.py").write_text(
        f"import os; os.mkdir({str(mark)!r})\nclass Model: pass\nclass Tok: pass\n"
    )
    for name, key in (
        ("config.json", "AutoModelForCausalLM"),
        ("tokenizer_config.json", "AutoTokenizer"),
    ):
        path = folder / name
        auto = "modeling.Model" if key.startswith("AutoModel") else ["modeling.Tok", None]
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {key: auto}}))
    only_ours(engine.HybridEngine.from_pretrained, folder, dtype="float32")
    assert not mark.exists()


CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "np.load", "numpy.load", "yaml.load",
         "yaml.unsafe_load", "os.system", "os.popen", "joblib.load", "pandas.read_pickle"}  # fmt: skip
MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "shelve",
    "marshal",
    "joblib",
    "cloudpickle",
    "numpy.lib.npyio",
}


def test_nothing_in_the_engine_could():
    """Neither unpickles nor evaluates text: by imports and by calls; remote code is refused wherever it is named."""
    for path in tracked("engine/*.py", "kernels/*.py"):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            where = f"{path}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                assert not {alias.name for alias in node.names} & MODULES, where
            elif isinstance(node, ast.ImportFrom):
                assert node.module not in MODULES, where
            elif isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in CALLS, where
                for keyword in node.keywords:
                    if keyword.arg in ("trust_remote_code", "allow_pickle"):
                        assert ast.unparse(keyword.value) == "False", where
                    assert not (keyword.arg == "shell" and ast.unparse(keyword.value) == "True"), (
                        where
                    )
    for kind in engine.config.STAGES.values():
        assert "trust_remote_code" not in kind.__dataclass_fields__


# --- text is data


EVIL = f"nice {SPECIAL[0]}{SPECIAL[2]} yes"


@pytest.mark.parametrize("parse_special_tokens", [False, True])
def test_special_tokens_in_a_users_text(parse_special_tokens, setting, tmp_path):
    """Plain characters by default; control tokens where --parse_special_tokens asks for it."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        as_lines([{"prompt": EVIL}, {"messages": [{"role": "user", "content": EVIL}]}])
    )
    data = load_prompts(
        [DataSource(str(path))], TOKENIZER, parse_special_tokens=parse_special_tokens
    )
    control = set(TOKENIZER.convert_tokens_to_ids(SPECIAL))
    for prompt in data:
        own = 3 if TOKENIZER.chat_template else 0  # user, end, model: the template's
        assert sum(token in control for token in prompt.tokens) == own + (
            2 if parse_special_tokens else 0
        )
        assert TOKENIZER.decode(list(prompt.tokens)).count("nice") == 1


def test_nothing_that_is_printed_moves_the_terminal(setting, tmp_path, capsys):
    """Rows, paths and errors with control characters and mark-up: a run that shows progress, a dry run, an error."""
    evil = "\x1b[2J\x1b]0;title\x07\u202e[bold]x[/bold][/]"
    path = tmp_path / f"rows{evil.replace('/', '')}.jsonl"
    path.write_bytes(as_lines([{"prompt": evil, "completion": evil}] * 4))
    base = [
        "--stage",
        "sft",
        "--model_name_or_path",
        setting["model"],
        "--dataset_name",
        str(path),
        "--threads",
        "1",
    ]
    run = ["--output_dir", str(tmp_path / "run"), "--max_length", "90", "--max_steps", "1"]
    assert main([*base, *run, "--dry_run"]) == 0
    assert main([*base, *run]) == 0
    assert main([*base, *run, "--max_length", "5"]) == 1
    path.write_bytes(b"\x1b[2J{" + evil.encode() + b"\n")
    assert main([*base, *run, "--output_dir", str(tmp_path / "other")]) == 1
    said = "".join(capsys.readouterr())
    assert "rows" in said
    assert not set(said) & set("\x1b\x07\u202e"), [c for c in said if c in "\x1b\x07\u202e"][:3]
    for record in (tmp_path / "run").glob("*.jsonl"):
        assert not set(record.read_text()) & set("\x1b\x07\u202e")


def test_a_report_of_a_hostile_run_is_inert(setting, tmp_path):
    """Prompts with scripts, through a real run to the page."""
    script = "<script>alert(1)</script><img src=x onerror=alert(2)>\x1b[31m"
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(as_lines([{"prompt": script}] * 4))
    config = faulty.ppo(
        setting, tmp_path / "run", dataset_name=str(path), total_episodes=4, max_length=85
    )
    engine.train_ppo(config)
    from engine.report import main as report

    assert report([str(tmp_path / "run"), "--output", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "alert(1)" in page and "<script>alert" not in page and "<img src=x" not in page
    assert "\x1b" not in page


def test_yaml_of_a_run_can_be_read_back_safely(setting, tmp_path):
    """A run's config.yaml holds plain values only."""
    engine.train_sft(faulty.sft(setting, tmp_path / "run", max_steps=1))
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["max_steps"] == 1
