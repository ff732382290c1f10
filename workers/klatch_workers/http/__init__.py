"""The HTTP door: OpenAI's Chat Completions API in front of the log.

Nothing is imported here: `envelope` and `request_ids` serve the bare install too, which has no HTTP server.
"""
