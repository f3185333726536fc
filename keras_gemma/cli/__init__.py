"""The command `keras-gemma`.

Knows terminals, pipes and exit codes; each command imports Keras when it runs, not before, so
that `--help` answers at once.

    app.py        the application, its exit codes and its errors
    generate.py   `keras-gemma generate`
    info.py       `keras-gemma info`
    presets.py    `keras-gemma presets`
"""

from keras_gemma.cli.app import main

__all__ = ["main"]
