"""The parts of the cross-layer transcoder's trainer, `scripts/examples/train_clt/train_clt.py`."""
