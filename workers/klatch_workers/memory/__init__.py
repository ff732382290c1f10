"""The memory worker: embeds finished turns, and answers what the other workers of the deployment ask of it."""
