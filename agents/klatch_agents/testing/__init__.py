"""Small real implementations to test against: they run for real, and do as they are told."""
