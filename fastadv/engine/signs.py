import contextlib


def signs_only():
    return contextlib.nullcontext()
