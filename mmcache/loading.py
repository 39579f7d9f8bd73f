"""Public functions to load models and tokenizers by name, from `mmcache.models.loading`."""

from mmcache.models.loading import DEMO, load_model, load_tokenizer

__all__ = ["DEMO", "load_model", "load_tokenizer"]
