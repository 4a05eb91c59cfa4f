"""`worldvla <command>`: the command line.

A command is one file of this package, named like the command, with two functions:

    add_parser(subparsers) -> ArgumentParser    declares its arguments; imports nothing heavy
    run(args) -> dict | None                    does the work and prints for people; the dict is what `--json` prints

A command that offers `--json` adds it in `add_parser`. Bad input is raised (`UserError`, ValueError, OSError,
ImportError) and becomes one line on stderr and exit code 2; `--debug` shows where it was raised.
"""
