"""The verbs of the command line: one class each, its fields are the options, `run` does the work.

Heavy modules are imported in `run`, so that `graphprune --help` is immediate.
"""
