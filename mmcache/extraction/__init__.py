"""Extraction: plan a store from a model and text, fill it, resume it."""
