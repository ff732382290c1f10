"""The HTTP door: OpenAI's Chat Completions API in front of the log."""

from klatch_workers.http.app import App, create_app, serve
from klatch_workers.http.door import Door, Embeddings, Models, Terms
from klatch_workers.http.other import TextEmbeddings

__all__ = ["App", "Door", "Embeddings", "Models", "Terms", "TextEmbeddings", "create_app", "serve"]
