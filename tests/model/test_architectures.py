"""Reading ``config.json``: both spellings, defaults, and what is refused, by value."""

import pytest
from families import CASES, ENDS, LLAMA3, VOCABULARY
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from engine.errors import ModelError
from engine.model.architectures import read_architecture
from engine.model.rotary import Rope

LLAMA = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 57,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 97,
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
}
NEOX = {**LLAMA, "model_type": "gpt_neox"}
QWEN2 = {**LLAMA, "model_type": "qwen2", "num_key_value_heads": 2}
MISTRAL = {**LLAMA, "model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None}
OLD_LLAMA3 = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}


@pytest.mark.parametrize("case", CASES)
def test_every_case_is_what_transformers_says(case):
    model_type, given = CASES[case]
    config = CONFIG_MAPPING[model_type](vocab_size=VOCABULARY, **{**given, **ENDS})
    a = read_architecture(config.to_dict())
    assert a.family == model_type and a.vocab_size == VOCABULARY
    assert (a.hidden_size, a.num_layers, a.num_heads) == (48, 2, 4)
    assert a.head_dim == getattr(config, "head_dim", None) or 12
    assert a.tied_head == config.tie_word_embeddings
    assert a.gated == (model_type not in ("gpt2", "gpt_neox"))


@pytest.mark.parametrize(
    "old, new",
    [
        ({"rope_theta": 500.0}, {"rope_theta": 500.0, "rope_type": "default"}),
        ({}, {}),
        (
            {"rope_theta": 9.0, "rope_scaling": {"type": "linear", "factor": 3.0}},
            {"rope_theta": 9.0, "rope_type": "linear", "factor": 3.0},
        ),
        ({"rope_theta": 500.0, "rope_scaling": OLD_LLAMA3}, LLAMA3),
        ({"rope_theta": 500.0, "rope_scaling": OLD_LLAMA3, "rope_parameters": LLAMA3}, LLAMA3),
    ],
)
def test_both_spellings_of_rope(old, new):
    assert read_architecture({**LLAMA, **old}) == read_architecture(
        {**LLAMA, "rope_parameters": new}
    )


