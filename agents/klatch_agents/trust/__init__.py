"""Trust: what judges find in a request's text, and what a policy makes of it."""
