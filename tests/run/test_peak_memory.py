"""The estimate of a run's memory: its items against tensors, its sum against what whole runs took."""

import os
import platform
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from memory_runs import rows, run, save_model
from small_engines import save_tiny

from engine.config import PPOConfig, RMConfig, SFTConfig
from engine.data.pack import pack_sequences
from engine.errors import ConfigError
from engine.kernels._backend import kernels_usable
from engine.model import transformer
from engine.model.checkpointing import MODES
from engine.model.weights import load_policy, load_scalar, save_scalar, scalar_from_policy
from engine.run import memory
from engine.run.memory import Dtypes, Estimate
from engine.stages.estimates import Load, Machine, describe, epoch_estimator, load_of
from engine.stages.resources import as_begun, candidates, settle

WITHIN = 0.15


@pytest.fixture(scope="module")
def shaped(tmp_path_factory):
    """A model of SmolLM2's layers, four of them, with data of 300 tokens a row."""
    folder = tmp_path_factory.mktemp("shaped")
    return save_model(folder / "model", 4, 576, 1536, 4096, 9), rows(folder, 300, 8)


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head", ["lm_head", "score"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_weights_are_counted_to_the_byte(family, head, dtype, trainable, tmp_path):
    folder = save_tiny(family, tmp_path / "model")
    if head == "score":
        save_scalar(scalar_from_policy(folder, 0, "float32"), tmp_path / "score")
        model = load_scalar(tmp_path / "score", dtype, trainable)
    else:
        model = load_policy(folder, dtype, trainable)
    weights, specs = model.weights, describe(str(folder), head).specs
    held = {p.untyped_storage().data_ptr() for p in model.parameters().values()}
    own = [t for t in weights._plain.values() if t.data_ptr() not in held]
    own += [p.dense for p in weights._packed.values() if p.dense.data_ptr() not in held]
    own += [p.data for p in weights._packed.values() if p.data is not None]
    packed = any(p.data is not None for p in weights._packed.values())
    assert packed == kernels_usable()
    counted = memory.copy_bytes(specs, weights.dtype, trainable, packed)
    assert counted == sum(t.numel() * t.element_size() for t in own)
    if trainable:
        masters = sum(p.numel() for p in model.parameters().values())
        assert memory.parameters(specs) == masters
        assert memory.training_bytes(specs, True) == {
            "masters": 4 * masters,
            "moments": 8 * masters,
            "average": 4 * masters,
        }


@pytest.mark.skipif(not kernels_usable(), reason="counts what the engine's kernels save")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen3"])
def test_activations_are_counted_within_a_twentieth(family, mode, tmp_path):
    model = load_policy(save_tiny(family, tmp_path / "model"), "bfloat16", trainable=True)
    a, dtypes = model.architecture, Dtypes(model.dtype, model.act_dtype)
    batch = pack_sequences([list(range(90)), list(range(70))])
    activities = [torch.profiler.ProfilerActivity.CPU]
    transformer.forward(model, batch)  # the rotary table is there
    with torch.profiler.profile(activities=activities, profile_memory=True) as record:
        hidden = transformer.forward(model, batch, checkpointing=mode)
    kept = sum(event.self_cpu_memory_usage for event in record.events())
    last = 160 * a.hidden_size * (4 + hidden.element_size())  # the last norm's input and output
    counted = 160 * a.num_layers * memory.kept_bytes(a, dtypes, mode)
    assert counted == pytest.approx(kept - last, rel=0.05)


def test_the_longest_item_is_the_least_micro_batch():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert candidates(Load(longest=300, step=900), cpu) == [1024, 768, 512, 300]
    assert candidates(Load(longest=300, step=50000), cpu)[0] == 1024
    assert candidates(Load(longest=300, step=50000), gpu)[0] == 4096
    assert candidates(Load(longest=9000, step=50000), cpu) == [9000]
    assert load_of([5, 9, 2, 7], 2) == Load(longest=9, step=16)


def machine_of(config, free: float, held: float = 4e8) -> Machine:
    """With a GPU, for which more sizes are tried."""
    return replace(Machine.of(config), device=torch.device("cuda"), free=int(free), held=int(held))


def config_of(kind, shaped, tmp_path, **more):
    return kind(model_name_or_path=str(shaped[0]), output_dir=str(tmp_path / "out"), **more)


