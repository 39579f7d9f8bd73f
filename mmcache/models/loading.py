"""Load models and tokenizers by name: a folder, a name on the Hugging Face hub, or `demo`, the one in this package.

Code in a model's folder runs only with `trust_remote_code`, and pickles are never read. Anything wrong with a folder is
an UnsupportedModelError.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, cast

import torch

from mmcache.errors import ArgumentError, UnsupportedModelError
from mmcache.models.inference import unsupported
from mmcache.models.tokenizer import said

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

__all__ = ["DEMO", "load_model", "load_tokenizer"]

DEMO = Path(__file__).parents[1] / "demo"
_CONVERT = (
    "load it where you trust it, and keep the folder that model.save_pretrained(…) then writes, which has safetensors"
)
_TRUST = (
    ". It brings its own Python code: read that, and say --trust-remote-code (trust_remote_code=True) if it may run"
)


def _place(name: str) -> str:
    return str(DEMO) if name == "demo" and not Path(name).exists() else name


def _transformers() -> Any:
    try:
        import transformers  # noqa: PLC0415 -- an extra, and slow to import
    except ImportError as error:
        raise UnsupportedModelError("loading models needs transformers: pip install 'mmcache[extract]'") from error
    transformers.utils.logging.disable_progress_bar()
    return transformers


def is_spread(model: nn.Module) -> bool:
    """Whether transformers placed the model on its devices (`device_map`), so that it must not be moved."""
    return getattr(model, "hf_device_map", None) is not None


def load_model(
    name: str,
    compute_dtype: str | None,
    *,
    device_map: str | dict[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Load a model in eval mode, on the CPU or as `device_map` says.

    Args:
        name: a folder, a name on the hub, or `demo` if no folder has that name.
        compute_dtype: the dtype that it computes in, by name; None for that of its checkpoint.
        device_map: as in transformers; `"auto"` spreads the layers of a model that is too large for one GPU over
            several. Needs accelerate.
        trust_remote_code: run the Python code in the model's folder. It can do anything that you can.

    Raises:
        UnsupportedModelError: there is no such model, it is damaged or incomplete, it has only pickled weights, it
            needs its own code, transformers cannot load it, or not all of it fits on the devices.
        ArgumentError: `compute_dtype` is no floating-point dtype.
    """
    dtype = "auto" if compute_dtype is None else getattr(torch, str(compute_dtype), None)
    if dtype != "auto" and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ArgumentError(f"compute_dtype is {compute_dtype!r}: expected a dtype such as 'float32' or 'bfloat16'")
    transformers, place = _transformers(), _place(name)
    with _explained(name, "model", place):
        _check_weights(Path(place))
        config = transformers.AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code)
        causal = any("LMHead" in kind or "CausalLM" in kind for kind in config.architectures or [])
        loader = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
        options = {} if device_map is None else {"device_map": device_map}
        model, found = loader.from_pretrained(
            place,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **options,
        )
    _check_complete(name, model, found["missing_keys"])
    away = [path for path, weight in model.named_parameters() if weight.device.type == "meta"]
    if away:
        # Such weights are loaded in each pass: they cannot be hashed, and every pass is slow.
        raise UnsupportedModelError(
            f"{name} does not fit: device_map={device_map!r} leaves {len(away)} of its weights on no device, the first "
            f"of them {away[0]}. Give more or larger GPUs, or a --compute-dtype that takes less"
        )
    return cast("nn.Module", model.eval())


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a model.

    Args:
        name: as of `load_model`.
        trust_remote_code: as of `load_model`.

    Raises:
        UnsupportedModelError: there is none, it is damaged, or it needs its own code.
    """
    transformers, place = _transformers(), _place(name)
    with _explained(name, "tokenizer", place):
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
        special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
        words = set(tokenizer.get_vocab()) - special
    # Without its files, transformers makes an empty tokenizer of some classes.
    if len(words) < 2:
        raise UnsupportedModelError(
            f"{name} has no tokenizer: a {type(tokenizer).__name__} without its files knows only special tokens. Add "
            f"tokenizer.json, or what the model's authors have in its place"
        )
    return tokenizer


@contextmanager
def _explained(name: str, what: str, place: str) -> Iterator[None]:
    """Turn any error of loading a folder, also of a damaged one, into UnsupportedModelError."""

    def explain(error: Exception) -> str:
        remedy = _TRUST if _brings_code(place) else ""
        return f"{name} cannot be loaded as a {what}: {said(error)}{remedy}"

    with unsupported(explain):
        yield


def _brings_code(place: str) -> bool:
    """Whether a model's folder, or its cached copy from the hub, names Python code of its own."""
    from transformers.utils import cached_file  # noqa: PLC0415 -- as above

    for file in ("config.json", "tokenizer_config.json"):
        try:
            found = cached_file(place, file, local_files_only=True, _raise_exceptions_for_missing_entries=False)
            if found and "auto_map" in json.loads(Path(found).read_text(encoding="utf-8")):
                return True
        except (OSError, ValueError, TypeError):
            continue  # the caller reports the original error
    return False


def _check_weights(folder: Path) -> None:
    """Refuse a folder whose weights are pickles or outside of it."""
    if not folder.is_dir():
        return
    pickles = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(kind))
    if pickles and not any(folder.glob("*.safetensors")):
        raise UnsupportedModelError(f"{folder} has pickled weights only ({pickles[0]}), which may run code: {_CONVERT}")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        strange = [file for file in files if not file.endswith(".safetensors") or PurePosixPath(file).name != file]
        if strange:
            raise UnsupportedModelError(f"{index} names {strange[0]!r}: expected files of the folder, *.safetensors")


def _check_complete(name: str, model: Any, missing: set[str]) -> None:
    """Refuse a model that lacks weights, which transformers would initialise at random.

    A missing pooler is fine: it comes after the last layer, and is removed from the model.
    """
    lacking = sorted(key for key in missing if "pooler" not in key.split("."))
    if lacking:
        raise UnsupportedModelError(
            f"{name} lacks {len(lacking)} of the weights that its configuration asks for, the first of them "
            f"{lacking[0]}: fetch the whole folder again, or mend its config.json"
        )
    for key in missing:
        path = key.split(".")
        model.get_submodule(".".join(path[: path.index("pooler")])).pooler = None
