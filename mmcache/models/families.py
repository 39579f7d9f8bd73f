"""Which module's input or output each site is, in every model family that is known by name.

A place is written as users write a module path: a module inside one layer, then `:in` or `:out`; an empty
path is the layer itself. The definitions are the same in every family: `resid_pre`, `resid_mid` and
`resid_post` are the residual stream before, between and after the layer's two halves, `attn_out` and
`mlp_out` are what is *added* to the stream (so after a post-norm and after a residual dropout), and `mlp_in`
is the MLP module's own input.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["ABSENT", "ALIASES", "NOT_ALIASES", "SITES", "TABLE"]

SITES: Final[tuple[str, ...]] = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_in", "mlp_out")

_PRE_NORM = (":in", "post_attention_layernorm:in", ":out", "self_attn:out", "mlp:in", "mlp:out")
_SANDWICH_NORM = (
    ":in",
    "pre_feedforward_layernorm:in",
    ":out",
    "post_attention_layernorm:out",
    "mlp:in",
    "post_feedforward_layernorm:out",
)

# family → one place for each of SITES, in that order; None where the family has no such site (see ABSENT).
# The families are transformers' `config.model_type`, plus "gpt_neox (sequential)" for a GPT-NeoX with
# use_parallel_residual=False, and "transformer_lens", whose places are TransformerLens' own hook points.
TABLE: Final[Mapping[str, tuple[str | None, ...]]] = MappingProxyType(
    {
        "gpt2": (":in", "ln_2:in", ":out", "attn:out", "mlp:in", "mlp:out"),
        "gpt_neox": (":in", None, ":out", "post_attention_dropout:out", "mlp:in", "post_mlp_dropout:out"),
        "gpt_neox (sequential)": (
            ":in",
            "post_attention_layernorm:in",
            ":out",
            "post_attention_dropout:out",
            "mlp:in",
            "post_mlp_dropout:out",
        ),
        "llama": _PRE_NORM,
        "mistral": _PRE_NORM,
        "qwen2": _PRE_NORM,
        "qwen3": _PRE_NORM,
        "gemma2": _SANDWICH_NORM,
        "gemma3": _SANDWICH_NORM,
        "gemma3_text": _SANDWICH_NORM,
        "phi3": (
            ":in",
            "post_attention_layernorm:in",
            ":out",
            "resid_attn_dropout:out",
            "mlp:in",
            "resid_mlp_dropout:out",
        ),
        "olmo2": (
            ":in",
            "mlp:in",
            ":out",
            "post_attention_layernorm:out",
            "mlp:in",
            "post_feedforward_layernorm:out",
        ),
        "transformer_lens": (
            "hook_resid_pre:out",
            "hook_resid_mid:out",
            "hook_resid_post:out",
            "hook_attn_out:out",
            "mlp:in",
            "hook_mlp_out:out",
        ),
    }
)

_PARALLEL = (
    "in parallel blocks attention and MLP both read resid_pre, so there is no residual stream between them "
    "(resid_pre + attn_out + mlp_out = resid_post)"
)
ABSENT: Final[Mapping[tuple[str, str], str]] = MappingProxyType(
    {
        ("gpt_neox", "resid_mid"): _PARALLEL,
        ("transformer_lens", "resid_mid"): f"it has no hook_resid_mid; {_PARALLEL}",
    }
)

# TransformerLens hook names that mean exactly one of our sites, in every family (its post-norm families
# included: there, too, hook_attn_out and hook_mlp_out come after the norm, just before the addition).
ALIASES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "hook_resid_pre": "resid_pre",
        "hook_resid_mid": "resid_mid",
        "hook_resid_post": "resid_post",
        "hook_attn_out": "attn_out",
        "hook_mlp_out": "mlp_out",
    }
)

# TransformerLens hook names that look like one of our sites and are not: what they are, and what to ask for.
NOT_ALIASES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "hook_mlp_in": "the residual stream before the MLP's norm: use 'resid_mid' for that ('resid_pre' in "
        "parallel blocks), or 'mlp_in' for what the MLP module reads",
        "ln2.hook_normalized": "the norm's output before its learned weight and bias, which is not what the "
        "MLP reads: use 'mlp_in' for the MLP module's input",
        "mlp.hook_in": "the TransformerBridge name for the MLP module's own input: use 'mlp_in'",
        "mlp.hook_pre": "the MLP's hidden layer before its activation function: use a module path to the "
        "MLP's first linear module with ':out'",
        "mlp.hook_post": "the MLP's hidden layer after its activation function: use a module path to the "
        "MLP's last linear module with ':in'",
        "ln1.hook_normalized": "the norm's output before its learned weight and bias, which is not what "
        "attention reads: use a module path to the attention module with ':in'",
        "hook_attn_in": "the residual stream, copied for each head, before the attention's norm: use 'resid_pre'",
        "attn.hook_z": "the heads' outputs before the output projection, [batch, seq, heads, d_head]: use a "
        "module path to the output projection with ':in'",
        "attn.hook_result": "one output for each head: use 'attn_out' for their sum",
    }
)
