"""Options for known runs: `jvjepa train KIND --preset NAME ..`.

Each file defines `config` and, if it wants, `loop`; its head says the command, the machine and what
comes out, or that nobody has run it.
"""
