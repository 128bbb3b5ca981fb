"""Readers fuzzed: rows, rankings, configs, models, checkpoints, records. Whatever they get, they return or raise an
error of our own, within bounded memory and within the folders that were named."""

import gzip
import json
import shutil
import tracemalloc
from pathlib import Path

import pytest
from hostile import (
    QUICK,
    TOKENIZER,
    as_lines,
    junk,
    only_ours,
    resealed,
    row,
    save_small,
    values,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from run import faulty
from safetensors.torch import load_file

import engine
from engine.data import rows as rows_module
from engine.data.prompts import load_prompts
from engine.data.rankings import load_rankings
from engine.data.rows import DataSource
from engine.data.text import load_sft
from engine.data.tokenizer import load_tokenizer
from engine.errors import CheckpointError, DataError, EngineError, ModelError
from engine.model.architectures import read_architecture
from engine.model.weights import load_policy
from engine.run import checkpoint
from engine.run.log import RunLog
from engine.train import main, parse


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> dict[str, str]:
    return faulty.make_setting(tmp_path_factory.mktemp("setting"))


# --- readers of rows and rankings


@pytest.mark.parametrize("load", [load_sft, load_rankings, load_prompts])
@pytest.mark.parametrize("bad_rows", ["error", "skip"])
def test_rows(load, bad_rows, place):
    @QUICK
    @given(st.lists(row, min_size=1, max_size=4))
    def fuzz(items):
        path = place / "rows.jsonl"
        path.write_bytes(as_lines(items))
        data = only_ours(load, [DataSource(str(path))], TOKENIZER, max_length=80, bad_rows=bad_rows)
        if data is not None:
            report = data.report
            assert report.read == len(items) == report.kept + sum(report.skipped.values())

    fuzz()


@pytest.mark.parametrize(
    "name", ["junk.jsonl", "junk.jsonl.gz", "junk.parquet", "cut.jsonl.gz", "cut.parquet"]
)
def test_files_that_are_junk(name, place):
    import pyarrow as pa
    from pyarrow import parquet

    path = place / name
    parquet.write_table(
        pa.Table.from_pylist([{"prompt": "a", "completion": "b"}] * 9), place / "good.parquet"
    )
    good = {
        "cut.jsonl.gz": gzip.compress(as_lines([{"prompt": "a", "completion": "b"}] * 9)),
        "cut.parquet": (place / "good.parquet").read_bytes(),
    }.get(name, b"")

    @QUICK
    @given(junk, st.integers(0, max(len(good) - 1, 0)), st.integers(0, 255))
    def fuzz(content, at, byte):
        data = bytearray(good or content)
        if good:
            data[at] = byte
        path.write_bytes(bytes(data))
        only_ours(load_sft, [DataSource(str(path))], TOKENIZER, max_length=80)

    fuzz()


def test_a_line_without_an_end_does_not_fill_the_memory(place, monkeypatch):
    """A gzip bomb: 100 MB of one line in 100 kB. Read in pieces, counted as one broken line; the next row is read."""
    path = place / "bomb.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(100):
            file.write(b" " * 10**6)
        file.write(b"\n" + as_lines([{"prompt": "a", "completion": "b"}]))
    monkeypatch.setattr(rows_module, "LINE_BYTES", 2**20)
    tracemalloc.start()
    try:
        data = load_sft([DataSource(str(path))], TOKENIZER, bad_rows="skip")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 * 2**20
    assert dict(data.report.skipped) == {"broken line": 1} and len(data) == 1
    with pytest.raises(DataError, match=r"bomb.jsonl.gz:1: it has more than 1048576 bytes"):
        load_sft([DataSource(str(path))], TOKENIZER)


def test_a_saved_folder_names_no_file_outside(place):
    from datasets import Dataset

    folder = place / "saved"
    Dataset.from_list([{"prompt": "a", "completion": "b"}] * 3).save_to_disk(str(folder))
    assert len(load_sft([DataSource(str(folder))], TOKENIZER)) == 3
    state = json.loads((folder / "state.json").read_text())
    shutil.copy(folder / state["_data_files"][0]["filename"], place / "outside.arrow")
    for name in ("../outside.arrow", str(place / "outside.arrow"), "..", "a\0b", 3, None):
        (folder / "state.json").write_text(
            json.dumps(state | {"_data_files": [{"filename": name}]})
        )
        with pytest.raises(DataError, match="want names in the same folder"):
            load_sft([DataSource(str(folder))], TOKENIZER)

    @QUICK
    @given(st.binary(max_size=50) | values.map(lambda v: json.dumps(v).encode()))
    def fuzz(content):
        (folder / "state.json").write_bytes(content)
        only_ours(load_sft, [DataSource(str(folder))], TOKENIZER)

    fuzz()


# --- configs


def test_config_files(place):
    keys = sorted(engine.PPOConfig.__dataclass_fields__)

    @settings(QUICK, max_examples=20)
    @given(st.dictionaries(st.sampled_from(keys) | st.text(max_size=8), values, max_size=4))
    def fuzz(config):
        path = place / "config.yaml"
        path.write_text(json.dumps(config))
        try:
            stage, found, _ = parse(
                [
                    "--stage",
                    "ppo",
                    "--config",
                    str(path),
                    "--model_name_or_path",
                    "m",
                    "--output_dir",
                    "o",
                ]
            )
            assert isinstance(found, engine.PPOConfig)
        except SystemExit as stopped:
            assert stopped.code == 2
        except EngineError as error:
            assert str(error)

    fuzz()


@pytest.mark.parametrize(
    "text",
    [
        "seed: !!python/object/apply:os.system ['touch MARK']",
        "rewards: [!!python/object/apply:os.system ['touch MARK']]",
        "rewards: [{class_path: os.system, init_args: {command: 'touch MARK'}}]",
        "dataset_mixture: [{class_path: subprocess.Popen, init_args: {args: [touch, MARK]}}]",
        "rewards: {class_path: subprocess.Popen, init_args: {args: [touch, MARK]}}",
        "seed: {{}}",
        "adam_beta1: null",
        "a: &a [*a]",
        "[" * 3000,
    ],
)
def test_a_config_file_runs_nothing(text, tmp_path, capsys):
    mark = tmp_path / "mark"
    path = tmp_path / "config.yaml"
    path.write_text(text.replace("MARK", str(mark)))
    argv = [
        "--stage",
        "ppo",
        "--config",
        str(path),
        "--model_name_or_path",
        "m",
        "--output_dir",
        "o",
    ]
    try:
        assert main([*argv, "--reward_model_path", "r"]) == 2
    except SystemExit as stopped:
        assert stopped.code == 2
    said = capsys.readouterr().err
    assert not mark.exists() and said and "Traceback" not in said


def test_model_configs():
    """Every setting of a real config replaced by anything."""
    bases = {}
    for family in ("llama", "gpt2", "gpt_neox", "qwen3"):
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        bases[family] = CONFIG_MAPPING[family]().to_dict()

    @settings(QUICK, max_examples=150)
    @given(st.sampled_from(sorted(bases)), st.data(), values)
    def fuzz(family, data, value):
        key = data.draw(st.sampled_from(sorted(bases[family])))
        config = bases[family] | {key: value}
        a = only_ours(read_architecture, config)
        if a is not None:
            assert a.num_layers <= 10_000

    fuzz()
    with pytest.raises(ModelError, match="at most 10000"):
        read_architecture(bases["llama"] | {"num_hidden_layers": 10**12})


@pytest.mark.parametrize(
    "content", [b"\xff", b"[]", b"1" * 10**5, b"[" * 10**5, b"{", b'{"model_type": ["llama"]}']
)
def test_a_config_json_that_is_junk(content, setting, tmp_path):
    folder = shutil.copytree(setting["model"], tmp_path / "model")
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ModelError):
        load_policy(folder)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "..", "", None, 3, "a\0"]
)
def test_an_index_names_no_file_outside(name, setting, tmp_path):
    folder = shutil.copytree(setting["model"], tmp_path / "model")
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {"model.embed_tokens.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="want a file of the same folder"):
        load_policy(folder)


def test_tokenizer_files(setting, tmp_path):
    folder = shutil.copytree(setting["model"], tmp_path / "model")
    path = folder / "tokenizer.json"
    good = path.read_bytes()

    @settings(QUICK, max_examples=25)
    @given(st.integers(0, len(good) - 1), st.integers(0, len(good) - 1), junk)
    def fuzz(start, end, content):
        path.write_bytes(good[:start] + content + good[max(start, end) :])
        only_ours(load_tokenizer, folder)

    fuzz()


# --- checkpoints and records


def test_manifests(place):
    path = save_small(place / "run")
    good = json.loads((path / "manifest.json").read_text())
    entries = (
        st.dictionaries(st.sampled_from(["bytes", "sha256", "x"]), values, max_size=3) | values
    )
    names = st.sampled_from(
        ["state.json", "model.safetensors", "../x", "/etc/passwd", "a\0", "", ".."]
    )
    files = st.dictionaries(names | st.text(max_size=6), entries, max_size=3) | values
    whole = st.fixed_dictionaries(
        {"format": st.just(1) | values, "step": st.just(3) | values, "files": files}
    )

    lacking = st.sampled_from(sorted(good)).map(lambda k: {x: good[x] for x in good if x != k})

    @settings(QUICK, max_examples=150)
    @given(whole | values | lacking, st.booleans())
    def fuzz(manifest, good_files):
        if good_files and isinstance(manifest, dict) and isinstance(manifest.get("files"), dict):
            manifest = manifest | {"files": good["files"] | manifest["files"]}
        (path / "manifest.json").write_text(json.dumps(manifest))
        only_ours(checkpoint.load, path)
        only_ours(checkpoint.newest_whole, place / "run")

    fuzz()


@pytest.mark.parametrize(
    "content", [b"\xff", b"[" * 10**5, b"1" * 5000, b"null", b"", b'{"step": NaN}']
)
@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
def test_json_of_a_checkpoint_that_is_junk(name, content, tmp_path):
    path = save_small(tmp_path)
    (path / name).write_bytes(content)
    if name == "state.json":
        resealed(path)
        if content.startswith(b'{"step'):
            with pytest.raises(CheckpointError, match="step is 'nan'"):
                checkpoint.load(path).number("step")
            return
    with pytest.raises(CheckpointError, match=name):
        checkpoint.load(path)


def test_a_checkpoint_reads_no_file_outside(tmp_path):
    path = save_small(tmp_path)
    outside = tmp_path / "outside.safetensors"
    (path / "model.safetensors").rename(outside)
    (path / "model.safetensors").symlink_to(outside)
    with pytest.raises(CheckpointError, match="model.safetensors: missing"):
        checkpoint.load(path)


def test_states_and_tensors_that_are_sealed_but_wrong(setting, tmp_path):
    """Through the front door: a stage that goes on from them ends with our own error."""
    from safetensors.torch import save_file

    config = faulty.sft(
        setting, tmp_path / "run", max_steps=2, save_total_limit=1, resume_from_checkpoint="true"
    )
    engine.train_sft(config)
    path = checkpoint.kept(tmp_path / "run")[0]
    state = json.loads((path / "state.json").read_text())
    model = load_file(path / "model.safetensors")
    name = next(iter(model))

    def sealed(step_manifest: int) -> None:
        resealed(path)
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps(manifest | {"step": step_manifest}))

    broken_states = [{k: v for k, v in state.items() if k != key} for key in state]
    broken_states += [
        state | {key: value} for key in state for value in (None, "x", [], {"a": 1}, -1.5e308)
    ]
    for broken in broken_states:
        (path / "state.json").write_text(json.dumps(broken))
        sealed(2)
        only_ours(engine.train_sft, config)
    (path / "state.json").write_text(json.dumps(state))
    for tensors in (
        {},
        {name: model[name]},
        model | {name: model[name][:1].clone()},
        model | {"extra": model[name]},
    ):
        save_file({k: v.clone() for k, v in tensors.items()}, path / "model.safetensors")
        sealed(2)
        with pytest.raises(EngineError):
            engine.train_sft(config)


def test_records_that_are_junk(place):
    path = place / "log" / "metrics.jsonl"
    path.parent.mkdir()

    @settings(QUICK, max_examples=30)
    @given(junk | st.lists(values, max_size=4).map(as_lines))
    def fuzz(content):
        path.write_bytes(content)
        with RunLog(path.parent, quiet=True) as log:
            log.resume(3)
            log.metrics(4, {"loss": 1.0})
        assert json.loads(path.read_text().splitlines()[-1])["step"] == 4

    fuzz()
