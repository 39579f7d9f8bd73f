"""SAELens's side of a comparison, run by a Python that has sae-lens: prints its seconds as JSON. Knows no mmcache.

Usage: python saelens_side.py MODEL_FOLDER OUT HOOK BATCH        (MODEL_FOLDER/texts.npy: token ids [n, length])
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch


class _StopError(Exception):
    """The layer that is wanted is done."""


def _bare(model: Any, module: Any, texts: np.ndarray, batch: int) -> float:
    """Run the model alone, as far as the layer that is wanted: seconds."""

    def stop(*_: object) -> None:
        raise _StopError

    handle = module.register_forward_hook(stop)
    began = time.perf_counter()
    with torch.no_grad():
        for start in range(0, len(texts), batch):
            try:
                model(torch.from_numpy(texts[start : start + batch]))
            except _StopError:
                continue
    taken = time.perf_counter() - began
    handle.remove()
    return taken


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def main() -> None:
    """Run the job, synced, and the bare forward passes after it."""
    folder, out, hook, batch = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    import sae_lens  # noqa: PLC0415 -- not ours, and slow
    from datasets import Dataset  # noqa: PLC0415
    from sae_lens.training import activations_store  # noqa: PLC0415

    logging.disable(logging.WARNING)
    texts = np.load(folder / "texts.npy")
    tokens, length = texts.size, texts.shape[1]
    # What its own models of TransformerLens do by the hook's name, and Hugging Face's would not.
    layer = int(hook.rsplit(".", 1)[1])
    activations_store.extract_stop_at_layer_from_tlens_hook_name = lambda _name: layer + 1
    width = json.loads((folder / "config.json").read_text())["n_embd"]
    config = sae_lens.CacheActivationsRunnerConfig(
        dataset_path="given",
        model_name=str(folder),
        model_class_name="AutoModelForCausalLM",
        model_batch_size=batch,
        hook_name=hook,
        d_in=width,
        training_tokens=tokens,
        context_size=length,
        new_cached_activations_path=str(out),
        shuffle=False,
        dtype="float32",
        device="cpu",
        # One buffer for all of it: it fills whole buffers, whatever `training_tokens` says.
        buffer_size_gb=(tokens * width * 4 + 1) / 1e9,
        prepend_bos=False,
        streaming=False,
    )
    runner = sae_lens.CacheActivationsRunner(config, override_dataset=Dataset.from_dict({"input_ids": texts.tolist()}))
    model: Any = runner.model
    _bare(model.model, model.named_modules_dict[hook], texts[:batch], batch)  # warms the machine up
    began = time.perf_counter()
    runner.run()
    _sync(out)
    taken = time.perf_counter() - began
    bare = _bare(model.model, model.named_modules_dict[hook], texts, batch)
    print(json.dumps({"runner": taken, "bare": bare, "version": sae_lens.__version__}))


if __name__ == "__main__":
    main()
