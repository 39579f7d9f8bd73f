"""Models and tokenizers by name: what `mmcache.models.loading` has for users."""

from mmcache.models.loading import DEMO, load_model, load_tokenizer

__all__ = ["DEMO", "load_model", "load_tokenizer"]
