"""SAELens's side of a comparison, run by a Python that has sae-lens: executes requests, line by line. No mmcache.

Usage: python saelens_side.py MODEL_FOLDER OUT HOOK BATCH THREADS        (MODEL_FOLDER/texts.npy: token ids [n, length])

Prints its versions as a line of JSON. Each line of its input is then `bare` or `run`, and `stop` or `whole`: the model
alone, or a job to the end of its sync; up to the layer wanted, or to the logits, as SAELens runs it. The answer to each
is its seconds.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch


class _StopError(Exception):
    """The layer wanted is done."""


def _bare(model: Any, module: Any, texts: np.ndarray, batch: int, *, early: bool) -> None:
    """Run the model alone, up to the layer wanted or to its end."""

    def stop(*_: object) -> None:
        if early:
            raise _StopError

    handle = module.register_forward_hook(stop)
    with torch.no_grad():
        for start in range(0, len(texts), batch):
            with suppress(_StopError):
                model(torch.from_numpy(texts[start : start + batch]))
    handle.remove()


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def _runner(folder: Path, hook: str, batch: int, texts: np.ndarray) -> Any:
    """A runner of the whole corpus, in one buffer: it fills whole buffers, whatever `training_tokens` says."""
    import sae_lens  # noqa: PLC0415 -- not ours, and slow
    from datasets import Dataset  # noqa: PLC0415

    width = json.loads((folder / "config.json").read_text())["n_embd"]
    config = sae_lens.CacheActivationsRunnerConfig(
        dataset_path="given",
        model_name=str(folder),
        model_class_name="AutoModelForCausalLM",
        model_batch_size=batch,
        hook_name=hook,
        d_in=width,
        training_tokens=texts.size,
        context_size=texts.shape[1],
        shuffle=False,
        dtype="float32",
        device="cpu",
        buffer_size_gb=(texts.size * width * 4 + 1) / 1e9,
        prepend_bos=False,
        streaming=False,
    )
    return sae_lens.CacheActivationsRunner(config, override_dataset=Dataset.from_dict({"input_ids": texts.tolist()}))


def main() -> None:
    """Answer requests until the input ends."""
    folder, out, hook, batch = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    # stdout is for answers: what libraries print goes to stderr.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(int(sys.argv[5]))
    import sae_lens  # noqa: PLC0415
    from sae_lens.training import activations_store  # noqa: PLC0415

    logging.disable(logging.WARNING)
    texts = np.load(folder / "texts.npy")
    runner = _runner(folder, hook, batch, texts)
    runner.cfg.new_cached_activations_path = str(out)
    model: Any = runner.model
    print(json.dumps({"sae-lens": sae_lens.__version__, "torch": torch.__version__}), file=answers)
    layer = int(hook.rsplit(".", 1)[1])
    for line in sys.stdin:
        what, early = line.split()[0], line.split()[1] == "stop"
        # What it does by the hook's name for models of TransformerLens, but not for those of Hugging Face.
        last = layer + 1 if early else None
        activations_store.extract_stop_at_layer_from_tlens_hook_name = lambda _name, last=last: last
        gc.collect()
        began = time.perf_counter()
        if what == "run":
            runner.run()
            _sync(out)
        else:
            _bare(model.model, model.named_modules_dict[hook], texts, batch, early=early)
        print(time.perf_counter() - began, file=answers)
        shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    main()
