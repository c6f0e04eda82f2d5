"""One module a command: ``add_arguments(parser)`` and ``run(args) -> int``. Only the standard library is imported at
the top of each, so that ``--help`` is quick."""
