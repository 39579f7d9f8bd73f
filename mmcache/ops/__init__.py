"""Whole-store operations: verify, repair, export, push, pull."""
