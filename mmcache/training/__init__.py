"""ActivationDataset: batches of rows for training."""
