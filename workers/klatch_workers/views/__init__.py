"""Views: windowed counts by tenant and model, kept by Faust, read over HTTP and by `klatch top`.

Rebuildable from the log, beside the path of a request and never on it. Counts are of records: a settlement that
generation wrote twice after a crash counts twice.
"""