def test_the_default_is_by_a_share_of_what_is_free(shaped, tmp_path):
    config, load = config_of(SFTConfig, shaped, tmp_path), Load(longest=500, step=100_000)
    found = {}
    for free in (1.0e9, 1.4e9, 40e9):
        machine = machine_of(config, free)
        estimate = epoch_estimator(config, machine, "lm_head", load)
        chosen, line = settle(config, machine, load, estimate)
        found[free] = chosen.token_budget
        assert f"micro-batches of {chosen.token_budget} tokens" in line
        assert str(estimate(chosen.token_budget, "selective", 0.0)) in line
    assert 500 <= found[1.0e9] < found[1.4e9] < found[40e9] == 4096
    given = config_of(SFTConfig, shaped, tmp_path, micro_batch_tokens=77)
    machine = machine_of(given, 1.0e9)
    assert settle(given, machine, load, epoch_estimator(given, machine, "lm_head", load))[0] == given


def test_a_bound_takes_fewer_tokens_then_heavier_checkpointing_then_refuses(shaped, tmp_path):
    load, seen = Load(longest=2500, step=100_000), []
    for bound in (4.0, 1.2, 1.1):
        config = config_of(RMConfig, shaped, tmp_path, peak_memory_gb=bound)
        machine = machine_of(config, 40e9)
        estimate = epoch_estimator(config, machine, "score", load)
        chosen, _ = settle(config, machine, load, estimate)
        mode = chosen.activation_checkpointing
        assert estimate(chosen.token_budget, mode, 0.0).peak <= 0.95 * bound * 1e9
        seen.append((mode, chosen.token_budget))
    assert seen[0] == ("selective", 4096)
    assert seen[1][0] == "selective" and 1024 <= seen[1][1] < 4096
    assert seen[2][0] == "full" and seen[2][1] >= 2500
    config = config_of(RMConfig, shaped, tmp_path, peak_memory_gb=0.5)
    machine = machine_of(config, 40e9)
    with pytest.raises(ConfigError, match=r"peak_memory_gb: got 0.5.*= .*moments.*max_length"):
        settle(config, machine, load, epoch_estimator(config, machine, "score", load))


def test_a_resumed_run_goes_on_with_what_it_chose(shaped, tmp_path):
    config = config_of(SFTConfig, shaped, tmp_path, resume_from_checkpoint="true")
    (tmp_path / "out").mkdir()
    begun = "micro_batch_tokens: 640\nactivation_checkpointing: full\nkv_cache_gb: null\n"
    (tmp_path / "out" / "config.yaml").write_text(begun)
    load, machine = Load(500, 100_000), machine_of(config, 40e9)
    config = as_begun(config)
    chosen, _ = settle(config, machine, load, epoch_estimator(config, machine, "lm_head", load))
    assert (chosen.token_budget, chosen.activation_checkpointing) == (640, "full")


def as_given(tmp_path, begun: dict[str, object], kind=PPOConfig, **given):
    """(tokens, mode, cache) of a config with `given` that goes on with a run whose config.yaml says `begun`."""
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    (out / "config.yaml").write_text(yaml.safe_dump(begun))
    common = {"model_name_or_path": "m", "output_dir": str(out), "resume_from_checkpoint": "true"}
    if kind is PPOConfig:
        common["reward_model_path"] = "r"
    found = as_begun(kind(**common | given))
    return found.micro_batch_tokens, found.activation_checkpointing, getattr(found, "kv_cache_gb", None)


def test_what_is_given_to_a_resumed_run_wins(tmp_path):
    """Over what it began with: the flags that the message about too little memory names have their effect."""
    begun = {"micro_batch_tokens": 640, "activation_checkpointing": "none", "kv_cache_gb": 1.5}
    assert as_given(tmp_path, begun) == (640, "none", 1.5)
    assert as_given(tmp_path, begun, activation_checkpointing="full") == (None, "full", 1.5)
    assert as_given(tmp_path, begun, kv_cache_gb=0.5) == (None, "none", 0.5)
    assert as_given(tmp_path, begun, kv_cache_gb=1.5) == (640, "none", 1.5)
    assert as_given(tmp_path, begun, peak_memory_gb=4.0) == (None, "selective", 2.0)
    assert as_given(tmp_path, begun, micro_batch_tokens=77) == (77, "selective", 2.0)
    bounded = begun | {"peak_memory_gb": 4.0}
    assert as_given(tmp_path, bounded) == (640, "none", 1.5)
    assert as_given(tmp_path, bounded, peak_memory_gb=4.0) == (640, "none", 1.5)  # the same command again
    assert as_given(tmp_path, bounded, peak_memory_gb=3.0) == (None, "selective", 2.0)
    assert as_given(tmp_path, begun, kind=SFTConfig) == (640, "none", None)  # refused later, for its stage


