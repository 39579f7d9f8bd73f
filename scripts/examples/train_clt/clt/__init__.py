"""The parts of the cross-layer transcoder's trainer, `scripts/train_clt.py`."""
