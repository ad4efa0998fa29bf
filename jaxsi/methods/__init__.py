"""One file a method: its paper's algorithm box, its Config, and one function that reads like the box.

Beside them: ``start`` finds and runs the method of a config, ``lifecycle`` has what methods do around their
iterations, ``preflight`` refuses what is bound to fail.
"""
