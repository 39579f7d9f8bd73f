"""Where shards lie: a folder, a bucket, the disk cache."""
