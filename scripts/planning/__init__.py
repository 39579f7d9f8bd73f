"""What a store will take, before there is one: bytes, hours, and where they go."""
