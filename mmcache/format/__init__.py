"""The file format: dtypes, shards, zarr.json."""
