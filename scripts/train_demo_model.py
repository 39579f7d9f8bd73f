"""Train the byte-level language model that the demo runs on, from text that ships with Python.

A Llama of under a million parameters learns the standard library's own sources, one token per byte. It takes minutes on
a CPU and needs no network, so anyone can make the packaged model again:

    python scripts/train_demo_model.py --out mmcache/demo
"""

import argparse
import hashlib
import json
import math
import platform
import sysconfig
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS_ID = 256
BOS = "<bos>"
CONTEXT = 512
BATCH = 4  # small batches, many steps: what a small model learns most from in a few minutes
PEAK_LR = 3e-3
WARMUP_STEPS = 100
HELD_OUT_SHARE = 0.1

# Tests are the bulk of an installation, where they are installed at all, and packages are other people's text. The
# codecs in `encodings` are near-copies of each other, so holding one out would test nothing.
LEFT_OUT_FOLDERS = {
    "dist-packages",
    "encodings",
    "ensurepip",
    "idle_test",
    "idlelib",
    "lib2to3",
    "site-packages",
    "test",
    "tests",
}
# Generated where Python was built or installed: they contain that machine's paths.
LEFT_OUT_FILES = ("_sysconfigdata_", "sitecustomize", "usercustomize")


def split_stdlib() -> tuple[list[Path], list[Path]]:
    """Split the standard library's sources by whole files.

    A file's side depends only on its name, so it is the same on every machine and for every version of Python that has
    the file.

    Returns:
        The files to train on and the files held out, each sorted by name.

    Raises:
        FileNotFoundError: One side is empty, as when Python runs from a zip file.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    train: list[Path] = []
    held_out: list[Path] = []
    for name in sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")):
        *folders, file = name.split("/")
        if LEFT_OUT_FOLDERS.intersection(folders) or file.startswith(LEFT_OUT_FILES):
            continue
        draw = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
        (held_out if draw < HELD_OUT_SHARE else train).append(root / name)
    if not train or not held_out:
        raise FileNotFoundError(f"no standard library sources to train on and hold out under {root}")
    return train, held_out


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer: a token's id is its byte, and BOS comes first."""
    # ByteLevel writes a printable byte as itself, and the others as the characters from 256 on, in order.
    printing = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)}
    others = iter(range(256, 512))
    vocabulary = {chr(byte if byte in printing else next(others)): byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary | {BOS: BOS_ID}, merges=[]))
    # Without merges there are no words to split: the regular expression would only take three times as long.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    tokenizer.add_special_tokens([AddedToken(BOS, special=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model() -> LlamaForCausalLM:
    """Build the model with fresh weights, under four megabytes in float32."""
    config = LlamaConfig(
        vocab_size=BOS_ID + 1,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=None,
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def draw_batch(stream: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw random windows of the training text, the first half of them starting with BOS.

    A context may start anywhere in a document, with or without BOS, so the model sees both.
    """
    starts = torch.randint(len(stream) - CONTEXT, (BATCH, 1), generator=generator)
    windows = stream[starts + torch.arange(CONTEXT)].long()
    windows[: BATCH // 2, 0] = BOS_ID
    return windows


def train(model: LlamaForCausalLM, documents: Iterable[bytes], steps: int, generator: torch.Generator) -> None:
    """Train the model in place, and print its progress."""
    stream = torch.tensor([token for text in documents for token in (BOS_ID, *text)], dtype=torch.int16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.1)

    def scale(step: int) -> float:
        warmup = min(1.0, (step + 1) / WARMUP_STEPS)
        return warmup * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    model.train()
    began = time.monotonic()
    recent = 0.0
    for step in range(1, steps + 1):
        tokens = draw_batch(stream, generator)
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        recent = loss.item() if step == 1 else 0.98 * recent + 0.02 * loss.item()
        if step % 100 == 0 or step == steps:
            seconds = time.monotonic() - began
            print(f"step {step:5d} of {steps}  loss {recent:.3f} nats/byte  {seconds:5.0f} s", flush=True)


@torch.inference_mode()
def held_out_loss(model: LlamaForCausalLM, documents: Iterable[bytes]) -> float:
    """The mean loss over every byte of the documents.

    Each document is cut into contexts that start with BOS and are independent of each other.

    Args:
        model: The model to measure.
        documents: The texts, at least one of them not empty.

    Returns:
        The loss in nats per byte.
    """
    model.eval()
    nats, count = 0.0, 0
    for text in documents:
        for start in range(0, len(text), CONTEXT - 1):
            tokens = torch.tensor([[BOS_ID, *text[start : start + CONTEXT - 1]]])
            predicted = tokens.shape[1] - 1
            nats += model(input_ids=tokens, labels=tokens, use_cache=False).loss.item() * predicted
            count += predicted
    return nats / count


def parse_arguments() -> argparse.Namespace:
    """The parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, help="a new folder; mmcache/demo if not given, anew")
    parser.add_argument("--steps", type=int, default=2500, help=f"steps of {BATCH * CONTEXT} bytes")
    parser.add_argument("--seed", type=int, default=0, help="for the weights and the order of the text")
    parser.add_argument("--threads", type=int, help="CPU threads; PyTorch's own choice if not given")
    arguments = parser.parse_args()
    # Checked before hours of training, and before anything is overwritten.
    if arguments.out and arguments.out.exists():
        parser.error(f"{arguments.out} is there: take another --out, or move it away")
    arguments.out = arguments.out or Path("mmcache/demo")
    return arguments


def main() -> None:
    """Train the model, measure it on the held-out files and write the folder."""
    arguments = parse_arguments()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    train_files, held_out_files = split_stdlib()
    train_texts = [path.read_bytes() for path in train_files]
    held_out_texts = [path.read_bytes() for path in held_out_files]
    model = build_model()
    record = {
        "text": "the Python standard library's own sources",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "seed": arguments.seed,
        "steps": arguments.steps,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "train_files": len(train_texts),
        "train_bytes": sum(map(len, train_texts)),
        "held_out_files": len(held_out_texts),
        "held_out_bytes": sum(map(len, held_out_texts)),
    }
    print(json.dumps(record, indent=2))
    train(model, train_texts, arguments.steps, torch.Generator().manual_seed(arguments.seed))
    loss = held_out_loss(model, held_out_texts)
    record["held_out_nats_per_byte"] = round(loss, 4)
    model.save_pretrained(arguments.out)
    # safetensors makes the file readable by its owner only, and a wheel would keep that.
    (arguments.out / "model.safetensors").chmod(0o644)
    build_tokenizer().save_pretrained(arguments.out)
    (arguments.out / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"held-out loss {loss:.4f} nats a byte; wrote {arguments.out}")


if __name__ == "__main__":
    main()
