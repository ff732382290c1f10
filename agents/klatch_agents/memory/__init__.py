"""Memory: finished turns by meaning, in a vector index that the topics can rebuild at any time."""