def test_both_spellings_of_partial_rope():
    old = {**NEOX, "rotary_pct": 0.5, "rotary_emb_base": 77.0}
    new = {**NEOX, "rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 77.0}}
    assert read_architecture(old) == read_architecture(new)
    assert read_architecture(old).rope == Rope(rotary_dim=6, theta=77.0)
    assert read_architecture({**NEOX, "hidden_size": 64}).rotary_dim == 4  # a quarter of 16


def test_defaults_are_those_of_transformers():
    llama = read_architecture(LLAMA)
    assert (llama.num_kv_heads, llama.head_dim, llama.norm_eps) == (4, 12, 1e-6)
    assert llama.rope == Rope(12, 10000.0) and not llama.tied_head
    gpt2 = read_architecture(GPT2)
    assert (gpt2.intermediate_size, gpt2.activation, gpt2.tied_head) == (192, "gelu_tanh", True)
    assert read_architecture({**QWEN2, "model_type": "qwen3"}).head_dim == 128
    neox = read_architecture({**NEOX, "hidden_size": 64})
    assert neox.parallel_residual and neox.attention_bias and neox.activation == "gelu"


def test_an_unknown_model_type_names_the_known_ones():
    known = "gpt2, gpt_neox, llama, mistral, qwen2, qwen3"
    with pytest.raises(ModelError, match=f"model_type: got 'mamba', want one of {known}"):
        read_architecture({"model_type": "mamba"})
    with pytest.raises(ModelError, match="got None"):
        read_architecture({})


@pytest.mark.parametrize(
    "config, message",
    [
        ({**LLAMA, "hidden_act": "relu"}, "hidden_act: got 'relu', want one of silu, swish"),
        ({**LLAMA, "hidden_act": "gelu"}, "hidden_act: got 'gelu', want one of silu"),
        ({**GPT2, "activation_function": "silu"}, "got 'silu', want one of gelu, gelu_new"),
        ({**GPT2, "scale_attn_weights": False}, "scale_attn_weights: got False, only True"),
        ({**GPT2, "scale_attn_by_inverse_layer_idx": True}, "got True, only False is supported"),
        ({**GPT2, "add_cross_attention": True}, "add_cross_attention: got True, want it absent"),
        ({**LLAMA, "quantization_config": {"bits": 4}}, "quantization_config: got {'bits': 4}"),
        ({**LLAMA, "rope_scaling": {"rope_type": "yarn"}}, "rope_type: got 'yarn', want one of"),
        (
            {**LLAMA, "rope_parameters": {"full_attention": {"rope_theta": 1.0}}},
            "one set a layer type (full_attention), want one for all",
        ),
        ({**LLAMA, "rope_parameters": {"partial_rotary_factor": 0.5}}, "want 1.0 for llama"),
        *(
            (
                {**LLAMA, "rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": kind, "factor": 4.0}},
                f"and rope_scaling {{'type': '{kind}', 'factor': 4.0}}, want one of them, or both the same",
            )
            for kind in ("yarn", "dynamic", "linear")
        ),
        (
            {**LLAMA, "rope_parameters": {"rope_theta": 5.0}, "rope_scaling": {"type": "default"}},
            "got rope_parameters {'rope_theta': 5.0} and rope_scaling",
        ),
        (
            {**LLAMA, "rope_theta": 5.0, "rope_parameters": {"rope_theta": 6.0}},
            "got [6.0, 5.0] in different places",
        ),
        ({**LLAMA, "rope_theta": 0.0}, "rope_theta: got 0.0, want a number > 0"),
        ({**LLAMA, "rope_scaling": {"type": "linear"}}, "'linear': factor: got None, want a num"),
        (
            {**LLAMA, "rope_scaling": {**OLD_LLAMA3, "high_freq_factor": 1.0}},
            "high_freq_factor: got 1.0, want more than low_freq_factor 1.0",
        ),
        ({**NEOX, "rotary_pct": 0.25}, "0.25 of head_dim 12 gives 3 rotated entries"),
        ({**LLAMA, "hidden_size": 50}, "got hidden size 50 and 4 attention heads"),
        ({**LLAMA, "num_key_value_heads": 3}, "got 4 attention heads and 3 key/value heads"),
        ({**LLAMA, "num_hidden_layers": 0}, "num_hidden_layers: got 0, want a whole number >= 1"),
        ({**LLAMA, "vocab_size": True}, "vocab_size: got True, want a whole number"),
        ({**LLAMA, "hidden_size": None}, "hidden_size: got None, want a whole number"),
        (
            {**QWEN2, "model_type": "mistral", "max_position_embeddings": 8192},
            "sliding_window: got 4096 with max_position_embeddings 8192",
        ),
        ({**MISTRAL, "sliding_window": 63}, "set max_position_embeddings to 63"),
        (
            {**QWEN2, "use_sliding_window": True, "max_window_layers": 1, "sliding_window": 8},
            "sliding_window: got 8 with max_position_embeddings 64",
        ),
        (
            {**QWEN2, "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8},
            "sliding_window: got 8",
        ),
        ({**LLAMA, "layer_types": ["linear_attention"]}, "got 'linear_attention', want 'full_a"),
    ],
)
def test_what_is_not_supported_is_refused_with_its_value(config, message):
    with pytest.raises(ModelError) as error:
        read_architecture(config)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "config",
    [
        {**MISTRAL, "sliding_window": 64},
        {**QWEN2, "use_sliding_window": True, "max_window_layers": 2, "sliding_window": 8},
        {**QWEN2, "use_sliding_window": False, "max_window_layers": 1, "sliding_window": 8},
        {**LLAMA, "quantization_config": None, "pruned_heads": {}, "layer_types": None},
    ],
)
def test_what_changes_nothing_is_accepted(config):
    read_architecture(config)


def test_a_missing_number_of_key_heads_is_asked_for_where_there_is_no_right_default():
    config = {key: value for key, value in QWEN2.items() if key != "num_key_value_heads"}
    with pytest.raises(ModelError, match="num_key_value_heads: got None"):
        read_architecture(config)
    assert read_architecture({**QWEN2, "num_key_value_heads": None}).num_kv_heads == 4