def test_a_resumed_run_has_more_than_one_size_to_try(shaped, tmp_path):
    """A bound below what the tokens it began with take."""
    config = config_of(RMConfig, shaped, tmp_path, resume_from_checkpoint="true", peak_memory_gb=1.2)
    (tmp_path / "out").mkdir()
    begun = "micro_batch_tokens: 4096\nactivation_checkpointing: none\n"
    (tmp_path / "out" / "config.yaml").write_text(begun)
    load, machine = Load(2500, 100_000), machine_of(config, 40e9)
    config = as_begun(config)
    chosen, _ = settle(config, machine, load, epoch_estimator(config, machine, "score", load))
    assert 1024 <= chosen.token_budget < 4096 and chosen.activation_checkpointing == "selective"


def test_an_unsettled_budget_is_an_error(shaped, tmp_path):
    with pytest.raises(ConfigError, match="micro_batch_tokens: got none"):
        _ = config_of(PPOConfig, shaped, tmp_path, reward_model_path="r").token_budget


def test_free_memory_is_the_smaller_of_system_and_control_group(tmp_path):
    meminfo, group = tmp_path / "meminfo", tmp_path / "group"
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable:   2000 kB\n")
    assert memory.available_bytes(meminfo, group) == 2_048_000
    group.mkdir()
    (group / "memory.current").write_text("100\n")
    (group / "memory.max").write_text("max\n")
    assert memory.available_bytes(meminfo, group) == 2_048_000
    (group / "memory.max").write_text("1100\n")
    assert memory.available_bytes(meminfo, group) == 1000


def test_the_line_names_the_phase_and_its_items():
    phases = {"samples": {"weights": 3e9, "cache": 1e9}, "trains": {"weights": 3e9, "none": 0.0}}
    assert str(Estimate(phases)) == "4.00 GB while it samples = weights 3.00 + cache 1.00"


COMMON = {"max_length": 1024, "progress": "true", "dtype": "bfloat16"}


@pytest.mark.skipif(not kernels_usable(), reason="other products take other memory")
@pytest.mark.parametrize("stage,bound", [("sft", None), ("sft", 0.95), ("rm", 1.25)])
def test_a_run_takes_what_was_estimated(stage, bound, shaped, tmp_path):
    options = {**COMMON, "dataset_name": shaped[1]["sft" if stage == "sft" else "rankings"]}
    options |= {} if bound is None else {"peak_memory_gb": bound}
    measured, estimated, printed = run(
        stage,
        model_name_or_path=shaped[0],
        output_dir=tmp_path / "out",
        max_steps=2 if bound is None else 1,  # malloc's holes come with the second
        per_device_train_batch_size=8,
        **options,
    )
    assert measured == pytest.approx(estimated, rel=WITHIN), printed
    assert bound is None or measured < bound
    assert "TFLOP/s" in printed and "padded batches would have had" in printed


@pytest.mark.skipif(not kernels_usable(), reason="other products take other memory")
def test_ppo_takes_what_was_estimated(shaped, tmp_path):
    bound = 1.9
    save_scalar(scalar_from_policy(shaped[0], 0, "bfloat16"), tmp_path / "reward")
    measured, estimated, printed = run(
        "ppo",
        model_name_or_path=shaped[0],
        reward_model_path=tmp_path / "reward",
        output_dir=tmp_path / "out",
        dataset_name=shaped[1]["prompts"],
        batch_size=8,
        total_episodes=8,
        num_mini_batches=2,
        response_length=32,
        **COMMON | {"peak_memory_gb": bound},
    )
    assert measured == pytest.approx(estimated, rel=WITHIN), printed
    assert bound is None or measured < bound


FAULTS = """
import resource, torch
from engine.run import memory
{told}
def layers(count):
    for _ in range(count):
        x = [torch.zeros(5 << 18) for _ in range(4)]  # 5 MiB each
        del x
layers(5)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
layers(50)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(told: str) -> int:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES", "THP_"))}
    words = [sys.executable, "-c", FAULTS.format(told=told)]
    return int(subprocess.run(words, capture_output=True, text=True, check=True, env=environment).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_pages_of_freed_tensors_stay_or_go():
    """50 layers of 5,120 pages."""
    assert faults("assert memory.keep_freed()") < 2000
    assert faults("assert memory.keep_freed() and memory.give_back_freed()") > 200_000
    assert faults("assert memory.give_back_freed() and memory.keep_freed()") < 2000


@pytest.mark.parametrize(
    "more, told", [({}, "keep"), ({"peak_memory_gb": 4.0}, "give"), ({"activation_checkpointing": "full"}, "give")]
)
def test_what_malloc_is_told(more, told, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(memory, "keep_freed", lambda: said.append("keep") or True)
    monkeypatch.setattr(memory, "give_back_freed", lambda: said.append("give") or True)
    Machine.of(SFTConfig(**{"model_name_or_path": "m", "output_dir": str(tmp_path), "device": "cpu", **more}))
    assert said == [told]
