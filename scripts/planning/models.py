"""The cost of a model's forward pass: from a table, from a `config.json`, or from three numbers.

Nothing is downloaded, and no model is built.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from mmcache.errors import ArgumentError
from mmcache.models.loading import DEMO
from mmcache.models.sites import TABLE

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["PRESETS", "Model", "find_model", "model_of"]

# Each entry holds the relevant fields of `config.json` in the repository named, as they are there.
_LLAMA = {"model_type": "llama", "num_key_value_heads": 8, "vocab_size": 128256}
_GEMMA = {"model_type": "gemma2", "head_dim": 256, "vocab_size": 256000, "tie_word_embeddings": True}
PRESETS: Final[Mapping[str, tuple[str, Mapping[str, Any]]]] = MappingProxyType(
    {
        "gpt2": (
            "openai-community/gpt2",
            {"model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12, "n_positions": 1024,
             "vocab_size": 50257},
        ),
        "gpt2-xl": (
            "openai-community/gpt2-xl",
            {"model_type": "gpt2", "n_layer": 48, "n_embd": 1600, "n_head": 25, "n_positions": 1024,
             "vocab_size": 50257},
        ),
        "gemma-2-2b": (
            "google/gemma-2-2b",
            _GEMMA | {"num_hidden_layers": 26, "hidden_size": 2304, "intermediate_size": 9216,
                      "num_attention_heads": 8, "num_key_value_heads": 4},
        ),
        "gemma-2-9b": (
            "google/gemma-2-9b",
            _GEMMA | {"num_hidden_layers": 42, "hidden_size": 3584, "intermediate_size": 14336,
                      "num_attention_heads": 16, "num_key_value_heads": 8},
        ),
        "llama-3.2-1b": (
            "meta-llama/Llama-3.2-1B",
            _LLAMA | {"num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 8192,
                      "num_attention_heads": 32, "head_dim": 64, "tie_word_embeddings": True},
        ),
        "llama-3-8b": (
            "meta-llama/Meta-Llama-3-8B",
            _LLAMA | {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336,
                      "num_attention_heads": 32, "tie_word_embeddings": False},
        ),
        "llama-3-70b": (
            "meta-llama/Meta-Llama-3-70B",
            _LLAMA | {"num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672,
                      "num_attention_heads": 64, "tie_word_embeddings": False},
        ),
    }
)  # fmt: skip
# Families with two matrices per MLP instead of three, and as many key and value heads as query heads.
_PLAIN = ("gpt2", "gpt_neox")
_CONFIG_LIMIT = 1 << 24
_MOST = 1 << 40


@dataclass(frozen=True)
class Model:
    """What a plan needs to know of a model.

    `block` is the number of weights per layer that multiply a token, `attention` the width of all heads, `parameters`
    the size of all matrices. Norms and biases, a thousandth of them, are left out.
    """

    name: str
    source: str
    layers: int
    width: int
    attention: int
    block: int
    parameters: int

    def flops_a_token(self, depth: int, context: int) -> float:
        """The operations per token in the first `depth` layers, without the unembedding.

        Two per weight, and four per number of a head and token of the context. Masked positions count too, as is usual
        when a share of a GPU's peak is given (Chowdhery et al. 2022, "PaLM", appendix B).
        """
        return depth * (2.0 * self.block + 4.0 * self.attention * context)


def find_model(text: str) -> Model:
    """The model named: one of `PRESETS`, `demo`, a `config.json` or its folder, or `LAYERS,WIDTH,PARAMETERS`.

    Raises:
        ArgumentError: it is none of them, or its numbers are impossible.
    """
    if text in PRESETS:
        source, config = PRESETS[text]
        return model_of(text, f"config.json of {source}", config)
    path = DEMO if text == "demo" else Path(text)
    if path.is_dir():
        path /= "config.json"
    if path.is_file():
        return model_of(text, "its config.json", _read(path))
    if text.count(",") == 2:
        return _from_numbers(text)
    known = ", ".join(sorted([*PRESETS, "demo"]))
    raise ArgumentError(
        f"{text} is no model: expected one of {known}, a config.json, its folder, or LAYERS,WIDTH,PARAMETERS"
    )


def _read(path: Path) -> Mapping[str, Any]:
    try:
        if path.stat().st_size > _CONFIG_LIMIT:
            raise ArgumentError(f"{path} is larger than a config.json can be")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArgumentError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise ArgumentError(f"{path} is no config.json: expected an object, found a {type(config).__name__}")
    # Multimodal models keep the text model's config one level down.
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def _from_numbers(text: str) -> Model:
    try:
        layers, width, parameters = (int(float(part)) for part in text.split(","))
    except (ValueError, OverflowError):
        raise ArgumentError(f"{text!r}: expected LAYERS,WIDTH,PARAMETERS, such as 12,768,124e6") from None
    if not (0 < layers <= 1 << 16 and 0 < width <= 1 << 24 and layers <= parameters <= _MOST * 1000):
        raise ArgumentError(f"{text!r}: no model has so many layers, numbers or parameters")
    return Model(text, "as given", layers, width, width, parameters // layers, parameters)


def model_of(name: str, source: str, config: Mapping[str, Any]) -> Model:
    """Add up a model's matrices from its config.

    Raises:
        ArgumentError: the family's layers are not known, or a number is missing or impossible.
    """
    family = config.get("model_type")
    if family not in TABLE:
        raise ArgumentError(
            f"{name}: the layers of model_type {family!r} are not known here: give LAYERS,WIDTH,PARAMETERS"
        )

    def number(*keys: str, default: int | None = None) -> int:
        found = next((config[key] for key in keys if config.get(key) is not None), default)
        if type(found) is not int or not 0 < found < _MOST:
            raise ArgumentError(f"{name}: its config says {keys[0]} = {found!r}: expected a positive number")
        return found

    layers, width = number("num_hidden_layers", "n_layer"), number("hidden_size", "n_embd")
    heads = number("num_attention_heads", "n_head")
    plain = family in _PLAIN
    head = number("head_dim", default=width // heads)
    groups = heads if plain else number("num_key_value_heads", default=heads)
    inner = number("intermediate_size", "n_inner", default=4 * width)
    block = 2 * width * head * (heads + groups) + (2 if plain else 3) * width * inner
    # The defaults of transformers for a config without the field.
    tied = config.get("tie_word_embeddings", family in ("gpt2", "gemma2", "gemma3", "gemma3_text"))
    around = number("vocab_size") * width * (1 if tied else 2)
    if family == "gpt2":
        around += number("n_positions") * width
    return Model(name, source, layers, width, heads * head, block, layers * block + around)
