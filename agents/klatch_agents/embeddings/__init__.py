"""Embeddings: texts to vectors, by a local model or a server, behind one port."""
