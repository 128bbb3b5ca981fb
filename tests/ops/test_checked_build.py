"""The op tests on every class of CPU, under AddressSanitizer and UBSan, whatever this machine is (checked_build.py)."""

import checked_build
import pytest

OPS = {  # together, since a process under the sanitizers takes ten seconds to start
    "products": ["adversarial", "edges", "linear", "linear_logprob", "linear_logprob_loss", "linear_sample"],
    "rows": ["adamw", "attention", "attention_decode", "gae", "gelu", "kl_reward", "layernorm", "ppo_policy_loss",
             "ppo_value_loss", "ranking_loss", "rmsnorm", "rope", "swiglu", "transformer_step", "whiten"],
}  # fmt: skip
# What tests the definition, the schema or the errors; what is long and goes through no other memory.
LEFT_OUT = (
    "opcheck", "gradcheck", "do_not_fit", "does_not_fit", "golden", "never_exist", "frequencies", "any_width",
    "ragged_groups", "with_threads", "threads_change_nothing", "two_processes",
    "test_linear.py and knows_nothing_of_the_others and (576 or plain or avx2)",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def built():
    reason = checked_build.why_not()
    if reason:
        pytest.skip(reason)
    checked_build.build()


@pytest.mark.parametrize("group", OPS)
def test_no_class_leaves_its_memory_or_its_promises(group):
    files = [f"tests/ops/test_{op}.py" for op in OPS[group]]
    chosen = " and ".join(f"not ({name})" for name in LEFT_OUT)
    done = checked_build.run_tests(*files, "-k", chosen)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    assert " passed" in done.stdout
