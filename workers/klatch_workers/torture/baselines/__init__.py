"""Minimal workers on other stream frameworks, as their documentation shows them, for `klatch torture --system`."""
