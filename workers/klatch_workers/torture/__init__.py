"""`klatch torture`: klatch under load and seeded faults, judged by nothing but what the log and its clients say."""
