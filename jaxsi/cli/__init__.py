"""The command line: one file a verb, and the processes that carry it out."""
