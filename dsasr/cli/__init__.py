"""The ``dsasr`` command: a file per command, which parses its arguments and calls the package.

`main` finds a command by its words and imports its module alone: ``data make-shards`` is
`dsasr.cli.data.make_shards`. A module imports what it runs after its arguments are parsed, so that
``--help`` and the data commands need not wait for torch.
"""
