"""Arguments of the command line -> dataclasses: `with_tyro`, and `plain` where tyro is not installed.

Both have `parse(args)`, the same options by the same names, and exit with code 2 where arguments do not fit.
"""
