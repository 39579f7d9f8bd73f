"""The cost of a store before it is made: bytes, hours, and which parts they go to."""
