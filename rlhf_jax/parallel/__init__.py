"""Arrays on several devices: their sharding, and sums with the same bits on any number of them."""
